"""Tests of `dinov2 find-region` and of its Python function, with the bundled model and the embedded store."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import cli
from cli import find_region as command
from service.errors import CollectionNotFound, InvalidRequest
from service.retrieval.local_regions import find_region
from service.retrieval.region_schemas import FindRegionIn
from service.vision.mask import coco_rle_decode
from tests.service.vision.test_find_region import pair

BOX = "8,4,40,40"
SHOP = ["-c", "shop"]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with references, masks and two collections of scenes. The scene shelf/3.png shows the object of
    the reference 3.png, and so on."""
    root = tmp_path_factory.mktemp("regions")
    (root / "photos" / "shelf").mkdir(parents=True)
    rng = np.random.default_rng(3)
    for number, (first, second) in enumerate(pair(rng) for _ in range(5)):
        (root / f"{number}.png").write_bytes(png(first.image))
        (root / f"mask{number}.png").write_bytes(png(np.where(first.mask, np.uint8(255), np.uint8(0))))
        (root / "photos" / "shelf" / f"{number}.png").write_bytes(png(second.image))
    Image.new("L", (64, 32), 255).save(root / "small.png")
    Image.new("L", (256, 256), 127).save(root / "dark.png")
    (root / "torn.png").write_bytes((root / "0.png").read_bytes()[:60])
    for name, originals in (("shop", "--originals"), ("bare", "--no-originals")):
        words = ["index", f"{root}/photos", "-c", name, originals, "--data-dir", f"{root}/data"]
        result = CliRunner().invoke(cli.app, words)
        assert "5 indexed" in result.output, result.output
    return root


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(folder)

    def invoke(*words: object) -> Result:
        return CliRunner().invoke(cli.app, ["find-region", *map(str, words), "--data-dir", f"{folder}/data"])

    return invoke


def answer(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def scores(result: Result) -> dict[str, float]:
    return {row["id"]: row["score"] for row in answer(result)["data"]}


def test_a_mask_finds_its_object(run: Callable[..., Result]) -> None:
    first = []
    for number in range(5):
        words = (f"{number}.png", "--mask", f"mask{number}.png", *SHOP, "--min-score", 0, "--json")
        shown = answer(run(*words))
        first.append(shown["data"][0]["id"] == f"shelf/{number}.png")
        assert [shown[name] for name in ("total", "examined", "pending", "unreadable")] == [5, 5, 0, 0]
    assert sum(first) >= 4


def test_the_table_and_the_overlays(run: Callable[..., Result], tmp_path: Path) -> None:
    words = ("3.png", "--mask", "mask3.png", *SHOP, "--min-score", 0, "--limit", 2)
    out = tmp_path / "new" / "regions"
    found = answer(run(*words, "--json"))["data"]
    result = run(*words, "-o", out)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["score", "id", "box", "area"]
    rows = [(f"{row['score']:.4f}", row["id"], ",".join(map(str, row["box"])), str(row["area"])) for row in found]
    assert [tuple(line.split()) for line in lines[1:]] == rows
    assert "5 examined; 5 with a score of at least 0" in result.stderr
    files = [out / f"{rank:03}-{row['id'].replace('/', '_')}" for rank, row in enumerate(found, 1)]
    assert sorted(out.iterdir()) == files
    for file, row in zip(files, found, strict=True):
        mask = coco_rle_decode(row["segmentation"])
        before = np.asarray(Image.open(Path("photos") / row["id"]).convert("RGB")).astype(int)
        after = np.asarray(Image.open(file)).astype(int)
        assert after.shape == before.shape
        assert mask.any()
        assert (after[~mask] <= before[~mask] * 0.35).all()
        assert np.abs(after[mask] - (before[mask] * 3 + [255, 64, 32]) / 4).max() < 1


def test_each_region_belongs_to_the_image_in_the_same_place(run: Callable[..., Result]) -> None:
    words = (*SHOP, "--min-score", 0, "--json")
    shown = answer(run("0.png", "--reference", "3.png", "--box", BOX, "--box", "100,100,60,60", *words))
    references = [{"image": "0.png", "box": [8, 4, 40, 40]}, {"image": "3.png", "box": [100, 100, 60, 60]}]
    assert shown["data"] == find_region("shop", references, min_score=0)["data"]
    crossed = answer(run("0.png", "--reference", "3.png", "--box", "100,100,60,60", "--box", BOX, *words))
    assert shown["data"] != crossed["data"]
    point = answer(run("0.png", "--point", "100,90.5", *words))
    assert point["data"] == find_region("shop", [{"image": "0.png", "point": [100, 90.5]}], min_score=0)["data"]


def test_options(run: Callable[..., Result]) -> None:
    words = ("0.png", "--box", BOX, *SHOP, "--json")
    everything = scores(run(*words, "--min-score", 0))
    assert scores(run(*words, "--min-score", 0, "--no-debias")) != everything
    where = '{"field": "id", "in": ["shelf/1.png", "shelf/2.png"]}'
    assert set(scores(run(*words, "--min-score", 0, "--filter", where))) == {"shelf/1.png", "shelf/2.png"}
    assert answer(run(*words, "--candidates", 3))["examined"] == 3
    middle = sorted(everything.values())[2]
    assert set(scores(run(*words, "--min-score", middle))) == {i for i, s in everything.items() if s >= middle}
    nothing = run("0.png", "--box", BOX, *SHOP, "--min-score", 1)
    assert (nothing.exit_code, nothing.stdout.split()) == (0, ["score", "id", "box", "area"])


def test_the_python_function(run: Callable[..., Result], folder: Path) -> None:
    shown = answer(run("3.png", "--mask", "mask3.png", *SHOP, "--min-score", 0.1, "--json"))
    mask = np.asarray(Image.open("mask3.png")) > 0
    found = find_region("shop", [{"image": "3.png", "mask": mask}], data_dir=folder / "data", min_score=0.1)
    assert found["data"] == shown["data"]
    by_box = [{"image": Path("3.png").read_bytes(), "box": [8, 4, 40, 40]}]
    one = find_region("shop", by_box, data_dir="data", min_score=0, limit=1)
    assert (len(one["data"]), one["total"]) == (1, 5)
    own = find_region("shop", [{"id": "shelf/3.png", "point": [99, 99]}], data_dir="data", min_score=0)
    assert own["total"] == 4
    with pytest.raises(InvalidRequest, match="limit: "):
        find_region("shop", by_box, data_dir="data", limit=0)
    with pytest.raises(CollectionNotFound, match="none"):
        find_region("none", by_box, data_dir="data")
    with pytest.raises(ValueError, match="no vector store in"):
        find_region("shop", by_box, data_dir=folder / "nothing")


def test_an_image_that_is_no_longer_stored(run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    words = ("0.png", "--box", BOX, *SHOP, "--min-score", 0)
    gone = min((folder / "data" / "originals").glob("*/*/*"))
    content = gone.read_bytes()
    gone.unlink()
    try:
        result = run(*words, "-o", tmp_path)
    finally:
        gone.write_bytes(content)
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.iterdir())) == 4
    assert "warning: shelf/" in result.stderr
    assert f"the image {gone.name} is not stored" in result.stderr


def test_index_stores_the_patch_features(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "patches" / "patches.sqlite3"

    def index(name: str, *options: str) -> None:
        words = ["index", f"{folder}/photos", "-c", name, *options, "--data-dir", str(tmp_path)]
        result = CliRunner().invoke(cli.app, words)
        assert "5 indexed" in result.output, result.output

    def find() -> dict[str, float]:
        words = ["find-region", f"{folder}/0.png", "--box", BOX, *SHOP, "--min-score", "0", "--json"]
        return scores(CliRunner().invoke(cli.app, [*words, "--data-dir", str(tmp_path)]))

    def empty() -> None:
        for part in file.parent.iterdir():
            part.unlink()

    index("bare")
    assert not file.exists()
    index("shop", "--originals")
    (tmp_path / "originals").rename(tmp_path / "away")  # so that nothing can be computed
    found = find()
    (tmp_path / "away").rename(tmp_path / "originals")
    assert len(found) == 5
    empty()
    assert find() == pytest.approx(found, abs=0.02)  # computed by the other way
    monkeypatch.setenv("DINOV2_PATCH_STORE_BYTES", "0")
    empty()
    index("shop", "--force")
    assert not file.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["0.png", *SHOP], "exactly one of --box, --point and --mask is needed, not none"),
        (["0.png", *SHOP, "--box", BOX, "--point", "1,1"], "is needed, not --box and --point"),
        (["0.png", *SHOP, "--box", "1,2,3"], "--box '1,2,3' is not x,y,width,height in pixels"),
        (["0.png", *SHOP, "--box", "1,2,3,nan"], "--box '1,2,3,nan' is not"),
        (["0.png", *SHOP, "--point", "left,top"], "--point 'left,top' is not x,y in pixels"),
        (["0.png", *SHOP, "--box", "1,2,0,5"], "0.png: box [1.0, 2.0, 0.0, 5.0] has no area"),
        (["0.png", *SHOP, "--box", "300,4,40,40"], "0.png: box [300.0, 4.0, 40.0, 40.0] is outside"),
        (["0.png", *SHOP, "--point", "300,4"], "0.png: point [300.0, 4.0] is outside the image of 256 x 256 pixels"),
        (
            ["0.png", "--reference", "1.png", *SHOP, "--box", BOX],
            "--box is given 1 times for 2 images: give it once for each image",
        ),
        (
            ["0.png", "--reference", "1.png", *SHOP, "--box", BOX, "--box", "300,4,40,40"],
            "1.png: box [300.0, 4.0, 40.0, 40.0] is outside",
        ),
        (["0.png", *SHOP, "--mask", "small.png"], "0.png: mask.size is [32, 64], but the image has [256, 256] pixels"),
        (["0.png", *SHOP, "--mask", "dark.png"], "dark.png: the mask is empty"),
        (["0.png", *SHOP, "--mask", "torn.png"], "torn.png: "),
        (["0.png", *SHOP, "--mask", "none.png"], "none.png"),
        (["none.png", *SHOP, "--box", BOX], "none.png"),
        (["torn.png", *SHOP, "--box", BOX], "torn.png: "),
        (["0.png", "--reference", "torn.png", *SHOP, "--box", BOX, "--box", BOX], "torn.png: "),
        (["0.png", *["--reference", "1.png"] * 8, *SHOP, *["--box", BOX] * 9], "at most 8"),
        (["0.png", "-c", "none", "--box", BOX], "there is no collection 'none'"),
        (["0.png", "-c", "bare", "--box", BOX], "collection 'bare' stores none: create it with originals"),
        (["0.png", *SHOP, "--box", BOX, "--filter", "{"], "--filter is not JSON"),
        (["0.png", *SHOP, "--box", BOX, "--filter", "[]"], "filter"),
        (["0.png", *SHOP, "--box", BOX, "--candidates", "0"], "Invalid value for '--candidates'"),
        (["0.png", *SHOP, "--box", BOX, "--min-score", "1.5"], "Invalid value for '--min-score'"),
        (["0.png", *SHOP, "--box", BOX, "--limit", "101"], "Invalid value for '--limit'"),
        (["0.png", *SHOP, "--box", BOX, "--model", "no/model"], "no/model is not an artifact folder"),
        (["0.png", *SHOP, "--box", BOX, "-o", "1.png"], "1.png: File exists"),
    ],
)
def test_it_says_what_is_wrong(run: Callable[..., Result], words: list[str], said: str) -> None:
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.replace("│", "").split())


def test_the_limits_are_those_of_the_service() -> None:
    fields = FindRegionIn.model_fields

    def limits(name: str) -> tuple[float, float]:
        [low] = [rule.ge for rule in fields[name].metadata if hasattr(rule, "ge")]
        [high] = [rule.le for rule in fields[name].metadata if hasattr(rule, "le")]
        return low, high

    names = ("candidates", "limit", "min_score")
    assert [limits(name) for name in names] == [command.CANDIDATES, command.LIMITS, (0, 1)]
    defaults = [command.DEFAULT_CANDIDATES, command.DEFAULT_LIMIT, command.DEFAULT_MIN_SCORE, True]
    assert [fields[name].default for name in (*names, "debias")] == defaults
