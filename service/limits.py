"""Rate limits: how many pixels each client may use per second. docs/limits.md describes them for users.

Every client has a token bucket, which is filled at a constant rate up to a maximum, the burst. A client is an API key,
or the address of a client without a key. The fixed cost of a request is taken from the bucket before the request runs,
and the request is refused if the bucket contains less. The cost of its images is known only later and is taken when
the request ends (service/costs.py), so a bucket may become negative. A client whose bucket is negative has to wait.

With Redis, all processes share the buckets (service/shared_buckets.py). docs/decisions/0041-rate-limits.md has the
reasons.
"""

import asyncio
import logging
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final

from service.buckets import LocalBuckets, RedisBuckets
from service.clients import Principal, client_of
from service.costs import Cost
from service.errors import RateLimited
from service.redis_guard import RedisGuard
from service.settings import Settings
from service.shared_buckets import SharedBuckets
from service.telemetry import OTHERS, Metrics

log = logging.getLogger(__name__)

MOST_KEYS: Final = 100
"""The highest number of API keys that have their own values of the label `client`."""
REDIS_CONNECTIONS: Final = 8
"""The highest number of connections to Redis. A decision takes a fraction of a millisecond, so they are shared."""
ADDRESSES: Final = "_addresses"  # the value of the label for all clients without a key; not allowed as the id of a key


@dataclass(frozen=True)
class Limit:
    """The limit of a client. A bucket contains at most `burst_pixels` and gains `pixels_per_s`. Each request costs at
    least `request_pixels`."""

    pixels_per_s: int
    burst_pixels: int
    request_pixels: int

    def us(self, pixels: int) -> int:
        """Return the time in microseconds in which a bucket gains this many pixels, rounded up."""
        return -(-pixels * 1_000_000 // self.pixels_per_s)

    @property
    def burst_us(self) -> int:
        """The time in which an empty bucket becomes full."""
        return self.us(self.burst_pixels)


@dataclass(frozen=True)
class Admission:
    """A request that may run. `owed_us` is the time until the bucket of its client is full."""

    client: str
    limit: Limit
    owed_us: int
    cost: Cost

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the RateLimit fields for the answer. They include the cost of the images that are known so far."""
        owed_us = self.owed_us + self.limit.us(self.cost.pixels)
        return [(name.lower().encode(), value.encode()) for name, value in _fields(self.limit, owed_us).items()]


class Limits:
    """The rate limits of this process. It belongs to one event loop.

    Args:
        limit: the limit of each client that has no limit of its own.
        metrics: the metrics of the service.
        redis: the buckets in Redis. If they are None, this process limits its clients alone.
        local: the buckets in the memory of this process. If they are None, new ones are created.
    """

    def __init__(
        self, limit: Limit, metrics: Metrics, redis: RedisBuckets | None = None, local: LocalBuckets | None = None
    ) -> None:
        self._limit = limit
        self._metrics = metrics
        self._local = local or LocalBuckets()
        self._redis = redis
        self._shared = None if redis is None else SharedBuckets(redis, self._local, self._note)
        self._keys = set[str]()  # the API keys that have their own label

    @staticmethod
    def of(settings: Settings, metrics: Metrics) -> "Limits | None":
        """Return the limits that the settings specify, or None if requests are not limited."""
        if settings.rate_pixels_per_s is None:
            return None
        limit = Limit(settings.rate_pixels_per_s, settings.burst_pixels, settings.rate_request_pixels)
        redis = None
        if settings.redis_url is not None:
            guard = RedisGuard(
                settings.redis_url,
                on_event=lambda event: metrics.rate_limit_events.labels(event).inc(),
                max_connections=REDIS_CONNECTIONS,
            )
            redis = RedisBuckets(guard)
        return Limits(limit, metrics, redis)

    async def admit(self, principal: Principal | None, address: str) -> Admission:
        """Decide whether a request may run, and take its fixed cost.

        Args:
            principal: the sender of the request, or None if keys are not used. If it has an attribute `limit` that is
                not None, this `Limit` replaces the default.
            address: the address of the client. It counts if the request has no key.

        Raises:
            RateLimited: the client has used its limit.
        """
        limit: Limit = getattr(principal, "limit", None) or self._limit
        client = client_of(principal, address)
        cost_us, burst_us = limit.us(limit.request_pixels), limit.burst_us
        if self._shared is None:
            decision = self._local.take(client, cost_us, burst_us)
        else:
            decision = await self._shared.take(client, cost_us, burst_us)
        if not decision.admitted:
            self._metrics.rate_limited.labels("rate").inc()
            raise _rate_limited(limit, decision.owed_us)
        return Admission(client, limit, decision.owed_us, Cost(limit.burst_pixels))

    def settle(self, admission: Admission) -> None:
        """Take the cost of a request's images at the end of the request. Do not wait for Redis."""
        if admission.cost.refused:
            self._metrics.rate_limited.labels("cost").inc()
        loop, late = asyncio.get_running_loop(), partial(self._charge_late, admission)

        def charge_late(pixels: int) -> None:  # any thread may call this
            loop.call_soon_threadsafe(late, pixels)

        pixels = admission.cost.settle(charge_late)
        if pixels:
            self._charge(admission, pixels)
        self._count(admission, admission.limit.request_pixels + pixels)

    async def close(self) -> None:
        """Send all costs to Redis, and close the connections."""
        if self._shared is not None:
            await self._shared.close()

    def _charge_late(self, admission: Admission, pixels: int) -> None:
        self._charge(admission, pixels)
        self._count(admission, pixels)

    def _charge(self, admission: Admission, pixels: int) -> None:
        cost_us, burst_us = admission.limit.us(pixels), admission.limit.burst_us
        (self._shared or self._local).charge(admission.client, cost_us, burst_us)

    def _count(self, admission: Admission, pixels: int) -> None:
        self._metrics.rate_limit_pixels.labels(self._label(admission.client)).inc(pixels)

    def _label(self, client: str) -> str:
        kind, _, key = client.partition(":")
        if kind != "key":
            return ADDRESSES
        if len(self._keys) < MOST_KEYS:
            self._keys.add(key)
        return key if key in self._keys else OTHERS

    def _note(self, works: bool) -> None:
        """Log that Redis has failed, or that it works again."""
        assert self._redis is not None
        self._metrics.rate_limit_degraded.set(not works)
        if works:
            log.info("rate limits: Redis answers again, so all processes share the limits")
        else:
            why = "; ".join(self._redis.guard.faults.values())
            log.warning("rate limits: Redis failed, so each process limits its clients alone: %s", why)


def _rate_limited(limit: Limit, owed_us: int) -> RateLimited:
    fields = _fields(limit, owed_us)
    wait_s = _wait_s(limit, owed_us)
    return RateLimited(
        f"the limit of this client is used up ({limit.pixels_per_s} pixels per second, {limit.burst_pixels} at once): "
        f"try again in {wait_s} s",
        headers={"Retry-After": str(wait_s), **fields},
    )


def _wait_s(limit: Limit, owed_us: int) -> int:
    """Return the number of seconds until the next request may run, rounded up. 0 means that it may run now."""
    return max(0, -(-(owed_us + limit.us(limit.request_pixels) - limit.burst_us) // 1_000_000))


def _fields(limit: Limit, owed_us: int) -> dict[str, str]:
    """Return the fields of draft-ietf-httpapi-ratelimit-headers-11. `r` is the content of the bucket, and `t` the time
    in which the client may use only this content: until the next request may run, or until the bucket is full."""
    remaining = max(0, limit.burst_us - owed_us) * limit.pixels_per_s // 1_000_000
    seconds = _wait_s(limit, owed_us) or -(-owed_us // 1_000_000)
    return {"RateLimit-Policy": _policy(limit), "RateLimit": f'"default";r={remaining};t={seconds}'}


@lru_cache(maxsize=MOST_KEYS)
def _policy(limit: Limit) -> str:
    window_s = -(-limit.burst_us // 1_000_000)
    return f'"default";q={limit.burst_pixels};qu="pixels";w={window_s}'
