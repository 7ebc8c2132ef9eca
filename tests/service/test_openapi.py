"""Tests of the OpenAPI document: it describes every route, and every answer is as it says."""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from service.documented_schemas import FilterIn
from service.generations import Generations
from service.routes.direct import DirectRoute
from service.search import filters
from tests.cli.test_models import put_artifact
from tests.dict_store import DictStore
from tests.fakes import DIMS, FakeDinoTxt, Running, photo, running
from tests.service.vision.head_models import fake_with_depth

pytest.importorskip("jsonschema", reason="compares answers with JSON schemas: pip install '.[test]'")

from tests.contract import Contract

SHOP = "/v1/collections/shop"
PNG = {"Content-Type": "image/png"}
GOOD = [1.0] * DIMS
EXPORT = {"kind": "export", "source": "dinov2_vits14"}


def text(image: bytes) -> str:
    return base64.b64encode(image).decode()


@asynccontextmanager
async def checked(tmp_path, **options: Any) -> AsyncIterator[tuple[Running, Contract]]:
    """Start a service. Each answer that its client receives is compared with the document."""
    async with running(tmp_path, **options) as run:
        contract = Contract((await run.client.get("/openapi.json")).json())

        async def check(response):
            await response.aread()
            contract.check(response)

        run.client.event_hooks = {"response": [check]}
        yield run, contract


REFERENCE = {"image": text(photo(1)), "point": [20, 16]}
GOOD_REQUESTS: list[tuple[str, str, int, dict[str, Any]]] = [
    ("GET", "/livez", 200, {}),
    ("GET", "/readyz", 200, {}),
    ("GET", "/metrics", 200, {}),
    ("GET", "/v1/models", 200, {}),
    ("GET", "/v1/models/auto", 200, {}),
    ("POST", "/v1/embeddings", 200, {"json": {"input": text(photo())}}),
    ("POST", "/v1/embeddings", 200, {"json": {"input": [{"image": text(photo())}], "encoding_format": "base64"}}),
    ("POST", "/v1/embeddings", 200, {"json": {"input": [text(photo()), "a shoe"], "on_error": "partial"}}),
    ("POST", "/v1/embeddings", 200, {"files": [("file", photo(1)), ("file", photo(2))], "data": {"pooling": "mean"}}),
    ("POST", "/v1/embeddings?normalize=false&dimensions=8", 200, {"content": photo(), "headers": PNG}),
    ("POST", "/v1/match", 200, {"json": {"images": [text(photo(0)), text(photo(1))], "min_score": -1}}),
    ("POST", "/v1/match", 200, {"json": {"images": [text(photo(0)), text(photo(1))], "format": "png"}}),
    ("POST", "/v1/words", 200, {"json": {"image": text(photo()), "words": ["cat", "dog"]}}),
    ("POST", "/v1/words?words=cat,dog&format=rle", 200, {"content": photo(), "headers": PNG}),
    ("POST", "/v1/words", 200, {"json": {"image": text(photo()), "words": ["cat"], "format": "overlay"}}),
    ("POST", "/v1/depth", 200, {"json": {"image": text(photo()), "array": True}}),
    ("POST", "/v1/detect", 200, {"json": {"image": text(photo()), "min_score": 0}}),
    ("POST", "/v1/detect?format=overlay", 200, {"content": photo(), "headers": PNG}),
    (
        "POST",
        "/v1/analyze",
        200,
        {"json": {"image": text(photo()), "outputs": ["embedding", "mask", "boxes", "attention"]}},
    ),
    (
        "POST",
        "/v1/analyze",
        200,
        {"json": {"image": text(photo()), "outputs": ["class"], "classify": {"classes": {"a": text(photo())}}}},
    ),
    ("POST", "/v1/depth?format=png16", 200, {"content": photo(), "headers": PNG}),
    ("POST", "/v1/segment", 200, {"content": photo(), "headers": PNG}),
    ("POST", "/v1/segment?format=rle", 200, {"content": photo(), "headers": PNG}),
    ("POST", "/v1/segment", 200, {"files": {"file": photo()}, "data": {"format": "overlay", "include": "embedding"}}),
    ("POST", "/v1/segment", 200, {"json": {"image": text(photo()), "include": ["embedding"], "format": "png"}}),
    ("POST", "/v1/segment?method=cut&format=polygons&min_score=0", 200, {"content": photo(), "headers": PNG}),
    ("POST", "/v1/segment?method=multi&format=rle&min_score=0", 200, {"content": photo(), "headers": PNG}),
    ("POST", "/v1/segment?method=cluster&k=2&include=embedding", 200, {"content": photo(), "headers": PNG}),
    (
        "POST",
        "/v1/segment",
        200,
        {
            "json": {
                "image": text(photo()),
                "method": "prompt",
                "prompts": [{"points": [{"x": 20, "y": 16}]}, {"box": [8, 8, 20, 20]}],
                "format": "rle",
            }
        },
    ),
    ("POST", "/v1/detect?min_score=0", 200, {"content": photo(), "headers": PNG}),
    ("POST", "/v1/detect", 200, {"json": {"image": text(photo()), "method": "lost", "format": "overlay"}}),
    ("POST", "/v1/attention", 200, {"content": photo(), "headers": PNG}),
    ("POST", "/v1/attention?format=figure", 200, {"content": photo(), "headers": PNG}),
    ("POST", "/v1/attention", 200, {"json": {"image": text(photo()), "format": "npy", "blocks": "all", "heads": [0]}}),
    ("POST", "/v1/features", 200, {"json": {"images": [text(photo()), text(photo(1))], "layers": [0], "norm": False}}),
    ("POST", "/v1/features?format=pca", 200, {"content": photo(), "headers": PNG}),
    ("POST", "/v1/features?format=pca_npy&foreground=true", 200, {"content": photo(), "headers": PNG}),
    (
        "PUT",
        SHOP,
        201,
        {"json": {"originals": True, "pooling": "mean", "indexed": ["n"], "index": {"kind": "hnsw", "m": 16}}},
    ),
    (
        "PUT",
        SHOP,
        200,
        {"json": {"originals": True, "pooling": "mean", "indexed": ["n"], "index": {"kind": "hnsw", "m": 16}}},
    ),
    ("PUT", "/v1/collections/bare", 201, {}),
    ("POST", "/v1/originals/erase-unreferenced", 200, {}),
    ("POST", "/v1/originals/erase-unreferenced", 200, {"json": {"dry_run": True}}),
    ("GET", "/v1/collections", 200, {}),
    ("GET", SHOP, 200, {}),
    ("GET", f"{SHOP}/stats", 200, {}),
    ("POST", f"{SHOP}/items", 200, {"files": {"file": ("a.png", photo(1))}}),
    ("POST", f"{SHOP}/items?on_error=fail", 200, {"content": photo(2), "headers": PNG}),
    (
        "POST",
        f"{SHOP}/items",
        200,
        {
            "json": {"items": [{"id": f"p{i}", "image": text(photo(i)), "metadata": {"n": i % 2}} for i in range(4)]},
            "headers": {"Idempotency-Key": "k1"},
        },
    ),
    ("POST", f"{SHOP}/items", 200, {"json": {"items": [{"id": "v", "vector": GOOD, "source": "s"}]}}),
    ("POST", f"{SHOP}/items", 200, {"json": {"items": [{"id": "w", "vector": GOOD}, 7], "on_error": "partial"}}),
    ("GET", f"{SHOP}/items/p1?include=vector&encoding_format=base64", 200, {}),
    ("GET", f"{SHOP}/items/p1/image", 200, {}),
    ("PUT", f"{SHOP}/items/new", 201, {"content": photo(7), "headers": PNG}),
    ("PUT", f"{SHOP}/items/new?source=s", 200, {"content": photo(8), "headers": PNG}),
    ("PUT", f"{SHOP}/items/new", 200, {"json": {"image": text(photo(8)), "metadata": {"n": 3}}}),
    ("PUT", f"{SHOP}/items/new", 200, {"files": {"file": photo(8)}, "data": {"metadata": '{"n": 3}', "source": "s"}}),
    ("POST", f"{SHOP}/items/facets", 200, {"json": {"key": "n", "filter": {"field": "id", "prefix": "p"}}}),
    ("POST", f"{SHOP}/items/scroll", 200, {"json": {"order_by": {"key": "n", "direction": "desc"}}}),
    ("POST", f"{SHOP}/items?id=q&source=s", 200, {"content": photo(9), "headers": PNG}),
    (
        "POST",
        f"{SHOP}/items",
        200,
        {
            "files": [("file", photo(1)), ("file", photo(2))],
            "data": {"id": ["f1", "f2"], "metadata": ['{"n": 1}', "{}"]},
        },
    ),
    ("PATCH", SHOP, 200, {"json": {"indexed": []}}),
    ("PATCH", f"{SHOP}/items/p1", 200, {"json": {"metadata": {"red": True, "n": None}}}),
    ("POST", f"{SHOP}/items/count", 200, {"json": {"filter": {"not": {"key": "n", "in": [1, 2]}}}}),
    ("POST", f"{SHOP}/items/scroll", 200, {"json": {"limit": 2, "include": ["vector"]}}),
    ("POST", f"{SHOP}/search", 200, {"json": {"id": "p2", "k": 2.0, "include": ["vector"], "params": {"exact": True}}}),
    ("POST", f"{SHOP}/search", 200, {"json": {"vector": GOOD, "group_by": "n", "group_size": 2}}),
    ("POST", f"{SHOP}/search", 200, {"json": {"image": text(photo(1)), "rerank": "patches", "matches": True}}),
    ("POST", f"{SHOP}/search", 200, {"json": {"region": {"image": text(photo()), "box": [0, 0, 20, 20]}}}),
    ("POST", f"{SHOP}/search", 200, {"json": {"combine": [{"id": "p1"}, {"vector": GOOD, "weight": -1}]}}),
    ("POST", f"{SHOP}/search", 200, {"json": {"queries": [{"id": "p1"}, {"id": "no"}], "on_error": "partial"}}),
    ("POST", f"{SHOP}/search?k=3&include=vector", 200, {"content": photo(), "headers": PNG}),
    ("POST", f"{SHOP}/search", 200, {"files": {"file": photo()}, "data": {"filter": '{"key": "n", "gt": 0}'}}),
    ("POST", "/v1/classify", 200, {"json": {"images": text(photo()), "collection": "shop", "label": "n"}}),
    (
        "POST",
        "/v1/classify",
        200,
        {
            "json": {
                "images": [text(photo()), "a shoe"],
                "on_error": "partial",
                "classes": {"a": text(photo(1)), "b": [{"image": text(photo(2))}]},
            }
        },
    ),
    ("POST", "/v1/classify?collection=shop&label=n&k=3", 200, {"content": photo(), "headers": PNG}),
    (
        "POST",
        "/v1/classify",
        200,
        {"files": {"file": photo()}, "data": {"collection": "shop", "label": "n", "filter": '{"key": "n", "gt": 0}'}},
    ),
    ("POST", f"{SHOP}/find-region", 200, {"json": {"references": [REFERENCE], "min_score": 0, "limit": 2}}),
    ("POST", f"{SHOP}/find-region", 200, {"json": {"references": [{"id": "p2", "box": [9, 5, 9, 9]}], "limit": 1}}),
    ("POST", f"{SHOP}/duplicates", 200, {"json": {}}),
    ("POST", f"{SHOP}/duplicates", 200, {"json": {"by": "similarity", "threshold": 0.9}}),
    ("POST", f"{SHOP}/items/delete", 200, {"json": {"ids": ["w", "nobody"]}}),
    ("DELETE", f"{SHOP}/items/v", 200, {}),
    ("PUT", "/v1/aliases/live", 201, {"json": {"collection": "shop"}}),
    ("PUT", "/v1/aliases/live", 200, {"json": {"collection": "bare"}}),
    ("GET", "/v1/aliases", 200, {}),
    ("DELETE", "/v1/aliases/live", 200, {}),
    ("POST", f"{SHOP}/snapshots", 201, {}),
    ("GET", f"{SHOP}/snapshots", 200, {}),
    ("GET", f"{SHOP}/snapshots/SNAPSHOT", 200, {}),
    ("GET", f"{SHOP}/snapshots/SNAPSHOT", 206, {"headers": {"Range": "bytes=0-9"}}),
    ("POST", "/v1/collections/copy/restore", 201, {"json": {"snapshot": "SNAPSHOT", "from": "shop"}}),
    ("GET", f"{SHOP}/snapshots/SNAPSHOT", 416, {"headers": {"Range": "bytes=99999999-"}}),
    ("GET", f"{SHOP}/snapshots/SNAPSHOT", 400, {"headers": {"Range": "bytes=x"}}),
    ("DELETE", f"{SHOP}/snapshots/SNAPSHOT", 200, {}),
    ("DELETE", f"/v1/originals/{sha256(photo(8)).hexdigest()}", 409, {}),
    ("DELETE", f"/v1/originals/{sha256(photo(8)).hexdigest()}?items=delete", 200, {}),
    ("DELETE", SHOP, 200, {}),
    ("GET", "/v1/jobs", 200, {}),
    ("POST", "/v1/jobs", 202, {"json": EXPORT | {"not_before": "2030-01-01T00:00:00Z"}}),
    ("POST", "/v1/jobs", 201, {"json": EXPORT | {"every": "sunday 03:00", "zone": "UTC"}}),
    ("GET", "/v1/jobs?state=queued,running&kind=export&limit=2", 200, {}),
    ("GET", "/v1/jobs/JOB?log=100", 200, {}),
    ("GET", "/v1/jobs/JOB/log?after=0&limit=10", 200, {}),
    ("GET", "/v1/jobs/JOB/events?follow=none", 200, {}),
    ("GET", "/v1/jobs/events?follow=none&last_event_id=0", 200, {}),
    ("POST", "/v1/jobs/JOB/cancel", 200, {}),
    ("GET", "/v1/jobs/JOB/events", 204, {"headers": {"Last-Event-ID": "3"}}),
    ("POST", "/v1/jobs/JOB/retry", 200, {"json": {}}),
    ("POST", "/v1/jobs/JOB/cancel", 200, {}),
    ("DELETE", "/v1/jobs/JOB", 200, {}),
    ("PUT", "/v1/schedules/weekly", 201, {"json": EXPORT | {"every": "6 h"}}),
    ("PUT", "/v1/schedules/weekly", 200, {"json": EXPORT | {"every": "daily 02:30", "zone": None}}),
    ("GET", "/v1/schedules/weekly", 200, {}),
    ("GET", "/v1/schedules", 200, {}),
    ("DELETE", "/v1/schedules/weekly", 200, {}),
    ("POST", "/v1/jobs", 202, {"json": EXPORT, "headers": {"Idempotency-Key": "waits"}}),
    ("POST", "/v1/jobs/WAITING/approve", 200, {}),
]

BAD_REQUESTS: list[tuple[str, str, int, dict[str, Any]]] = [
    ("GET", "/v1/models/gpt", 404, {}),
    ("DELETE", "/v1/models/gpt", 404, {}),
    ("POST", "/v1/models/rollback", 409, {}),
    ("POST", "/v1/models/load", 404, {"json": {"model": "gpt"}}),
    ("POST", "/v1/models/unload", 404, {"json": {"model": "gpt"}}),
    ("POST", "/v1/embeddings", 400, {"content": b"{", "headers": {"Content-Type": "application/json"}}),
    ("POST", "/v1/embeddings", 400, {"json": {"input": text(photo()), "dimensions": 7}}),
    ("POST", "/v1/embeddings", 404, {"json": {"input": text(photo()), "model": "gpt"}}),
    ("POST", "/v1/embeddings", 413, {"content": bytes(300_000), "headers": PNG}),
    ("POST", "/v1/embeddings", 415, {"content": b"%PDF", "headers": PNG}),
    ("POST", "/v1/embeddings", 422, {"json": {"input": ["a red shoe", "https://example.com/a.jpg"]}}),
    ("POST", "/v1/match", 415, {"content": b"x", "headers": {"Content-Type": "text/plain"}}),
    ("POST", "/v1/match", 422, {"json": {"images": [text(photo())]}}),
    ("POST", "/v1/words", 422, {"json": {"image": text(photo()), "words": []}}),
    ("POST", "/v1/depth", 422, {"json": {"image": text(photo()), "head": "none"}}),
    ("POST", "/v1/detect?max_objects=0", 422, {"content": photo(), "headers": PNG}),
    ("POST", "/v1/analyze?outputs=all", 422, {"content": photo(), "headers": PNG}),
    ("POST", "/v1/segment", 415, {"content": b"x", "headers": {"Content-Type": "text/plain"}}),
    ("POST", "/v1/detect?method=yolo", 422, {"content": photo(), "headers": PNG}),
    ("POST", "/v1/segment", 422, {"content": photo()[:60], "headers": PNG}),
    ("POST", "/v1/classify", 404, {"json": {"images": text(photo()), "collection": "none", "label": "n"}}),
    ("POST", "/v1/classify", 422, {"json": {"images": text(photo())}}),
    ("POST", "/v1/attention?blocks=1", 422, {"content": photo(), "headers": PNG}),
    ("POST", "/v1/features?layers=1", 422, {"content": photo(), "headers": PNG}),
    ("PUT", "/v1/collections/UP", 422, {}),
    ("PUT", "/v1/collections/bare", 409, {"json": {"dtype": "float16"}}),
    ("PUT", "/v1/collections/bare", 415, {"content": b"x"}),
    ("GET", "/v1/collections/none", 404, {}),
    ("GET", "/v1/collections/none/stats", 404, {}),
    ("DELETE", "/v1/collections/none", 404, {}),
    ("POST", "/v1/collections/bare/items", 422, {"json": {"items": []}}),
    ("POST", "/v1/collections/bare/items", 409, {"json": {"items": [{"id": "v", "vector": [1.0]}]}}),
    ("GET", "/v1/collections/bare/items/none", 404, {}),
    ("GET", "/v1/collections/bare/items/none?include=x", 422, {}),
    ("GET", "/v1/collections/bare/items/none/image", 404, {}),
    ("PATCH", "/v1/collections/bare", 422, {"json": {}}),
    ("PUT", "/v1/collections/bare/items/a", 422, {"json": {"id": "b", "image": text(photo())}}),
    ("POST", "/v1/collections/bare/items/facets", 422, {"json": {"key": ""}}),
    ("PATCH", "/v1/collections/bare/items/none", 404, {"json": {"metadata": {}}}),
    ("DELETE", "/v1/collections/bare/items/none", 404, {}),
    ("POST", "/v1/collections/bare/items/count", 422, {"json": {"filter": {"key": "a"}}}),
    ("POST", "/v1/collections/bare/items/scroll", 422, {"json": {"limit": 0}}),
    ("POST", "/v1/collections/bare/items/delete", 422, {"json": {}}),
    ("POST", "/v1/collections/bare/search", 404, {"json": {"id": "none"}}),
    ("POST", "/v1/collections/bare/search", 409, {"json": {"vector": [1.0]}}),
    ("POST", "/v1/collections/bare/search", 422, {"json": {"k": 0}}),
    ("POST", "/v1/collections/bare/duplicates", 422, {"json": {"threshold": 0.9}}),
    ("POST", "/v1/collections/none/find-region", 404, {"json": {"references": [REFERENCE]}}),
    ("POST", "/v1/collections/bare/find-region", 422, {"json": {"references": [REFERENCE]}}),
    ("PUT", "/v1/aliases/live", 404, {"json": {"collection": "none"}}),
    ("DELETE", "/v1/aliases/none", 404, {}),
    ("DELETE", f"/v1/originals/{'0' * 64}", 404, {}),
    ("DELETE", "/v1/originals/all", 422, {}),
    ("POST", "/v1/originals/erase-unreferenced", 422, {"json": {"dry_run": "perhaps"}}),
    ("POST", "/v1/collections/none/snapshots", 404, {}),
    ("GET", "/v1/collections/UP/snapshots", 422, {}),
    ("GET", "/v1/collections/bare/snapshots/20260101T000000.000Z", 404, {}),
    ("DELETE", "/v1/collections/bare/snapshots/none", 422, {}),
    ("POST", "/v1/collections/new/restore", 404, {"json": {"snapshot": "20260101T000000.000Z"}}),
    ("POST", "/v1/jobs", 422, {"json": {"kind": "export"}}),
    ("POST", "/v1/jobs", 409, {"json": EXPORT | {"name": "other"}, "headers": {"Idempotency-Key": "waits"}}),
    ("GET", "/v1/jobs?state=asleep", 422, {}),
    ("GET", "/v1/jobs?before=none", 404, {}),
    ("GET", "/v1/jobs/none", 404, {}),
    ("GET", "/v1/jobs/none/log", 404, {}),
    ("GET", "/v1/jobs/none/events", 404, {}),
    ("GET", "/v1/jobs/events?last_event_id=x", 422, {}),
    ("POST", "/v1/jobs/none/cancel", 404, {}),
    ("POST", "/v1/jobs/none/approve", 404, {}),
    ("POST", "/v1/jobs/WAITING/approve", 409, {}),
    ("POST", "/v1/jobs/WAITING/retry", 409, {}),
    ("DELETE", "/v1/jobs/WAITING", 409, {}),
    ("PUT", "/v1/schedules/weekly", 422, {"json": EXPORT | {"every": "sometimes"}}),
    ("GET", "/v1/schedules/none", 404, {}),
    ("DELETE", "/v1/schedules/none", 404, {}),
]


def waiting_job(run: Running, job_id: str) -> str:
    """Make a queued job wait for approval, as its worker would. Return its id."""
    store = run.app.state.jobs.store()
    job = store.claim("worker", ["export"], 60, job_id)
    store.wait_for_approval(job.lease, "approval")
    return job_id


def with_a_former(data_dir: Path) -> Generations:
    """Return a record in which one model was live before another."""
    generations = Generations(data_dir)
    for digit in "ab":
        live = generations.live()
        new = generations.add(digit * 64, f"model_{digit}", data_dir, "fake", "fp32", reason="test")
        generations.promote(new.number, expected=live.number if live else None, keep_s=60)
    return generations


async def test_every_answer_is_as_the_document_says(tmp_path, monkeypatch):
    monkeypatch.setattr("service.vision.words.open_dinotxt", lambda artifact, name: FakeDinoTxt())
    snapshot = ""
    made = {"JOB": "", "WAITING": ""}  # the ids of jobs
    artifact = fake_with_depth(tmp_path / "model")
    async with checked(tmp_path, artifact=artifact, max_body_bytes=200_000, max_image_bytes=200_000) as (run, contract):
        for method, path, status, options in GOOD_REQUESTS + BAD_REQUESTS:
            if "json" in options:
                options = options | {"json": json.loads(json.dumps(options["json"]).replace("SNAPSHOT", snapshot))}
            for name, value in {"SNAPSHOT": snapshot, **made}.items():
                path = path.replace(name, value)
            answer = await run.client.request(method, path, **options)
            assert answer.status_code == status, f"{method} {path}: {answer.text}"
            if status == 202 and "headers" in options:
                made["WAITING"] = waiting_job(run, answer.json()["id"])
            elif status == 202:
                made["JOB"] = answer.json()["id"]
            if path.endswith("/snapshots") and status == 201:
                snapshot = answer.json()["name"]
        run.service.generations = with_a_former(tmp_path)
        for digit in "ac":
            put_artifact(tmp_path, digit)
        assert (await run.client.post("/v1/models/load", json={"model": "model_c"})).status_code == 202
        assert (await run.client.post("/v1/models/unload", json={"model": "model_c"})).status_code == 200
        assert (await run.client.delete("/v1/models/model_c")).status_code == 200
        assert (await run.client.post("/v1/models/rollback")).status_code == 200
    operations = [op for methods in contract.document["paths"].values() for op in methods.values()]
    assert {operation["operationId"] for operation in operations} == {name for name, _ in contract.seen}
    for operation in operations:
        declared, name = {int(status) for status in operation["responses"]}, operation["operationId"]
        unseen = {status for status in declared if status < 300} - {status for n, status in contract.seen if n == name}
        assert not unseen, f"{name} never answered {unseen}"
        if operation["tags"] != ["health"] and not name.startswith("list_"):
            assert any(status >= 400 for n, status in contract.seen if n == name), f"{name} never failed"


async def test_answers_when_the_service_cannot_answer(tmp_path):
    async with checked(tmp_path) as (run, contract):
        run.engine.fails = lambda pixels: True
        assert (await run.client.post("/v1/embeddings", json={"input": text(photo())})).status_code == 500
        run.app.state.lifecycle.draining = True
        for path in ("/readyz", "/v1/models", SHOP):
            assert (await run.client.get(path)).status_code == 503
        assert (await run.client.post("/v1/embeddings", json={"input": text(photo())})).status_code == 503
        assert (await run.client.get("/livez")).status_code == 200
    assert ("create_embeddings", 500) in contract.seen


async def test_a_store_without_snapshots(tmp_path):
    async with checked(tmp_path, store=DictStore()) as (run, _):
        for method, path in (("POST", "snapshots"), ("GET", "snapshots"), ("GET", "stats"), ("GET", "snapshots/a")):
            answer = await run.client.request(method, f"{SHOP}/{path}")
            assert answer.status_code == 422


async def test_the_document_describes_every_route(tmp_path):
    async with running(tmp_path) as run:
        document = (await run.client.get("/openapi.json")).json()
        routes = [route for route in run.app.routes if isinstance(route, DirectRoute) and route.include_in_schema]
    written = json.dumps(document)
    assert "HTTPValidationError" not in written
    assert "$defs" not in written
    for name in {part.split('"')[0] for part in written.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"]
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids)) == len(routes)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            content = [c for response in operation["responses"].values() for c in response["content"].values()]
            assert content, f"{method} {path} has no documented answer"
            assert all(value["schema"] for value in content)
            names = [parameter["name"] for parameter in operation["parameters"]]
            assert "X-Request-ID" in names
            assert all(f"{{{name}}}" in path for name in names if f"{{{name}}}" in path)
            if method in ("post", "put", "patch"):
                assert operation["requestBody"]["content"], f"{method} {path} has no documented body"


async def test_what_the_document_says_of_uploads_names_and_headers(tmp_path):
    async with running(tmp_path) as run:
        document = (await run.client.get("/openapi.json")).json()
    forms = {"application/json", "multipart/form-data", "application/octet-stream", "image/*"}
    for path in ("/v1/embeddings", "/v1/segment", "/v1/collections/{name}/items", "/v1/collections/{name}/search"):
        assert set(document["paths"][path]["post"]["requestBody"]["content"]) == forms
    items = document["paths"]["/v1/collections/{name}/items"]["post"]
    parameters = {parameter["name"]: parameter for parameter in items["parameters"]}
    assert parameters["Idempotency-Key"]["in"] == "header"
    assert parameters["on_error"]["schema"]["enum"] == ["fail", "partial"]
    assert parameters["name"]["schema"]["pattern"] == "^[a-z0-9][a-z0-9_-]{0,63}$"
    search = document["paths"]["/v1/collections/{name}/search"]["post"]
    parameters = {parameter["name"]: parameter["schema"] for parameter in search["parameters"]}
    assert parameters["filter"]["contentMediaType"] == "application/json"
    assert parameters["k"] == {"type": "integer", "minimum": 1, "maximum": 1000}
    assert {"image", "vector", "queries"} <= document["components"]["schemas"]["SearchIn"]["properties"].keys()
    assert document["components"]["schemas"]["SearchIn"]["properties"]["k"]["anyOf"][-1] == {"type": "null"}
    embeddings = document["paths"]["/v1/embeddings"]["post"]["responses"]
    assert "Retry-After" in embeddings["503"]["headers"]
    assert {"Retry-After", "RateLimit", "RateLimit-Policy"} <= set(embeddings["429"]["headers"])
    assert "429" not in document["paths"]["/livez"]["get"]["responses"]
    assert embeddings["422"]["content"] == {
        "application/json": {"schema": {"$ref": "#/components/schemas/OpenAIError"}}
    }


def test_the_documented_filter_has_all_operators():
    names = {field.alias or name for name, field in FilterIn.model_fields.items()}
    assert names == {"key", "field", "and", "or", "not", *filters._OPERATORS}
