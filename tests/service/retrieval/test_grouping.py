"""Tests that grouping reads only as much of a ranking as it needs and returns the groups of the whole ranking."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.retrieval import grouping
from service.retrieval.grouping import Groups, grouped, split
from service.search.store import Hit, Item
from tests.dict_store import DictStore

KEY = ("shelf", "row")


def ranking(values) -> list[Hit]:
    """Return hits with falling scores and these values of `shelf.row`. The value ... means that the key is missing."""
    return [
        Hit(f"p{i:03}", 1 - i / 1000, {} if value is ... else {"shelf": {"row": value}})
        for i, value in enumerate(values)
    ]


def brute(hits, k, size, offset=0, exclude=(), threshold=-2.0) -> list[tuple[str, list[str]]]:
    """Group the whole ranking by definition: the first item with a value opens the group of this value."""
    opened: list[tuple[str, list[str]]] = []
    for hit in hits:
        value = hit.metadata.get("shelf", {}).get("row")
        if hit.id in exclude or hit.score < threshold or value is None or isinstance(value, list | dict):
            continue
        name = f"{type(value) is bool}:{float(value) if not isinstance(value, str) else value!r}"
        for other, ids in opened:
            if other == name:
                ids.append(hit.id)
                break
        else:
            opened.append((name, [hit.id]))
    return [(name, ids[:size]) for name, ids in opened][offset : offset + k]


class Ranked:
    """A search over a fixed ranking that records how many hits were requested."""

    def __init__(self, hits) -> None:
        self.hits = hits
        self.depths: list[int] = []

    async def __call__(self, depth):
        self.depths.append(depth)
        return self.hits[:depth]


def ids(found: Groups) -> list[list[str]]:
    return [[hit.id for hit in group.hits] for group in found.groups]


@given(
    values=st.lists(st.sampled_from(["a", "b", "c", "d", 1, 1.0, 2, True, None, [1], {"x": 1}, ...]), max_size=60),
    k=st.integers(1, 5),
    size=st.integers(1, 4),
    offset=st.integers(0, 3),
    excluded=st.sets(st.integers(0, 59), max_size=3),
    floor=st.sampled_from([None, 0.97, 0.99]),
)
@settings(max_examples=300, deadline=None)
async def test_as_going_down_the_whole_ranking(values, k, size, offset, excluded, floor):
    hits = ranking(values)
    exclude = {f"p{i:03}" for i in excluded}
    search = Ranked(hits)
    found = await grouped(
        search, KEY, k=k, size=size, offset=offset, keep=lambda hit: hit.id not in exclude, threshold=floor
    )
    expected = brute(hits, k, size, offset, exclude, -2.0 if floor is None else floor)
    assert ids(found) == [members for _, members in expected]
    assert not found.truncated
    assert search.depths == sorted(set(search.depths))


async def test_it_goes_no_deeper_than_it_must():
    search = Ranked(ranking(["a", "b"] * 5000))
    found = await grouped(search, KEY, k=2, size=3)
    assert ids(found) == [["p000", "p002", "p004"], ["p001", "p003", "p005"]]
    assert search.depths == [12]


async def test_one_group_that_fills_the_first_places_is_gone_past():
    hits = ranking(["a"] * 500 + ["b"])
    search = Ranked(hits)
    found = await grouped(search, KEY, k=2, size=1)
    assert ids(found) == [["p000"], ["p500"]]
    assert len(search.depths) == 8
    assert search.depths[-1] >= 501


async def test_the_end_of_what_may_be_searched_is_told(monkeypatch):
    monkeypatch.setattr(grouping, "MAX_DEPTH", 32)
    many = Ranked(ranking(["a"] * 31 + ["b"] + ["c"] * 10))
    found = await grouped(many, KEY, k=3, size=1)
    assert ids(found) == [["p000"], ["p031"]]
    assert found.truncated
    assert max(many.depths) == 32
    few = await grouped(Ranked(ranking(["a"] * 31)), KEY, k=3, size=1)
    assert not few.truncated  # nothing lies deeper
    full = await grouped(Ranked(ranking(["a"] * 31 + ["b"] * 10)), KEY, k=2, size=1)
    assert not full.truncated


async def test_below_the_threshold_nothing_is_searched_for(monkeypatch):
    monkeypatch.setattr(grouping, "MAX_DEPTH", 64)
    search = Ranked(ranking(["a"] * 100))
    found = await grouped(search, KEY, k=3, size=1, threshold=search.hits[3].score)
    assert ids(found) == [["p000"]]
    assert not found.truncated
    assert search.depths == [6]


def test_1_and_true_are_two_groups_and_1_and_1_0_one():
    groups = split(ranking([1, True, 1.0, "1", False, 0]), KEY, 5)
    assert [[hit.id for hit in group.hits] for group in groups] == [
        ["p000", "p002"],
        ["p001"],
        ["p003"],
        ["p004"],
        ["p005"],
    ]


@pytest.mark.parametrize("size", [1, 3])
async def test_over_a_store(size):
    rng = np.random.default_rng(4)
    store = DictStore()
    rows = rng.integers(0, 9, 200).tolist()
    vectors = rng.normal(size=(200, 6)).astype(np.float32)
    await store.upsert("shop", [Item(f"p{i}", vectors[i], {"shelf": {"row": rows[i]}}) for i in range(200)], tag="t")
    query = rng.normal(size=(1, 6))

    async def best(depth):
        return (await store.search("shop", query, depth, tag="t"))[0]

    found = await grouped(best, KEY, k=9, size=size)
    assert ids(found) == [members for _, members in brute(await best(200), 9, size)]
