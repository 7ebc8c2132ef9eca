"""The planted set, with which curation is measured."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.planted_set import COPIES, REPEATS, Sizes, plant
from tests.training.curate.scenes import scene


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("images")
    for number in range(24):
        path = root / ("train" if number < 16 else "val") / f"class{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(number, 96, 120)).save(path, quality=90)
    return root / "train", root / "val"


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def test_the_same_seed_gives_the_same_files(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        plant(folders[0], tmp_path / name, folders[1], Sizes(8, 2, 2), seed)
    assert _bytes_of(tmp_path / "a") == _bytes_of(tmp_path / "b")
    assert _bytes_of(tmp_path / "a").keys() != _bytes_of(tmp_path / "c").keys()


def test_the_truth_describes_the_files(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "set"
    plant(folders[0], out, folders[1], Sizes(8, 2, 2), 0)
    files = json.loads((out / "truth.json").read_text())["files"]
    written = _bytes_of(out)
    assert set(files) == set(written) - {"truth.json"}
    for path, entry in files.items():
        if entry["of"] is not None:
            assert files[entry["of"]]["kind"] == ("evaluation" if entry["kind"].startswith("leak_") else "original")
        if entry["kind"] in ("exact", "leak_exact"):
            assert written[path] == written[entry["of"]]
        if entry["kind"] == "cropped":
            left, top, right, bottom = entry["parameters"]["box"]
            with Image.open(out / path) as image, Image.open(out / entry["of"]) as whole:
                assert image.size == (right - left, bottom - top)
                assert image.width * image.height / (whole.width * whole.height) == pytest.approx(0.75, abs=0.01)
    kinds = [entry["kind"] for entry in files.values()]
    assert all(kinds.count(kind) == 2 for kind in ("exact", "blurred", "dark", "truncated", "leak_exact", *COPIES))


def test_leaks_and_repeated_images_have_their_own_numbers(folders: tuple[Path, Path], tmp_path: Path) -> None:
    files = plant(folders[0], tmp_path / "set", folders[1], Sizes(8, 2, leaks=3, repeated=1), 0)["files"].values()
    kinds = [entry["kind"] for entry in files]
    assert kinds.count("repeated") == REPEATS - 1
    assert all(kinds.count(f"leak_{kind}") == 3 for kind in ("exact", *COPIES))


def test_faulty_images_have_no_original_in_the_set(folders: tuple[Path, Path], tmp_path: Path) -> None:
    files = plant(folders[0], tmp_path / "set", None, Sizes(8, 2, 2), 0)["files"].values()
    originals = {entry["made_from"] for entry in files if entry["kind"] == "original"}
    faulty = [entry["made_from"] for entry in files if entry["kind"] in ("blurred", "dark", "truncated")]
    assert len(faulty) == 6
    assert originals.isdisjoint(faulty)


def test_too_few_images_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="30 images are needed, and there are 16"):
        plant(folders[0], tmp_path / "set", None, Sizes(24, 2), 0)
