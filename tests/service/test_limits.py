"""Tests of the rate limits over HTTP and through Redis: what a request costs, who pays, and what clients are told."""

import asyncio
import base64
import gc
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.preprocess import PreprocessSpec
from service.buckets import RedisBuckets
from service.clients import network
from service.costs import Cost, TooCostly, current_cost
from service.errors import RateLimited
from service.features import pipeline
from service.features.pipeline import View
from service.keys import KeyStore
from service.limits import MOST_KEYS, Limit, Limits
from service.redis_guard import RedisGuard
from service.security import Security
from service.settings import Settings
from service.telemetry import Metrics
from tests.dict_store import DictStore
from tests.fakes import FakeEngine, Running, photo, running, until

EMBED = "/v1/embeddings"
PNG = {"Content-Type": "image/png"}
IMAGE = 40 * 32 + 28 * 28
"""The cost of an image of the function `photo`: its own pixels and those of the network's input."""
RATE, BURST, REQUEST = 1000, 10_000, 100
LIMITED: dict[str, Any] = {"rate_pixels_per_s": RATE, "rate_burst_pixels": BURST, "rate_request_pixels": REQUEST}


class Clock:
    """A clock that a test sets, in microseconds."""

    def __init__(self) -> None:
        self.now_us = 5_000_000

    def __call__(self) -> int:
        return self.now_us


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace the clock of the buckets in memory."""
    made = Clock()
    monkeypatch.setattr("service.buckets._monotonic_us", made)
    return made


@dataclass(frozen=True)
class Principal:
    """A stand-in for the sender of a request."""

    key_id: str | None
    name: str | None = None
    scopes: frozenset[str] = frozenset({"open", "metrics", "read", "write", "admin"})


@pytest.fixture(autouse=True)
def _principals_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let requests of `client_of` pass with the principal that the test has chosen."""
    admit = Security.admit

    def admit_principal(self, scope, headers):
        admit(self, scope, headers)
        if scope.get("principal") is not None:
            scope["state"]["principal"] = scope["principal"]

    monkeypatch.setattr(Security, "admit", admit_principal)


@asynccontextmanager
async def client_of(
    run: Running, principal: Any = None, address: str = "127.0.0.1"
) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client with a key or an address."""

    async def app(scope, receive, send):
        await run.app({**scope, "client": (address, 1), "principal": principal}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        yield client


def fields(answer: httpx.Response) -> tuple[int, int]:
    """Return what the client may still use, and the number of seconds."""
    name, remaining, seconds = answer.headers["RateLimit"].split(";")
    assert name == '"default"'
    return int(remaining.removeprefix("r=")), int(seconds.removeprefix("t="))


def json_of(*images: bytes, **more: Any) -> dict[str, Any]:
    return {"input": [base64.b64encode(image).decode() for image in images], **more}


def charged(run: Running, client: str = "_addresses") -> float:
    return run.service.metrics.registry.get_sample_value("dinov2_rate_limit_pixels_total", {"client": client}) or 0


def refused(metrics: Metrics, reason: str) -> float:
    return metrics.registry.get_sample_value("dinov2_rate_limited_requests_total", {"reason": reason}) or 0


# ---- what is charged


async def test_without_a_limit_nothing_is_counted_or_sent(tmp_path):
    async with running(tmp_path) as run:
        seen = []
        embed = run.service.pipeline.embed

        async def watched(images):
            seen.append(current_cost.get())
            return await embed(images)

        run.service.pipeline.embed = watched
        answer = await run.client.post(EMBED, content=photo(), headers=PNG)
    assert answer.status_code == 200
    assert "RateLimit" not in answer.headers
    assert "RateLimit-Policy" not in answer.headers
    assert seen == [None]


async def test_the_arithmetic_of_a_client(tmp_path, clock):
    async with running(tmp_path, **LIMITED) as run:
        left = BURST
        for n in range(5):
            answer = await run.client.post(EMBED, content=photo(n), headers=PNG)
            left -= REQUEST + IMAGE
            assert answer.status_code == 200
            assert answer.headers["RateLimit-Policy"] == '"default";q=10000;qu="pixels";w=10'
            owed_s = -(-(BURST - left) // RATE)
            assert fields(answer) == ((left, owed_s) if left >= REQUEST else (0, -(-(REQUEST - left) // RATE)))
        assert left == -820
        answer = await run.client.post(EMBED, content=photo(5), headers=PNG)
        assert answer.status_code == 429
        assert answer.headers["Retry-After"] == "1"  # after 0.92 s
        assert fields(answer) == (0, 1)
        clock.now_us += 919_999
        assert (await run.client.post(EMBED, content=photo(6), headers=PNG)).status_code == 429
        clock.now_us += 1
        assert (await run.client.post(EMBED, content=photo(7), headers=PNG)).status_code == 200
        assert charged(run) == 6 * (REQUEST + IMAGE)
        assert refused(run.service.metrics, "rate") == 2


async def test_a_refusal_has_the_format_of_the_route_and_says_when_to_come_back(tmp_path, clock):
    async with running(tmp_path, **LIMITED | {"rate_request_pixels": BURST}) as run:
        assert (await run.client.get("/v1/models")).status_code == 200
        openai = await run.client.post(EMBED, content=photo(), headers=PNG)
        problem = await run.client.get("/v1/models")
        other = await run.client.get("/v1/nothing")
    assert [answer.status_code for answer in (openai, problem, other)] == [429, 429, 429]
    error = openai.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "1000 pixels per second" in error["message"]
    assert "try again in 10 s" in error["message"]
    assert problem.headers["Content-Type"] == "application/problem+json"
    assert problem.json()["code"] == "rate_limit_exceeded"
    assert problem.headers["Retry-After"] == "10"
    assert problem.headers["RateLimit"] == '"default";r=0;t=10'


async def test_a_refusal_is_counted_and_logged_under_its_route(tmp_path, clock, caplog):
    caplog.set_level(logging.INFO, "service.access")
    async with running(tmp_path, **LIMITED | {"rate_request_pixels": BURST}) as run:
        await run.client.get("/v1/models")
        await run.client.post("/v1/collections/shop/search", json={"vector": [0.0]})
        await run.client.put(EMBED)  # a method that the path does not have
        await run.client.get("/v1/nothing")
        text = run.service.metrics.render().decode()
    routes = [("POST", "/v1/collections/{name}/search"), ("PUT", EMBED), ("GET", "unmatched")]
    logged = [record.fields for record in caplog.records if record.fields["status"] == 429]
    assert [(line["method"], line["route"]) for line in logged] == routes
    assert [line.get("collection") for line in logged] == ["shop", None, None]
    for method, route in routes:
        assert f'dinov2_requests_total{{method="{method}",route="{route}",status="429"}} 1.0' in text
        assert f'dinov2_request_errors_total{{code="rate_limit_exceeded",route="{route}"}} 1.0' in text


async def test_requests_leave_nothing_to_the_garbage_collector():
    """A reference cycle for each request would make the collector run eight times as often as without limits. Threads
    of other tests may leave garbage, too, but not in each of several attempts."""
    limits = Limits(Limit(RATE, 10**9, REQUEST), Metrics())
    garbage = []
    gc.disable()
    try:
        for _ in range(5):
            gc.collect()
            for _ in range(100):
                admission = await limits.admit(Principal("a"), "")
                admission.headers()
                limits.settle(admission)
            garbage.append(gc.collect())
    finally:
        gc.enable()
    assert min(garbage) < 100


async def test_the_openai_client_takes_a_refusal_as_a_rate_limit(tmp_path, clock):
    import openai

    async with running(tmp_path, **LIMITED | {"rate_request_pixels": BURST}) as run:
        client = openai.AsyncOpenAI(api_key="none", base_url="http://service/v1", http_client=run.client, max_retries=0)
        await client.models.list()
        with pytest.raises(openai.RateLimitError) as caught:
            await client.models.list()
    assert caught.value.response.headers["Retry-After"] == "10"


async def test_after_the_time_in_retry_after_a_request_is_admitted(tmp_path, clock):
    """Clients that come back too early neither pay nor delay the others."""
    async with running(tmp_path, **LIMITED) as run:
        images = [photo(n) for n in range(4)]
        assert (await run.client.post(EMBED, json=json_of(*images))).status_code == 200
        assert (await run.client.post(EMBED, json=json_of(*map(photo, range(10, 14))))).status_code == 200
        left = BURST - 2 * REQUEST - 8 * IMAGE
        answer = await run.client.get("/v1/models")
        wait_s = int(answer.headers["Retry-After"])
        assert wait_s == -(-(REQUEST - left) // RATE)
        assert wait_s > 5
        for _ in range(20):
            early = await run.client.get("/v1/models")
            assert (early.status_code, early.headers["Retry-After"]) == (429, str(wait_s))
        clock.now_us += (wait_s - 1) * 1_000_000
        assert (await run.client.get("/v1/models")).status_code == 429
        clock.now_us += 1_000_000
        assert (await run.client.get("/v1/models")).status_code == 200


async def test_a_search_by_vector_and_cached_images_cost_the_fixed_part(tmp_path, clock):
    async with running(tmp_path, store=DictStore(), **LIMITED) as run:
        stored = await run.client.post("/v1/collections/shop/items", files={"file": photo()})
        assert stored.status_code in (200, 201)
        assert charged(run) == REQUEST + IMAGE
        vector = [1.0] + [0.0] * 7
        assert (await run.client.post("/v1/collections/shop/search", json={"vector": vector})).status_code == 200
        assert charged(run) == 2 * REQUEST + IMAGE
        assert (await run.client.post(EMBED, content=photo(), headers=PNG)).status_code == 200
        assert charged(run) == 3 * REQUEST + IMAGE


async def test_a_request_that_fails_costs_its_fixed_part(tmp_path, clock):
    async with running(tmp_path, **LIMITED) as run:
        for path in ("/v1/nothing", "/v1/collections/none"):
            answer = await run.client.get(path)
            assert answer.status_code == 404
        assert fields(answer) == (BURST - 2 * REQUEST, 1)
        assert charged(run) == 2 * REQUEST


async def test_an_image_that_breaks_off_costs_its_pixels(tmp_path, clock):
    """Its header states a size, and decoding the rest may take as long as for a whole image."""
    async with running(tmp_path, **LIMITED) as run:
        answer = await run.client.post(EMBED, content=photo()[:-100], headers=PNG)
        assert answer.status_code == 422
        assert charged(run) == REQUEST + IMAGE


async def test_the_networks_input_is_charged_too(tmp_path, clock):
    """A request may choose a large input for a small image."""
    async with running(tmp_path, cache_bytes=0) as run:
        cost = Cost(10**9, charge_late=print)
        current_cost.set(cost)
        larger = View(spec=PreprocessSpec(resize=112, crop=112))
        await run.service.pipeline.analyse(photo(), lambda analysed: None, larger)
        assert cost.pixels == 40 * 32 + 112 * 112
        too_large = View(spec=PreprocessSpec(resize=4088, crop=4088))
        with pytest.raises(Exception, match="choose a smaller size"):
            await run.service.pipeline.analyse(photo(), lambda analysed: None, too_large)
        assert cost.pixels == 2 * 40 * 32 + 112 * 112 + 4096 * 14 * 14
        current_cost.set(None)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/openapi.json"])
async def test_health_and_metrics_are_never_limited(tmp_path, clock, path):
    async with running(tmp_path, **LIMITED | {"rate_request_pixels": BURST}) as run:
        for _ in range(5):
            answer = await run.client.get(path)
            assert answer.status_code == 200
            assert "RateLimit" not in answer.headers
        assert charged(run) == 0


# ---- requests with many images


async def test_many_images_in_one_request_cost_as_much_as_in_many_requests(tmp_path, clock):
    limit = LIMITED | {"rate_burst_pixels": 1_000_000}
    async with running(tmp_path, **limit) as run:
        assert (await run.client.post(EMBED, json=json_of(*map(photo, range(64))))).status_code == 200
        together = charged(run)
        for n in range(64, 128):
            assert (await run.client.post(EMBED, content=photo(n), headers=PNG)).status_code == 200
        apart = charged(run) - together
    assert (together, apart) == (REQUEST + 64 * IMAGE, 64 * (REQUEST + IMAGE))


async def test_a_request_that_costs_more_than_the_burst_ends_early(tmp_path, clock):
    async with running(tmp_path, **LIMITED) as run:
        many = await run.client.post(EMBED, json=json_of(*map(photo, range(64))))
        assert many.status_code == 413
        error = many.json()["error"]
        assert error["code"] == "request_too_costly"
        assert "cost more than 10000 pixels, the limit of one request" in error["message"]
        assert len(error["errors"]) == 64 - BURST // IMAGE
        assert run.engine.images <= BURST // IMAGE  # the others were not even decoded
        assert charged(run) == REQUEST + BURST // IMAGE * IMAGE
        assert refused(run.service.metrics, "cost") == 1
        async with client_of(run, address="192.0.2.7") as small:
            for n in range(4):  # another client notices nothing
                assert (await small.post(EMBED, content=photo(n), headers=PNG)).status_code == 200


async def test_one_large_image_that_costs_more_than_the_burst_is_not_decoded(tmp_path, clock):
    async with running(tmp_path, **LIMITED) as run:
        answer = await run.client.post(EMBED, content=photo(size=(200, 200)), headers=PNG)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_costly"
        assert (run.engine.images, charged(run)) == (0, REQUEST)


async def test_with_partial_the_images_that_fit_are_embedded(tmp_path, clock):
    async with running(tmp_path, **LIMITED) as run:
        answer = await run.client.post(EMBED, json=json_of(*map(photo, range(8)), on_error="partial"))
    assert answer.status_code == 200
    assert len(answer.json()["data"]) == BURST // IMAGE == 4
    assert [row["code"] for row in answer.json()["errors"]] == ["request_too_costly"] * 4


async def test_the_balance_falls_below_zero_by_at_most_one_request(tmp_path, clock):
    async with running(tmp_path, **LIMITED) as run:
        lowest = 0
        for n in range(30):
            images = [photo(10 * n + i) for i in range(4)]
            await run.client.post(EMBED, json=json_of(*images))
            lowest = min(lowest, BURST + (clock.now_us - 5_000_000) // 1000 - int(charged(run)))
            clock.now_us += 3_000_000
    assert -BURST <= lowest < 0


def test_threads_add_to_one_cost():
    cost = Cost(10**9, charge_late=print)
    threads = [threading.Thread(target=lambda: [cost.add(1) for _ in range(5000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cost.pixels == 40_000


def test_a_cost_accepts_its_limit_and_no_more():
    cost = Cost(10, charge_late=print)
    cost.add(4)
    with pytest.raises(TooCostly, match="more than 10 pixels"):
        cost.add(7)
    assert (cost.pixels, cost.refused) == (4, True)
    cost.add(6)
    assert cost.pixels == 10
    with pytest.raises(TooCostly):
        cost.add(1)


def test_what_a_task_adds_after_its_request_is_charged_up_to_the_limit():
    """A task of hours that a request started is not refused, and does not use up the client's limit for hours."""
    late: list[int] = []
    cost = Cost(10, charge_late=late.append)
    cost.add(4)
    assert cost.settle() == 4
    for _ in range(5):
        cost.add(2)
    assert late == [2, 2, 2]
    assert not cost.refused


# ---- who pays


async def test_a_shared_computation_is_paid_by_the_request_that_started_it(tmp_path, clock):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, **LIMITED) as run:
        engine.gate = threading.Event()
        async with client_of(run, Principal("first")) as first, client_of(run, Principal("second")) as second:
            one = asyncio.create_task(first.post(EMBED, content=photo(), headers=PNG))
            await until(engine.entered.is_set)
            two = asyncio.create_task(second.post(EMBED, content=photo(), headers=PNG))
            await until(lambda: run.service.metrics.registry.get_sample_value("dinov2_coalesced_images_total") == 1)
            engine.gate.set()
            assert [(await task).status_code for task in (one, two)] == [200, 200]
        assert (charged(run, "first"), charged(run, "second")) == (REQUEST + IMAGE, REQUEST)


async def test_a_client_that_leaves_pays_for_what_goes_on_for_another(tmp_path, clock, monkeypatch):
    """The first client leaves before its image is decoded, and the second client still waits for the result."""
    entered, gate = threading.Event(), threading.Event()
    decode = pipeline.decode

    def slow(*args, **options):
        entered.set()
        assert gate.wait(10)
        return decode(*args, **options)

    monkeypatch.setattr(pipeline, "decode", slow)
    async with (
        running(tmp_path, **LIMITED) as run,
        client_of(run, Principal("first")) as first,
        client_of(run, Principal("second")) as second,
    ):
        one = asyncio.create_task(first.post(EMBED, content=photo(), headers=PNG))
        await until(entered.is_set)
        two = asyncio.create_task(second.post(EMBED, content=photo(), headers=PNG))
        await until(lambda: run.service.metrics.registry.get_sample_value("dinov2_coalesced_images_total") == 1)
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        assert charged(run, "first") == REQUEST
        gate.set()
        assert (await two).status_code == 200
        await until(lambda: charged(run, "first") == REQUEST + IMAGE)
        assert charged(run, "second") == REQUEST
        left = fields(await first.get("/v1/models"))[0]
        assert left == BURST - 2 * REQUEST - IMAGE


async def test_a_key_has_its_own_bucket(tmp_path, clock):
    async with running(tmp_path, **LIMITED | {"rate_request_pixels": BURST}) as run:
        async with client_of(run, Principal("a")) as a, client_of(run, Principal("b")) as b:
            assert (await a.get("/v1/models")).status_code == 200
            assert (await a.get("/v1/models")).status_code == 429
            assert (await b.get("/v1/models")).status_code == 200
            assert (await run.client.get("/v1/models")).status_code == 200  # an address without a key
        async with client_of(run, Principal(None)) as nobody:
            assert (await nobody.get("/v1/models")).status_code == 429  # the same address


async def test_api_keys_are_limited_apart(tmp_path, clock):
    (first, first_key), (second, _) = (KeyStore(tmp_path).create(name, ["read"]) for name in ("one", "two"))
    async with running(tmp_path, **LIMITED | {"rate_request_pixels": BURST}) as run:
        assert (await run.client.get("/v1/models")).status_code == 401  # at the cost of the address
        for key, statuses in ((first, [200, 429]), (second, [200, 429])):
            for status in statuses:
                answer = await run.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
                assert answer.status_code == status
        assert (charged(run, first_key.id), charged(run)) == (BURST, BURST)


async def test_a_client_behind_a_proxy_has_its_own_bucket(tmp_path, clock):
    limit = LIMITED | {"rate_request_pixels": BURST}
    for proxies, status in ((1, 200), (0, 429)):
        async with running(tmp_path / str(proxies), trusted_proxies=proxies, **limit) as run:
            assert (await run.client.get("/v1/models", headers={"X-Forwarded-For": "203.0.113.1"})).status_code == 200
            other = await run.client.get("/v1/models", headers={"X-Forwarded-For": "203.0.113.2"})
            assert other.status_code == status
            again = await run.client.get("/v1/models", headers={"X-Forwarded-For": "8.8.8.8, 203.0.113.1"})
            assert again.status_code == 429  # what the client writes in front does not help


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("unix", "unix"),
    ],
)
def test_one_client_is_an_address_or_a_network(address: str, client: str):
    assert network(address) == client


async def test_the_label_of_a_key_has_few_values(clock):
    metrics = Metrics()
    limits = Limits(Limit(RATE, BURST, REQUEST), metrics)
    for n in range(MOST_KEYS + 50):
        for _ in range(2):
            limits.settle(await limits.admit(Principal(f"key{n}"), ""))
    limits.settle(await limits.admit(None, "192.0.2.1"))

    def value(client: str) -> float | None:
        return metrics.registry.get_sample_value("dinov2_rate_limit_pixels_total", {"client": client})

    assert (value("key0"), value(f"key{MOST_KEYS - 1}"), value(f"key{MOST_KEYS}")) == (200, 200, None)
    assert (value("_others"), value("_addresses")) == (50 * 200, 100)


# ---- settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate_burst_pixels": 5}, "rate_burst_pixels=5 needs a rate limit"),
        ({"rate_pixels_per_s": 100}, "rate_request_pixels=50000 must not exceed the burst, which is 6000 pixels"),
        ({"rate_pixels_per_s": 1000, "rate_burst_pixels": 86_400_001}, "must not exceed the rate limit of one day"),
        ({"rate_pixels_per_s": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Settings(**values)


def test_the_burst_is_a_minute_unless_it_is_set(tmp_path: Path):
    assert Settings().burst_pixels == 0
    assert Settings(rate_pixels_per_s=10_000_000).burst_pixels == 600_000_000
    assert Settings(rate_pixels_per_s=10_000_000, rate_burst_pixels=50_000).burst_pixels == 50_000
    assert Settings(rate_pixels_per_s=1, rate_burst_pixels=86_400, rate_request_pixels=86_400).burst_pixels == 86_400
    assert Limits.of(Settings(), Metrics()) is None


# ---- Redis

SLOW = Limit(pixels_per_s=1, burst_pixels=3600, request_pixels=360)
"""Ten requests at once, and then one in six minutes, so that the speed of the test does not matter."""


def shared_limits(url: str, limit: Limit = SLOW, **options: Any) -> tuple[Limits, Metrics]:
    """Return limits in Redis. Their time limit for a call is long, so that a busy machine does not matter."""
    metrics = Metrics()
    options = {"timeout_s": 30, "on_event": lambda event: metrics.rate_limit_events.labels(event).inc(), **options}
    return Limits(limit, metrics, RedisBuckets(RedisGuard(url, **options))), metrics


async def outcomes(limits: Limits, count: int, name: str = "a") -> list[bool]:
    """Send requests one after another, and return which of them were admitted."""
    admitted = []
    for _ in range(count):
        try:
            limits.settle(await limits.admit(Principal(name), ""))
            admitted.append(True)
        except RateLimited:
            admitted.append(False)
    return admitted


async def test_two_processes_share_a_limit(redis_server):
    (one, _), (two, _) = shared_limits(redis_server.url), shared_limits(redis_server.url)
    assert await outcomes(one, 4) == [True] * 4
    assert await outcomes(two, 8) == [True] * 6 + [False] * 2
    assert await outcomes(one, 1) == [False]
    assert await outcomes(one, 1, "b") == [True]
    with pytest.raises(RateLimited) as caught:
        await two.admit(Principal("a"), "")
    assert 300 < int(caught.value.headers["Retry-After"]) <= 360
    await one.close()
    await two.close()


async def test_two_processes_at_the_same_time_admit_exactly_the_burst(redis_server):
    (one, _), (two, _) = shared_limits(redis_server.url), shared_limits(redis_server.url)
    results = await asyncio.gather(*(outcomes(limits, 1) for limits in (one, two) * 20))
    assert sum(admitted for [admitted] in results) == 10
    await one.close()
    await two.close()


async def test_the_cost_of_images_is_charged_in_redis(redis_server):
    (one, _), (two, _) = shared_limits(redis_server.url), shared_limits(redis_server.url)
    admission = await one.admit(Principal("a"), "")
    admission.cost.add(3600)
    one.settle(admission)  # does not wait
    await one.close()  # waits
    with pytest.raises(RateLimited) as caught:
        await two.admit(Principal("a"), "")
    assert 600 < int(caught.value.headers["Retry-After"]) <= 720
    await two.close()


async def test_the_time_in_retry_after_is_true_with_redis(redis_server):
    limits, _ = shared_limits(redis_server.url, Limit(1000, 1000, 1000))
    limits.settle(await limits.admit(Principal("a"), ""))
    with pytest.raises(RateLimited) as caught:
        await limits.admit(Principal("a"), "")
    assert caught.value.headers["Retry-After"] == "1"
    await asyncio.sleep(1)
    limits.settle(await limits.admit(Principal("a"), ""))
    await limits.close()


async def test_without_redis_each_process_limits_alone_until_redis_is_back(redis_server, caplog):
    caplog.set_level(logging.INFO, "service.limits")
    one, metrics = shared_limits(redis_server.url)
    two, _ = shared_limits(redis_server.url)

    def shown() -> float | None:
        return metrics.registry.get_sample_value("dinov2_rate_limit_degraded")

    assert await outcomes(one, 3) == [True] * 3
    assert await outcomes(two, 3) == [True] * 3
    assert (shown(), caplog.records) == (0, [])
    redis_server.kill()
    assert await outcomes(one, 9) == [True] * 7 + [False] * 2  # it knows what its own requests cost
    assert shown() == 1
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "each process limits its clients alone: ConnectionError" in record.getMessage()
    assert redis_server.url_password not in record.getMessage()
    redis_server.start()
    await asyncio.sleep(0.6)  # until the circuit breaker tries again
    caplog.clear()
    assert await outcomes(one, 5) == [True] * 4 + [False]  # Redis still has the six requests before its end
    assert shown() == 0
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    events = {
        event: metrics.registry.get_sample_value("dinov2_rate_limit_redis_events_total", {"event": event})
        for event in ("error", "skipped", "recovered")
    }
    assert events == {"error": 1, "skipped": 8, "recovered": 1}
    await one.close()
    await two.close()


async def test_a_redis_that_hangs_delays_one_request(redis_server):
    limits, _ = shared_limits(redis_server.url, timeout_s=0.5)
    assert await outcomes(limits, 1) == [True]
    redis_server.signal(signal.SIGSTOP)
    started = time.monotonic()
    assert await outcomes(limits, 9) == [True] * 9
    assert 0.5 <= time.monotonic() - started < 3
    redis_server.signal(signal.SIGCONT)
    await limits.close()


async def test_the_limit_of_a_service_is_shared_through_redis(tmp_path, redis_server):
    limit = {"rate_pixels_per_s": 1, "rate_burst_pixels": 6000, "rate_request_pixels": 1000}
    async with running(tmp_path / "1", redis_url=redis_server.url, **limit) as one:
        assert (await one.client.post(EMBED, content=photo(), headers=PNG)).status_code == 200
        async with running(tmp_path / "2", redis_url=redis_server.url, **limit) as two:
            key = "dinov2:rate:v1:address:127.0.0.1"
            await until(lambda: redis_server.client().pttl(key) > 3_000_000)  # the image is charged
            answers = [await two.client.post(EMBED, content=photo(), headers=PNG) for _ in range(3)]
            assert [answer.status_code for answer in answers] == [200, 200, 429]
            assert fields(answers[0])[0] in range(6000 - 2000 - IMAGE, 6000 - 2000 - IMAGE + 30)
            assert (await two.client.get("/readyz")).status_code == 200
