"""Tests of the commands `dinov2 curate` and `dinov2 curation`, with the bundled model."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import cli
from benchmarks.curation_kills import files_of, interrupted

pytest.importorskip("torch", reason="curation needs torch: pip install '.[train,curate]'")
runner = CliRunner()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(5):
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{seed}.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "quality.dark=2"], "quality.dark=2: must be at most 1"),
        (["--set", "qualty.dark=0.1"], "qualty"),
        (["--stages", "quality,copy"], "unknown stage 'copy'"),
        (["--stages", "leaks"], "the stage leaks needs the setting leaks.evaluation"),
        (["--precision", "1.5"], "copies.precision=1.5: must be less than 1"),
        (["--config", "missing.toml"], "--config missing.toml is not a file"),
        (["--set", "scan.model=/nowhere"], "/nowhere"),
        (["--set", "leaks.evaluation=/nowhere"], "/nowhere"),
        (["--set", "balance.size=0"], "balance.size=0: must be at least 1"),
        (["--engine", "dask"], "dask"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_what_is_not_allowed_is_refused_in_one_line(
    tmp_path: Path, images: Path, arguments: list[str], message: str
) -> None:
    result = runner.invoke(cli.app, ["curate", str(images), "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert isinstance(result.exception, SystemExit)


def test_sources_and_folders_that_cannot_be_used_are_refused(tmp_path: Path, images: Path) -> None:
    for source, out, message in (
        (tmp_path / "none", tmp_path / "out", "does not exist"),
        (images, images / "out", "is inside"),
        (images, images / "0.png", "0.png is not a folder"),
        (images, Path("s3://bucket/out"), "is an address"),
    ):
        result = runner.invoke(cli.app, ["curate", str(source), "--out", str(out)])
        assert result.exit_code == 2
        assert message in result.output


def test_check_looks_only_at_the_settings(tmp_path: Path) -> None:
    arguments = ["curate", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--check"]
    assert runner.invoke(cli.app, arguments).exit_code == 0
    assert runner.invoke(cli.app, [*arguments, "--set", "seed=-1"]).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_one_process_and_two_give_the_same_dataset(tmp_path: Path, images: Path, monkeypatch) -> None:
    monkeypatch.setattr("training.curate.scan.PART_IMAGES", 3)
    for workers in ("1", "2"):
        out = tmp_path / workers
        result = runner.invoke(cli.app, ["curate", str(images), "--out", str(out), "--workers", workers])
        assert result.exit_code == 0, result.output
        assert "dataset: " in result.stdout
    files = [{p.name: p.read_bytes() for p in (tmp_path / w).iterdir() if p.is_file()} for w in "12"]
    assert files[0] == files[1]
    assert "curation.json" in files[0]


def test_a_key_that_was_not_dropped_cannot_be_restored(tmp_path: Path, images: Path) -> None:
    out = tmp_path / "out"
    runner.invoke(cli.app, ["curate", str(images), "--out", str(out), "--workers", "1"])
    result = runner.invoke(cli.app, ["curation", "restore", str(out), "1/0.png"])
    assert result.exit_code == 2
    assert "1/0.png was not dropped" in result.output
    result = runner.invoke(cli.app, ["curation", "verify", str(out)])
    assert result.exit_code == 2
    assert "has no leak-certificate.json: `dinov2 curate` writes one if leaks.evaluation is set" in result.output


def test_one_command_restores_a_dropped_image(tmp_path: Path, images: Path, monkeypatch) -> None:
    Image.fromarray(np.full((48, 64, 3), 9, np.uint8)).save(images / "dark.png")
    monkeypatch.chdir(tmp_path)  # the sources and the dataset are named by relative paths
    arguments = ["--set", "quality.drop=['dark']", "--set", "copies.neighbours=2", "--workers", "1"]
    done = runner.invoke(cli.app, ["curate", "images", "--out", "out", *arguments])
    assert done.exit_code == 0, done.output
    monkeypatch.chdir(images)
    restore = ["curation", "restore", "../out", "1/dark.png", "--workers", "1"]
    result = runner.invoke(cli.app, restore)
    assert result.exit_code == 0, result.output
    assert "1/dark.png: was dropped by quality (dark" in result.stdout
    assert "1 of them restored" in result.stdout
    assert Path.cwd() == images
    stages = [json.loads(line)["stage"] for line in (tmp_path / "out/.curate/log.jsonl").read_text().splitlines()]
    assert stages == ["scan images", "quality", "copies", "write", "write"]
    entries = map(json.loads, (tmp_path / "out/manifest.jsonl").read_text().splitlines())
    assert next(entry for entry in entries if entry["key"] == "1/dark.png")["part"] in ("train", "val")
    whole = files_of(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    curated = runner.invoke(cli.app, ["curate", "images", "--out", "out", *arguments])
    assert "write: " in curated.stdout
    assert files_of(tmp_path / "out") == whole, "the restored dataset is that of another run of the first command"


def test_a_restoration_that_was_killed_is_completed_by_the_same_command(
    tmp_path: Path, images: Path, monkeypatch
) -> None:
    Image.fromarray(np.full((48, 64, 3), 9, np.uint8)).save(images / "dark.png")
    for name in ("out", "killed"):
        arguments = ["--out", str(tmp_path / name), "--stages", "quality,write", "--workers", "1"]
        assert runner.invoke(cli.app, ["curate", str(images), *arguments]).exit_code == 0
    assert runner.invoke(cli.app, ["curation", "restore", str(tmp_path / "out"), "1/dark.png"]).exit_code == 0
    restore = ["curation", "restore", str(tmp_path / "killed"), "1/dark.png"]
    with interrupted("report", stop):
        assert runner.invoke(cli.app, restore).exit_code == 2
    assert files_of(tmp_path / "killed") != files_of(tmp_path / "out")
    assert runner.invoke(cli.app, restore).exit_code == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "out")


def stop() -> None:
    raise OSError("stopped")


def test_a_dataset_without_a_record_of_its_command_is_not_restored(tmp_path: Path, images: Path) -> None:
    Image.fromarray(np.full((48, 64, 3), 9, np.uint8)).save(images / "dark.png")
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--stages", "quality,write", "--workers", "1"]
    assert runner.invoke(cli.app, ["curate", str(images), *arguments]).exit_code == 0
    for damage, message in (
        (lambda path: path.write_text("{}"), "command.json is damaged"),
        (Path.unlink, "the sources and settings of the dataset are unknown"),
    ):
        damage(out / ".curate" / "command.json")
        result = runner.invoke(cli.app, ["curation", "restore", str(out), "1/dark.png"])
        assert result.exit_code == 2
        assert message in result.output
