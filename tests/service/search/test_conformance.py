"""Tests of the contract of every vector store (`service/search/store.py`), run on each store."""

import asyncio
import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import (
    CollectionNotFound,
    Conflict,
    InvalidRequest,
    ItemNotFound,
    ModelMismatch,
    ServiceError,
    StorageFailed,
)
from service.search.checks import metadata_text, normalised
from service.search.filters import Filter, matches, parse_filter, parse_path
from service.search.store import (
    MAX_DEPTH,
    MAX_ID_CHARACTERS,
    MAX_METADATA_BYTES,
    MAX_SOURCE_CHARACTERS,
    CollectionInfo,
    CollectionSpec,
    Facets,
    Hit,
    IndexSpec,
    Item,
    Order,
    SearchParams,
    VectorStore,
)
from tests.dict_store import DictStore
from tests.service.search.strategies import filter_bodies

TAG: Final = "f" * 64 + "/cls/l2/224x224/fp32"
OTHER_TAG: Final = "0" * 64 + "/cls/l2/224x224/fp32"
D: Final = 8
SPEC: Final = CollectionSpec(TAG, D)
SCORE: Final = 3e-6
"""How far scores may be apart: float32 sums in another order, rounded to six digits."""


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, D)).astype(np.float32)


def items(count: int, seed: int = 0, prefix: str = "i") -> list[Item]:
    rows = vectors(count, seed)
    return [Item(f"{prefix}{n}", row, {"n": n, "even": n % 2 == 0}) for n, row in enumerate(rows)]


def exact(value: Any) -> str:
    """Return JSON in which 1, 1.0 and true differ."""
    return json.dumps(value, sort_keys=True)


async def all_items(store: VectorStore, collection: str = "c", where: Filter | None = None, limit: int = 100) -> Any:
    """Return all items that a scroll yields, in order."""
    found: list[Item] = []
    cursor = None
    while True:
        page = await store.scroll(collection, where=where, cursor=cursor, limit=limit)
        assert len(page.items) <= limit
        found += page.items
        if page.cursor is None:
            return found
        assert page.items, "a page that is empty and not the last"
        cursor = page.cursor


async def all_ids(store: VectorStore, collection: str = "c", where: Filter | None = None, limit: int = 100) -> Any:
    return [item.id for item in await all_items(store, collection, where, limit)]


def check_hits(hits: Sequence[Hit], reference: Sequence[Hit], k: int) -> None:
    """Assert that the hits are the k best items of `reference`, which has all items, up to equal scores."""
    scores = {hit.id: hit for hit in reference}
    assert len(hits) == min(k, len(reference))
    assert len({hit.id for hit in hits}) == len(hits)
    assert list(hits) == sorted(hits, key=lambda hit: (-hit.score, hit.id))
    for hit in hits:
        expected = scores[hit.id]
        assert abs(hit.score - expected.score) <= SCORE
        assert exact(hit.metadata) == exact(expected.metadata)
        assert hit.source == expected.source
    found = {hit.id for hit in hits}
    worst = min((hit.score for hit in hits), default=-2.0)
    assert all(hit.id in found or hit.score <= worst + SCORE for hit in reference)


# ---- collections


async def test_create_is_idempotent_and_refuses_another_spec(store: VectorStore) -> None:
    spec = CollectionSpec(TAG, D, "float16", IndexSpec("hnsw", m=16, target_recall=0.9), ("brand", "shelf.row"), True)
    made = await store.create("c", spec)
    assert made == CollectionInfo("c", spec, 0)
    assert (made.tag, made.dimension) == (TAG, D)
    await store.upsert("c", items(2), tag=TAG)
    assert await store.create("c", spec) == CollectionInfo("c", spec, 2)
    for other in (
        replace(spec, tag=OTHER_TAG),
        replace(spec, dimension=D + 1),
        replace(spec, dtype="float32"),
        replace(spec, index=IndexSpec("hnsw", m=32, target_recall=0.9)),
        replace(spec, indexed=("brand",)),
        replace(spec, originals=False),
    ):
        with pytest.raises(Conflict):
            await store.create("c", other)
    assert await store.info("c") == CollectionInfo("c", spec, 2)


async def test_settings_that_are_not_allowed_make_no_collection(store: VectorStore) -> None:
    for wrong, words in [
        (replace(SPEC, dimension=10**9), "dimension=1000000000 is not allowed: a whole number, 1 to 8,192"),
        (replace(SPEC, index=IndexSpec("hnsw", m=1)), "index.m=1 is not allowed: a whole number, 2 to 256"),
        (replace(SPEC, index=IndexSpec(target_recall=7)), "index.target_recall=7 is not allowed: a number, 0.5 to 1.0"),
        (replace(SPEC, indexed=("a..b",)), "indexed: key 'a..b' is not allowed"),
    ]:
        with pytest.raises(InvalidRequest, match=re.escape(words)):
            await store.create("c", wrong)
    with pytest.raises(InvalidRequest, match="dimension=8193 is not allowed"):
        await store.upsert("c", [Item("a", np.ones(8193, np.float32))], tag=TAG)
    with pytest.raises(InvalidRequest, match="tag='' is not allowed: 1 to 256 printable characters"):
        await store.upsert("c", items(1), tag="")
    assert await store.collections() == []


async def test_create_refuses_the_name_of_an_alias(store: VectorStore) -> None:
    await store.create("c", SPEC)
    await store.set_alias("live", "c")
    with pytest.raises(Conflict):
        await store.create("live", SPEC)
    assert [info.name for info in await store.collections()] == ["c"]


async def test_collections_are_listed_by_name(store: VectorStore) -> None:
    assert await store.collections() == []
    names = ["b", "a-1", "a_1", "a1", "9", "0-x", "z" * 64, "a--b", "a__b"]
    for name in names:
        await store.create(name, SPEC)
    await store.upsert("a1", items(3), tag=TAG)
    found = await store.collections()
    assert [info.name for info in found] == sorted(names)
    assert {info.name: info.count for info in found if info.count} == {"a1": 3}
    assert all(info.spec == SPEC for info in found)


async def test_similar_names_are_different_collections(store: VectorStore) -> None:
    names = ["a-b", "a_b", "ab", "1a", "a--b", "a_-b"]
    for n, name in enumerate(names):
        await store.upsert(name, items(1, prefix=f"only{n}-"), tag=TAG)
    for n, name in enumerate(names):
        assert await all_ids(store, name) == [f"only{n}-0"]
        [hits] = await store.search(name, vectors(1), 10, tag=TAG)
        assert [hit.id for hit in hits] == [f"only{n}-0"]


async def test_drop_takes_all_items(store: VectorStore) -> None:
    await store.upsert("c", items(3), tag=TAG)
    await store.upsert("other", items(2), tag=TAG)
    await store.search("c", vectors(1), 3, tag=TAG, where=parse_filter({"key": "n", "gte": 0}))
    await store.drop("c")
    for call in (
        store.info("c"),
        store.drop("c"),
        store.count("c"),
        store.count("c", parse_filter({"key": "n", "eq": 1})),
        store.get("c", ["i0"]),
        store.patch("c", "i0", {}),
        store.delete("c", ["i0"]),
        store.delete_where("c", parse_filter({"key": "n", "eq": 1})),
        store.scroll("c"),
        store.search("c", vectors(1), 1, tag=TAG),
        store.set_alias("live", "c"),
    ):
        with pytest.raises(CollectionNotFound):
            await call
    assert await store.count("other") == 2
    new = [Item("i0", [1.0, 0.0, 0.0]), Item("new", [0.0, 1.0, 0.0])]
    info = await store.upsert("c", new, tag=OTHER_TAG)  # another model and dimension: nothing of the old one is left
    assert info == CollectionInfo("c", CollectionSpec(OTHER_TAG, 3), 2)
    [hits] = await store.search("c", [[1, 0, 0]], 10, tag=OTHER_TAG, where=parse_filter({"key": "n", "exists": False}))
    assert [hit.id for hit in hits] == ["i0", "new"]
    assert await store.count("c", parse_filter({"key": "n", "gte": 0})) == 0


async def test_drop_refuses_an_alias_and_what_has_one(store: VectorStore) -> None:
    await store.upsert("c", items(1), tag=TAG)
    await store.set_alias("live", "c")
    for name in ("c", "live"):
        with pytest.raises(Conflict):
            await store.drop(name)
    assert await store.count("live") == 1
    await store.drop_alias("live")
    await store.drop("c")
    assert await store.collections() == []


# ---- aliases


async def test_aliases_are_set_swapped_and_dropped(store: VectorStore) -> None:
    assert await store.aliases() == {}
    for name in ("a", "b"):
        await store.create(name, SPEC)
    assert await store.set_alias("live", "a") is None
    assert await store.set_alias("live", "a") == "a"
    assert await store.set_alias("live", "b") == "a"
    assert await store.set_alias("0-test", "live") is None  # an alias may be named wherever a collection is
    assert await store.set_alias("live", "a") == "b"
    assert await store.aliases() == {"live": "a", "0-test": "b"}
    await store.drop_alias("live")
    assert await store.aliases() == {"0-test": "b"}
    for name in ("live", "a", "nothing"):
        with pytest.raises(CollectionNotFound):
            await store.drop_alias(name)
    with pytest.raises(CollectionNotFound):
        await store.info("live")
    assert await store.set_alias("live", "b") is None


async def test_an_alias_needs_a_free_name_and_a_collection(store: VectorStore) -> None:
    for name in ("a", "b"):
        await store.create(name, SPEC)
    for target in ("a", "b"):
        with pytest.raises(Conflict):
            await store.set_alias("a", target)
    with pytest.raises(CollectionNotFound):
        await store.set_alias("live", "nothing")
    with pytest.raises(CollectionNotFound):
        await store.set_alias("live", "live")
    assert await store.aliases() == {}


async def test_everything_works_through_an_alias(store: VectorStore) -> None:
    await store.create("c", SPEC)
    await store.set_alias("live", "c")
    assert await store.upsert("live", items(4), tag=TAG) == CollectionInfo("c", SPEC, 4)
    assert await store.info("live") == CollectionInfo("c", SPEC, 4)
    assert [info.name for info in await store.collections()] == ["c"]
    even = parse_filter({"key": "even", "eq": True})
    assert (await store.count("live"), await store.count("live", even)) == (4, 2)
    [found] = await store.get("live", ["i1"])
    assert found is not None
    assert found.metadata == {"n": 1, "even": False}
    assert (await store.patch("live", "i1", {"n": None})).metadata == {"even": False}
    assert await store.delete("live", ["i3"]) == 1
    assert sorted(await all_ids(store, "live", limit=2)) == ["i0", "i1", "i2"]
    [hits] = await store.search("live", vectors(1), 1, tag=TAG, where=even)
    assert [hit.id for hit in hits] == ["i0"]
    assert await store.delete_where("live", even) == 2
    assert await all_ids(store, "c") == ["i1"]
    with pytest.raises(ModelMismatch):
        await store.search("live", vectors(1), 1, tag=OTHER_TAG)
    await store.upsert("d", [Item("of d", np.ones(D))], tag=TAG)
    assert await store.set_alias("live", "d") == "c"
    assert await all_ids(store, "live") == ["of d"]
    [hits] = await store.search("live", vectors(1), 5, tag=TAG)
    assert [hit.id for hit in hits] == ["of d"]


# ---- upsert and get


async def test_the_first_write_makes_the_collection(store: VectorStore) -> None:
    assert await store.upsert("c", items(2), tag=TAG) == CollectionInfo("c", SPEC, 2)
    assert await store.info("c") == CollectionInfo("c", SPEC, 2)
    assert await store.create("c", SPEC) == CollectionInfo("c", SPEC, 2)


async def test_upsert_replaces_the_whole_item(store: VectorStore) -> None:
    one, two = vectors(2)
    await store.upsert("c", [Item("x", one, {"a": 1}, "s3://photo", "ab" * 32), Item("y", one)], tag=TAG)
    assert (await store.upsert("c", [Item("x", two, {"b": 2})], tag=TAG)).count == 2
    [found] = await store.get("c", ["x"])
    assert found is not None
    assert (found.metadata, found.source, found.digest) == ({"b": 2}, None, None)
    np.testing.assert_allclose(found.vector, normalised(two), atol=1e-6)
    [hits] = await store.search("c", [two], 1, tag=TAG)
    assert (hits[0].id, hits[0].metadata, hits[0].source) == ("x", {"b": 2}, None)
    assert hits[0].score == pytest.approx(1, abs=SCORE)
    assert await store.count("c", parse_filter({"key": "a", "exists": True})) == 0


async def test_of_equal_ids_in_one_call_the_last_wins(store: VectorStore) -> None:
    one, two, three = vectors(3)
    info = await store.upsert("c", [Item("x", one, {"n": 1}), Item("y", two), Item("x", three, {"n": 2})], tag=TAG)
    assert info.count == 2
    [found] = await store.get("c", ["x"])
    assert found is not None
    assert found.metadata == {"n": 2}
    np.testing.assert_allclose(found.vector, normalised(three), atol=1e-6)


async def test_upsert_refuses_other_models_and_dimensions(store: VectorStore) -> None:
    await store.upsert("c", items(2), tag=TAG)
    with pytest.raises(ModelMismatch) as caught:
        await store.upsert("c", [Item("x", np.ones(3))], tag=OTHER_TAG)
    assert TAG in str(caught.value)
    assert OTHER_TAG in str(caught.value)
    with pytest.raises(Conflict) as conflict:
        await store.upsert("c", [Item("x", np.ones(D + 1))], tag=TAG)
    assert not isinstance(conflict.value, ModelMismatch)
    assert await store.info("c") == CollectionInfo("c", SPEC, 2)
    assert await store.get("c", ["x"]) == [None]


BAD_NAMES: Final = ["", "A", "-a", "_a", "a" * 65, "a b", "a/b", "a.b", "ü", "a'--", "a\n", "a\x00", "٣", "restoring:1"]
BAD_IDS: Final = ["", "x" * (MAX_ID_CHARACTERS + 1), "a\nb", "\x00", "\ud800", "a\x85", "\t"]
BAD_VECTORS: Final[list[Any]] = [[], np.zeros(D), [np.nan] * D, [1, np.inf] * (D // 2), np.ones((1, D)), 3.0]
DEEP: Any = {}
for _ in range(300):
    DEEP = {"a": DEEP}
BAD_METADATA: Final[list[Any]] = [
    {"x": float("nan")},
    {"x": [{"y": float("-inf")}]},
    {"x": object()},
    {"x": {1, 2}},
    {"x": b"bytes"},
    {1: 2},
    {"x": 2**64},
    {"x": 2**63},
    {"x": [{"y": 2**64 - 1}]},
    {"x": -(2**63) - 1},
    {"x": "\ud800"},
    {"\udfff": 1},
    {"x": "zero\x00"},
    {"x": "x" * MAX_METADATA_BYTES},
    {"x": "é" * (MAX_METADATA_BYTES // 2)},
    DEEP,
    ["x"],
    None,
]
BAD_SOURCES: Final = ["", "x" * (MAX_SOURCE_CHARACTERS + 1), "a\nb", "\ud800"]
BAD_DIGESTS: Final = ["", "a" * 63, "A" * 64, "g" * 64, "a" * 64 + "\n", "a" * 65]
BAD_ITEMS: Final[list[Item]] = [
    *(Item(item_id, np.ones(D)) for item_id in BAD_IDS),
    *(Item("bad", vector) for vector in BAD_VECTORS),
    *(Item("bad", np.ones(D), metadata) for metadata in BAD_METADATA),
    *(Item("bad", np.ones(D), {}, source) for source in BAD_SOURCES),
    *(Item("bad", np.ones(D), {}, None, digest) for digest in BAD_DIGESTS),
    Item("bad", np.ones(D + 1)),  # not as long as the others of the call
]


async def test_a_bad_item_is_refused_and_nothing_is_written(store: VectorStore) -> None:
    await store.upsert("c", items(2), tag=TAG)
    good = [Item("i0", np.ones(D), {"changed": True}), Item("fresh", np.ones(D))]
    for number, bad in enumerate(BAD_ITEMS):
        for name in ("c", "new"):
            result = await outcome(store.upsert(name, [*good, bad], tag=TAG))
            assert result is InvalidRequest, number
    for name in ("c", "new"):
        with pytest.raises(InvalidRequest):
            await store.upsert(name, [], tag=TAG)
    assert [info.name for info in await store.collections()] == ["c"]
    assert sorted(await all_ids(store)) == ["i0", "i1"]
    [found] = await store.get("c", ["i0"])
    assert found is not None
    assert found.metadata == {"n": 0, "even": True}


async def test_bad_names_are_refused_everywhere(store: VectorStore) -> None:
    await store.create("c", SPEC)
    where = parse_filter({"key": "n", "eq": 1})
    for name in BAD_NAMES:
        for call in (
            store.create(name, SPEC),
            store.info(name),
            store.drop(name),
            store.set_alias(name, "c"),
            store.set_alias("live", name),
            store.drop_alias(name),
            store.upsert(name, items(1), tag=TAG),
            store.get(name, ["x"]),
            store.patch(name, "x", {}),
            store.delete(name, ["x"]),
            store.delete_where(name, where),
            store.count(name),
            store.count(name, where),
            store.scroll(name),
            store.search(name, vectors(1), 1, tag=TAG),
        ):
            with pytest.raises(InvalidRequest):
                await call
    assert [info.name for info in await store.collections()] == ["c"]
    assert await store.aliases() == {}


async def test_bad_ids_are_refused_everywhere(store: VectorStore) -> None:
    await store.upsert("c", items(1), tag=TAG)
    for item_id in BAD_IDS:
        for call in (
            store.get("c", ["i0", item_id]),
            store.patch("c", item_id, {}),
            store.delete("c", ["i0", item_id]),
        ):
            with pytest.raises(InvalidRequest):
                await call
    assert await store.count("c") == 1


async def test_get_keeps_the_order_of_the_ids(store: VectorStore) -> None:
    await store.upsert("c", items(5), tag=TAG)
    found = await store.get("c", ["i3", "nothing", "i0", "i3", "I0"])
    assert [item and item.id for item in found] == ["i3", None, "i0", "i3", None]
    assert await store.get("c", []) == []


async def test_vectors_come_back_with_length_one(store: VectorStore) -> None:
    rows = [*vectors(4).tolist(), [1e-300] * D, [1e300, -1e300] * (D // 2), [1, *[0] * (D - 1)]]
    await store.upsert("c", [Item(f"i{n}", row) for n, row in enumerate(rows)], tag=TAG)
    found = await store.get("c", [f"i{n}" for n in range(len(rows))])
    for row, item in zip(rows, found, strict=True):
        assert item is not None
        assert item.vector.dtype == np.float32
        assert item.vector.shape == (D,)
        np.testing.assert_allclose(item.vector, normalised(row), atol=1e-6)
    by_scroll = {item.id: item.vector for item in await all_items(store)}
    for item in found:
        assert item is not None
        np.testing.assert_array_equal(by_scroll[item.id], item.vector)


IDS: Final = [
    "a", "A", "a ", " a", "0", "null", "a/b", "../x", "a'b", 'a"b', 'a"', "a\\", "a\\b", "%", "_", "a%2Fb", "*", "?",
    "é", "e\u0301", "日本語", "🍎", "ß", "ss", "' OR 1=1 --", '" or id != "', "{}", "[1]", "x" * MAX_ID_CHARACTERS,
    "🍎" * MAX_ID_CHARACTERS, "after:a", "\ufffd", "ﬁ", "$", "${x}", "a;b",
    "می\u200cخواهم", "क्\u200dष", "Screenshot 3.41.12\u202fPM.png", "a\u00a0b", "写真\u3000一", "rtl\u202e",
    "two\u2028lines", "\ufffe\U0010ffff\ue000",
]  # fmt: skip


async def test_any_text_without_control_characters_is_an_id(store: VectorStore) -> None:
    rows = vectors(len(IDS))
    await store.upsert("c", [Item(i, v, {"id": i}) for i, v in zip(IDS, rows, strict=True)], tag=TAG)
    assert await store.count("c") == len(IDS)
    found = await store.get("c", IDS)
    assert [item and (item.id, item.metadata) for item in found] == [(i, {"id": i}) for i in IDS]
    assert sorted(await all_ids(store, limit=7)) == sorted(IDS)
    answers = await store.search("c", rows, 1, tag=TAG)
    assert [hits[0].id for hits in answers] == IDS
    assert (await store.patch("c", 'a"b', {"id": None, "x": 1})).metadata == {"x": 1}
    gone = IDS[::2]
    assert await store.delete("c", gone) == len(gone)
    assert sorted(await all_ids(store)) == sorted(IDS[1::2])


LARGEST: Final = {"x": "é" * ((MAX_METADATA_BYTES - len('{"x":""}')) // 2)}
METADATA: Final[list[dict[str, Any]]] = [
    {},
    {"a": 0.1, "b": 1e300, "c": -1e-300, "d": 5e-324, "e": 1.7976931348623157e308, "f": 1.0, "g": -0.0, "h": 1e16},
    {"a": 2**53 + 1, "b": 2**63 - 1, "c": -(2**63), "d": 2**31, "e": 2**32 - 1, "f": 0, "g": -1},
    {"a": True, "b": False, "c": None, "d": 1, "e": 0, "f": [True, 1, 1.0, None]},
    {"a": "", "b": [], "c": {}, "d": [[], {}, ""], "": "empty key", " ": "space"},
    {"a": {"b": {"c": {"d": [1, {"e": [2, 3]}]}}}, "a.b": "a dot", "a.b.c": {"d.e": 1}},
    {"日本": "寿司 🍣", "é": "e\u0301", "e\u0301": "é", "emoji👩‍👩‍👧": ["👩‍👩‍👧"], "rtl": "שלום"},
    {"q": "\"quoted\" 'single' \\ back\\\\slash", "n": "line\nbreak\ttab\r", "c": "\x01\x1f\x7f\u2028\ufeff\uffff"},
    {"json": '{"a": 1}', "list": "[1, 2]", "number": "1", "bool": "true", "null": "null", "s": "'; DROP TABLE items_1"},
    {"k'ey": 1, 'k"ey': 2, "k\\ey": 3, "k\ney": 4, "$": 5, "$.a": 6, "id": 7, "text": 8, "metadata": 9, "vector": 10},
    {"u": "\\u0000", "v": "\\ud800", "w": "%s %d {} {0}", "x": "a" * 5000},
    LARGEST,
]  # fmt: skip


async def test_metadata_comes_back_exactly(store: VectorStore) -> None:
    assert len(metadata_text(LARGEST).encode()) == MAX_METADATA_BYTES
    rows = vectors(len(METADATA))
    ids = [f"i{n}" for n in range(len(METADATA))]
    await store.upsert("c", [Item(i, v, m) for i, v, m in zip(ids, rows, METADATA, strict=True)], tag=TAG)
    expected = [exact(metadata) for metadata in METADATA]
    found = await store.get("c", ids)
    assert [item and exact(item.metadata) for item in found] == expected
    by_scroll = {item.id: item.metadata for item in await all_items(store)}
    assert [exact(by_scroll[item_id]) for item_id in ids] == expected
    answers = await store.search("c", rows, 1, tag=TAG)
    assert [hits[0].id for hits in answers] == ids
    assert [exact(hits[0].metadata) for hits in answers] == expected
    for item_id, metadata in zip(ids[:-1], METADATA[:-1], strict=True):
        patched = await store.patch("c", item_id, {"+": "new"})
        assert exact(patched.metadata) == exact({**metadata, "+": "new"})
    again = await store.get("c", ids[:-1])
    assert [item and exact(item.metadata) for item in again] == [exact({**m, "+": "new"}) for m in METADATA[:-1]]


async def test_source_and_digest_come_back(store: VectorStore) -> None:
    sources = ["s3://bucket/a b'c\"d.jpg", "🍎" * MAX_SOURCE_CHARACTERS, None]
    digests = ["ab" * 32, None, "0" * 64]
    rows = vectors(3)
    written = [Item(f"i{n}", rows[n], {}, sources[n], digests[n]) for n in range(3)]
    await store.upsert("c", written, tag=TAG)
    expected = {item.id: (item.source, item.digest) for item in written}
    for found in (await store.get("c", list(expected)), await all_items(store)):
        assert {item.id: (item.source, item.digest) for item in found if item} == expected
    answers = await store.search("c", rows, 1, tag=TAG)
    assert [(hits[0].id, hits[0].source) for hits in answers] == [(i.id, i.source) for i in written]
    patched = await store.patch("c", "i0", {"x": 1})
    assert (patched.source, patched.digest) == expected["i0"]
    np.testing.assert_allclose(patched.vector, normalised(rows[0]), atol=1e-6)


async def test_float16_is_near_enough(store: VectorStore) -> None:
    spec = CollectionSpec(TAG, D, "float16")
    await store.create("c", spec)
    written = items(20)
    assert await store.upsert("c", written, tag=TAG) == CollectionInfo("c", spec, 20)
    found = await store.get("c", [item.id for item in written])
    for item, back in zip(written, found, strict=True):
        assert back is not None
        np.testing.assert_allclose(back.vector, normalised(item.vector), atol=1e-3)
        assert np.linalg.norm(back.vector) == pytest.approx(1, abs=2e-3)
    answers = await store.search("c", [item.vector for item in written], 20, tag=TAG)
    units = np.stack([normalised(item.vector) for item in written])
    for n, hits in enumerate(answers):
        assert hits[0].id == f"i{n}"
        assert all(-1 <= hit.score <= 1 for hit in hits)
        np.testing.assert_allclose([h.score for h in hits], [units[int(h.id[1:])] @ units[n] for h in hits], atol=3e-3)
    assert await store.delete_where("c", parse_filter({"key": "n", "lt": 15})) == 15
    assert (await store.patch("c", "i15", {"x": 1})).metadata == {"n": 15, "even": False, "x": 1}


# ---- request keys


async def test_a_request_key_counts_once(store: VectorStore) -> None:
    if "idempotency" not in store.capabilities:  # the argument is taken all the same, and changes nothing
        await store.upsert("c", items(2), tag=TAG, request_key="k")
        assert (await store.upsert("c", items(2), tag=TAG, request_key="k")).count == 2
        return
    await store.upsert("c", items(3), tag=TAG, request_key="k")
    await store.delete("c", ["i0"])
    await store.patch("c", "i1", {"n": 99})
    assert (await store.upsert("c", items(3), tag=TAG, request_key="k")).count == 2
    assert await store.get("c", ["i0"]) == [None]
    [found] = await store.get("c", ["i1"])
    assert found is not None
    assert found.metadata["n"] == 99
    three = items(3)
    for other in (
        items(2),
        items(3, seed=1),
        [*three[:2], replace(three[2], metadata={"n": 3})],
        [*three[:2], replace(three[2], source="s3://elsewhere")],
        [*three[:2], replace(three[2], id="another")],
    ):
        with pytest.raises(Conflict):
            await store.upsert("c", other, tag=TAG, request_key="k")
    assert sorted(await all_ids(store)) == ["i1", "i2"]
    assert (await store.upsert("c", items(3), tag=TAG, request_key="another")).count == 3
    await store.upsert("d", items(2), tag=TAG, request_key="k")  # a key is of one collection
    assert await store.count("d") == 2
    with pytest.raises(ModelMismatch):
        await store.upsert("d", items(2), tag=OTHER_TAG, request_key="new")
    assert (await store.upsert("d", items(3), tag=TAG, request_key="new")).count == 3  # what failed is not remembered


async def test_a_dropped_collection_takes_its_request_keys_along(store: VectorStore) -> None:
    await store.upsert("c", items(2), tag=TAG, request_key="k")
    await store.drop("c")
    assert (await store.upsert("c", items(2), tag=TAG, request_key="k")).count == 2


async def test_a_request_key_counts_once_when_calls_overlap(store: VectorStore) -> None:
    await store.create("c", SPEC)
    infos = await asyncio.gather(*(store.upsert("c", items(3), tag=TAG, request_key="k") for _ in range(5)))
    assert [info.count for info in infos] == [3] * 5
    assert sorted(await all_ids(store)) == ["i0", "i1", "i2"]


# ---- patch


@pytest.mark.parametrize(
    ("before", "patch", "after"),
    [
        ({"a": 1}, {}, {"a": 1}),
        ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
        ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
        ({"a": 1}, {"nothing": None}, {"a": 1}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": None, "d": {"e": None, "f": 1}}}, {"a": {"c": 2, "d": {"f": 1}}}),
        ({"a": {"b": 1}}, {"a": [1, None]}, {"a": [1, None]}),
        ({"a": [1]}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": 1}, {"a": {"b": None}}, {"a": {}}),
        ({"a": 1, "ü": "x"}, {"a": True, "ü": None, "日": {"本": 1e300}}, {"a": True, "日": {"本": 1e300}}),
    ],
)
async def test_patch_merges_as_rfc_7396(
    store: VectorStore, before: dict[str, Any], patch: dict[str, Any], after: dict[str, Any]
) -> None:
    await store.upsert("c", [Item("x", np.ones(D), before, "s", "0" * 64), Item("y", np.ones(D))], tag=TAG)
    answer = await store.patch("c", "x", patch)
    [item, other] = await store.get("c", ["x", "y"])
    [hits] = await store.search("c", np.ones((1, D)), 1, tag=TAG)
    for found in (answer, item, hits[0]):
        assert found is not None
        assert found.id == "x"
        assert exact(found.metadata) == exact(after)
        assert found.source == "s"
    assert other is not None
    assert other.metadata == {}


async def test_patch_refuses_what_it_cannot_do(store: VectorStore) -> None:
    await store.upsert("c", [Item("x", np.ones(D), {"a": 1})], tag=TAG)
    with pytest.raises(ItemNotFound):
        await store.patch("c", "nothing", {"a": 2})
    with pytest.raises(CollectionNotFound):
        await store.patch("nothing", "x", {"a": 2})
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"a": deep}
    for bad in [m for m in BAD_METADATA if isinstance(m, dict)] + [deep]:
        with pytest.raises(InvalidRequest):
            await store.patch("c", "x", bad)
    half = {"half": "x" * (MAX_METADATA_BYTES // 2)}
    await store.patch("c", "x", half)
    with pytest.raises(InvalidRequest):
        await store.patch("c", "x", {"other": half["half"]})  # together too long
    [found] = await store.get("c", ["x"])
    assert found is not None
    assert found.metadata == {"a": 1, **half}
    assert await store.count("c") == 1


async def test_filters_see_a_patch(store: VectorStore) -> None:
    await store.create("c", replace(SPEC, indexed=("n",)))
    await store.upsert("c", items(4), tag=TAG)
    where = parse_filter({"key": "n", "eq": 7})
    assert (await store.search("c", vectors(1), 5, tag=TAG, where=where)) == [[]]
    await store.patch("c", "i2", {"n": 7})
    [hits] = await store.search("c", vectors(1), 5, tag=TAG, where=where)
    assert [(hit.id, hit.metadata) for hit in hits] == [("i2", {"n": 7, "even": True})]
    assert await all_ids(store, where=where) == ["i2"]
    await store.patch("c", "i2", {"n": None})
    assert (await store.search("c", vectors(1), 5, tag=TAG, where=where)) == [[]]
    assert await store.count("c", where) == 0


# ---- delete, count, scroll


async def test_delete_says_how_many_there_were(store: VectorStore) -> None:
    await store.upsert("c", items(5), tag=TAG)
    assert await store.delete("c", ["i0", "i1", "nothing", "i0"]) == 2
    assert await store.delete("c", ["i0"]) == 0
    assert await store.delete("c", []) == 0
    assert await store.count("c") == 3
    assert await store.get("c", ["i0", "i2"]) != [None, None]
    [hits] = await store.search("c", vectors(1), 10, tag=TAG)
    assert {hit.id for hit in hits} == {"i2", "i3", "i4"}
    await store.upsert("c", items(1), tag=TAG)
    [hits] = await store.search("c", vectors(1), 10, tag=TAG)
    assert hits[0].id == "i0"


async def test_delete_where(store: VectorStore, is_slow: bool) -> None:
    count = 120 if is_slow else 2500
    await store.upsert("c", items(count), tag=TAG)
    even = parse_filter({"key": "even", "eq": True})
    assert await store.delete_where("c", even) == count // 2
    assert await store.delete_where("c", even) == 0
    assert await store.count("c") == count // 2
    left = await all_ids(store, limit=1000)
    assert sorted(left) == sorted(f"i{n}" for n in range(count) if n % 2)
    assert await store.delete_where("c", parse_filter({"not": {"key": "nothing", "exists": True}})) == count // 2
    assert await store.info("c") == CollectionInfo("c", SPEC, 0)


async def test_an_empty_collection(store: VectorStore) -> None:
    await store.create("c", SPEC)
    where = parse_filter({"key": "n", "exists": False})
    assert await store.search("c", vectors(3), 5, tag=TAG) == [[], [], []]
    assert await store.search("c", vectors(3), 5, tag=TAG, where=where) == [[], [], []]
    assert (await store.count("c"), await store.count("c", where)) == (0, 0)
    assert await all_items(store) == []
    assert await store.get("c", ["x"]) == [None]
    assert (await store.delete("c", ["x"]), await store.delete_where("c", where)) == (0, 0)
    with pytest.raises(ModelMismatch):
        await store.search("c", vectors(1), 5, tag=OTHER_TAG)
    with pytest.raises(Conflict):
        await store.search("c", np.ones((1, 3)), 5, tag=TAG)


@pytest.mark.parametrize("limit", [1, 3, 4, 12, 13, 100])
async def test_scroll_gives_everything_once(store: VectorStore, limit: int) -> None:
    written = items(12)
    await store.upsert("c", written, tag=TAG)
    found = await all_items(store, limit=limit)
    assert sorted(item.id for item in found) == sorted(item.id for item in written)
    expected = {item.id: item for item in written}
    for item in found:
        assert item.metadata == expected[item.id].metadata
        np.testing.assert_allclose(item.vector, normalised(expected[item.id].vector), atol=1e-6)
    even = parse_filter({"key": "even", "eq": True})
    assert sorted(await all_ids(store, where=even, limit=limit)) == sorted(f"i{n}" for n in range(0, 12, 2))
    none = await store.scroll("c", where=parse_filter({"key": "n", "gt": 99}), limit=limit)
    assert (none.items, none.cursor) == ([], None)


async def test_what_stays_is_seen_once_while_others_come_and_go(store: VectorStore, is_slow: bool) -> None:
    count = 30 if is_slow else 200
    await store.upsert("c", items(count, prefix="stays"), tag=TAG)
    await store.upsert("c", items(count, prefix="goes"), tag=TAG)
    await store.upsert("c", items(count, prefix="stays too "), tag=TAG)
    where = parse_filter({"key": "n", "gte": 0})
    for condition in (None, where):
        seen: list[str] = []
        cursor, step = None, 0
        while True:
            page = await store.scroll("c", where=condition, cursor=cursor, limit=count // 3)
            seen += [item.id for item in page.items]
            cursor, step = page.cursor, step + 1
            if cursor is None:
                break
            await store.upsert("c", items(3, seed=step, prefix=f"comes {step} "), tag=TAG)
            await store.upsert("c", items(3, seed=step, prefix=f"a comes {step} "), tag=TAG)
            # Also what the cursor may stand on.
            gone = [item.id for item in page.items if not item.id.startswith("stays")]
            await store.delete("c", [*gone, *(f"goes{n}" for n in range(7 * step, 7 * step + 7))])
            await store.patch("c", f"stays{step}", {"patched": step})
        stayed = [item_id for item_id in seen if item_id.startswith("stays")]
        assert sorted(stayed) == sorted(f"{name}{n}" for n in range(count) for name in ("stays", "stays too "))
        assert len(seen) == len(set(seen))


@pytest.mark.parametrize("cursor", ["", "nonsense", "n", "i", "n-1", "0", "null", "é", "\x00", "' OR 1=1", "x" * 5000])
async def test_a_foreign_cursor_is_refused(store: VectorStore, cursor: str) -> None:
    await store.upsert("c", items(2), tag=TAG)
    with pytest.raises(InvalidRequest):
        await store.scroll("c", cursor=cursor)


# ---- search


async def test_search_finds_the_nearest(store: VectorStore, is_slow: bool) -> None:
    count = 60 if is_slow else 400
    written = [replace(item, source=f"s3://{item.id}") for item in items(count)]
    plain = DictStore()
    for one in (store, plain):
        await one.upsert("c", written, tag=TAG)
    queries = vectors(20, seed=1) * np.logspace(-6, 6, 20)[:, None]  # of any scale
    reference = await plain.search("c", queries, count, tag=TAG)
    for k in (1, 7, count, count + 1, MAX_DEPTH):
        answers = await store.search("c", queries, k, tag=TAG)
        assert len(answers) == len(queries)
        for hits, all_hits in zip(answers, reference, strict=True):
            check_hits(hits, all_hits, k)
    [alone] = await store.search("c", queries[3:4], 7, tag=TAG)
    check_hits(alone, reference[3], 7)
    for params in (SearchParams(exact=True), SearchParams(ef_search=64, nprobe=8)):
        [hits] = await store.search("c", queries[:1], 7, tag=TAG, params=params)
        check_hits(hits, reference[0], 7)


async def test_scores_are_cosines(store: VectorStore) -> None:
    axes = np.eye(D)
    rows = {"same": axes[0], "half": axes[0] + axes[1], "none": axes[2] * 1e-200, "far": -axes[0] * 1e200}
    await store.upsert("c", [Item(name, row) for name, row in rows.items()], tag=TAG)
    [hits] = await store.search("c", [[5e100, *[0] * (D - 1)]], 10, tag=TAG)
    assert [hit.id for hit in hits] == ["same", "half", "none", "far"]
    np.testing.assert_allclose([hit.score for hit in hits], [1, 0.5**0.5, 0, -1], atol=SCORE)
    assert all(-1 <= hit.score <= 1 for hit in hits)


async def test_equal_scores_come_by_id(store: VectorStore, is_slow: bool) -> None:
    count = 60 if is_slow else 300
    names = [f"{n:03d}" for n in range(count)] + ["B", "a", "é", "日", "🍎", "~"]
    shuffled = np.random.default_rng(0).permutation(names).tolist()
    same = [Item(name, vectors(1)[0] * (1 + n), {"n": n}) for n, name in enumerate(shuffled)]
    nearer = Item("zz nearest", vectors(1)[0] + [1e-2, *[0] * (D - 1)])
    await store.upsert("c", [*same, nearer], tag=TAG)
    query = [nearer.vector]
    for k in (1, 2, 5, len(names), len(names) + 5):
        [hits] = await store.search("c", query, k, tag=TAG)
        assert [hit.id for hit in hits] == ["zz nearest", *sorted(names)][:k]
    few = parse_filter({"key": "n", "lt": count // 2})
    [hits] = await store.search("c", query, 9, tag=TAG, where=few)
    assert [hit.id for hit in hits] == sorted(shuffled[: count // 2])[:9]


async def test_search_refuses_what_it_cannot_compare(store: VectorStore) -> None:
    await store.upsert("c", items(3), tag=TAG)
    with pytest.raises(ModelMismatch) as caught:
        await store.search("c", np.ones((1, 3)), 1, tag=OTHER_TAG)
    assert TAG in str(caught.value)
    assert OTHER_TAG in str(caught.value)
    with pytest.raises(Conflict) as conflict:
        await store.search("c", np.ones((1, 3)), 1, tag=TAG)
    assert not isinstance(conflict.value, ModelMismatch)
    with pytest.raises(CollectionNotFound):
        await store.search("nothing", vectors(1), 1, tag=TAG)
    for k in (0, -1, MAX_DEPTH + 1):
        with pytest.raises(InvalidRequest):
            await store.search("c", vectors(1), k, tag=TAG)
    for bad in (np.zeros((1, D)), [[np.nan] * D], [[np.inf] * D], np.ones(D), np.ones((1, 1, D)), [], [[]]):
        with pytest.raises(InvalidRequest):
            await store.search("c", bad, 1, tag=TAG)
    good_and_bad = np.stack([np.ones(D), np.zeros(D)])
    with pytest.raises(InvalidRequest):
        await store.search("c", good_and_bad, 1, tag=TAG)


# ---- filters


VALUES: Final[list[Any]] = [
    None, True, False, 0, 1, -1, 2, 10, 0.1, 0.5, 1.5, -0.0, 1e300, -1e300, 5e-324, 2**31, 2**53, 2**53 + 1, 2**63 - 1,
    2**63 - 512, -(2**63), 2**63, 2**64 - 1, float(2**63), float(2**53), "", " ", "a", "A", "b", "ab", "a%", "a_b", "é",
    "e\u0301", "日本", "🍎", "\uffff", "1", "1.0", "0", "true", "null", "{}", '{"a":1}', "[]", "[1]", "a'b", 'a"b',
    "a\\b", "a\\", "\\n", "\n", "2024-01-31", "2024-02-01", "' OR '1'='1", '" or 1 == 1 or "', "x' --", "%", "{{x}}",
    [], [1], ["a"], [True], {}, {"a": 1}, {"b": "a"}, {"b": None}, {"b": {"c": 1}}, {"b": [1]},
    ["a", 1, True, None], [["a"], {"b": 1}], [0.1, 2**63 - 1], ["[", "{}", "日本語"], [False, 0],
]  # fmt: skip
STORED: Final = [value for value in VALUES if not (isinstance(value, int) and value >= 2**63)]
"""The values that metadata may contain."""
KEYS: Final = ["a", "b", "a.b", "a.b.c", "日本", "with space", "it-s", "$", "id", "text", "metadata", "B"]


def nested(key: str, value: Any) -> dict[str, Any]:
    """Return metadata with this value at a dotted key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def corpus(is_small: bool) -> list[Item]:
    """Return items with every value under a plain key, some values under each other key, and mixtures."""
    rng = np.random.default_rng(3)
    metadata = [{}, *({"a": value, "n": n} for n, value in enumerate(STORED))]
    metadata += [nested("a.b", value) for value in STORED[:: 7 if is_small else 2]]
    metadata += [nested(key, value) for key in KEYS[3:] for value in STORED[:: 25 if is_small else 6]]
    for _ in range(10 if is_small else 100):
        some = {key: STORED[rng.integers(len(STORED))] for key in rng.permutation(KEYS).tolist()[:4] if "." not in key}
        metadata.append(some)
    metadata += [{"a.b": 1}, {"a": {"b.c": 1}}, {"a'b": 1, 'a"b': 1}, {"": {"": 1}}, {"a\x01": 1, "a\\": 1}]
    return [Item(f"i{n}", v, m) for n, (v, m) in enumerate(zip(vectors(len(metadata)), metadata, strict=True))]


FILTERS: Final[list[dict[str, Any]]] = [
    *({"key": "a", "eq": value} for value in VALUES if isinstance(value, bool | int | float | str)),
    {"key": "a", "in": [1, True, "1"]},
    {"key": "a", "in": ["a", "{}", "[1]", 0.5, False, "' OR '1'='1"]},
    {"key": "a", "in": [f"x{n}" for n in range(1500)] + ["a"]},
    {"key": "a", "in": [f"[{n}" for n in range(1500)] + ["[1]"]},
    {"key": "a", "in": list(range(1, 1500))},
    {"key": "a", "in": [True, False] * 600},
    {"key": "a", "exists": True},
    {"key": "a", "exists": False},
    {"key": "a.b", "exists": True},
    {"key": "a.b", "exists": False},
    {"key": "a.b.c", "exists": True},
    {"key": "a.b", "eq": 1},
    {"key": "a.b", "in": ["a", "日本", 0.1]},
    {"key": "a.b.c", "eq": 1},
    {"key": "日本", "exists": True},
    {"key": "with space", "exists": True},
    {"key": "it-s", "exists": True},
    {"key": "$", "exists": True},
    {"key": "text", "exists": True},
    {"key": "nothing", "exists": False},
    {"key": "nothing", "eq": ""},
    {"key": "a", "gt": 0},
    {"key": "a", "gte": 0},
    {"key": "a", "lt": 0},
    {"key": "a", "lte": 0.1},
    {"key": "a", "gt": 2**53},
    {"key": "a", "gte": 2**53 + 1},
    {"key": "a", "lt": 2**63},
    {"key": "a", "lte": 2**63 - 1},
    {"key": "a", "gte": 2**63},
    {"key": "a", "gte": 0.1, "lt": 1.5},
    {"key": "a", "gt": 1, "gte": 1, "lt": 10, "lte": 10},
    {"key": "a", "gte": 5, "lt": 1},
    {"key": "a", "gt": "", "lte": "a"},
    {"key": "a", "gte": "2024-01-01", "lt": "2024-02-01"},
    {"key": "a", "gt": "é"},
    {"key": "a", "lt": "a"},
    {"key": "a", "gte": "\uffff"},
    {"key": "a", "gte": "'"},
    {"key": "a", "gte": 0, "lt": "z"},
    {"key": "a", "ne": "a"},
    {"key": "a", "ne": 1},
    {"key": "a", "contains": "a"},
    {"key": "a", "contains": "日"},
    {"key": "a", "prefix": "a"},
    {"key": "a", "prefix": "["},
    {"key": "a", "prefix": "{"},
    {"key": "a", "prefix": "2024-01"},
    {"key": "a\\.b", "exists": True},
    {"key": "a\\.b", "eq": 1},
    {"not": {"key": "a", "contains": "a"}},
    {"field": "id", "eq": "i7"},
    {"field": "id", "in": ["i7", "i9", "nobody"]},
    {"field": "id", "prefix": "i1"},
    {"field": "id", "contains": "7"},
    {"field": "id", "gte": "i10", "lt": "i12"},
    {"not": {"field": "id", "prefix": "i1"}},
    {"not": {"field": "id", "contains": "7"}},
    {"and": [{"field": "id", "ne": "i7"}, {"key": "a", "exists": True}]},
    {"not": {"key": "a", "eq": 1}},
    {"not": {"key": "a", "eq": True}},
    {"not": {"key": "a", "in": ["a", 2]}},
    {"not": {"key": "a", "gte": 0}},
    {"not": {"key": "a", "lt": "b"}},
    {"not": {"key": "nothing", "eq": 1}},
    {"not": {"not": {"key": "a", "eq": "é"}}},
    {"not": {"and": [{"key": "a", "exists": True}, {"key": "n", "lt": 20}]}},
    {"not": {"or": [{"key": "a", "eq": "a"}, {"key": "nothing", "eq": 1}]}},
    {"and": [{"key": "n", "gte": 10}, {"key": "n", "lt": 20}]},
    {"or": [{"key": "n", "eq": 10}, {"key": "a", "eq": True}, {"key": "日本", "exists": True}]},
    {"and": [{"or": [{"key": "a", "gt": 0}, {"key": "a", "gt": ""}]}, {"not": {"key": "a", "eq": 1}}]},
    {"or": [{"and": [{"key": "a", "eq": n}]} for n in range(100)]},
]


@pytest.mark.parametrize("is_indexed", [False, True])
async def test_every_kind_of_filter(store: VectorStore, is_slow: bool, is_indexed: bool) -> None:
    written = corpus(is_slow)
    await store.create("c", replace(SPEC, indexed=("a", "a.b", "日本", "$") if is_indexed else ()))
    await store.upsert("c", written, tag=TAG)
    for number, body in enumerate(FILTERS[:: 3 if is_slow and is_indexed else 1]):
        where = parse_filter(body)
        expected = sorted(item.id for item in written if matches(where, item.metadata, item.id))
        [hits] = await store.search("c", vectors(1), 1000, tag=TAG, where=where)
        assert sorted(hit.id for hit in hits) == expected, body
        if not is_slow or number % 4 == 0:
            assert await store.count("c", where) == len(expected), body
        if not is_slow or number % 4 == 1:
            assert sorted(await all_ids(store, where=where)) == expected, body


async def test_a_filter_leaves_the_nearest_of_what_passes(store: VectorStore, is_slow: bool) -> None:
    count = 60 if is_slow else 400
    plain = DictStore()
    for one in (store, plain):
        await one.upsert("c", items(count), tag=TAG)
    queries = vectors(5, seed=2)
    for body in ({"key": "even", "eq": True}, {"key": "n", "lt": 4}, {"key": "n", "gte": 4}, {"key": "n", "eq": -1}):
        where = parse_filter(body)
        reference = await plain.search("c", queries, count, tag=TAG, where=where)
        for k in (3, count):
            answers = await store.search("c", queries, k, tag=TAG, where=where)
            for hits, all_hits in zip(answers, reference, strict=True):
                check_hits(hits, all_hits, k)


# ---- values with counts, and lists in order


@pytest.mark.parametrize("key", ["a", "b", "a.b", "a.b.c", "日本", "n", "nothing"])
async def test_facets_count_each_value_once_per_item(store: VectorStore, is_slow: bool, key: str) -> None:
    if is_slow and key not in ("a", "a.b"):
        pytest.skip("these two keys have every kind of value")
    written = corpus(is_slow)
    await store.upsert("c", written, tag=TAG)
    plain = DictStore()
    await plain.upsert("c", written, tag=TAG)
    path = parse_path(key)
    for body in (None, {"key": "n", "lt": 30}, {"field": "id", "contains": "1"}, {"key": "a", "eq": "a"}):
        where = None if body is None else parse_filter(body)
        for limit in (1, 5, 1000):
            ours, theirs = [await one.facets("c", path, where=where, limit=limit) for one in (store, plain)]
            assert [(kind_of(facet.value), facet.value, facet.count) for facet in ours.values] == [
                (kind_of(facet.value), facet.value, facet.count) for facet in theirs.values
            ]
            assert ours.distinct == theirs.distinct


def kind_of(value: Any) -> str:
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


async def test_facets_by_hand(store: VectorStore) -> None:
    tags: list[Any] = ["red", ["red", "red", "blue"], ["blue", 1, 1.0, True], [["red"]], {"red": 1}, None, 1, True, []]
    new = [Item(f"i{n}", v, {"tags": tag}) for n, (v, tag) in enumerate(zip(vectors(9), tags, strict=True))]
    await store.upsert("c", new, tag=TAG)
    facets = await store.facets("c", ("tags",))
    assert [(facet.value, facet.count) for facet in facets.values] == [(1, 2), ("blue", 2), ("red", 2), (True, 2)]
    assert [type(facet.value) for facet in facets.values][1:] == [str, str, bool]
    assert (await store.facets("c", ("tags",), limit=1)).distinct == 4
    assert await store.facets("c", ("nothing",)) == Facets([], 0)


@pytest.mark.parametrize("is_indexed", [False, True])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("store_name", ["dict", "embedded"], indirect=True)
async def test_pages_in_the_order_of_a_key(store: VectorStore, is_indexed: bool, descending: bool) -> None:
    written = corpus(is_small=False)
    plain = DictStore()
    for one in (store, plain):
        await one.create("c", replace(SPEC, indexed=("a", "a.b") if is_indexed else ()))
        await one.upsert("c", written, tag=TAG)
    for key in ("a", "a.b", "n", "nothing"):
        order = Order(parse_path(key), descending)
        for where in (None, parse_filter({"key": "n", "gte": 10})):
            reference = (await plain.scroll("c", where=where, order=order, limit=1000)).items
            for limit in (7, 100, 1000):
                assert await ids_in_order(store, order, where, limit) == [item.id for item in reference], (key, limit)


async def ids_in_order(store: VectorStore, order: Order, where: Filter | None, limit: int) -> list[str]:
    ids: list[str] = []
    cursor = None
    while True:
        page = await store.scroll("c", where=where, order=order, limit=limit, cursor=cursor)
        ids += [item.id for item in page.items]
        cursor = page.cursor
        if cursor is None:
            return ids


async def test_order_by_hand(store: VectorStore) -> None:
    values: dict[str, Any] = {"d": 2, "a": "x", "e": 2.0, "b": 10, "none": None, "c": True, "list": [1], "y": "Y"}
    await store.upsert("c", [Item(name, np.ones(D), {"v": value}) for name, value in values.items()], tag=TAG)
    await store.upsert("c", [Item("without", np.ones(D))], tag=TAG)
    if "order" not in store.capabilities:
        with pytest.raises(InvalidRequest, match="order_by is not supported"):
            await store.scroll("c", order=Order(("v",)))
        return
    assert await ids_in_order(store, Order(("v",)), None, 2) == [
        "c",
        "d",
        "e",
        "b",
        "y",
        "a",
        "list",
        "none",
        "without",
    ]
    down = await ids_in_order(store, Order(("v",), descending=True), None, 2)
    assert down == ["a", "y", "b", "d", "e", "c", "list", "none", "without"]


@pytest.mark.parametrize("store_name", ["embedded"], indirect=True)
async def test_pages_in_order_while_items_come_and_go(store: VectorStore) -> None:
    """An item that stays is on one page, even if the item at the end of a page is deleted or changes its place."""
    await store.upsert("c", [Item(f"i{n:03}", np.ones(D), {"v": n // 3}) for n in range(60)], tag=TAG)
    order = Order(("v",), descending=True)
    seen: list[str] = []
    cursor = None
    for number in range(100):
        page = await store.scroll("c", order=order, limit=7, cursor=cursor)
        seen += [item.id for item in page.items]
        cursor = page.cursor
        if cursor is None:
            break
        await store.delete("c", [page.items[-1].id])
        await store.patch("c", page.items[0].id, {"v": 1000})
        await store.upsert("c", [Item(f"new{number}", np.ones(D), {"v": 500})], tag=TAG)
    assert seen == [f"i{n:03}" for n in sorted(range(60), key=lambda n: (-(n // 3), n))]


@pytest.mark.parametrize("store_name", ["embedded"], indirect=True)
async def test_a_cursor_of_another_order_is_refused(store: VectorStore) -> None:
    await store.upsert("c", items(5), tag=TAG)
    order = Order(("n",))
    ordered = (await store.scroll("c", order=order, limit=2)).cursor
    plain_cursor = (await store.scroll("c", limit=2)).cursor
    assert ordered is not None
    made_up = [
        "o" + base64.urlsafe_b64encode(json.dumps(content, separators=(",", ":")).encode()).decode()
        for content in (["n"], [["n"], False, [1], "i1"], [["n"], False, 1, 7], [["n"], False, 2**64, "i1"], {})
    ]
    for bad in (plain_cursor, "", "o", "o!", ordered[:-2], ordered + "A", *made_up):
        with pytest.raises(InvalidRequest, match="cursor"):
            await store.scroll("c", order=order, cursor=bad)
    for other in (Order(("even",)), Order(("n",), descending=True), None):
        with pytest.raises(InvalidRequest, match="cursor"):
            await store.scroll("c", order=other, cursor=ordered)


async def test_indexed_keys_can_be_changed(store: VectorStore) -> None:
    spec = replace(SPEC, indexed=("n", "even"))
    await store.create("c", spec)
    await store.upsert("c", items(5), tag=TAG)
    if "indexed" not in store.capabilities:
        with pytest.raises(InvalidRequest, match="indexed cannot be changed"):
            await store.set_indexed("c", ["n"])
        return
    await store.set_alias("live", "c")
    for indexed in (("n", "x\\.y", "brand"), (), ("brand",)):
        info = await store.set_indexed("live", indexed)
        assert info == CollectionInfo("c", replace(spec, indexed=indexed), 5)
        assert await store.info("c") == info
        assert await store.count("c", parse_filter({"key": "n", "gte": 3})) == 2
    for wrong in (["a..b"], [f"k{n}" for n in range(17)]):
        with pytest.raises(InvalidRequest, match="indexed"):
            await store.set_indexed("c", wrong)
    with pytest.raises(CollectionNotFound):
        await store.set_indexed("nothing", [])
    assert (await store.info("c")).spec.indexed == ("brand",)


async def test_patch_changes_the_source(store: VectorStore) -> None:
    await store.upsert("c", [Item("a", np.ones(D), {"n": 1}, "s3://old", "0" * 64)], tag=TAG)
    kept = await store.patch("c", "a", {"n": 2})
    changed = await store.patch("c", "a", {}, source="s3://new", keep_source=False)
    [hits] = await store.search("c", np.ones((1, D)), 1, tag=TAG)
    removed = await store.patch("c", "a", {"n": 3}, keep_source=False)
    for bad in ("", "a\nb", "x" * (MAX_SOURCE_CHARACTERS + 1)):
        with pytest.raises(InvalidRequest, match="source"):
            await store.patch("c", "a", {"n": 4}, source=bad, keep_source=False)
    [found] = await store.get("c", ["a"])
    assert found is not None
    assert [item.source for item in (kept, changed, hits[0], removed, found)] == [
        "s3://old",
        *["s3://new"] * 2,
        None,
        None,
    ]
    assert [item.metadata for item in (kept, changed, removed)] == [{"n": 2}, {"n": 2}, {"n": 3}]
    assert (found.digest, found.metadata) == ("0" * 64, {"n": 3})


# ---- what was written is seen


async def test_a_write_is_seen_at_once(store: VectorStore, is_slow: bool) -> None:
    where = parse_filter({"key": "even", "eq": True})
    for n in range(2 if is_slow else 20):
        [new] = items(1, seed=n, prefix=f"{n}-")
        await store.upsert("c", [new], tag=TAG)
        assert await store.count("c") == n + 1
        assert await store.count("c", where) == n + 1
        assert (await store.get("c", [new.id]))[0] is not None
        assert new.id in await all_ids(store)
        for condition in (None, where):
            [hits] = await store.search("c", [new.vector], 1, tag=TAG, where=condition)
            assert hits[0].id == new.id
        await store.upsert("c", [replace(new, vector=-new.vector)], tag=TAG)
        [hits] = await store.search("c", [-new.vector], 1, tag=TAG)
        assert hits[0].id == new.id
        await store.delete("c", [new.id])
        assert await store.get("c", [new.id]) == [None]
        [hits] = await store.search("c", [-new.vector], 1000, tag=TAG, where=where)
        assert new.id not in {hit.id for hit in hits}
        await store.upsert("c", [new], tag=TAG)


async def test_writers_and_readers_at_once(store: VectorStore, is_slow: bool) -> None:
    rounds, size = (2, 3) if is_slow else (15, 5)
    await store.upsert("c", items(10, prefix="base"), tag=TAG)
    running = 4

    async def write(writer: int) -> None:
        nonlocal running
        for step in range(rounds):
            batch = f"{writer}-{step}"
            mine = [
                replace(i, metadata={"batch": batch}) for i in items(size, seed=10 * writer + step, prefix=batch + "/")
            ]
            await store.upsert("c", mine, tag=TAG)
            [hits] = await store.search("c", [mine[0].vector], 1, tag=TAG)
            assert hits[0].score > 0.999
            assert None not in await store.get("c", [item.id for item in mine])
            assert await store.delete("c", [mine[0].id]) == 1
            where = parse_filter({"key": "batch", "eq": batch})
            assert await store.count("c", where) == size - 1
            await store.patch("c", mine[1].id, {"batch": None})
            assert await store.delete_where("c", where) == size - 2
        running -= 1

    async def read(reader: int) -> None:
        while running:
            [hits] = await store.search("c", vectors(1, seed=reader), 5, tag=TAG)
            assert len({hit.id for hit in hits}) == 5
            seen = await all_ids(store, limit=20)
            assert len(seen) == len(set(seen))
            assert {f"base{n}" for n in range(10)} <= set(seen)
            assert await store.count("c") >= 10
            if "atomic_upsert" in store.capabilities:
                batches = [hit.metadata.get("batch") for hit in (await store.search("c", vectors(1), 1000, tag=TAG))[0]]
                counts = {batches.count(batch) for batch in batches if batch}
                assert counts <= {size, size - 1, size - 2}, "a part of a write was seen"
            await asyncio.sleep(0)

    await asyncio.gather(*(write(n) for n in range(4)), *(read(n) for n in range(1 if is_slow else 3)))
    assert await store.count("c") == 10 + 4 * rounds
    assert len(await all_ids(store)) == 10 + 4 * rounds


async def test_overlapping_changes_of_one_item_all_count(store: VectorStore) -> None:
    await store.upsert("c", items(8), tag=TAG)
    await asyncio.gather(*(store.patch("c", "i0", {f"key{n}": n}) for n in range(6)))
    [found] = await store.get("c", ["i0"])
    assert found is not None
    assert found.metadata == {"n": 0, "even": True, **{f"key{n}": n for n in range(6)}}
    assert sum(await asyncio.gather(*(store.delete("c", ["i1", "i2"]) for _ in range(4)))) == 2
    where = parse_filter({"key": "even", "eq": False})
    assert sum(await asyncio.gather(*(store.delete_where("c", where) for _ in range(3)))) == 3
    assert sorted(await all_ids(store)) == ["i0", "i4", "i6"]


async def test_overlapping_first_writes_agree_on_one_model(store: VectorStore) -> None:
    tags = [TAG, OTHER_TAG, TAG, OTHER_TAG]
    calls = [store.upsert("c", [Item(f"i{n}", np.ones(D if tag == TAG else 3))], tag=tag) for n, tag in enumerate(tags)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    info = await store.info("c")
    for tag, result in zip(tags, results, strict=True):
        assert isinstance(result, CollectionInfo if tag == info.tag else ModelMismatch)
    assert info.count == 2
    made = await asyncio.gather(*(store.create("new", SPEC) for _ in range(4)))
    assert made == [CollectionInfo("new", SPEC, 0)] * 4


async def test_an_alias_moves_from_one_moment_to_the_next(store: VectorStore, is_slow: bool) -> None:
    for name in ("a", "b"):
        await store.upsert(name, [Item(f"of {name}", np.ones(D))], tag=TAG)
    await store.set_alias("live", "a")
    moving = True

    async def move() -> None:
        nonlocal moving
        for n in range(4 if is_slow else 40):
            assert await store.set_alias("live", "ab"[(n + 1) % 2]) == "ab"[n % 2]
            assert (await all_ids(store, "live")) == [f"of {'ab'[(n + 1) % 2]}"]
        moving = False

    async def read() -> None:
        while moving:
            [hits] = await store.search("live", np.ones((1, D)), 2, tag=TAG)
            assert [hit.id for hit in hits] in (["of a"], ["of b"])
            assert (await store.info("live")).name in ("a", "b")
            await asyncio.sleep(0)

    await asyncio.gather(move(), read(), read())


async def test_a_closed_store_says_so(store: VectorStore) -> None:
    await store.upsert("c", items(2), tag=TAG)
    await store.drop("c")
    await store.close()
    await store.close()
    where = parse_filter({"key": "n", "eq": 1})
    for call in (
        store.create("c", SPEC),
        store.collections(),
        store.info("c"),
        store.drop("c"),
        store.aliases(),
        store.set_alias("live", "c"),
        store.drop_alias("live"),
        store.upsert("c", items(1), tag=TAG),
        store.get("c", ["i0"]),
        store.patch("c", "i0", {}),
        store.delete("c", ["i0"]),
        store.delete_where("c", where),
        store.count("c"),
        store.count("c", where),
        store.scroll("c"),
        store.search("c", vectors(1), 1, tag=TAG),
        store.search("c", vectors(1), 1, tag=TAG, where=where),
    ):
        with pytest.raises(StorageFailed):
            await call


# ---- any filter


def scalars() -> st.SearchStrategy[Any]:
    return st.one_of(
        st.sampled_from([value for value in VALUES if isinstance(value, bool | int | float | str)]),
        st.integers(-(2**64), 2**65),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4),
    )


def bounds() -> st.SearchStrategy[Any]:
    return scalars().filter(lambda value: not isinstance(value, bool))


def filters() -> st.SearchStrategy[dict[str, Any]]:
    return filter_bodies(st.sampled_from([*KEYS, "n", "nothing"]), scalars(), bounds())


def metadatas() -> st.SearchStrategy[dict[str, Any]]:
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4)
    leaf = st.one_of(
        st.sampled_from(STORED),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        text,
    )
    value = st.recursive(
        leaf,
        lambda inside: st.lists(inside, max_size=2) | st.dictionaries(st.sampled_from("abc"), inside, max_size=2),
        max_leaves=4,
    )
    return st.dictionaries(st.sampled_from([key for key in KEYS if "." not in key]), value, max_size=4)


VARIED: Final = 4
"""Items whose metadata is another in each example; all others are written once."""


async def check_filter(
    store: VectorStore, body: dict[str, Any], changed: Sequence[Mapping[str, Any]], is_slow: bool
) -> None:
    written = corpus(is_slow)
    if not await store.collections():
        await store.create("c", replace(SPEC, indexed=("a", "b")))
        await store.upsert("c", written, tag=TAG)
    varied = [Item(f"varied{n}", np.ones(D), metadata) for n, metadata in enumerate(changed)]
    await store.upsert("c", varied, tag=TAG)
    where = parse_filter(body)
    expected = sorted(item.id for item in [*written, *varied] if matches(where, item.metadata, item.id))
    assert sorted(await all_ids(store, where=where)) == expected
    assert await store.count("c", where) == len(expected)
    [hits] = await store.search("c", np.ones((1, D)), 1000, tag=TAG, where=where)
    assert sorted(hit.id for hit in hits) == expected


_QUIET: Final = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
_changed: Final = st.lists(metadatas(), min_size=VARIED, max_size=VARIED)


@pytest.mark.parametrize("store_name", ["dict", "embedded"], indirect=True)
@settings(max_examples=40, deadline=None, suppress_health_check=_QUIET)
@given(body=filters(), changed=_changed)
async def test_any_filter_is_what_matches_says(
    store: VectorStore, body: dict[str, Any], changed: list[dict[str, Any]]
) -> None:
    await check_filter(store, body, changed, is_slow=False)


@pytest.mark.parametrize("store_name", ["milvus"], indirect=True)
@settings(max_examples=8, deadline=None, suppress_health_check=_QUIET)
@given(body=filters(), changed=_changed)
async def test_any_filter_is_what_matches_says_slowly(
    store: VectorStore, body: dict[str, Any], changed: list[dict[str, Any]]
) -> None:
    await check_filter(store, body, changed, is_slow=True)


# ---- any sequence of calls


def steps(count: int) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    item_id = st.sampled_from(IDS[:14])
    number = st.integers(0, 30)
    rows = st.lists(st.tuples(item_id, number, metadatas()), min_size=1, max_size=6)
    search = st.tuples(
        st.just("search"),
        st.lists(number, min_size=1, max_size=3),
        st.integers(1, 20),
        st.none() | filters(),
    )
    return st.lists(
        st.one_of(
            st.tuples(st.just("upsert"), rows),
            st.tuples(st.just("upsert"), rows),
            st.tuples(st.just("delete"), st.lists(item_id, min_size=1, max_size=4)),
            st.tuples(st.just("delete_where"), filters()),
            st.tuples(st.just("patch"), item_id, metadatas()),
            search,
        ),
        min_size=1,
        max_size=count,
    )


async def outcome(call: Any) -> Any:
    """Return the result of a call, or the error that it raises, for a comparison."""
    try:
        result = await call
    except ServiceError as error:
        return type(error)
    return (result.id, exact(result.metadata)) if isinstance(result, Item) else result


async def check_steps(store: VectorStore, todo: list[tuple[Any, ...]]) -> None:
    plain = DictStore()
    stores: list[VectorStore] = [store, plain]
    for one in stores:
        await one.create("c", SPEC)
    for step, *what in todo:
        if step == "search":
            queries, where = np.stack([vectors(1, seed)[0] for seed in what[0]]), what[2] and parse_filter(what[2])
            answers = await store.search("c", queries, what[1], tag=TAG, where=where)
            reference = await plain.search("c", queries, MAX_DEPTH, tag=TAG, where=where)
            for hits, all_hits in zip(answers, reference, strict=True):
                check_hits(hits, all_hits, what[1])
            continue
        if step == "upsert":
            new = [Item(item_id, vectors(1, seed)[0], metadata) for item_id, seed, metadata in what[0]]
            ours, theirs = [await outcome(one.upsert("c", new, tag=TAG)) for one in stores]
        elif step == "delete_where":
            ours, theirs = [await outcome(one.delete_where("c", parse_filter(what[0]))) for one in stores]
        elif step == "delete":
            ours, theirs = [await outcome(one.delete("c", what[0])) for one in stores]
        else:
            ours, theirs = [await outcome(one.patch("c", *what)) for one in stores]
        assert ours == theirs, step
    ours, theirs = [sorted(await all_items(one), key=lambda item: item.id) for one in stores]
    assert [(i.id, exact(i.metadata)) for i in ours] == [(i.id, exact(i.metadata)) for i in theirs]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.vector, b.vector, atol=1e-6)
    await store.drop("c")


@pytest.mark.parametrize("store_name", ["dict", "embedded"], indirect=True)
@settings(max_examples=40, deadline=None, suppress_health_check=_QUIET)
@given(todo=steps(15))
async def test_any_sequence_equals_a_dictionary(store: VectorStore, todo: list[tuple[Any, ...]]) -> None:
    for info in await store.collections():  # of an example that failed
        await store.drop(info.name)
    await check_steps(store, todo)


@pytest.mark.parametrize("store_name", ["milvus"], indirect=True)
@settings(max_examples=5, deadline=None, suppress_health_check=_QUIET)
@given(todo=steps(6))
async def test_any_sequence_equals_a_dictionary_slowly(store: VectorStore, todo: list[tuple[Any, ...]]) -> None:
    for info in await store.collections():
        await store.drop(info.name)
    await check_steps(store, todo)


async def test_the_version_changes_with_every_change_of_an_item(store: VectorStore) -> None:
    info = await store.upsert("c", items(3), tag=TAG)
    if info.version is None:
        return  # this store does not know when items change

    async def version() -> str | None:
        return (await store.info("c")).version

    seen = [info.version]
    assert await version() == seen[0]
    await store.search("c", vectors(1), 2, tag=TAG)
    assert await version() == seen[0]
    changes = [
        lambda: store.upsert("c", items(1, seed=7), tag=TAG),  # replaces an item; the number of items stays
        lambda: store.patch("c", "i1", {"class": "a"}),
        lambda: store.delete("c", ["i2"]),
        lambda: store.delete_where("c", parse_filter({"key": "n", "eq": 1})),
    ]
    for change in changes:
        await change()
        seen.append(await version())
    await store.drop("c")
    await store.upsert("c", items(3), tag=TAG)
    seen.append(await version())
    assert len(set(seen)) == len(seen)
