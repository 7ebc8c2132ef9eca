"""Tests of /livez and /readyz: the effect of each condition on them, and that a dead Redis only costs cache hits."""

import asyncio
import base64
import hashlib
import re
import shutil
import socket
import sys
import threading
import time

import pytest

from service.backup import back_up
from service.errors import Unavailable
from service.features import engine_faults
from service.features.cache import MemoryCache
from service.outcomes import numbered
from service.search import opening
from service.search.database import find
from service.telemetry import MOST_COLLECTIONS, OTHERS
from tests.dict_store import DictStore
from tests.fakes import DIMS, FakeEngine, photo, running, until


async def test_a_well_service(tmp_path):
    async with running(tmp_path) as run:
        live, ready = await run.client.get("/livez"), await run.client.get("/readyz")
    assert (live.status_code, ready.status_code) == (200, 200)
    assert ready.json()["status"] == "ready"
    assert ready.json()["fingerprint"] == "a" * 64


async def test_a_hung_worker_is_not_alive_and_recovers(tmp_path):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, hang_timeout_s=0.05) as run:
        engine.gate = threading.Event()
        waiting = asyncio.create_task(run.embed([photo()]))
        await until(engine.entered.is_set)
        await until(lambda: run.service.pipeline.batcher.health() is not None)
        hung = await run.client.get("/livez")
        engine.gate.set()
        await waiting
        well = await run.client.get("/livez")
    assert (hung.status_code, well.status_code) == (503, 200)
    assert "one forward pass" in hung.text


async def test_a_gpu_that_only_a_new_process_can_use_turns_livez_and_readyz_red(tmp_path):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine) as run:
        engine.error = RuntimeError("CUDA failure 719: unspecified launch failure ; GPU=0")
        failed = await run.client.post("/v1/embeddings", json={"input": base64.b64encode(photo()).decode()})
        await until(lambda: run.service.pipeline.batcher.health() is not None)
        live, ready = await run.client.get("/livez"), await run.client.get("/readyz")
        engine.error = None
        refused = await run.client.post("/v1/embeddings", json={"input": base64.b64encode(photo(1)).decode()})
        metrics = (await run.client.get("/metrics")).text
    assert failed.status_code == 500
    assert [answer.status_code for answer in (live, ready, refused)] == [503, 503, 503]
    assert "the GPU has failed" in live.json()["reason"]
    assert "719" not in live.text + ready.text + refused.text
    assert "dinov2_engine_up 0.0" in metrics


async def test_an_engine_that_always_fails_turns_livez_and_readyz_red(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_faults, "PROBE_S", 0.01)
    engine = FakeEngine()
    async with running(tmp_path, engine=engine) as run:
        engine.fails = lambda pixels: True
        await run.embed([photo()])
        await until(lambda: run.service.pipeline.batcher.health() is not None)
        red = [(await run.client.get(path)).status_code for path in ("/livez", "/readyz")]
        engine.fails = lambda pixels: False
        await until(lambda: run.service.pipeline.batcher.health() is None)
        green = [(await run.client.get(path)).status_code for path in ("/livez", "/readyz")]
    assert (red, green) == ([503, 503], [200, 200])


async def test_a_full_queue_is_alive_and_not_ready(tmp_path):
    async with running(tmp_path, queue_max_images=2) as run:
        run.service.pipeline.batcher.reserve(1, "one")
        run.service.pipeline.batcher.reserve(1, "other")
        live, ready = await run.client.get("/livez"), await run.client.get("/readyz")
        run.service.pipeline.batcher.release(1, "other")
        again = await run.client.get("/readyz")
    assert [answer.status_code for answer in (live, ready, again)] == [200, 503, 200]


async def test_one_client_alone_cannot_make_the_service_unready(tmp_path):
    async with running(tmp_path, queue_max_images=8) as run:
        gate = run.engine.gate = threading.Event()
        images = {"input": [base64.b64encode(photo(i)).decode() for i in range(8)]}
        filling = asyncio.create_task(run.client.post("/v1/embeddings", json=images))
        await until(lambda: run.service.pipeline.batcher.images == 8)
        more = await run.client.post("/v1/embeddings", json={"input": base64.b64encode(photo(9)).decode()})
        ready = await run.client.get("/readyz")
        gate.set()
        assert (await filling).status_code == 200
    assert (more.status_code, more.json()["error"]["code"]) == (429, "share_used")
    assert ready.status_code == 200


async def test_a_dead_redis_is_degraded_and_still_ready(tmp_path, caplog):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    body = {"input": base64.b64encode(photo()).decode()}
    async with running(tmp_path, redis_url=f"redis://:s3cret@127.0.0.1:{port}/0") as run:
        answers = [await run.client.post("/v1/embeddings", json=body) for _ in range(2)]
        ready = await run.client.get("/readyz")
        for _ in range(3):
            await run.client.get("/readyz")
        text = (await run.client.get("/metrics")).text
    assert [answer.status_code for answer in answers] == [200, 200]
    assert ready.status_code == 200
    assert ready.json()["status"] == "degraded"
    assert ready.json()["cache"] == {"name": "redis", "status": "degraded: ConnectionError"}
    assert "127.0.0.1" not in ready.text
    assert str(port) not in ready.text
    said = [record.getMessage() for record in caplog.records if record.name == "service.routes.health"]
    assert len(said) < 4  # when it changes, not at each request
    assert f"127.0.0.1:{port}" in said[0]
    assert "s3cret" not in str(said)
    assert 'dinov2_cache_events_total{event="error"}' in text
    assert "dinov2_cache_up 0.0" in text


async def test_a_service_that_is_not_warm_is_not_ready_and_no_proxy_may_keep_the_answer(tmp_path):
    async with running(tmp_path) as run:
        run.service.lifecycle.warm = False
        answers = [await run.client.get("/livez"), await run.client.get("/readyz")]
    assert [answer.status_code for answer in answers] == [200, 503]
    assert answers[1].json()["reasons"] == {"warm_up": "not warmed up"}
    assert [answer.headers["Cache-Control"] for answer in answers] == ["no-store"] * 2


async def test_what_is_not_ready_is_not_called_degraded(tmp_path):
    class Down(MemoryCache):
        async def status(self):
            return "degraded: redis: get: ConnectionError: refused"

    async with running(tmp_path, queue_max_images=2, cache=Down(0)) as run:
        assert (await run.client.get("/readyz")).json()["status"] == "degraded"
        run.service.pipeline.batcher.reserve(1, "one")
        run.service.pipeline.batcher.reserve(1, "other")
        body = (await run.client.get("/readyz")).json()
    assert (body["status"], body["reasons"]) == ("unready", {"queue": "full"})
    assert body["cache"]["status"] == "degraded: ConnectionError"


@pytest.mark.parametrize("moved", ["data", "data/originals"])
async def test_a_data_folder_that_was_replaced_is_not_ready(tmp_path, moved):
    async with running(tmp_path / "data") as run:
        await run.service.originals.put(photo())
        assert await sample(run, "data_dir_in_place") == 1
        (tmp_path / moved).rename(tmp_path / "gone")
        (tmp_path / moved).mkdir()
        answer = await run.client.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "unready")
        assert answer.json()["reasons"] == {"storage": "the data folder was removed or replaced"}
        assert await sample(run, "data_dir_in_place") == 0
        assert (await run.client.get("/livez")).status_code == 200


async def test_a_full_disk_and_a_damaged_collection_are_degraded_and_still_ready(tmp_path):
    async with running(tmp_path) as run:
        for metric in ("data_dir_only_deletions", "damaged_collections"):
            assert await sample(run, metric) == 0
        await run.client.put("/v1/collections/shop")
        access = run.service.store._access
        access.damage.mark(await access.read(lambda db: find(db, "shop")), ValueError("torn"))
        access.reserve.size = 2**62  # the disk has less than a quarter of it
        answer = await run.client.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
        assert answer.json()["reasons"] == {
            "storage": "the disk is full: writes are refused, deletions are not",
            "collections": "1 damaged",
        }
        for metric in ("data_dir_only_deletions", "damaged_collections"):
            assert await sample(run, metric) == 1


async def test_no_cache_at_all_asks_no_redis(tmp_path):
    async with running(tmp_path, redis_url="redis://127.0.0.1:1/0", cache_bytes=0) as run:
        assert (await run.client.get("/readyz")).json()["cache"] == {"name": "memory", "status": "ok"}


async def test_redis_keeps_a_vector_as_long_as_the_settings_say(tmp_path, redis_server):
    async with running(tmp_path, redis_url=redis_server.url, cache_ttl_s=77) as run:
        await run.embed([photo()])
        [key] = redis_server.client().keys("*")
        assert 70 < redis_server.client().ttl(key) <= 77


async def sample(run, name, **labels):
    """Read /metrics and return the value of one metric."""
    await run.client.get("/metrics")
    return run.service.metrics.registry.get_sample_value(f"dinov2_{name}", labels)


async def test_the_state_of_the_queue_and_of_the_engine_are_metrics(tmp_path):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, hang_timeout_s=0.05, queue_max_images=9) as run:
        assert await sample(run, "queue_oldest_seconds") == 0
        assert await sample(run, "engine_up") == 1
        assert await sample(run, "queue_images_limit") == 9
        assert await sample(run, "decode_workers") == 2
        engine.gate = threading.Event()
        waiting = [asyncio.create_task(run.embed([photo(0)]))]
        await until(engine.entered.is_set)
        waiting.append(asyncio.create_task(run.embed([photo(1)])))
        await until(lambda: run.service.pipeline.batcher.waiting == 1)
        await asyncio.sleep(0.08)
        assert 0.08 <= await sample(run, "queue_oldest_seconds") < 5
        assert (await sample(run, "queue_images"), await sample(run, "queue_patches")) == (2, 4)
        assert await sample(run, "engine_up") == 0
        engine.gate.set()
        await asyncio.gather(*waiting)
        assert await sample(run, "queue_oldest_seconds") == 0
        assert await sample(run, "engine_up") == 1


async def test_the_queues_of_two_models_are_added_up(tmp_path):
    async with running(tmp_path) as run, running(tmp_path / "other") as other:
        run.service.loaded.services = {("b", "fp32"): other.service, ("a", "fp32"): run.service}
        run.service.pipeline.batcher.reserve(2)
        other.service.pipeline.batcher.reserve(3)
        assert await sample(run, "queue_images") == 5
        other.service.pipeline.batcher._dead = True
        assert await sample(run, "engine_up") == 0
        run.service.pipeline.batcher.release(2)
        other.service.pipeline.batcher.release(3)


async def test_how_full_batches_are_is_a_metric(tmp_path):
    async with running(tmp_path, batch_max_patches=16) as run:
        before = await sample(run, "batch_fill_ratio_sum")
        await run.embed([photo()])
        assert await sample(run, "batch_fill_ratio_sum") - before == 0.25  # 4 patches


async def test_the_disk_of_the_data_folder_is_a_metric(tmp_path, monkeypatch, caplog):
    async with running(tmp_path) as run:
        free, size = await sample(run, "data_dir_free_bytes"), await sample(run, "data_dir_size_bytes")
        assert 0 < free < size == shutil.disk_usage(tmp_path).total

        def unreadable(path):
            raise OSError("gone")

        monkeypatch.setattr("service.scrape.shutil.disk_usage", unreadable)
        assert (await run.client.get("/metrics")).status_code == 200
    assert "gone" in caplog.text


async def test_the_time_of_the_last_backup_is_a_metric(tmp_path):
    async with running(tmp_path / "data") as run:
        assert await sample(run, "last_backup_timestamp_seconds") == 0
        before = int(time.time())
        await back_up(run.service.store, None, [], tmp_path / "backup")
        assert before <= await sample(run, "last_backup_timestamp_seconds") <= time.time()
        (tmp_path / "data" / "last-backup.json").write_text("{")
        assert await sample(run, "last_backup_timestamp_seconds") == 0


async def test_hits_are_counted_for_each_cache(tmp_path, redis_server):
    async with running(tmp_path, redis_url=redis_server.url) as run:
        for _ in range(2):
            await run.embed([photo()])
        outcomes = numbered([(hashlib.sha256(photo()).hexdigest(), photo())])
        digest = outcomes[0].result()[0]
        await run.service.pipeline.kept_patches([digest])
        await run.service.pipeline.patches(outcomes)
        await run.service.pipeline.kept_patches([digest])
        counts = {
            layer: [await sample(run, f"cache_{kind}_total", layer=layer) for kind in ("hits", "misses")]
            for layer in ("redis", "patches_memory", "patches_disk")
        }
        assert await sample(run, "cache_up") == 1
    assert counts == {"redis": [1, 1], "patches_memory": [1, 1], "patches_disk": [0, 1]}


async def test_what_was_built_is_a_metric(tmp_path):
    async with running(tmp_path) as run:
        text = (await run.client.get("/metrics")).text
    python = f"{sys.version_info.major}.{sys.version_info.minor}."
    assert re.search(rf'^dinov2_build_info{{python="{re.escape(python)}\d+",version="[^"]+"}} 1.0$', text, re.MULTILINE)
    assert "process_start_time_seconds" in text
    assert "_created" not in text


async def test_the_recall_of_live_searches_is_a_metric(tmp_path, monkeypatch):
    async def measured(settings, *, on_recall):
        on_recall("shop", 0.75)
        return DictStore()

    monkeypatch.setattr(opening, "open_store", measured)
    async with running(tmp_path) as run:
        text = (await run.client.get("/metrics")).text
    assert 'dinov2_index_recall_ratio{collection="shop"} 0.75' in text


def values_of(text, name):
    """Return the values of a metric by its label."""
    lines = [line for line in text.splitlines() if line.startswith(f"dinov2_{name}{{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


async def test_items_and_disk_space_of_collections_are_metrics(tmp_path):
    async with running(tmp_path) as run:
        for name, count in (("shop", 3), ("art", 1)):
            await run.client.put(f"/v1/collections/{name}", json={"dtype": "float16"})
            files = [("file", (f"{n}.png", photo(n), "image/png")) for n in range(count)]
            assert (await run.client.post(f"/v1/collections/{name}/items", files=files)).status_code in (200, 201)
        text = (await run.client.get("/metrics")).text
        await run.service.store.settle("shop")
        settled = (await run.client.get("/metrics")).text
        snapshot = (await run.client.post("/v1/collections/art/snapshots")).json()
        await run.client.delete("/v1/collections/art")
        later = (await run.client.get("/metrics")).text
    assert values_of(text, "collection_items") == {"shop": 3, "art": 1}
    assert values_of(text, "collection_disk_bytes") == {"shop": 3 * DIMS * 2, "art": DIMS * 2}
    segments = sum(path.stat().st_size for path in (tmp_path / "segments").rglob("*") if path.is_file())
    assert values_of(settled, "collection_disk_bytes")["shop"] == 3 * DIMS * 2 + segments
    assert values_of(later, "collection_items") == {"shop": 3}
    parts = values_of(later, "store_disk_bytes")
    assert parts["snapshots"] == snapshot["bytes"]
    assert parts["database"] >= 8192


async def test_the_number_of_collections_in_the_metrics_is_bounded(tmp_path):
    async with running(tmp_path) as run:
        run.service.metrics.set_usage([(f"c{n:04}", n, 10) for n in range(1, 1001)], {})
        text = run.service.metrics.render().decode()
    items, sizes = values_of(text, "collection_items"), values_of(text, "collection_disk_bytes")
    assert len(items) == len(sizes) == MOST_COLLECTIONS + 1
    assert items["c1000"] == 1000
    assert items[OTHERS] == sum(range(1, 1001 - MOST_COLLECTIONS))
    assert sizes[OTHERS] == 10 * (1000 - MOST_COLLECTIONS)


async def test_a_store_that_cannot_answer_costs_only_its_own_metrics(tmp_path, monkeypatch):
    class Slow(DictStore):
        async def collections(self):
            await asyncio.sleep(60)

    class Failed(DictStore):
        async def collections(self):
            raise Unavailable("Milvus cannot be reached")

    monkeypatch.setattr("service.routes.health.USAGE_LIMIT_S", 0.05)
    for store in (Slow(), Failed()):
        async with running(tmp_path, store=store) as run:
            run.service.metrics.set_usage([("old", 1, 1)], {})
            answer = await run.client.get("/metrics")
        assert answer.status_code == 200
        assert "dinov2_requests_total" in answer.text
        assert values_of(answer.text, "collection_items") == {}


async def test_a_store_without_disk_space_has_item_counts(tmp_path):
    async with running(tmp_path, store=DictStore()) as run:
        await run.client.put("/v1/collections/shop")
        text = (await run.client.get("/metrics")).text
    assert values_of(text, "collection_items") == {"shop": 0}
    assert values_of(text, "collection_disk_bytes") == {}
