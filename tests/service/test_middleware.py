"""Tests of the middleware: the limits and metrics of requests, the logs, and clients that leave at any time."""

import asyncio
import base64
import gc
import json
import logging
import time
import weakref
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from service.errors import InvalidRequest, ServiceError, Unavailable
from service.middleware import Border
from service.telemetry import HTTP_SECONDS, MAX_LOGGED_CHARS, JsonLines, trace_id
from tests.dict_store import DictStore
from tests.fakes import FakeEngine, photo, plain_photo, running

EMBED = "/v1/embeddings"
PNG = {"Content-Type": "image/png"}


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 500):
        yield data[start : start + 500]


async def exchange(app: Any, body: bytes, leave: asyncio.Event, path: str = EMBED) -> list[dict[str, Any]]:
    """Send a request to an ASGI application, disconnect when `leave` is set, and return the messages that were sent."""
    sent: list[dict[str, Any]] = []
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"root_path": "", "scheme": "http", "http_version": "1.1", "headers": [(b"content-type", b"image/png")]}
    await app(scope, receive, send)
    return sent


START = {"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"inner"), (b"x-other", b"kept")]}
END = {"type": "http.response.body", "body": b"whole"}


async def test_what_bodies_hold_is_given_back(tmp_path):
    image = photo()
    limits = {"max_image_bytes": len(image), "max_body_bytes": len(image), "max_buffered_bytes": 2 * len(image)}
    async with running(tmp_path, **limits) as run:
        for i in range(6):
            assert (await run.client.post(EMBED, content=image, headers=PNG)).status_code == 200
            bad = image[:100] if i % 2 else chunks(image + b"x")
            assert (await run.client.post(EMBED, content=bad, headers=PNG)).status_code in (413, 422)
            assert run.service.lifecycle.buffer.used == 0
            assert run.service.lifecycle.in_flight == 0
            assert run.service.metrics.registry.get_sample_value("dinov2_requests_in_flight") == 0
        text = (await run.client.get("/metrics")).text
    assert "dinov2_requests_in_flight 0.0" in text  # only requests of /v1/ count


async def test_a_body_at_the_limit_is_accepted(tmp_path):
    image = photo()
    limits = {"max_image_bytes": len(image), "max_body_bytes": len(image), "max_buffered_bytes": len(image)}
    async with running(tmp_path, **limits) as run:
        told = await run.client.post(EMBED, content=image, headers=PNG)
        streamed = await run.client.post(EMBED, content=chunks(image), headers=PNG)
        one_more = await run.client.post(EMBED, content=image + b"x", headers=PNG)
    assert (told.status_code, streamed.status_code, one_more.status_code) == (200, 200, 413)


async def test_a_service_that_stops_is_alive_and_says_why_it_is_not_ready(tmp_path):
    async with running(tmp_path) as run:
        run.service.lifecycle.draining = True
        assert (await run.client.get("/livez")).status_code == 200
        ready = await run.client.get("/readyz")
        refused = await run.client.post(EMBED, content=photo(), headers=PNG)
        listed = await run.client.get("/v1/models")
    assert ready.json()["reasons"] == {"shutdown": "shutting down"}
    assert (refused.status_code, refused.headers["Connection"]) == (503, "close")  # its body was not read
    assert (listed.status_code, listed.headers.get("Connection")) == (503, None)
    assert run.service.lifecycle.draining


async def test_the_application_drains_when_it_ends(tmp_path):
    async with running(tmp_path) as run:
        assert not run.service.lifecycle.draining
    assert run.service.lifecycle.draining


async def test_a_body_that_is_too_large_closes_the_connection_once(tmp_path):
    async with running(tmp_path, max_body_bytes=1000, max_image_bytes=1000) as run:
        answer = await run.client.post(EMBED, content=chunks(bytes(5000)), headers=PNG)
    assert answer.status_code == 413
    assert answer.headers.get_list("Connection") == ["close"]


async def test_methods_that_nobody_knows_share_one_label(tmp_path):
    async with running(tmp_path) as run:
        for method in ("BREW", "SPY", "GET"):
            await run.client.request(method, "/v1/models")
        text = (await run.client.get("/metrics")).text
    assert 'dinov2_requests_total{method="other",' in text
    assert "BREW" not in text
    assert 'dinov2_requests_total{method="GET",route="/v1/models",status="200"} 1.0' in text
    assert 'dinov2_request_duration_seconds_count{route="/v1/models"} 3.0' in text


async def test_the_log_line_has_size_and_milliseconds(tmp_path, caplog):
    caplog.set_level(logging.INFO, "service.access")
    engine = FakeEngine()
    async with running(tmp_path, engine=engine) as run:
        engine.delay_s = 0.03
        await run.client.post(EMBED, content=photo(), headers=PNG)
    [record] = [record for record in caplog.records if record.name == "service.access"]
    assert record.fields["bytes"] == len(photo())
    assert 30 <= record.fields["ms"] < 10_000


async def log_lines(caplog, run, send) -> list[dict[str, Any]]:
    """Return the lines of the access log for the requests that `send` sends."""
    caplog.set_level(logging.INFO, "service.access")
    caplog.clear()
    await send(run.client)
    return [record.fields for record in caplog.records if record.name == "service.access"]


async def test_the_log_says_what_failed_where_and_for_whom(tmp_path, caplog):
    trace = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "X-Request-ID": "mine"}

    async def send(client):
        await client.post("/v1/collections/shop/search?secret=1", json={"vector": [1.0]}, headers=trace)
        await client.post(EMBED, json={"input": ["%", "x" * 5000]})
        await client.delete("/v1/models")
        await client.get(f"/v1/{'n' * 5000}")
        await client.get("/livez", headers={"traceparent": "00-" + "0" * 32 + "-00f067aa0ba902b7-01"})

    async with running(tmp_path) as run:
        search, embed, method, lost, live = await log_lines(caplog, run, send)
    assert (
        search.items()
        >= {
            "request_id": "mine",
            "method": "POST",
            "route": "/v1/collections/{name}/search",
            "path": "/v1/collections/shop/search",
            "collection": "shop",
            "status": 404,
            "code": "collection_not_found",
            "client": "127.0.0.1",
            "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        }.items()
    )
    assert "shop" in search["detail"]
    assert "secret" not in str(search)
    assert (embed["code"], embed["status"]) == ("invalid_items", 422)
    assert "[0] not base64" in embed["detail"]
    assert (method["code"], method["status"]) == ("method_not_allowed", 405)
    assert (lost["code"], len(lost["path"]), len(lost["detail"])) == ("not_found", 503, pytest.approx(250, abs=60))
    assert live.keys() == {"request_id", "method", "route", "path", "status", "bytes", "client", "ms"}


async def test_the_log_names_a_collection_that_the_body_names(tmp_path, caplog):
    async with running(tmp_path, store=DictStore()) as run:

        async def send(client):
            await client.post(
                "/v1/classify", json={"images": [data_url(photo())], "collection": "toys", "label": "kind"}
            )

        [line] = await log_lines(caplog, run, send)
    assert (line["collection"], line["code"]) == ("toys", "collection_not_found")


async def test_the_log_names_the_key_of_the_client(tmp_path, caplog):
    @dataclass(frozen=True)
    class Principal:
        key_id: str

    async def inner(scope, receive, send):
        scope["state"]["principal"] = Principal("k_1234")
        await send(START)
        await send(END)

    async with running(tmp_path) as run:
        app = border(inner, run.service)
        [line] = await log_lines(caplog, run, lambda client: exchange(app, b"", asyncio.Event()))
    assert line["key"] == "k_1234"


async def test_the_log_says_which_items_failed_in_an_answer_with_others(tmp_path, caplog):
    good, bad = data_url(photo()), data_url(photo(1)[:80])
    item = {"on_error": "partial"}

    async def send(client):
        await client.post(EMBED, json={"input": [good, bad, bad]} | item)
        await client.post("/v1/collections/shop/items", json={"items": [{"image": good}, {"image": bad}]} | item)
        await client.post("/v1/collections/shop/search", json={"queries": [{"image": good}, {"image": bad}]} | item)
        await client.post("/v1/classify", json={"images": [good, bad], "classes": {"a": [good], "b": [good]}} | item)
        await client.post(EMBED, json={"input": [good]} | item)

    async with running(tmp_path, store=DictStore()) as run:
        *partial, whole = await log_lines(caplog, run, send)
        failed = run.service.metrics.registry.get_sample_value("dinov2_failed_images_total", {"code": "broken_image"})
    assert [(line["status"], line.get("failed_items"), line.get("code")) for line in partial] == [
        (200, 2, "broken_image"),
        *[(200, 1, "broken_image")] * 3,
    ]
    assert not {"failed_items", "code", "detail"} & whole.keys()
    assert failed == 5


async def test_errors_and_bytes_are_counted(tmp_path):
    async with running(tmp_path) as run:
        await run.client.post(EMBED, content=photo(), headers=PNG)
        await run.client.post(EMBED, content=photo()[:100], headers=PNG)
        run.service.pipeline.batcher.reserve(256)
        await run.client.post(EMBED, content=photo(1), headers=PNG)
        run.service.pipeline.batcher.release(256)
        await run.client.get("/nothing")
        text = (await run.client.get("/metrics")).text
    for route, code in ((EMBED, "broken_image"), (EMBED, "queue_full"), ("unmatched", "not_found")):
        assert f'dinov2_request_errors_total{{code="{code}",route="{route}"}} 1.0' in text
    size = len(photo()) + 100 + len(photo(1))
    assert f'dinov2_request_bytes_total{{route="{EMBED}"}} {float(size)}' in text
    assert 'dinov2_request_bytes_total{route="unmatched"}' not in text


async def test_a_long_error_is_cut_in_the_log(tmp_path, caplog):
    async with running(tmp_path) as run:
        [line] = await log_lines(caplog, run, lambda client: client.post(EMBED, json={"input": ["%"] * 60}))
    assert len(line["detail"]) == MAX_LOGGED_CHARS + 3
    assert line["detail"].endswith("...")


async def test_the_log_names_faults_and_clients_that_left(tmp_path, caplog):
    leave = asyncio.Event()

    async def send(client):
        run.service.pipeline.embed = broken
        await client.post(EMBED, content=photo(), headers=PNG)
        run.service.pipeline.embed = endless
        asyncio.get_running_loop().call_later(0.05, leave.set)
        await exchange(run.app, photo(), leave)

    async def broken(images):
        raise KeyError("secret-internals")

    async def endless(images):
        await asyncio.sleep(60)

    async with running(tmp_path) as run:
        fault, left = await log_lines(caplog, run, send)
    assert (fault["status"], fault["code"]) == (500, "internal_error")
    assert (left["status"], left["code"]) == (499, "client_closed_request")
    assert "client" not in left  # a server on a Unix socket knows no address


@pytest.mark.parametrize(
    ("proxies", "forwarded", "client"),
    [
        (0, ["1.1.1.1"], "127.0.0.1"),
        (1, ["6.6.6.6, 1.1.1.1"], "1.1.1.1"),
        (2, ["6.6.6.6, 1.1.1.1", "2.2.2.2"], "1.1.1.1"),
        (2, ["2001:db8::1,2.2.2.2"], "2001:db8::1"),
        (2, ["6.6.6.6"], "127.0.0.1"),  # the request did not come through both proxies
        (1, [], "127.0.0.1"),
        (1, ["x" * 500], "x" * 64),
    ],
)
async def test_the_client_behind_trusted_proxies(tmp_path, caplog, proxies, forwarded, client):
    headers = [("X-Forwarded-For", value) for value in forwarded]
    async with running(tmp_path, trusted_proxies=proxies) as run:
        [line] = await log_lines(caplog, run, lambda http: http.get("/livez", headers=headers))
    assert line["client"] == client


@pytest.mark.parametrize(
    "value",
    ["", "x", "00-" + "A" * 32 + "-00f067aa0ba902b7-01", "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"],
)
def test_a_traceparent_that_is_not_valid_is_ignored(value):
    assert trace_id(value.encode()) is None


async def test_an_error_before_a_held_answer_is_sent_replaces_it(tmp_path):
    async def inner(scope, receive, send):
        headers = [(b"content-type", b"application/json"), (b"content-length", b"50000")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        raise ServiceError("late")

    async with running(tmp_path) as run:
        app = border(inner, run.service)

        async def accepting(scope, receive, send):
            await app({**scope, "headers": [(b"accept-encoding", b"gzip")]}, receive, send)

        sent = await exchange(accepting, b"", asyncio.Event())
    assert [message.get("status") for message in sent] == [500, None]


async def test_a_time_out_of_something_else_is_no_deadline(tmp_path):
    async with running(tmp_path) as run:

        async def slow(images):
            raise TimeoutError

        run.service.pipeline.embed = slow
        answer = await run.client.post(EMBED, content=photo(), headers=PNG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")


async def test_the_log_has_the_fault_among_several_bad_items(tmp_path, caplog):
    async with running(tmp_path, store=DictStore()) as run:
        run.engine.fails = lambda pixels: True
        files = [("file", photo()[:80]), ("file", plain_photo(9)), ("file", photo()[:90])]
        answer = await run.client.post("/v1/collections/shop/items", files=files)
    assert (answer.status_code, answer.json()["code"]) == (500, "engine_failed")
    [record] = [record for record in caplog.records if record.name == "service.middleware"]
    assert "told to fail" in str(record.exc_info[1].__cause__)


def watchers() -> list[str]:
    """Return the names of the tasks that still wait for a client to leave."""
    names = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]
    return [name for name in names if name.endswith("._watch")]


@pytest.mark.parametrize("delay_s", [0.0, 0.04])
async def test_nobody_waits_for_a_client_that_has_its_answer(tmp_path, delay_s):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine) as run:
        engine.delay_s = delay_s
        sent = await exchange(run.app, photo(), asyncio.Event())
        assert sent[0]["status"] == 200
        await asyncio.sleep(0.03)
        assert watchers() == []


def test_the_buckets_of_the_duration_contain_those_of_opentelemetry():
    convention = {0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10}
    assert convention < set(HTTP_SECONDS)
    assert list(HTTP_SECONDS) == sorted(HTTP_SECONDS)


def border(inner, service):
    return Border(inner, service.settings, service.metrics, service.lifecycle)


async def test_one_request_id_is_sent(tmp_path):
    async def inner(scope, receive, send):
        await send(START)
        await send(END)

    async with running(tmp_path) as run:
        sent = await exchange(border(inner, run.service), b"", asyncio.Event())
    names = [name for name, _ in sent[0]["headers"]]
    assert sorted(names) == [b"x-other", b"x-request-id"]
    assert dict(sent[0]["headers"])[b"x-request-id"] != b"inner"


@pytest.mark.parametrize("error", [ServiceError("late"), RuntimeError("late")])
async def test_an_answer_that_has_begun_is_not_answered_again(tmp_path, error):
    async def inner(scope, receive, send):
        await send(START)
        raise error

    async with running(tmp_path) as run:
        sent = await exchange(border(inner, run.service), b"", asyncio.Event())
    assert [message["type"] for message in sent] == ["http.response.start"]


async def test_an_answer_that_has_begun_is_sent_to_its_end_though_the_client_leaves(tmp_path):
    leave, finished = asyncio.Event(), []

    async def inner(scope, receive, send):
        await receive()
        await asyncio.sleep(0.03)  # the client is watched
        await send(START)
        leave.set()
        await asyncio.sleep(0.01)
        await send(END)
        finished.append(True)

    async with running(tmp_path) as run:
        sent = await exchange(border(inner, run.service), b"", leave)
        text = (await run.client.get("/metrics")).text
    assert finished
    assert sent[-1] == END
    assert 'status="200"' in text


async def test_what_fails_because_the_client_has_left_is_no_fault(tmp_path, caplog):
    leave = asyncio.Event()

    async def inner(scope, receive, send):
        await receive()
        await send(START)
        leave.set()
        await asyncio.wait_for(receive(), 5)
        raise RuntimeError("the connection is closed")

    async with running(tmp_path) as run:
        await exchange(border(inner, run.service), b"", leave)
        text = (await run.client.get("/metrics")).text
    assert 'status="499"' in text
    assert [record for record in caplog.records if record.name == "service.middleware"] == []


def test_a_log_line_has_the_time_in_utc_and_its_fields(monkeypatch):
    record = logging.LogRecord("service", logging.INFO, "", 0, "message", (), None)
    record.created, record.msecs, record.fields = 1_700_000_000.25, 250.0, {"status": 200}
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        line = json.loads(JsonLines().format(record))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert (line["time"], line["status"], line["level"]) == ("2023-11-14T22:13:20.250Z", 200, "info")


@pytest.mark.parametrize("kind", [InvalidRequest, Unavailable])
async def test_an_error_does_not_keep_what_was_made_from_the_body(tmp_path, kind):
    class Parsed:
        pass

    kept: list[weakref.ref[Parsed]] = []

    async def inner(scope, receive, send):
        parsed = Parsed()
        kept.append(weakref.ref(parsed))
        try:
            raise ValueError("inner")
        except ValueError as error:
            raise kind("told to fail") from error

    async with running(tmp_path) as run:
        app = border(inner, run.service)
        gc.collect()
        gc.disable()
        try:
            sent = await exchange(app, b"", asyncio.Event())
            assert sent[0]["status"] == kind("").status
            assert kept[0]() is None
        finally:
            gc.enable()
