"""Tests of searching over HTTP: every form of query compared with the plain definition, batches, filters and hostile
bodies.
"""

import asyncio
import base64
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import uvicorn

from model.preprocess import crop_box
from service.errors import InvalidRequest
from service.outcomes import numbered
from service.retrieval import reading
from service.retrieval import search as retrieval_search
from service.retrieval.combine import combined
from service.retrieval.origins import Origin
from service.schemas import DuplicatesIn, ParamsIn, PartIn, RegionIn, SearchIn
from service.search.filters import matches, parse_filter
from service.search.store import CollectionSpec, Item, SearchParams
from service.vision import region
from service.vision.mask import coco_rle_encode
from tests.dict_store import DictStore
from tests.fakes import DIMS, SPEC, FakeEngine, fake_artifact, most_s, photo, running, until

SEARCH = "/v1/collections/shop/search"
JSON = {"Content-Type": "application/json"}
N = 12


def text_of(image: bytes) -> str:
    return base64.b64encode(image).decode()


class CountingStore(DictStore):
    """A store that records its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    async def info(self, collection):
        self.calls.append(("info",))
        return await super().info(collection)

    async def get(self, collection, ids):
        self.calls.append(("get", len(ids)))
        return await super().get(collection, ids)

    async def search(self, collection, vectors, k, *, tag, where=None, params=None, **others):
        self.calls.append(("search", len(vectors), k, where, params))
        return await super().search(collection, vectors, k, tag=tag, where=where, params=params)


async def fill(run, store, *, pooling="cls", count=N, name="shop", **spec) -> list[Item]:
    """Create a collection of noise images p00, p01, ..., and return its items as stored."""
    tag = run.service.tag(pooling=pooling)
    dims = DIMS * (2 if pooling == "cls+mean" else 1)
    await store.create(name, CollectionSpec(tag, dims, **spec))
    embedded = await run.embed([photo(i) for i in range(count)])
    items = [
        Item(f"p{i:02}", one.result().vector(pooling, True), {"i": i, "half": "even" if i % 2 == 0 else "odd"})
        for i, one in enumerate(embedded)
    ]
    await store.upsert(name, items, tag=tag)
    run.engine.batches.clear()
    return [item for item in await store.get(name, [item.id for item in items]) if item]


def plain(items, vector, k=10, offset=0, exclude=(), where=None, threshold=-2.0) -> list[tuple[str, float]]:
    """Return all items sorted by their cosine, which is the definition of a search."""
    vector = np.asarray(vector, np.float64) / np.linalg.norm(np.asarray(vector, np.float64))
    condition = parse_filter(where) if where else None
    scored = [
        (item.id, float(item.vector @ vector))
        for item in items
        if item.id not in exclude and (condition is None or matches(condition, item.metadata, item.id))
    ]
    scored = [pair for pair in scored if pair[1] >= threshold]
    return sorted(scored, key=lambda pair: (-pair[1], pair[0]))[offset : offset + k]


def pairs(data) -> list[tuple[str, float]]:
    return [(hit["id"], pytest.approx(hit["score"], abs=1e-5)) for hit in data]


async def ask(run, body, status=200, path=SEARCH):
    answer = await run.client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


# Forms of query


async def test_a_vector_a_photo_and_an_item_find_what_the_definition_says(tmp_path):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        items = await fill(run, store)
        vector = np.random.default_rng(1).normal(size=DIMS)
        by_vector = await ask(run, {"vector": vector.tolist(), "k": 5})
        by_image = await ask(run, {"image": text_of(photo(3)), "k": 5})
        by_id = await ask(run, {"id": "p03", "k": 5})
    assert pairs(by_vector["data"]) == plain(items, vector, 5)
    assert pairs(by_image["data"]) == plain(items, items[3].vector, 5)
    assert by_image["data"][0]["id"] == "p03"
    assert pairs(by_id["data"]) == plain(items, items[3].vector, 5, exclude=["p03"])  # not the item itself
    assert by_id["data"][0]["metadata"] == {
        "i": int(by_id["data"][0]["id"][1:]),
        "half": by_id["data"][0]["metadata"]["half"],
    }
    assert "source" not in by_id["data"][0]
    assert by_id["collection"] == "shop"
    assert by_id["fingerprint"] == "a" * 64
    assert by_vector["timings"].keys() == {"search", "total"}
    assert {"search", "total", "infer"} <= by_image["timings"].keys() | {"infer"}


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
async def test_the_collection_decides_the_pooling(tmp_path, pooling):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        items = await fill(run, store, pooling=pooling)
        by_image = await ask(run, {"image": text_of(photo(50))})
        [one] = await run.embed([photo(50)])
        by_vector = await ask(run, {"vector": one.result().vector(pooling, True).tolist()})
    assert pairs(by_image["data"]) == pairs(by_vector["data"]) == plain(items, one.result().vector(pooling, True))


async def test_combine_is_the_weighted_sum_of_unit_vectors(tmp_path):
    store = DictStore()
    vector = np.random.default_rng(2).normal(size=DIMS) * 100  # of any scale
    parts = [
        {"image": text_of(photo(40))},
        {"id": "p01", "weight": 2},
        {"id": "p02", "weight": -0.5},
        {"vector": vector.tolist(), "weight": 0.25},
    ]
    async with running(tmp_path, store=store) as run:
        items = await fill(run, store)
        [one] = await run.embed([photo(40)])
        found = await ask(run, {"combine": parts, "k": 10})
        cancelled = await ask(run, {"combine": [{"id": "p01"}, {"id": "p01", "weight": -1}]}, 422)
        nothing = await ask(run, {"combine": [{"id": "p01", "weight": 0}]}, 422)
        bad = await ask(run, {"combine": [{"image": text_of(photo(1))}, {"image": text_of(b"no photo")}]}, 415)
    by_hand = one.result().vector("cls", True).astype(np.float64) + 2 * items[1].vector - 0.5 * items[2].vector
    by_hand += 0.25 * vector / np.linalg.norm(vector)
    assert pairs(found["data"]) == plain(items, by_hand, exclude=["p01", "p02"])
    assert len(found["data"]) == 10  # as many as asked for, without those two
    assert "cancel out" in cancelled["detail"]
    assert "at least one must not be 0" in nothing["detail"]
    assert [error["index"] for error in bad["errors"]] == [1]


def test_combined_takes_vectors_of_any_scale():
    np.testing.assert_allclose(combined([[10, 0], [0, 1]], [1, 1]), [0.5**0.5, 0.5**0.5], atol=1e-6)
    np.testing.assert_allclose(combined([[0, 0.1], [30, 0]], [3, -4]), [-0.8, 0.6], atol=1e-6)


def test_what_is_left_of_vectors_that_cancel_out_is_not_searched_for():
    vector = np.random.default_rng(0).normal(size=64)
    almost = vector + 1e-7 * np.random.default_rng(1).normal(size=64)
    with pytest.raises(InvalidRequest, match="cancel out"):
        combined([vector, almost], [1, -1])
    with pytest.raises(InvalidRequest, match="cancel out"):
        combined([vector, almost], [1000, -1000])
    different = vector + 1e-3 * np.random.default_rng(1).normal(size=64)
    assert np.linalg.norm(combined([vector, different], [1, -1])) == pytest.approx(1, abs=1e-6)


def slow_weights(covers, box, grid, steps=40):
    """Return the share of each patch that the region covers, estimated by sampling points."""
    x, y, width, height = box
    weights = np.zeros(grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            inside = 0
            for i in range(steps):
                for j in range(steps):
                    px = x + (column + (j + 0.5) / steps) * width / grid[1]
                    py = y + (row + (i + 0.5) / steps) * height / grid[0]
                    inside += covers(px, py)
            weights[row, column] = inside / steps**2
    return weights


@pytest.mark.parametrize("grid", [(3, 5), (5, 3)])
def test_weights_of_boxes_and_masks_on_a_grid_that_is_not_square(monkeypatch, grid):
    monkeypatch.setattr(region, "_PIXELS_PER_BLOCK", 200)  # a mask in several blocks of rows
    crop, box = (4.0, 2.0, 60.0, 30.0), (9.0, 5.0, 31.0, 14.0)
    mask = np.zeros((36, 70), bool)
    mask[5:19, 9:40] = True
    expected = slow_weights(lambda x, y: 9 <= x < 40 and 5 <= y < 19, crop, grid)
    np.testing.assert_allclose(region.box_weights(box, crop, grid), expected, atol=0.03)
    by_mask = region.mask_weights(coco_rle_encode(mask), (36, 70), crop, grid)
    np.testing.assert_allclose(by_mask, region.box_weights(box, crop, grid), atol=1e-5)
    mask[5:19, 60:70] = True  # and something of no box
    mask[30:, :20] = True
    expected = slow_weights(lambda x, y: mask[int(y), int(x)], crop, grid)
    by_mask = region.mask_weights(coco_rle_encode(mask), (36, 70), crop, grid)
    np.testing.assert_allclose(by_mask, expected, atol=0.03)


@pytest.mark.parametrize("side", range(41, 61))
def test_no_patch_counts_more_than_once(side):
    whole = {"size": [side, side + 3], "counts": [0, side * (side + 3)]}
    weights = region.mask_weights(whole, (side, side + 3), (1.3, 2.7, side - 7.1, side - 9.3), (5, 7))
    assert 0.999 < weights.min() <= weights.max() <= 1


async def test_a_region_is_the_mean_of_its_patches(tmp_path):
    store = DictStore()
    image, size = photo(7, size=(40, 32)), (32, 40)
    crop = crop_box(*size, SPEC)
    box = (9.5, 5.0, 20.0, 12.5)
    mask = np.zeros(size, bool)
    mask[4:20, 8:31] = True
    mask[6:9, 10:12] = False
    async with running(tmp_path, store=store) as run:
        items = await fill(run, store, pooling="mean")
        tokens = await run.service.pipeline.analyse(image, lambda analysed: analysed.patches.copy())
        whole = await ask(run, {"region": {"image": text_of(image), "box": list(crop)}})
        whole_image = await ask(run, {"image": text_of(image)})
        by_box = await ask(run, {"region": {"image": text_of(image), "box": list(box)}})
        by_mask = await ask(run, {"region": {"image": text_of(image), "mask": coco_rle_encode(mask)}})
        lists = {"size": list(size), "counts": [0, mask.size]}
        everything = await ask(run, {"region": {"image": text_of(image), "mask": lists}})
        shared_by_mask = {"image": text_of(image), "mask": coco_rle_encode(mask), "box": list(box)}
        both = await ask(run, {"region": shared_by_mask}, 422)
    in_box = slow_weights(lambda x, y: box[0] <= x < box[0] + box[2] and box[1] <= y < box[1] + box[3], crop, (2, 2))
    in_mask = slow_weights(lambda x, y: mask[int(y), int(x)], crop, (2, 2))
    assert pairs(by_box["data"]) == [(i, pytest.approx(s, abs=2e-2)) for i, s in plain(items, in_box.ravel() @ tokens)]
    assert [h["id"] for h in by_mask["data"]] == [i for i, _ in plain(items, in_mask.ravel() @ tokens)]
    assert pairs(whole["data"]) == pairs(whole_image["data"]) == pairs(everything["data"])
    assert "exactly one of box and mask is needed, not box and mask" in both["detail"]


@pytest.mark.parametrize(
    ("region", "words"),
    [
        ({"box": [0, 0, 5.9, 32]}, "crop box [6.0, 2.0, 28.0, 28.0]"),
        ({"box": [-100, -100, 5, 5]}, "outside the part of the image that the network sees"),
        (
            {"box": [10, 10, 0, 5]},
            "region.box [10.0, 10.0, 0.0, 5.0] has no area: [x, y, width, height] in pixels",
        ),
        ({"box": [10, 10, 5, -5]}, "needs width and height above 0"),
        ({"box": [10, 10, 5]}, "region.box: List should have at least 4 items after validation, not 3"),
        ({"box": ["x", 10, 5, 5]}, "region.box.0: Input should be a valid number, not 'x'"),
        ({"box": [10, 10, "5", 5]}, "region.box.2: Input should be a valid number, not '5'"),
        ({"box": [10, True, 5, 5]}, "region.box.1: Input should be a valid number, not True"),
        ({"box": [1e308, 1e308, 1e308, 1e308]}, "outside"),
        ({}, "region: exactly one of box and mask is needed, not none"),
        ({"mask": {"size": [40, 32], "counts": [0, 1280]}}, "region.mask.size is [40, 32], but the image has [32, 40]"),
        ({"mask": 7}, "region.mask: Input should be an object, not 7"),
        ({"mask": {"size": [10**9, 10**9], "counts": "0"}}, "image has [32, 40]"),
        ({"mask": {"size": [32, 40], "counts": [1280]}}, "region.mask is empty: it must have at least one pixel"),
        ({"mask": {"size": [32, 40], "counts": [0, 10]}}, "region.mask.counts: the run lengths sum to 10, not to 1280"),
        (
            {"mask": {"size": [32, 40], "counts": [0, -1, 1281]}},
            "region.mask.counts: a run length is -1, but must be from 0 to 1280",
        ),
        (
            {"mask": {"size": [32, 40], "counts": [2**60] * 16 + [1280]}},
            f"is {2**60}, but must be from 0 to 1280",
        ),  # the sum wraps around
        ({"mask": {"size": [32, 40], "counts": [2**64 - 1]}}, "region.mask"),
        ({"mask": {"size": [32, 40], "counts": [1, 1.5, "x"]}}, "or a list of integers; 1.5 is not an integer"),
        ({"mask": {"size": [32, 40], "counts": [True, 1279]}}, "or a list of integers; True is not an integer"),
        ({"mask": {"size": [32, 40], "counts": "not run lengths \x00"}}, "region.mask.counts: not compressed COCO run"),
        ({"mask": {"size": [32, 40], "counts": None}}, "at most 1,000,000 long, not None"),
        ({"mask": {"size": [32], "counts": "0"}}, "region.mask.size: List should have at least 2 items"),
        (
            {"mask": {"size": [32, 40], "counts": "0" * 1_000_001}},
            "region.mask.counts: must be a COCO run-length string or",
        ),
        ({"box": [10, 10, 5, 5], "polygon": []}, "region.polygon: unknown field"),
    ],
)
async def test_regions_that_make_no_sense(tmp_path, region, words):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        await fill(run, store, pooling="mean", count=2)
        answer = await ask(run, {"region": {"image": text_of(photo(7, size=(40, 32))), **region}}, 422)
    assert words in answer["detail"]
    assert "errors" not in answer  # the image is good
    assert len(answer["detail"]) < 1500


async def test_a_region_needs_vectors_of_pooling_mean(tmp_path):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        await fill(run, store, count=2)
        answer = await ask(run, {"region": {"image": text_of(photo(7)), "box": [8, 8, 9, 9]}}, 422)
        broken = await ask(run, {"region": {"image": "!", "box": [8, 8, 9, 9]}}, 422)
    assert "has pooling cls" in answer["detail"]
    assert "a collection with pooling mean" in answer["detail"]
    assert run.engine.images == 0
    assert broken["code"] == "invalid_request"


async def test_a_vector_may_be_base64(tmp_path):
    vector = np.random.default_rng(1).normal(size=DIMS).astype("<f4")
    text = text_of(vector.tobytes())
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        await fill(run, store)
        for key in ("vector", "combine", "queries"):
            bodies = ({"vector": vector.tolist()}, {"vector": text})
            listed, encoded = [await ask(run, body if key == "vector" else {key: [body]}) for body in bodies]
            for answer in (listed, encoded):
                del answer["timings"]
            assert encoded == listed


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the base64 text of a vector must have 4 bytes (little-endian float32) for each of 1 to 8,192 numbers"),
        (b"12345", "1 to 8,192 numbers, not 6 bytes"),
        (bytes(4 * 8193), "1 to 8,192 numbers, not 32,772 bytes"),
        (bytes(3_000_000), "1 to 8,192 numbers, not 3,000,000 bytes"),
        (bytes(4 * DIMS), f"a vector of {DIMS} zeros has no direction"),
        (np.array([1, np.inf, 2], "<f4").tobytes(), "vector.1: must be a finite number, not inf"),
        (np.array([1, 2, np.nan], "<f4").tobytes(), "vector.2: must be a finite number, not nan"),
        ("AAAA\u00e9", "a vector must be a list of numbers or the base64 text of float32 numbers, not 'AAAA\u00e9'"),
        ("AAAA=AAA", "must be a list of numbers or the base64 text of float32 numbers, not 'AAAA=AAA'"),
        ("data:;base64,AAAA", "must be a list of numbers or the base64 text of float32 numbers, not 'data:;"),
    ],
)
async def test_base64_that_is_no_vector(tmp_path, data, words):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        await fill(run, store, count=2)
        answer = await ask(run, {"vector": data if isinstance(data, str) else text_of(data)}, 422)
        part = await ask(run, {"combine": [{"vector": data if isinstance(data, str) else text_of(data)}]}, 422)
    assert words in answer["detail"]
    assert answer["param"] == "vector"
    assert part["param"] == "combine.0.vector"
    assert len(answer["detail"]) < 400


async def test_a_part_of_weight_0_counts_nothing(tmp_path):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        items = await fill(run, store)
        some = await ask(run, {"combine": [{"id": "p01"}, {"id": "p02", "weight": 0}]})
        for weights in ([0], [0, 0.0, -0.0]):
            none = await ask(run, {"combine": [{"id": "p01", "weight": weight} for weight in weights]}, 422)
            assert none["param"] == "combine"
            assert f"combine: the weights are {[float(w) for w in weights]}: " in none["detail"]
            assert "at least one must not be 0" in none["detail"]
    assert pairs(some["data"]) == plain(items, items[1].vector, exclude=["p01", "p02"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"k": True}, "k: Input should be a valid integer from 1 to 1000, not True"),
        ({"k": "5"}, "k: Input should be a valid integer from 1 to 1000, not '5'"),
        ({"k": 1.5}, "k: Input should be a valid integer from 1 to 1000, not 1.5"),
        ({"offset": "1"}, "offset: Input should be a valid integer from 0 to 10000, not '1'"),
        ({"score_threshold": "0.5"}, "score_threshold: Input should be a valid number, not '0.5'"),
        ({"params": {"exact": "yes"}}, "params.exact: Input should be a valid boolean, not 'yes'"),
        ({"queries": [{"id": "p01", "k": True}]}, "[0] k: Input should be a valid integer from 1 to 1000, not True"),
        ({"combine": [{"id": "p01", "weight": "2"}]}, "combine.0.weight: Input should be a valid number, not '2'"),
        ({"combine": [{"id": "p01", "weight": True}]}, "combine.0.weight: Input should be a valid number, not True"),
        ({"combine": [5]}, "combine.0: Input should be an object, not 5"),
        ({"combine": [{"id": "p01"}] * 17}, "combine: List should have at most 16 items after validation, not 17"),
        ({"combine": [{"id": "\n"}]}, "combine.0.id '\\n' is not allowed: 1 to 256 characters"),
        ({"combine": [{"id": "p01"}, {"vector": [0, 0]}]}, "combine.1.vector: a vector of 2 zeros has no direction"),
        (
            {"combine": [{"id": "p01"}, {"id": "p01", "weight": -1}]},
            "combine: with the weights [1.0, -1.0] the vectors cancel out",
        ),
    ],
)
async def test_values_of_another_type_and_parts_that_make_no_sense(tmp_path, body, words):
    """JSON has types, so text in JSON is not accepted as a number. In forms and URLs every value is text."""
    store = DictStore()
    form = {} if "queries" in body or "combine" in body else {"id": "p00"}
    async with running(tmp_path, store=store) as run:
        await fill(run, store, count=2)
        answer = await ask(run, {**form, **body}, 422)
        text = await run.client.post(
            SEARCH, params={"k": "true"}, content=photo(), headers={"Content-Type": "image/png"}
        )
    assert words in answer["detail"]
    assert len(answer["detail"]) < 400
    assert "k: Input should be a valid integer from 1 to 1000, not 'true'" in text.json()["detail"]


# What is done with what is found


async def test_filter_offset_and_threshold(tmp_path):
    store = CountingStore()
    where = {"and": [{"key": "half", "eq": "even"}, {"key": "i", "lt": 10}]}
    async with running(tmp_path, store=store) as run:
        items = await fill(run, store)
        vector = items[4].vector.tolist()
        filtered = await ask(run, {"vector": vector, "filter": where, "k": 3, "offset": 1})
        floor = plain(items, vector)[4][1]
        above = await ask(run, {"vector": vector, "score_threshold": floor - 1e-6, "offset": 2})
        beyond = await ask(run, {"id": "p00", "offset": 9_990})
        tried = await ask(run, {"vector": vector, "params": {"exact": True, "ef_search": 77, "nprobe": 3}})
    assert pairs(filtered["data"]) == plain(items, vector, 3, 1, where=where)
    assert pairs(above["data"]) == plain(items, vector, 10)[2:5]
    assert beyond["data"] == []
    assert len(tried["data"]) == 10
    assert store.calls[-1][-1] == SearchParams(exact=True, ef_search=77, nprobe=3)


async def test_a_hit_at_the_threshold_counts(tmp_path):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        items = await fill(run, store)
        for query in ({"vector": items[4].vector.tolist()}, {"image": text_of(photo(4))}):
            scores = [hit["score"] for hit in (await ask(run, query))["data"]]
            for place in (0, 3):
                above = await ask(run, {**query, "score_threshold": scores[place]})
                assert [hit["score"] for hit in above["data"]] == scores[: place + 1]


async def test_vectors_come_when_asked_for(tmp_path):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        items = await fill(run, store)
        one = await ask(run, {"vector": items[0].vector.tolist(), "k": 3, "include": ["vector"]})
        batch = await ask(run, {"queries": [{"id": "p00", "include": ["vector"]}, {"id": "p00"}]})
    for hit in one["data"] + batch["results"][0]["data"]:
        np.testing.assert_array_equal(np.float32(hit["vector"]), items[int(hit["id"][1:])].vector)
    assert not any("vector" in hit for hit in batch["results"][1]["data"])


async def test_the_photos_source_is_told(tmp_path):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        await store.upsert("shop", [Item("a", np.ones(DIMS), {}, source="https://x/1.jpg")], tag=run.service.tag())
        found = await ask(run, {"vector": [1.0] * DIMS})
    assert found["data"][0]["source"] == "https://x/1.jpg"


async def test_photos_as_files_and_raw_bodies_take_the_options_as_text(tmp_path):
    store = DictStore()
    where = {"key": "half", "eq": "odd"}
    fields = {"k": "3", "offset": "1", "score_threshold": "-0.9", "filter": json.dumps(where), "include": "vector"}
    async with running(tmp_path, store=store) as run:
        items = await fill(run, store)
        form = await run.client.post(SEARCH, files={"file": photo(3)}, data=fields)
        raw = await run.client.post(SEARCH, content=photo(3), params=fields, headers={"Content-Type": "image/png"})
        grouped = await run.client.post(SEARCH, files={"file": photo(3)}, data={"group_by": "half", "k": "1"})
        bad = await run.client.post(SEARCH, files={"file": photo(3)}, data={"filter": "{"})
        deep = await run.client.post(SEARCH, files={"file": photo(3)}, data={"params": '{"exact": 7}'})
        two = await run.client.post(SEARCH, files=[("file", photo(3)), ("file", photo(4))])
        broken = await run.client.post(SEARCH, content=b"", headers={"Content-Type": "image/png"})
    assert pairs(form.json()["data"]) == pairs(raw.json()["data"]) == plain(items, items[3].vector, 3, 1, where=where)
    assert len(form.json()["data"][0]["vector"]) == DIMS
    assert grouped.json()["groups"][0]["value"] == "odd"
    assert (bad.status_code, deep.status_code, two.status_code) == (422, 422, 422)
    assert "filter is not JSON" in bad.json()["detail"]
    assert "params.exact" in deep.json()["detail"]
    assert broken.json()["errors"][0]["index"] == 0


async def test_groups_over_http(tmp_path):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        items = await fill(run, store)
        found = await ask(run, {"id": "p00", "group_by": "half", "group_size": 3, "k": 2})
        none = await ask(run, {"id": "p00", "group_by": "no.such", "k": 2})
        where = await ask(run, {"id": "p00", "group_by": "half", "filter": {"key": "half", "eq": "odd"}, "offset": 0})
    for group in found["groups"]:
        expected = plain(items, items[0].vector, 3, exclude=["p00"], where={"key": "half", "eq": group["value"]})
        assert pairs(group["data"]) == expected
    assert {group["value"] for group in found["groups"]} == {"even", "odd"}
    assert found["truncated"] is False
    assert none["groups"] == []
    assert [len(group["data"]) for group in where["groups"]] == [1]


async def test_groups_heed_offset_threshold_and_parameters(tmp_path):
    store = CountingStore()
    async with running(tmp_path, store=store) as run:
        items = await fill(run, store)
        query = {"vector": items[0].vector.tolist(), "group_by": "i", "k": 3}
        deeper = await ask(run, {**query, "offset": 2, "params": {"ef_search": 77}})
        params = store.calls[-1][-1]
        ranked = plain(items, items[0].vector, N)
        above = await ask(run, {**query, "k": N, "score_threshold": ranked[4][1] - 1e-6})
    assert [group["data"][0]["id"] for group in deeper["groups"]] == [item_id for item_id, _ in ranked[2:5]]
    assert params == SearchParams(ef_search=77)
    assert [group["data"][0]["id"] for group in above["groups"]] == [item_id for item_id, _ in ranked[:5]]


async def test_the_times_are_told_in_a_header_and_are_the_slowest_of_a_batch(tmp_path, monkeypatch):
    store = DictStore()

    async def origins(service, target, asked):
        vector = np.eye(DIMS, dtype=np.float32)[0]
        return numbered([Origin(vector, timings={"decode": ms}) for ms in (2.0, 7.5, 1.0)])

    async with running(tmp_path, store=store) as run:
        await fill(run, store, count=2)
        answer = await run.client.post(SEARCH, json={"image": text_of(photo(1))})
        told = dict(part.split(";dur=") for part in answer.headers["Server-Timing"].split(", "))
        monkeypatch.setattr(retrieval_search, "find_origins", origins)
        batch = await ask(run, {"queries": [{"id": "p00"}, {"id": "p01"}, {"id": "p00"}]})
    assert told.keys() == answer.json()["timings"].keys()
    assert float(told["total"]) == pytest.approx(answer.json()["timings"]["total"], rel=1e-3)
    assert batch["timings"]["decode"] == 7.5


# Models


async def test_the_model_of_a_vector_is_checked(tmp_path):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        items = await fill(run, store)
        await fill(run, store, pooling="mean", name="means")
        vector = items[0].vector.tolist()
        right = await ask(run, {"vector": vector, "fingerprint": "a" * 64})
        wrong = await ask(run, {"vector": vector, "fingerprint": "b" * 64}, 409)
        means = "/v1/collections/means/search"
        await ask(run, {"vector": vector, "fingerprint": "a" * 64}, path=means)
        wrong_too = await ask(run, {"vector": vector, "fingerprint": "b" * 64}, 409, path=means)
        part = await ask(run, {"combine": [{"vector": vector, "fingerprint": "b" * 64}]}, 409)
        short = await ask(run, {"vector": [1.0, 2.0]}, 409)
        short_too = await ask(run, {"vector": [1.0, 2.0]}, 409, path=means)
        lonely = await ask(run, {"id": "p00", "fingerprint": "a" * 64}, 422)
    assert right["data"][0]["id"] == "p00"
    for answer in (wrong, wrong_too, part):
        assert answer["code"] == "model_mismatch"
        assert "a" * 64 in answer["detail"]
        assert "b" * 64 in answer["detail"]
    assert (short["code"], short_too["code"]) == ("conflict", "conflict")
    assert "dimension 8" in short["detail"]
    assert "fingerprint" in lonely["detail"]


async def test_a_collection_of_another_model_is_searched_by_its_own_items_only(tmp_path):
    store = DictStore()
    async with running(tmp_path, store=store, artifact=fake_artifact(digit="b")) as run:
        tag = run.service.tag("a" * 64)
        vectors = np.random.default_rng(0).normal(size=(5, DIMS)).astype(np.float32)
        await store.upsert("shop", [Item(f"p{i}", v) for i, v in enumerate(vectors)], tag=tag)
        by_id = await ask(run, {"id": "p1"})
        told = await ask(run, {"vector": [1.0] * DIMS, "fingerprint": "a" * 64})
        refused = await ask(run, {"vector": [1.0] * DIMS}, 409)
        photo_refused = await ask(run, {"image": text_of(photo())}, 409)
        batch = await ask(
            run,
            {"queries": [{"id": "p0"}, {"image": text_of(photo())}, {"vector": [1.0] * DIMS}], "on_error": "partial"},
        )
    assert len(by_id["data"]) == 4
    assert len(told["data"]) == 5
    assert refused["code"] == photo_refused["code"] == "model_mismatch"
    assert run.engine.images == 0
    assert [error["code"] for error in batch["errors"]] == ["model_mismatch"] * 2


# Batches


async def test_a_batch_answers_each_query_as_if_it_came_alone_in_few_calls(tmp_path):
    store = CountingStore()
    vectors = np.random.default_rng(3).normal(size=(4, DIMS)).tolist()
    where = {"key": "half", "eq": "odd"}
    queries = [
        {"vector": vectors[0]},
        {"vector": vectors[1]},
        {"id": "p05"},
        {"image": text_of(photo(60))},
        {"image": text_of(photo(61)), "k": 3},
        {"vector": vectors[2], "filter": where},
        {"combine": [{"id": "p01"}, {"image": text_of(photo(62))}], "filter": where},
        {"vector": vectors[3], "group_by": "half", "k": 1},
        {"id": "p05", "params": {"exact": True}},
    ]
    async with running(tmp_path, store=store) as run:
        await fill(run, store)
        store.calls.clear()
        batch = await ask(run, {"queries": queries})
        calls, batches = list(store.calls), list(run.engine.batches)
        alone = [await ask(run, query) for query in queries]
    assert sum(shape[0] for shape in batches) == 3
    searched = [call[:3] for call in calls if call[0] == "search"]
    assert sorted(searched) == sorted(
        [("search", 4, 11), ("search", 1, 3), ("search", 2, 11), ("search", 1, 2), ("search", 1, 11)]
    )
    assert [call for call in calls if call[0] == "get"] == [("get", 2)]
    for index, (result, one) in enumerate(zip(batch["results"], alone, strict=True)):
        expected = {"index": index} | {key: one[key] for key in ("data", "groups", "truncated") if key in one}
        assert json.loads(json.dumps(result), parse_float=lambda f: round(float(f), 5)) == json.loads(
            json.dumps(expected), parse_float=lambda f: round(float(f), 5)
        )
    assert "errors" not in batch


async def test_queries_of_a_batch_that_go_to_different_depths(tmp_path):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        items = await fill(run, store)
        found = (await ask(run, {"queries": [{"id": "p00", "k": 3}, {"id": "p01", "k": 3, "offset": 6}]}))["results"]
    assert pairs(found[0]["data"]) == plain(items, items[0].vector, 3, exclude=["p00"])
    assert pairs(found[1]["data"]) == plain(items, items[1].vector, 3, 6, exclude=["p01"])


async def test_what_a_request_may_ask_for_in_all_is_allowed_up_to_the_limit(tmp_path):
    store = DictStore()
    where = {"key": "i", "in": list(range(10_000))}
    grouped = {"id": "p00", "k": 100, "group_by": "half", "group_size": 10}
    async with running(tmp_path, store=store) as run:
        await fill(run, store, count=3)
        assert reading.MAX_RESULTS_OF_BATCH == reading.MAX_VALUES == 10_000
        await ask(run, {"queries": [{"id": "p00", "k": 1000}] * 10})
        await ask(run, {"queries": [grouped] * 10})
        refused = await ask(run, {"queries": [grouped] * 10 + [{"id": "p00", "k": 1}]}, 422)
        await ask(run, {"id": "p00", "filter": where})
    assert "10,001 results in total" in refused["detail"]


async def test_1_and_true_are_different_filters(tmp_path):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        items = [Item("one", np.ones(DIMS), {"x": 1}), Item("true", np.ones(DIMS), {"x": True})]
        await store.upsert("shop", items, tag=run.service.tag())
        queries = [{"vector": [1.0] * DIMS, "filter": {"key": "x", "eq": value}} for value in (1, True, 1.0)]
        found = await ask(run, {"queries": queries})
    assert [[hit["id"] for hit in result["data"]] for result in found["results"]] == [["one"], ["true"], ["one"]]


async def test_options_beside_queries_hold_for_each_that_says_nothing_else(tmp_path):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        items = await fill(run, store)
        body = {
            "queries": [{"id": "p00"}, {"id": "p01", "k": 4}, {"id": "p02", "filter": None}],
            "k": 2,
            "filter": {"key": "half", "eq": "odd"},
        }
        found = (await ask(run, body))["results"]
    where = body["filter"]
    assert pairs(found[0]["data"]) == plain(items, items[0].vector, 2, exclude=["p00"], where=where)
    assert pairs(found[1]["data"]) == plain(items, items[1].vector, 4, exclude=["p01"], where=where)
    assert pairs(found[2]["data"]) == plain(items, items[2].vector, 2, exclude=["p02"], where=where)  # null: not set


async def test_partial_errors_of_a_batch(tmp_path):
    store = DictStore()
    queries = [
        {"id": "p00"},
        {"id": "nobody"},
        {"image": text_of(b"not a photo")},
        {"image": "https://example.org/x.jpg"},
        {"vector": [0.0] * DIMS},
        {"vector": [1.0] * DIMS, "k": 0},
        {"vector": [1.0] * DIMS, "id": "p00"},
        "p00",
        {"combine": [{"id": "p00"}, {"id": "p00", "weight": -1}]},
        {"vector": [1.0, None] + [1.0] * (DIMS - 2)},
        {"id": "p00", "filter": {"key": "a"}},
        {"id": "p00", "rerank": "patches"},
        {"image": text_of(photo(3))},
    ]
    async with running(tmp_path, store=store) as run:
        await fill(run, store)
        some = await ask(run, {"queries": queries, "on_error": "partial"})
        failed = await ask(run, {"queries": queries}, 422)
        all_bad = await ask(run, {"queries": [{"id": "nobody"}] * 2, "on_error": "partial"}, 404)
    assert [result["index"] for result in some["results"]] == [0, 12]
    assert some["results"][1]["data"][0]["id"] == "p03"
    errors = {error["index"]: error for error in some["errors"]}
    assert sorted(errors) == list(range(1, 12))
    assert errors[1]["code"] == "item_not_found"
    assert errors[2]["code"] == "unsupported_image"
    assert "1 of 1" not in errors[2]["detail"]
    assert "does not fetch links" in errors[3]["detail"]
    assert "vector.1" in errors[9]["detail"]
    assert failed["code"] == "invalid_items"
    assert failed["errors"] == some["errors"]
    assert all_bad["code"] == "item_not_found"


# The path that must be fast


async def test_a_vector_costs_one_call_of_the_store(tmp_path):
    store = CountingStore()
    async with running(tmp_path, store=store) as run:
        await fill(run, store)
        store.calls.clear()
        await ask(run, {"vector": [1.0] * DIMS, "k": 2, "filter": {"key": "i", "gte": 3}})
        assert [call[0] for call in store.calls if call[0] == "search"] == ["search"]
        assert not [call for call in store.calls if call[0] == "get"]


# Bodies made to hurt


GOOD = [1.0] * DIMS


def nested(levels: int) -> dict:
    body: dict = {"key": "a", "eq": 1}
    for _ in range(levels):
        body = {"not": body}
    return body


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "exactly one of image, vector, id, combine, region is needed, not none"),
        ({"vector": GOOD, "id": "a"}, "not vector and id"),
        ({"vector": None}, "not none"),
        ({"vector": []}, "vector: a vector must be a list of 1 to 8,192 numbers, not [] of 0"),
        ({"vector": [0.5] * 8193}, "of 8,193"),
        ({"vector": [0.0] * DIMS}, "no direction"),
        ({"vector": ["1"] * DIMS}, "vector.0: must be a number, not '1'"),
        ({"vector": [1.0] * 7 + [True]}, "vector.7"),
        ({"vector": [1.0] * 7 + [None]}, "vector.7"),
        ({"vector": [1.0] * 7 + [[1.0]]}, "vector.7"),
        ({"vector": [1.0] * 7 + [{}]}, "vector.7"),
        ({"vector": "1,2,3"}, "vector: a vector must be a list"),
        ({"vector": {"0": 1.0}}, "vector: a vector must be a list"),
        ({"vector": 5}, "vector: a vector must be a list"),
        ({"vector": GOOD, "k": 0}, "k: Input should be greater"),
        ({"vector": GOOD, "k": 1001}, "k: Input should be less than or equal to 1000, not 1001"),
        ({"vector": GOOD, "k": "many"}, "k: "),
        ({"vector": GOOD, "k": 1000, "offset": 9001}, "k + offset is 10001; at most 10,000"),
        ({"vector": GOOD, "offset": -1}, "offset: "),
        ({"vector": GOOD, "score_threshold": 1.5}, "score_threshold: "),
        ({"vector": GOOD, "score_threshold": "NaN"}, "score_threshold: "),
        ({"vector": GOOD, "filter": nested(16)}, "nested more than 16 levels deep"),
        ({"vector": GOOD, "filter": nested(200)}, "nested more than 16 levels deep"),
        ({"vector": GOOD, "filter": []}, "a condition must be an object"),
        ({"vector": GOOD, "filter": {"key": "a", "in": list(range(10_001))}}, "more than 10,000 values"),
        ({"vector": GOOD, "filter": {"key": "a'b", "eq": 1}}, "is not allowed"),
        ({"vector": GOOD, "group_by": ".a"}, "group_by: key"),
        ({"vector": GOOD, "group_by": 'a"b'}, "group_by: key"),
        ({"vector": GOOD, "group_by": ""}, "group_by: "),
        ({"vector": GOOD, "group_by": ["a"]}, "group_by: "),
        ({"vector": GOOD, "group_by": "a", "group_size": 101}, "group_size: "),
        ({"vector": GOOD, "group_size": 2}, "group_size requires group_by"),
        ({"vector": GOOD, "params": {"ef": 5}}, "params.ef: unknown field"),
        ({"vector": GOOD, "params": {"ef_search": 0}}, "params.ef_search"),
        ({"vector": GOOD, "params": []}, "params: "),
        ({"vector": GOOD, "params": {f"k{i}": 0 for i in range(5000)}}, "params has 5,000 fields"),
        ({"vector": GOOD, "include": ["photo"]}, "include"),
        ({"vector": GOOD, "topk": 5}, "topk: unknown field; known fields are k, offset"),
        ({"vector": GOOD, "on_error": "partial"}, "on_error requires queries"),
        ({"vector": GOOD, "rerank": "patches"}, "a query by vector has none"),
        ({"combine": [{"id": "p00"}], "rerank": "patches"}, "a query by combine has none"),
        ({"id": "p00", "rerank": "colour"}, "rerank: "),
        ({"id": "p00", "matches": True}, "require rerank"),
        ({"id": "p00", "rerank_depth": 5}, "require rerank"),
        ({"id": "p00", "rerank": "patches", "rerank_depth": 101}, "rerank_depth: "),
        ({"id": "p00", "rerank": "patches", "group_by": "a"}, "cannot be combined"),
        ({"id": ""}, "id: "),
        ({"id": "a\nb"}, "no control characters"),
        ({"id": 5}, "id: "),
        ({"id": "x" * 257}, "id: "),
        ({"image": 5}, "5 is not an image"),
        ({"combine": []}, "combine: "),
        ({"combine": [{"id": "p00"}] * 17}, "combine: "),
        ({"combine": ["p00"]}, "combine.0: "),
        ({"combine": [{"id": "p00"}, {"weight": 2}]}, "combine.1: exactly one of image, vector and id is needed"),
        ({"combine": [{"id": "p00", "image": ""}]}, "combine.0: exactly one"),
        ({"combine": [{"id": "p00", "weight": "NaN"}]}, "combine.0.weight"),
        ({"combine": [{"id": "p00", "weight": 1e300}]}, "combine.0.weight"),
        ({"combine": [{"vector": [1.0, "x"]}]}, "combine.0.vector.1"),
        ({"combine": [{f"k{i}": 0 for i in range(5000)}]}, "combine has 5,000 fields"),
        ({"region": "all"}, "region: "),
        ({"region": {f"k{i}": 0 for i in range(5000)}}, "region has 5,000 fields"),
        ({"queries": []}, "queries: "),
        ({"queries": [{"id": "p00"}] * 65}, "queries: "),
        ({"queries": "all"}, "queries: "),
        ({"queries": [{"id": "p00"}], "vector": GOOD}, "vector cannot be combined with queries"),
        ({"queries": [{"id": "p00"}], "fingerprint": "a"}, "fingerprint cannot be combined with queries"),
        ({"queries": [{"id": "p00"}], "k": 0}, "k: "),
        ({"queries": [{"id": "p00", "k": 1000}] * 11}, "11,000 results in total"),
        ({"queries": [{"id": "p00", "offset": 900}] * 11}, "10,010 results in total"),
        ({"queries": [{"combine": [{"image": ""}] * 13}] * 5}, "65 images"),
        (
            {"queries": [{"id": "p00", "filter": {"key": "a", "in": [f"{q}", *range(6000)]}} for q in range(64)]},
            "the filters of one request have more than 10,000 values",
        ),
        ({"queries": [{f"k{i}": 0 for i in range(5000)}]}, "the query has 5,000 fields"),
        ({"queries": [{"queries": [{"id": "p00"}]}]}, "queries: unknown field"),
    ],
)
async def test_what_makes_no_sense_is_told_in_few_words(tmp_path, body, words):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        await fill(run, store, count=2)
        started = time.process_time()
        answer = await ask(run, body, 422)
        spent = time.process_time() - started
    assert words in json.dumps(answer)
    assert len(answer["detail"]) < 2500 or "queries" in body
    assert spent < most_s(json.dumps(body).encode())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"vector": [NaN, 1]}', 400),
        (b'{"vector": [1e400, 1]}', 400),
        (b'{"vector": [Infinity]}', 400),
        (b'{"vector": [1.0,', 400),
        (b'[{"id": "a"}]', 422),
        (b'{"vector": [' + b"1," * 1_000_001 + b"1]}", 422),
        (b'{"vector": [' + b"1," * 900_000 + b"1]}", 422),
        (b'{"filter": ' + b'{"not":' * 1000 + b"1" + b"}" * 1000 + b', "id": "p00"}', 422),
        (b'{"filter": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"queries": [' + b"[]," * 400_000 + b"[]]}", 422),
        (b'{"combine": [' + b"{}," * 400_000 + b"{}]}", 422),
        (b'{"vector": [1e308,1e308,1e308,1e308,1e308,1e308,1e308,1e-308]}', 200),
    ],
)
async def test_raw_bodies_made_to_hurt(tmp_path, body, status):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        await fill(run, store, count=2)
        started = time.process_time()
        answer = await run.client.post(SEARCH, content=body, headers=JSON)
        spent = time.process_time() - started
    assert answer.status_code == status, answer.text[:300]
    assert status == 200 or len(answer.content) < 3000
    assert spent < most_s(body)


async def test_names_that_do_not_exist(tmp_path):
    async with running(tmp_path, store=DictStore()) as run:
        for body in ({"vector": GOOD}, {"id": "a"}, {"queries": [{"id": "a"}]}, {"image": text_of(photo())}):
            assert (await ask(run, body, 404))["code"] == "collection_not_found"
        assert (await ask(run, {"id": "a"}, 422, "/v1/collections/UP/search"))["param"] == "collection"
        assert (await ask(run, {"id": "a", "model": "gpt"}, 404))["code"] == "model_not_found"


# The page for users

PAGE = (Path(__file__).parents[2] / "docs" / "search.md").read_text()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_every_line_of_the_page_runs(tmp_path):
    """The requests use a real socket. Each must answer 200, in the order of the page."""
    (tmp_path / "photo.jpg").write_bytes(photo(1, size=(640, 480), kind="JPEG"))
    store = DictStore()
    async with running(tmp_path / "data", store=store) as run:
        server = uvicorn.Server(uvicorn.Config(run.app, port=0, lifespan="off", log_level="error"))
        serving = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        text = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.S)).replace(":8000", f":{port}")
        script = text.replace("curl -s ", "curl -s -f -w '\\n' ")
        shell = await asyncio.create_subprocess_exec(
            "bash", "-e", "-c", script, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, error = await shell.communicate()
        server.should_exit = True
        await serving
    answers = [json.loads(line) for line in out.decode().splitlines() if line.strip()]
    assert shell.returncode == 0, (error.decode(), answers[-1:])
    assert len(answers) == script.count("curl -s") - 1 + 8  # one goes into a variable, one is done nine times
    searches = answers[12:]  # after what makes the collections
    assert all("data" in answer or "groups" in answer or "results" in answer for answer in searches)
    assert any("matches" in hit for answer in answers for hit in answer.get("data", []))


def test_the_page_names_every_field():
    fields = {*SearchIn.model_fields, *PartIn.model_fields, *RegionIn.model_fields, *DuplicatesIn.model_fields}
    assert not {
        name for name in fields | set(ParamsIn.model_fields) if f"`{name}`" not in PAGE and f'"{name}"' not in PAGE
    }


async def test_reranking_finds_photos_whose_source_is_elsewhere(tmp_path):
    """`dinov2 index --originals` writes such items: the source is the file's address, and the digest is that of the
    stored image.
    """
    async with running(tmp_path) as run:
        assert (await run.client.put("/v1/collections/shop", json={"originals": True})).status_code == 201
        items = [{"id": f"p{i}", "image": text_of(photo(i)), "source": f"file:///{i}.png"} for i in range(3)]
        added = await run.client.post("/v1/collections/shop/items", json={"items": items})
        assert added.status_code == 200, added.text
        found = await run.client.post("/v1/collections/shop/search", json={"id": "p1", "rerank": "patches"})
    assert found.status_code == 200, found.text
    assert [hit["id"] for hit in found.json()["data"] if "rerank_score" in hit] != []
    assert all("rerank_score" in hit for hit in found.json()["data"])


async def test_reranking_a_collection_of_another_model_is_refused(tmp_path):
    """The patches would be those of the served model, and the vectors those of another one."""
    async with running(tmp_path, artifact=fake_artifact(digit="b")) as run:
        await run.client.put("/v1/collections/shop", json={"originals": True})
        items = [{"id": f"p{i}", "image": text_of(photo(i))} for i in range(3)]
        assert (await run.client.post("/v1/collections/shop/items", json={"items": items})).status_code == 200
        same = await run.client.post("/v1/collections/shop/search", json={"id": "p1", "rerank": "patches"})
    engine = FakeEngine()
    async with running(tmp_path, artifact=fake_artifact(digit="c"), engine=engine) as run:
        plain_search = await run.client.post("/v1/collections/shop/search", json={"id": "p1"})
        reranked = await run.client.post("/v1/collections/shop/search", json={"id": "p1", "rerank": "patches"})
    assert (same.status_code, same.json()["fingerprint"]) == (200, "b" * 64)
    assert (plain_search.status_code, plain_search.json()["fingerprint"]) == (200, "b" * 64)
    assert (reranked.status_code, reranked.json()["code"], reranked.json()["param"]) == (
        409,
        "model_mismatch",
        "rerank",
    )
    assert "b" * 64 in reranked.json()["detail"]
    assert "c" * 64 in reranked.json()["detail"]
    assert engine.images == 0
