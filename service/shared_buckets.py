"""Token buckets that several processes share through Redis, without asking Redis for every request.

A call to Redis takes a tenth of the time of a search by vector. A process therefore admits a request at once if its own
estimate of the bucket says that plenty is left. It collects what its requests cost, and sends the sums to Redis after
`SEND_AFTER_S` seconds. Redis answers with the true content, which is the new estimate. Every cost is charged, so the
average holds. Only a refusal may be late: together, the processes may admit more than a bucket contains, by at most a
sixteenth of the burst for each process.

If less is left, or if the process has no estimate, Redis decides. If Redis fails, the estimate decides until Redis
answers again, so each process then limits its clients alone.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from service.buckets import MOST_BUCKETS, Bill, Decision, LocalBuckets, RedisBuckets

SEND_AFTER_S: Final = 0.5
"""The longest time in seconds until a cost is sent to Redis."""
KEEP_S: Final = 10.0
"""The time in seconds after which an estimate is not used any more. It may be long, because the first cost that is sent
to Redis brings a new estimate."""
_USED: Final = 2  # Redis decides if more than a half of the burst is used
_UNSENT: Final = 16  # Redis decides if more than a sixteenth of the burst has not been sent yet


class SharedBuckets:
    """The buckets of all processes that use the same Redis server. The object belongs to one event loop.

    Args:
        redis: the buckets in Redis.
        estimates: the estimates of this process.
        on_change: a function that is called with True when Redis works again, and with False when it has failed.
    """

    def __init__(
        self, redis: RedisBuckets, estimates: LocalBuckets, on_change: Callable[[bool], None] = lambda works: None
    ) -> None:
        self._redis, self._estimates, self._on_change = redis, estimates, on_change
        self._works = True
        self._answered_s: dict[str, float] = {}  # client -> the time of its estimate; the oldest first
        self._unsent: dict[str, Bill] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._sending = set[asyncio.Task[None]]()

    async def take(self, name: str, cost_us: int, burst_us: int) -> Decision:
        """Take a cost from a bucket if it contains at least as much. `burst_us` is the time in which an empty bucket
        becomes full."""
        spent_us = cost_us + self._unsent_us(name)
        if time.monotonic() - self._answered_s.get(name, float("-inf")) < KEEP_S and spent_us * _UNSENT <= burst_us:
            estimate = self._estimates.take(name, cost_us, burst_us // _USED)
            if estimate.admitted:
                self._send_later(name, Bill(spent_us, 0, burst_us))
                return estimate
        answers = await self._settle({name: Bill(spent_us - cost_us, cost_us, burst_us)})
        return answers[name] if name in answers else self._estimates.take(name, cost_us, burst_us)

    def charge(self, name: str, cost_us: int, burst_us: int) -> None:
        """Take a cost from a bucket, which may become negative. Do not wait for Redis."""
        self._estimates.charge(name, cost_us, burst_us)
        self._send_later(name, Bill(cost_us + self._unsent_us(name), 0, burst_us))

    def _unsent_us(self, name: str) -> int:
        """Return what has been taken from a bucket and not been sent yet."""
        return self._unsent[name].spent_us if name in self._unsent else 0

    def _send_later(self, name: str, bill: Bill) -> None:
        self._unsent[name] = bill
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SEND_AFTER_S, self._start_sending)

    async def close(self) -> None:
        """Send all costs to Redis, and close the connections."""
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(self._send(), *self._sending)
        await self._redis.guard.close()

    async def _settle(self, bills: dict[str, Bill]) -> dict[str, Decision]:
        """Send bills to Redis, which contain everything that was not sent before, and make the answers the new
        estimates. Return the answers, which are empty if Redis has failed."""
        asked_s = time.monotonic()
        for name in bills:
            self._unsent.pop(name, None)
        answers = await self._redis.settle(bills)
        if self._works != (answers is not None):
            self._works = answers is not None
            self._on_change(self._works)
        for name, answer in (answers or {}).items():
            self._answered_s.pop(name, None)
            if self._estimates.set_owed(name, answer.owed_us + self._unsent_us(name)):
                self._answered_s[name] = asked_s
        self._forget(asked_s - KEEP_S)
        return answers or {}

    def _forget(self, oldest_s: float) -> None:
        """Forget the times of estimates that are older than this time, or for which there is no room."""
        while self._answered_s:
            name = next(iter(self._answered_s))
            if self._answered_s[name] > oldest_s and len(self._answered_s) <= MOST_BUCKETS:
                return
            del self._answered_s[name]

    def _start_sending(self) -> None:
        self._timer = None
        task = asyncio.create_task(self._send())
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send(self) -> None:
        if self._unsent:
            await self._settle(dict(self._unsent))
