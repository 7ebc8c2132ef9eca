"""A worker: it claims jobs, runs them one after the other, and renews its lease while it works.

A thread renews the lease every 2 seconds and notices a cancellation. If the lease was lost, or the process gets
SIGTERM, the job's child process is stopped. After SIGTERM, the job is put back into the queue, and another worker goes
on with it.
"""

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Final, Self

from service.errors import ServiceError
from service.jobs.context import (
    Cancelled,
    ChildKilled,
    Context,
    Hold,
    JobFailed,
    Stop,
    Stopping,
    Waiting,
)
from service.jobs.kind import Kind
from service.jobs.kinds import KINDS, checked_params, kinds_here
from service.jobs.records import Job, LeaseLost, WorkerRow
from service.jobs.store import JobStore
from service.settings import Settings, load_settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Times:
    """Times in seconds. With these defaults, a lease survives three renewals that fail, and a dead worker is noticed
    after 8 seconds, plus the poll of another worker.

    lease_s: the time after which a lease expires if it is not renewed.
    renew_s: the time between two renewals.
    retry_s: the time before a job whose child was killed is started again, so that memory can become free.
    """

    lease_s: float = 8.0
    renew_s: float = 2.0
    retry_s: float = 5.0


class Worker:
    """A worker in this process. Within a `with` block, it is listed in the store, and its thread runs.

    Call `run_next` from the thread that opened the block: Linux ends a job's child when the thread that started it
    ends.
    """

    def __init__(
        self,
        store: JobStore,
        settings: Settings,
        *,
        kinds: Mapping[str, Kind] = KINDS,
        only: Sequence[str] | None = None,
        times: Times = Times(),
    ) -> None:
        """Make a worker that runs jobs of the kinds in `only`. By default, it runs those that can run here."""
        self.store = store
        self.stop = Stop()
        self._times = times
        self.kinds = tuple(kinds_here(kinds) if only is None else only)
        self._settings = settings
        self._table = kinds
        self._hold: Hold | None = None
        name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.row = WorkerRow(name, socket.gethostname(), os.getpid(), self.kinds, store.now(), store.now())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self.store.workers.beat(self.row)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        with _logged("leaving"):
            self.store.workers.leave(self.row.id)

    def run_next(self, job_id: str | None = None) -> bool:
        """Claim and run one job, and return whether there was one. If `job_id` is given, consider only this job.

        Raises:
            StorageFailed: the store cannot be used.
        """
        job = self.store.claim(self.row.id, self.kinds, self._times.lease_s, job_id)
        if job is None:
            return False
        log.info("job started", extra={"fields": {"job": job.id, "attempt": job.attempt}})
        self._hold = hold = Hold(job.lease, self._times.lease_s, self.stop, cancelled=job.cancel_requested)
        try:
            outcome = self._run(job, hold)
        except LeaseLost as lost:
            outcome = f"lease lost: {lost}"
        except ServiceError as error:  # the store fails; the job is claimed again when the lease has expired
            outcome = f"the store failed: {error}"
        finally:
            self._hold = None
        log.info("job ended", extra={"fields": {"job": job.id, "attempt": job.attempt, "outcome": outcome}})
        return True

    def _run(self, job: Job, hold: Hold) -> str:
        """Run a claimed job, and store how it ended. Return this in a few words."""
        lease = hold.lease
        try:
            params = checked_params(job.kind, job.params, self._settings, self._table)
            context: Context[Any] = Context(job, params, self._settings, self.store, hold)
            context.end_survivors()
            context.check_cancelled()
            self._table[job.kind].run(context)
            hold.check_lost()
        except LeaseLost:
            raise
        except Cancelled:
            self.store.cancel(lease)
            return "cancelled"
        except Stopping:
            self.store.requeue(lease)
            return "put back into the queue"
        except Waiting:
            return "waits for approval"
        except ChildKilled as killed:
            self.store.requeue(lease, delay_s=self._times.retry_s, lost=True)
            return str(killed)
        except (JobFailed, ServiceError, ValueError, OSError) as error:
            self.store.fail(lease, str(error))
            return f"failed: {error}"
        except Exception as error:
            log.exception("job %s", job.id)
            self.store.fail(lease, f"{type(error).__name__}: {error}")
            return "failed with a bug"
        self.store.succeed(lease)
        return "succeeded"

    def _keep_alive(self) -> None:
        """Renew the lease and the heartbeat until the worker ends."""
        renewed_at = time.monotonic()
        held: Hold | None = None
        while not self._ended.wait(self._times.renew_s):
            hold = self._hold
            if hold is not held:
                held, renewed_at = hold, time.monotonic()
            with _logged("heartbeat"):
                if hold is not None:
                    hold.cancelled |= self._renew(hold)
                    renewed_at = time.monotonic()
                self.store.workers.beat(replace(self.row, job=None if hold is None else hold.lease.job))
            if hold is not None and time.monotonic() - renewed_at > hold.lease_s:
                hold.lost = True  # perhaps another worker has the job, but the store does not answer

    def _renew(self, hold: Hold) -> bool:
        """Renew a lease, and return whether the job is to be cancelled."""
        try:
            return self.store.renew(hold.lease, hold.lease_s).cancel_requested
        except LeaseLost:
            hold.lost = hold is self._hold  # otherwise the job has just ended
            return False


@contextmanager
def _logged(what: str) -> Iterator[None]:
    """Log an error of the store within the `with` block, and go on."""
    try:
        yield
    except ServiceError as error:
        log.warning("%s: %s", what, error)


@contextmanager
def stopped_by_signals(stop: Stop) -> Iterator[None]:
    """Set `stop` when this process gets SIGTERM or SIGINT within the `with` block."""

    def handle(number: int, frame: FrameType | None) -> None:
        stop.requested = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


CURRENT: Final[ContextVar[Worker | None]] = ContextVar("worker", default=None)
"""The worker of this process, for `run_job`."""


def run_job(job_id: str) -> None:
    """Run a job if no other worker runs it. This is the function that messages of RQ name (service/jobs/queue.py).

    An ordinary RQ worker may call it too. The settings are then those in the environment.
    """
    worker = CURRENT.get()
    if worker is not None:
        worker.run_next(job_id)
        return
    settings = load_settings()
    with Worker(JobStore(settings.data_dir, kept=settings.jobs_kept), settings) as own, stopped_by_signals(own.stop):
        own.run_next(job_id)
