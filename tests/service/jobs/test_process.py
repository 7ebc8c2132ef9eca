"""Tests of child processes: signals, locks, output, and what happens if a worker is killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from model.files import lock_file
from service.jobs.process import MOST_BYTES, Child, Ended, holders, take_lock

ROOT = Path(__file__).parents[3]
ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="uses /proc and PR_SET_PDEATHSIG")
TRAPS = "import signal, sys, time; signal.signal(signal.SIGTERM, {handler}); print('ready', flush=True); time.sleep(60)"
SAVES = TRAPS.format(handler="lambda *_: (print('saved', flush=True), sys.exit(143))")
IGNORES = TRAPS.format(handler="signal.SIG_IGN")


def child(folder: Path, code: str) -> Child:
    """Start Python code as the child of a job in `folder`."""
    with take_lock(folder / "lock", lambda: None, 5) as lock:
        return Child([sys.executable, "-c", code], lock, cwd=folder)


def run(folder: Path, code: str, *, stop_after: bytes | None = None, grace_s: float = 20) -> tuple[Ended, bytes]:
    """Run Python code as a child, and ask it to stop when its output contains `stop_after`. Return how it ended and its
    output."""
    parts: list[bytes] = []
    ended = child(folder, code).wait(
        parts.append, lambda: stop_after is not None and stop_after in b"".join(parts), grace_s
    )
    return ended, b"".join(parts)


def eventually(condition: Callable[[], object], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def is_locked(folder: Path) -> bool:
    file = lock_file(folder / "lock")
    if file is not None:
        file.close()
    return file is None


def test_the_status_and_all_output_are_returned(tmp_path: Path) -> None:
    ended, output = run(tmp_path, "import sys; print('x' * 3_000_000); print('an error', file=sys.stderr); sys.exit(3)")
    assert (ended.status, ended.stopped) == (3, False)
    assert sorted(output.split()) == [b"an", b"error", b"x" * 3_000_000]
    assert MOST_BYTES < 3_000_000
    assert len(ended.tail) == 8192


def test_a_child_may_save_after_sigterm(tmp_path: Path) -> None:
    ended, output = run(tmp_path, SAVES, stop_after=b"ready")
    assert (ended.status, ended.stopped, output) == (143, True, b"ready\nsaved\n")


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    ended, _ = run(tmp_path, IGNORES, stop_after=b"ready", grace_s=0.2)
    assert (ended.status, ended.stopped) == (-signal.SIGKILL, True)


def test_descendants_end_with_the_child(tmp_path: Path) -> None:
    code = "import os, time; print('x', flush=True); os.fork() or (print('forked', flush=True), time.sleep(60))"
    ended, _ = run(tmp_path, code)
    assert ended.status == 0
    eventually(lambda: not is_locked(tmp_path))


def test_an_error_of_a_callback_kills_the_child(tmp_path: Path) -> None:
    def broken(text: bytes) -> None:
        raise OSError("the disk is full")

    process = child(tmp_path, IGNORES)
    with pytest.raises(OSError, match="the disk is full"):
        process.wait(broken, lambda: False, 20)
    assert not is_locked(tmp_path)


def test_the_child_holds_the_lock_until_it_ends(tmp_path: Path) -> None:
    process = child(tmp_path, SAVES)
    assert is_locked(tmp_path)
    assert process.wait(lambda text: None, lambda: True, 20).stopped
    assert not is_locked(tmp_path)


@ONLY_LINUX
@pytest.mark.parametrize(("code", "grace_s"), [(SAVES, 20.0), (IGNORES, 0.3)])
def test_a_survivor_is_stopped_before_the_folder_is_taken(tmp_path: Path, code: str, grace_s: float) -> None:
    survivor = child(tmp_path, code)
    output: list[bytes] = []
    ended: list[Ended] = []
    thread = threading.Thread(target=lambda: ended.append(survivor.wait(output.append, lambda: False, 20)))
    thread.start()
    eventually(lambda: b"ready" in b"".join(output))
    assert holders(tmp_path / "lock") == [survivor.pid]
    with take_lock(tmp_path / "lock", lambda: None, grace_s):
        thread.join()
    assert ended[0].status == (143 if code == SAVES else -signal.SIGKILL)


@ONLY_LINUX
def test_a_process_that_only_opens_the_lock_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("1")
    code = "import fcntl, sys, time; f = open('lock'); fcntl.flock(f, 2); print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        waits = iter(range(3))
        with pytest.raises(StopIteration):
            take_lock(tmp_path / "lock", lambda: next(waits), 0)
        assert other.poll() is None
        other.kill()


PARENT = """
import sys
from pathlib import Path
from tests.service.jobs.test_process import SAVES, IGNORES, child
process = child(Path(sys.argv[1]), {"saves": SAVES, "ignores": IGNORES}[sys.argv[2]])
process.wait(lambda text: print(process.pid, text.decode().strip(), flush=True), lambda: False, 20)
"""


@ONLY_LINUX
@pytest.mark.parametrize("code", ["saves", "ignores"])
def test_a_child_gets_sigterm_when_its_worker_is_killed(tmp_path: Path, code: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, tmp_path, code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid, word = parent.stdout.readline().split()
        assert word == "ready"
        parent.kill()
    if code == "saves":
        eventually(lambda: not is_locked(tmp_path))
    else:
        assert holders(tmp_path / "lock") == [int(pid)]
        os.kill(int(pid), signal.SIGKILL)
