"""What the function of a job works with: its parameters, folder and steps, progress, log, and child processes.

Another worker can go on with a job at any time, so a function consists of steps. `step` skips a step that has finished
before. Everything else of a function may run again. A job ends early by an exception: it was cancelled, its worker
stops, or its lease was lost. `check_cancelled` and `run` raise these.
"""

import logging
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from service.errors import ServiceError
from service.jobs.leases import Leases
from service.jobs.process import LOCK, Child, Ended, take_lock
from service.jobs.records import Job, Lease, LeaseLost
from service.settings import Settings

log = logging.getLogger(__name__)

P = TypeVar("P")
T = TypeVar("T")

CODE: Final = Path(__file__).parents[2]
REPORT_S: Final = 1.0
FLUSH_S: Final = 0.5
MOST_PENDING: Final = 2**20
RECENT_BYTES: Final = 8192
KILLED: Final = frozenset(
    {128 + number for number in (signal.SIGINT, signal.SIGKILL, signal.SIGTERM)}
    | {-number for number in (signal.SIGINT, signal.SIGKILL, signal.SIGTERM)}
)
"""The statuses of a child that a signal ended. The job is started again, because the child may have been killed to free
memory, or before it could save its state."""


class Cancelled(Exception):
    """An exception that ends the work on a job because a client has cancelled it."""


class Stopping(Exception):
    """An exception that ends the work on a job because its worker stops. Another worker goes on with it."""


class Waiting(Exception):
    """An exception that ends the work on a job because it waits for approval."""


class ChildKilled(Exception):
    """An exception that ends the work on a job because its child process was killed. It is started again."""


class JobFailed(Exception):
    """An error that a user can understand. The job fails with its message."""


@dataclass
class Stop:
    """Whether the worker was asked to stop. A signal handler sets it."""

    requested: bool = False


@dataclass
class Hold:
    """A worker's hold on a job. The thread that renews the lease, for `lease_s` seconds each time, sets `lost` and
    `cancelled`."""

    lease: Lease
    lease_s: float
    stop: Stop = field(default_factory=Stop)
    lost: bool = False
    cancelled: bool = False

    @property
    def ends(self) -> bool:
        """Whether the work must end."""
        return self.lost or self.cancelled or self.stop.requested

    def check_lost(self) -> None:
        """Raise LeaseLost if the lease was lost."""
        if self.lost:
            raise LeaseLost(f"the lease of job {self.lease.job} was lost")

    def check(self) -> None:
        """Raise the exception with which the work must end, if it must.

        Raises:
            LeaseLost, Cancelled, Stopping: see these classes.
        """
        self.check_lost()
        if self.cancelled:
            raise Cancelled
        if self.stop.requested:
            raise Stopping


class Context(Generic[P]):
    """The work of one attempt at a job. `params` contains its checked parameters."""

    def __init__(self, job: Job, params: P, settings: Settings, store: Leases, hold: Hold) -> None:
        self.job = job
        self.params = params
        self.settings = settings
        self.folder = store.folder(job.id)
        self.data_dir = settings.data_dir.absolute()
        self._store = store
        self._hold = hold
        self._results = job.results
        self._metrics: dict[str, Any] = dict(job.metrics)
        self._reported_at = self._flushed_at = 0.0
        self._pending = b""
        self._told_wait = False
        self._recent = b""
        self.folder.mkdir(parents=True, exist_ok=True)

    def check_cancelled(self) -> None:
        """End the work if the job was cancelled, the worker stops, or the lease was lost. Long work in this process
        calls this at least once per second.

        Raises:
            LeaseLost, Cancelled, Stopping: see these classes.
        """
        self._hold.check()

    def report(self, progress: float, text: str = "", metrics: Mapping[str, Any] | None = None) -> None:
        """Report the share of the work that is done, 0 to 1, a text, and figures that are added to the earlier ones. It
        is stored at most once per second, so the figures of a call may be missing until the next one."""
        self._metrics |= metrics or {}
        now = time.monotonic()
        if progress < 1 and now - self._reported_at < REPORT_S:
            return
        self._reported_at = now
        self._store.report(self._hold.lease, progress, text, self._metrics)

    def log(self, text: str) -> None:
        """Append a line to the job's log."""
        self._output(f"{time.strftime('%H:%M:%S', time.gmtime())}  {text}\n".encode())
        self._flush()

    def step(self, name: str, work: Callable[[], T]) -> T:
        """Do a step of the job and return its result, which must consist of JSON types. If the step has finished in an
        earlier attempt, only return its result.

        Raises:
            LeaseLost, Cancelled, Stopping: the work must end. The step is not stored.
        """
        if name not in self._results:
            self.check_cancelled()
            result = work()
            self._store.finish_step(self._hold.lease, name, result)
            self._results[name] = result
        stored: T = self._results[name]
        return stored

    def wait_for_approval(self, name: str, text: str) -> dict[str, Any]:
        """Let the job wait until a client approves it. The result says who approved it, and when.

        Args:
            name: the name of the step.
            text: what is to be decided.

        Raises:
            Waiting: always at the first call. After the approval, the job is started again.
        """
        if name not in self._results:
            self._store.wait_for_approval(self._hold.lease, name, text)
            raise Waiting
        approval: dict[str, Any] = self._results[name]
        return approval

    def run_command(self, arguments: Sequence[str], watch: Callable[[], object] = lambda: None) -> str:
        """Run `dinov2` with these arguments as a child process, and return the end of its output. See `run`."""
        return self.run([sys.executable, "-u", "-m", "cli", *arguments], watch)

    def run(self, command: Sequence[str], watch: Callable[[], object] = lambda: None) -> str:
        """Run a command as a child process. Its output becomes part of the log. No two children of a job run at the
        same time, even if an earlier worker was killed and its child still runs.

        Args:
            command: the absolute path of the program, and its arguments.
            watch: a function that is called about once per second, for instance to report progress.

        Returns:
            the end of the output.

        Raises:
            LeaseLost, Cancelled, Stopping: the work must end. The child was stopped.
            ChildKilled: something else has killed the child.
            JobFailed: the child ended with an error. The message is the last line of its output.
        """
        grace_s, self._recent = self.settings.job_stop_grace_s, b""
        with take_lock(self.folder / LOCK, self._while_waiting, grace_s) as lock:
            self.check_cancelled()
            self._store.renew(self._hold.lease, self._hold.lease_s)  # a worker that was suspended notices its loss here
            child = Child(command, lock, cwd=CODE)
        watched_at = 0.0

        def should_stop() -> bool:
            nonlocal watched_at
            self._flush(FLUSH_S)
            if time.monotonic() - watched_at >= REPORT_S:
                self._guarded(watch)
                watched_at = time.monotonic()
            return self._hold.ends

        def printed(text: bytes) -> None:
            self._recent = (self._recent + text)[-RECENT_BYTES:]
            self._output(text)

        ended = child.wait(printed, should_stop, grace_s)
        self._flush()
        self._guarded(watch)
        return self._outcome(ended)

    @property
    def recent_output(self) -> str:
        """The end of what the running child, or the last one, has printed so far."""
        return self._recent.decode(errors="replace")

    def end_survivors(self) -> None:
        """End the processes that an earlier attempt has left."""
        take_lock(self.folder / LOCK, self._while_waiting, self.settings.job_stop_grace_s).close()

    def _outcome(self, ended: Ended) -> str:
        """Return the output of a child that succeeded, or raise the exception for its exit status."""
        if ended.status == 0:
            return ended.tail
        if ended.stopped:
            self._hold.check()
        if ended.status in KILLED:
            raise ChildKilled(f"its process was ended by a signal (status {ended.status})")
        raise ChildFailed(ended.status, ended.tail)

    def _while_waiting(self) -> None:
        """End the wait for the folder if another worker has the job, or this worker stops. A cancelled job goes on
        waiting, because its processes must end."""
        if not self._told_wait:
            self._told_wait = True
            self._output(b"waiting for the process of an earlier attempt to end\n")
            self._flush()
        if self._hold.lost or self._hold.stop.requested:
            self._hold.check()

    def _output(self, text: bytes) -> None:
        self._pending = (self._pending + text)[-MOST_PENDING:]

    def _flush(self, every_s: float = 0.0) -> None:
        """Store the log's new lines, if the last time was at least `every_s` seconds ago."""
        now = time.monotonic()
        if self._pending and now - self._flushed_at >= every_s:
            self._flushed_at = now
            if self._guarded(lambda: self._store.log(self._hold.lease, self._pending)):
                self._pending = b""

    def _guarded(self, action: Callable[[], object]) -> bool:
        """Do something that a child does not depend on, and return whether it succeeded. A child is not ended because
        its progress cannot be stored for a moment."""
        try:
            action()
        except LeaseLost:
            self._hold.lost = True
            return False
        except (ServiceError, OSError, ValueError) as error:
            log.warning("job %s: %s", self.job.id, error)
            return False
        return True


class ChildFailed(JobFailed):
    """An error of a child process. `status` is its exit status."""

    def __init__(self, status: int, output: str) -> None:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        last = (errors or lines or [""])[-1].removeprefix("error: ")
        super().__init__(f"{last or 'no output'} (exit status {status})")
        self.status = status
