"""Tests of `dinov2 train-head` and `dinov2 heads`, with the bundled model."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli import app
from model.artifact import bundled_artifact, read_manifest
from tests.model.heads import meta_heads
from tests.model.torch_files import write_torch_file

runner = CliRunner()
WIDTH = read_manifest(bundled_artifact()).config.embed_dim


def run(*arguments: object, data: Path) -> tuple[int, str]:
    result = runner.invoke(app, [*map(str, arguments), "--data-dir", str(data)])
    return result.exit_code, result.output


@pytest.fixture
def head_file(tmp_path: Path) -> Path:
    path = tmp_path / "imagenet.pth"
    write_torch_file(path, meta_heads.classification(WIDTH, 1))
    return path


def test_a_published_head_is_added_listed_and_deleted(head_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert "none; `dinov2 heads add`" in run("heads", "list", data=data)[1]
    status, output = run("heads", "add", head_file, "--kind", "classification", data=data)
    assert status == 0, output
    assert "imagenet: linear head for classification, reads the blocks" in output
    assert "1000 classes" in run("heads", "list", data=data)[1]
    [record] = json.loads(run("heads", "list", "--json", data=data)[1])
    assert (record["name"], record["source"], len(record["source_sha256"])) == ("imagenet", "imagenet.pth", 64)
    assert not (bundled_artifact() / "heads").exists()

    status, output = run("heads", "add", head_file, data=data)
    assert (status, "already has a head named imagenet" in output) == (2, True)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"class {i}" for i in range(1000)))
    assert run("heads", "add", head_file, "--replace", "--classes", names, data=data)[0] == 0
    assert json.loads(run("heads", "list", "--json", data=data)[1])[0]["classes"][:2] == ["class 0", "class 1"]
    assert run("heads", "delete", "imagenet", data=data)[0] == 0
    assert json.loads(run("heads", "list", "--json", data=data)[1]) == []
    status, output = run("heads", "delete", "imagenet", data=data)
    assert (status, "has no head named 'imagenet'" in output) == (2, True)


def test_a_wrong_head_is_refused_in_one_line(head_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    status, output = run("heads", "add", head_file, "--kind", "depth", data=data)
    assert (status, "a head for classification, not for depth" in output) == (2, True)
    other = tmp_path / "dinov2_vits14_linear_head.pth"
    write_torch_file(other, meta_heads.classification(384, 1))
    status, output = run("heads", "add", other, data=data)
    assert (status, "belongs to dinov2_vits14 (384 wide" in output) == (2, True)
    status, output = run("heads", "add", head_file, "--min-depth", 1, data=data)
    assert (status, "give both --min-depth and --max-depth" in output) == (2, True)
    status, output = run("heads", "add", head_file, "--name", "../x", data=data)
    assert (status, "use up to 64 letters" in output) == (2, True)
    status, output = run("heads", "add", tmp_path / "absent.pth", data=data)
    assert (status, "absent.pth" in output) == (2, True)
    assert not list(data.glob("derived/*/heads/*"))


def test_a_head_is_trained_and_listed(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="train-head needs torch: pip install '.[train]'")
    rng, data, folder = np.random.default_rng(0), tmp_path / "data", tmp_path / "images"
    for name, level in (("bright", 200), ("dark", 30)):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = level + rng.integers(0, 40, (40, 50, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    status, output = run("train-head", "classification", folder, "--name", "light", data=data)
    assert status == 0, output
    assert "accuracy: 1\n" in output
    assert "  bright: 1\n" in output
    [record] = json.loads(run("heads", "list", "--json", data=data)[1])
    assert (record["name"], record["classes"]) == ("light", ["bright", "dark"])
    assert record["metrics"]["held_out_images"] == 4
    status, output = run("train-head", "classification", folder, "--name", "light", data=data)
    assert (status, "already has a head named light" in output) == (2, True)
    status, output = run("train-head", "depth", folder, data=data)
    assert (status, "images" in output) == (2, True)
    status, output = run("train-head", "segmentation", tmp_path / "absent", data=data)
    assert (status, "there is no such folder" in output) == (2, True)


def test_train_head_needs_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, output = run("train-head", "classification", tmp_path, data=tmp_path)
    assert (status, "`dinov2 train-head` needs torch: python -m pip install -e '.[train]'" in output) == (2, True)
