"""Tests that every route that accepts images in JSON also accepts their URLs, and fetches them at the same time."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service import web_images
from tests.fakes import Running, photo, running, until
from tests.image_servers import IMAGE, Network, answer, open_network

EMBED, SHOP = "/v1/embeddings", "/v1/collections/shop"
URL = "https://images.example.com/a.png"
TEXT, OTHER = (base64.b64encode(image).decode() for image in (IMAGE, photo(1)))
BOX = {"box": [4, 4, 20, 20]}
FORMS = {
    "text": URL,
    "spaces": f"\n {URL} ",
    "OpenAI": {"type": "image_url", "image_url": {"url": URL}},
    "image": {"image": URL},
    "content": {"content": [{"type": "image_url", "image_url": URL}]},
}


@asynccontextmanager
async def online(tmp_path: Path, **settings: Any) -> AsyncIterator[tuple[Running, Network]]:
    """Yield a service that fetches images, and the network from which it fetches them."""
    async with open_network() as network, running(tmp_path, **{"image_urls": "*.example.com", **settings}) as run:
        await run.service.web_images.close()
        run.service.web_images = network.web(run.service.settings, run.service.lifecycle.buffer)
        yield run, network


async def post(run: Running, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await run.client.post(path, json=body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def same(body: Any) -> Any:
    """Return an answer without its durations."""
    return {name: value for name, value in body.items() if name != "timings"}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
async def test_url_in_each_form(tmp_path, form):
    async with online(tmp_path) as (run, network):
        assert same(await post(run, EMBED, {"input": form})) == same(await post(run, EMBED, {"input": TEXT}))
        assert len(network.heads) == 1


BODIES = {
    "embeddings": (EMBED, {"input": [TEXT, TEXT]}),
    "search": (f"{SHOP}/search", {"image": TEXT}),
    "region": (f"{SHOP}/search", {"region": {"image": TEXT, **BOX}}),
    "combine": (f"{SHOP}/search", {"combine": [{"id": "p1"}, {"image": TEXT}, {"image": TEXT, "weight": -0.5}]}),
    "rerank": (f"{SHOP}/search", {"image": TEXT, "rerank": "patches"}),
    "batch": (f"{SHOP}/search", {"queries": [{"image": TEXT}, {"id": "p1"}, {"combine": [{"image": TEXT}]}]}),
    "attention": ("/v1/attention", {"image": TEXT, "format": "json"}),
    "match": ("/v1/match", {"images": [TEXT, TEXT], "format": "json"}),
    "examples": (
        "/v1/classify",
        {"images": [TEXT], "classes": {"a": [TEXT], "b": base64.b64encode(photo(1)).decode()}},
    ),
    "collection": ("/v1/classify", {"images": TEXT, "collection": "shop", "label": "n"}),
    "analyze": ("/v1/analyze", {"image": TEXT, "outputs": ["class"], "classify": {"classes": {"a": TEXT}}}),
    "find-region": (f"{SHOP}/find-region", {"references": [{"image": TEXT, **BOX}], "min_score": 0}),
}


def with_urls(body: Any) -> Any:
    """Return a body with the URL of the image in place of the image."""
    if isinstance(body, dict):
        return {name: with_urls(value) for name, value in body.items()}
    if isinstance(body, list):
        return [with_urls(value) for value in body]
    return URL if body == TEXT else body


@pytest.mark.parametrize("name", BODIES)
async def test_routes_answer_a_url_like_its_image(tmp_path, name):
    path, body = BODIES[name]
    async with online(tmp_path) as (run, network):
        assert (await run.client.put(SHOP, json={"originals": True, "pooling": "mean"})).status_code < 300
        items = [
            {"id": f"p{i}", "image": base64.b64encode(photo(i)).decode(), "metadata": {"n": i % 2}} for i in range(6)
        ]
        await post(run, f"{SHOP}/items", {"items": items})
        expected = same(await post(run, path, body))
        assert network.heads == []
        found = same(await post(run, path, with_urls(body)))
    expected.pop("cursor", None), found.pop("cursor", None)
    assert found == expected
    assert len(network.heads) >= 1


async def test_items_keep_the_url_as_their_source(tmp_path):
    async with online(tmp_path) as (run, network):
        assert (await run.client.put(SHOP, json={"originals": True})).status_code < 300
        items = [
            {"id": "a", "image": {"image_url": f" {URL}"}},
            {"id": "b", "image": URL, "source": "shelf 3"},
            {"id": "c", "image": TEXT},
            {"image": URL},
        ]
        added = await post(run, f"{SHOP}/items", {"items": items})
        put = await run.client.put(f"{SHOP}/items/d", json={"image": URL})
        assert put.status_code == 201
        ids = [item["id"] for item in added["items"]]
        sources = [(await run.client.get(f"{SHOP}/items/{i}")).json().get("source") for i in [*ids, "d"]]
        stored = await run.client.get(f"{SHOP}/items/a/image")
    assert sources == [URL, "shelf 3", sources[2], URL, URL]
    assert URL not in sources[2]
    assert stored.content == IMAGE
    assert len(network.heads) == 2  # one for each request


async def test_urls_of_a_request_are_fetched_at_the_same_time(tmp_path):
    together = asyncio.Event()
    waiting: list[Any] = []

    async def with_others(writer):
        waiting.append(writer)
        await together.wait()
        writer.write(answer())

    urls = [f"https://images.example.com/{i}" for i in range(5)]
    queries = [*({"image": url} for url in urls[:3]), {"combine": [{"image": url} for url in urls[3:]]}]
    for path, body in (
        (EMBED, {"input": urls}),
        (f"{SHOP}/items", {"items": [{"image": url} for url in urls]}),
        (f"{SHOP}/search", {"queries": queries}),
    ):
        waiting.clear(), together.clear()
        async with online(tmp_path) as (run, network):
            await post(run, f"{SHOP}/items", {"items": [{"image": TEXT}]})
            network.answers = {f"/{i}": with_others for i in range(5)}
            task = asyncio.create_task(post(run, path, body))
            await until(lambda: len(waiting) == 5)
            together.set()
            await task


async def test_failed_urls_are_errors_of_their_own_images(tmp_path, monkeypatch):
    monkeypatch.setattr(web_images, "_STEP_S", 0.001)
    sent = [URL, "https://none.example.com/", "https://elsewhere.org/a.png", "http://images.example.com/", TEXT]
    async with online(tmp_path) as (run, _):
        body = await post(run, EMBED, {"input": sent, "on_error": "partial"})
        search = await post(run, f"{SHOP}/items", {"items": [{"image": url} for url in sent], "on_error": "partial"})
        alone = await run.client.post(EMBED, json={"input": sent[1]})
    for errors in (body["errors"], search["errors"]):
        assert [(error["index"], error["code"]) for error in errors] == [
            (1, "image_url_failed"),
            (2, "invalid_request"),
            (3, "invalid_request"),
        ]
    assert [row["index"] for row in body["data"]] == [0, 4]
    assert alone.status_code == 422
    assert alone.json()["error"]["code"] == "image_url_failed"


async def test_whole_request_is_checked_before_any_url_is_fetched(tmp_path):
    async with online(tmp_path, max_batch_items=2) as (run, network):
        for path, body in (
            (EMBED, {"input": [URL] * 3}),
            (f"{SHOP}/items", {"items": [{"image": URL}] * 3}),
            (f"{SHOP}/search", {"queries": [{"image": URL}] * 3}),
            (f"{SHOP}/search", {"combine": [{"image": URL}] * 3}),
            (f"{SHOP}/search", {"image": URL, "k": 0}),
        ):
            assert (await run.client.post(path, json=body)).status_code == 422
        assert network.resolved == []


async def test_without_the_setting_no_url_is_fetched(tmp_path):
    async with online(tmp_path, image_urls=None) as (run, network):
        response = await run.client.post(EMBED, json={"input": URL})
        item = await run.client.post(f"{SHOP}/items", json={"items": [{"id": "a", "image": URL}]})
    assert response.json()["error"]["code"] == item.json()["code"] == "invalid_request"
    for text in (response.text, item.text):
        assert "its setting image_urls is not set" in text
        assert "DINOV2_IMAGE_URLS" in text
    assert network.resolved == []


async def test_metric_counts_urls(tmp_path, monkeypatch):
    async with running(tmp_path, image_urls="*") as run:
        monkeypatch.setattr(run.service.web_images, "_resolve", lambda host, port: ["10.0.0.1"])
        await run.client.post(EMBED, json={"input": URL})
        assert run.service.metrics.registry.get_sample_value("dinov2_image_urls_total", {"result": "failed"}) == 1
