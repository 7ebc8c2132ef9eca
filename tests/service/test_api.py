"""Tests of the routes over HTTP, without a socket, on the fake engine."""

import asyncio
import base64
import io
import tempfile
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from model.engines.protocol import Tried
from model.preprocess import PreprocessSpec, crop_box
from model.zoo import ENTRIES
from service.features.pipeline import Embedded
from service.timings import ms_since, slowest
from service.vision.foreground import segment_foreground
from service.vision.mask import coco_rle_decode
from tests.fakes import DIMS, N_PATCHES, SPEC, FakeEngine, fake_artifact, photo, running, until

PUBLISHED = "facebook/dinov2-small"
RAW = {"pooling": "cls+mean", "normalize": False}


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def vectors(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([row["embedding"] for row in answer.json()["data"]], np.float32)


async def test_the_three_kinds_of_body_give_the_same_vector(tmp_path):
    image = photo()
    async with running(tmp_path, cache_bytes=0) as run:
        post = run.client.post
        as_url = await post("/v1/embeddings", json={"input": data_url(image)})
        as_base64 = await post("/v1/embeddings", json={"input": [base64.b64encode(image).decode()]})
        as_file = await post("/v1/embeddings", files={"file": ("p.png", image)})
        as_body = await post("/v1/embeddings", content=image, headers={"Content-Type": "image/png"})
    assert run.engine.images == 4  # no cache
    for answer in (as_url, as_base64, as_file, as_body):
        np.testing.assert_array_equal(vectors(answer), vectors(as_url))
    body = as_url.json()
    assert body["object"] == "list"
    assert body["model"] == "dinov2_fake-aaaaaaaa"
    assert body["fingerprint"] == "a" * 64
    assert body["usage"] == {"prompt_tokens": 1 + N_PATCHES, "total_tokens": 1 + N_PATCHES}
    assert {"decode", "preprocess", "queue", "infer", "post", "total"} <= set(body["timings"])
    assert "infer;dur=" in as_url.headers["Server-Timing"]


async def test_options_in_json_form_and_query(tmp_path):
    image = photo(1)
    async with running(tmp_path) as run:
        raw = {"pooling": "cls+mean", "normalize": False}
        as_json = await run.client.post("/v1/embeddings", json={"input": data_url(image), **raw})
        as_form = await run.client.post(
            "/v1/embeddings", files={"file": image}, data={"pooling": "cls+mean", "normalize": "false"}
        )
        as_query = await run.client.post(
            "/v1/embeddings?pooling=cls%2Bmean&normalize=false", content=image, headers={"Content-Type": "image/png"}
        )
        cls = vectors(await run.client.post("/v1/embeddings", json={"input": data_url(image)}))
        packed = await run.client.post("/v1/embeddings", json={"input": data_url(image), "encoding_format": "base64"})
    both = vectors(as_json)
    assert both.shape == (1, 2 * DIMS)
    np.testing.assert_array_equal(vectors(as_form), both)
    np.testing.assert_array_equal(vectors(as_query), both)
    assert np.linalg.norm(cls) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(cls[0], both[0, :DIMS] / np.linalg.norm(both[0, :DIMS]), atol=1e-6)
    unpacked = np.frombuffer(base64.b64decode(packed.json()["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(unpacked, cls[0])
    assert run.engine.images == 1  # every combination comes from one cached forward pass


async def test_several_files_keep_their_order(tmp_path):
    images = [photo(seed) for seed in range(5)]
    async with running(tmp_path, cache_bytes=0) as run:
        answer = await run.client.post(
            "/v1/embeddings", files=[("file", (f"{i}.png", x)) for i, x in enumerate(images)]
        )
        single = [vectors(await run.client.post("/v1/embeddings", json={"input": data_url(x)}))[0] for x in images]
    assert [row["index"] for row in answer.json()["data"]] == list(range(5))
    assert answer.json()["usage"] == {"prompt_tokens": 5 * (1 + N_PATCHES), "total_tokens": 5 * (1 + N_PATCHES)}
    np.testing.assert_allclose(vectors(answer), np.array(single), atol=1e-6)


@pytest.mark.parametrize("name", ["file", "files", "file[]", "files[]"])
async def test_files_of_a_form_by_any_of_their_names(tmp_path, name):
    async with running(tmp_path) as run:
        answer = await run.client.post("/v1/embeddings", files=[(name, photo(1)), (name, photo(2))])
    assert vectors(answer).shape == (2, DIMS)


async def test_dimensions_are_those_of_the_pooling(tmp_path):
    body = {"input": data_url(photo()), "pooling": "cls+mean"}
    async with running(tmp_path) as run:
        right = await run.client.post("/v1/embeddings", json={**body, "dimensions": 2 * DIMS})
        wrong = await run.client.post("/v1/embeddings", json={**body, "dimensions": DIMS})
    assert vectors(right).shape == (1, 2 * DIMS)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "unsupported_dimensions")
    assert f"this model gives {2 * DIMS} with pooling cls+mean" in wrong.json()["error"]["message"]


async def test_times_are_in_milliseconds_and_of_the_slowest_image(tmp_path):
    items = [Embedded(np.ones((2, 2)), 5, timings={"decode": s, "infer": 0.5}) for s in (0.002, 0.25, 0.001)]
    assert slowest(items) == {"decode": 250.0, "infer": 500.0}
    assert 2000 <= ms_since(time.perf_counter() - 2) < 60_000
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, cache_bytes=0) as run:
        engine.delay_s = 0.03
        embedded = await run.client.post("/v1/embeddings", json={"input": data_url(photo(1))})
        added = await run.client.post("/v1/collections/shop/items", files={"file": photo(2)})
        masked = await run.client.post("/v1/segment", json={"image": data_url(photo(3)), "format": "rle"})
        text = (await run.client.get("/metrics")).text
    for answer in (embedded, added, masked):
        times = answer.json()["timings"]
        assert 30 <= times["infer"] <= times["total"] < 30_000
        assert {"decode", "preprocess", "queue"} <= times.keys()
    assert 'dinov2_stage_duration_seconds_count{stage="post"} 1.0' in text


async def test_partial_answers_the_good_and_lists_the_bad(tmp_path):
    inputs = [data_url(photo(1)), "%%%", data_url(photo(2)), data_url(photo(3)[:60]), 7, "http://example.com/a.jpg"]
    async with running(tmp_path) as run:
        partial = await run.client.post("/v1/embeddings", json={"input": inputs, "on_error": "partial"})
        failed = await run.client.post("/v1/embeddings", json={"input": inputs})
        all_bad = await run.client.post("/v1/embeddings", json={"input": ["%%%", "%"], "on_error": "partial"})
    assert [row["index"] for row in partial.json()["data"]] == [0, 2]
    assert [row["index"] for row in partial.json()["errors"]] == [1, 3, 4, 5]
    assert failed.status_code == 422
    error = failed.json()["error"]
    assert [row["index"] for row in error["errors"]] == [1, 3, 4, 5]
    assert all(f"[{index}]" in error["message"] for index in (1, 3, 4, 5))
    assert (all_bad.status_code, all_bad.json()["error"]["code"]) == (422, "broken_image")


async def test_a_published_model_has_its_other_names_too(tmp_path):
    async with running(tmp_path, artifact=fake_artifact("dinov2_vits14")) as run:
        answer = await run.client.post("/v1/embeddings", json={"input": data_url(photo()), "model": PUBLISHED})
    assert answer.status_code == 200
    assert PUBLISHED in ENTRIES["dinov2_vits14"].aliases


@pytest.mark.parametrize("model", ["", "auto", "dinov2_fake", "dinov2_fake-aaaaaaaa", "a" * 64])
async def test_the_served_model_by_any_name(tmp_path, model):
    async with running(tmp_path) as run:
        answer = await run.client.post("/v1/embeddings", json={"input": data_url(photo()), "model": model})
    assert answer.status_code == 200


async def test_models(tmp_path):
    async with running(tmp_path) as run:
        listed = (await run.client.get("/v1/models")).json()
        one = (await run.client.get("/v1/models/dinov2_fake")).json()
    assert listed["data"][0] == one
    assert {model["state"] for model in listed["data"][1:]} == {"available"}
    assert one["fingerprint"] == "a" * 64
    assert one["dimensions"] == DIMS
    assert one["engine"] == "fake"
    assert one["parity"][0]["min_cosine_cls"] == 1.0
    assert one["licence"] == "Apache-2.0"
    assert one["engines_tried"] == []


async def test_the_model_says_which_engines_were_tried(tmp_path):
    tried = (Tried("tensorrt:bf16", "passed over", "no GPU"), Tried("onnxruntime:fp32", "serves", "the first that can"))
    async with running(tmp_path) as run:
        run.service.tried = tried
        one = (await run.client.get("/v1/models/auto")).json()
    assert one["engines_tried"] == [
        {"engine": "tensorrt:bf16", "outcome": "passed over", "reason": "no GPU"},
        {"engine": "onnxruntime:fp32", "outcome": "serves", "reason": "the first that can"},
    ]


async def test_the_model_does_not_say_where_files_lie(tmp_path):
    reasons = {
        f"{tmp_path / 'some data' / 'derived' / 'x' / 'model.onnx'}: no graph": "model.onnx: no graph",
        "libfoo.so => /usr/lib/x86_64/libfoo.so.1: missing": "libfoo.so => libfoo.so.1: missing",
        "see https://example.org/a/b.html": "see https://example.org/a/b.html",
        "a class cosine of 0.9/0.99": "a class cosine of 0.9/0.99",
    }
    async with running(tmp_path) as run:
        run.service.settings = run.service.settings.model_copy(update={"data_dir": tmp_path / "some data"})
        run.service.tried = tuple(Tried("torch:fp32", "passed over", reason) for reason in reasons)
        one = (await run.client.get("/v1/models/auto")).json()
    assert [tried["reason"] for tried in one["engines_tried"]] == [*reasons.values()]


async def test_collections_find_the_photo_itself_first(tmp_path):
    items = [{"id": f"p{i}", "image": data_url(photo(i)), "metadata": {"i": i}} for i in range(6)]
    async with running(tmp_path) as run:
        added = await run.client.post("/v1/collections/shop/items", json={"items": items})
        assert added.status_code == 200, added.text
        uploaded = await run.client.post("/v1/collections/shop/items", files={"file": ("nine.png", photo(9))})
        assert uploaded.json()["count"] == 7
        found = await run.client.post("/v1/collections/shop/search", json={"image": data_url(photo(9)), "k": 1})
        assert found.json()["data"][0]["metadata"] == {"filename": "nine.png"}
        by_image = await run.client.post("/v1/collections/shop/search", json={"image": data_url(photo(3)), "k": 2})
        by_body = await run.client.post(
            "/v1/collections/shop/search?k=2", content=photo(3), headers={"Content-Type": "image/png"}
        )
        by_id = await run.client.post("/v1/collections/shop/search", json={"id": "p3", "k": 2})
        vector = vectors(await run.client.post("/v1/embeddings", json={"input": data_url(photo(3))}))[0]
        by_vector = await run.client.post("/v1/collections/shop/search", json={"vector": vector.tolist(), "k": 2})
        info = await run.client.get("/v1/collections/shop")
        listed = await run.client.get("/v1/collections")
        await run.client.delete("/v1/collections/shop")
        gone = await run.client.get("/v1/collections/shop")
    assert [hit["id"] for hit in by_id.json()["data"]][:1] == [by_image.json()["data"][1]["id"]]  # not the item itself
    for answer in (by_image, by_body, by_vector):
        hits = answer.json()["data"]
        assert [hits[0]["id"], hits[0]["metadata"]] == ["p3", {"i": 3}]
        assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
        assert len(hits) == 2
        assert [hit["id"] for hit in hits] == [hit["id"] for hit in by_image.json()["data"]]
    assert info.json()["count"] == 7
    assert info.json()["tag"] == f"{'a' * 64}/cls/l2/28x28/fp32"
    assert [row["name"] for row in listed.json()["data"]] == ["shop"]
    assert gone.status_code == 404


async def test_a_collection_outlives_the_process_and_refuses_another_model(tmp_path):
    body = {"items": [{"id": "a", "image": data_url(photo())}]}
    async with running(tmp_path) as run:
        await run.client.post("/v1/collections/shop/items", json=body)
    async with running(tmp_path, artifact=fake_artifact(digit="b")) as run:
        write = await run.client.post("/v1/collections/shop/items", json=body)
        read = await run.client.post("/v1/collections/shop/search", json={"image": data_url(photo())})
        old = {"vector": [1.0] * DIMS, "fingerprint": "a" * 64}
        by_old_vector = await run.client.post("/v1/collections/shop/search", json=old)
    for answer in (write, read):
        assert answer.status_code == 409
        assert answer.json()["code"] == "model_mismatch"
        assert "a" * 64 in answer.json()["detail"]
        assert "b" * 64 in answer.json()["detail"]
    assert by_old_vector.status_code == 200


async def test_items_that_the_store_would_refuse_cost_no_forward_pass(tmp_path):
    items = [{"id": "line\nbreak", "image": data_url(photo())}]
    async with running(tmp_path) as run:
        answer = await run.client.post("/v1/collections/shop/items", json={"items": items})
    assert answer.status_code == 422
    assert run.engine.images == 0


async def test_segment_as_png_rle_and_overlay(tmp_path):
    image = photo(2, size=(60, 45))
    async with running(tmp_path, cache_bytes=2**20) as run:
        png = await run.client.post("/v1/segment", content=image, headers={"Content-Type": "image/png"})
        rle = await run.client.post(
            "/v1/segment", json={"image": data_url(image), "format": "rle", "include": ["embedding"]}
        )
        passes = run.engine.images
        overlay = await run.client.post("/v1/segment", files={"file": image}, data={"format": "overlay"})
        vector = vectors(await run.client.post("/v1/embeddings", json={"input": data_url(image)}))[0]
    assert png.headers["Content-Type"] == "image/png"
    mask = np.asarray(Image.open(io.BytesIO(png.content))) > 0
    assert mask.shape == (45, 60)
    np.testing.assert_array_equal(coco_rle_decode(rle.json()["segmentation"]), mask)
    assert Image.open(io.BytesIO(overlay.content)).size == (60, 45)
    assert passes == 2  # one forward pass gave mask and embedding
    assert run.engine.images == 3  # and the embedding afterwards came from the cache
    np.testing.assert_allclose(rle.json()["embedding"], vector, atol=1e-6)


async def test_what_stands_beside_a_mask(tmp_path):
    image = photo(2, size=(60, 45))
    body = {"image": data_url(image), "include": ["embedding"], "pooling": "cls+mean", "normalize": False}
    async with running(tmp_path) as run:
        rle = (await run.client.post("/v1/segment", json={**body, "format": "rle"})).json()
        raw = await run.client.post("/v1/embeddings", json={"input": data_url(image), **RAW})
        found = await run.service.pipeline.analyse(
            image, lambda analysed: segment_foreground(analysed.patches, 45, 60, SPEC)
        )
        shown = {}
        for kind in ("png", "overlay"):
            answer = await run.client.post("/v1/segment", json={**body, "format": kind})
            assert answer.headers["Content-Type"] == "application/json"
            shown[kind] = Image.open(io.BytesIO(base64.b64decode(answer.json()[kind])))
    np.testing.assert_allclose(rle["embedding"], vectors(raw)[0], atol=1e-6)
    assert abs(np.linalg.norm(rle["embedding"]) - 1) > 0.1
    assert rle["crop_box"] == pytest.approx(crop_box(45, 60, SPEC))
    assert rle["contrast"] == pytest.approx(found.contrast)
    np.testing.assert_array_equal(np.asarray(shown["png"]) > 0, found.mask)
    assert (shown["overlay"].mode, shown["overlay"].size) == ("RGB", (60, 45))


async def test_a_mask_is_of_one_image_and_of_the_served_model(tmp_path):
    async with running(tmp_path) as run:
        two = await run.client.post("/v1/segment", files=[("file", photo(1)), ("file", photo(2))])
        listed = await run.client.post("/v1/segment", json={"image": [data_url(photo(1))] * 2})
        other = await run.client.post("/v1/segment", json={"image": data_url(photo(1)), "model": "resnet50"})
    for answer in (two, listed):
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        assert "2 images in image: a request can have 1 to 1" in answer.json()["detail"]
    assert (other.status_code, other.json()["code"]) == (404, "model_not_found")
    assert run.engine.images == 0


async def test_a_large_file_of_a_form_stays_in_memory(tmp_path, monkeypatch):
    def spooled(self):
        raise AssertionError("a file was put on disk")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", spooled)
    large = photo(size=(700, 600))
    assert len(large) > 2**20
    async with running(tmp_path) as run:
        answer = await run.client.post("/v1/embeddings", files={"file": large})
    assert answer.status_code == 200, answer.text


async def test_a_large_image_is_too_large_before_it_is_decoded(tmp_path):
    image = photo()
    async with running(tmp_path, max_image_bytes=len(image) - 1) as run:
        answer = await run.client.post("/v1/embeddings", content=image, headers={"Content-Type": "image/png"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "image_too_large")
    assert f"has {len(image)} bytes; the limit is {len(image) - 1}" in answer.json()["error"]["message"]


async def test_request_ids_are_echoed_when_sane_and_made_otherwise(tmp_path):
    async with running(tmp_path) as run:
        sane = await run.client.get("/livez", headers={"X-Request-ID": "job-7/a"})
        rude = await run.client.get("/livez", headers={"X-Request-ID": "x" * 500})
        spaced = await run.client.get("/nowhere", headers={"X-Request-ID": "a b"})
    assert sane.headers["X-Request-ID"] == "job-7/a"
    assert len(rude.headers["X-Request-ID"]) == 32
    assert spaced.json()["request_id"] == spaced.headers["X-Request-ID"] != "a b"


async def test_metrics_name_routes_by_template_and_never_by_path(tmp_path):
    async with running(tmp_path) as run:
        await run.client.post("/v1/embeddings", json={"input": [data_url(photo())] * 2})
        await run.client.post("/v1/embeddings", json={"input": data_url(photo())})
        await run.client.get("/v1/collections/some-name")
        await run.client.get("/wp-admin/secret")
        text = (await run.client.get("/metrics")).text
    assert 'dinov2_requests_total{method="POST",route="/v1/embeddings",status="200"} 2.0' in text
    assert 'route="/v1/collections/{name}",status="404"' in text
    assert 'route="unmatched",status="404"' in text
    assert "wp-admin" not in text
    assert "some-name" not in text
    assert 'dinov2_cache_hits_total{layer="memory"} 1.0' in text
    assert 'dinov2_cache_misses_total{layer="memory"} 1.0' in text
    for stage in ("decode", "preprocess", "queue", "infer"):
        assert f'dinov2_stage_duration_seconds_count{{stage="{stage}"}} 1.0' in text
    assert "dinov2_batch_images_count" in text


async def test_requests_of_many_clients_share_forward_passes(tmp_path):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine, cache_bytes=0) as run:
        engine.gate = threading.Event()

        def post(seed: int) -> "asyncio.Task":
            return asyncio.create_task(run.client.post("/v1/embeddings", json={"input": data_url(photo(seed))}))

        first = post(0)
        await until(engine.entered.is_set)
        posts = [first, *(post(seed) for seed in range(1, 9))]
        await until(lambda: run.service.pipeline.batcher.waiting == 8)
        engine.gate.set()
        answers = await asyncio.gather(*posts)
    assert [shape[0] for shape in engine.batches] == [1, 8]
    assert {answer.status_code for answer in answers} == {200}


async def test_every_answer_of_collections_and_masks_names_the_model(tmp_path):
    async with running(tmp_path) as run:
        mask = await run.client.post("/v1/segment", content=photo(), headers={"Content-Type": "image/png"})
        await run.client.post("/v1/collections/shop/items", files={"file": photo()})
        listed = await run.client.get("/v1/collections")
        described = await run.client.get("/v1/collections/shop")
        deleted = await run.client.delete("/v1/collections/shop")
    for answer in (listed, described, deleted):
        assert (answer.json()["model"], answer.json()["fingerprint"]) == ("dinov2_fake-aaaaaaaa", "a" * 64)
    assert (mask.headers["X-Model"], mask.headers["X-Model-Fingerprint"]) == ("dinov2_fake-aaaaaaaa", "a" * 64)


async def test_features_that_are_not_finite_are_the_engines_failure(tmp_path):
    async with running(tmp_path) as run:
        right = run.engine.run

        def wrong(pixels):
            features = right(pixels)
            features.patches[:] = np.nan
            return features

        run.engine.run = wrong
        answer = await run.client.post("/v1/segment", content=photo(), headers={"Content-Type": "image/png"})
    assert (answer.status_code, answer.json()["code"]) == (500, "engine_failed")


async def test_a_model_that_pads_images(tmp_path):
    """The fit is shown with the model, and masks and regions refer to the whole image."""
    spec = PreprocessSpec(fit="pad", resize=None, crop=28)
    artifact = fake_artifact()
    artifact = replace(artifact, manifest=artifact.manifest.model_copy(update={"preprocess": spec}))
    image = photo(1, size=(60, 20))
    async with running(tmp_path, artifact=artifact) as run:
        model = (await run.client.get("/v1/models/auto")).json()
        mask = (await run.client.post("/v1/segment", json={"image": data_url(image), "format": "rle"})).json()
        await run.client.put("/v1/collections/shop", json={"pooling": "mean", "originals": True})
        await run.client.post("/v1/collections/shop/items", files={"file": image})
        answers = [
            await run.client.post("/v1/collections/shop/search", json={**body, "rerank": "patches", "matches": True})
            for body in (
                {"image": data_url(image)},
                {"region": {"image": data_url(image), "box": [40, 0, 20, 20]}},
                {"region": {"image": data_url(image), "box": [0, -30, 60, 20]}},  # padding
            )
        ]
    assert model["preprocess"]["fit"] == "pad"
    assert mask["segmentation"]["size"] == [20, 60]
    assert mask["crop_box"] == pytest.approx(crop_box(20, 60, spec))
    assert mask["crop_box"][1] < 0
    assert [answer.status_code for answer in answers] == [200, 200, 422]
    assert answers[0].json()["data"][0]["rerank_score"] == pytest.approx(1, abs=1e-3)


async def test_the_default_fit_is_shown(tmp_path):
    async with running(tmp_path) as run:
        model = (await run.client.get("/v1/models/auto")).json()
    assert model["preprocess"]["fit"] == "crop"
