"""The jobs of a running service: the job store, which the first request that needs it opens, and the queue.

A service without jobs has no job store. The start of the service does not wait for the store, and the store's folder is
created with the first job.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from service.errors import JobNotFound
from service.jobs.answers import JobAnswer, job_answers
from service.jobs.blocked import why_blocked
from service.jobs.kind import Kind
from service.jobs.kinds import KINDS
from service.jobs.queue import JobQueue, open_jobs, open_queue
from service.jobs.records import Job, State
from service.jobs.store import JobStore
from service.settings import Settings

_RUNNING: Final[tuple[State, ...]] = ("running",)
_QUEUED: Final[tuple[State, ...]] = ("queued",)


@dataclass(frozen=True)
class Figures:
    """Figures about all jobs, for metrics. `quiet_s` is the longest time in seconds for which a running job has shown
    no progress, and `silent_s` is the longest time since the last heartbeat of a worker. `blocked` is the number of
    jobs that are due, although no worker can start them."""

    counts: Mapping[State, int]
    quiet_s: float
    silent_s: float
    blocked: int


class OpenedJobs:
    """The job store and the queue of one service. Threads may use it at the same time. Most methods block."""

    def __init__(self, settings: Settings, kinds: Mapping[str, Kind] = KINDS) -> None:
        self.settings = settings
        self.kinds = kinds
        self._lock = threading.Lock()
        self._store: JobStore | None = None
        self._queue: JobQueue | None = None
        self._progress = _Progress()

    @property
    def opened(self) -> JobStore | None:
        """The store if it is open already. This does not block."""
        return self._store

    def store(self) -> JobStore:
        """Return the store. Create it if it does not exist.

        Raises:
            StorageFailed: the store cannot be used.
        """
        with self._lock:
            if self._store is None:
                self._store = open_jobs(self.settings)
            return self._store

    def existing(self) -> JobStore | None:
        """Return the store, or None if it does not exist.

        Raises:
            StorageFailed: the store cannot be used.
        """
        return self.store() if self._store is not None or JobStore.exists(self.settings.data_dir) else None

    def with_job(self, job_id: str) -> JobStore:
        """Return the store. The caller wants to use a job in it.

        Raises:
            JobNotFound: the store does not exist, so the job does not exist either.
            StorageFailed: the store cannot be used.
        """
        store = self.existing()
        if store is None:
            raise JobNotFound(f"there is no job {job_id[:80]!r}", param="id")
        return store

    def announce(self, job: Job) -> Job:
        """Tell the workers that a job is queued, and return it."""
        with self._lock:
            if self._queue is None:
                self._queue = open_queue(self.settings)
        self._queue.announce(job)
        return job

    def answer(self, job: Job) -> JobAnswer:
        """Return the answer that describes a job."""
        [answer] = job_answers(self.store(), [job])
        return answer

    def figures(self) -> Figures | None:
        """Return figures about all jobs, or None if there is no job store.

        Raises:
            StorageFailed: the store cannot be used.
        """
        store = self.existing()
        if store is None:
            return None
        quiet_s = self._progress.longest_pause_s(store.jobs(states=_RUNNING, limit=1000))
        heartbeats = [worker.heartbeat for worker in store.workers.known()]
        silent_s = max(0.0, store.now() - min(heartbeats)) if heartbeats else 0.0
        workers, queued = store.workers.alive(), store.jobs(states=_QUEUED, limit=1000)
        blocked = sum(why_blocked(job, workers, store.now()) is not None for job in queued)
        return Figures(store.counts(), quiet_s, silent_s, blocked)

    def close(self) -> None:
        with self._lock:
            if self._store is not None:
                self._store.close()
                self._store = None


@dataclass
class _Progress:
    """Remembers when the running jobs last showed progress. A worker stores the figures of its job every second, even
    if they are the same as before, so the times in the store do not tell. The log of a job counts as progress."""

    clock: Callable[[], float] = time.monotonic
    _seen: dict[str, tuple[Any, float]] = field(default_factory=dict)

    def longest_pause_s(self, running: list[Job]) -> float:
        """Return the longest time in seconds since one of the running jobs showed progress."""
        now = self.clock()
        states = {job.id: (job.token, job.progress, job.text, job.metrics, job.steps, job.log_bytes) for job in running}
        self._seen = {
            job_id: previous if (previous := self._seen.get(job_id)) and previous[0] == state else (state, now)
            for job_id, state in states.items()
        }
        return max((now - since for _, since in self._seen.values()), default=0.0)
