"""The embedded store's threads: one for writes and several for searches. The event loop only passes jobs to them and
receives the results.

Writes that wait in the queue are committed together, so the disk is synced only once for all of them. Each write runs
within its own savepoint and remains atomic. Searches that wait in the queue and have the same parameters share one call
of faiss. A search takes a fraction of a millisecond, so passing a job to a thread must be quick.
"""

import asyncio
import contextlib
import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

from service.errors import ServiceError, StorageFailed
from service.sqlite import transaction, translated

log = logging.getLogger(__name__)

T = TypeVar("T")
Q = TypeVar("Q")

MAX_TOGETHER: Final = 64


class _Job(NamedTuple):  # a frozen dataclass takes several times as long to create
    what: Any
    key: Hashable
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"


class Workers(Generic[Q]):
    """Threads that take jobs from a shared queue. A thread can take several jobs with the same key at once."""

    def __init__(self, name: str, count: int, make: Callable[[], Callable[[Sequence[Q]], Sequence[Any]]]) -> None:
        """Start `count` threads. Each thread calls `make` once to get a function, and then passes jobs from the queue
        to this function. The function runs the jobs and returns a result or an error for each of them."""
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._count = count
        self._make = make
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    async def do(self, what: Q, key: Hashable = None) -> Any:
        """Run the job `what` in a thread and return its result, or raise its error. Jobs with the same `key` may run
        together. If the caller is cancelled, a job that has started is still completed."""
        loop = asyncio.get_running_loop()
        job = _Job(what, key, loop, loop.create_future())
        with self._changed:
            if not self._open:
                raise StorageFailed("the vector store is closed")
            self._waiting.append(job)
            self._changed.notify()
        return await job.future

    def close(self, timeout_s: float | None = None) -> None:
        """Finish the queued jobs and end the threads. Wait up to `timeout_s` seconds for each thread. If `timeout_s` is
        None, wait without a limit."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout_s)

    def _take(self) -> list[_Job]:
        """Wait until the queue contains a job. Remove this job and the jobs directly behind it that have the same key,
        but at most this thread's share of the queue. Return the removed jobs.

        Return an empty list if the workers are closed and the queue is empty.
        """
        with self._changed:
            while not self._waiting:
                if not self._open:
                    return []
                self._changed.wait()
            jobs = [self._waiting.popleft()]
            share = min(MAX_TOGETHER, -(-(len(self._waiting) + 1) // self._count))
            while len(jobs) < share and self._waiting and self._waiting[0].key == jobs[0].key:
                jobs.append(self._waiting.popleft())
            return jobs

    def _run(self) -> None:
        work = self._make()
        while jobs := self._take():
            wanted = [job for job in jobs if not job.future.cancelled()]
            if not wanted:
                continue
            try:
                results = work([job.what for job in wanted])
            except ServiceError as error:
                results = [error] * len(wanted)
            except Exception as error:  # noqa: BLE001 - the thread must survive; the caller gets the error
                results = [error] * len(wanted)
            by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
            for job, result in zip(wanted, results, strict=True):
                by_loop.setdefault(job.loop, []).append((job.future, result))
            for loop, pairs in by_loop.items():
                with contextlib.suppress(RuntimeError):  # the loop is closed, so nothing waits for the result
                    loop.call_soon_threadsafe(_resolve, pairs)


def _resolve(pairs: list[tuple["asyncio.Future[Any]", Any]]) -> None:
    for future, result in pairs:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


class Change(NamedTuple):
    """A write: a function that is called with the database connection. `frees` says that it only deletes, so it may use
    the space that is kept for deletions."""

    work: Callable[[sqlite3.Connection], Any]
    frees: bool = False


def commit_together(db: sqlite3.Connection, changes: Sequence[Change]) -> list[Any]:
    """Run several writes in one transaction. Return a list with the result or the error of each write.

    Raises:
        StorageFailed: the whole transaction failed, and nothing was written.
    """
    with translated("the vector store"), transaction(db):
        return [_carry_out(db, change) for change in changes]


def _carry_out(db: sqlite3.Connection, change: Change) -> Any:
    db.execute("SAVEPOINT single")
    try:
        result = change.work(db)
    except ServiceError as error:
        result = error
        db.execute("ROLLBACK TO single")
    db.execute("RELEASE single")
    return result
