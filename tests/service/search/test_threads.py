"""Tests of the threads of the embedded store: which jobs run together, and what happens to jobs that are no longer
needed.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from service.errors import Conflict, StorageFailed
from service.search.threads import Workers


class Watched:
    """Workers that record which jobs they run together. The job 'wait' waits for the gate."""

    def __init__(self, count: int = 1) -> None:
        self.batches: list[list[Any]] = []
        self.gate = threading.Event()
        self.busy = threading.Semaphore(0)
        self.count = count
        self.workers: Workers[Any] = Workers("test", count, self._make)

    def _make(self) -> Callable[[Sequence[Any]], Sequence[Any]]:
        def work(jobs: Sequence[Any]) -> Sequence[Any]:
            if jobs[0] == "wait":
                self.busy.release()
                self.gate.wait(20)
                return jobs
            self.batches.append(list(jobs))
            if jobs[0] == "raise":
                raise ZeroDivisionError("unexpected")
            return [Conflict("no") if job == "refuse" else job for job in jobs]

        return work

    async def held_back(self, jobs: Sequence[tuple[Any, Any]]) -> list[asyncio.Task[Any]]:
        """Queue (job, key) pairs while every thread is busy."""
        waiting = [asyncio.create_task(self.workers.do("wait", object())) for _ in range(self.count)]
        for _ in waiting:
            await asyncio.to_thread(self.busy.acquire, timeout=20)
        tasks = [asyncio.create_task(self.workers.do(*job)) for job in jobs]
        await asyncio.sleep(0)  # each is queued in its first step
        assert len(self.workers._waiting) == len(tasks)
        return tasks


@pytest.fixture
def watched() -> Iterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def make(count: int = 1) -> Watched:
        made.append(Watched(count))
        return made[-1]

    yield make
    for one in made:
        one.gate.set()
        one.workers.close(20)


async def test_jobs_that_wait_are_done_together_up_to_a_limit(watched: Callable[..., Watched]) -> None:
    one = watched()
    tasks = await one.held_back([(n, None) for n in range(150)])
    one.gate.set()
    assert await asyncio.gather(*tasks) == list(range(150))
    assert [len(batch) for batch in one.batches] == [64, 64, 22]


async def test_a_thread_leaves_the_others_their_share(watched: Callable[..., Watched]) -> None:
    one = watched(2)
    tasks = await one.held_back([(n, None) for n in range(10)])
    one.gate.set()
    assert await asyncio.gather(*tasks) == list(range(10))
    assert max(len(batch) for batch in one.batches) == 5


async def test_only_neighbours_with_the_same_key_are_done_together(watched: Callable[..., Watched]) -> None:
    one = watched()
    tasks = await one.held_back([(1, "a"), (2, "a"), (3, "b"), (4, "a")])
    one.gate.set()
    assert await asyncio.gather(*tasks) == [1, 2, 3, 4]
    assert one.batches == [[1, 2], [3], [4]]


async def test_a_job_whose_caller_is_gone_is_not_begun(watched: Callable[..., Watched]) -> None:
    one = watched()
    tasks = await one.held_back([(n, None) for n in range(3)])
    tasks[1].cancel()
    await asyncio.wait([tasks[1]])
    one.gate.set()
    assert await asyncio.gather(tasks[0], tasks[2]) == [0, 2]
    assert one.batches == [[0, 2]]


async def test_an_error_reaches_its_caller_and_the_thread_lives_on(watched: Callable[..., Watched]) -> None:
    one = watched()
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(one.workers.do("raise"), 10)
    with pytest.raises(Conflict):
        await asyncio.wait_for(one.workers.do("refuse"), 10)
    assert await asyncio.wait_for(one.workers.do(7), 10) == 7


async def test_closing_does_what_waits_and_takes_no_more(watched: Callable[..., Watched]) -> None:
    one = watched()
    tasks = await one.held_back([(n, None) for n in range(3)])
    closing = asyncio.create_task(asyncio.to_thread(one.workers.close, 20))
    while one.workers._open:  # noqa: ASYNC110 - a thread sets it
        await asyncio.sleep(0.001)
    with pytest.raises(StorageFailed, match="closed"):
        await one.workers.do(4)
    one.gate.set()
    assert await asyncio.wait_for(asyncio.gather(*tasks), 10) == [0, 1, 2]
    await closing
    assert not any(thread.is_alive() for thread in one.workers._threads)


async def test_a_caller_whose_event_loop_is_gone_does_no_harm(watched: Callable[..., Watched]) -> None:
    one = watched()
    tasks = await one.held_back([(1, None)])

    def leave() -> None:
        loop = asyncio.new_event_loop()
        asking = loop.create_task(one.workers.do(2))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        assert not asking.done()
        asking._log_destroy_pending = False  # type: ignore[attr-defined]

    await asyncio.to_thread(leave)
    one.gate.set()
    assert await asyncio.gather(*tasks) == [1]
    assert await asyncio.wait_for(one.workers.do(3), 10) == 3
    assert one.batches[0] == [1, 2]
