"""Tests of the buckets that processes share: when Redis is asked, that every cost arrives, and what happens without
Redis."""

import asyncio
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import shared_buckets
from service.buckets import Bill, Decision, LocalBuckets, RedisBuckets
from service.redis_guard import RedisGuard
from service.shared_buckets import KEEP_S, SharedBuckets

BURST = 16_000  # microseconds
UNSENT = BURST // 16


class Clock:
    """A clock that a test sets. It replaces the module `time` and the clock of the buckets."""

    def __init__(self) -> None:
        self.now_us = 1_000_000

    def __call__(self) -> int:
        return self.now_us

    def monotonic(self) -> float:
        return self.now_us / 1e6


class FakeRedis:
    """Buckets that several `SharedBuckets` share without a server. `bills` contains the bills that arrived."""

    def __init__(self, clock: Clock) -> None:
        self.truth = LocalBuckets(now_us=clock)
        self.bills: list[dict[str, Bill]] = []
        self.charged_us = 0
        self.down = False
        self.delay: asyncio.Event | None = None
        self.guard = self

    async def settle(self, bills: dict[str, Bill]) -> dict[str, Decision] | None:
        if self.down:
            return None
        self.bills.append(bills)
        answers = {}
        for name, bill in bills.items():
            self.truth.charge(name, bill.spent_us, bill.burst_us)
            answers[name] = self.truth.take(name, bill.cost_us, bill.burst_us)
            self.charged_us += bill.spent_us + (bill.cost_us if answers[name].admitted else 0)
        if self.delay is not None:
            await self.delay.wait()
        return answers

    async def close(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("service.shared_buckets.time", made)
    return made


def process(redis: Any, clock: Clock) -> SharedBuckets:
    return SharedBuckets(redis, LocalBuckets(now_us=clock))


async def test_redis_is_asked_first_and_then_only_when_it_matters(clock: Clock) -> None:
    redis = FakeRedis(clock)
    shared = process(redis, clock)
    assert await shared.take("a", 100, BURST) == Decision(True, 100)
    for n in range(UNSENT // 100):
        assert await shared.take("a", 100, BURST) == Decision(True, 200 + 100 * n)
    assert len(redis.bills) == 1
    assert await shared.take("a", 100, BURST) == Decision(True, 1200)  # too much has not been sent
    assert redis.bills[1:] == [{"a": Bill(1000, 100, BURST)}]
    shared.charge("a", BURST // 2, BURST)
    assert await shared.take("a", 100, BURST) == Decision(True, 1300 + BURST // 2)
    assert redis.bills[2:] == [{"a": Bill(BURST // 2, 100, BURST)}]
    for _ in range(3):  # more than a half is used
        assert (await shared.take("a", 100, BURST)).admitted
    assert redis.bills[3:] == [{"a": Bill(0, 100, BURST)}] * 3
    assert await shared.take("b", 1, BURST) == Decision(True, 1)  # a client without an estimate
    assert len(redis.bills) == 7
    await shared.close()


async def test_costs_are_sent_soon_and_the_answer_is_the_new_estimate(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_buckets, "SEND_AFTER_S", 0.1)
    redis = FakeRedis(clock)
    one, two = process(redis, clock), process(redis, clock)
    for shared in (one, two):
        await shared.take("a", 100, BURST)
    two.charge("a", 10_000, BURST)
    await one.take("a", 100, BURST)
    one.charge("b", 7, BURST)
    await asyncio.sleep(0.15)
    assert sorted(redis.bills[2:], key=len) == [
        {"a": Bill(10_000, 0, BURST)},
        {"a": Bill(100, 0, BURST), "b": Bill(7, 0, BURST)},
    ]
    assert redis.truth.owed_us("a", BURST) == 10_300
    one.charge("a", 1, BURST)
    await asyncio.sleep(0.15)
    assert one._estimates.owed_us("a", BURST) == 10_301  # it knows what the other process has used
    assert len(redis.bills) == 5
    await asyncio.sleep(0.15)
    assert len(redis.bills) == 5  # nothing to send
    await one.close()
    await two.close()


async def test_what_is_used_while_redis_answers_is_part_of_the_estimate(clock: Clock) -> None:
    redis = FakeRedis(clock)
    shared = process(redis, clock)
    redis.delay = asyncio.Event()
    asked = asyncio.create_task(shared.take("a", 100, BURST))
    await asyncio.sleep(0)
    shared.charge("a", 50, BURST)
    redis.delay.set()
    assert await asked == Decision(True, 100)
    assert shared._estimates.owed_us("a", BURST) == 150
    await shared.close()
    assert redis.truth.owed_us("a", BURST) == 150


async def test_an_estimate_is_not_used_for_long(clock: Clock) -> None:
    redis = FakeRedis(clock)
    shared = process(redis, clock)
    await shared.take("a", 100, BURST)
    clock.now_us += int(KEEP_S * 1e6) - 1
    await shared.take("a", 100, BURST)
    assert len(redis.bills) == 1
    clock.now_us += 1
    await shared.take("a", 100, BURST)
    assert len(redis.bills) == 2
    await shared.take("b", 100, BURST)
    assert list(shared._answered_s) == ["a", "b"]
    clock.now_us += int(KEEP_S * 1e6)
    await shared.take("c", 100, BURST)
    assert list(shared._answered_s) == ["c"]
    await shared.close()


async def test_many_clients_do_not_use_more_memory(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_buckets, "MOST_BUCKETS", 20)
    redis = FakeRedis(clock)
    shared = SharedBuckets(redis, LocalBuckets(most=20, now_us=clock))  # type: ignore[arg-type]
    for n in range(200):
        assert (await shared.take(f"a{n}", 100, BURST)).admitted
        clock.now_us += 100 if n >= 100 else 0  # from then on, each bucket is full before the next request
        assert len(shared._answered_s) <= 20
        assert len(shared._estimates) <= 20
        assert not shared._unsent
    assert len(shared._answered_s) == 20
    await shared.close()


async def test_without_redis_the_estimate_decides(clock: Clock) -> None:
    redis = FakeRedis(clock)
    changes: list[bool] = []
    shared = SharedBuckets(redis, LocalBuckets(now_us=clock), changes.append)  # type: ignore[arg-type]
    other = process(redis, clock)
    await other.take("a", BURST // 2, BURST)
    await shared.take("a", BURST // 4, BURST)
    redis.down = True
    assert await shared.take("a", BURST // 4, BURST) == Decision(True, BURST)  # it knows what the other one has used
    assert await shared.take("a", 1, BURST) == Decision(False, BURST)
    assert await shared.take("b", 1, BURST) == Decision(True, 1)
    assert changes == [False]
    shared.charge("b", 1, BURST)
    await shared._send()
    assert not shared._unsent  # nothing piles up
    redis.down = False
    assert await shared.take("a", 1, BURST) == Decision(True, BURST * 3 // 4 + 1)
    assert changes == [False, True]
    await shared.close()


PROCESSES = 3
OPERATIONS = st.lists(
    st.tuples(
        st.integers(0, PROCESSES - 1),
        st.sampled_from(["take", "take", "take", "charge", "send"]),
        st.integers(0, 700),
        st.sampled_from([0, 0, 0, 1, 100, 5_000]),
    ),
    max_size=120,
)


@given(OPERATIONS)
@settings(max_examples=150, deadline=None)
def test_every_cost_is_charged_and_little_is_admitted_too_much(operations: list[tuple[int, str, int, int]]) -> None:
    asyncio.run(_compare(operations))


async def _compare(operations: list[tuple[int, str, int, int]]) -> None:
    clock = Clock()
    redis = FakeRedis(clock)
    shared = [process(redis, clock) for _ in range(PROCESSES)]
    admitted = charged = 0
    for number, operation, amount, elapsed in operations:
        clock.now_us += elapsed
        if operation == "take":
            if (await shared[number].take("a", amount, BURST)).admitted:
                admitted += amount
        elif operation == "charge":
            shared[number].charge("a", amount, BURST)
            charged += amount
        else:
            await shared[number]._send()
        gain = clock.now_us - 1_000_000
        assert admitted <= BURST + gain + PROCESSES * UNSENT
    for one in shared:
        await one._send()
    assert redis.charged_us == admitted + charged
    for one in shared:
        await one.close()


async def test_all_costs_arrive_in_a_real_redis(redis_server: Any) -> None:
    burst = 3_600_000_000  # an hour
    processes = [
        SharedBuckets(RedisBuckets(RedisGuard(redis_server.url, timeout_s=30)), LocalBuckets()) for _ in range(3)
    ]
    costs = itertools.cycle([1_000_000, 2_000_000, 300_000])
    before = redis_server.client().info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]

    async def work(shared: SharedBuckets) -> int:
        total = 0
        for _ in range(200):
            cost = next(costs)
            assert (await shared.take("a", cost, burst)).admitted
            shared.charge("a", cost, burst)
            total += 2 * cost
            await asyncio.sleep(0)
        return total

    total = sum(await asyncio.gather(*map(work, processes)))
    for one in processes:
        await one.close()
    left_ms = redis_server.client().pttl("dinov2:rate:v1:a")
    assert total / 1000 - 20_000 < left_ms <= total / 1000 + 1  # the bucket gains at most 20 s while the test runs
    asked = redis_server.client().info("commandstats")["cmdstat_evalsha"]["calls"] - before
    assert asked < 100  # for 1200 costs
