"""Token buckets, in the memory of this process or in Redis, for the rate limits (service/limits.py).

A bucket is stored as one number: the time at which it will be full. Taking a cost makes this time later, by the time in
which the bucket gains as much. Costs are therefore times here. All times are whole microseconds, so the arithmetic is
exact, in Python and in Lua. A full bucket does not have to be stored, because it is the same as no bucket.
"""

import hashlib
import heapq
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from redis.exceptions import InvalidResponse, NoScriptError

from service.redis_guard import RedisGuard

MOST_DEBT_BURSTS: Final = 16
"""The lowest content of a bucket is minus this many bursts. Otherwise, a client would have to wait for hours after the
clock of the Redis server was set back."""
MOST_BUCKETS: Final = 50_000
"""The highest number of buckets in the memory of one process."""
_PREFIX: Final = "dinov2:rate:v1:"
_OVERFLOW: Final = "overflow"


class Decision(NamedTuple):
    """Whether a request may run, and the time until the bucket is full, which includes the cost of this request if it
    may run."""

    admitted: bool
    owed_us: int


def _monotonic_us() -> int:
    return time.monotonic_ns() // 1000


class LocalBuckets:
    """The buckets in the memory of this process.

    There are at most `most` buckets. If there is no room for another one, the bucket that has been full for the longest
    time is dropped. If no bucket is full, all further clients share one more bucket.

    Args:
        most: the highest number of buckets.
        now_us: a clock in microseconds. If it is None, the monotonic clock of the system.
    """

    def __init__(self, most: int = MOST_BUCKETS, now_us: Callable[[], int] | None = None) -> None:
        self._most, self._now_us = most, now_us or _monotonic_us
        self._full_at: dict[str, int] = {}
        self._by_time: list[tuple[int, str]] = []  # a heap with one entry per bucket, whose time may be outdated

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, name: str, cost_us: int, burst_us: int) -> Decision:
        """Take a cost from a bucket if it contains at least as much. `burst_us` is the time in which an empty bucket
        becomes full."""
        now = self._now_us()
        if name not in self._full_at:
            name = self._place(name, now)
        full_at = max(now, self._full_at.get(name, now)) + cost_us
        owed = full_at - now
        if owed > burst_us:
            return Decision(False, min(owed - cost_us, MOST_DEBT_BURSTS * burst_us))
        if name in self._full_at:
            self._full_at[name] = full_at
        else:
            self._set(name, full_at, now)
        return Decision(True, owed)

    def charge(self, name: str, cost_us: int, burst_us: int) -> None:
        """Take a cost from a bucket, which may become negative."""
        now = self._now_us()
        name = self._place(name, now)
        owed = self._owed_us(name, now, burst_us) + cost_us
        self._set(name, now + min(owed, MOST_DEBT_BURSTS * burst_us), now)

    def owed_us(self, name: str, burst_us: int) -> int:
        """Return the time until a bucket is full."""
        return self._owed_us(name, self._now_us(), burst_us)

    def set_owed(self, name: str, owed_us: int) -> bool:
        """Set the time until a bucket is full. Return False if there is no room for the bucket. Then do nothing."""
        now = self._now_us()
        if self._place(name, now) != name:
            return False
        if name in self._full_at:
            self._full_at[name] = now + owed_us
        else:
            self._set(name, now + owed_us, now)
        return True

    def _owed_us(self, name: str, now: int, burst_us: int) -> int:
        return min(max(0, self._full_at.get(name, now) - now), MOST_DEBT_BURSTS * burst_us)

    def _set(self, name: str, full_at: int, now: int) -> None:
        if name not in self._full_at and full_at > now:
            heapq.heappush(self._by_time, (full_at, name))
        if full_at > now:
            self._full_at[name] = full_at

    def _place(self, name: str, now: int) -> str:
        """Make room for the bucket of a client if it has none. Return the name of the bucket to use."""
        if name in self._full_at:
            return name
        for _ in range(2):  # more than one, so that memory is released again after a peak
            self._drop_full(now)
        return name if len(self._full_at) < self._most else _OVERFLOW

    def _drop_full(self, now: int) -> None:
        while self._by_time:
            time_us, name = self._by_time[0]
            full_at = self._full_at[name]
            if time_us < full_at:
                heapq.heapreplace(self._by_time, (full_at, name))
                continue
            if full_at <= now:
                heapq.heappop(self._by_time)
                del self._full_at[name]
            return


_SCRIPT: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local spent, cost, burst, most = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local full_at = tonumber(redis.call('GET', KEYS[1]) or '') or now
local owed = math.min(math.min(math.max(0, full_at - now), most) + spent, most)
local admitted = owed + cost <= burst
if admitted then
  owed = owed + cost
end
if owed > 0 and (spent > 0 or admitted) then
  redis.call('SET', KEYS[1], string.format('%.0f', now + owed), 'PX', math.ceil(owed / 1000))
end
return {admitted and 1 or 0, owed}
"""
"""Do `LocalBuckets.charge` with `spent`, and then `LocalBuckets.take` with `cost`. A key expires when its bucket is
full. The clock is that of the Redis server, so the clocks of the processes may differ."""


class Bill(NamedTuple):
    """What a process wants from a shared bucket. All values are in microseconds. `spent_us` is charged in any case, and
    then `cost_us` is taken if the bucket contains it. `burst_us` is the time in which an empty bucket becomes full."""

    spent_us: int
    cost_us: int
    burst_us: int


class RedisBuckets:
    """The buckets in Redis, which several processes share."""

    def __init__(self, guard: RedisGuard) -> None:
        self.guard = guard
        self._sha = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()

    async def settle(self, bills: Mapping[str, Bill]) -> dict[str, Decision] | None:
        """Settle a bill for each of these clients, in one round trip. Return the decisions, or None if Redis does not
        answer. A client whose bucket Redis cannot change is missing in the result."""
        return await self.guard.call("limits", lambda: self._settle(bills))

    async def _settle(self, bills: Mapping[str, Bill]) -> dict[str, Decision]:
        names = list(bills)
        answers = await self._run("EVALSHA", self._sha, bills, names)
        unknown = [name for name in names if isinstance(answers[name], NoScriptError)]
        if unknown:  # this is the first call, or Redis was restarted
            answers |= await self._run("EVAL", _SCRIPT, bills, unknown)
        faults = [answer for answer in answers.values() if isinstance(answer, Exception)]
        if len(faults) == len(names):
            raise faults[0]
        return {name: _decision(answer) for name, answer in answers.items() if not isinstance(answer, Exception)}

    async def _run(self, command: str, script: str, bills: Mapping[str, Bill], names: list[str]) -> dict[str, Any]:
        async with self.guard.redis.pipeline(transaction=False) as pipeline:
            for name in names:
                most_us = MOST_DEBT_BURSTS * bills[name].burst_us
                pipeline.execute_command(command, script, 1, _PREFIX + name, *bills[name], most_us)
            return dict(zip(names, await pipeline.execute(raise_on_error=False), strict=True))


def _decision(answer: Any) -> Decision:
    match answer:
        case [int(admitted), int(owed_us)]:
            return Decision(bool(admitted), owed_us)
    raise InvalidResponse("the answer of the rate limit's script is not two integers")
