"""Tests of what is particular to the Milvus store: names, quoting, filters that the server cannot express, and a
missing server.

The conformance suite tests what every store must do. Here Milvus Lite runs in a separate process.
"""

import os
import random
import signal
import sys
import time

import numpy as np
import pytest
from pymilvus import DataType, MilvusClient

from service.errors import CollectionNotFound, InvalidRequest, ServiceError, StorageFailed, Unavailable
from service.search.checks import metadata_text
from service.search.embedded import EmbeddedStore
from service.search.filter_milvus import quoted, translate
from service.search.filters import matches, parse_filter
from service.search.milvus import MilvusStore, open_milvus
from service.search.milvus_client import decoded, encoded
from service.search.opening import open_store
from service.search.store import CollectionSpec, Item
from service.settings import Settings
from tests.service.search.milvus_server import running_server

HOSTILE = [
    'a" or id != "',
    "a' or 1 == 1 or '",
    "\\",
    '\\"',
    "line\nbreak\t\r",
    "{value}",
    "é𝒳",
    "$meta",
    "%",
    "",
]
SCALARS = [*HOSTILE, "a", "1", "true", 0, 1, 0.0, 1.0, True, False, 5, -3.5, 2**53 - 1, 2**53, 2**53 + 1, 2**64 - 1]
VALUES = [*SCALARS[:-1], 1e300, 1.7976931348623157e308, None, [], [1], {}, {"x": 1}]
KEYS = ["a", "b", "n.x", "é k", "0", "a[0]", "x/y", "x~y", "in", "true", "a][b"]


@pytest.fixture
def url(milvus_url):
    return milvus_url


@pytest.fixture
async def store(url):
    opened = await open_milvus(url)
    yield opened
    for alias in await opened.aliases():
        await opened.drop_alias(alias)
    for info in await opened.collections():
        await opened.drop(info.name)
    await opened.close()


@pytest.fixture
def client(url):
    other = MilvusClient(url.replace("milvus://", "http://"), dedicated=True, timeout=10)
    yield other
    other.close()


def item(item_id, metadata=None, vector=(1.0, 0.0)):
    return Item(item_id, np.array(vector, np.float32), metadata or {})


# ---- names


@pytest.mark.parametrize("name", ["a", "7", "a-b", "a_b", "a--b__c-_", "a_2db", "x" * 64, "0" + "-_" * 31])
def test_a_name_comes_back_from_one_that_milvus_allows(name):
    assert decoded(encoded(name)) == name
    assert encoded(name).replace("_", "").isalnum()
    assert len(encoded(name)) <= 255


def test_different_names_stay_different():
    names = ["a-b", "a_b", "a_2db", "a__b", "a-_b", "a_-b"]
    assert len(set(map(encoded, names))) == len(names)


@pytest.mark.parametrize("name", ["photos", "dinov2_", "dinov2_a_b", "dinov2__a", "dinov2_A", "Dinov2_a", "dinov2_a_"])
def test_a_name_of_others_is_not_ours(name):
    assert decoded(name) is None


async def test_collections_of_others_are_not_touched(store, client):
    for name in ("photos", "dinov2_alien"):
        client.create_collection(name, dimension=2)
    client.create_alias("photos", "dinov2_pictures")
    try:
        assert await store.collections() == []
        assert await store.aliases() == {}
        for name in ("photos", "alien", "pictures"):
            with pytest.raises(CollectionNotFound):
                await store.info(name)
            with pytest.raises(CollectionNotFound):
                await store.drop(name)
        with pytest.raises(StorageFailed):
            await store.upsert("alien", [item("a")], tag="t")
        assert {"photos", "dinov2_alien"} <= set(client.list_collections())
    finally:
        client.drop_alias("dinov2_pictures")
        for name in ("photos", "dinov2_alien"):
            client.drop_collection(name)


async def test_what_a_collection_is_survives_another_client(store, url):
    spec = CollectionSpec("tag é \"'", 2, "float16", indexed=("a", "b.c"), originals=True)
    await store.create("kept", spec)
    again = await open_milvus(url)
    assert (await again.info("kept")).spec == spec
    await again.close()


# ---- filters


def test_a_literal_cannot_be_left():
    assert quoted('a" or "1" == "1') == '"a\\" or \\"1\\" == \\"1"'
    assert quoted("\\") == '"\\\\"'
    assert "\n" not in quoted("a\nb")


@pytest.mark.parametrize("value", HOSTILE)
async def test_hostile_text_is_text(store, value):
    ids = [text for text in ("x", 'a" or id != "', "a' or 1 == 1", "\\", "é𝒳", "{a}") if text]
    await store.upsert("c", [item(text, {"k": value if n % 2 else f"{value}!"}) for n, text in enumerate(ids)], tag="t")
    same = parse_filter({"key": "k", "eq": value})
    assert [found.id for found in (await store.scroll("c", where=same)).items] == sorted(ids[1::2])
    assert [found and found.id for found in await store.get("c", ids)] == ids
    assert await store.delete_where("c", same) == 3
    assert await store.delete("c", ids[:1]) == 1
    assert await store.count("c") == 2


def random_metadata(rng):
    metadata = {key: rng.choice(VALUES) for key in KEYS if "." not in key and rng.random() < 0.6}
    return {**metadata, "n": rng.choice([{"x": rng.choice(VALUES)}, {}, None, 5, [{"x": 1}]])}


def random_filter(rng, depth=0):
    if depth > 3 or rng.random() < 0.4:
        key, kind = rng.choice(KEYS), rng.random()
        if kind < 0.4:
            return {"key": key, "in": [rng.choice(SCALARS) for _ in range(rng.randint(1, 5))]}
        if kind < 0.5:
            return {"key": key, "exists": rng.random() < 0.5}
        bounds = [value for value in SCALARS if not isinstance(value, bool)]
        return {
            "key": key,
            **{op: rng.choice(bounds) for op in rng.sample(["gt", "gte", "lt", "lte"], rng.randint(1, 2))},
        }
    if rng.random() < 0.4:
        return {"not": random_filter(rng, depth + 1)}
    return {rng.choice(["and", "or"]): [random_filter(rng, depth + 1) for _ in range(rng.randint(1, 3))]}


async def test_any_filter_passes_what_its_definition_passes(store):
    rng = random.Random(0)
    items = [item(f"{n:03}", random_metadata(rng), (1.0, n / 100)) for n in range(120)]
    await store.upsert("c", items, tag="t")
    for _ in range(40):
        body = random_filter(rng)
        where = parse_filter(body)
        expected = [one.id for one in items if matches(where, one.metadata, one.id)]
        assert await store.count("c", where) == len(expected), body
        page = await store.scroll("c", where=where, limit=200)
        assert [found.id for found in page.items] == expected, body
        (hits,) = await store.search("c", [[1.0, 0.0]], 5, tag="t", where=where)
        assert [hit.id for hit in hits] == expected[:5], body


def test_expressions_are_exact_where_both_servers_agree():
    for body in (
        {"field": "id", "eq": "a"},
        {"not": {"field": "id", "in": ["a", "b"]}},
        {"not": {"key": "brand", "exists": True}},
        {"and": [{"key": "shelf.row", "exists": True}, {"field": "id", "prefix": "7"}]},
    ):
        assert translate(parse_filter(body)).is_exact, body
    assert translate(parse_filter({"key": "a", "eq": "x"})).text == '(metadata["a"] == "x") or (metadata["a"] == 0)'
    assert translate(parse_filter({"not": {"key": "a", "eq": "x"}})) == (True, False)


def test_a_long_list_is_not_a_deep_expression():
    expression = translate(parse_filter({"key": "a", "in": [f"v{n}" for n in range(10_000)]})).text
    depth = deepest = 0
    for char in str(expression):
        depth += (char == "(") - (char == ")")
        deepest = max(deepest, depth)
    assert deepest <= 14


async def test_the_largest_metadata_comes_back(store):
    largest = {"k": "x" * (64 * 2**10 - 8)}
    assert len(metadata_text(largest)) == 64 * 2**10
    await store.upsert("c", [item("a", largest)], tag="t")
    (found,) = await store.get("c", ["a"])
    assert found.metadata == largest


@pytest.mark.parametrize("cursor", ["", "x", "i", "iYQ==", "iYR", "i\u00e9", "after:a", "i" + "A" * 4])
async def test_a_cursor_of_others_is_refused(store, cursor):
    await store.upsert("c", [item("a")], tag="t")
    with pytest.raises(InvalidRequest, match="cursor"):
        await store.scroll("c", cursor=cursor)


async def test_a_collection_that_was_released_is_loaded_again(store, client):
    await store.upsert("c", [item("a")], tag="t")
    client.release_collection(encoded("c"))
    assert await store.count("c", parse_filter({"key": "k", "exists": False})) == 1
    assert len((await store.search("c", [[1.0, 0.0]], 1, tag="t"))[0]) == 1


# ---- a server that is not there


async def test_a_server_that_is_not_there_is_unavailable_and_no_password_is_told():
    started = time.monotonic()
    with pytest.raises(Unavailable) as error:
        await open_milvus("milvus://user:s3cret@127.0.0.1:1", timeout_s=2)
    assert time.monotonic() - started < 10
    assert "127.0.0.1:1" in error.value.detail
    assert "s3cret" not in error.value.detail


async def test_a_server_that_is_killed_and_started_again():
    with running_server() as server:
        store = await open_milvus(server.url, timeout_s=10)
        await store.upsert("c", [item("a", {"n": 5})], tag="t")
        await store.set_alias("now", "c")
        server.kill()
        for call in (
            lambda: store.info("c"),
            lambda: store.collections(),
            lambda: store.upsert("c", [item("b")], tag="t"),
            lambda: store.search("c", [[1.0, 0.0]], 1, tag="t"),
            lambda: store.patch("c", "a", {"n": 6}),
        ):
            with pytest.raises(Unavailable) as error:
                await call()
            assert error.value.headers["Retry-After"] == "1"
        server.start()
        (hits,) = await store.search("now", [[1.0, 0.0]], 5, tag="t")
        assert [(hit.id, hit.metadata) for hit in hits] == [("a", {"n": 5})]
        assert (await store.upsert("c", [item("b")], tag="t")).count == 2
        await store.close()
        await store.close()


async def test_a_server_that_hangs_is_not_waited_for():
    with running_server() as server:
        store = await open_milvus(server.url, timeout_s=1)
        await store.create("c", CollectionSpec("t", 2))
        server.stop()
        try:
            started = time.monotonic()
            with pytest.raises(Unavailable):
                await store.count("c")
            assert time.monotonic() - started < 8
        finally:
            os.kill(server.process_id, signal.SIGCONT)
        assert await store.count("c") == 0
        await store.close()


# ---- the setting


async def test_the_setting_chooses_the_store(tmp_path, url):
    embedded = await open_store(Settings(data_dir=tmp_path), threads=1)
    assert isinstance(embedded, EmbeddedStore)
    await embedded.close()
    milvus = await open_store(Settings(vector_store=url))
    assert isinstance(milvus, MilvusStore)
    assert not milvus.capabilities
    await milvus.close()


async def test_without_the_extra_the_message_says_what_to_install(monkeypatch):
    for name in ("service.search.milvus", "service.search.milvus_client"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install pymilvus"):
        await open_store(Settings(vector_store="milvus://127.0.0.1"))


async def test_a_vector_of_another_dimension_in_milvus_is_no_crash(store, client):
    """Someone else created a collection with our name and spec but other fields."""
    schema = MilvusClient.create_schema(auto_id=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=64)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)
    client.create_collection(encoded("odd"), schema=schema, properties={"dinov2.spec": "{}"})
    try:
        with pytest.raises(ServiceError):
            await store.info("odd")
    finally:
        client.drop_collection(encoded("odd"))


async def test_a_name_like_ours_with_a_description_of_its_own_is_not_ours():
    """Milvus stores descriptions, but Milvus Lite does not, so the test replaces the server's answers."""

    class Answers:
        async def call(self, method, **_):
            described = {"collection_name": "dinov2_alien", "properties": {}, "description": "photos of aliens"}
            return {"list_collections": ["dinov2_alien"], "describe_collection": described}[method]

    others = MilvusStore(Answers())
    assert await others.collections() == []
    with pytest.raises(CollectionNotFound):
        await others.info("alien")


async def test_many_queries_are_several_messages(store, monkeypatch):
    monkeypatch.setattr("service.search.milvus._MAX_HITS", 10)
    await store.upsert("c", [item(f"{n}", {}, (1.0, n / 10)) for n in range(9)], tag="t")
    answers = await store.search("c", [[1.0, n / 10] for n in range(9)], 3, tag="t")
    assert [hits[0].id for hits in answers] == [f"{n}" for n in range(9)]
