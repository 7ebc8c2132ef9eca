"""Calls to a Redis server that may fail at any time: a time limit for each call, and a circuit breaker.

The cache (service/features/cache.py) and the rate limits (service/limits.py) use this module. Both can do without
Redis, so a fault must neither fail a request nor delay each one. After a fault, the circuit breaker opens, and the
following calls are skipped without waiting. While the breaker is open, one call is sent to Redis from time to time, at
increasing intervals. When such a call succeeds, the breaker closes and Redis is used again.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, RedisError, ResponseError

RedisEvent = Literal["error", "skipped", "recovered"]
"""An event of a guard: a call failed ("error"), a call was not made because the circuit breaker was open ("skipped"),
or the circuit breaker closed ("recovered")."""

T = TypeVar("T")


class RedisGuard:
    """A Redis client whose calls return None instead of raising an error.

    Args:
        url: an address that begins with redis://, rediss:// or unix://. It includes the password if there is one.
        on_event: a function that is called with each event, for example to count it.
        timeout_s: the time limit of one call in seconds, including the time to connect.
        retry_s, max_retry_s: the first and the longest interval in seconds between attempts while Redis is down. The
            interval doubles after each failure.
        max_connections: the highest number of connections.

    Raises:
        ValueError: the URL is invalid. The message does not show the password.
    """

    def __init__(
        self,
        url: str,
        *,
        on_event: Callable[[RedisEvent], None] = lambda event: None,
        timeout_s: float = 0.25,
        retry_s: float = 0.5,
        max_retry_s: float = 5.0,
        max_connections: int = 32,
    ) -> None:
        self.redis = _client(url, timeout_s, max_connections)
        self.faults: dict[str, str] = {}  # call -> reason of its last failure
        self._timeout_s, self._on_event = timeout_s, on_event
        self._breaker = Breaker(retry_s, max_retry_s)

    async def call(self, name: str, action: Callable[[], Awaitable[T]]) -> T | None:
        """Run `action` within the time limit and return its result. If the action fails or the circuit breaker is open,
        report an event and return None. `name` is the key of the call's fault in `faults`."""
        if not self._breaker.try_enter():
            self._on_event("skipped")
            return None
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await action()
        except (RedisError, OSError, TimeoutError, ValueError) as error:  # ValueError: this is no Redis server
            self._failed(name, error)
            return None
        except BaseException:  # the caller was cancelled, which is no fault of Redis
            self._breaker.abandon()
            raise
        if self._breaker.succeed():
            self.faults.clear()
            self._on_event("recovered")
        self.faults.pop(name, None)
        return result

    async def close(self) -> None:
        await self.redis.aclose(close_connection_pool=True)

    def _failed(self, name: str, error: Exception) -> None:
        self._on_event("error")
        words = str(error).split("\n", 1)[0][:120] or f"no answer within {self._timeout_s:g} s"
        self.faults[name] = f"{type(error).__name__}: {words}"
        refused = isinstance(error, ResponseError) and not isinstance(error, AuthenticationError | AuthorizationError)
        if refused and not str(error).startswith(("NOAUTH", "WRONGPASS")):
            self._breaker.abandon()  # Redis works but refused this call, for instance a write when it is out of memory
        else:
            self._breaker.fail()


class Breaker:
    """A circuit breaker for calls to Redis. While it is closed, every call may be made. While it is open, one call may
    be made after each interval, to check whether Redis works again."""

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
        """Close the breaker. Return True if it was open."""
        was_open = bool(self._interval_s)
        self._interval_s, self._probing = 0.0, False
        return was_open

    def fail(self) -> None:
        if self._probing or not self._interval_s:  # calls that began before the breaker opened do not count
            self._interval_s = min(self._longest_s, max(self._first_s, 2 * self._interval_s))
            self._next_probe = time.monotonic() + self._interval_s
        self._probing = False

    def abandon(self) -> None:
        self._probing = False


def _client(url: str, timeout_s: float, max_connections: int) -> Redis:
    """Return a Redis client with a connection pool. The client does not retry failed calls, because the circuit breaker
    determines when Redis is tried again."""
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
    return Redis.from_pool(pool)  # the client closes the pool
