"""Tests of `dinov2 retrain`."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import cli
from service.generations import Generations
from service.jobs.store import JobStore
from tests.cli.test_models import put_artifact
from tests.fakes import photo

runner = CliRunner()
LINES = ["40 images to train on", "estimated time: 3 min 24 s; 320 ms a step"]


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with 40 images and a live model. Estimates of trainings are faked."""
    folder = tmp_path / "data"
    (folder / "datasets" / "shop").mkdir(parents=True)
    for n in range(40):
        (folder / "datasets" / "shop" / f"{n}.png").write_bytes(photo(n))
    put_artifact(folder, "a")
    generations = Generations(folder)
    first = generations.add(
        "a" * 64, "model_a-aaaaaaaa", folder / "artifacts" / "model_a-aaaaaaaa", "fake", "fp32", reason="test"
    )
    generations.promote(first.number, expected=None, keep_s=0)
    monkeypatch.setenv("DINOV2_DATA_DIR", str(folder))
    monkeypatch.setattr("cli.retrain.find_spec", lambda name: object())
    return folder


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run to estimate a training."""
    commands: list[list[str]] = []
    run = subprocess.run

    def fake(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if "--dry-run" not in command:
            return run(command, **options)  # the check of the settings
        commands.append(command)
        [exclude] = [each.removeprefix('exclude="')[:-1] for each in command if each.startswith("exclude=")]
        assert len(Path(exclude).read_text().split("\n")) == 4
        return subprocess.CompletedProcess(command, 0, "".join(f"08:03:57  {line}\n" for line in LINES), "")

    monkeypatch.setattr(subprocess, "run", fake)
    return commands


def invoke(*words: str) -> Result:
    return runner.invoke(cli.app, ["retrain", *words])


def files(folder: Path) -> dict[str, bytes]:
    """The files in a folder with their contents. Databases have none here, because SQLite changes them when they are
    opened, as well as the files beside them."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-wal", "-shm")))
    return {str(path.relative_to(folder)): b"" if path.suffix == ".sqlite3" else path.read_bytes() for path in found}


def test_a_dry_run_changes_nothing(data_dir: Path, estimated: list[list[str]]) -> None:
    before = files(data_dir)
    said = invoke("data=shop", 'gate_rules={"min_queries": 3}', "--dry-run")
    assert said.exit_code == 0, said.output
    assert said.stdout.splitlines() == [
        f"live model: generation 1, {data_dir}/artifacts/model_a-aaaaaaaa",
        f"gate: 4 images from {data_dir}/datasets/shop, which the training leaves out",
        "collections to embed again: none",
        *(f"training: {line}" for line in LINES),
    ]
    assert files(data_dir) == before
    assert [each.state for each in Generations(data_dir).all()] == ["live"]
    [command] = estimated
    assert f'init="{data_dir}/artifacts/model_a-aaaaaaaa"' in command
    shown = json.loads(invoke("data=shop", 'gate_rules={"min_queries": 3}', "--dry-run", "--json").stdout)
    assert (shown["gate"]["held_out"], shown["lost"], shown["training"]) == (True, {}, LINES)


def test_the_command_of_a_dry_run_is_accepted(data_dir: Path, estimated: list[list[str]], capfd: Any) -> None:
    """The options of `dinov2 train` are those that the estimate uses."""
    invoke("data=shop", 'gate_rules={"min_queries": 3}', "--dry-run")
    [command] = estimated
    checked = runner.invoke(cli.app, ["train", "--check", *command[command.index("train") + 1 :]])
    assert checked.exit_code == 0, checked.output


def test_a_dry_run_without_torch_says_so(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.retrain.find_spec", lambda name: None)
    said = invoke("data=shop", "--dry-run")
    assert "which are also trained on" in said.stdout
    assert "too few to hold out 300" in said.stderr
    assert said.stdout.endswith("training: not estimated, because torch is not installed here\n")


def test_without_a_dry_run_a_job_is_started(data_dir: Path) -> None:
    job = JobStore(data_dir).get(invoke("data=shop", "approve=true").stdout.strip())
    assert (job.kind, job.state, job.params) == ("retrain", "queued", {"data": "shop", "approve": True})


@pytest.mark.parametrize("words", [("--dry-run",), ("data=/etc", "--dry-run"), ("data=shop", "overrides=lr=-1")])
def test_errors_are_one_line(data_dir: Path, words: tuple[str, ...]) -> None:
    said = invoke(*words)
    assert (said.exit_code, said.stderr.count("\n")) == (2, 1)
    assert said.stderr.startswith("error: ")
