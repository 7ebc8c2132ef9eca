"""Tests of what all routes have in common: HEAD, the Allow header, trailing slashes and error bodies."""

import pytest
from fastapi.routing import APIRoute

from tests.fakes import photo, running

SHOP = "/v1/collections/shop"


async def filled(run) -> dict[str, str]:
    """Create a collection with an item and a snapshot, and return a path for each GET route."""
    await run.client.put(SHOP, json={"originals": True})
    added = await run.client.post(f"{SHOP}/items", files={"file": photo()})
    item = added.json()["items"][0]["id"]
    snapshot = (await run.client.post(f"{SHOP}/snapshots")).json()["name"]
    export = {"kind": "export", "source": "dinov2_vits14"}
    job = (await run.client.post("/v1/jobs", json=export)).json()["id"]
    await run.client.post(f"/v1/jobs/{job}/cancel")
    await run.client.put("/v1/schedules/weekly", json=export | {"every": "6 h"})
    values = {"name": "shop", "item_id": item, "snapshot": snapshot, "job_id": job, "schedule": "weekly"}
    paths = {}
    for route in run.app.routes:
        if isinstance(route, APIRoute) and "GET" in route.methods:
            names = {"/v1/models/{name:path}": "dinov2_fake", "/assets/{name:path}": "style.css"}
            chosen = values | ({"name": names[route.path]} if route.path in names else {})
            paths[route.path] = route.path_format.format(**chosen)
    del paths["/v1/jobs/events"]  # its answer does not end
    return paths


async def test_head_is_answered_wherever_get_is(tmp_path):
    async with running(tmp_path) as run:
        paths = {**await filled(run), "docs": "/docs", "openapi": "/openapi.json"}
        assert len(paths) >= 14
        for path in paths.values():
            got, head = await run.client.get(path), await run.client.head(path)
            assert got.status_code == 200, path
            assert (head.status_code, head.content) == (200, b""), path
            assert head.headers["Content-Type"] == got.headers["Content-Type"]
            if path != "/metrics" and not path.endswith("/events"):
                assert head.headers["Content-Length"] == got.headers["Content-Length"], path
        lost = await run.client.head(f"{SHOP}/items/none")
        text = (await run.client.get("/metrics")).text
        document = (await run.client.get("/openapi.json")).json()
    assert lost.status_code == 404
    assert 'dinov2_requests_total{method="HEAD",route="/livez",status="200"} 1.0' in text
    assert not [path for path, operations in document["paths"].items() if "head" in operations]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/livez", "GET, HEAD"),
        ("/docs", "GET, HEAD"),
        ("/v1/embeddings", "POST"),
        ("/v1/embeddings/", "POST"),
        (SHOP, "DELETE, GET, HEAD, PUT"),
        (f"{SHOP}/items/scroll", "DELETE, GET, HEAD, PATCH, POST"),  # an item may have the id "scroll"
        (f"{SHOP}/snapshots", "GET, HEAD, POST"),
        ("/v1/aliases/best", "DELETE, PUT"),
    ],
)
async def test_allow_lists_the_methods_of_all_routes_with_the_path(tmp_path, path, allowed):
    async with running(tmp_path) as run:
        answer = await run.client.request("BREW", path)
        route_methods = {m for route in run.app.routes if getattr(route, "path", "") == path for m in route.methods}
    assert answer.status_code == 405
    listed = answer.headers["Allow"].split(", ")
    assert set(allowed.split(", ")) | route_methods <= set(listed)
    assert listed == sorted(listed)
    assert f"BREW is not allowed here; allowed methods: {answer.headers['Allow']}" in answer.text


async def test_head_on_a_route_without_get_is_not_allowed(tmp_path):
    async with running(tmp_path) as run:
        answer = await run.client.head("/v1/embeddings")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")


async def test_every_path_may_end_in_a_slash(tmp_path):
    async with running(tmp_path, hosts="*") as run:
        paths = {**await filled(run), "docs": "/docs"}
        del paths["/v1/collections/{name}/items/{item_id:path}"], paths["/"]
        for route, path in paths.items():
            answer = await run.client.get(f"{path}/", headers={"Host": "elsewhere.example"})
            assert answer.status_code == 200, path
            if route != "/metrics":
                assert answer.content == (await run.client.get(path)).content, path
            assert "elsewhere" not in str(answer.headers)
        embedded = await run.client.post("/v1/embeddings/", content=photo(), headers={"Content-Type": "image/png"})
        broken = await run.client.post("/v1/embeddings/", json={"input": "%"})
        found = await run.client.post(f"{SHOP}/search/", content=photo(), headers={"Content-Type": "image/png"})
        created = await run.client.put("/v1/collections/more/")
    assert [answer.status_code for answer in (embedded, found, created)] == [200, 200, 201]
    assert "error" in broken.json()  # OpenAI's format on this path too


async def test_an_item_whose_id_is_two_dots_does_not_delete_its_collection(tmp_path):
    async with running(tmp_path) as run:
        await run.client.post(f"{SHOP}/items", json={"items": [{"id": "..", "vector": [1.0] * 8}]})
        # This is what browsers, Node.js and curl send as DELETE .../shop/items/..
        assert (await run.client.delete(f"{SHOP}/")).status_code == 405
        assert (await run.client.get(SHOP)).json()["count"] == 1
        assert (await run.client.delete(SHOP)).status_code == 200


async def test_the_slash_at_the_end_of_an_items_id_belongs_to_the_id(tmp_path):
    items = [{"id": name, "vector": [1.0] * 8} for name in ("a", "a/", "b", "b/image", "b/image/")]
    sent = ("a", "a/", "a%2F", "b/", "b%2Fimage", "b%2Fimage%2F", "b%2Fimage/")
    async with running(tmp_path) as run:
        await run.client.post(f"{SHOP}/items", json={"items": items})
        ids = [(await run.client.get(f"{SHOP}/items/{name}")).json().get("id") for name in sent]
        nothing = await run.client.get(f"{SHOP}/items/")
    assert ids == ["a", "a/", "a/", None, "b/image", "b/image/", "b/image/"]
    assert nothing.status_code == 422


async def test_a_line_break_at_the_end_of_a_path_is_not_dropped(tmp_path):
    async with running(tmp_path) as run:
        await run.client.post(f"{SHOP}/items", json={"items": [{"id": "a", "vector": [1.0] * 8}]})
        answers = [await run.client.get(path) for path in ("/livez%0A", f"{SHOP}%0A", f"{SHOP}/items/a%0A")]
    assert [answer.status_code for answer in answers] == [404, 422, 422]


async def test_a_wrong_range_gets_a_problem(tmp_path):
    async with running(tmp_path) as run:
        await filled(run)
        name = (await run.client.get(f"{SHOP}/snapshots")).json()["data"][0]["name"]
        path = f"{SHOP}/snapshots/{name}"
        size = int((await run.client.head(path)).headers["Content-Length"])
        beyond = await run.client.get(path, headers={"Range": f"bytes={size}-"})
        malformed = await run.client.get(path, headers={"Range": "bytes=9-1"})
        part = await run.client.get(path, headers={"Range": "bytes=0-7"})
    assert (beyond.status_code, beyond.json()["code"]) == (416, "range_not_satisfiable")
    assert beyond.headers["Content-Range"] == f"bytes */{size}"
    assert (malformed.status_code, malformed.json()["code"]) == (400, "bad_request")
    assert beyond.headers["Content-Type"] == malformed.headers["Content-Type"] == "application/problem+json"
    assert (part.status_code, len(part.content)) == (206, 8)
