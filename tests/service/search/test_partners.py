"""Tests of service/search/partners.py: a collection is re-embedded with another model while it is searched and written
to. A state machine compares a collection and its partner with a dictionary."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import Conflict, InvalidRequest, ModelMismatch
from service.search.embedded import EmbeddedStore
from service.search.filters import parse_filter
from service.search.partners import Filled, Missing
from service.search.store import CollectionSpec, Item
from tests.service.search.embedded_store import build_one, opened

TAG = {"a": "a" * 64 + "/cls/l2/224x224/fp32", "b": "b" * 64 + "/cls/l2/224x224/fp32"}
SIZE = {"a": 8, "b": 6}


def vector(model: str, content: int) -> np.ndarray:
    """The vector that a model gives an image."""
    made = np.random.default_rng([content, ord(model)]).normal(size=SIZE[model]).astype(np.float32)
    return made / np.linalg.norm(made)


def item(model: str, item_id: str, content: int, **metadata: Any) -> Item:
    return Item(item_id, vector(model, content), {"content": content, **metadata}, digest=f"{content:064x}")


def filled(model: str, missing: Sequence[Missing]) -> list[Filled]:
    """What a copier computes for items: the vectors of the images that their digests name."""
    return [Filled(m.number, m.id, vector(model, int(m.digest or "", 16))) for m in missing]


async def migrate(store: EmbeddedStore, name: str = "c", to: str = "b") -> None:
    await store.migrations.start(name, TAG[to], SIZE[to])
    while missing := await store.migrations.missing(name, TAG[to]):
        await store.migrations.fill(name, TAG[to], filled(to, missing))
    await store.migrations.switch({name: TAG[to]})


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    made = await opened(tmp_path, interval_s=60.0)
    await made.create("c", CollectionSpec(TAG["a"], SIZE["a"]))
    await made.upsert("c", [item("a", f"i{n}", n) for n in range(6)], tag=TAG["a"])
    yield made
    await made.close()


# ---- any sequence of operations

_ids = st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True)
_contents = st.integers(0, 10**6)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), _ids, _contents, st.booleans()),
        st.tuples(st.just("delete"), _ids),
        st.tuples(st.just("delete_where"), st.integers(0, 9)),
        st.tuples(st.just("patch"), st.integers(0, 9)),
        st.tuples(st.sampled_from(["start", "look", "fill", "switch", "end", "reopen", "seal"])),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=_steps)
async def test_any_sequence_equals_a_dictionary(
    steps: list[tuple[Any, ...]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`look` reads what the partner lacks. A later `fill` writes these vectors, even if the items have changed, have
    been deleted or have been written again since."""
    store = await opened(tmp_path_factory.mktemp("store"), interval_s=60.0)
    await store.create("c", CollectionSpec(TAG["a"], SIZE["a"]))
    live, plain, looked = "a", dict[str, tuple[int, dict[str, Any]]](), list[Missing]()
    for step, *what in steps:
        other = "b" if live == "a" else "a"
        if step == "write":
            ids, content, both = what
            new = {f"i{n}": content + n for n in ids}
            twins = (TAG[other], [item(other, *pair, n=pair[1] % 4) for pair in new.items()]) if both else None
            items = [item(live, *pair, n=pair[1] % 4) for pair in new.items()]
            await store.upsert("c", items, tag=TAG[live], other=twins)
            plain |= {item_id: (c, {"content": c, "n": c % 4}) for item_id, c in new.items()}
        elif step == "delete":
            gone = [f"i{n}" for n in what[0]]
            assert await store.delete("c", gone) == sum(plain.pop(item_id, None) is not None for item_id in gone)
        elif step == "delete_where":
            await store.delete_where("c", parse_filter({"key": "n", "eq": what[0] % 4}))
            plain = {item_id: value for item_id, value in plain.items() if value[1]["n"] != what[0] % 4}
        elif step == "patch" and f"i{what[0]}" in plain:
            await store.patch("c", f"i{what[0]}", {"patched": True})
            plain[f"i{what[0]}"][1]["patched"] = True
        elif step == "start":
            pairs = await store.migrations.partnerships()
            await store.migrations.start("c", TAG[other], SIZE[other])
            assert len(await store.migrations.partnerships()) == 1 >= len(pairs)
        elif step == "look":
            looked = await store.migrations.missing("c", TAG[other])
        elif step == "fill" and await store.migrations.partnerships():
            await store.migrations.fill("c", TAG[other], filled(other, looked))
        elif step == "switch" and (pairs := await store.migrations.partnerships()):
            if lacks := await store.migrations.lacking("c"):
                with pytest.raises(Conflict, match=f"lack {lacks} of the {len(plain)} items"):
                    await store.migrations.switch({"c": TAG[other]})
            else:
                await store.migrations.switch({"c": TAG[other]})
                live, looked = other, []
        elif step == "end":
            await store.migrations.end("c")
        elif step == "reopen":
            await store.close()
            store = await opened(store.path.parent, interval_s=60.0)
        elif step == "seal":
            build_one(store, seal_rows=1)
        await check(store, live, plain)
    await store.close()


async def check(store: EmbeddedStore, live: str, plain: dict[str, tuple[int, dict[str, Any]]]) -> None:
    """Compare the collection and its partner with the dictionary. An item of the partner must be current, but the
    partner may lack items."""
    info = await store.info("c")
    assert (info.tag, info.count) == (TAG[live], len(plain))
    await check_version(store, info.ref, live, plain, plain.keys())
    pairs = await store.migrations.partnerships()
    if pairs:
        partner, other = pairs[0].partner, "b" if live == "a" else "a"
        assert partner.tag == TAG[other]
        lacked = {missing.id for missing in await store.migrations.missing("c", TAG[other])}
        assert (len(lacked), partner.count) == (await store.migrations.lacking("c"), len(plain) - len(lacked))
        await check_version(store, partner.ref, other, plain, plain.keys() - lacked)


async def check_version(
    store: EmbeddedStore, ref: str, model: str, plain: dict[str, tuple[int, dict[str, Any]]], ids: Any
) -> None:
    wanted = sorted(ids)
    for found, item_id in zip(await store.get(ref, sorted(plain)), sorted(plain), strict=True):
        assert (found is not None) == (item_id in wanted)
        if found is not None:
            content, metadata = plain[item_id]
            assert found.metadata == metadata
            np.testing.assert_allclose(found.vector, vector(model, content), atol=1e-6)
    query = np.random.default_rng(0).normal(size=(1, SIZE[model]))
    [hits] = await store.search(ref, query, 20, tag=TAG[model])
    assert sorted(hit.id for hit in hits) == wanted
    unit = query[0] / np.linalg.norm(query[0])
    for hit in hits:
        assert hit.score == pytest.approx(float(unit @ vector(model, plain[hit.id][0])), abs=1e-5)


# ---- races


async def test_a_copier_neither_revives_nor_overwrites(store: EmbeddedStore) -> None:
    await store.migrations.start("c", TAG["b"], SIZE["b"])
    seen = await store.migrations.missing("c", TAG["b"])
    await store.delete("c", ["i0"])
    await store.upsert("c", [item("a", "i1", 100)], tag=TAG["a"])
    await store.upsert("c", [item("a", "i2", 200)], tag=TAG["a"], other=(TAG["b"], [item("b", "i2", 200)]))
    assert await store.migrations.fill("c", TAG["b"], filled("b", seen)) == 3
    [pair] = await store.migrations.partnerships()
    assert [missing.id for missing in await store.migrations.missing("c", TAG["b"])] == ["i1"]
    [gone, current] = await store.get(pair.partner.ref, ["i0", "i2"])
    assert gone is None
    assert current is not None
    np.testing.assert_allclose(current.vector, vector("b", 200), atol=1e-6)


async def test_a_reader_that_began_before_the_switch_ends_on_the_old_vectors(store: EmbeddedStore) -> None:
    before = await store.info("c")
    await migrate(store)
    [old] = await store.get(before.ref, ["i3"])
    [new] = await store.get("c", ["i3"])
    assert old is not None
    assert new is not None
    np.testing.assert_allclose(old.vector, vector("a", 3), atol=1e-6)
    np.testing.assert_allclose(new.vector, vector("b", 3), atol=1e-6)


async def test_a_vector_of_the_former_model_finds_its_items_until_the_end(store: EmbeddedStore) -> None:
    await migrate(store)
    [[hit]] = await store.search("c", vector("a", 3)[None], 1, tag=TAG["a"])
    assert (hit.id, round(hit.score, 4)) == ("i3", 1.0)
    await store.migrations.end("c")
    with pytest.raises(ModelMismatch):
        await store.search("c", vector("a", 3)[None], 1, tag=TAG["a"])


async def test_a_vector_of_the_candidate_finds_nothing_before_the_switch(store: EmbeddedStore) -> None:
    await store.migrations.start("c", TAG["b"], SIZE["b"])
    with pytest.raises(ModelMismatch):
        await store.search("c", vector("b", 3)[None], 1, tag=TAG["b"])


async def test_a_write_that_began_before_the_switch_reaches_both(store: EmbeddedStore) -> None:
    await migrate(store)
    twins = (TAG["b"], [item("b", "late", 77)])
    await store.upsert("c", [item("a", "late", 77)], tag=TAG["a"], other=twins)
    [pair] = await store.migrations.partnerships()
    assert (await store.migrations.lacking("c"), pair.collection.count) == (0, 7)
    [[hit]] = await store.search("c", vector("b", 77)[None], 1, tag=TAG["b"])
    assert hit.id == "late"


async def test_a_write_without_a_vector_of_the_live_model_is_refused(store: EmbeddedStore) -> None:
    await migrate(store)
    with pytest.raises(ModelMismatch):
        await store.upsert("c", [item("a", "late", 77)], tag=TAG["a"])
    both = [item("a", "late", 77), item("a", "later", 78)]
    with pytest.raises(ModelMismatch, match="cannot be compared"):
        await store.upsert("c", both, tag=TAG["a"], other=(TAG["b"], [item("b", "late", 77)]))
    assert (await store.info("c")).count == 6


async def test_pages_continue_across_a_switch(store: EmbeddedStore) -> None:
    first = await store.scroll("c", limit=4)
    await migrate(store)
    rest = await store.scroll("c", cursor=first.cursor, limit=4)
    assert [i.id for i in (*first.items, *rest.items)] == [f"i{n}" for n in range(6)]
    assert (first.tag, rest.tag, rest.cursor) == (TAG["a"], TAG["a"], None)
    await store.migrations.end("c")
    with pytest.raises(InvalidRequest, match="re-embedded"):
        await store.scroll("c", cursor=first.cursor)


async def test_an_idempotency_key_holds_across_a_switch(store: EmbeddedStore) -> None:
    await store.upsert("c", [item("a", "once", 50)], tag=TAG["a"], request_key="k")
    await migrate(store)
    await store.delete("c", ["once"])
    await store.upsert("c", [item("b", "once", 50)], tag=TAG["b"], request_key="k")
    assert await store.get("c", ["once"]) == [None]
    with pytest.raises(Conflict, match="other items"):
        await store.upsert("c", [item("b", "once", 51)], tag=TAG["b"], request_key="k")


# ---- switch, rollback, end


async def test_all_collections_switch_or_none(store: EmbeddedStore) -> None:
    await store.create("d", CollectionSpec(TAG["a"], SIZE["a"]))
    await store.upsert("d", [item("a", "x", 1)], tag=TAG["a"])
    for name in ("c", "d"):
        await store.migrations.start(name, TAG["b"], SIZE["b"])
    await store.migrations.fill("c", TAG["b"], filled("b", await store.migrations.missing("c", TAG["b"])))
    with pytest.raises(Conflict, match="lack 1 of the 1 items of collection 'd'"):
        await store.migrations.switch({"c": TAG["b"], "d": TAG["b"]})
    assert {info.tag for info in await store.collections()} == {TAG["a"]}
    await store.migrations.switch({"c": TAG["b"], "d": TAG["b"]}, may_lack={"d": 1})
    assert [(info.tag, info.count) for info in await store.collections()] == [(TAG["b"], 6), (TAG["b"], 0)]
    await store.migrations.switch({"c": TAG["b"], "d": TAG["b"]})  # repeated after a crash: nothing is left to do


async def test_a_rollback_has_every_write_since_the_switch(store: EmbeddedStore) -> None:
    await store.set_alias("alias", "c")
    await migrate(store)
    await store.upsert("c", [item("b", "new", 60)], tag=TAG["b"], other=(TAG["a"], [item("a", "new", 60)]))
    await store.delete("c", ["i0"])
    await store.patch("alias", "i1", {"patched": True})
    await store.migrations.switch({"c": TAG["a"]})
    info = await store.info("alias")
    assert (info.name, info.tag, info.count) == ("c", TAG["a"], 6)
    [gone, patched, new] = await store.get("c", ["i0", "i1", "new"])
    assert gone is None
    assert patched is not None
    assert patched.metadata["patched"]
    assert new is not None
    np.testing.assert_allclose(new.vector, vector("a", 60), atol=1e-6)


async def test_a_collection_tells_its_earlier_models(store: EmbeddedStore) -> None:
    assert (await store.info("c")).earlier == ()
    await migrate(store)
    assert (await store.info("c")).earlier == (("a" * 64, SIZE["a"]),)
    await store.migrations.end("c")
    taken = await store.snapshot("c")
    restored = await store.restore("copy", "c", taken.name)
    assert restored.earlier == (("a" * 64, SIZE["a"]),)
    assert restored.count == 6


async def test_partners_are_hidden_and_dropped_with_their_collection(store: EmbeddedStore) -> None:
    await store.migrations.start("c", TAG["b"], SIZE["b"])
    assert [info.name for info in await store.collections()] == ["c"]
    with pytest.raises(InvalidRequest):
        await store.info("partner:1")
    await store.drop("c")
    tables = await store._read(
        lambda db: db.execute("SELECT name FROM sqlite_master WHERE name LIKE 'items_%'").fetchall()
    )
    assert [name for (name,) in tables if not name.startswith("items_sqlite")] == []


async def test_a_second_candidate_is_refused_until_the_first_ends(store: EmbeddedStore) -> None:
    await store.migrations.start("c", TAG["b"], SIZE["b"])
    with pytest.raises(Conflict, match="already has a candidate"):
        await store.migrations.start("c", "c" * 64 + "/cls/l2/224x224/fp32", 6)
    with pytest.raises(Conflict, match="already has vectors"):
        await store.migrations.start("c", TAG["a"], SIZE["a"])
    await store.migrations.end("c")
    await store.migrations.end("c")
    await store.migrations.start("c", "c" * 64 + "/cls/l2/224x224/fp32", 6)


async def test_another_process_sees_the_switch_at_once(store: EmbeddedStore) -> None:
    other = await opened(store.path.parent, interval_s=60.0)
    await other.search("c", vector("a", 3)[None], 1, tag=TAG["a"])
    await migrate(store)
    [[hit]] = await other.search("c", vector("b", 3)[None], 1, tag=TAG["b"])
    assert hit.id == "i3"
    await asyncio.wait_for(other.close(), 10)
