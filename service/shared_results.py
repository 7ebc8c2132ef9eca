"""Results that several requests share. Each is computed only once, even if several requests need it at the same time.

A key names everything that a result depends on, for example the version of a collection. When the collection changes,
requests use another key, and the old result is discarded when newer results take its place.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

T = TypeVar("T")

MAX_RESULTS: Final = 64


@dataclass(frozen=True)
class _Result:
    task: "asyncio.Task[Any]"
    started: float


class SharedResults:
    """A cache that contains the `MAX_RESULTS` most recently used results. Only the event loop's thread uses it."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._results: OrderedDict[Hashable, _Result] = OrderedDict()
        self._now = now

    async def get(self, key: Hashable, compute: Callable[[], Awaitable[T]], *, max_age_s: float | None = None) -> T:
        """Return the result for `key`. If there is none, or if it is older than `max_age_s` seconds, compute it.

        The computation continues if the caller is cancelled, so the next request finds the result. If the computation
        fails, all callers that wait for it get the error, and the next call tries again.
        """
        kept = self._results.get(key)
        if kept is None or (max_age_s is not None and self._now() - kept.started > max_age_s):
            task: asyncio.Task[T] = asyncio.ensure_future(_run(compute))
            task.add_done_callback(lambda done: self._ended(key, done))
            kept = self._results[key] = _Result(task, self._now())
            while len(self._results) > MAX_RESULTS:
                self._results.popitem(last=False)
        self._results.move_to_end(key)
        result: T = await asyncio.shield(kept.task)
        return result

    def _ended(self, key: Hashable, task: "asyncio.Task[Any]") -> None:
        if task.cancelled() or task.exception() is not None:
            kept = self._results.get(key)
            if kept is not None and kept.task is task:
                del self._results[key]


async def _run(compute: Callable[[], Awaitable[T]]) -> T:
    return await compute()
