"""Provokes every error of the table over HTTP, and tests that the table, its documentation and these tests agree."""

import asyncio
import base64
import json
import re
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import httpx
import pytest

from service import sqlite
from service.errors import (
    ERRORS,
    BodyTooSlow,
    BrokenImage,
    EngineFailed,
    HeadTooLarge,
    InvalidItems,
    ItemError,
    QueueFull,
    UnsupportedImage,
)
from service.keys import KeyStore
from service.search.store import CollectionSpec
from service.telemetry import JsonLines
from service.web_images import WebImages
from tests.dict_store import DictStore
from tests.fakes import DIMS, FakeEngine, Running, photo, plain_photo, running, until

ROOT = Path(__file__).parents[2]
EMBED = "/v1/embeddings"


def base64_of(image: bytes) -> str:
    return base64.b64encode(image).decode()


Provoke = Callable[[Path], Awaitable[httpx.Response]]
PROVOKED: dict[str, Provoke] = {}


def provokes(code: str) -> Callable[[Provoke], Provoke]:
    def register(provoke: Provoke) -> Provoke:
        PROVOKED[code] = provoke
        return provoke

    return register


@asynccontextmanager
async def busy(tmp_path: Path, **settings) -> AsyncIterator[Running]:
    """Yield a service with an engine in a pass that does not end before the `with` block does."""
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, cache_bytes=0, **settings) as run:
        engine.gate = threading.Event()
        first = asyncio.create_task(run.embed([photo(99)]))
        await until(engine.entered.is_set)
        try:
            yield run
        finally:
            engine.gate.set()
            await first


@provokes("internal_error")
async def _internal(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:

        async def broken(images):
            raise KeyError("secret-internals")

        run.service.pipeline.embed = broken
        return await run.client.post(EMBED, json={"input": base64_of(photo())})


@provokes("bad_request")
async def _bad_request(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        return await run.client.post(EMBED, content=b"{", headers={"Content-Type": "application/json"})


@provokes("unsupported_dimensions")
async def _dimensions(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        return await run.client.post(EMBED, json={"input": base64_of(photo()), "dimensions": 4})


@provokes("unauthenticated")
async def _unauthenticated(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path, auth="on") as run:
        return await run.client.post(EMBED, json={"input": base64_of(photo())})


@provokes("missing_scope")
async def _scope(tmp_path: Path) -> httpx.Response:
    key, _ = KeyStore(tmp_path).create("reader", ["read"])
    async with running(tmp_path) as run:
        return await run.client.put("/v1/collections/shop", headers={"Authorization": f"Bearer {key}"})


@provokes("cross_origin")
async def _origin(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        return await run.client.put("/v1/collections/shop", headers={"Origin": "https://other.example"})


@provokes("not_found")
async def _not_found(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        return await run.client.get("/v1/nothing")


@provokes("model_not_found")
async def _model(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        return await run.client.post(EMBED, json={"input": base64_of(photo()), "model": "text-embedding-3-small"})


@provokes("collection_not_found")
async def _collection(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path, store=DictStore()) as run:
        return await run.client.get("/v1/collections/shop")


@provokes("item_not_found")
async def _item(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path, store=DictStore()) as run:
        await run.client.post("/v1/collections/shop/items", files={"file": photo()})
        return await run.client.get("/v1/collections/shop/items/nobody")


@provokes("job_not_found")
async def _job(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        return await run.client.get("/v1/jobs/train-0")


@provokes("method_not_allowed")
async def _method(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        return await run.client.delete(EMBED)


@provokes("conflict")
async def _conflict(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path, store=DictStore()) as run:
        await run.client.post("/v1/collections/shop/items", files={"file": photo()})
        return await run.client.put("/v1/collections/shop", json={"dtype": "float16"})


@provokes("model_mismatch")
async def _mismatch(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path, store=DictStore()) as run:
        other = run.service.tag("b" * 64)
        await run.service.store.create("shop", CollectionSpec(other, 8))
        return await run.client.post("/v1/collections/shop/items", files={"file": photo()})


@provokes("image_url_failed")
async def _image_url(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path, image_urls="*") as run:
        run.service.web_images = WebImages(
            run.service.settings, run.service.lifecycle.buffer, resolve=lambda host, port: ["127.0.0.1"]
        )
        return await run.client.post(EMBED, json={"input": "https://images.example.com/a.jpg"})


@provokes("range_not_satisfiable")
async def _range(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        await run.client.put("/v1/collections/shop")
        name = (await run.client.post("/v1/collections/shop/snapshots")).json()["name"]
        path = f"/v1/collections/shop/snapshots/{name}"
        return await run.client.get(path, headers={"Range": "bytes=99999999-"})


@provokes("head_too_large")
async def _head(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:

        async def app(scope, receive, send):  # the HTTP protocol does this
            await run.app({**scope, "refusal": HeadTooLarge("the head is larger than 65536 bytes")}, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            return await client.get("/v1/models")


@provokes("body_too_slow")
async def _slow(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:

        async def app(scope, receive, send):  # the HTTP protocol does this
            async def slow():
                scope["refusal"] = BodyTooSlow("only 10 bytes of the request body have arrived in 10 s")
                return {"type": "http.request", "body": b"", "more_body": True}

            await run.app(scope, slow, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            answer = await client.post("/v1/collections/shop/search", json={})
            assert answer.headers["Connection"] == "close"
            return answer


@provokes("host_not_allowed")
async def _host(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        return await run.client.get("/v1/models", headers={"Host": "rebound.example.com:8000"})


@provokes("share_used")
async def _share(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        run.service.pipeline.batcher.reserve(128, "address:127.0.0.1")
        return await run.client.post(EMBED, json={"input": base64_of(photo())})


@provokes("answer_too_large")
async def _answer(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path, store=DictStore(), max_answer_bytes=2**16) as run:
        metadata = json.dumps({"text": "x" * 40_000})
        await run.client.post("/v1/collections/shop/items", files={"file": photo()}, data={"metadata": metadata})
        many = {"queries": [{"vector": [1.0] * DIMS}] * 2}
        return await run.client.post("/v1/collections/shop/search", json=many)


@provokes("payload_too_large")
async def _payload(tmp_path: Path) -> httpx.Response:
    async def chunks() -> AsyncIterator[bytes]:  # chunked: no Content-Length to judge by
        for _ in range(100):
            yield bytes(1000)

    async with running(tmp_path, max_body_bytes=5000, max_image_bytes=5000) as run:
        return await run.client.post(EMBED, content=chunks(), headers={"Content-Type": "image/png"})


@provokes("image_too_large")
async def _image_too_large(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path, max_image_pixels=1000) as run:
        return await run.client.post(EMBED, json={"input": base64_of(photo())})


@provokes("request_too_costly")
async def _costly(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path, rate_pixels_per_s=10, rate_burst_pixels=1000, rate_request_pixels=1) as run:
        return await run.client.post(EMBED, json={"input": base64_of(photo())})


@provokes("rate_limit_exceeded")
async def _rate(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path, rate_pixels_per_s=10, rate_burst_pixels=1000, rate_request_pixels=1000) as run:
        await run.client.get("/v1/models")
        return await run.client.post(EMBED, json={"input": base64_of(photo())})


@provokes("unsupported_media_type")
async def _media(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        return await run.client.post(EMBED, content=b"<x/>", headers={"Content-Type": "application/xml"})


@provokes("unsupported_image")
async def _unsupported(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        return await run.client.post(EMBED, json={"input": base64_of(b"%PDF-1.7 and so on")})


@provokes("invalid_request")
async def _invalid(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        return await run.client.post(EMBED, json={"input": base64_of(photo()), "poolling": "cls"})


@provokes("broken_image")
async def _broken(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        return await run.client.post(EMBED, json={"input": base64_of(photo()[:80])})


@provokes("invalid_items")
async def _items(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        bad = [base64_of(photo()), base64_of(photo()[:80]), base64_of(b"%PDF-1.7 and so on")]
        return await run.client.post(EMBED, json={"input": bad})


@provokes("engine_failed")
async def _engine(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        run.engine.fails = lambda pixels: True
        return await run.client.post(EMBED, json={"input": base64_of(plain_photo(9))})


@provokes("storage_failed")
async def _storage(tmp_path: Path) -> httpx.Response:
    (tmp_path / "originals").write_bytes(b"")  # where a folder should be
    async with running(tmp_path, store=DictStore()) as run:
        await run.client.put("/v1/collections/shop", json={"originals": True})
        return await run.client.post("/v1/collections/shop/items", files={"file": photo()})


async def _first_item(run: Running) -> None:
    item = {"id": "a", "vector": [1.0] * DIMS, "fingerprint": "a" * 64}
    answer = await run.client.post("/v1/collections/shop/items", json={"items": [item]})
    assert answer.status_code == 200, answer.text


@provokes("storage_damaged")
async def _damaged(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        await _first_item(run)
    with closing(sqlite3.connect(tmp_path / "search.sqlite3")) as db, db:
        db.execute("UPDATE vectors_1 SET crc = 0")
    async with running(tmp_path) as run:
        [listed] = (await run.client.get("/v1/collections")).json()["data"]
        assert listed["damaged"]
        return await run.client.get("/v1/collections/shop/items/a")


@provokes("storage_busy")
async def _locked(tmp_path: Path) -> httpx.Response:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite, "_BUSY_MS", 20)
        async with running(tmp_path) as run:
            with closing(sqlite3.connect(tmp_path / "search.sqlite3", isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                return await run.client.put("/v1/collections/shop")


@provokes("storage_replaced")
async def _replaced(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path / "data") as run:
        (tmp_path / "data").rename(tmp_path / "gone")
        return await run.client.put("/v1/collections/shop")


@provokes("insufficient_storage")
async def _full(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        await run.service.store._write(lambda db: db.execute("PRAGMA max_page_count = 1"))  # SQLite's own "full"
        return await run.client.put("/v1/collections/shop")


@provokes("quota_exceeded")
async def _quota(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path, max_collections=1) as run:
        await run.client.put("/v1/collections/shop")
        return await run.client.put("/v1/collections/other")


@provokes("unavailable")
async def _unavailable(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        run.service.lifecycle.buffer.take("other", run.service.settings.max_buffered_bytes, 0)
        return await run.client.post(EMBED, json={"input": base64_of(photo())})


@provokes("queue_full")
async def _queue(tmp_path: Path) -> httpx.Response:
    async with busy(tmp_path, queue_max_images=1) as run:
        return await run.client.post(EMBED, json={"input": base64_of(photo())})


@provokes("shutting_down")
async def _shutdown(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        run.service.lifecycle.draining = True
        assert (await run.client.get("/readyz")).status_code == 503
        return await run.client.post(EMBED, json={"input": base64_of(photo())})


@provokes("model_unavailable")
async def _model_unavailable(tmp_path: Path) -> httpx.Response:
    async with running(tmp_path) as run:
        run.engine.killed = True
        first = await run.client.post(EMBED, json={"input": base64_of(photo())})
        assert first.status_code == 500
        await until(lambda: run.service.pipeline.batcher.health() is not None)
        assert (await run.client.get("/livez")).status_code == 503
        assert (await run.client.get("/readyz")).status_code == 503
        return await run.client.post(EMBED, json={"input": base64_of(photo())})


@provokes("deadline_exceeded")
async def _deadline(tmp_path: Path) -> httpx.Response:
    async with busy(tmp_path, request_deadline_s=0.2) as run:
        answer = await run.client.post(EMBED, json={"input": base64_of(photo())})
        await until(lambda: run.service.pipeline.batcher.images == 1)  # its place in the queue is free again
        return answer


@pytest.mark.parametrize(
    ("code", "cause"), [("storage_failed", "NotADirectoryError"), ("engine_failed", "told to fail")]
)
async def test_a_fault_of_the_service_is_logged_with_its_cause_and_not_shown(tmp_path, caplog, code, cause):
    answer = await PROVOKED[code](tmp_path)
    assert str(tmp_path) not in answer.text
    [record] = [record for record in caplog.records if record.name == "service.middleware"]
    line = json.loads(JsonLines().format(record))
    assert line["request_id"] == answer.headers["X-Request-ID"]
    assert line["message"].startswith(f"{code}: ")
    assert cause in line["exception"]


@pytest.mark.parametrize(
    "code", ["queue_full", "deadline_exceeded", "insufficient_storage", "invalid_items", "collection_not_found"]
)
async def test_what_is_no_fault_of_the_service_is_not_logged_as_one(tmp_path, caplog, code):
    await PROVOKED[code](tmp_path)
    assert [record for record in caplog.records if record.name == "service.middleware"] == []


NEVER_SENT = {
    "client_closed_request",  # nobody is left to read it; test_pipeline.py sees it in the metrics
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("code", PROVOKED)
async def test_provoked_over_http(tmp_path, code):
    answer = await PROVOKED[code](tmp_path)
    status, _, title = next(kind for kind in ERRORS.values() if kind.code == code)
    assert answer.status_code == status, answer.text
    assert "secret" not in answer.text
    body = answer.json()
    if answer.request.url.path == EMBED:
        assert answer.headers["Content-Type"] == "application/json"
        error = body["error"]
        assert error["code"] == code
        below_500 = "rate_limit_error" if status == 429 else "invalid_request_error"
        assert error["type"] == ("server_error" if status >= 500 else below_500)
        assert error["message"]
        assert error["request_id"] == answer.headers["X-Request-ID"]
    else:
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert {"type", "title", "status", "detail", "instance", "code", "request_id"} <= set(body)
        assert (body["code"], body["status"], body["title"]) == (code, status, title)
        assert body["request_id"] == answer.headers["X-Request-ID"]
    if code in ("queue_full", "shutting_down", "unavailable", "rate_limit_exceeded", "share_used", "storage_busy"):
        assert int(answer.headers["Retry-After"]) >= 1


def test_errors_of_several_items_are_the_worst_and_say_when_to_come_back():
    broken, failed, full = BrokenImage("torn"), EngineFailed("no"), QueueFull("full", retry_after_s=7)
    alike = InvalidItems([ItemError(0, broken), ItemError(3, BrokenImage("cut"))], total=5)
    mixed = InvalidItems([ItemError(0, broken), ItemError(1, UnsupportedImage("pdf"))], total=2)
    faulty = InvalidItems([ItemError(0, broken), ItemError(1, failed)], total=2)
    later = InvalidItems([ItemError(0, full), ItemError(1, broken)], total=2)
    assert [(error.status, error.code) for error in (alike, mixed, faulty, later)] == [
        (422, "broken_image"),
        (422, "invalid_items"),
        (500, "engine_failed"),
        (503, "queue_full"),
    ]
    assert alike.headers == {}
    assert later.headers == {"Retry-After": "7"}


def test_nobody_is_told_to_come_back_at_once():
    assert QueueFull("full", retry_after_s=0).headers == {"Retry-After": "1"}
    assert QueueFull("full").headers == {}


async def test_a_method_that_is_not_allowed_names_those_that_are(tmp_path):
    async with running(tmp_path) as run:
        answer = await run.client.delete(EMBED)
    assert answer.status_code == 405
    assert answer.headers["Allow"] == "POST"


def test_the_table_and_these_tests_agree():
    assert {kind.code for kind in ERRORS.values()} == set(PROVOKED) | NEVER_SENT
    assert len({kind.code for kind in ERRORS.values()}) == len(ERRORS)


def test_the_page_names_every_error_and_no_other():
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert {(int(status), code) for status, code in rows} == {(kind.status, kind.code) for kind in ERRORS.values()}


def test_the_drawing_at_the_top_of_the_file_is_the_table():
    import service.errors

    drawn = re.findall(r"(\w+) +(\d{3}) (\w+)", service.errors.__doc__)
    assert drawn == [(cls.__name__, str(kind.status), kind.code) for cls, kind in ERRORS.items()]


async def test_the_framework_may_not_answer_in_its_own_words(tmp_path):
    async with running(tmp_path) as run:
        await run.client.post("/v1/collections/shop/items", files={"file": photo()})
        for answer in (
            await run.client.get("/v1/nothing"),
            await run.client.put("/v1/models"),
            await run.client.post("/v1/collections/UPPER/items", files={"file": photo()}),
            await run.client.post("/v1/collections/..%2Fetc/search", json={"vector": [1.0]}),
            await run.client.post("/v1/collections/shop/search", json={"k": 0, "vector": [1.0]}),
        ):
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert 400 <= answer.status_code < 500
            assert answer.json()["code"]


async def test_every_bad_index_is_named(tmp_path):
    answer = await _items(tmp_path)
    assert [row["index"] for row in answer.json()["error"]["errors"]] == [1, 2]
    assert [row["code"] for row in answer.json()["error"]["errors"]] == ["broken_image", "unsupported_image"]


@pytest.mark.parametrize(
    "body",
    [
        {"input": []},
        {"input": ["x"] * 65},
        {"model": "auto"},
        {"input": "x", "pooling": "max"},
        {"input": "x", "normalize": "perhaps"},
        {"input": "x", "dimensions": "many"},
        {"input": "x", "encoding_format": "hex"},
        [],
        "text",
    ],
)
async def test_what_is_wrong_with_a_request_is_a_422_that_names_it(tmp_path, body):
    async with running(tmp_path) as run:
        answer = await run.client.post(EMBED, json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "invalid_request"


async def test_limits_of_a_form(tmp_path):
    async with running(tmp_path) as run:
        many = await run.client.post(EMBED, files=[("file", ("p", b"x"))] * 80)
        fields = await run.client.post(EMBED, files={"file": b"x"}, data={f"f{i}": "x" for i in range(40)})
        long = await run.client.post(EMBED, files={"file": b"x"}, data={"user": "x" * 100_000})
        name = await run.client.post(EMBED, files={"../../etc/passwd": b"x"})
        cut = await run.client.post(
            EMBED, content=b"--c\r\nbroken", headers={"Content-Type": "multipart/form-data; boundary=b"}
        )
    assert [answer.status_code for answer in (many, fields, long, name, cut)] == [400, 400, 400, 422, 400]
    assert list(tmp_path.rglob("passwd")) == []
