"""Caches of computed vectors: in this process, or in a Redis that all replicas share.

Only `cache_key` makes keys: from the image's bytes, the model's fingerprint and the options. So an entry never becomes
stale, entries of several models coexist, and nothing is ever invalidated. The memory cache evicts the least recently
used entries; Redis removes the oldest by TTL.

A cache may lose entries, but it must never fail a request. `RedisCache` turns every fault into misses. Each call has a
hard time limit, and after a fault a circuit breaker makes the following calls skip Redis without waiting. While the
breaker is open, one call at a time may probe Redis, at growing intervals. The first success closes the breaker, so a
recovered Redis is used again automatically. Values carry their length and checksum, so a truncated, corrupted or
foreign value is a miss too.
"""

import asyncio
import hashlib
import json
import struct
import time
import zlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Literal, Protocol, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, InvalidResponse, RedisError, ResponseError

CacheEvent = Literal["error", "skipped", "corrupt", "recovered"]
"""error: a call failed. skipped: the breaker was open. corrupt: a value was invalid. recovered: the breaker closed."""

OnEvent = Callable[[CacheEvent], None]
T = TypeVar("T")

ENTRY_OVERHEAD_BYTES: Final = 330
"""Memory of an entry of `MemoryCache` besides its key's text and its value: object headers and slots of the ordered
dictionary. Measured with tracemalloc; a test repeats the measurement."""

_FORMAT: Final = "v1"  # part of every Redis key, so another value format never reads these values
_HEADER: Final = struct.Struct("<4sII")  # magic, length of the value, its CRC-32
_MAGIC: Final = b"dv2\x01"


class Cache(Protocol):
    """The cache that the pipeline needs. No method raises if the cache is down or full."""

    name: str

    async def get_many(self, keys: list[str]) -> list[bytes | None]:
        """Return the values in the order of the keys, None for a miss."""

    async def set_many(self, items: dict[str, bytes]) -> None:
        """Store the items as far as possible."""

    async def status(self) -> str:
        """Return 'ok', or 'degraded: ' and the reason."""

    async def close(self) -> None: ...


def cache_key(image_sha256: str, fingerprint: str, options: Mapping[str, str | int | float | bool | None]) -> str:
    """Return the key of a result: from the bytes' sha256 (hex), the model's fingerprint, and every option that changes
    the vector, in any order. The first 8 characters of the fingerprint stay readable for people who inspect Redis."""
    text = json.dumps([image_sha256, fingerprint, dict(options)], sort_keys=True, separators=(",", ":"))
    return f"{fingerprint[:8]}:{hashlib.sha256(text.encode()).hexdigest()}"


def make_cache(
    redis_url: str | None, *, max_bytes: int, ttl_s: int, on_event: OnEvent = lambda event: None
) -> "MemoryCache | RedisCache":
    """Make the cache that the settings name: Redis if there is a URL, else this process's memory (0 bytes: no
    cache)."""
    return MemoryCache(max_bytes) if redis_url is None else RedisCache(redis_url, ttl_s=ttl_s, on_event=on_event)


class MemoryCache:
    """An LRU cache with a budget in bytes, including overhead. It belongs to one event loop: no method awaits, so each
    is atomic there.

    A value that alone exceeds the budget is not stored and evicts nothing.
    """

    name = "memory"

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes} must be at least 0")
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[str, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    async def get_many(self, keys: list[str]) -> list[bytes | None]:
        values = []
        for key in keys:
            value = self._entries.get(key)
            if value is not None:
                self._entries.move_to_end(key)
            values.append(value)
        return values

    async def set_many(self, items: dict[str, bytes]) -> None:
        for key, value in items.items():
            old = self._entries.pop(key, None)
            if old is not None:
                self.used_bytes -= _entry_bytes(key, old)
            size = _entry_bytes(key, value)
            if size > self.max_bytes:
                continue
            self._entries[key] = value
            self.used_bytes += size
            while self.used_bytes > self.max_bytes:
                self.used_bytes -= _entry_bytes(*self._entries.popitem(last=False))

    async def status(self) -> str:
        return "ok"

    async def close(self) -> None:
        self._entries.clear()
        self.used_bytes = 0


def _entry_bytes(key: str, value: bytes) -> int:
    return len(key) + len(value) + ENTRY_OVERHEAD_BYTES


class RedisCache:
    """A cache in Redis, shared by all replicas that use the same URL and prefix.

    Args:
        url: redis://, rediss:// or unix://, with the password if there is one. It is never shown.
        ttl_s: seconds that Redis keeps a value.
        on_event: called for the metrics.
        timeout_s: time limit of one call, including the connection.
        retry_s, max_retry_s: first and longest interval between probes while Redis is down. The interval doubles.

    Raises:
        ValueError: the URL or a number is invalid. The message does not show the password.
    """

    name = "redis"

    def __init__(
        self,
        url: str,
        *,
        ttl_s: int,
        on_event: OnEvent = lambda event: None,
        prefix: str = "dinov2",
        timeout_s: float = 0.25,
        retry_s: float = 0.5,
        max_retry_s: float = 5.0,
        max_connections: int = 32,
    ) -> None:
        if ttl_s < 1:
            raise ValueError(f"ttl_s={ttl_s} must be at least 1")
        self._prefix = f"{prefix}:{_FORMAT}:"
        self._ttl_s, self._timeout_s, self._on_event = ttl_s, timeout_s, on_event
        self._breaker = _Breaker(retry_s, max_retry_s)
        self._faults: dict[str, str] = {}  # call -> why it failed last
        self._redis = _client(url, timeout_s, max_connections)

    async def get_many(self, keys: list[str]) -> list[bytes | None]:
        if not keys:
            return []
        framed = await self._guarded("get", lambda: self._mget([self._prefix + key for key in keys]))
        return [None] * len(keys) if framed is None else [self._unframe(value) for value in framed]

    async def set_many(self, items: dict[str, bytes]) -> None:
        if items:
            await self._guarded("set", lambda: self._set(items))

    async def status(self) -> str:
        """Query Redis, so that a service without traffic also notices faults and recoveries. The query is a read,
        because a Redis that answers PING may still refuse reads."""
        await self.get_many(["status"])
        if not self._faults:
            return "ok"
        return "degraded: redis: " + "; ".join(f"{call}: {why}" for call, why in sorted(self._faults.items()))

    async def close(self) -> None:
        await self._redis.aclose(close_connection_pool=True)

    async def _mget(self, keys: list[str]) -> list[bytes | None]:
        values = await self._redis.mget(keys)
        if not isinstance(values, list) or len(values) != len(keys):
            raise InvalidResponse("the answer to MGET is not a list of one value for each key")
        strings = [value for value in values if value is None or isinstance(value, bytes)]
        if len(strings) != len(keys):
            raise InvalidResponse("the answer to MGET contains values that are not strings")
        return strings

    async def _set(self, items: dict[str, bytes]) -> bool:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for key, value in items.items():
                pipeline.set(self._prefix + key, frame(value), ex=self._ttl_s)
            await pipeline.execute()
        return True

    async def _guarded(self, call: str, action: Callable[[], Awaitable[T]]) -> T | None:
        """Run a call within the time limit. On a fault return None and emit an event."""
        if not self._breaker.try_enter():
            self._on_event("skipped")
            return None
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await action()
        except (RedisError, OSError, TimeoutError, ValueError) as error:  # ValueError: the server does not speak Redis
            self._failed(call, error)
            return None
        except BaseException:  # the caller was cancelled, not Redis' fault; end a probe
            self._breaker.abandon()
            raise
        if self._breaker.succeed():
            self._faults.clear()
            self._on_event("recovered")
        self._faults.pop(call, None)
        return result

    def _failed(self, call: str, error: Exception) -> None:
        self._on_event("error")
        words = str(error).split("\n", 1)[0][:120] or f"no answer within {self._timeout_s:g} s"
        self._faults[call] = f"{type(error).__name__}: {words}"
        refused = isinstance(error, ResponseError) and not isinstance(error, AuthenticationError | AuthorizationError)
        if refused and not str(error).startswith(("NOAUTH", "WRONGPASS")):
            self._breaker.abandon()  # Redis answers (e.g. out of memory for writes): reads may continue
        else:
            self._breaker.fail()

    def _unframe(self, framed: bytes | None) -> bytes | None:
        if framed is None:
            return None
        value = unframe(framed)
        if value is None:
            self._on_event("corrupt")
        return value


class _Breaker:
    """A circuit breaker. Closed: every call enters. Open: one probe at a time enters, after each interval."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s, self._longest_s = first_s, longest_s
        self._interval_s = 0.0  # 0: closed
        self._next_probe = 0.0
        self._probing = False

    def try_enter(self) -> bool:
        if not self._interval_s:
            return True
        if self._probing or time.monotonic() < self._next_probe:
            return False
        self._probing = True
        return True

    def succeed(self) -> bool:
        """Close the breaker. Return whether it was open."""
        was_open = bool(self._interval_s)
        self._interval_s, self._probing = 0.0, False
        return was_open

    def fail(self) -> None:
        if self._probing or not self._interval_s:  # calls that started before it opened do not lengthen it
            self._interval_s = min(self._longest_s, max(self._first_s, 2 * self._interval_s))
            self._next_probe = time.monotonic() + self._interval_s
        self._probing = False

    def abandon(self) -> None:
        self._probing = False


def _client(url: str, timeout_s: float, max_connections: int) -> Redis:
    """Make a pooled client without retries, because the breaker handles them."""
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
    except (ValueError, TypeError):
        # urllib's messages quote parts of the URL, and a part may belong to the password
        scheme = url.split("://", 1)[0] if "://" in url else "?"
        raise ValueError(
            f"the Redis URL (scheme {scheme!r}) is not valid: the form is redis://[:password@]host:port/db; "
            "percent-encode special characters of the password"
        ) from None
    return Redis.from_pool(pool)  # closed with the client


def frame(value: bytes) -> bytes:
    """Prefix a value with magic, length and CRC-32."""
    return _HEADER.pack(_MAGIC, len(value), zlib.crc32(value)) + value


def unframe(framed: bytes) -> bytes | None:
    """Return the value, or None if `frame` did not make these bytes."""
    if len(framed) < _HEADER.size:
        return None
    magic, length, checksum = _HEADER.unpack_from(framed)
    value = framed[_HEADER.size :]
    if magic != _MAGIC or len(value) != length or zlib.crc32(value) != checksum:
        return None
    return value
