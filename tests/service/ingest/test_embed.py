"""Tests of `dinov2 embed`: it writes the vectors that the service computes to one .npz, and lists unreadable files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import cli
from model.artifact import Artifact, bundled_artifact, load_artifact
from model.decode import DecodeLimits
from model.engines.choice import load_engine
from model.engines.protocol import Engine
from model.folder import Account
from model.preprocess import preprocess
from service.ingest.embed import embed_files, find_files, save_vectors

runner = CliRunner()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return load_artifact(bundled_artifact(), derived_dir=tmp_path_factory.mktemp("derived"))


@pytest.fixture(scope="module")
def engine(artifact: Artifact) -> Engine:
    return load_engine(artifact, threads=1)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder with five images at two depths, a text file, a truncated JPEG and a hidden file."""
    folder = tmp_path / "photos"
    (folder / "deep" / "er").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index, name in enumerate(["a.png", "b.jpg", "deep/c.jpg", "deep/er/d.webp", "z.bmp"]):
        pixels = rng.integers(0, 255, (40 + index, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    (folder / "torn.jpg").write_bytes((folder / "b.jpg").read_bytes()[:200])
    (folder / ".hidden").write_text("x")
    return folder


def test_finds_files_at_any_depth_but_hidden_ones(photos: Path) -> None:
    names = [str(path.relative_to(photos)) for path in find_files([photos])]
    assert names == ["a.png", "b.jpg", "deep/c.jpg", "deep/er/d.webp", "torn.jpg", "z.bmp"]
    account = Account()
    (photos / "gone.jpg").symlink_to(photos / "nowhere")
    assert len(find_files([photos], account)) == 6
    assert account.ignored == {".txt": 1, "hidden": 1}
    assert account.problems == [(str(photos / "gone.jpg"), "No such file or directory")]


def test_files_that_are_named_themselves(photos: Path) -> None:
    account = Account()
    (photos / "image.txt").write_bytes((photos / "a.png").read_bytes())
    named = [photos / name for name in ("a.png", "notes.txt", "image.txt", "torn.jpg", ".hidden")]
    assert [path.name for path in find_files(named, account)] == ["a.png", "image.txt", "torn.jpg", ".hidden"]
    assert account.ignored == {".txt": 1}
    with pytest.raises(ValueError, match=r"\(1 file: 0 used, 1 ignored .*`dinov2 index` also reads lists and archives"):
        find_files([photos / "notes.txt"])


def test_what_lies_in_a_hidden_folder_is_hidden(tmp_path: Path) -> None:
    for name in (".git/a.png", "deep/.cache/b.png", "deep/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "deep" / "linked").symlink_to(tmp_path / ".git")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    linked = tmp_path / "deep" / "linked" / "a.png"
    assert find_files([tmp_path]) == [tmp_path / "deep" / "c.png", linked]
    linked.parent.unlink()
    assert find_files([tmp_path]) == [tmp_path / "deep" / "c.png"]


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing: no such file or folder"):
        find_files([tmp_path / "missing"])
    with pytest.raises(ValueError, match=r"no images in .* \(0 files"):
        find_files([tmp_path])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_vectors_are_those_of_single_images(photos: Path, artifact: Artifact, engine: Engine, batch_size: int) -> None:
    dealt_with: list[int] = []
    files, vectors, report = embed_files(
        find_files([photos]), artifact, engine, batch_size=batch_size, advance=dealt_with.append
    )
    assert sum(dealt_with) == 6  # those that were skipped too
    assert report.embedded == len(files) == 5
    assert {path.name: bool(reason) for path, reason in report.skipped} == {"torn.jpg": True}
    for path, vector in zip(files, vectors, strict=True):
        pixels = preprocess(np.asarray(Image.open(path).convert("RGB")), artifact.manifest.preprocess)
        expected = engine.run(pixels[None]).cls[0]
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)


def test_pooling_and_normalisation(photos: Path, artifact: Artifact, engine: Engine) -> None:
    files = find_files([photos])
    dims = artifact.manifest.config.embed_dim
    both = embed_files(files, artifact, engine, pooling="cls+mean")[1]
    raw = embed_files(files, artifact, engine, normalize=False)[1]
    assert both.shape == (5, 2 * dims)
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, atol=1e-5)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).max() > 0.1


def test_limits_apply(photos: Path, artifact: Artifact, engine: Engine) -> None:
    report = embed_files(find_files([photos]), artifact, engine, limits=DecodeLimits(max_pixels=41 * 60))[2]
    assert report.embedded == 2
    assert len(report.skipped) == 4


def test_an_older_file_survives_a_failed_write(
    tmp_path: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "vectors.npz"
    out.write_bytes(b"older")

    def full_disk(*_arguments: object, **_fields: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_vectors(out, [], np.zeros((0, 4), np.float32), artifact, {})
    assert out.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [out]


def test_the_command_writes_vectors_and_lists_what_it_skipped(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors.npz"
    result = runner.invoke(cli.app, ["embed", str(photos), "--out", str(out), "--data-dir", str(tmp_path / "data")])
    assert result.exit_code == 0, result.output
    assert "5 images" in result.output
    assert "skipped" in result.output
    assert "torn.jpg" in result.output
    with np.load(out) as saved:
        assert saved["vectors"].shape == (5, saved["vectors"].shape[1])
        assert len(saved["paths"]) == 5
        assert str(saved["fingerprint"]) == load_artifact(bundled_artifact(), derived_dir=tmp_path / "d").fingerprint
        assert str(saved["pooling"]) == "cls"


def test_the_command_names_a_missing_folder(tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["embed", str(tmp_path / "none"), "--out", str(tmp_path / "v.npz")])
    assert result.exit_code == 2
    assert "no such file or folder" in result.output
    assert not (tmp_path / "v.npz").exists()


def test_a_missing_output_folder_is_found_before_the_work(photos: Path, tmp_path: Path) -> None:
    result = runner.invoke(
        cli.app, ["embed", str(photos), "--out", str(tmp_path / "no" / "v.npz"), "--model", "nothing"]
    )
    assert result.exit_code == 2
    assert "does not exist" in result.output


def test_the_command_accounts_for_every_file_and_has_the_limits_of_the_service(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["embed", str(photos), "--out", str(tmp_path / "x.npz"), "--data-dir", str(tmp_path), "--threads", "1"]
    result = runner.invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    assert f"skipped {photos / 'torn.jpg'}: the JPEG is damaged" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == f"8 files: 5 used, 2 ignored (1 .txt, 1 hidden), 1 failed ({photos / 'torn.jpg'})"
    monkeypatch.setenv("DINOV2_MAX_IMAGE_PIXELS", str(41 * 60))
    assert "8 files: 2 used, 2 ignored (1 .txt, 1 hidden), 4 failed" in runner.invoke(cli.app, words).stdout
