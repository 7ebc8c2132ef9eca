"""Tests of `dinov2 jobs ...` and `dinov2 worker`."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cli
from model.artifact import BUNDLED_DIR
from service.jobs.kinds import KINDS
from service.jobs.store import JobStore

runner = CliRunner()


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore what a worker changes in its process: the environment and the handlers of the log."""
    monkeypatch.setenv("DINOV2_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("DINOV2_JOB_ROOTS", str(BUNDLED_DIR))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def invoke(*words: object) -> Result:
    return runner.invoke(cli.app, [str(word) for word in words])


def started(*words: object) -> str:
    said = invoke("jobs", "start", *words)
    assert said.exit_code == 0, said.output
    return said.stdout.strip()


def test_a_job_from_its_start_to_its_removal(tmp_path: Path) -> None:
    (bundled,) = [path for path in BUNDLED_DIR.iterdir() if path.is_dir()]
    job = started("export", f"source={bundled.name}", "name=copy", "precision=fp16", "precision=fp32")
    shown = json.loads(invoke("jobs", "show", job).stdout)
    assert shown["params"] == {"source": bundled.name, "name": "copy", "precision": ["fp16", "fp32"]}
    assert (shown["state"], shown["requested_by"]) == ("queued", "command line")
    assert "no worker is running: start one with `dinov2 worker`" in invoke("jobs", "list").stdout
    assert invoke("jobs", "cancel", job).stdout == f"{job}: cancelled\n"
    assert invoke("jobs", "retry", job).stdout == f"{job}: queued\n"
    done = invoke("worker", "--once", "--kinds", "export")
    assert done.exit_code == 0, done.output
    assert json.loads(invoke("jobs", "list", "--json").stdout)["jobs"][0]["state"] == "succeeded"
    said = invoke("jobs", "log", job, "--follow")
    assert said.exit_code == 0
    assert "\nfingerprint " in said.stdout
    assert said.stderr == f"{job}: succeeded\n"
    assert len(list((tmp_path / "data/artifacts").iterdir())) == 1
    assert invoke("jobs", "remove", job).stdout == f"removed {job}\n"
    assert invoke("jobs", "show", job).exit_code == 2


def test_a_failed_job_has_status_1(tmp_path: Path) -> None:
    job = started("export", "source=dinov2_vits14")
    store = JobStore(tmp_path / "data")
    claimed = store.claim("a", ["export"], 8)
    assert claimed is not None
    store.fail(claimed.lease, "no network")
    said = invoke("jobs", "log", job, "-f")
    assert (said.exit_code, said.stderr) == (1, f"{job}: failed: no network\n")


def test_a_waiting_job_says_how_to_approve_it(tmp_path: Path) -> None:
    job = started("export", "source=dinov2_vits14")
    store = JobStore(tmp_path / "data")
    claimed = store.claim("a", ["export"], 8)
    assert claimed is not None
    store.wait_for_approval(claimed.lease, "approval", "publish it?")
    assert invoke("jobs", "log", job, "-f").stderr == f"{job}: waiting: publish it? (dinov2 jobs approve {job})\n"
    assert invoke("jobs", "approve", job).stdout == f"{job}: queued\n"


def test_schedules() -> None:
    said = invoke("jobs", "schedule", "weekly", "export", "source=dinov2_vits14", "--every", "sunday 03:00")
    assert said.stdout.startswith("weekly: the next job is created at "), said.output
    assert invoke("jobs", "schedules").stdout.startswith("weekly: export, sunday 03:00 (UTC), next at ")
    assert json.loads(invoke("jobs", "schedules", "--json").stdout)[0]["params"] == {"source": "dinov2_vits14"}
    assert invoke("jobs", "unschedule", "weekly").stdout == "removed weekly\n"
    assert invoke("jobs", "schedules").stdout == ""


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("start", "dance"), f"unknown kind 'dance': use one of {', '.join(KINDS)}"),
        (("start", "export"), "source"),
        (("start", "export", "source"), "'source' must look like name=value"),
        (("start", "train", "data=/etc", "recipe=smoke"), "data '/etc' is not below a folder from which jobs may read"),
        (("show", "none"), "there is no job 'none'"),
        (("schedule", "x", "export", "source=dinov2_vits14"), "every='' is not a schedule: write a weekday"),
        (
            ("schedule", "x", "export", "source=dinov2_vits14", "--every=1 h", "--zone=Mars"),
            "time zone 'Mars' is unknown",
        ),
    ],
)
def test_errors_are_one_line(words: tuple[str, ...], error: str) -> None:
    said = invoke("jobs", *words)
    assert said.exit_code == 2
    assert said.stderr.startswith("error: ")
    assert error in said.stderr
    assert said.stderr.count("\n") == 1


def test_a_worker_knows_its_kinds() -> None:
    said = invoke("worker", "--kinds", "train,dance", "--once")
    assert (said.exit_code, said.stderr) == (
        2,
        f"error: --kinds: unknown kind 'dance'; use some of {', '.join(KINDS)}\n",
    )
