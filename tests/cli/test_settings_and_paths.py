"""Tests of what all commands have in common: settings in the environment, paths with `~`, and commands that need no
engine."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cli
from model.artifact import bundled_artifact, read_manifest

runner = CliRunner()


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DINOV2_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "command",
    [
        ["models"],
        ["embed", "x.jpg", "--out", "y.npz"],
        ["collections", "list"],
        ["export", "x"],
        ["build-engine", "auto"],
        ["index", "x", "-c", "y"],
    ],
)
def test_every_command_refuses_a_mistyped_setting(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setenv("DINOV2_DATADIR", "x")
    result = runner.invoke(cli.app, command)
    assert result.exit_code == 2
    assert "unknown setting DINOV2_DATADIR in the environment: did you mean DINOV2_DATA_DIR?" in result.output


def test_help_is_shown_despite_a_mistyped_setting() -> None:
    command = [sys.executable, "-m", "cli", "models", "--help"]
    said = subprocess.run(command, env={**os.environ, "DINOV2_DATADIR": "x"}, capture_output=True, text=True)
    assert said.returncode == 0
    assert "--json" in said.stdout


def test_a_collection_is_created_without_loading_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("model.artifact.load_artifact", refuse)
    monkeypatch.setattr("model.engines.choice.load_engine", refuse)
    manifest = read_manifest(bundled_artifact())
    for name, engine, precision in (("a", "auto", "fp32"), ("b", "onnxruntime:int8", "int8"), ("c", "torch", "fp32")):
        command = ["collections", "create", name, "--pooling", "cls+mean", "--engine", engine]
        result = runner.invoke(cli.app, [*command, "--data-dir", str(tmp_path)])
        assert result.exit_code == 0, result.output
        made = json.loads(result.stdout)
        assert made["tag"] == f"{manifest.fingerprint}/cls+mean/l2/224x224/{precision}"
        assert made["dimension"] == 2 * manifest.config.embed_dim


def test_the_engine_decides_where_its_precision_depends_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host with a GPU, `auto` may choose bf16, so the engine is loaded to find out."""
    monkeypatch.setattr("model.engines.choice.no_gpu", lambda: None)
    loaded = []

    class Engine:
        precision = "bf16"

    monkeypatch.setattr("model.engines.choice.load_engine", lambda *_, **__: loaded.append(1) or Engine())
    result = runner.invoke(cli.app, ["collections", "create", "a", "--data-dir", str(tmp_path)])
    assert json.loads(result.stdout)["tag"].endswith("/bf16")
    assert loaded


def test_home_is_expanded_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DINOV2_DATA_DIR", "~/data")
    assert runner.invoke(cli.app, ["collections", "create", "a"]).exit_code == 0
    monkeypatch.delenv("DINOV2_DATA_DIR")
    assert runner.invoke(cli.app, ["collections", "create", "b", "--store", "embedded:~/other"]).exit_code == 0
    assert (tmp_path / "home" / "data" / "search.sqlite3").exists()
    assert (tmp_path / "home" / "other" / "search.sqlite3").exists()
    assert not (tmp_path / "~").exists()
    refused = runner.invoke(cli.app, ["models", "--data-dir", "~nobody-has-this-name/x"])
    assert refused.exit_code == 2
    assert "the home folder that ~nobody-has-this-name names is unknown" in " ".join(refused.output.split())


def test_home_is_expanded_in_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.artifact_choice import choose_artifact

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").symlink_to(bundled_artifact())
    assert choose_artifact("~/mine", tmp_path) == tmp_path / "mine"


def test_the_printed_serve_line_works(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="export compares with torch")
    from tests.cli.test_commands import checkpoint

    source = checkpoint(tmp_path / "c.safetensors")
    folder = tmp_path / "a folder"
    options = ["--crop", "70", "--resize", "80", "--name", "mine", "--data-dir", str(folder)]
    result = runner.invoke(cli.app, ["export", str(source), *options])
    assert result.exit_code == 0, result.output
    [line] = re.findall(r"^next: dinov2 (serve .*)$", result.stdout, re.MULTILINE)
    environment = {**os.environ, "DINOV2_DATA_DIR": str(tmp_path / "data"), "DINOV2_PORT": "0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *shlex.split(line)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(3)]
        assert f"from {folder / 'artifacts'}/mine-" in said[2], said
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    # The artifact is where the server and the commands with the same data folder look for it.
    listed = runner.invoke(cli.app, ["models", "--json", "--data-dir", str(folder)])
    assert json.loads(listed.stdout)["artifacts"][0]["name"] == "mine"


def test_export_describes_a_bad_crop_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the checkpoint is made with torch")
    from tests.cli.test_commands import checkpoint

    result = runner.invoke(
        cli.app, ["export", str(checkpoint(tmp_path / "c.safetensors")), "--crop", "300", "--out", str(tmp_path)]
    )
    assert result.output == "error: crop=300 does not fit into resize=256\n"
