"""Tests of the setting root_path: the service works behind a proxy that publishes it under a path prefix."""

import pytest

from service.settings import load_settings
from tests.fakes import photo, running

PREFIX = "/images"


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["the proxy removes it", "the proxy passes it on"])
async def test_requests_come_with_or_without_the_prefix(tmp_path, prefix):
    async with running(tmp_path, root_path=PREFIX) as run:
        embedded = await run.client.post(
            f"{prefix}/v1/embeddings", content=photo(), headers={"Content-Type": "image/jpeg"}
        )
        made = await run.client.put(f"{prefix}/v1/collections/shop", json={})
        counted = await run.client.get(f"{prefix}/v1/collections/shop/")
        ready = await run.client.get(f"{prefix}/readyz")
        lost = await run.client.get(f"{prefix}/nothing")
    assert embedded.status_code == 200
    assert made.status_code == 201
    assert counted.status_code == 200
    assert ready.status_code == 200
    assert (lost.status_code, lost.json()["instance"]) == (404, f"{PREFIX}/nothing")


async def test_only_the_whole_prefix_is_removed_and_only_once(tmp_path):
    async with running(tmp_path, root_path=PREFIX) as run:
        for path in ("/imagesx/readyz", "/images/images/readyz", "/Images/readyz", "/imagesreadyz"):
            assert (await run.client.get(path)).status_code == 404, path
        assert "dinov2-service" in (await run.client.get(PREFIX)).text  # the playground


async def test_an_error_on_a_path_with_the_prefix_keeps_its_format(tmp_path):
    """On /v1/embeddings errors have OpenAI's format, and an item's id may look like the prefix."""
    async with running(tmp_path, root_path=PREFIX) as run:
        broken = await run.client.post(f"{PREFIX}/v1/embeddings", json={"input": 5})
        await run.client.put("/v1/collections/shop", json={})
        item = await run.client.get(f"{PREFIX}/v1/collections/shop/items/images/readyz")
    assert set(broken.json()) == {"error"}
    assert item.json()["code"] == "item_not_found"


async def test_the_documents_link_to_the_prefix(tmp_path):
    async with running(tmp_path, root_path=PREFIX) as run:
        document = (await run.client.get(f"{PREFIX}/openapi.json")).json()
        page = (await run.client.get(f"{PREFIX}/docs")).text
    assert document["servers"] == [{"url": PREFIX}]
    assert "/v1/embeddings" in document["paths"]
    assert f'href="{PREFIX}/openapi.json"' in page


async def test_without_a_prefix_nothing_changes(tmp_path):
    async with running(tmp_path) as run:
        document = (await run.client.get("/openapi.json")).json()
        page = (await run.client.get("/docs")).text
        lost = (await run.client.get("/images/readyz")).json()
    assert document["servers"] == [{"url": "/"}]
    assert 'href="/openapi.json"' in page
    assert lost["instance"] == "/images/readyz"


@pytest.mark.parametrize(("value", "read"), [("", ""), ("/", ""), ("/a/", "/a"), ("/a/b-c_d.e~f", "/a/b-c_d.e~f")])
def test_prefixes_that_are_allowed(value, read):
    assert load_settings({"root_path": value}).root_path == read


@pytest.mark.parametrize(
    "value", ["images", "//images", "/a//b", "/a b", "/a?b", "/a%20b", "https://x/a", "/v1", "/readyz/x", "/docs/"]
)
def test_prefixes_that_are_refused(value):
    with pytest.raises(ValueError, match=r"root_path=.*must"):
        load_settings({"root_path": value})
