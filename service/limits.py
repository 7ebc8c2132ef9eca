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
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Final, NamedTuple

from prometheus_client import Counter

from service.buckets import LocalBuckets, RedisBuckets
from service.clients import Principal, client_name
from service.costs import Cost
from service.errors import RateLimited
from service.redis_guard import RedisGuard
from service.settings import Settings
from service.shared_buckets import SharedBuckets
from service.telemetry import OTHERS, Metrics

log = logging.getLogger(__name__)

MOST_KEYS: Final = 100
"""The highest number of API keys that have their own values of the label `client`."""
MOST_CLIENTS: Final = 4096
"""The highest number of clients whose `_Client` is kept. Others get a new one for each request."""
REDIS_CONNECTIONS: Final = 8
"""The highest number of connections to Redis. A decision takes a fraction of a millisecond, so they are shared."""
ADDRESSES: Final = "_addresses"  # the value of the label for all clients without a key; not allowed as the id of a key


@dataclass(frozen=True)
class Limit:
    """The limit of each client. A bucket contains at most `burst_pixels` and gains `pixels_per_s`. Each request costs
    at least `request_pixels`."""

    pixels_per_s: int
    burst_pixels: int
    request_pixels: int

    def us(self, pixels: int) -> int:
        """Return the time in microseconds in which a bucket gains this many pixels, rounded up."""
        return -(-pixels * 1_000_000 // self.pixels_per_s)

    @cached_property
    def burst_us(self) -> int:
        """The time in which an empty bucket becomes full."""
        return self.us(self.burst_pixels)

    @cached_property
    def request_us(self) -> int:
        """The fixed cost of a request."""
        return self.us(self.request_pixels)

    @cached_property
    def policy(self) -> tuple[bytes, bytes]:
        """The field RateLimit-Policy."""
        window_s = -(-self.burst_us // 1_000_000)
        return b"ratelimit-policy", b'"default";q=%d;qu="pixels";w=%d' % (self.burst_pixels, window_s)

    def fields(self, owed_us: int) -> list[tuple[bytes, bytes]]:
        """Return the fields of draft-ietf-httpapi-ratelimit-headers-11. `r` is the content of the bucket, and `t` the
        time in which the client may use only this content: until the next request may run, or until the bucket is
        full."""
        left_us = self.burst_us - owed_us
        wait_us = owed_us if left_us >= self.request_us else self.request_us - left_us
        remaining = left_us * self.pixels_per_s // 1_000_000 if left_us > 0 else 0
        value = b'"default";r=%d;t=%d' % (remaining, -(-wait_us // 1_000_000))
        return [self.policy, (b"ratelimit", value)]


class _Client(NamedTuple):
    """A client: the name of its bucket, the counter of its pixels, and a function that charges pixels after the end of
    their request. Any thread may call this function."""

    name: str
    counter: Counter
    charge_late: Callable[[int], object]


@dataclass(slots=True)
class Admission:
    """A request that may run. `owed_us` is the time until the bucket of its client is full."""

    client: _Client
    limit: Limit
    owed_us: int
    cost: Cost

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the RateLimit fields for the answer. They include the cost of the images that are known so far."""
        pixels = self.cost.pixels
        return self.limit.fields(self.owed_us + self.limit.us(pixels) if pixels else self.owed_us)


class Limits:
    """The rate limits of this process. It belongs to one event loop.

    Args:
        limit: the limit of each client.
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
        self._client = lru_cache(MOST_CLIENTS)(self._new_client)

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
        key_id = None if principal is None else principal.key_id
        client = self._client(None, address) if key_id is None else self._client(key_id, "")
        limit = self._limit
        if self._shared is None:
            admitted, owed_us = self._local.take(client.name, limit.request_us, limit.burst_us)
        else:
            admitted, owed_us = await self._shared.take(client.name, limit.request_us, limit.burst_us)
        if not admitted:
            self._metrics.rate_limited.labels("rate").inc()
            raise _rate_limited(limit, owed_us)
        return Admission(client, limit, owed_us, Cost(limit.burst_pixels, client.charge_late))

    def settle(self, admission: Admission) -> None:
        """Take the cost of a request's images at the end of the request. Do not wait for Redis."""
        pixels = admission.cost.settle()
        if pixels:
            self._charge(admission.client.name, pixels)
        if admission.cost.refused:
            self._metrics.rate_limited.labels("cost").inc()
        admission.client.counter.inc(self._limit.request_pixels + pixels)

    async def close(self) -> None:
        """Send all costs to Redis, and close the connections."""
        if self._shared is not None:
            await self._shared.close()

    def _charge(self, name: str, pixels: int) -> None:
        (self._shared or self._local).charge(name, self._limit.us(pixels), self._limit.burst_us)

    def _charge_late(self, name: str, counter: Counter, pixels: int) -> None:
        self._charge(name, pixels)
        counter.inc(pixels)

    def _new_client(self, key_id: str | None, address: str) -> _Client:
        name = client_name(key_id, address)
        counter = self._metrics.rate_limit_pixels.labels(self._label(key_id))
        late = partial(self._charge_late, name, counter)
        return _Client(name, counter, partial(asyncio.get_running_loop().call_soon_threadsafe, late))

    def _label(self, key_id: str | None) -> str:
        if key_id is None:
            return ADDRESSES
        if len(self._keys) < MOST_KEYS:
            self._keys.add(key_id)
        return key_id if key_id in self._keys else OTHERS

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
    fields = {name.decode(): value.decode() for name, value in limit.fields(owed_us)}
    wait_s = -(-(owed_us + limit.request_us - limit.burst_us) // 1_000_000)
    return RateLimited(
        f"the limit of this client is used up ({limit.pixels_per_s} pixels per second, {limit.burst_pixels} at once): "
        f"try again in {wait_s} s",
        headers={"Retry-After": str(wait_s), **fields},
    )
