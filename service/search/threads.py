"""The embedded store's threads: one that writes, some that search; the event loop only waits for them.

Writes that wait together are committed together: one sync of the disk for all of them, each of them still all or
nothing by a savepoint of its own. Searches that wait together and want the same are given to faiss together. The hop
between the event loop and a thread is kept small, since a search takes a fraction of a millisecond.
"""

import asyncio
import contextlib
import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from service.errors import ServiceError, StorageFailed
from service.search.sqlite_file import transaction, translated

log = logging.getLogger(__name__)

T = TypeVar("T")
Q = TypeVar("Q")

MAX_TOGETHER: Final = 64


@dataclass(frozen=True)
class _Job(Generic[Q]):
    what: Q
    key: Hashable
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"


class Workers(Generic[Q]):
    """Threads that take jobs from one queue, several at once when their keys are equal."""

    def __init__(self, name: str, count: int, make: Callable[[], Callable[[Sequence[Q]], Sequence[Any]]]) -> None:
        """`make` is called in each thread and gives the function that does jobs: for each its result or its error."""
        self._waiting: deque[_Job[Q]] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._count = count
        self._make = make
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    async def do(self, what: Q, key: Hashable = None) -> Any:
        """The job's result. A caller that is cancelled leaves a job that is done all the same, or not begun."""
        loop = asyncio.get_running_loop()
        job = _Job(what, key, loop, loop.create_future())
        with self._changed:
            if not self._open:
                raise StorageFailed("the vector store is closed")
            self._waiting.append(job)
            self._changed.notify()
        return await job.future

    def close(self, timeout_s: float | None = None) -> None:
        """What waits is done; then the threads end."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout_s)

    def _take(self) -> list[_Job[Q]]:
        """The next job with others of its key: a fair share, so that no thread is idle meanwhile. Empty at the end."""
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
            except Exception as error:  # noqa: BLE001 - the thread must live on, and whoever waits gets it
                results = [error] * len(wanted)
            by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
            for job, result in zip(wanted, results, strict=True):
                by_loop.setdefault(job.loop, []).append((job.future, result))
            for loop, pairs in by_loop.items():
                with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
                    loop.call_soon_threadsafe(_resolve, pairs)


def _resolve(pairs: list[tuple["asyncio.Future[Any]", Any]]) -> None:
    for future, result in pairs:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


Write = Callable[[sqlite3.Connection], Any]


def commit_together(db: sqlite3.Connection, writes: Sequence[Write]) -> list[Any]:
    """Carry out several writes in one transaction: for each its result or its own error.

    Raises:
        StorageFailed: the transaction as a whole failed; nothing is written.
    """
    with translated(), transaction(db):
        return [_carry_out(db, write) for write in writes]


def _carry_out(db: sqlite3.Connection, write: Write) -> Any:
    db.execute("SAVEPOINT single")
    try:
        result = write(db)
    except ServiceError as error:
        result = error
        db.execute("ROLLBACK TO single")
    db.execute("RELEASE single")
    return result
