"""Tests of results that requests share."""

import asyncio

import pytest

from service.shared_results import MAX_RESULTS, SharedResults


class Source:
    """Counts its calls. A call waits for the event `gate` and then returns the number of calls, or fails."""

    def __init__(self) -> None:
        self.calls = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def __call__(self) -> int:
        self.calls += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.calls


async def test_a_result_is_computed_once_for_each_key() -> None:
    shared, source = SharedResults(), Source()
    source.gate.clear()
    waiting = [asyncio.create_task(shared.get("a", source)) for _ in range(5)]
    await asyncio.sleep(0)
    source.gate.set()
    assert await asyncio.gather(*waiting) == [1] * 5
    assert await shared.get("a", source) == 1
    assert await shared.get("b", source) == 2


async def test_a_failure_is_not_kept() -> None:
    shared, source = SharedResults(), Source()
    source.error = ValueError("no")
    with pytest.raises(ValueError, match="no"):
        await shared.get("a", source)
    await asyncio.sleep(0)
    source.error = None
    assert await shared.get("a", source) == 2


async def test_a_cancelled_caller_leaves_the_result_to_the_next() -> None:
    shared, source = SharedResults(), Source()
    source.gate.clear()
    waiting = asyncio.create_task(shared.get("a", source))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    source.gate.set()
    assert await shared.get("a", source) == 1
    assert source.calls == 1


async def test_an_old_result_is_computed_again() -> None:
    now = 0.0
    shared, source = SharedResults(lambda: now), Source()
    assert await shared.get("a", source, max_age_s=60) == 1
    now = 60.0
    assert await shared.get("a", source, max_age_s=60) == 1
    now = 60.1
    assert await shared.get("a", source, max_age_s=60) == 2


async def test_the_least_recently_used_result_is_discarded() -> None:
    shared, source = SharedResults(), Source()
    for key in range(MAX_RESULTS):
        await shared.get(key, source)
    await shared.get(0, source)
    await shared.get("new", source)  # takes the place of 1
    assert source.calls == MAX_RESULTS + 1
    await shared.get(0, source)
    assert source.calls == MAX_RESULTS + 1
    await shared.get(1, source)
    assert source.calls == MAX_RESULTS + 2
