"""Tests of the worker processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.curate.workers import Workers

SCRIPT = """
import os, sys, time
from pathlib import Path
from training.curate.workers import Workers
from tests.training.curate.test_workers import note_and_wait
if __name__ == "__main__":
    list(Workers(2)(note_and_wait, [sys.argv[1] + "/a", sys.argv[1] + "/b"]))
"""


def doubling():
    return double


def double(number: int) -> int:
    return 2 * number


def dying():
    return die


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def refusing():
    return refuse


def refuse(number: int) -> int:
    raise ValueError(f"{number} is refused")


def note_and_wait():
    return wait_here


def wait_here(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def test_one_worker_and_several_give_the_same() -> None:
    items = list(range(7))
    assert sorted(Workers(2)(doubling, items)) == list(Workers(1)(doubling, items)) == [2 * i for i in items]


def test_a_number_of_workers_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="workers=0 must be at least 1"):
        Workers(0)


def test_errors_of_workers_reach_the_caller() -> None:
    with pytest.raises(ValueError, match="is refused"):
        list(Workers(2)(refusing, [1, 2]))


def test_a_killed_worker_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(OSError, match=r"a worker process was killed.*fewer --workers"):
        list(Workers(2)(dying, [1, 2]))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)], env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    files = [tmp_path / "a", tmp_path / "b"]
    _until(lambda: all(file.exists() and file.read_text() for file in files), 60)
    workers = [int(file.read_text()) for file in files]
    parent.kill()
    parent.wait()
    _until(lambda: not any(_runs(pid) for pid in workers), 20)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.1)
