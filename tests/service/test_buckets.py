"""Tests of the token buckets: the arithmetic in Python and in Lua against a plain definition, and bounded memory."""

import itertools
import random
import time
import tracemalloc
from fractions import Fraction
from typing import Any
from unittest.mock import ANY

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service import buckets
from service.buckets import MOST_DEBT_BURSTS, Bill, Decision, LocalBuckets, RedisBuckets
from service.limits import Limit
from service.redis_guard import RedisGuard

BURST_US = 60_000_000


class Clock:
    """A clock that a test sets, in microseconds."""

    def __init__(self, now_us: int = 1_000_000) -> None:
        self.now_us = now_us

    def __call__(self) -> int:
        return self.now_us


class PlainBucket:
    """The textbook definition of a token bucket: a content, and the time at which it was computed.

    The unit is the microsecond in which the bucket gains one unit.
    """

    def __init__(self, burst: int) -> None:
        self.burst, self.content, self.at = burst, burst, 0

    def fill(self, now: int) -> None:
        self.content = min(self.burst, self.content + now - self.at)
        self.at = now

    def take(self, cost: int, now: int) -> Decision:
        self.fill(now)
        admitted = self.content >= cost
        self.content -= cost if admitted else 0
        return Decision(admitted, self.burst - self.content)

    def charge(self, cost: int, now: int) -> None:
        self.fill(now)
        self.content = max(self.content - cost, self.burst - MOST_DEBT_BURSTS * self.burst)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["take", "charge"]),
        st.one_of(st.integers(0, BURST_US), st.sampled_from([0, 1, BURST_US - 1, BURST_US]), st.just(20 * BURST_US)),
        st.one_of(st.integers(0, 2 * BURST_US), st.sampled_from([0, 1])),  # time since the step before
    ),
    max_size=20,
)


@given(STEPS)
@settings(max_examples=300, deadline=None)
def test_a_bucket_in_memory_agrees_with_the_plain_definition(steps: list[tuple[str, int, int]]) -> None:
    clock, plain = Clock(), PlainBucket(BURST_US)
    local = LocalBuckets(now_us=clock)
    for operation, cost, elapsed in steps:
        clock.now_us += elapsed
        if operation == "take":
            assert local.take("a", cost, BURST_US) == plain.take(cost, clock.now_us)
        else:
            local.charge("a", cost, BURST_US)
            plain.charge(cost, clock.now_us)
        assert local.take("a", 0, 10**18) == Decision(True, plain.burst - plain.content)


_names = itertools.count()


@given(STEPS)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_script_agrees_with_the_plain_definition(redis_server: Any, steps: list[tuple[str, int, int]]) -> None:
    """The script runs in a real Redis server, but the test sets its clock. Keys do not expire."""
    script = buckets._SCRIPT.replace("redis.call('TIME')", "{ARGV[5], ARGV[6]}")
    script = script.replace("math.ceil(owed / 1000)", "10000000")
    assert script.count("TIME") == 0
    assert script.count("10000000") == 1
    client, name = redis_server.client(), f"a{next(_names)}"
    plain, now, spent = PlainBucket(BURST_US), 1_790_000_000_123_456, 0  # microseconds; about the year 2026
    plain.at = now
    most = MOST_DEBT_BURSTS * BURST_US
    for operation, cost, elapsed in steps:
        now += elapsed
        if operation == "charge" and cost % 2:  # sent together with what is taken next
            spent += cost
            continue
        spent += cost if operation == "charge" else 0
        taken = 0 if operation == "charge" else cost
        answer = client.eval(script, 1, name, spent, taken, BURST_US, most, now // 1_000_000, now % 1_000_000)
        plain.charge(spent, now)
        expected = plain.take(taken, now)
        spent = 0
        assert answer == [int(expected.admitted), expected.owed_us]


@pytest.mark.parametrize(("rate", "burst"), [(10_000_000, 600_000_000), (7, 100), (3_333_333, 10_000_001), (1, 1)])
def test_rounding_never_gives_a_client_more_than_its_limit(rate: int, burst: int) -> None:
    """Times are rounded up to whole microseconds, once for each cost."""
    limit = Limit(rate, burst, 1)
    numbers = random.Random(rate)
    for _ in range(300):
        pixels = numbers.randint(0, burst)
        assert 0 <= limit.us(pixels) - Fraction(pixels * 1_000_000, rate) < 1
    clock = Clock()
    local = LocalBuckets(now_us=clock)
    used, calls = 0, 0
    for _ in range(300):
        pixels = numbers.randint(1, burst)
        clock.now_us += numbers.randint(0, limit.us(burst))
        if local.take("a", limit.us(pixels), limit.burst_us).admitted:
            used, calls = used + pixels, calls + 1
    assert calls > 50
    assert used <= burst + 1 + Fraction((clock.now_us - 1_000_000) * rate, 1_000_000)


def test_a_full_bucket_admits_exactly_its_burst() -> None:
    limit, clock = Limit(3, 100, 10), Clock()
    local = LocalBuckets(now_us=clock)
    assert local.take("a", limit.us(100), limit.burst_us) == Decision(True, limit.burst_us)
    assert not local.take("a", 1, limit.burst_us).admitted
    clock.now_us += 1
    assert local.take("a", 1, limit.burst_us).admitted
    assert not local.take("b", limit.us(101), limit.burst_us).admitted
    assert local.take("b", limit.us(100), limit.burst_us).admitted  # another client has its own bucket


def test_a_refusal_costs_nothing() -> None:
    clock = Clock()
    local = LocalBuckets(now_us=clock)
    local.charge("a", 3 * BURST_US, BURST_US)
    for _ in range(100):
        assert local.take("a", 1, BURST_US) == Decision(False, 3 * BURST_US)
    clock.now_us += 2 * BURST_US + 1
    assert local.take("a", 1, BURST_US) == Decision(True, BURST_US)


# ---- memory


def test_many_addresses_do_not_use_more_memory() -> None:
    local = LocalBuckets(most=1000, now_us=Clock())
    tracemalloc.start()
    for n in range(20_000):
        local.take(f"address:{n}", BURST_US, BURST_US)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(local) == 1001  # one more for the clients that share a bucket
    assert len(local._by_time) == 1001
    assert used < 1001 * 400


def test_many_addresses_do_not_renew_anybodys_limit() -> None:
    clock = Clock()
    local = LocalBuckets(most=100, now_us=clock)
    local.charge("patient", 2 * BURST_US, BURST_US)
    local.take("greedy", BURST_US, BURST_US)
    for n in range(1000):
        local.take(f"address:{n}", BURST_US, BURST_US)
    assert not local.take("greedy", 1, BURST_US).admitted
    assert not local.take("a newcomer shares a bucket", 1, BURST_US).admitted
    clock.now_us += BURST_US  # all buckets are full again, except for that of the patient client
    assert local.take("greedy", BURST_US, BURST_US).admitted
    assert local.take("another newcomer", BURST_US, BURST_US).admitted
    assert not local.take("patient", 1, BURST_US).admitted


def test_memory_is_released_after_a_peak() -> None:
    clock = Clock()
    local = LocalBuckets(most=1000, now_us=clock)
    for n in range(1000):
        local.take(f"old:{n}", n + 1, BURST_US)
    local.charge("old:0", BURST_US, BURST_US)  # the bucket that would have been full first
    clock.now_us += 2000
    for n in range(1100):  # each new bucket drops two old ones
        clock.now_us += 2
        local.take(f"new:{n}", 1, BURST_US)
    assert len(local) < 10
    assert len(local) == len(local._by_time)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 50), st.integers(0, 30), st.booleans()), max_size=150))
@settings(max_examples=200, deadline=None)
def test_dropping_buckets_changes_no_decision(steps: list[tuple[int, int, int, bool]]) -> None:
    """A process with room for 5 buckets is compared with one that keeps all, as long as no client has to share."""
    clock = Clock()
    small, large = LocalBuckets(most=5, now_us=clock), LocalBuckets(now_us=clock)
    for client, cost, elapsed, takes in steps:
        clock.now_us += elapsed
        name = f"c{client}"
        if name not in small._full_at and sum(at > clock.now_us for at in small._full_at.values()) >= 5:
            continue
        if takes:
            assert small.take(name, cost, 40) == large.take(name, cost, 40)
        else:
            small.charge(name, cost, 40)
            large.charge(name, cost, 40)
        assert len(small) <= 5
        assert sorted(small._full_at) == sorted(name for _, name in small._by_time)


# ---- Redis


@pytest.fixture
def shared(redis_server: Any) -> RedisBuckets:
    return RedisBuckets(RedisGuard(redis_server.url, timeout_s=30))


def calls(client: redis.Redis) -> dict[str, int]:
    stats: Any = client.info("commandstats")
    return {name.removeprefix("cmdstat_"): row["calls"] for name, row in stats.items()}


def take(cost_us: int, spent_us: int = 0) -> Bill:
    return Bill(spent_us, cost_us, BURST_US)


async def test_a_settlement_is_one_round_trip(shared: RedisBuckets, redis_server: Any) -> None:
    client = redis_server.client()
    before = calls(client).get("evalsha", 0)
    for _ in range(3):
        assert await shared.settle({"a": take(1000)}) is not None
    assert await shared.settle({"a": take(0, 5 * BURST_US), "b": take(1)}) == {
        "a": Decision(False, ANY),
        "b": Decision(True, ANY),
    }
    after = calls(client)
    assert after["evalsha"] - before == 5
    assert after["eval"] == 1  # only the first call sends the script
    client.script_flush()  # as after a restart
    answers = await shared.settle({"a": take(1), "b": take(1)})
    assert answers == {"a": Decision(False, ANY), "b": Decision(True, ANY)}
    assert calls(client)["eval"] == 3
    await shared.guard.close()


async def test_what_was_spent_is_charged_even_if_the_request_is_refused(shared: RedisBuckets) -> None:
    assert await shared.settle({"a": take(BURST_US - 5)}) is not None
    answers = await shared.settle({"a": take(6, spent_us=BURST_US)})
    assert answers is not None
    assert not answers["a"].admitted
    assert 2 * BURST_US - 5_000_000 < answers["a"].owed_us <= 2 * BURST_US - 5
    await shared.guard.close()


async def test_a_key_expires_when_its_bucket_is_full(shared: RedisBuckets, redis_server: Any) -> None:
    client = redis_server.client()
    assert await shared.settle({"a": take(40_000_000)}) == {"a": Decision(True, 40_000_000)}
    assert 39_000 < client.pttl("dinov2:rate:v1:a") <= 40_001
    await shared.settle({"a": take(0, 100_000_000)})
    assert 130_000 < client.pttl("dinov2:rate:v1:a") <= 140_001
    await shared.settle({"b": take(20_000), "free": take(0)})
    deadline = time.monotonic() + 5
    while client.exists("dinov2:rate:v1:b"):
        assert time.monotonic() < deadline
    assert client.keys("*") == [b"dinov2:rate:v1:a"]
    await shared.guard.close()


async def test_a_clock_that_was_set_back_does_not_lock_a_client_out_for_long(
    shared: RedisBuckets, redis_server: Any
) -> None:
    redis_server.client().set("dinov2:rate:v1:a", int((time.time() + 3600 * 24) * 1e6))
    answers = await shared.settle({"a": take(1)})
    assert answers == {"a": Decision(False, MOST_DEBT_BURSTS * BURST_US)}
    await shared.guard.close()


@pytest.mark.parametrize("content", ["text", ""])
async def test_a_damaged_value_counts_as_a_full_bucket(shared: RedisBuckets, redis_server: Any, content: str) -> None:
    redis_server.client().set("dinov2:rate:v1:a", content)
    assert await shared.settle({"a": take(5_000_000)}) == {"a": Decision(True, 5_000_000)}
    await shared.guard.close()


async def test_a_bucket_that_redis_refuses_does_not_affect_the_others(shared: RedisBuckets, redis_server: Any) -> None:
    redis_server.client().lpush("dinov2:rate:v1:a", "another type")
    assert await shared.settle({"a": take(1), "b": take(1)}) == {"b": Decision(True, 1)}
    assert await shared.settle({"a": take(1)}) is None
    assert "WRONGTYPE" in shared.guard.faults["limits"]
    assert await shared.settle({"b": take(1)}) is not None  # the circuit breaker is closed
    await shared.guard.close()


async def test_an_answer_of_another_form_is_no_decision(shared: RedisBuckets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_SCRIPT", "return {1, 'much'}")
    broken = RedisBuckets(shared.guard)
    assert await broken.settle({"a": take(1)}) is None
    assert "two integers" in shared.guard.faults["limits"]
    await shared.guard.close()
