"""Tests of duplicates: the groups are compared with a search over all pairs; and the route is tested."""

import asyncio
import hashlib

import numpy as np
import pytest

from service.errors import InvalidRequest
from service.search import duplicates
from service.search.duplicates import by_content, by_similarity, scores_to_first
from service.search.filters import parse_filter
from service.search.store import Item, SearchParams
from tests.dict_store import DictStore
from tests.fakes import DIMS, fake_artifact, running

PATH = "/v1/collections/shop/duplicates"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def brute(items, threshold) -> list[list[str]]:
    """Group by definition: from each item, visit all items that are near enough, until no new item is reached."""
    left = sorted(items, key=lambda item: item.id)
    groups = []
    while left:
        group, edge = [], [left.pop(0)]
        while edge:
            item = edge.pop()
            group.append(item.id)
            near = [other for other in left if float(other.vector @ item.vector) >= threshold]
            left = [other for other in left if other not in near]
            edge += near
        groups.append(sorted(group))
    return sorted((group for group in groups if len(group) > 1), key=lambda group: (-len(group), group[0]))


async def filled(vectors, **more) -> tuple[DictStore, list[Item]]:
    store = DictStore()
    items = [Item(f"p{i:03}", v, {"i": i, "odd": i % 2 == 1}, **more) for i, v in enumerate(np.asarray(vectors))]
    await store.upsert("shop", items, tag="t")
    return store, [item for item in await store.get("shop", [item.id for item in items]) if item]


def clustered(rng, sizes, spread, dims=6):
    """Return vectors around the given number of centres, in random order."""
    rows = [rng.normal(size=dims) + spread * rng.normal(size=(size, dims)) for size in sizes]
    return rng.permutation(np.concatenate(rows)).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.8, 0.95, 0.999])
async def test_groups_by_similarity_are_those_of_a_walk_over_all_pairs(seed, threshold):
    rng = np.random.default_rng(seed)
    store, items = await filled(clustered(rng, [40, 9, 9, 3, 1, 1, 1], 0.15))
    found = await by_similarity(store, await store.info("shop"), threshold)
    assert [group.ids for group in found.groups] == brute(items, threshold)
    assert found.compared == len(items)
    assert not found.truncated


async def test_what_hangs_together_is_one_group_though_its_ends_differ():
    angles = np.arange(12) * 0.2
    store, items = await filled(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    assert items[0].vector @ items[-1].vector < 0
    found = await by_similarity(store, await store.info("shop"), 0.97)
    assert [group.ids for group in found.groups] == [[item.id for item in items]]


async def test_equal_vectors_count_at_a_threshold_of_one():
    vectors = np.repeat(np.random.default_rng(0).normal(size=(3, 384)), 2, axis=0)
    store, _ = await filled(vectors)
    found = await by_similarity(store, await store.info("shop"), 1.0)
    assert [len(group.ids) for group in found.groups] == [2, 2, 2]


async def test_equal_vectors_are_searched_for_once():
    """A shop's placeholder image may occur ten thousand times."""
    store, items = await filled([*np.ones((300, DIMS)), *np.eye(DIMS)[:2], *(np.eye(DIMS)[:2] + 1e-3)])
    searched = []
    search = store.search

    async def counted(collection, vectors, k, **more):
        searched.append((len(vectors), k))
        return await search(collection, vectors, k, **more)

    store.search = counted
    found = await by_similarity(store, await store.info("shop"), 0.99)
    assert [group.ids for group in found.groups] == brute(items, 0.99)
    assert sorted(len(group.ids) for group in found.groups) == [2, 2, 300]
    assert sum(count for count, _ in searched) <= 5 + 5  # each vector once, and the frequent one deeper


async def test_more_neighbours_than_a_search_returns_are_told(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_DEPTH", 32)
    store, _ = await filled(np.ones((40, 4)) + np.arange(40)[:, None] * 1e-6)
    found = await by_similarity(store, await store.info("shop"), 0.9)
    assert found.truncated
    assert not (
        await by_similarity(store, await store.info("shop"), 0.9, parse_filter({"key": "i", "lt": 31}))
    ).truncated


async def test_the_filter_holds_on_both_sides_and_the_parameters_reach_the_store():
    store, items = await filled(clustered(np.random.default_rng(1), [20], 0.1))
    seen = []
    real = store.search

    async def search(*args, **kwargs):
        seen.append((kwargs["where"], kwargs["params"], len(args[1]) * args[2]))
        return await real(*args, **kwargs)

    store.search = search
    where = parse_filter({"key": "odd", "eq": True})
    found = await by_similarity(store, await store.info("shop"), 0.5, where, SearchParams(exact=True))
    assert [group.ids for group in found.groups] == brute([i for i in items if i.metadata["odd"]], 0.5)
    assert found.compared == 10
    assert {call[:2] for call in seen} == {(where, SearchParams(exact=True))}
    assert max(call[2] for call in seen) <= 10_000


async def test_too_many_items_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_ITEMS", 9)
    store, _ = await filled(np.eye(10))
    info = await store.info("shop")
    for work in (by_content(store, info), by_similarity(store, info, 0.9)):
        words = "10 items would be compared; one request allows at most 9; use a filter"
        with pytest.raises(InvalidRequest, match=words):
            await work
    assert (await by_content(store, info, parse_filter({"key": "i", "lt": 9}))).compared == 9


async def test_by_content(monkeypatch):
    monkeypatch.setattr(duplicates, "_PAGE", 3)  # over several pages
    store = DictStore()
    contents = ["x", "y", "x", None, "z", "y", "x", None]
    rng = np.random.default_rng(0)
    items = [
        Item(f"p{i}", rng.normal(size=4), {}, digest=None if text is None else digest(text))
        for i, text in enumerate(contents)
    ]
    await store.upsert("shop", items, tag="t")
    found = await by_content(store, await store.info("shop"))
    assert [(group.ids, group.digest) for group in found.groups] == [
        (["p0", "p2", "p6"], digest("x")),
        (["p1", "p5"], digest("y")),
    ]
    assert (found.compared, found.skipped) == (8, 2)


async def test_items_deleted_meanwhile_have_no_score():
    store, _ = await filled(np.eye(4) + 1)
    await store.delete("shop", ["p000", "p002"])
    scored = await scores_to_first(store, await store.info("shop"), ["p000", "p001", "p002", "p003"])
    assert [item_id for item_id, _ in scored] == ["p001", "p003"]
    assert scored[0][1] == pytest.approx(1)


async def test_the_route(tmp_path):
    store = DictStore()
    rng = np.random.default_rng(2)
    base = rng.normal(size=(3, DIMS))
    vectors = np.concatenate([base, base[:2] + 0.01 * rng.normal(size=(2, DIMS)), base[:1]])
    async with running(tmp_path, store=store, artifact=fake_artifact(digit="b")) as run:
        items = [
            Item(f"p{i}", v, {"i": i}, digest=digest("x" if i in (0, 5) else str(i))) for i, v in enumerate(vectors)
        ]
        await store.upsert("shop", items, tag=run.service.tag("a" * 64))  # no model is needed
        content = (await run.client.post(PATH, json={})).json()
        near = (await run.client.post(PATH, json={"by": "similarity"})).json()
        one = (await run.client.post(PATH, json={"by": "similarity", "threshold": 0.97, "limit": 1})).json()
        some = (
            await run.client.post(PATH, json={"by": "similarity", "filter": {"key": "i", "lt": 4}, "params": {}})
        ).json()
        gone = await run.client.post("/v1/collections/none/duplicates", json={})
    assert [[item["id"] for item in group["items"]] for group in content["groups"]] == [["p0", "p5"]]
    assert content["groups"][0]["digest"] == digest("x")
    assert [[item["id"] for item in group["items"]] for group in near["groups"]] == [["p0", "p3", "p5"], ["p1", "p4"]]
    first = store_unit(vectors[0])
    for item in near["groups"][0]["items"]:
        assert item["score"] == pytest.approx(first @ store_unit(vectors[int(item["id"][1])]), abs=1e-6)
    assert (len(one["groups"]), one["total_groups"], one["compared"], one["truncated"]) == (1, 2, 6, False)
    assert [[item["id"] for item in group["items"]] for group in some["groups"]] == [["p0", "p3"]]
    assert gone.status_code == 404


async def test_the_route_heeds_filter_and_parameters_and_says_how_near_is_near(tmp_path):
    store, seen = DictStore(), []
    real = store.search

    async def search(*args, **kwargs):
        seen.append(kwargs["params"])
        return await real(*args, **kwargs)

    store.search = search
    vectors = [np.array([np.cos(angle), np.sin(angle)]) for angle in (0.0, 0.30, 2.0, 2.35)]  # cosines 0.955 and 0.939
    async with running(tmp_path, store=store) as run:
        items = [Item(f"p{i}", vector, {"i": i}, digest=digest("x")) for i, vector in enumerate(vectors)]
        await store.upsert("shop", items, tag=run.service.tag())
        content = (await run.client.post(PATH, json={"filter": {"key": "i", "lt": 3}})).json()
        near = (await run.client.post(PATH, json={"by": "similarity", "params": {"ef_search": 77}})).json()
    assert [[item["id"] for item in group["items"]] for group in content["groups"]] == [["p0", "p1", "p2"]]
    assert [[item["id"] for item in group["items"]] for group in near["groups"]] == [["p0", "p1"]]
    assert set(seen) == {SearchParams(ef_search=77)}


async def test_a_group_of_which_one_item_is_left_is_not_shown(tmp_path, monkeypatch):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        items = [Item(f"p{i}", np.ones(DIMS), digest=digest("xxyyy"[i])) for i in range(5)]
        await store.upsert("shop", items, tag=run.service.tag())
        get = store.get

        async def get_late(collection, ids):
            await store.delete("shop", ["p0", "p4"])  # after the groups were found
            return await get(collection, ids)

        store.get = get_late
        answer = (await run.client.post(PATH, json={})).json()
    assert [[item["id"] for item in group["items"]] for group in answer["groups"]] == [["p2", "p3"]]
    assert answer["total_groups"] == 2


def store_unit(vector):
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"by": "colour"}, "by: "),
        ({"by": "content", "threshold": 0.9}, "require by=similarity"),
        ({"by": "content", "params": {}}, "require by=similarity"),
        ({"by": "similarity", "threshold": 0.4}, "threshold: "),
        ({"by": "similarity", "threshold": 1.01}, "threshold: "),
        ({"by": "similarity", "threshold": "NaN"}, "threshold: "),
        ({"by": "similarity", "params": {"fast": True}}, "params.fast"),
        ({"limit": 0}, "limit: "),
        ({"limit": 1001}, "limit: "),
        ({"filter": {"key": "a"}}, "filter: "),
        ({"cursor": "x"}, "cursor: unknown field"),
    ],
)
async def test_what_makes_no_sense_is_told(tmp_path, body, words):
    async with running(tmp_path, store=DictStore()) as run:
        answer = await run.client.post(PATH, json=body)
    assert answer.status_code == 422
    assert words in answer.json()["detail"]


async def test_the_deadline_ends_it(tmp_path):
    store, _ = await filled(np.eye(8))
    stopped = asyncio.Event()

    async def search(*args, **kwargs):
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    store.search = search
    async with running(tmp_path, store=store, request_deadline_s=0.2) as run:
        answer = await run.client.post(PATH, json={"by": "similarity"})
    assert answer.status_code == 504
    assert stopped.is_set()
