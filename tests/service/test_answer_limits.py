"""Tests of the limits on answers: their size, and the memory of answers that clients do not read."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from service.buffer import Buffer
from service.clients import Sender
from service.middleware import Border
from service.off_loop import BIG_BODY
from service.state import FEW_RESULTS, LARGE_ANSWERS
from tests.fakes import Running, photo, running, until

SHOP = "/v1/collections/shop"
LIMIT, N, D = 2**16, 40, 512
PADDING = "x" * 4000
"""The metadata of an item. That of all items together has more bytes than an answer may have."""
VECTORS = np.random.default_rng(0).normal(size=(N, D)).round(3).tolist()


@asynccontextmanager
async def filled(tmp_path, **settings: Any) -> AsyncIterator[Running]:
    """Yield a service with N items of a foreign model. Answers have at most LIMIT bytes."""
    async with running(tmp_path, **{"max_answer_bytes": LIMIT, **settings}) as run:
        await run.client.put(SHOP, json={"fingerprint": "f" * 64, "dimension": D})
        items = [
            {"id": f"i{n:02}", "vector": vector, "fingerprint": "f" * 64, "metadata": {"n": n, "text": PADDING}}
            for n, vector in enumerate(VECTORS)
        ]
        added = await run.client.post(f"{SHOP}/items", json={"items": items})
        assert added.status_code == 200, added.text
        yield run


async def search(run: Running, **options: Any) -> httpx.Response:
    return await run.client.post(f"{SHOP}/search", json={"vector": VECTORS[0], "fingerprint": "f" * 64} | options)


@pytest.mark.parametrize("options", [{}, {"include": ["vector"]}, {"offset": 1}, {"group_by": "n"}])
async def test_a_search_with_too_much_metadata_is_refused(tmp_path, options):
    async with filled(tmp_path) as run:
        small, large = [await search(run, k=k, **options) for k in (2, N)]
    assert small.status_code == 200
    assert (large.status_code, large.json()["code"]) == (422, "answer_too_large")
    assert "fewer results (k, group_size" in large.json()["detail"]


async def test_the_error_estimates_the_size_of_the_answer(tmp_path):
    async with filled(tmp_path) as run:
        detail = (await search(run, k=N)).json()["detail"]
    assert f"the {N} results would have about 16" in detail  # 160,000 bytes and the ids
    assert f"at most {LIMIT:,} are allowed" in detail


async def test_the_queries_of_a_batch_count_together(tmp_path):
    async with filled(tmp_path) as run:
        few, many = [
            await run.client.post(
                f"{SHOP}/search", json={"queries": [{"vector": VECTORS[0], "fingerprint": "f" * 64, "k": 2}] * count}
            )
            for count in (4, 32)
        ]
    assert few.status_code == 200
    assert (many.status_code, many.json()["code"]) == (422, "answer_too_large")


async def test_queries_with_different_options_count_together_too(tmp_path):
    query = {"vector": VECTORS[0], "fingerprint": "f" * 64}
    async with filled(tmp_path) as run:
        few, many, groups = [
            await run.client.post(
                f"{SHOP}/search", json={"queries": [query | {"k": k} | options for k in range(1, top)]}
            )
            for top, options in ((5, {}), (8, {}), (8, {"group_by": "n"}))
        ]
    assert few.status_code == 200
    for answer in (many, groups):
        assert (answer.status_code, answer.json()["code"]) == (422, "answer_too_large")
        assert "results would have about" in answer.json()["detail"]  # before they are parsed


async def test_too_many_vectors_are_refused_before_the_search(tmp_path, monkeypatch):
    async with filled(tmp_path) as run:

        async def never(*args, **options):
            raise AssertionError("the store was searched")

        with monkeypatch.context() as patched:
            patched.setattr(run.service.store, "search", never)
            answer = await search(run, k=N, include=["vector"])
        some = await search(run, k=3, include=["vector"])
    assert (answer.status_code, answer.json()["code"], answer.json()["param"]) == (422, "answer_too_large", "include")
    assert f"{N} vectors of {D} numbers would have about {N * D * 12:,} bytes" in answer.json()["detail"]
    assert len(some.json()["data"][0]["vector"]) == D


async def test_searches_that_share_a_call_are_not_added_up(tmp_path):
    async with filled(tmp_path, max_answer_bytes=2**20) as run:  # no search with k=7 can reach it alone
        answers = await asyncio.gather(*(search(run, k=7, params={"exact": True}) for _ in range(60)))
    assert {answer.status_code for answer in answers} == {200}


@pytest.mark.parametrize("order", [None, {"key": "n"}, {"key": "n", "direction": "desc"}, {"key": "absent"}])
@pytest.mark.parametrize("include", [[], ["vector"]])
async def test_a_page_ends_early_and_all_items_are_listed_once(tmp_path, order, include):
    ids: list[str] = []
    pages, cursor = 0, None
    async with filled(tmp_path) as run:
        while pages == 0 or cursor is not None:
            body = {"limit": 1000, "cursor": cursor, "order_by": order, "include": include}
            answer = await run.client.post(f"{SHOP}/items/scroll", json=body)
            assert answer.status_code == 200, answer.text
            assert len(answer.content) <= LIMIT
            cursor, pages = answer.json()["cursor"], pages + 1
            ids += [item["id"] for item in answer.json()["data"]]
    expected = [f"i{n:02}" for n in range(N)]
    assert ids == (expected[::-1] if order and order.get("direction") == "desc" else expected)
    assert 3 <= pages < N


async def test_an_item_that_is_larger_than_a_page_is_a_page(tmp_path):
    async with running(tmp_path, max_answer_bytes=2**16) as run:
        items = [{"id": i, "vector": [1.0] * 8, "metadata": {"text": "x" * 50_000}} for i in "ab"]
        assert (await run.client.post(f"{SHOP}/items", json={"items": items})).status_code == 200
        first = (await run.client.post(f"{SHOP}/items/scroll", json={})).json()
        second = (await run.client.post(f"{SHOP}/items/scroll", json={"cursor": first["cursor"]})).json()
    assert [[item["id"] for item in page["data"]] for page in (first, second)] == [["a"], ["b"]]
    assert second["cursor"] is None


async def test_only_a_few_large_answers_are_made_at_the_same_time(tmp_path):
    async with filled(tmp_path, max_answer_bytes=2**25) as run, AsyncExitStack() as stack:
        slots = run.service.large_answers
        for sender in [Sender("other")] * LARGE_ANSWERS + [Sender("third")]:
            await stack.enter_async_context(slots.turn(sender))
        scroll = run.client.post(f"{SHOP}/items/scroll", json={"limit": FEW_RESULTS + 1})
        large = [asyncio.create_task(search(run, k=FEW_RESULTS + 1)), asyncio.create_task(scroll)]
        await until(lambda: len(slots._waiting) == 2)
        assert (await search(run, k=FEW_RESULTS)).status_code == 200
        assert not any(task.done() for task in large)
        await stack.aclose()
        assert [answer.status_code for answer in await asyncio.gather(*large)] == [200, 200]


# Answers that are not read


@asynccontextmanager
async def sending(tmp_path, body: bytes, **settings: Any) -> AsyncIterator[tuple[Any, Any, asyncio.Event]]:
    """Yield an application that answers with `body`, a function that requests it from an address, and an event. The
    answers are not passed on before the event is set."""
    async with running(tmp_path, trusted_proxies=1, **settings) as run:
        reading = asyncio.Event()

        async def inner(scope, receive, send):
            headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"image/png")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        app = Border(inner, run.service.settings, run.service.metrics, run.service.lifecycle)

        async def get(address: str) -> list[Any]:
            sent = []

            async def send(message):
                if message["type"] == "http.response.start" and message["status"] == 200:
                    await reading.wait()
                sent.append(message)

            headers = [(b"x-forwarded-for", address.encode())]
            scope = {"type": "http", "method": "GET", "path": "/v1/x", "raw_path": b"/v1/x", "query_string": b""}
            await app(scope | {"headers": headers}, None, send)
            return sent

        yield run, get, reading


async def test_answers_that_are_not_read_count_as_memory_of_their_client(tmp_path):
    limits = {"max_image_bytes": 10, "max_body_bytes": 10, "max_buffered_bytes": 10 * 2**20}
    async with sending(tmp_path, bytes(2**20), **limits) as (run, get, reading):
        many = [asyncio.create_task(get("192.0.2.1")) for _ in range(8)]
        await until(lambda: sum(task.done() for task in many) == 3)
        assert run.service.lifecycle.buffer.used == 5 * 2**20  # its share is a half
        other = asyncio.create_task(get("192.0.2.2"))
        await until(lambda: run.service.lifecycle.buffer.used == 6 * 2**20)
        reading.set()
        statuses = [(await task)[0]["status"] for task in many]
        assert sorted(statuses) == [200] * 5 + [429] * 3
        assert (await other)[0]["status"] == 200
        assert run.service.lifecycle.buffer.used == 0


async def test_an_answer_that_is_refused_is_not_begun(tmp_path):
    limits = {"max_image_bytes": 10, "max_body_bytes": 10, "max_buffered_bytes": 2**20}
    async with sending(tmp_path, bytes(2**19), **limits) as (run, get, _):
        run.service.lifecycle.buffer.take("address:192.0.2.9", 2**20, 0)
        start, body = await get("192.0.2.1")
    assert start["status"] == 503
    assert b"x-request-id" in dict(start["headers"])
    assert b"unread answers use more than" in body["body"]


async def test_a_single_answer_larger_than_the_memory_is_sent(tmp_path):
    limits = {"max_image_bytes": 10, "max_body_bytes": 10, "max_buffered_bytes": 10}
    async with sending(tmp_path, bytes(2**17), **limits) as (_, get, reading):
        reading.set()
        start, body = await get("192.0.2.1")
    assert (start["status"], len(body["body"])) == (200, 2**17)


async def test_small_answers_and_monitoring_are_never_refused(tmp_path):
    async with running(tmp_path) as run:
        run.service.lifecycle.buffer.add("address:127.0.0.1", 2**40)
        assert (await run.client.get("/v1/models")).status_code == 200
        assert (await run.client.get("/metrics", headers={"Accept-Encoding": "gzip"})).status_code == 200
        assert (await run.client.get("/readyz")).status_code == 200
        refused = await run.client.post("/v1/embeddings", content=photo(), headers={"Content-Type": "image/png"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "share_used")


@pytest.mark.parametrize(("text", "factor"), [("a", 1), ("é", 4), ("\\ud83d\\ude00", 4)])
async def test_a_text_with_rare_characters_counts_as_what_it_takes(tmp_path, monkeypatch, text, factor):
    """A string takes up to 4 bytes per character."""
    taken = []
    take = Buffer.take

    def watched(buffer, client, size, own):
        taken.append(size)
        take(buffer, client, size, own)

    monkeypatch.setattr(Buffer, "take", watched)
    body = b'{"vector": "%s%s"}' % (b"a" * BIG_BODY, text.encode())
    async with running(tmp_path) as run:
        answer = await run.client.post(
            "/v1/collections/c/search", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 422
        assert sum(taken) == factor * len(body)
        assert run.service.lifecycle.buffer.used == 0
