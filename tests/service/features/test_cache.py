"""Tests of both caches. Redis is a real server here. If it dies, hangs, sends wrong data or recovers, requests only
miss the cache.
"""

import asyncio
import itertools
import logging
import random
import signal
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from redis.exceptions import AuthenticationError, AuthorizationError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from service import redis_guard
from service.features.cache import MemoryCache, RedisCache, cache_key, frame, make_cache, unframe

# ---- keys


def test_a_key_changes_with_everything_that_changes_the_vector() -> None:
    options = {"pooling": "cls", "normalize": True, "size": 224}
    base = cache_key("a" * 64, "f" * 64, options)
    assert base == cache_key("a" * 64, "f" * 64, dict(reversed(options.items())))
    others = [
        cache_key("b" * 64, "f" * 64, options),
        cache_key("a" * 64, "e" * 64, options),
        cache_key("a" * 64, "f" * 8 + "0" * 56, options),  # the readable part is the same
        *(cache_key("a" * 64, "f" * 64, {**options, name: 1}) for name in ("pooling", "size", "more")),
        cache_key("a" * 64, "f" * 64, {**options, "normalize": False}),
        cache_key("a" * 64, "f" * 64, {}),
    ]
    assert len({base, *others}) == len(others) + 1
    assert base.startswith("ffffffff:")


# ---- memory


async def test_memory_keeps_the_lately_used_within_its_budget() -> None:
    entry = 2 + 100 + 330
    cache = MemoryCache(3 * entry)
    await cache.set_many({f"k{n}": bytes([n]) * 100 for n in range(3)})
    assert await cache.get_many(["k0", "none", "k2"]) == [b"\0" * 100, None, b"\2" * 100]
    await cache.set_many({"k3": b"3" * 100})  # k1 was used longest ago
    assert [value is not None for value in await cache.get_many(["k0", "k1", "k2", "k3"])] == [True, False, True, True]
    assert cache.used_bytes == 3 * entry
    await cache.set_many({"k0": b"short"})
    assert (await cache.get_many(["k0"])) == [b"short"]
    assert cache.used_bytes == 3 * entry - 95
    await cache.set_many({"big": bytes(4 * entry)})
    assert await cache.get_many(["big", "k3"]) == [None, b"3" * 100]
    await cache.close()
    assert (len(cache), cache.used_bytes) == (0, 0)


async def test_a_value_that_fills_the_budget_is_kept() -> None:
    for size, kept in ((100, True), (101, False)):
        cache = MemoryCache(2 + 100 + 330)
        await cache.set_many({"k0": bytes(size)})
        assert (await cache.get_many(["k0"]))[0] == (bytes(size) if kept else None)


async def test_an_entry_may_fill_the_budget_and_a_larger_one_drives_out_nothing() -> None:
    cache = MemoryCache(2 * (1 + 100 + 330))
    await cache.set_many({"a": bytes(100)})
    await cache.set_many({"b": bytes(2 * 431)})
    assert await cache.get_many(["a", "b"]) == [bytes(100), None]
    await cache.set_many({"b": bytes(2 * 431 - 331)})
    assert await cache.get_many(["a", "b"]) == [None, bytes(2 * 431 - 331)]
    assert cache.used_bytes == cache.max_bytes


async def test_memory_budget_is_real_memory() -> None:
    """The test adds ten times more data than fits. The memory that Python allocates must be close to the budget,
    neither above nor far below.
    """
    budget = 2 * 2**20
    rng = random.Random(1)
    tracemalloc.start()
    cache = MemoryCache(budget)
    for n in range(20_000):
        await cache.set_many({cache_key(f"{n}", "f", {}): rng.randbytes(768)})
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 0.7 * budget < taken < 1.05 * budget
    assert cache.used_bytes <= budget


async def test_no_budget_keeps_nothing() -> None:
    cache = make_cache(None, max_bytes=0, ttl_s=1)
    await cache.set_many({"k": b"v"})
    assert await cache.get_many(["k"]) == [None]
    assert (cache.name, await cache.status()) == ("memory", "ok")
    with pytest.raises(ValueError, match="max_bytes=-1"):
        MemoryCache(-1)


# ---- Redis


class Clock:
    """A replacement for the module `time` in the cache."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("service.redis_guard.time", made)
    return made


async def fails(error: Exception) -> None:
    raise error


async def works() -> int:
    return 1


async def test_probes_come_at_growing_intervals(clock: Clock) -> None:
    events: list[str] = []
    cache = RedisCache("redis://localhost", ttl_s=1, on_event=events.append, retry_s=0.5, max_retry_s=5)
    probes = []
    while len(probes) < 7:
        events.clear()
        await cache._guard.call("get", lambda: fails(OSError("away")))
        if events == ["error"]:
            probes.append(clock.now)
        clock.now += 0.25
    assert [b - a for a, b in itertools.pairwise(probes)] == [0.5, 1, 2, 4, 5, 5]
    clock.now += 5
    assert await cache._guard.call("get", works) == 1
    assert events[-1] == "recovered"
    assert await cache._guard.call("get", works) == 1  # closed again
    await cache._guard.call("get", lambda: fails(OSError("away")))
    events.clear()
    clock.now += 0.5  # the first interval again
    assert await cache._guard.call("get", works) == 1
    assert events == ["recovered"]
    await cache.close()


async def test_calls_that_were_under_way_do_not_lengthen_the_interval(clock: Clock) -> None:
    events: list[str] = []
    cache = RedisCache("redis://localhost", ttl_s=1, on_event=events.append, retry_s=0.5, max_retry_s=5)
    gate = asyncio.Event()

    async def under_way() -> None:
        await gate.wait()
        raise OSError("away")

    calls = [asyncio.create_task(cache._guard.call("get", under_way)) for _ in range(10)]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*calls)
    assert events == ["error"] * 10
    clock.now += 0.5
    assert await cache._guard.call("get", works) == 1
    await cache.close()


async def test_a_recovery_clears_every_fault(clock: Clock) -> None:
    """It also clears faults of calls that are not repeated."""
    cache = RedisCache("redis://localhost", ttl_s=1, retry_s=0.5, max_retry_s=5)
    for call in ("get", "set"):
        await cache._guard.call(call, lambda: fails(OSError("away")))
        clock.now += 5
    assert sorted(cache._guard.faults) == ["get", "set"]
    await cache._guard.call("get", works)
    assert cache._guard.faults == {}
    await cache.close()


@pytest.mark.parametrize(
    ("error", "opens"),
    [
        (ResponseError("OOM command not allowed"), False),
        (ResponseError("NOAUTH Authentication required."), True),
        (ResponseError("WRONGPASS invalid username-password pair"), True),
        (AuthenticationError("invalid password"), True),
        (AuthorizationError("no permission"), True),
        (RedisConnectionError("away"), True),
        (TimeoutError(), True),
    ],
)
async def test_which_faults_stop_the_next_call(error: Exception, opens: bool, clock: Clock) -> None:
    """A server that refuses one command may accept others. A server that rejects our password refuses all commands."""
    events: list[str] = []
    cache = RedisCache("redis://localhost", ttl_s=1, on_event=events.append)
    await cache._guard.call("set", lambda: fails(error))
    assert await cache._guard.call("get", works) == (None if opens else 1)
    assert events == (["error", "skipped"] if opens else ["error"])
    await cache.close()


async def test_a_call_is_tried_once() -> None:
    """The circuit breaker decides when to retry, not the Redis client."""
    tries = 0

    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tries
        tries += 1
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with Probe(f"redis://127.0.0.1:{port}") as probe:
        assert await probe.cache.get_many(["k"]) == [None]
        assert probe.events == ["error"]
    assert tries == 1
    server.close()


async def test_a_closed_cache_leaves_no_connection(redis_server) -> None:
    async with Probe(redis_server.url) as probe:
        await probe.cache.set_many({"k": b"v"})
        await asyncio.gather(*(probe.cache.get_many(["k"]) for _ in range(3)))
        client = redis_server.client()
        assert len(client.client_list()) > 1
    deadline = time.monotonic() + 5
    while len(client.client_list()) > 1:  # one is that of `client`
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


class Probe:
    """A RedisCache that records its events and retries quickly."""

    def __init__(self, url: str, **options: float) -> None:
        self.events: list[str] = []
        settings = {"ttl_s": 60, "timeout_s": 0.3, "retry_s": 0.1, "max_retry_s": 0.3, **options}
        self.cache = RedisCache(url, on_event=self.events.append, **settings)

    async def __aenter__(self) -> "Probe":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.cache.close()

    async def eventually(self, key: str, value: bytes, within_s: float = 5) -> None:
        """Use the cache as the service does until it works again."""
        deadline = time.monotonic() + within_s
        while await self.cache.get_many([key]) != [value]:
            assert time.monotonic() < deadline, self.events
            await self.cache.set_many({key: value})
            await asyncio.sleep(0.05)


async def test_two_clients_share(redis_server) -> None:
    async with Probe(redis_server.url) as one, Probe(redis_server.url) as two:
        values = {f"k{n}": bytes([n]) * n for n in range(50)}  # an empty value too
        await one.cache.set_many(values)
        keys = [*values, "none"]
        assert await two.cache.get_many(keys) == [*values.values(), None]
        assert await two.cache.get_many([]) == []
        await two.cache.set_many({})
        assert await two.cache.status() == "ok"
        assert one.events == two.events == []


async def test_a_closed_cache_has_no_connection_left(redis_server) -> None:
    client = redis_server.client()
    async with Probe(redis_server.url) as probe:
        await asyncio.gather(*(probe.cache.get_many(["k"]) for _ in range(4)))
        assert client.info("clients")["connected_clients"] > 1
    for _ in range(100):  # the server learns of it a moment later
        if client.info("clients")["connected_clients"] == 1:
            break
        await asyncio.sleep(0.02)
    assert client.info("clients")["connected_clients"] == 1
    client.close()


async def test_entries_expire(redis_server) -> None:
    async with Probe(redis_server.url, ttl_s=1) as probe:
        await probe.cache.set_many({"k": b"v"})
        assert await probe.cache.get_many(["k"]) == [b"v"]
        await asyncio.sleep(1.2)
        assert await probe.cache.get_many(["k"]) == [None]


async def test_foreign_and_damaged_values_are_misses(redis_server) -> None:
    async with Probe(redis_server.url) as probe:
        await probe.cache.set_many({f"k{n}": b"value" for n in range(6)})
        client = redis_server.client()
        [full] = [key for key in client.keys("*") if key.endswith(b":k0")]
        assert full.startswith(b"dinov2:v1:")
        name = full[:-1].decode()
        whole = client.get(name + "0")
        client.set(name + "1", b"foreign")
        client.set(name + "2", whole[:-1])
        client.set(name + "3", whole + b"!")
        client.set(name + "4", whole[:-1] + b"E")
        client.delete(name + "5")
        client.lpush(name + "5", "a list")
        assert await probe.cache.get_many([f"k{n}" for n in range(6)]) == [b"value"] + [None] * 5
        assert probe.events == ["corrupt"] * 4
        assert await probe.cache.status() == "ok"


def test_frames_are_recognised() -> None:
    for value in (b"", b"x", bytes(5000)):
        assert unframe(frame(value)) == value
        for wrong in (frame(value)[:-1], frame(value) + b"x", b"X" + frame(value)[1:], b""):
            assert unframe(wrong) is None


async def test_killed_redis_costs_misses_then_is_used_again(redis_server) -> None:
    async with Probe(redis_server.url) as probe:
        await probe.cache.set_many({"k": b"v"})
        redis_server.kill()
        started = time.monotonic()
        for _ in range(200):
            assert await probe.cache.get_many(["k", "l"]) == [None, None]
            await probe.cache.set_many({"l": b"w"})
        assert time.monotonic() - started < 4  # 400 calls; the breaker lets few of them try
        assert probe.events.count("error") < 20
        assert "skipped" in probe.events
        status = await probe.cache.status()
        assert status.startswith("degraded: redis: ")
        assert redis_server.password not in status
        redis_server.start()
        await probe.eventually("l", b"w")
        assert await probe.cache.get_many(["k"]) == [b"v"]  # the append-only file kept it
        assert probe.events[-1] == "recovered"
        assert await probe.cache.status() == "ok"


async def test_status_alone_notices_fault_and_recovery(redis_server) -> None:
    async with Probe(redis_server.url) as probe:
        assert await probe.cache.status() == "ok"
        redis_server.kill()
        assert "ConnectionError" in await probe.cache.status()
        redis_server.start()
        await asyncio.sleep(0.35)
        assert await probe.cache.status() == "ok"


def test_probes_are_rarer_each_time_up_to_a_limit(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(redis_guard.time, "monotonic", lambda: now[0])
    breaker = redis_guard.Breaker(0.5, 3.0)
    assert breaker.try_enter()
    for _ in range(4):  # calls that were under way together lengthen nothing
        breaker.fail()
    waits = []
    for _ in range(5):
        started = now[0]
        while not breaker.try_enter():
            now[0] += 0.125
        waits.append(now[0] - started)
        breaker.fail()
    assert waits == [0.5, 1.0, 2.0, 3.0, 3.0]
    now[0] += 3
    assert breaker.try_enter()
    assert breaker.succeed()
    assert breaker.try_enter()


async def test_a_recovery_ends_every_fault() -> None:
    events: list[str] = []
    found = RedisCache("redis://127.0.0.1:1", ttl_s=1, on_event=events.append, retry_s=0.001)
    both = [found.get_many(["k"]), found.set_many({"k": b"v"})]  # begun before either fails
    await asyncio.gather(*both)
    assert {"get", "set"} <= set(found._guard.faults)

    async def answer(keys: list[str]) -> list[bytes | None]:
        return [None] * len(keys)

    found._mget = answer
    await asyncio.sleep(0.005)
    assert await found.status() == "ok"
    assert events[-1] == "recovered"
    await found.close()


async def test_hung_redis_costs_bounded_time(redis_server) -> None:
    """After SIGSTOP, connections stay open and the kernel accepts new ones, but the server does not answer."""
    async with Probe(redis_server.url) as probe:
        await probe.cache.set_many({"k": b"v"})
        redis_server.signal(signal.SIGSTOP)
        started = time.monotonic()
        answers = await asyncio.gather(*(probe.cache.get_many(["k"]) for _ in range(64)))
        assert answers == [[None]] * 64
        assert time.monotonic() - started < 3  # one time limit for all, not one after the other
        started = time.monotonic()
        for _ in range(50):
            assert await probe.cache.get_many(["k"]) == [None]
        assert time.monotonic() - started < 2.5
        assert "no answer" in await probe.cache.status() or "imeout" in await probe.cache.status()
        redis_server.signal(signal.SIGCONT)
        await probe.eventually("k", b"v")
        assert await probe.cache.status() == "ok"


async def test_only_one_call_probes(redis_server) -> None:
    async with Probe(redis_server.url) as probe:
        redis_server.signal(signal.SIGSTOP)
        await probe.cache.get_many(["k"])
        await asyncio.sleep(0.15)
        probe.events.clear()
        started = time.monotonic()
        await asyncio.gather(*(probe.cache.get_many(["k"]) for _ in range(20)))
        assert sorted(probe.events) == ["error"] + ["skipped"] * 19
        assert time.monotonic() - started < 1.5


async def test_a_cancelled_probe_does_not_block_the_next(redis_server) -> None:
    async with Probe(redis_server.url) as probe:
        redis_server.signal(signal.SIGSTOP)
        await probe.cache.get_many(["k"])
        await asyncio.sleep(0.15)
        task = asyncio.create_task(probe.cache.get_many(["k"]))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        redis_server.signal(signal.SIGCONT)
        await probe.eventually("k", b"v")


async def test_cancelled_calls_do_not_mix_answers_up(redis_server) -> None:
    async with Probe(redis_server.url, max_connections=2) as probe:
        await probe.cache.set_many({f"k{n}": str(n).encode() for n in range(40)})

        async def read(n: int) -> None:
            assert await probe.cache.get_many([f"k{n}"]) in ([str(n).encode()], [None])

        tasks = [asyncio.create_task(read(n % 40)) for n in range(400)]
        for task in random.Random(0).sample(tasks, 200):
            await asyncio.sleep(0)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(r is None or isinstance(r, asyncio.CancelledError) for r in results)
        assert await probe.cache.get_many(["k7"]) == [b"7"]


@pytest.mark.parametrize("password", [":wrong@", ""])
async def test_wrong_password_is_degraded_and_says_why(redis_server, password: str, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    async with Probe(f"redis://{password}127.0.0.1:{redis_server.port}/0") as probe:
        assert await probe.cache.get_many(["k"]) == [None]
        await probe.cache.set_many({"k": b"v"})
        status = await probe.cache.status()
        assert "assword" in status or "uthentication" in status
    assert "wrong@" not in status + caplog.text
    assert redis_server.password not in caplog.text


async def test_full_redis_still_serves_reads(redis_server) -> None:
    async with Probe(redis_server.url) as probe:
        await probe.cache.set_many({"k": b"v"})
        redis_server.client().config_set("maxmemory", 1)
        await probe.cache.set_many({"l": bytes(1000)})
        assert await probe.cache.get_many(["k", "l"]) == [b"v", None]
        assert "set: " in await probe.cache.status()
        redis_server.client().config_set("maxmemory", 0)
        await probe.cache.set_many({"l": b"w"})
        assert await probe.cache.status() == "ok"


@asynccontextmanager
async def speaking(
    handler: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """Yield the URL of a server that passes every connection to `handler`. All connections are closed at the end."""
    tasks = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        with suppress(ConnectionError):
            await handler(reader, writer)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    async with asyncio.timeout(5):
        await asyncio.gather(*tasks)


async def test_what_speaks_no_redis_is_a_fault_like_any_other() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()

    async with speaking(answer) as url, Probe(url) as probe:
        assert await probe.cache.get_many(["k"]) == [None]
        assert (await probe.cache.status()).startswith("degraded")


@pytest.mark.parametrize("answer", [b"+OK", b":7", b"*0", b"*2\r\n$1\r\na\r\n$1\r\nb", b"*1\r\n:7", b"*1\r\n*1\r\n+b"])
async def test_an_answer_of_another_kind_is_a_fault(answer: bytes) -> None:
    """The server supports PING but not MGET."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while sent := await reader.read(65536):
            for command in sent.split(b"*")[1:]:
                writer.write(
                    answer + b"\r\n" if b"MGET" in command else b"+PONG\r\n" if b"PING" in command else b"+OK\r\n"
                )
            await writer.drain()

    async with speaking(talk) as url, Probe(url) as probe:
        assert await probe.cache.get_many(["k"]) == [None]
        assert await probe.cache.get_many(["k"]) == [None]
        assert probe.events == ["error", "skipped"]
        await asyncio.sleep(0.15)  # the breaker lets one call try again
        assert (await probe.cache.status()).startswith("degraded: redis: get: InvalidResponse")
        assert probe.events == ["error", "skipped", "error"]


async def test_a_trickling_answer_is_bounded_too() -> None:
    """Each byte arrives within the socket's time limit, so only the limit on the whole call can end it."""

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"+")
            await writer.drain()
            await asyncio.sleep(0.1)

    async with speaking(trickle) as url, Probe(url) as probe:
        started = time.monotonic()
        async with asyncio.timeout(3):
            assert await probe.cache.get_many(["k"]) == [None]
        assert time.monotonic() - started < 2.5


@pytest.mark.parametrize("url", ["redis://:s3cr/et@host:1", "http://:s3cret@host", "s3cret", "redis://:s3cret@host:x"])
def test_a_wrong_url_is_refused_without_showing_the_password(url: str) -> None:
    with pytest.raises(ValueError, match="is not valid") as caught:
        make_cache(url, max_bytes=1, ttl_s=1)
    assert "s3cr" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_make_cache_takes_redis_when_there_is_a_url() -> None:
    cache = make_cache("redis://:pw@localhost:1/0", max_bytes=1, ttl_s=1)
    assert cache.name == "redis"
    assert "pw" not in repr(cache)
    with pytest.raises(ValueError, match="ttl_s=0"):
        RedisCache("redis://localhost", ttl_s=0)
