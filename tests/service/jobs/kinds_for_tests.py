"""Kinds of jobs for tests, and a worker that runs them.

python -m tests.service.jobs.kinds_for_tests DATA_DIR [URL_OF_REDIS]
"""

import sys
import time
from pathlib import Path
from typing import Any

from service.jobs.context import Context, JobFailed
from service.jobs.kind import JobParams, Kind
from service.jobs.queue import JobQueue, LocalQueue, RqQueue
from service.jobs.store import JobStore
from service.jobs.worker import Worker
from service.settings import Settings

COUNT = """
import fcntl, os, pathlib, signal, sys, time
folder, until = pathlib.Path(sys.argv[1]), int(sys.argv[2])
alone = open(folder / "alone", "w")
try:
    fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    (folder / "overlap").touch()
n = int((folder / "n").read_text()) if (folder / "n").exists() else 0
def save(*_):
    (folder / "n").write_text(str(n))
    print("saved", n, flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("counting from", n, flush=True)
while n < until:
    time.sleep(0.02)
    n += 1
(folder / "n").write_text(str(n))
"""
"""A program that behaves like a training: it counts, saves the number when it gets SIGTERM, and goes on from there."""


class StepsParams(JobParams):
    fail: bool = False
    approval: bool = False
    bug: bool = False


def steps(context: Context[StepsParams]) -> None:
    """Add 1 and 2. With `approval`, wait for a person in between."""
    context.log("adding")
    one = context.step("one", lambda: 1)
    context.report(0.5, "half", {"sum": one})
    if context.params.approval:
        context.wait_for_approval("approval", "add two?")
    if context.params.fail:
        raise JobFailed("two cannot be added")
    if context.params.bug:
        raise RuntimeError("a bug")
    context.step("two", lambda: one + 2)


class CountParams(JobParams):
    until: int = 100_000


def count(context: Context[CountParams]) -> None:
    """Count in a child process."""

    def run() -> Any:
        context.run([sys.executable, "-u", "-c", COUNT, str(context.folder), str(context.params.until)])
        return int((context.folder / "n").read_text())

    context.step("count", run)


class ChildParams(JobParams):
    code: str


def child(context: Context[ChildParams]) -> None:
    """Run Python code in a child process."""
    context.step("run", lambda: context.run([sys.executable, "-c", context.params.code]))


class SleepParams(JobParams):
    seconds: float = 60


def sleep(context: Context[SleepParams]) -> None:
    """Sleep in this process."""
    until = time.monotonic() + context.params.seconds
    while time.monotonic() < until:
        context.check_cancelled()
        time.sleep(0.02)


KINDS = {
    "steps": Kind("add numbers", StepsParams, steps),
    "count": Kind("count in a child process", CountParams, count),
    "child": Kind("run code", ChildParams, child),
    "sleep": Kind("sleep", SleepParams, sleep),
    "impossible": Kind("need a package that does not exist", JobParams, sleep, needs=("no_such_package",)),
}


def make_queue(url: str | None) -> JobQueue:
    return LocalQueue() if url is None else RqQueue(url)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    settings = Settings(data_dir=folder, job_stop_grace_s=20)
    with Worker(JobStore(folder), settings, kinds=KINDS) as worker:
        print(worker.row.id, flush=True)
        make_queue(sys.argv[2] if len(sys.argv) > 2 else None).work(worker)
