"""Tests of the pipeline: single flight, clients that leave, the deadline, the cache, and failures of single images."""

import asyncio
import base64
import gc
import hashlib
import importlib
import json
import re
import threading
import time
import weakref
from dataclasses import replace

import httpx
import numpy as np
import pytest

from model.engines.protocol import Features
from model.preprocess import preprocess
from service.errors import BrokenImage, EngineFailed, InvalidRequest, QueueFull, ShuttingDown, UnsupportedImage
from service.features import pipeline
from service.features.cache import MemoryCache
from service.features.images import decode
from service.features.pipeline import Embedded, View
from service.outcomes import Outcome, numbered
from tests.fakes import DIMS, N_PATCHES, SPEC, FakeEngine, Running, fake_artifact, photo, plain_photo, running, until


async def test_identical_images_in_flight_compute_once(tmp_path):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, cache_bytes=0) as run:
        engine.gate = threading.Event()
        tasks = [asyncio.create_task(run.embed([photo()])) for _ in range(5)]
        await until(engine.entered.is_set)
        engine.gate.set()
        results = await asyncio.gather(*tasks)
        assert run.service.pipeline.batcher.images == 0
        text = (await run.client.get("/metrics")).text
    assert engine.images == 1
    assert "dinov2_coalesced_images_total 4.0" in text
    assert len({result[0].result().parts.tobytes() for result in results}) == 1


async def test_a_leader_that_leaves_does_not_fail_the_followers(tmp_path):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, cache_bytes=0) as run:
        engine.gate = threading.Event()
        leader = asyncio.create_task(run.embed([photo()]))
        await until(engine.entered.is_set)
        follower = asyncio.create_task(run.embed([photo()]))
        await asyncio.sleep(0.01)
        leader.cancel()
        engine.gate.set()
        assert isinstance((await follower)[0].result(), Embedded)
        assert engine.images == 1
        assert run.service.pipeline.batcher.images == 0


async def test_an_image_that_is_under_way_takes_no_second_place_in_the_queue(tmp_path):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, cache_bytes=0) as run:
        engine.gate = threading.Event()
        first = asyncio.create_task(run.embed([photo(0)]))
        await until(engine.entered.is_set)
        both = asyncio.create_task(run.embed([photo(0), photo(1)]))
        await until(lambda: run.service.pipeline.batcher.waiting == 1)
        assert run.service.pipeline.batcher.images == 2
        engine.gate.set()
        await asyncio.gather(first, both)
        assert run.service.pipeline.batcher.images == 0


async def test_a_computation_that_was_left_ends_no_newer_one(tmp_path, monkeypatch):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, cache_bytes=0) as run:
        engine.gate = threading.Event()
        with Blocked(monkeypatch, "service.features.pipeline.decode") as blocked:
            left = asyncio.create_task(run.embed([photo()]))
            await until(lambda: blocked.calls == 1)
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
            newer = asyncio.create_task(run.embed([photo()]))
            await until(lambda: blocked.calls == 2)
        await until(lambda: run.service.pipeline.batcher.images == 1)  # the one that was left has ended
        joining = asyncio.create_task(run.embed([photo()]))
        await until(engine.entered.is_set)
        engine.gate.set()
        await asyncio.gather(newer, joining)
    assert engine.images == 1


async def test_an_analysis_that_nobody_waits_for_is_dropped(tmp_path):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, cache_bytes=0) as run:
        engine.gate = threading.Event()
        busy = asyncio.create_task(run.embed([photo(0)]))
        await until(engine.entered.is_set)
        leaving = asyncio.create_task(run.service.pipeline.analyse(photo(1), lambda analysed: None))
        await until(lambda: run.service.pipeline.batcher.waiting == 1)
        leaving.cancel()
        await until(lambda: run.service.pipeline.batcher.images == 1)
        engine.gate.set()
        await busy
        await run.embed([photo(2)])
    assert engine.images == 2


async def test_work_that_nobody_waits_for_is_dropped_and_its_place_given_back(tmp_path):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, cache_bytes=0) as run:
        engine.gate = threading.Event()
        busy = asyncio.create_task(run.embed([photo(0)]))
        await until(engine.entered.is_set)
        leaving = asyncio.create_task(run.embed([photo(1), photo(2)]))
        at_once = asyncio.create_task(run.embed([photo(3)]))
        await asyncio.sleep(0)
        at_once.cancel()  # before its computation has begun
        await until(lambda: run.service.pipeline.batcher.waiting >= 2)
        leaving.cancel()
        await until(lambda: run.service.pipeline.batcher.images == 1)  # only what the engine is busy with
        engine.gate.set()
        await busy
        again = await run.embed([photo(1)])
    assert isinstance(again[0].result(), Embedded)
    assert [shape[0] for shape in engine.batches] == [1, 1]


async def post_and_leave(app, body: bytes, leave: asyncio.Event) -> list[dict]:
    """Send a whole request, disconnect when `leave` is set, and return what the service sent until then."""
    sent: list[dict] = []
    first = True

    async def receive():
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/embeddings",
        "raw_path": b"/v1/embeddings",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json")],
        "client": ("test", 1),
        "server": ("test", 80),
    }
    await app(scope, receive, send)
    return sent


async def test_a_client_that_hangs_up_costs_no_engine_time(tmp_path):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, cache_bytes=0) as run:
        engine.gate = threading.Event()
        busy = asyncio.create_task(run.embed([photo(0)]))
        await until(engine.entered.is_set)
        leave = asyncio.Event()
        body = json.dumps({"input": base64.b64encode(photo(1)).decode()}).encode()
        client = asyncio.create_task(post_and_leave(run.app, body, leave))
        await until(lambda: run.service.pipeline.batcher.waiting == 1)
        leave.set()
        assert await client == []
        engine.gate.set()
        await busy
        await run.embed([photo(2)])
        text = (await run.client.get("/metrics")).text
    assert engine.images == 2
    assert "dinov2_dropped_images_total 1.0" in text
    assert 'status="499"' in text


async def test_images_fail_on_their_own(tmp_path):
    engine = FakeEngine(fails=lambda pixels: bool((pixels == pixels[:, :, :1, :1]).all(axis=(1, 2, 3)).any()))
    async with running(tmp_path, cache_bytes=0) as run:
        engine.batches.clear()
        run.engine.fails = engine.fails
        images = numbered([photo(0), photo(1)[:50], plain_photo(128), b"", photo(2)])
        images[3] = Outcome(3, error=BrokenImage("not base64"))
        results = await run.service.pipeline.embed(images)
    assert [result.index for result in results] == [0, 1, 2, 3, 4]
    kinds = [type(result.error or result.value) for result in results]
    assert kinds == [Embedded, BrokenImage, EngineFailed, BrokenImage, Embedded]
    assert results[3].error is images[3].error


async def test_an_image_that_cannot_be_prepared_is_its_own_fault(tmp_path, monkeypatch):
    def refuse(rgb, spec):
        raise ValueError("too thin for a patch")

    monkeypatch.setattr(pipeline, "preprocess", refuse)
    async with running(tmp_path) as run:
        [outcome] = await run.embed([photo()])
    assert isinstance(outcome.error, BrokenImage)
    assert outcome.error.detail == "too thin for a patch"


@pytest.mark.parametrize("other", ["precision", "model"])
async def test_other_models_and_precisions_share_a_cache_but_no_vector(tmp_path, other):
    cache = MemoryCache(2**20)
    engine, digit = (FakeEngine(precision="int8"), "a") if other == "precision" else (FakeEngine(), "b")
    async with (
        running(tmp_path / "one", cache=cache) as one,
        running(tmp_path / "two", engine=engine, artifact=fake_artifact(digit=digit), cache=cache) as two,
    ):
        for run in (one, two):
            assert not (await run.embed([photo()]))[0].result().cached
            assert (await run.embed([photo()]))[0].result().cached
        assert engine.images == one.engine.images == 1


async def test_a_vector_holds_no_batch_in_memory(tmp_path):
    async with running(tmp_path) as run:
        embedded = (await run.embed([photo()]))[0].result()
    assert embedded.parts.base is None


async def test_registers_count_as_tokens(tmp_path):
    async with running(tmp_path) as run:
        plain = run.engine.run
        run.engine.run = lambda pixels: plain(pixels)._replace(registers=np.zeros((len(pixels), 3, DIMS), np.float32))
        embedded = (await run.embed([photo()]))[0].result()
    assert embedded.tokens == 1 + 3 + N_PATCHES


async def test_the_times_of_an_image_are_told_by_stage_in_seconds(tmp_path):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine) as run:
        engine.gate = threading.Event()
        first = asyncio.create_task(run.embed([photo(0)]))
        await until(engine.entered.is_set)
        second = asyncio.create_task(run.embed([photo(1)]))
        await until(lambda: run.service.pipeline.batcher.waiting == 1)
        await asyncio.sleep(0.03)
        engine.gate.set()
        times = [(await task)[0].result().timings for task in (first, second)]
        text = (await run.client.get("/metrics")).text
    assert times[0]["infer"] >= 0.03
    assert times[1]["queue"] >= 0.03
    assert times[0]["queue"] != times[0]["infer"]
    for stage in ("decode", "preprocess", "queue", "infer"):
        [total] = re.findall(rf'^dinov2_stage_duration_seconds_sum{{stage="{stage}"}} (\S+)$', text, re.MULTILINE)
        assert float(total) == pytest.approx(times[0][stage] + times[1][stage])


async def test_height_comes_before_width(tmp_path):
    """This applies to the input that warms up the engine, to the patch grid and to the image."""
    artifact, engine, shapes = fake_artifact(), FakeEngine(), []
    spec = SPEC.model_copy(update={"resize": 28, "crop": None})
    manifest = artifact.manifest.model_copy(update={"input_size": (28, 56), "preprocess": spec})
    plain = engine.run
    engine.run = lambda pixels: (shapes.append(pixels.shape), plain(pixels))[1]
    image = photo(size=(56, 28))
    async with running(tmp_path, engine=engine, artifact=replace(artifact, manifest=manifest)) as run:
        analysed = await run.service.pipeline.analyse(image, lambda analysed: (analysed.grid, analysed.image.shape))
        digest = hashlib.sha256(image).hexdigest()
        patches = (await run.service.pipeline.patches(numbered([(digest, image)])))[0].result()
        kept = (await run.service.pipeline.kept_patches([digest]))[digest]
        assert run.service.tag().split("/")[3] == "28x56"
    assert set(shapes) == {(1, 3, 28, 56)}
    assert analysed == ((2, 4), (28, 56, 3))
    assert (patches.grid, patches.size) == (kept.grid, kept.size) == ((2, 4), (28, 56))


@pytest.mark.parametrize("setting", ["batch_max_patches", "queue_max_patches"])
async def test_limits_on_patches_reach_the_batcher(tmp_path, setting):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, cache_bytes=0, **{setting: 2 * N_PATCHES}) as run:
        engine.gate = threading.Event()
        tasks = [asyncio.create_task(run.embed([photo(0)]))]
        await until(engine.entered.is_set)
        tasks.append(asyncio.create_task(run.embed([photo(i) for i in range(1, 4)])))
        if setting == "queue_max_patches":
            await until(lambda: run.service.pipeline.batcher.patches == 2 * N_PATCHES)
            late = await run.embed([photo(9)])
            assert isinstance(late[0].error, QueueFull)
        else:
            await until(lambda: run.service.pipeline.batcher.waiting == 3)
        engine.gate.set()
        await asyncio.gather(*tasks)
    assert [shape[0] for shape in engine.batches] == [1, 2, 1][: len(engine.batches)]


@pytest.mark.parametrize(("device", "setting", "expected"), [("cuda", None, 64 * N_PATCHES), ("cuda", 512, 512)])
async def test_the_largest_batch_suits_the_device(tmp_path, device, setting, expected):
    """A GPU runs 64 images of the model's input size at once."""
    async with running(tmp_path, engine=FakeEngine(device=device), batch_max_patches=setting) as run:
        assert run.service.pipeline.batcher.batch_max_patches == expected


async def test_a_failure_is_not_cached(tmp_path):
    async with running(tmp_path) as run:
        run.engine.fails = lambda pixels: True
        assert isinstance((await run.embed([photo()]))[0].error, EngineFailed)
        run.engine.fails = lambda pixels: False
        assert isinstance((await run.embed([photo()]))[0].result(), Embedded)


async def test_a_request_that_does_not_fit_starts_nothing(tmp_path):
    async with running(tmp_path, queue_max_images=2, cache_bytes=0) as run:
        with pytest.raises(QueueFull):
            await run.embed([photo(i) for i in range(3)])
        assert run.service.pipeline.batcher.images == 0
        assert run.engine.batches == []
        assert len(await run.embed([photo(0), photo(0), photo(1)])) == 3  # two different ones


async def test_a_slow_cache_leaves_no_gap_to_compute_twice_in(tmp_path):
    class Slow(MemoryCache):
        async def set_many(self, items):
            await asyncio.sleep(0.2)
            await super().set_many(items)

    engine = FakeEngine()
    async with running(tmp_path, engine=engine, cache=Slow(2**20)) as run:
        first = asyncio.create_task(run.embed([photo()]))
        await until(engine.entered.is_set)
        await asyncio.sleep(0.1)  # computed, and on its way into the cache
        await run.embed([photo()])
        await first
    assert engine.images == 1


async def test_a_foreign_cache_entry_is_a_miss(tmp_path):
    class Liar:
        name = "liar"

        async def get_many(self, keys):
            return [b"\x01\x02\x03" for _ in keys]

        async def set_many(self, items):
            self.items = items

        async def status(self):
            return "ok"

        async def close(self): ...

    cache = Liar()
    async with running(tmp_path, cache=cache) as run:
        result = (await run.embed([photo()]))[0].result()
    assert not result.cached
    stored = Embedded.from_bytes(next(iter(cache.items.values())), DIMS)
    np.testing.assert_array_equal(stored.parts, result.parts)
    assert stored.tokens == result.tokens


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_cache_entry_that_is_not_finite_is_a_miss(value):
    for place in range(2 * DIMS):
        parts = np.ones((2, DIMS), np.float32)
        parts.flat[place] = value
        data = Embedded(parts, tokens=5).to_bytes()
        assert Embedded.from_bytes(data, DIMS) is None


@pytest.mark.parametrize("part", ["cls", "patches"])
async def test_features_that_are_not_finite_fail_and_are_not_cached(tmp_path, part):
    async with running(tmp_path) as run:
        right = run.engine.run

        def wrong(pixels):
            features = right(pixels)
            plain = (pixels == pixels[:, :, :1, :1]).all(axis=(1, 2, 3))
            getattr(features, part)[plain] = np.nan
            return features

        run.engine.run = wrong
        good, bad = await run.embed([photo(), plain_photo(100)])
        assert isinstance(good.result(), Embedded)
        assert isinstance(bad.error, EngineFailed)
        found = await run.embed([photo(), plain_photo(100)])
        assert [type(result.error or result.value) for result in found] == [Embedded, EngineFailed]
        assert found[0].result().cached
        answer = await run.client.post("/v1/segment", content=plain_photo(100), headers={"Content-Type": "image/png"})
    assert answer.status_code == 500
    assert answer.json()["code"] == "engine_failed"


async def test_closing_fails_what_is_under_way(tmp_path):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, cache_bytes=0) as run:
        engine.gate = threading.Event()
        first = asyncio.create_task(run.embed([photo(0)]))
        await until(engine.entered.is_set)
        second = asyncio.create_task(run.embed([photo(1)]))
        await until(lambda: run.service.pipeline.batcher.waiting == 1)
        threading.Timer(0.05, engine.gate.set).start()
    assert isinstance((await second)[0].error, ShuttingDown)
    assert isinstance((await first)[0].result(), Embedded)


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
def test_normalised_vectors_have_length_one(pooling):
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(2, DIMS)).astype(np.float32)
    embedded = Embedded(parts * np.float32([[1], [100]]), tokens=5)
    assert np.linalg.norm(embedded.vector(pooling, True)) == pytest.approx(1, abs=1e-6)
    if pooling == "cls+mean":  # neither half drowns the other
        assert np.linalg.norm(embedded.vector(pooling, True)[:DIMS]) == pytest.approx(0.5**0.5, abs=1e-6)
    zero = Embedded(np.zeros((2, DIMS), np.float32), tokens=5)
    assert np.isfinite(zero.vector(pooling, True)).all()


class Blocked:
    """A wrapper of a function: each call waits until the `with` block ends, and then calls the function."""

    def __init__(self, monkeypatch, target: str) -> None:
        self.calls = 0
        self.opened = threading.Event()
        module, name = target.rsplit(".", 1)
        function = getattr(importlib.import_module(module), name)

        def waiting(*args, **options):
            self.calls += 1
            assert self.opened.wait(30)
            return function(*args, **options)

        monkeypatch.setattr(target, waiting)

    def __enter__(self) -> "Blocked":
        return self

    def __exit__(self, *exc: object) -> None:
        self.opened.set()


PNG = {"Content-Type": "image/png"}


async def post_as(run: Running, address: str, path: str, image: bytes) -> httpx.Response:
    """Send an image from an address. The service must trust one proxy."""
    return await run.client.post(path, content=image, headers=PNG | {"X-Forwarded-For": address})


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/features"])
@pytest.mark.parametrize("single_address", ["192.0.2.1", "192.0.2.2"])
async def test_a_form_with_many_images_does_not_delay_a_single_image(tmp_path, monkeypatch, path, single_address):
    """The single image may be of another client, or in another request of the same client."""
    decoded: list[tuple[int, int]] = []

    def slow(image, *args, **options):
        rgb = decode(image, *args, **options)
        decoded.append(rgb.shape[:2])
        time.sleep(0.02)
        return rgb

    monkeypatch.setattr("service.features.pipeline.decode", slow)
    async with running(tmp_path, trusted_proxies=1, cache_bytes=0) as run:
        files = [("file", ("a.png", photo(i, size=(40, 32)), "image/png")) for i in range(16)]
        headers = {"X-Forwarded-For": "192.0.2.1"}
        form = asyncio.create_task(run.client.post(path, files=files, headers=headers))
        await until(lambda: len(decoded) >= 2)
        before = len(decoded)
        single = await post_as(run, single_address, path, photo(50, size=(50, 32)))
        assert not form.done()
        assert (single.status_code, (await form).status_code) == (200, 200)
    assert decoded.index((32, 50)) <= before + 4  # what was running, and one image for each thread
    assert len(decoded) == 17


async def test_what_a_client_waits_for_does_not_count_as_that_of_others(tmp_path, monkeypatch):
    async with running(tmp_path, trusted_proxies=1, queue_max_images=8, cache_bytes=0) as run:
        with Blocked(monkeypatch, "service.features.pipeline.decode"):
            many = [asyncio.create_task(post_as(run, "192.0.2.1", "/v1/embeddings", photo(i))) for i in range(6)]
            await until(lambda: run.service.pipeline.batcher.images == 4)
            single = asyncio.create_task(post_as(run, "192.0.2.2", "/v1/embeddings", photo(9)))
            await until(lambda: run.service.pipeline.batcher.images == 5)
            await until(lambda: sum(task.done() for task in many) == 2)
        answers = await asyncio.gather(*many)
        assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 2
        assert (await single).status_code == 200
        assert run.service.pipeline.batcher.images == 0
        assert run.service.pipeline.batcher._places._held == {}


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("/v1/embeddings", "service.features.pipeline.decode"),
        ("/v1/segment", "service.features.pipeline.decode"),
        ("/v1/segment", "service.vision.segment.segment_foreground"),
    ],
)
async def test_what_a_thread_still_does_keeps_its_place_in_the_queue(tmp_path, monkeypatch, path, where):
    limits = {"queue_max_images": 2, "request_deadline_s": 0.3, "cache_bytes": 0, "trusted_proxies": 1}
    async with running(tmp_path, **limits) as run:
        with Blocked(monkeypatch, where) as blocked:
            late = await asyncio.gather(*(post_as(run, f"192.0.2.{i}", path, photo(i)) for i in range(2)))
            assert [answer.status_code for answer in late] == [504, 504]
            assert blocked.calls == 2
            assert (await post_as(run, "192.0.2.2", path, photo(2))).status_code == 503
            assert (await run.client.get("/readyz")).json()["reasons"] == {"queue": "full"}
        await until(lambda: run.service.pipeline.batcher.images == 0)
        assert (await run.client.get("/readyz")).status_code == 200
        assert (await run.client.post(path, content=photo(2), headers=PNG)).status_code == 200


async def test_decodes_that_have_not_begun_are_dropped_at_once(tmp_path, monkeypatch):
    async with running(tmp_path, request_deadline_s=0.3, cache_bytes=0) as run:
        with Blocked(monkeypatch, "service.features.pipeline.decode") as blocked:
            await asyncio.gather(*(run.client.post("/v1/embeddings", content=photo(i), headers=PNG) for i in range(5)))
            await until(lambda: run.service.pipeline.batcher.images == 2)
        await until(lambda: run.service.pipeline.batcher.images == 0)
        assert blocked.calls == 2
    assert run.engine.images == 0


async def test_what_is_cached_waits_for_no_decode(tmp_path, monkeypatch):
    large = photo(size=(400, 300))  # more than is hashed on the event loop
    assert len(large) > 2**18
    async with running(tmp_path) as run:
        await run.embed([large])
        with Blocked(monkeypatch, "service.features.pipeline.decode") as blocked:
            others = [asyncio.create_task(run.embed([photo(i)])) for i in range(1, 4)]
            await until(lambda: blocked.calls == 2)
            async with asyncio.timeout(5):
                assert (await run.embed([large]))[0].result().cached
        await asyncio.gather(*others)


@pytest.mark.parametrize("where", ["the engine", "service.vision.segment.segment_foreground"])
async def test_only_as_many_photos_are_kept_for_their_masks_as_there_are_decode_threads(tmp_path, monkeypatch, where):
    async with running(tmp_path, cache_bytes=0) as run:
        decodes = Blocked(monkeypatch, "service.features.pipeline.decode")
        decodes.opened.set()
        gate = threading.Event()
        if where == "the engine":
            run.engine.gate = gate
        else:
            masks = Blocked(monkeypatch, where)
            gate = masks.opened
        posts = [asyncio.create_task(run.client.post("/v1/segment", content=photo(i), headers=PNG)) for i in range(6)]
        await until(lambda: decodes.calls == 2)
        await asyncio.sleep(0.2)
        assert decodes.calls == 2
        assert run.service.pipeline.batcher.images == 6
        gate.set()
        assert [(await post).status_code for post in posts] == [200] * 6


async def test_only_as_many_answers_are_encoded_at_once_as_there_are_decode_threads(tmp_path, monkeypatch):
    async with running(tmp_path) as run:
        encodes = Blocked(monkeypatch, "service.vision.features.npy")
        options = {"format": "npy"}
        posts = [
            asyncio.create_task(run.client.post("/v1/features", content=photo(i), headers=PNG, params=options))
            for i in range(6)
        ]
        await until(lambda: encodes.calls == 2)
        await asyncio.sleep(0.2)
        assert encodes.calls == 2
        encodes.opened.set()
        assert [(await post).status_code for post in posts] == [200] * 6


async def test_an_error_of_a_request_does_not_keep_the_image(tmp_path):
    images = []

    def answer(analysed):
        images.append(weakref.ref(analysed.image))
        try:
            analysed.image.reshape(7)
        except ValueError as error:
            raise InvalidRequest("no") from error

    async with running(tmp_path) as run:
        gc.disable()
        try:
            for _ in range(3):
                with pytest.raises(InvalidRequest):
                    await run.service.pipeline.analyse(photo(), answer)
            await asyncio.sleep(0.1)
            assert [image() for image in images] == [None] * 3
        finally:
            gc.enable()


async def test_a_view_with_a_size_uses_the_whole_image_and_is_not_cached(tmp_path):
    async with running(tmp_path) as run:
        pipeline = run.service.pipeline
        view = View(("keys.0",), run.service.model.spec(56))
        seen = await pipeline.analyse(photo(size=(112, 60)), lambda analysed: analysed, view)
        assert (seen.grid, seen.size, seen.crop_box) == ((4, 7), (60, 112), (0.0, 0.0, 112.0, 60.0))
        assert seen.outputs["keys.0"].shape == (1 + 28, DIMS)
        [embedded] = await run.embed([photo(size=(112, 60))])
        assert not embedded.result().cached
        assert not np.allclose(embedded.result().parts, seen.embedded.parts)


async def test_a_size_with_too_many_patches_is_refused_before_the_engine(tmp_path):
    async with running(tmp_path, max_input_patches=27) as run:
        view = View(spec=run.service.model.spec(56))
        with pytest.raises(InvalidRequest, match=r"size=56 .* an input of 98 x 56 pixels with 28 patches"):
            await run.service.pipeline.analyse(photo(size=(112, 60)), lambda analysed: None, view)
        assert run.engine.images == 0


async def test_the_second_engine_runs_what_the_first_cannot(tmp_path):
    first, second = FakeEngine(), FakeEngine()
    first.can_run = lambda size, outputs: size == (28, 28) and not outputs  # type: ignore[method-assign]
    async with running(tmp_path, engine=first) as run:
        opened = []
        run.service.pipeline._forward._open_general = lambda: opened.append(1) or second
        for view in (View(), View(("keys.0",)), View(spec=run.service.model.spec(56))):
            await run.service.pipeline.analyse(photo(), lambda analysed: None, view)
    assert (first.images, second.images, opened) == (
        2,
        2,
        [1],
    )  # the embedding of the second image comes from the first
    assert second.closed


async def test_the_embedding_always_comes_from_the_serving_engine(tmp_path):
    first, second = FakeEngine(), FakeEngine()
    first.can_run = lambda size, outputs: not outputs  # type: ignore[method-assign]
    second.run = lambda pixels: Features(*(array + 1 for array in first.run(pixels)))  # type: ignore[method-assign]
    async with running(tmp_path, engine=first) as run:
        run.service.pipeline._forward._open_general = lambda: second
        seen = await run.service.pipeline.analyse(photo(), lambda analysed: analysed, View(("keys.0",)))
        [cached] = await run.embed([photo()])
        [other] = await run.embed([photo(1)])
    assert cached.result().cached
    np.testing.assert_array_equal(cached.result().parts, seen.embedded.parts)
    assert not other.result().cached
    expected = first.run(preprocess(decode(photo()), SPEC)[None])
    np.testing.assert_allclose(seen.embedded.parts[0], expected.cls[0], atol=1e-6)


async def test_images_of_one_request_are_analysed_in_one_batch_and_fail_alone(tmp_path):
    async with running(tmp_path) as run:
        images = numbered([photo(1), b"broken", photo(2)])
        good, broken, other = await run.service.pipeline.analyse_all(images, lambda analysed: analysed.grid)
        assert (good.result(), other.result()) == ((2, 2), (2, 2))
        assert isinstance(broken.error, UnsupportedImage)
        assert run.service.pipeline.batcher.images == 0
