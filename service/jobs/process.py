"""Runs a command as the child process of a job, so that two of them never work in the same folder.

The child holds the lock of a file in the job's folder for its whole life, because it inherits the open file. If the
worker is killed, Linux sends SIGTERM to the child (PR_SET_PDEATHSIG), and a training then saves its state and ends. A
child that still runs when another worker takes over the job is found by its lock, gets SIGTERM, and is killed if it
does not end in time. The child leads a process group of its own, so that its descendants get the same signals.

A thread that starts a child must live longer than the child: Linux watches the thread, not the process.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Final

from model.files import lock_file

LOCK: Final = "lock"
"""The file in a job's folder that its child locks."""
IN_JOB: Final = "IN_DINOV2_JOB"
"""An environment variable that children have. Commands then print no advice about the next command."""
POLL_S: Final = 0.2
TAIL_BYTES: Final = 8192
PIPE_BYTES: Final = 65_536
MOST_BYTES: Final = 2**20

# A small program that asks for a signal at the death of its parent, and then becomes the command. It could not do so
# between fork and exec, because Python code is not safe there in a process with threads.
_LAUNCH: Final = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(sys.argv[2]))
if os.getppid() != int(sys.argv[1]):
    sys.exit(143)
if (lock := int(sys.argv[3])) >= 0:
    os.ftruncate(lock, 0)
    os.write(lock, b"%d" % os.getpid())
os.execv(sys.argv[4], sys.argv[4:])
"""


def launch_command(
    command: Sequence[str], *, death_signal: signal.Signals = signal.SIGTERM, lock: BinaryIO | None = None
) -> list[str]:
    """Return a command that first asks Linux for a signal when the thread or process that starts it ends, writes its id
    into the file `lock` if it is given, and then becomes `command`.

    Args:
        command: the absolute path of the program, and its arguments.
        death_signal: the signal that it gets.
        lock: a file that it inherits.
    """
    numbers = (os.getpid(), int(death_signal), -1 if lock is None else lock.fileno())
    return [sys.executable, "-I", "-S", "-c", _LAUNCH, *map(str, numbers), *command]


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    status: the exit status, or minus the number of the signal that killed the child.
    stopped: whether the child was asked to stop before.
    tail: the end of its output.
    """

    status: int
    stopped: bool
    tail: str


def take_lock(path: Path, on_wait: Callable[[], object], grace_s: float) -> BinaryIO:
    """Lock the file at `path`, creating it if needed, and return the open file.

    Processes of an earlier child that hold the lock get SIGTERM. If they still hold it after `grace_s` seconds, they
    are killed. Processes in other containers cannot be seen, so the function waits for them.

    Args:
        path: the file.
        on_wait: a function that is called about five times per second while the function waits. If it raises an error,
            the wait ends.
        grace_s: the time in seconds that the processes have to end.

    Raises:
        OSError: the file cannot be opened or locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    asked: dict[int, float] = {}
    while (file := lock_file(path)) is None:
        now = time.monotonic()
        for pid in holders(path):
            late = now - asked.setdefault(pid, now) > grace_s
            if late or asked[pid] == now:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        on_wait()
        time.sleep(POLL_S)
    return file


def holders(path: Path) -> list[int]:
    """Return the ids of the processes that hold the lock of the file at `path` because they belong to a child of a
    worker, as far as this process can see them. The result is empty on systems without /proc.

    A child writes the id of its process group into the file. Other processes may have the file open only to try the
    lock or to copy the file.
    """
    try:
        wanted, group = path.stat(), int(path.read_text())
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    except (OSError, ValueError):
        return []
    return [pid for pid in pids if _is_in(pid, group) and _has_open(pid, wanted)]


def _is_in(pid: int, group: int) -> bool:
    try:
        return os.getpgid(pid) == group
    except ProcessLookupError:
        return False


def _has_open(pid: int, wanted: os.stat_result) -> bool:
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:  # the process has ended, or belongs to another user
        return False
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{descriptor}"), wanted):
                return True
    return False


class Child:
    """A running child process."""

    def __init__(
        self, command: Sequence[str], lock: BinaryIO, *, cwd: Path, death_signal: signal.Signals = signal.SIGTERM
    ) -> None:
        """Start a command. It inherits `lock` from the caller, who should then close it.

        Args:
            command: the absolute path of the program, and its arguments.
            lock: the locked file, see `take_lock`.
            cwd: the working folder.
            death_signal: the signal that the child gets when this thread or process ends (only on Linux).

        Raises:
            OSError: the process cannot be started.
        """
        self._process = subprocess.Popen(  # noqa: S603 - the caller builds the command from checked values
            launch_command(command, death_signal=death_signal, lock=lock),
            cwd=cwd,
            env={**os.environ, IN_JOB: "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, output: Callable[[bytes], object], should_stop: Callable[[], bool], grace_s: float) -> Ended:
        """Wait until the child ends. Then kill what is left of its process group.

        Args:
            output: a function that gets the child's output, about five times per second.
            should_stop: a function that is called about five times per second. When it first returns True, the process
                group gets SIGTERM.
            grace_s: the time in seconds after which it is killed if it has not ended.

        If one of the functions raises an error, the process group is killed.
        """
        pipe = self._process.stdout
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
        tail, asked_at, pause = b"", None, POLL_S / 20
        with pipe:
            try:
                while not self._has_ended():
                    if asked_at is None and should_stop():
                        self._signal(signal.SIGTERM)
                        asked_at = time.monotonic()
                    if asked_at is not None and time.monotonic() - asked_at > grace_s:
                        self._signal(signal.SIGKILL)
                    if text := _available(pipe):
                        output(text)
                        tail = (tail + text)[-TAIL_BYTES:]
                    else:
                        time.sleep(pause)
                        pause = min(pause * 1.5, POLL_S)
            finally:
                self._signal(signal.SIGKILL)  # before the child is reaped, so that its group id is not used again
                status = self._process.wait()
            while text := _available(pipe):
                output(text)
                tail = (tail + text)[-TAIL_BYTES:]
        return Ended(status, asked_at is not None, tail.decode(errors="replace"))

    def _has_ended(self) -> bool:
        """Return whether the child has ended, without reaping it."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses for a group that has ended
            os.killpg(self._process.pid, number)


def _available(pipe: IO[bytes]) -> bytes:
    """Return the output that a child has written and that has not been read yet, up to 1 MiB."""
    text = b""
    with contextlib.suppress(BlockingIOError):
        while len(text) < MOST_BYTES and (part := os.read(pipe.fileno(), PIPE_BYTES)):
            text += part
    return text
