"""Tests of comparing patches, against two plain loops, and of re-ranking over HTTP with stored, missing and damaged
images.
"""

import asyncio
import base64
import hashlib
import threading

import numpy as np
import pytest

from model.preprocess import PreprocessSpec, crop_box
from service.errors import InvalidRequest, NotFound, StorageFailed, UnsupportedImage
from service.features.patch_store import patch_store_of
from service.features.patches import Patches, unit_rows
from service.outcomes import Outcome, numbered
from service.retrieval import rerank
from service.search.store import CollectionSpec, Item
from service.vision.maxsim import maxsim, maxsim_matches
from service.vision.region import box_weights, image_weights, patch_box
from tests.dict_store import DictStore
from tests.fakes import DIMS, SPEC, FakeEngine, photo, running, until

SEARCH = "/v1/collections/shop/search"


def rows_of(rng, count, dims=16):
    return unit_rows(rng.normal(size=(count, dims)))


def slow_maxsim(query, candidate, weights=None):
    total = weight = 0.0
    for i, row in enumerate(query):
        best = max(float(row @ other) for other in candidate)
        by = 1.0 if weights is None else float(weights[i])
        total, weight = total + by * best, weight + by
    return total / weight


def slow_matches(query, candidate, weights, limit):
    found = []
    for i, row in enumerate(query):
        j = max(range(len(candidate)), key=lambda j: row @ candidate[j])
        back = max(range(len(query)), key=lambda i: query[i] @ candidate[j])
        if back == i and (weights is None or weights[i] > 0):
            found.append((i, j, float(row @ candidate[j])))
    return sorted(found, key=lambda match: -match[2])[:limit]


@pytest.mark.parametrize(("q", "n"), [(1, 1), (4, 9), (30, 7), (64, 64)])
@pytest.mark.parametrize("weighted", [False, True])
def test_maxsim_is_two_loops(q, n, weighted):
    rng = np.random.default_rng(q * n)
    query, candidate = rows_of(rng, q), rows_of(rng, n)
    weights = rng.uniform(0, 1, q).astype(np.float32) * (np.arange(q) % 3 != 1) if weighted else None
    assert maxsim(query, candidate, weights) == pytest.approx(slow_maxsim(query, candidate, weights), abs=1e-5)
    score, found = maxsim_matches(query, candidate, weights, limit=5)
    assert score == pytest.approx(slow_maxsim(query, candidate, weights), abs=1e-5)
    expected = slow_matches(query, candidate, weights, 5)
    assert [match[:2] for match in found] == [match[:2] for match in expected]
    assert [match.score for match in found] == pytest.approx([match[2] for match in expected], abs=1e-5)


def test_a_photo_matches_itself_wherever_its_patches_are():
    rng = np.random.default_rng(0)
    query = rows_of(rng, 20)
    order = rng.permutation(20)
    score, found = maxsim_matches(query, query[order], limit=20)
    assert score == pytest.approx(1, abs=1e-5)
    assert sorted((match.query, int(order[match.candidate])) for match in found) == [(i, i) for i in range(20)]


def test_a_cosine_of_equal_patches_is_at_most_1():
    """In float32 the product of a row with itself can be slightly above 1."""
    rows = rows_of(np.random.default_rng(0), 200)
    longest = max(range(200), key=lambda i: float(rows[i] @ rows[i]))
    assert float((rows[longest : longest + 1] @ rows[longest : longest + 1].T)[0, 0]) > 1
    assert maxsim(rows[longest : longest + 1], rows[longest : longest + 1]) == 1.0
    score, found = maxsim_matches(rows[longest : longest + 1], rows[longest : longest + 1])
    assert (score, found[0].score) == (1.0, 1.0)


def test_a_patchs_box_counts_rows_and_columns_of_a_grid_that_is_not_square():
    crop = (3.0, 2.0, 50.0, 30.0)  # 3 rows of 10 pixels, 5 columns of 10
    assert patch_box(0, (3, 5), crop) == [3.0, 2.0, 10.0, 10.0]
    assert patch_box(7, (3, 5), crop) == [23.0, 12.0, 10.0, 10.0]
    assert patch_box(14, (3, 5), (3.0, 2.0, 100.0, 30.0)) == [83.0, 22.0, 20.0, 10.0]


def test_patches_survive_as_bytes():
    tokens = np.random.default_rng(1).normal(size=(6, 10)).astype(np.float32) * 1e6
    tokens[2] = 0
    kept = Patches.of(tokens, (2, 3), (480, 640))
    back = Patches.from_bytes(kept.to_bytes())
    assert (back.grid, back.size) == ((2, 3), (480, 640))
    np.testing.assert_array_equal(back.rows, kept.rows)
    cosines = np.sum(unit_rows(back.rows) * unit_rows(tokens), axis=1)
    assert cosines[[0, 1, 3, 4, 5]] == pytest.approx(1, abs=1e-4)
    assert not back.rows[2].any()


class FakePhotos:
    """A fake store of images. Images named in `failing` cannot be read."""

    def __init__(self) -> None:
        self.photos: dict[str, bytes] = {}
        self.failing: set[str] = set()
        self.read: list[str] = []

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.photos[digest] = data
        return digest

    async def get(self, digest: str) -> bytes:
        self.read.append(digest)
        if digest in self.failing:
            raise StorageFailed("the image cannot be read: Input/output error")
        if digest not in self.photos:
            raise NotFound(f"the image {digest} is not stored")
        return self.photos[digest]

    async def size(self, digest: str) -> int | None:
        return len(self.photos[digest]) if digest in self.photos else None


async def fill(run, store, photos, *, pooling="cls", count=6):
    tag = run.service.tag(pooling=pooling)
    await store.create("shop", CollectionSpec(tag, DIMS, originals=True))
    for i in range(count):
        [one] = await run.embed([photo(i)])
        source = f"original:{photos.put(photo(i))}"
        await store.upsert("shop", [Item(f"p{i}", one.result().vector(pooling, True), {}, source)], tag=tag)
    run.service.originals = photos


async def tokens_of(run, image):
    return unit_rows(await run.service.pipeline.analyse(image, lambda analysed: analysed.patches.copy()))


async def ask(run, body, status=200):
    answer = await run.client.post(SEARCH, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def text_of(image: bytes) -> str:
    return base64.b64encode(image).decode()


async def test_reranking_orders_by_maxsim_and_keeps_the_score(tmp_path):
    store, photos = DictStore(), FakePhotos()
    async with running(tmp_path, store=store) as run:
        await fill(run, store, photos)
        plain = await ask(run, {"image": text_of(photo(50))})
        found = await ask(run, {"image": text_of(photo(50)), "rerank": "patches"})
        by_id = await ask(run, {"id": "p2", "rerank": "patches", "k": 2, "offset": 1})
        query, second = await tokens_of(run, photo(50)), await tokens_of(run, photo(2))
        expected = {f"p{i}": slow_maxsim(query, await tokens_of(run, photo(i))) for i in range(6)}
        from_second = {f"p{i}": slow_maxsim(second, await tokens_of(run, photo(i))) for i in range(6) if i != 2}
    scores = {hit["id"]: hit["score"] for hit in plain["data"]}
    assert [hit["id"] for hit in found["data"]] == sorted(expected, key=lambda i: -expected[i])
    assert [hit["id"] for hit in found["data"]] != [hit["id"] for hit in plain["data"]]
    for hit in found["data"]:
        assert hit["score"] == pytest.approx(scores[hit["id"]], abs=1e-6)
        assert hit["rerank_score"] == pytest.approx(expected[hit["id"]], abs=4e-3)  # int8 rows of only 8 features
        assert "matches" not in hit
    assert [hit["id"] for hit in by_id["data"]] == sorted(from_second, key=lambda i: -from_second[i])[1:3]


async def test_only_so_many_are_compared_and_the_rest_follows(tmp_path):
    store, photos = DictStore(), FakePhotos()
    async with running(tmp_path, store=store) as run:
        await fill(run, store, photos)
        plain = [hit["id"] for hit in (await ask(run, {"image": text_of(photo(50))}))["data"]]
        found = (await ask(run, {"image": text_of(photo(50)), "rerank": "patches", "rerank_depth": 3}))["data"]
        best = (await ask(run, {"image": text_of(photo(50)), "rerank": "patches", "rerank_depth": 3, "k": 1}))["data"]
    assert ["rerank_score" in hit for hit in found] == [True] * 3 + [False] * 3
    assert {hit["id"] for hit in found[:3]} == set(plain[:3])
    assert [hit["id"] for hit in found[3:]] == plain[3:]
    assert best == found[:1]


async def test_twenty_are_compared_unless_told_and_sixteen_at_a_time(tmp_path):
    class Counting(FakePhotos):
        now = most = 0

        async def get(self, digest):
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0)
            self.now -= 1
            return await super().get(digest)

    store, photos = DictStore(), Counting()
    async with running(tmp_path, store=store) as run:
        await fill(run, store, photos, count=23)
        found = (await ask(run, {"image": text_of(photo(50)), "rerank": "patches", "k": 23}))["data"]
    assert sum("rerank_score" in hit for hit in found) == 20
    assert len(found) == 23
    assert photos.most == 16


async def test_the_threshold_holds_for_what_is_reranked(tmp_path):
    store, photos = DictStore(), FakePhotos()
    async with running(tmp_path, store=store) as run:
        await fill(run, store, photos)
        plain = (await ask(run, {"image": text_of(photo(50))}))["data"]
        body = {"image": text_of(photo(50)), "rerank": "patches", "score_threshold": plain[2]["score"]}
        found = (await ask(run, body))["data"]
    assert {hit["id"] for hit in found} == {hit["id"] for hit in plain[:3]}
    assert len(photos.read) == 3


async def test_equal_rerank_scores_leave_the_order_of_the_vectors(tmp_path):
    store, photos = DictStore(), FakePhotos()
    async with running(tmp_path, store=store) as run:
        await fill(run, store, photos, count=1)
        [item] = await store.get("shop", ["p0"])
        aside = np.roll(item.vector, 1)
        twins = [Item(name, item.vector + by * aside, {}, item.source) for name, by in (("a", 0.4), ("b", 0.2))]
        await store.upsert("shop", twins, tag=run.service.tag())
        found = (await ask(run, {"image": text_of(photo(0)), "rerank": "patches"}))["data"]
    assert len({hit["rerank_score"] for hit in found}) == 1
    assert [hit["id"] for hit in found] == ["p0", "b", "a"]


async def test_patches_are_computed_together_and_kept(tmp_path):
    store, photos = DictStore(), FakePhotos()
    async with running(tmp_path, store=store) as run:
        await fill(run, store, photos)
        run.engine.batches.clear()
        await ask(run, {"id": "p0", "rerank": "patches"})
        assert run.engine.images == 6
        first = list(photos.read)
        await ask(run, {"id": "p1", "rerank": "patches"})
        assert run.engine.images == 6
        assert photos.read == first
    async with running(tmp_path, store=(store := DictStore()), patch_cache_bytes=0, patch_store_bytes=0) as run:
        await fill(run, store, photos)
        run.engine.batches.clear()
        for _ in range(2):
            await ask(run, {"id": "p0", "rerank": "patches"})
        assert run.engine.images == 12


async def test_candidates_without_a_photo_come_last(tmp_path, caplog):
    store, photos = DictStore(), FakePhotos()
    async with running(tmp_path, store=store) as run:
        await fill(run, store, photos, count=8)
        plain = [hit["id"] for hit in (await ask(run, {"image": text_of(photo(50))}))["data"]]
        digests = {f"p{i}": hashlib.sha256(photo(i)).hexdigest() for i in range(8)}
        del photos.photos[digests[plain[0]]]  # gone
        photos.photos[digests[plain[1]]] = b"not a photo"
        photos.failing.add(digests[plain[2]])
        item = (await store.get("shop", [plain[3]]))[0]
        await store.upsert("shop", [Item(item.id, item.vector, {}, "https://x/1.jpg")], tag=run.service.tag())
        item = (await store.get("shop", [plain[4]]))[0]
        await store.upsert("shop", [Item(item.id, item.vector, {}, "original:../../secret")], tag=run.service.tag())
        found = (await ask(run, {"image": text_of(photo(50)), "rerank": "patches", "matches": True}))["data"]
        gone = await ask(run, {"id": plain[0], "rerank": "patches"}, 422)
        elsewhere = await ask(run, {"id": plain[3], "rerank": "patches"}, 422)
        failed = await ask(run, {"id": plain[2], "rerank": "patches"}, 500)
        photos.failing.update(digests.values())
        none_left = await run.client.post(SEARCH, json={"image": text_of(photo(51)), "rerank": "patches"})
    assert ["rerank_score" in hit for hit in found] == [True] * 3 + [False] * 5
    assert [hit["id"] for hit in found[3:]] == plain[:5]
    assert "matches" not in found[-1]
    assert "cannot be read" in gone["detail"]
    assert "is not stored" in elsewhere["detail"]
    assert failed["code"] == "storage_failed"
    assert none_left.status_code == 200  # three are kept in the process
    assert "1 images could not be compared" in caplog.text


async def test_a_storage_that_is_down_fails_the_request(tmp_path):
    store, photos = DictStore(), FakePhotos()
    async with running(tmp_path, store=store) as run:
        await fill(run, store, photos)
        photos.failing.update(photos.photos)
        answer = await ask(run, {"image": text_of(photo(50)), "rerank": "patches"}, 500)
    assert answer["code"] == "storage_failed"


async def test_collections_without_originals_are_told(tmp_path):
    store, photos = DictStore(), FakePhotos()
    async with running(tmp_path, store=store) as run:
        await store.upsert("shop", [Item("p0", np.ones(DIMS))], tag=run.service.tag())
        without = await ask(run, {"image": text_of(photo(1)), "rerank": "patches"}, 422)
        run.service.originals = photos
        still = await ask(run, {"id": "p0", "rerank": "patches"}, 422)
        broken = await ask(run, {"image": text_of(b"no photo"), "rerank": "patches"}, 415)
    assert "stores none" in without["detail"]
    assert "stores none" in still["detail"]
    assert broken["errors"][0]["index"] == 0


async def test_matches_are_boxes_in_both_photos(tmp_path):
    """The second image is the first one in another size, so each quarter of the network's input must match the same
    quarter.
    """
    store, photos = DictStore(), FakePhotos()
    image = photo(3, size=(60, 48))
    async with running(tmp_path, store=store) as run:
        await fill(run, store, photos, count=2)
        [one] = await run.embed([image])
        source = f"original:{photos.put(image)}"
        await store.upsert("shop", [Item("big", one.result().vector("cls", True), {}, source)], tag=run.service.tag())
        body = {"image": text_of(image), "rerank": "patches", "matches": True, "k": 1}
        [hit] = (await ask(run, body))["data"]
        [other] = (await ask(run, body | {"filter": {"not": {"key": "x", "exists": True}}, "offset": 1}))["data"]
    crop = crop_box(48, 60, SPEC)
    quarters = [patch_box(i, (2, 2), crop) for i in range(4)]
    assert hit["id"] == "big"
    assert hit["rerank_score"] == pytest.approx(1, abs=1e-3)
    assert sorted(match["box"] for match in hit["matches"]) == sorted(quarters)
    for match in hit["matches"]:
        assert match["query_box"] == match["box"]
        assert match["score"] == pytest.approx(1, abs=1e-3)
    assert all(
        match["box"] in [patch_box(i, (2, 2), crop_box(32, 40, SPEC)) for i in range(4)] for match in other["matches"]
    )


async def test_the_boxes_of_a_match_are_told_in_each_photos_own_pixels(tmp_path):
    store, photos = DictStore(), FakePhotos()
    async with running(tmp_path, store=store) as run:
        await fill(run, store, photos, count=2)
        large = photo(50, size=(64, 80))
        found = (await ask(run, {"image": text_of(large), "rerank": "patches", "matches": True}))["data"]
    of_query = [patch_box(i, (2, 2), crop_box(80, 64, SPEC)) for i in range(4)]
    of_stored = [patch_box(i, (2, 2), crop_box(32, 40, SPEC)) for i in range(4)]
    assert not [box for box in of_query if box in of_stored]
    matches = [match for hit in found for match in hit["matches"]]
    assert matches
    assert all(match["query_box"] in of_query and match["box"] in of_stored for match in matches)


async def test_a_region_compares_its_own_patches_only(tmp_path):
    store, photos = DictStore(), FakePhotos()
    image, crop = photo(50), crop_box(32, 40, SPEC)
    box = [crop[0], crop[1], 20, 14]  # the upper left patch, and less than half of the one beside it
    async with running(tmp_path, store=store) as run:
        await fill(run, store, photos, pooling="mean")
        region = {"image": text_of(image), "box": box}
        found = await ask(run, {"region": region, "rerank": "patches", "matches": True})
        without = await ask(run, {"region": region, "rerank": "patches"})
        query = await tokens_of(run, image)
        weights = box_weights(tuple(box), crop, (2, 2)).ravel()
        expected = {f"p{i}": slow_maxsim(query, await tokens_of(run, photo(i)), weights) for i in range(6)}
    assert weights == pytest.approx([1, 6 / 14, 0, 0])
    assert [hit["id"] for hit in found["data"]] == sorted(expected, key=lambda i: -expected[i])
    for hit in found["data"]:
        assert hit["rerank_score"] == pytest.approx(expected[hit["id"]], abs=4e-3)  # int8 rows of only 8 features
        assert all(match["query_box"][1] == 2.0 for match in hit["matches"])  # of the upper row
    scores = {hit["id"]: hit["rerank_score"] for hit in found["data"]}
    assert {hit["id"]: pytest.approx(hit["rerank_score"], abs=1e-6) for hit in without["data"]} == scores


async def test_a_small_queue_takes_the_candidates_in_turns(tmp_path):
    store, photos = DictStore(), FakePhotos()
    async with running(tmp_path, store=store, queue_max_images=2) as run:
        await fill(run, store, photos)
        found = await ask(run, {"id": "p0", "rerank": "patches"})
    assert all("rerank_score" in hit for hit in found["data"])


async def test_whoever_leaves_gives_back_the_places_in_the_queue(tmp_path):
    engine = FakeEngine()
    async with running(tmp_path, store=DictStore(), engine=engine) as run:
        engine.gate = threading.Event()
        photos = [(hashlib.sha256(photo(i)).hexdigest(), photo(i)) for i in range(5)]
        waiting = asyncio.create_task(run.service.pipeline.patches(numbered(photos)))
        await until(engine.entered.is_set)
        assert run.service.pipeline.batcher.images == 5
        waiting.cancel()
        engine.gate.set()
        await until(lambda: run.service.pipeline.batcher.images == 0)
        engine.gate = None
        images = [Outcome(0, error=NotFound("it is not stored")), *numbered([*photos, ("0" * 64, b"no photo")])]
        gone, *found, unreadable = await run.service.pipeline.patches(images)
        assert [isinstance(outcome.result(), Patches) for outcome in found] == [True] * 5
        assert isinstance(unreadable.error, UnsupportedImage)
        assert gone.error is images[0].error
        assert run.service.pipeline.batcher.images == 0


PAD = PreprocessSpec(fit="pad", resize=None)


def test_padding_matches_nothing() -> None:
    """All padding looks the same, so it would be the best match of any two padded images."""
    rng = np.random.default_rng(0)
    size, grid = (224, 448), (16, 16)
    shown = np.zeros(grid, bool)
    shown[4:12] = True

    def padded(tokens: np.ndarray) -> Patches:
        rows = np.where(shown.reshape(256, 1), tokens, np.full(8, 5.0)).astype(np.float32)
        return Patches.of(rows, grid, size)

    query, candidate = (padded(rng.normal(size=(256, 8))) for _ in range(2))
    flat = shown.ravel()
    found = rerank._compare(unit_rows(query.rows), query, None, PAD, True, candidate)
    expected = slow_maxsim(unit_rows(query.rows)[flat], unit_rows(candidate.rows)[flat], np.ones(128))
    assert found.score == pytest.approx(expected, abs=1e-3)
    assert found.matches
    for match in found.matches:
        assert 0 <= match["query_box"][1] <= 210
        assert 0 <= match["box"][1] <= 210


def test_a_box_selects_no_padding() -> None:
    size, crop, grid = (224, 448), crop_box(224, 448, PAD), (16, 16)
    whole = box_weights((-500, -500, 2000, 2000), crop, grid, size)
    np.testing.assert_array_equal(whole, image_weights(size, crop, grid))
    assert whole.sum() == 128
    with pytest.raises(InvalidRequest, match="outside the part of the image"):
        box_weights((10, -100, 50, 50), crop, grid, size)


async def test_patches_of_stored_images_are_computed_when_they_are_added_and_survive_a_restart(tmp_path):
    async with running(tmp_path) as run:
        await run.client.put("/v1/collections/shop", json={"originals": True})
        await run.client.put("/v1/collections/plain", json={})
        for name in ("shop", "plain"):
            items = [{"id": f"p{i}", "image": text_of(photo(i + 10 * (name == "plain")))} for i in range(6)]
            added = await run.client.post(f"/v1/collections/{name}/items", json={"items": items})
            assert added.status_code == 200
        assert run.engine.images == 12
        digests = [hashlib.sha256(photo(i)).hexdigest() for i in range(16)]
        assert set(await run.service.pipeline.kept_patches(digests)) == set(digests[:6])  # `plain` stores no images
        first = await ask(run, {"id": "p0", "rerank": "patches", "matches": True})
        assert run.engine.images == 12
    async with running(tmp_path) as run:
        again = await ask(run, {"id": "p0", "rerank": "patches", "matches": True})
        assert run.engine.images == 0
    assert again["data"] == first["data"]


async def add_photos(run, *numbers):
    items = [{"id": f"p{i}", "image": text_of(photo(i))} for i in numbers]
    added = await run.client.post("/v1/collections/shop/items", json={"items": items})
    assert added.status_code == 200
    return [hashlib.sha256(photo(i)).hexdigest() for i in numbers]


async def test_patches_of_images_with_cached_vectors_are_stored_too(tmp_path):
    async with running(tmp_path) as run:
        await run.client.put("/v1/collections/shop", json={"originals": True})
        await run.embed([photo(0), photo(1)])
        digests = await add_photos(run, 0, 1, 2)
        assert set(await run.service.pipeline.kept_patches(digests)) == set(digests)
        assert run.engine.images == 5
        await add_photos(run, 0, 1, 2)
        assert run.engine.images == 5  # the vectors are cached and the patches are stored


async def test_patches_of_an_image_that_another_request_computes_are_stored_too(tmp_path):
    engine = FakeEngine()
    async with running(tmp_path, engine=engine) as run:
        await run.client.put("/v1/collections/shop", json={"originals": True})
        engine.gate = threading.Event()
        plain = asyncio.create_task(run.embed([photo(0)]))
        await until(engine.entered.is_set)
        adding = asyncio.create_task(add_photos(run, 0))
        await until(lambda: any(flight.waiters == 2 for flight in run.service.pipeline._flights.values()))
        engine.gate.set()
        digests = await adding
        await plain
        assert set(await run.service.pipeline.kept_patches(digests)) == set(digests)
        assert engine.images == 1


async def test_patches_of_an_image_that_cannot_be_stored_are_not_stored(tmp_path, monkeypatch):
    async with running(tmp_path) as run:
        await run.client.put("/v1/collections/shop", json={"originals": True})
        failing = hashlib.sha256(photo(1)).hexdigest()
        put = run.service.originals.put

        async def put_others(data):
            if data == photo(1):
                raise StorageFailed("the image cannot be stored")
            return await put(data)

        monkeypatch.setattr(run.service.originals, "put", put_others)
        items = [{"id": f"p{i}", "image": text_of(photo(i))} for i in range(2)]
        body = {"items": items, "on_error": "partial"}
        assert (await run.client.post("/v1/collections/shop/items", json=body)).status_code == 200
        digests = [hashlib.sha256(photo(0)).hexdigest(), failing]
        assert set(await run.service.pipeline.kept_patches(digests)) == set(digests[:1])


@pytest.mark.parametrize("stored", [0, 2**24])
async def test_patches_of_erased_images_are_forgotten_in_all_processes(tmp_path, stored):
    async with running(tmp_path, patch_store_bytes=stored) as run:
        await run.client.put("/v1/collections/shop", json={"originals": True})
        digests = await add_photos(run, 0, 1, 2)
        await ask(run, {"id": "p0", "rerank": "patches"})
        assert set(await run.service.pipeline.kept_patches(digests)) == set(digests)
        erased = await run.client.delete(f"/v1/originals/{digests[1]}?items=keep")
        assert erased.status_code == 200
        assert digests[1] not in await run.service.pipeline.kept_patches(digests)
        found = (await ask(run, {"id": "p0", "rerank": "patches"}))["data"]
        assert {hit["id"]: "rerank_score" in hit for hit in found} == {"p2": True, "p1": False}
        other = patch_store_of(run.service.settings)  # as in another process
        other.erase(digests)
        other.close()
        assert await run.service.pipeline.kept_patches(digests) == {}


async def test_patches_of_an_image_that_is_erased_while_it_is_computed_are_not_kept(tmp_path):
    class Erasing(FakePhotos):
        async def get(self, digest):
            data = await super().get(digest)
            del self.photos[digest]
            return data

    store, photos = DictStore(), Erasing()
    async with running(tmp_path, store=store) as run:
        await fill(run, store, photos)
        digests = list(photos.photos)
        await ask(run, {"image": text_of(photo(50)), "rerank": "patches"})
        assert len(photos.read) == 6
        assert await run.service.pipeline.kept_patches(digests) == {}


async def test_a_store_that_cannot_be_written_fails_no_request(tmp_path):
    (tmp_path / "patches").write_text("not a folder")
    async with running(tmp_path) as run:
        await run.client.put("/v1/collections/shop", json={"originals": True})
        items = [{"id": f"p{i}", "image": text_of(photo(i))} for i in range(3)]
        added = await run.client.post("/v1/collections/shop/items", json={"items": items})
        assert added.status_code == 200
        found = await ask(run, {"id": "p0", "rerank": "patches"})
    assert [hit["id"] for hit in found["data"]] != []
