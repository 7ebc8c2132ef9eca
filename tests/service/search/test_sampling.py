"""Tests of drawing items at random from a collection, on each store."""

import numpy as np
import pytest

from service.search import sampling
from service.search.filters import parse_filter
from service.search.sampling import draw
from service.search.store import Item, VectorStore

WHERE = parse_filter({"key": "even", "eq": True})


async def fill(store: VectorStore, count: int) -> None:
    rows = np.random.default_rng(0).normal(size=(count, 4))
    items = [Item(f"i{n:03}", row, {"n": n, "even": n % 2 == 0}) for n, row in enumerate(rows)]
    await store.upsert("c", items, tag="t")


async def test_a_sample_has_different_items_that_pass_the_filter(store: VectorStore) -> None:
    await fill(store, 60)
    await store.delete("c", ["i000", "i058"])
    info = await store.info("c")
    drawn = await draw(store, info, 10, WHERE)
    assert drawn.is_random
    assert len({item.id for item in drawn.items}) == 10
    assert all(item.metadata["even"] for item in drawn.items)
    whole = {item.id: item for item in await store.get("c", [item.id for item in drawn.items]) if item}
    assert all(np.array_equal(whole[item.id].vector, item.vector) for item in drawn.items)
    assert [item.id for item in (await draw(store, info, 10, WHERE)).items] == [item.id for item in drawn.items]
    everything = await draw(store, info, 100, WHERE)
    assert sorted(item.id for item in everything.items) == [f"i{n:03}" for n in range(2, 58, 2)]
    assert len((await draw(store, info, 100)).items) == 58


async def test_all_items_are_equally_likely(store: VectorStore, is_slow: bool, monkeypatch) -> None:
    """The share of each third of the collection in a sample is about a third."""
    count, size = (300, 150) if is_slow else (900, 450)
    await fill(store, count)
    drawn = await draw(store, await store.info("c"), size)
    thirds = np.bincount([item.metadata["n"] * 3 // count for item in drawn.items], minlength=3) / size
    assert thirds.tolist() == pytest.approx([1 / 3] * 3, abs=0.08)


async def test_a_store_that_cannot_draw_reads_a_limited_number_of_items(store: VectorStore, monkeypatch) -> None:
    await fill(store, 30)
    monkeypatch.setattr(sampling, "MAX_READ", 20)
    monkeypatch.setattr(sampling, "_PAGE", 10)
    drawn = await draw(store, await store.info("c"), 15)
    assert len(drawn.items) == 15
    draws_itself = "sample" in store.capabilities
    assert drawn.is_random == draws_itself
    if not draws_itself:
        assert (await draw(store, await store.info("c"), 15, WHERE)).is_random  # 15 items pass
        monkeypatch.setattr(sampling, "MAX_READ", 30)
        assert (await draw(store, await store.info("c"), 15)).is_random
