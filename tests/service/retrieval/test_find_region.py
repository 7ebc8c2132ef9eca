"""Tests of `POST /v1/collections/{name}/find-region`: on generated scenes with the bundled model, pages, candidates,
images without cached features, and bad input.
"""

import asyncio
import base64
import hashlib
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.preprocess import crop_box
from service import rankings
from service.rankings import Ranked, Ranking, Rankings
from service.retrieval import find_region
from service.search.store import CollectionSpec, Item
from service.vision.foreground import upsample_mask
from service.vision.mask import coco_rle_decode, coco_rle_encode
from tests.fakes import DIMS, FakeEngine, Running, photo, running, until
from tests.service.vision.conftest import *  # noqa: F403  the fixtures of the bundled model
from tests.service.vision.conftest import Serve
from tests.service.vision.test_find_region import pair

PATH = "/v1/collections/shop/find-region"
BOX = {"box": [8, 4, 14, 14]}


def text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


async def fill(run: Running, images: dict[str, bytes], name: str = "shop", **spec: Any) -> None:
    assert (await run.client.put(f"/v1/collections/{name}", json={"originals": True} | spec)).status_code < 300
    items = [{"id": i, "image": text(image), "metadata": {"half": int(i[1:]) % 2}} for i, image in images.items()]
    for start in range(0, len(items), 50):
        added = await run.client.post(f"/v1/collections/{name}/items", json={"items": items[start : start + 50]})
        assert added.status_code == 200, added.text


async def ask(run: Running, body: dict[str, Any], status: int = 200, path: str = PATH) -> dict[str, Any]:
    answer = await run.client.post(path, json=body)
    assert answer.status_code == status, answer.text
    result: dict[str, Any] = answer.json()
    return result


async def noise(run: Running, count: int = 12, **spec: Any) -> None:
    await fill(run, {f"p{i:02}": photo(i) for i in range(count)}, **spec)


EVERYTHING: dict[str, Any] = {"references": [{"image": text(photo(3)), **BOX}], "min_score": 0}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
async def test_masks_of_scenes_with_the_bundled_model(serve: Serve, pooling: str) -> None:
    rng = np.random.default_rng(3)
    pairs = [pair(rng) for _ in range(12)]
    async with serve() as run:
        await fill(run, {f"p{i:02}": png(second.image) for i, (_, second) in enumerate(pairs)}, pooling=pooling)
        spec = run.service.artifact.manifest.preprocess
        visible = upsample_mask(np.ones((1, 1), np.float32), 256, 256, crop_box(256, 256, spec))
        overlaps, ranks = [], []
        for i, (first, second) in enumerate(pairs):
            reference = {"image": text(png(first.image)), "mask": coco_rle_encode(first.mask)}
            answer = await ask(run, {"references": [reference], "min_score": 0})
            ids = [row["id"] for row in answer["data"]]
            row = answer["data"][ids.index(f"p{i:02}")]
            mask = coco_rle_decode(row["segmentation"])
            assert mask.shape == (256, 256)
            assert row["area"] == mask.sum()
            x, y, width, height = row["box"]
            assert mask[y : y + height, x : x + width].sum() == mask.sum()
            assert mask[y].any()
            assert mask[:, x + width - 1].any()
            truth = second.mask & visible
            overlaps.append((mask & truth).sum() / (mask | truth).sum())
            ranks.append(ids.index(f"p{i:02}"))
    assert np.mean(overlaps) >= 0.8
    assert np.median(ranks) == 0


async def test_the_fields_of_an_answer(tmp_path) -> None:
    async with running(tmp_path) as run:
        await noise(run)
        answer = await ask(run, EVERYTHING)
        where = {"key": "half", "eq": 1}
        odd = await ask(run, EVERYTHING | {"filter": where, "debias": False})
        own = await ask(run, {"references": [{"id": "p03", "point": [20, 16]}, {"id": "p04", **BOX}], "min_score": 0})
    assert answer["data"][0]["id"] == "p03"
    assert answer["data"][0]["score"] == pytest.approx(1, abs=0.02)
    assert {row["id"] for row in answer["data"]} == {f"p{i:02}" for i in range(12)}
    keys = [(-row["score"], row["id"]) for row in answer["data"]]
    assert keys == sorted(keys)
    counts = ("total", "examined", "pending", "unreadable", "cursor", "collection", "object")
    assert [answer[name] for name in counts] == [12, 12, 0, 0, None, "shop", "list"]
    assert answer["data"][0]["metadata"] == {"half": 1}
    assert answer["data"][0]["source"] == "original:" + hashlib.sha256(photo(3)).hexdigest()
    assert {int(row["id"][1:]) % 2 for row in odd["data"]} == {1}
    assert odd["total"] == 6
    assert (own["total"], own["examined"]) == (10, 10)  # without the items that the request names
    high = [row for row in answer["data"] if row["score"] >= 0.3]
    assert 0 < len(high) < 12
    async with running(tmp_path) as run:
        assert (await ask(run, EVERYTHING | {"min_score": 0.3}))["data"] == high


async def test_pages_together_are_the_whole_ranking(tmp_path, monkeypatch) -> None:
    async with running(tmp_path) as run:
        await noise(run)
        whole = (await ask(run, EVERYTHING))["data"]
        for is_kept in (True, False):
            if not is_kept:
                monkeypatch.setattr(rankings, "MAX_AGE_S", -1.0)
            pages, cursor = [], None
            while True:
                answer = await ask(run, EVERYTHING | {"limit": 5, "cursor": cursor})
                pages.append(answer["data"])
                cursor = answer["cursor"]
                if cursor is None:
                    break
            assert [len(page) for page in pages] == [5, 5, 2]
            assert [row for page in pages for row in page] == whole
        monkeypatch.undo()
        first = await ask(run, EVERYTHING | {"limit": 5})
        await run.client.delete(f"/v1/collections/shop/items/{whole[6]['id']}")
        second = await ask(run, EVERYTHING | {"limit": 5, "cursor": first["cursor"]})
        assert [row["id"] for row in second["data"]] == [row["id"] for i, row in enumerate(whole[5:10]) if i != 1]
        other = await ask(run, EVERYTHING | {"cursor": first["cursor"], "candidates": 7}, 422)
        assert "is not from an answer to this request" in other["detail"]
        assert "is not from an answer" in (await ask(run, EVERYTHING | {"cursor": "abc"}, 422))["detail"]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
async def test_the_index_proposes_if_there_are_more_items(tmp_path, pooling: str) -> None:
    async with running(tmp_path) as run:
        await noise(run, 20, pooling=pooling)
        vector = (await run.embed([photo(3)]))[0].result().vector(pooling, True)
        if pooling == "cls":
            expected = await run.client.post("/v1/collections/shop/search", json={"vector": vector.tolist(), "k": 5})
        else:
            region = {"image": text(photo(3)), **BOX}
            expected = await run.client.post("/v1/collections/shop/search", json={"region": region, "k": 5})
        answer = await ask(run, EVERYTHING | {"candidates": 5})
    assert {row["id"] for row in answer["data"]} == {hit["id"] for hit in expected.json()["data"]}
    assert (answer["total"], answer["examined"]) == (5, 5)


async def test_features_that_are_not_cached_are_computed_once(tmp_path) -> None:
    async with running(tmp_path, patch_store_bytes=0) as run:
        await noise(run)
        first = await ask(run, EVERYTHING)
    async with running(tmp_path) as run:
        second = await ask(run, EVERYTHING)
        assert run.engine.images == 12 + 2  # the reference and the image of zeros
    async with running(tmp_path) as run:
        third = await ask(run, EVERYTHING)
        assert run.engine.images == 2
    assert first["data"] == second["data"] == third["data"]


async def test_what_cannot_be_computed_in_time_is_pending(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(find_region, "_COMPUTED_AT_ONCE", 1)
    async with running(tmp_path, patch_store_bytes=0) as run:
        await noise(run)
    async with running(tmp_path, engine=FakeEngine(delay_s=0.25), request_deadline_s=4.0) as run:
        answer = await ask(run, EVERYTHING)
        assert 0 < answer["pending"] < 12
        assert answer["examined"] + answer["pending"] == 12
        for _ in range(6):
            again = await ask(run, EVERYTHING)
        assert (again["examined"], again["pending"]) == (12, 0)


async def test_images_that_are_gone_or_unknown_are_counted(tmp_path, caplog) -> None:
    async with running(tmp_path, patch_store_bytes=0, patch_cache_bytes=0) as run:
        await noise(run)
        digest = hashlib.sha256(photo(5)).hexdigest()
        (tmp_path / "originals" / digest[:2] / digest[2:4] / digest).unlink()
        items = [{"id": "v1", "vector": np.ones(DIMS).tolist()}]
        assert (await run.client.post("/v1/collections/shop/items", json={"items": items})).status_code == 200
        answer = await ask(run, EVERYTHING)
        assert (answer["examined"], answer["unreadable"], answer["total"]) == (11, 2, 11)
        gone = await ask(run, {"references": [{"id": "p05", **BOX}]}, 422)
        assert "references.0: the image of item 'p05' cannot be read" in gone["detail"]
        run.engine.fails = lambda pixels: len(run.engine.batches) > 1 and pixels.any()
        run.engine.batches.clear()
        assert (await ask(run, EVERYTHING, 500))["code"] == "engine_failed"


async def test_a_cancelled_request_stops(tmp_path, monkeypatch) -> None:
    calls: list[int] = []
    slow = find_region._scores

    def scores(region, spec, patches):
        calls.append(len(patches))
        import time

        time.sleep(0.05)
        return slow(region, spec, patches)

    monkeypatch.setattr(find_region, "_SLICE", 1)
    monkeypatch.setattr(find_region, "_scores", scores)
    async with running(tmp_path) as run:
        await noise(run, 40)
        task = asyncio.create_task(run.client.post(PATH, json=EVERYTHING))
        await until(lambda: len(calls) >= 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        stopped = len(calls)
        await asyncio.sleep(0.3)
        assert len(calls) <= stopped + 2  # one for each thread
    assert len(calls) < 20


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ({}, 422, "references: Field required"),
        ({"references": []}, 422, "references: List should have at least 1 item"),
        ({"references": [{"id": "p01", **BOX}] * 9}, 422, "references: List should have at most 8 items"),
        ({"references": [BOX]}, 422, "references.0: exactly one of image and id is needed, not none"),
        ({"references": [{"id": "p01", "image": text(photo(1)), **BOX}]}, 422, "is needed, not both"),
        ({"references": [{"id": "none", **BOX}]}, 404, "has no item 'none'"),
        ({"references": [{"id": "p01"}]}, 422, "references.0: exactly one of box, mask and point is needed, not none"),
        ({"references": [{"id": "p01", **BOX, "point": [1, 1]}]}, 422, "not box and point"),
        ({"references": [{"image": text(photo(1)), "box": [99, 0, 5, 5]}]}, 422, "references.0.box [99.0, 0.0, 5.0"),
        ({"references": [{"id": "p01", "box": [99, 0, 5, 5]}]}, 422, "is outside the part of the image"),
        ({"references": [{"id": "p01", "box": [0, 0, 5, 0]}]}, 422, "has no area"),
        ({"references": [{"id": "p01", "point": [0, 40]}]}, 422, "references.0.point [0.0, 40.0] is outside the image"),
        (
            {"references": [{"image": text(photo(1)), "mask": {"size": [40, 32], "counts": "0"}}]},
            422,
            "references.0.mask.size is [40, 32], but the image has [32, 40]",
        ),
        ({"references": [{"id": "p01", "mask": {"size": [32, 40], "counts": [1280]}}]}, 422, "mask is empty"),
        ({"references": [{"id": "p01", "mask": {"size": [32, 40], "counts": [1, 2]}}]}, 422, "sum to 3, not to 1280"),
        ({"references": [{"image": "YWJj" * 20, **BOX}]}, 415, "items cannot be used: [0]"),
        ({"references": [{"id": "p01", **BOX, "colour": 1}]}, 422, "references.0.colour: unknown field"),
        ({"references": [{"id": "p01", **BOX}], "candidates": 10_001}, 422, "candidates: Input should be"),
        ({"references": [{"id": "p01", **BOX}], "limit": 101}, 422, "limit: Input should be"),
        ({"references": [{"id": "p01", **BOX}], "min_score": 1.5}, 422, "min_score: Input should be"),
        ({"references": [{"id": "p01", **BOX}], "filter": {"key": "a"}}, 422, "filter"),
        ({"references": [{"id": "p01", **BOX}], "model": "gpt"}, 404, "model 'gpt' is not served here"),
    ],
)
async def test_bad_requests(tmp_path, body: dict[str, Any], status: int, detail: str) -> None:
    async with running(tmp_path) as run:
        await noise(run, 3)
        assert detail in (await ask(run, body, status))["detail"]


async def test_collections_that_cannot_be_searched(tmp_path) -> None:
    async with running(tmp_path) as run:
        await noise(run, 2, originals=False)
        bare = await ask(run, EVERYTHING, 422)
        missing = await ask(run, EVERYTHING, 404, "/v1/collections/none/find-region")
        bad_name = await ask(run, EVERYTHING, 422, "/v1/collections/UP/find-region")
        spec = CollectionSpec("b" * 64 + "/cls/l2/28x28/fp32", DIMS, originals=True)
        await run.service.store.create("other", spec)
        await run.service.store.upsert("other", [Item("a", np.ones(DIMS, np.float32))], tag=spec.tag)
        mismatch = await ask(run, EVERYTHING, 409, "/v1/collections/other/find-region")
    assert "collection 'shop' stores none: create it with originals" in bare["detail"]
    assert missing["code"] == "collection_not_found"
    assert bad_name["code"] == "invalid_request"
    assert mismatch["code"] == "model_mismatch"


async def test_an_empty_collection_has_no_results(tmp_path) -> None:
    async with running(tmp_path) as run:
        await run.client.put("/v1/collections/shop", json={"originals": True})
        answer = await ask(run, EVERYTHING)
    assert (answer["data"], answer["total"], answer["examined"]) == ([], 0, 0)


def test_rankings_are_few_and_recent() -> None:
    now = 0.0
    kept = Rankings(now=lambda: now)
    ranking = Ranking([Ranked(-0.5, "a", "f" * 64), Ranked(-0.5, "b", "0" * 64), Ranked(-0.25, "a", "0" * 64)], 3, 0, 0)
    for i in range(rankings.MAX_KEPT + 1):
        kept.keep(("shop", str(i)), ranking)
    assert kept.get(("shop", "0")) is None
    assert kept.get(("shop", "1")) is ranking
    now = rankings.MAX_AGE_S + 1
    assert kept.get(("shop", "1")) is None
    assert ranking.page((-0.5, "a"), 1) == (ranking.items[1:2], True)
    assert ranking.page((-0.5, "ab"), 5) == (ranking.items[1:], False)
    assert ranking.page((-0.25, "z"), 5) == ([], False)
