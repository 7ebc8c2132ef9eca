"""Tests of cached filter results: the item numbers are those of the view, whatever was searched before, and few results
are cached.
"""

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.search import selection
from service.search.embedded import EmbeddedStore
from service.search.filters import Filter, parse_filter
from service.search.selection import Selections
from service.search.store import CollectionSpec, IndexSpec, Item
from service.search.view import View
from tests.service.search.embedded_store import TAG, D, build_one, items, maintained_by_the_test

EVEN = parse_filter({"key": "even", "eq": True})


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    async with maintained_by_the_test(tmp_path) as made:
        yield made


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """Record each filter that the database evaluates, and the item number above which it searches."""
    calls: list[tuple[Any, int]] = []
    passing = selection.passing

    def watched(db: sqlite3.Connection, row: Any, where: Filter, *, after: int = 0, to: int = 2**62) -> Any:
        calls.append((where, after))
        return passing(db, row, where, after=after, to=to)

    monkeypatch.setattr(selection, "passing", watched)
    return calls


def view_of(store: EmbeddedStore, db: sqlite3.Connection, name: str = "c") -> View:
    return store._maintenance._current(db, name)


def below(limit: int) -> Filter:
    return parse_filter({"key": "n", "lt": limit})


async def test_an_older_view_between_two_uses_of_a_newer_one(store: EmbeddedStore) -> None:
    """A slow search that began before a write uses the older view. No item may be counted twice, and no newer item
    returned.
    """
    db, kept = store._connect(), Selections()
    await store.upsert("c", items(6), tag=TAG)
    older = view_of(store, db)
    await store.upsert("c", items(6, seed=1, prefix="more"), tag=TAG)
    newer = view_of(store, db)
    for view in (newer, older, newer, older, newer):
        numbers = kept.allowed(db, view, EVEN).numbers.tolist()
        assert numbers == Selections().allowed(db, view, EVEN).numbers.tolist()
        assert numbers == ([1, 3, 5] if view is older else [1, 3, 5, 7, 9, 11])


async def test_a_filter_that_is_used_again_reads_only_what_is_new(
    store: EmbeddedStore, reads: list[tuple[Any, int]]
) -> None:
    db, kept = store._connect(), Selections()
    await store.upsert("c", items(6), tag=TAG)
    kept.allowed(db, view_of(store, db), EVEN)
    kept.allowed(db, view_of(store, db), EVEN)
    await store.upsert("c", items(2, seed=1, prefix="more"), tag=TAG)
    assert kept.allowed(db, view_of(store, db), EVEN).numbers.tolist() == [1, 3, 5, 7]
    await store.patch("c", "i1", {"even": True})  # makes every answer void
    assert kept.allowed(db, view_of(store, db), EVEN).numbers.tolist() == [1, 2, 3, 5, 7]
    assert [after for _, after in reads] == [0, 6, 0]


async def test_positions_of_segments_that_are_gone_are_let_go(store: EmbeddedStore) -> None:
    db, kept = store._connect(), Selections()
    await store.create("c", CollectionSpec(TAG, D, index=IndexSpec("flat")))
    await store.upsert("c", items(20), tag=TAG)
    build_one(store, seal_rows=1)
    view = view_of(store, db)
    allowed = kept.allowed(db, view, EVEN)
    [old] = [part.segment for part in view.parts]
    assert allowed.positions(old).tolist() == list(range(0, 20, 2))
    await store.delete("c", [f"i{n}" for n in range(10)])
    await store.settle("c")
    view = view_of(store, db)
    allowed = kept.allowed(db, view, EVEN)
    [new] = [part.segment for part in view.parts]
    allowed.positions(new), allowed.bits(new)
    assert new.row.folder != old.row.folder
    assert set(allowed._positions) == set(allowed._bits) == {new.row.folder}


async def test_the_least_recently_used_filters_go_first(
    store: EmbeddedStore, reads: list[tuple[Any, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "MAX_KEPT", 2)
    db, kept = store._connect(), Selections()
    await store.upsert("c", items(20), tag=TAG)
    view = view_of(store, db)
    for limit in (1, 2, 1, 3):
        kept.allowed(db, view, below(limit))
    assert [where for where, _ in reads] == [below(1), below(2), below(3)]
    reads.clear()
    for limit in (1, 3, 2):
        kept.allowed(db, view, below(limit))
    assert [where for where, _ in reads] == [below(2)]


async def test_answers_are_kept_within_a_budget_of_bytes(
    store: EmbeddedStore, reads: list[tuple[Any, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    db, kept = store._connect(), Selections()
    await store.upsert("c", items(100), tag=TAG)
    view = view_of(store, db)
    monkeypatch.setattr(selection, "MAX_KEPT_BYTES", 2 * 8 * 10)
    for limit in (10, 8, 10, 3, 10, 8):  # the numbers of 10 and 8 fit together, with 3 they do not
        kept.allowed(db, view, below(limit))
    assert [where for where, _ in reads] == [below(10), below(8), below(3), below(8)]
    kept.allowed(db, view, below(50))  # is alone above the budget
    assert sum(entry.allowed.nbytes for entry in kept._kept.values()) <= 2 * 8 * 10


async def test_what_tells_filters_apart(store: EmbeddedStore) -> None:
    """The collection and every value count, and 1 and true are different values."""
    db, kept = store._connect(), Selections()
    values = [1, True, "1", 0, False]
    made = [Item(f"i{n}", np.ones(D), {"n": n, "value": value}) for n, value in enumerate(values)]
    await store.upsert("c", made, tag=TAG)
    await store.upsert("d", made[::-1], tag=TAG)
    for _ in range(2):
        for name, step in (("c", 1), ("d", -1)):
            view = view_of(store, db, name)
            for number, value in enumerate(values[::step], 1):
                where = parse_filter({"key": "value", "eq": value})
                assert kept.allowed(db, view, where).numbers.tolist() == [number]
