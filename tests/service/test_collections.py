"""Tests of collections, aliases, statistics and snapshots over HTTP."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from service.errors import Conflict, NotFound
from service.search.store import CollectionInfo, CollectionSpec, Item, SnapshotInfo
from tests.dict_store import DictStore
from tests.fakes import DIMS, FakeEngine, Running, photo, running

SHOP = "/v1/collections/shop"
JSON = {"Content-Type": "application/json"}
HAS_COLOUR = {"key": "colour", "exists": True}


class SnapshotDict(DictStore):
    """A DictStore with statistics and with snapshots. Each snapshot writes a file."""

    capabilities = DictStore.capabilities | {"snapshots", "stats"}

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._kept: dict[str, tuple[SnapshotInfo, CollectionSpec, list[Item]]] = {}

    async def snapshot(self, collection: str) -> SnapshotInfo:
        info = await self.info(collection)
        name = f"s{len(self._kept)}"
        (self._folder / name).write_bytes(b"snapshot of " + info.name.encode() * 1000)
        size = (self._folder / name).stat().st_size
        taken = SnapshotInfo(name, info.name, "2026-01-01T00:00:00Z", size, info.count, info.tag)
        self._kept[name] = taken, info.spec, (await self.scroll(collection, limit=1000)).items
        return taken

    async def snapshots(self, collection: str) -> list[SnapshotInfo]:
        return [taken for taken, _, _ in self._kept.values() if taken.collection == collection]

    async def snapshot_path(self, collection: str, name: str) -> Path:
        if name not in self._kept or self._kept[name][0].collection != collection:
            raise NotFound(f"collection {collection!r} has no snapshot {name!r}")
        return self._folder / name

    async def drop_snapshot(self, collection: str, name: str) -> None:
        (await self.snapshot_path(collection, name)).unlink()
        del self._kept[name]

    async def restore(self, collection: str, source: str, name: str) -> CollectionInfo:
        await self.snapshot_path(source, name)
        _, spec, items = self._kept[name]
        if collection in [info.name for info in await self.collections()]:
            raise Conflict(f"there is a collection {collection!r}")
        await self.create(collection, spec)
        return await self.upsert(collection, items, tag=spec.tag)

    async def stats(self, collection: str) -> dict[str, Any]:
        return {"kind": "flat", "count": (await self.info(collection)).count}


async def test_a_collection_is_made_once_and_described_in_full(tmp_path):
    settings = {
        "pooling": "cls+mean",
        "dtype": "float16",
        "index": {"kind": "hnsw", "m": 16, "ef_construction": 100, "target_recall": 0.9},
        "indexed": ["shelf.row", "brand", "brand"],
        "originals": True,
    }
    async with running(tmp_path, store=DictStore()) as run:
        made = await run.client.put(SHOP, json=settings)
        again = await run.client.put(SHOP, json={**settings, "indexed": ["brand", "shelf.row"]})
        await run.client.put("/v1/aliases/front", json={"collection": "shop"})
        shown = (await run.client.get(SHOP)).json()
        by_alias = (await run.client.get("/v1/collections/front")).json()
        listed = (await run.client.get("/v1/collections")).json()["data"]
    assert (made.status_code, again.status_code) == (201, 200)
    assert made.json() == again.json() == {**shown, "aliases": []}
    assert shown == by_alias
    assert [shown | row for row in listed] == [shown]
    identity = {"model": "dinov2_fake-aaaaaaaa", "fingerprint": "a" * 64}
    assert shown == {
        "name": "shop",
        "tag": f"{'a' * 64}/cls+mean/l2/28x28/fp32",
        "pooling": "cls+mean",
        "dimension": 2 * DIMS,
        "dtype": "float16",
        "index": {"kind": "hnsw", "m": 16, "ef_construction": 100, "n_lists": None, "target_recall": 0.9},
        "indexed": ["brand", "shelf.row"],
        "originals": True,
        "count": 0,
        "aliases": ["front"],
        **identity,
    }


async def test_a_collection_is_made_for_the_served_model_or_names_another_by_its_fingerprint(tmp_path):
    async with running(tmp_path, store=DictStore()) as run:
        refused = await run.client.put(SHOP, json={"model": "resnet50"})
        other = await run.client.put(SHOP, json={"fingerprint": "b" * 64, "dimension": 3})
    assert (refused.status_code, refused.json()["code"]) == (404, "model_not_found")
    assert (other.json()["model"], other.json()["fingerprint"]) == (None, "b" * 64)


async def test_the_precision_of_the_engine_is_part_of_the_tag(tmp_path):
    async with running(tmp_path, store=DictStore(), engine=FakeEngine(precision="int8")) as run:
        made = await run.client.put(SHOP)
    assert made.json()["tag"] == f"{'a' * 64}/cls/l2/28x28/int8"


@pytest.mark.parametrize("content", [b"", b"{}"])
async def test_everything_may_be_left_out(tmp_path, content):
    async with running(tmp_path, store=DictStore()) as run:
        made = await run.client.put(SHOP, content=content, headers=JSON if content else {})
        first_write = await run.client.post("/v1/collections/other/items", files={"file": photo()})
        other = (await run.client.get("/v1/collections/other")).json()
    assert made.status_code == 201
    assert first_write.status_code == 200
    assert made.json() == {**other, "name": "shop", "count": 0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pooling": "mean"}, "pooling 'cls', not 'mean'"),
        ({"dtype": "float16"}, "dtype 'float32', not 'float16'"),
        ({"index": {"kind": "flat"}}, "index.kind 'auto', not 'flat'"),
        ({"index": {"target_recall": 1}}, "index.target_recall 0.98, not 1"),
        ({"indexed": ["a", "b"]}, "indexed [], not ['a', 'b']"),
        ({"originals": True}, "originals False, not True"),
        ({"fingerprint": "clip", "dimension": 3}, "dimension 8, not 3"),
    ],
)
async def test_other_settings_are_a_conflict_that_names_them(tmp_path, change, words):
    async with running(tmp_path, store=DictStore()) as run:
        await run.client.put(SHOP, json={})
        refused = await run.client.put(SHOP, json=change)
        shown = (await run.client.get(SHOP)).json()
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert words in refused.json()["detail"]
    assert (shown["pooling"], shown["dtype"], shown["originals"]) == ("cls", "float32", False)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"pooling": "max"}, "pooling"),
        ({"dtype": "int8"}, "dtype"),
        ({"index": {"kind": "lsh"}}, "index.kind"),
        ({"index": {"m": 1}}, "index.m"),
        ({"index": {"m": 257}}, "index.m"),
        ({"index": {"m": "16"}}, "index.m"),
        ({"index": {"ef_construction": 0}}, "index.ef_construction"),
        ({"index": {"n_lists": 2**21}}, "index.n_lists"),
        ({"index": {"target_recall": 0.4}}, "index.target_recall"),
        ({"index": {"target_recall": 1.01}}, "index.target_recall"),
        ({"index": {"speed": 1}}, "index.speed: unknown field"),
        ({"index": [1]}, "index"),
        ({"indexed": [f"k{i}" for i in range(17)]}, "indexed"),
        ({"indexed": ["a..b"]}, "indexed: key 'a..b' is not allowed: no control"),
        ({"indexed": ["a'b"]}, 'indexed: key "a\'b" is not allowed: no control'),
        ({"indexed": [""]}, "indexed: a key must be a string of 1 to 256 characters, not ''"),
        ({"indexed": [7]}, "indexed.0"),
        ({"originals": "yes"}, "originals"),
        ({"dimension": 9}, "dimension=9"),
        ({"fingerprint": "clip"}, "requires a dimension"),
        ({"fingerprint": "a/b", "dimension": 3}, "fingerprint"),
        ({"fingerprint": "a" * 65, "dimension": 3}, "fingerprint"),
        ({"fingerprint": "clip", "dimension": 0}, "dimension"),
        ({"fingerprint": "clip", "dimension": 8193}, "dimension"),
        ({"fingerprint": "a" * 64, "dimension": 9}, "dimension=9"),
        ({"name": "shop"}, "name: unknown field"),
        ([], "object"),
    ],
)
async def test_settings_that_are_not_allowed(tmp_path, body, words):
    async with running(tmp_path, store=DictStore()) as run:
        refused = await run.client.put(SHOP, json=body)
        listed = (await run.client.get("/v1/collections")).json()["data"]
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    assert words in refused.json()["detail"]
    assert listed == []


@pytest.mark.parametrize("name", ["UPPER", "-a", "a" * 65, "a b", "ü", "..", "a%00b", "a%2Fb"])
@pytest.mark.parametrize("path", ["/v1/collections/", "/v1/aliases/"])
async def test_names_that_are_not_allowed(tmp_path, path, name):
    async with running(tmp_path, store=DictStore()) as run:
        for answer in (await run.client.put(path + name, json={}), await run.client.delete(path + name)):
            assert answer.status_code in (404, 405, 422)
            assert answer.headers["Content-Type"] == "application/problem+json"


async def test_hundred_thousand_settings_are_told_in_few_words(tmp_path):
    async with running(tmp_path, store=DictStore()) as run:
        for body in (
            {f"k{i}": 0 for i in range(100_000)},
            {"index": {f"k{i}": 0 for i in range(100_000)}},
            {"indexed": [0] * 100_000},
            {"indexed": ["k" * 1_000_000]},
            {"fingerprint": "f" * 1_000_000, "dimension": 3},
        ):
            answer = await run.client.put(SHOP, json=body)
            assert answer.status_code == 422
            assert len(answer.content) < 4000


async def test_vectors_of_a_model_that_is_not_served(tmp_path):
    item = {"id": "a", "vector": [1, 2, 2.0], "fingerprint": "clip-b32"}
    async with running(tmp_path) as run:
        unmade = await run.client.post(f"{SHOP}/items", json={"items": [item]})
        made = await run.client.put(SHOP, json={"fingerprint": "clip-b32", "dimension": 3, "pooling": "mean"})
        added = await run.client.post(f"{SHOP}/items", json={"items": [item]})
        found = await run.client.get(f"{SHOP}/items/a?include=vector")
        described = await run.client.get(SHOP)
        listed = await run.client.post(f"{SHOP}/items/scroll", json={})
        by_vector = await run.client.post(f"{SHOP}/search", json={"vector": [1, 2, 2], "fingerprint": "clip-b32"})
        by_id = await run.client.post(f"{SHOP}/search", json={"id": "a"})
        same = await run.client.post(f"{SHOP}/duplicates", json={})
        photo_refused = await run.client.post(f"{SHOP}/items", files={"file": photo()})
        counted = [await run.client.post(f"{SHOP}/items/count", json=body) for body in ({}, {"filter": HAS_COLOUR})]
        patched = await run.client.patch(f"{SHOP}/items/a", json={"metadata": {"colour": "red"}})
        aliased = await run.client.put("/v1/aliases/live", json={"collection": "shop"})
        stats = await run.client.get(f"{SHOP}/stats")
        taken = await run.client.post(f"{SHOP}/snapshots")
        snapshots = await run.client.get(f"{SHOP}/snapshots")
        deleted = [
            await run.client.delete(f"{SHOP}/items/a"),
            await run.client.post(f"{SHOP}/items/delete", json={"ids": ["a"]}),
            await run.client.post(f"{SHOP}/items/delete", json={"filter": HAS_COLOUR}),
            await run.client.delete("/v1/aliases/live"),
            await run.client.delete(SHOP),
        ]
        snapshots_left = await run.client.get(f"{SHOP}/snapshots")
        snapshot_deleted = await run.client.delete(f"{SHOP}/snapshots/{taken.json()['name']}")
        nothing_left = await run.client.get(f"{SHOP}/snapshots")
    assert (unmade.status_code, unmade.json()["code"]) == (409, "model_mismatch")
    assert made.json()["tag"] == "clip-b32/mean/l2/28x28/fp32"
    assert (made.json()["dimension"], added.status_code) == (3, 200)
    assert found.json()["vector"] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert found.json()["tag"] == made.json()["tag"]
    about_items = [made, added, found, described, listed, by_vector, by_id, same, *counted, patched]
    about_the_collection = [
        aliased,
        stats,
        taken,
        snapshots,
        *deleted[:3],
        deleted[4],
        snapshots_left,
        snapshot_deleted,
    ]
    for answer in (*about_items, *about_the_collection):
        assert answer.status_code in (200, 201), answer.text
        assert (answer.json()["model"], answer.json()["fingerprint"]) == (None, "clip-b32")
    assert (deleted[3].status_code, snapshots.json()["data"][0]["tag"]) == (200, made.json()["tag"])
    assert (nothing_left.json()["data"], nothing_left.json()["fingerprint"]) == ([], None)
    assert (photo_refused.status_code, photo_refused.json()["code"]) == (409, "model_mismatch")
    assert "clip-b32" in photo_refused.json()["detail"]
    assert "a" * 64 in photo_refused.json()["detail"]
    assert run.engine.images == 0


async def test_many_at_once_make_one_collection(tmp_path):
    async with running(tmp_path, store=DictStore()) as run:
        answers = await asyncio.gather(*(run.client.put(SHOP, json={"dtype": "float16"}) for _ in range(20)))
        others = await asyncio.gather(*(run.client.put(SHOP, json={"dtype": "float32"}) for _ in range(5)))
    assert {answer.status_code for answer in answers} <= {200, 201}
    assert {answer.status_code for answer in others} == {409}


async def test_indexed_keys_can_be_changed(tmp_path):
    async with running(tmp_path) as run:
        missing = await run.client.patch(SHOP, json={"indexed": ["brand"]})
        await run.client.put(SHOP, json={"indexed": ["price"], "dtype": "float16"})
        changed = await run.client.patch(SHOP, json={"indexed": ["brand", "a\\.b", "brand"]})
        described = await run.client.get(SHOP)
        same = await run.client.put(SHOP, json={"indexed": ["a\\.b", "brand"], "dtype": "float16"})
        bad = [
            await run.client.patch(SHOP, json=body)
            for body in ({}, {"indexed": None}, {"indexed": ["a..b"]}, {"indexed": ["a"] * 17}, {"dtype": "float32"})
        ]
    assert missing.status_code == 404
    assert (changed.status_code, changed.json()["indexed"]) == (200, ["a\\.b", "brand"])
    assert changed.json() == described.json()
    assert same.status_code == 200
    assert [answer.status_code for answer in bad] == [422] * 5


async def test_a_store_without_indexes_on_keys_says_so(tmp_path):
    store = DictStore()
    store.capabilities = frozenset()  # type: ignore[misc]
    async with running(tmp_path, store=store) as run:
        await run.client.put(SHOP)
        answer = await run.client.patch(SHOP, json={"indexed": ["brand"]})
    assert (answer.status_code, "does not support indexed" in answer.json()["detail"]) == (422, True)


async def test_delete(tmp_path):
    async with running(tmp_path, store=DictStore()) as run:
        missing = await run.client.delete(SHOP)
        await run.client.put(SHOP)
        await run.client.put("/v1/aliases/front", json={"collection": "shop"})
        in_use = await run.client.delete(SHOP)
        alias = await run.client.delete("/v1/collections/front")
        await run.client.delete("/v1/aliases/front")
        gone = await run.client.delete(SHOP)
        after = await run.client.get(SHOP)
    assert [answer.status_code for answer in (missing, in_use, alias, gone, after)] == [404, 409, 409, 200, 404]


async def test_aliases_move_and_tell_where_they_pointed(tmp_path):
    def put(run: Running, alias: str, collection: Any) -> Any:
        return run.client.put(f"/v1/aliases/{alias}", json={"collection": collection})

    async with running(tmp_path, store=DictStore()) as run:
        missing = await put(run, "front", "one")
        for name in ("one", "two"):
            await run.client.put(f"/v1/collections/{name}")
        made = await put(run, "front", "one")
        second = await put(run, "back", "front")
        moved = await put(run, "front", "two")
        same = await put(run, "front", "front")
        taken = await put(run, "one", "two")
        made_over = await run.client.put("/v1/collections/front")
        await run.client.post("/v1/collections/front/items", files={"file": photo()})
        counts = [(await run.client.get(f"/v1/collections/{name}")).json()["count"] for name in ("one", "two")]
        listed = (await run.client.get("/v1/aliases")).json()
        deleted = await run.client.delete("/v1/aliases/front")
        twice = await run.client.delete("/v1/aliases/front")
        left = (await run.client.get("/v1/aliases")).json()["data"]
        wrong = [await put(run, "x", value) for value in (7, None, "UP", "")]
        unknown = await run.client.put("/v1/aliases/x", json={"collection": "one", "force": True})
    assert (missing.status_code, missing.json()["code"]) == (404, "collection_not_found")
    assert [(a.status_code, a.json()["collection"], a.json()["before"]) for a in (made, second, moved, same)] == [
        (201, "one", None),
        (201, "one", None),
        (200, "two", "one"),
        (200, "two", "two"),
    ]
    assert (taken.status_code, made_over.status_code) == (409, 409)
    assert counts == [0, 1]
    assert listed["data"] == [{"alias": "back", "collection": "one"}, {"alias": "front", "collection": "two"}]
    assert listed["fingerprint"] == "a" * 64
    assert (deleted.status_code, twice.status_code) == (200, 404)
    assert left == [{"alias": "back", "collection": "one"}]
    assert {answer.status_code for answer in [*wrong, unknown]} == {422}


async def test_snapshots(tmp_path):
    async with running(tmp_path, store=SnapshotDict(tmp_path)) as run:
        await run.client.put(SHOP, json={"dtype": "float16"})
        await run.client.post(f"{SHOP}/items", files={"file": photo()})
        missing = await run.client.post("/v1/collections/nobody/snapshots")
        taken = await run.client.post(f"{SHOP}/snapshots", json={})
        wrong = await run.client.post(f"{SHOP}/snapshots", json={"name": "mine"})
        listed = (await run.client.get(f"{SHOP}/snapshots")).json()["data"]
        got = await run.client.get(f"{SHOP}/snapshots/s0")
        part = await run.client.get(f"{SHOP}/snapshots/s0", headers={"Range": "bytes=0-7"})
        none = [await run.client.get(f"{SHOP}/snapshots/{name}") for name in ("s1", "..%2Fetc", "%2E%2E")]
        there = await run.client.post(f"{SHOP}/restore", json={"snapshot": "s0"})
        copy = await run.client.post("/v1/collections/copy/restore", json={"snapshot": "s0", "from": "shop"})
        not_of = await run.client.post("/v1/collections/copy2/restore", json={"snapshot": "s0"})
        await run.client.delete(SHOP)
        back = await run.client.post(f"{SHOP}/restore", json={"snapshot": "s0"})
        bad = [
            await run.client.post(f"{SHOP}/restore", json=body)
            for body in ({}, {"snapshot": 7}, {"snapshot": "s0", "from": "UP"}, {"snapshot": "s0", "source": "shop"})
        ]
        deleted = await run.client.delete(f"{SHOP}/snapshots/s0")
        twice = await run.client.delete(f"{SHOP}/snapshots/s0")
    assert missing.status_code == 404
    assert taken.status_code == 201
    expected = {"name": "s0", "collection": "shop", "created": "2026-01-01T00:00:00Z", "bytes": 4012, "count": 1}
    expected["tag"] = f"{'a' * 64}/cls/l2/28x28/fp32"
    assert listed == [expected]
    assert taken.json() == {**expected, "model": "dinov2_fake-aaaaaaaa", "fingerprint": "a" * 64}
    assert wrong.status_code == 422
    assert got.content == b"snapshot of " + b"shop" * 1000
    assert got.headers["Content-Length"] == "4012"
    assert "attachment" in got.headers["Content-Disposition"]
    assert (part.status_code, part.content) == (206, b"snapshot")
    assert [answer.status_code for answer in none] == [404] * 3
    assert there.status_code == 409
    assert (copy.status_code, copy.json()["name"], copy.json()["dtype"]) == (201, "copy", "float16")
    assert not_of.status_code == 404
    assert (back.status_code, back.json()["count"]) == (201, 1)
    assert [answer.status_code for answer in bad] == [422] * 4
    assert (deleted.status_code, twice.status_code) == (200, 404)


async def test_statistics(tmp_path):
    async with running(tmp_path, store=SnapshotDict(tmp_path)) as run:
        missing = await run.client.get(f"{SHOP}/stats")
        await run.client.put(SHOP)
        found = await run.client.get(f"{SHOP}/stats")
    assert missing.status_code == 404
    assert found.json()["stats"] == {"kind": "flat", "count": 0}


async def test_a_store_without_snapshots_says_so(tmp_path):
    async with running(tmp_path, store=DictStore()) as run:
        await run.client.put(SHOP)
        for method, path in (
            ("POST", "snapshots"),
            ("GET", "snapshots"),
            ("GET", "snapshots/s0"),
            ("DELETE", "snapshots/s0"),
            ("POST", "restore"),
            ("GET", "stats"),
        ):
            answer = await run.client.request(method, f"{SHOP}/{path}", json={"snapshot": "s0"})
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
            assert f"does not support {'stats' if path == 'stats' else 'snapshots'}" in answer.json()["detail"]


async def test_snapshots_of_the_embedded_store(tmp_path):
    async with running(tmp_path) as run:
        await run.client.put(SHOP, json={"dtype": "float16", "indexed": ["n"]})
        await run.client.post(f"{SHOP}/items", files={"file": photo()})
        taken = (await run.client.post(f"{SHOP}/snapshots")).json()
        path = f"{SHOP}/snapshots/{taken['name']}"
        file = await run.client.get(path)
        stats = await run.client.get(f"{SHOP}/stats")
        before = (await run.client.get(SHOP)).json()
        there = await run.client.post(f"{SHOP}/restore", json={"snapshot": taken["name"]})
        await run.client.delete(SHOP)
        back = await run.client.post(f"{SHOP}/restore", json={"snapshot": taken["name"]})
        answers = [await run.client.delete(path), await run.client.get(path)]
        wrong = await run.client.get(f"{SHOP}/snapshots/..%2F..%2Fsearch.sqlite3")
    assert (taken["collection"], taken["count"], taken["bytes"]) == ("shop", 1, len(file.content))
    assert file.content.startswith(b"SQLite format 3")
    assert stats.json()["stats"]["count"] == 1
    assert there.status_code == 409
    assert (back.status_code, back.json()) == (201, before)
    assert [answer.status_code for answer in answers] == [200, 404]
    assert wrong.status_code == 404


async def test_the_page_names_every_route(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    async with running(tmp_path, store=DictStore()) as run:
        paths = (await run.client.get("/openapi.json")).json()["paths"]
    for path, methods in paths.items():
        for method, operation in methods.items():
            if {"collections", "items", "aliases"} & set(operation["tags"]):
                whole = f"{method.upper()} {path.replace('{item_id}', '{id}')}"
                assert f"`{whole}`" in page or f"`{whole.replace('/v1/collections/{name}', '')}`" in page, whole


FILE = {"Content-Type": "application/octet-stream"}


async def test_a_snapshot_moves_to_another_server(tmp_path):
    async with running(tmp_path / "old") as run:
        await run.client.put(SHOP, json={"indexed": ["brand"]})
        await run.client.post(f"{SHOP}/items", files={"file": photo()})
        name = (await run.client.post(f"{SHOP}/snapshots")).json()["name"]
        file = (await run.client.get(f"{SHOP}/snapshots/{name}")).content
        before = (await run.client.post(f"{SHOP}/items/scroll", json={})).json()
    async with running(tmp_path / "new") as run:
        sent = await run.client.post(f"{SHOP}/snapshots", content=file, headers=FILE)
        again = await run.client.post(f"{SHOP}/snapshots", content=file, headers=FILE)
        restored = await run.client.post(f"{SHOP}/restore", json={"snapshot": sent.json()["name"]})
        after = (await run.client.post(f"{SHOP}/items/scroll", json={})).json()
        listed = (await run.client.get(f"{SHOP}/snapshots")).json()["data"]
        got = await run.client.get(f"{SHOP}/snapshots/{sent.json()['name']}")
    assert sent.status_code == again.status_code == restored.status_code == 201
    assert (sent.json()["collection"], sent.json()["count"], sent.json()["bytes"]) == ("shop", 1, len(file))
    assert after["data"] == before["data"]
    assert len(listed) == 2
    assert got.content == file
    assert not list((tmp_path / "new" / "snapshots").glob(".*"))


async def test_an_upload_that_is_no_snapshot_is_refused(tmp_path):
    async with running(tmp_path, max_body_bytes=200_000, max_image_bytes=1000) as run:
        await run.client.put(SHOP)
        name = (await run.client.post(f"{SHOP}/snapshots")).json()["name"]
        file = (await run.client.get(f"{SHOP}/snapshots/{name}")).content
        database = (tmp_path / "search.sqlite3").read_bytes()
        cut, damaged = file[: len(file) // 2], file[:8192] + bytes(len(file) - 8192)
        wrong = [
            await run.client.post(f"{SHOP}/snapshots", content=content, headers=FILE)
            for content in (b"hello", photo(), cut, damaged, database)
        ]
        large = await run.client.post(f"{SHOP}/snapshots", content=bytes(200_001), headers=FILE)
        empty = await run.client.post(f"{SHOP}/snapshots", content=b"", headers=FILE)
        bad_name = await run.client.post("/v1/collections/UP/snapshots", content=file, headers=FILE)
        listed = (await run.client.get(f"{SHOP}/snapshots")).json()["data"]
    assert [answer.status_code for answer in wrong] == [422] * 5, [answer.text for answer in wrong]
    assert all("the uploaded snapshot" in answer.json()["detail"] for answer in wrong)
    assert all(str(tmp_path) not in answer.text for answer in wrong)
    assert large.status_code == 413
    assert (empty.status_code, "the uploaded snapshot is empty" in empty.text) == (422, True)
    assert bad_name.status_code == 422
    assert len(listed) == 1
    assert not list((tmp_path / "snapshots").glob(".*"))


async def test_a_flipped_bit_is_the_fault_of_the_snapshot(tmp_path):
    async with running(tmp_path) as run:
        vector = [0.5, 0.5, 0.5, 0.5] + [0.0] * (DIMS - 4)
        await run.client.post(f"{SHOP}/items", json={"items": [{"id": "a", "vector": vector}]})
        name = (await run.client.post(f"{SHOP}/snapshots")).json()["name"]
        path = tmp_path / "snapshots" / "shop" / f"{name}.sqlite3"
        file = path.read_bytes()
        at = file.index(b"\0\0\0\x3f" * 4)
        file = file[:at] + b"\x01" + file[at + 1 :]
        sent = await run.client.post(f"{SHOP}/snapshots", content=file, headers=FILE)
        path.write_bytes(file)
        restored = await run.client.post("/v1/collections/new/restore", json={"snapshot": name, "from": "shop"})
    assert (sent.status_code, restored.status_code) == (422, 422)
    assert "the uploaded snapshot is damaged: the vector of item number 1" in sent.json()["detail"]
    assert f"snapshot {name} is damaged: the vector of item number 1" in restored.json()["detail"]


async def test_milvus_takes_no_uploads(tmp_path):
    async with running(tmp_path, store=DictStore()) as run:
        await run.client.put(SHOP)
        answer = await run.client.post(f"{SHOP}/snapshots", content=b"x", headers=FILE)
    assert answer.status_code == 422
    assert "does not support snapshots" in answer.json()["detail"]


async def test_a_link_that_takes_the_place_of_a_snapshot_is_not_downloaded(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")

    class Linked(SnapshotDict):
        async def snapshot_path(self, collection: str, name: str) -> Path:
            path = await super().snapshot_path(collection, name)
            path.unlink()
            path.symlink_to(tmp_path / "secret")
            return path

    (tmp_path / "snapshots").mkdir()
    async with running(tmp_path, store=Linked(tmp_path / "snapshots")) as run:
        await run.client.put(SHOP)
        taken = await run.client.post(f"{SHOP}/snapshots")
        answer = await run.client.get(f"{SHOP}/snapshots/{taken.json()['name']}")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert "secret" not in answer.text
