"""Caches of computed vectors: in this process, or in a Redis server that all replicas share.

A key (`cache_key`) is computed from the image's bytes, the model's fingerprint and the options. Therefore, an entry
never becomes outdated, and a cache can contain entries for several models. The memory cache evicts the least recently
used entries. Redis removes an entry when its time to live (TTL) ends.

A cache may lose entries, but it must never cause a request to fail. `RedisCache` treats every fault as a cache miss.
service/redis_guard.py limits the time of each call, and skips Redis while it is down. A value is stored with its length
and checksum, so a truncated or damaged value is also a cache miss.
"""

import hashlib
import json
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Final, Literal, Protocol

from redis.exceptions import InvalidResponse

from service.redis_guard import RedisEvent, RedisGuard

CacheEvent = RedisEvent | Literal["corrupt"]
"""An event of a cache: an event of its Redis server, or a stored value was invalid ("corrupt")."""

OnEvent = Callable[[CacheEvent], None]

ENTRY_OVERHEAD_BYTES: Final = 330
"""The memory in bytes that an entry of `MemoryCache` uses in addition to its key and its value. It was measured with
tracemalloc. A test repeats the measurement."""

_FORMAT: Final = "v1"  # part of every Redis key, so that each format of values has its own keys
_HEADER: Final = struct.Struct("<4sII")  # magic, length of the value, its CRC-32
_MAGIC: Final = b"dv2\x01"


class Cache(Protocol):
    """The interface of a cache. No method raises an error if the cache is down or full."""

    name: str

    async def get_many(self, keys: list[str]) -> list[bytes | None]:
        """Return the values in the order of the keys, with None for a key that is not in the cache."""

    async def set_many(self, items: dict[str, bytes]) -> None:
        """Store each value under its key. A value that cannot be stored is skipped."""

    async def status(self) -> str:
        """Return "ok", or "degraded: " followed by the reason."""

    async def close(self) -> None: ...


def cache_key(image_sha256: str, fingerprint: str, options: Mapping[str, str | int | float | bool | None]) -> str:
    """Return the cache key of a result. It depends on the sha256 of the image in hex, the fingerprint of the model, and
    `options`, which must contain every option that changes the result. The order of the options does not matter. The
    key begins with the first 8 characters of the fingerprint, so people who inspect Redis can see which model an entry
    belongs to."""
    text = json.dumps([image_sha256, fingerprint, dict(options)], sort_keys=True, separators=(",", ":"))
    return f"{fingerprint[:8]}:{hashlib.sha256(text.encode()).hexdigest()}"


def make_cache(
    redis_url: str | None, *, max_bytes: int, ttl_s: int, on_event: OnEvent = lambda event: None
) -> "MemoryCache | RedisCache":
    """Return a cache in Redis if `redis_url` is not None, and a cache in the memory of this process otherwise. If
    `max_bytes` is 0, the cache in memory stores nothing."""
    return MemoryCache(max_bytes) if redis_url is None else RedisCache(redis_url, ttl_s=ttl_s, on_event=on_event)


class MemoryCache:
    """A cache in the memory of this process that evicts the least recently used entries. `max_bytes` limits its memory,
    including the overhead per entry. The cache belongs to one event loop. Its methods await nothing, so each call is
    atomic.

    An entry that exceeds `max_bytes` on its own is not stored, and no other entry is evicted for it.
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
        url: an address that begins with redis://, rediss:// or unix://. It includes the password if there is one.
        ttl_s: how long Redis stores a value, in seconds.
        on_event: a function that is called with each event, for example to count it.
        timeout_s: the time limit of one call in seconds, including the time to connect.
        retry_s, max_retry_s: the first and the longest interval in seconds between attempts while Redis is down. The
            interval doubles after each failure.

    Raises:
        ValueError: the URL or `ttl_s` is invalid. The message does not show the password.
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
        self._ttl_s, self._on_event = ttl_s, on_event
        self._guard = RedisGuard(
            url,
            on_event=on_event,
            timeout_s=timeout_s,
            retry_s=retry_s,
            max_retry_s=max_retry_s,
            max_connections=max_connections,
        )

    async def get_many(self, keys: list[str]) -> list[bytes | None]:
        if not keys:
            return []
        framed = await self._guard.call("get", lambda: self._mget([self._prefix + key for key in keys]))
        return [None] * len(keys) if framed is None else [self._unframe(value) for value in framed]

    async def set_many(self, items: dict[str, bytes]) -> None:
        if items:
            await self._guard.call("set", lambda: self._set(items))

    async def status(self) -> str:
        """Read a value from Redis and return the status: "ok", or "degraded: " followed by the reasons. The read
        detects that Redis has failed or recovered even if the service has no traffic. A PING is not enough, because a
        Redis server that answers PING may still refuse reads."""
        await self.get_many(["status"])
        if not self._guard.faults:
            return "ok"
        return "degraded: redis: " + "; ".join(f"{call}: {why}" for call, why in sorted(self._guard.faults.items()))

    async def close(self) -> None:
        await self._guard.close()

    async def _mget(self, keys: list[str]) -> list[bytes | None]:
        values = await self._guard.redis.mget(keys)
        if not isinstance(values, list) or len(values) != len(keys):
            raise InvalidResponse("the answer to MGET is not a list of one value for each key")
        strings = [value for value in values if value is None or isinstance(value, bytes)]
        if len(strings) != len(keys):
            raise InvalidResponse("the answer to MGET contains values that are not strings")
        return strings

    async def _set(self, items: dict[str, bytes]) -> bool:
        async with self._guard.redis.pipeline(transaction=False) as pipeline:
            for key, value in items.items():
                pipeline.set(self._prefix + key, frame(value), ex=self._ttl_s)
            await pipeline.execute()
        return True

    def _unframe(self, framed: bytes | None) -> bytes | None:
        if framed is None:
            return None
        value = unframe(framed)
        if value is None:
            self._on_event("corrupt")
        return value


def frame(value: bytes) -> bytes:
    """Return `value` with a header in front of it. The header contains a magic number, the length of the value, and its
    CRC-32."""
    return _HEADER.pack(_MAGIC, len(value), zlib.crc32(value)) + value


def unframe(framed: bytes) -> bytes | None:
    """Extract the value from bytes that `frame` returned. Return None if the header is invalid or does not match the
    value."""
    if len(framed) < _HEADER.size:
        return None
    magic, length, checksum = _HEADER.unpack_from(framed)
    value = framed[_HEADER.size :]
    if magic != _MAGIC or len(value) != length or zlib.crc32(value) != checksum:
        return None
    return value
