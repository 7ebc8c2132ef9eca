"""Tests of how the embedded store searches: through an index with filters and deletions, with a given effort, in the
right thread, and never from an outdated or inconsistent state.
"""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Hashable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from service import sqlite
from service.errors import InvalidRequest, StorageDamaged
from service.search import building, database, indexes, reading, searcher, view
from service.search.embedded import EmbeddedStore
from service.search.filters import parse_filter
from service.search.segments import OnDisk, Segment
from service.search.selection import Selections
from service.search.store import CollectionSpec, Hit, Hits, IndexSpec, Item, SearchParams
from service.search.view import Views
from service.stamp import Stamp
from tests.service.search.embedded_store import TAG, D, clustered, items, maintained_by_the_test

EVEN = parse_filter({"key": "even", "eq": True})
KINDS = ["hnsw", "ivf_pq", "rabitq"]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    async with maintained_by_the_test(tmp_path) as made:
        yield made


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set sizes at which a few hundred items have an index."""
    monkeypatch.setattr(building, "FLAT_BELOW", 100)
    monkeypatch.setattr(view, "EXACT_ROWS", 20)


async def indexed(store: EmbeddedStore, kind: Any, count: int = 2000, dimension: int = 32, **spec: Any) -> np.ndarray:
    """Create a collection `c`, wait until it has one indexed segment, and return queries near its vectors."""
    await store.create("c", CollectionSpec(TAG, dimension, index=IndexSpec(kind, **spec)))
    await store.upsert("c", items(count, dimension), tag=TAG)
    await store.settle("c")
    [segment] = (await store.stats("c"))["segments"]
    assert segment["kind"] == kind
    near = clustered(count, dimension)[::40]
    queries: np.ndarray = near + 0.3 * np.random.default_rng(5).normal(size=near.shape)
    return queries


async def ids(store: EmbeddedStore, queries: Any, k: int, **given: Any) -> list[list[str]]:
    return [[hit.id for hit in hits] for hits in await store.search("c", queries, k, tag=TAG, **given)]


def share(found: list[list[str]], truth: list[list[str]]) -> float:
    return float(np.mean([len({*a} & {*b}) / len(b) for a, b in zip(found, truth, strict=True)]))


def recorded(monkeypatch: pytest.MonkeyPatch, method: str) -> list[tuple[Any, ...]]:
    """Record the arguments of every call of a method of segments."""
    calls: list[tuple[Any, ...]] = []
    real = getattr(Segment, method)

    def watched(segment: Segment, *given: Any, **named: Any) -> Any:
        calls.append(given)
        return real(segment, *given, **named)

    monkeypatch.setattr(Segment, method, watched)
    return calls


def probes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many inverted lists each search reads."""
    looked_at: list[int] = []
    real = indexes.search_lists

    def watched(segment: Segment, queries: Any, k: int, alive: Any, nprobe: int) -> Any:
        looked_at.append(nprobe)
        return real(segment, queries, k, alive, nprobe)

    monkeypatch.setattr(indexes, "search_lists", watched)
    return looked_at


# ---- through an index, with filters and deletions


@pytest.mark.parametrize("percent", [20, 50])
@pytest.mark.usefixtures("small")
async def test_a_filter_is_answered_by_the_graph(
    store: EmbeddedStore, percent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is searched deep enough to find k items that pass, so that no part is scanned exactly."""
    queries = await indexed(store, "hnsw")
    where = parse_filter({"key": "n", "lt": 20 * percent})
    truth = await ids(store, queries, 10, where=where, params=SearchParams(exact=True))
    scanned = recorded(monkeypatch, "exact")
    found = await ids(store, queries, 10, where=where)
    assert scanned == []
    assert share(found, truth) >= 0.95


@pytest.mark.parametrize("kind", ["ivf_pq", "rabitq"])
@pytest.mark.usefixtures("small")
async def test_a_filter_has_no_fewer_candidates_in_inverted_lists(
    store: EmbeddedStore, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The searched lists must contain as many allowed items as the lists of a search without a filter contain items."""
    queries = await indexed(store, kind)
    [part] = store.views._views[1].parts
    segment, probed = part.segment, probes(monkeypatch)
    await ids(store, queries, 10, where=EVEN)
    allowed = np.bincount(segment.lists[::2], minlength=segment.n_lists)
    usual = segment.row.effort * len(segment.numbers) / segment.n_lists
    [nprobe] = probed
    assert segment.row.effort < nprobe < segment.n_lists
    nearest = faiss.extract_index_ivf(segment.index).quantizer.search(
        queries.astype(np.float32) / np.linalg.norm(queries, axis=1, keepdims=True).astype(np.float32), nprobe
    )[1]
    assert allowed[nearest].sum(axis=1).min() >= usual


@pytest.mark.parametrize("positions", [[2, 4, 3, 5], [0, 5, 1, 3], [3, 2, 1], [1, 2, 3], [2, 2, 4], [4], []])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vectors_on_disk_come_in_the_order_in_which_they_are_asked_for(
    positions: list[int], dtype: str, tmp_path: Path
) -> None:
    """Consecutive vectors are read at once. A range with the right ends but gaps must not be."""
    matrix = np.arange(6 * D, dtype=dtype).reshape(6, D)
    path = tmp_path / "vectors"
    path.write_bytes(b"head" + matrix.tobytes())
    taken = OnDisk(path, D, dtype, 6).take(np.array(positions, np.int64))
    assert taken.dtype == np.float32
    np.testing.assert_array_equal(taken, matrix[positions])


@pytest.mark.parametrize("kind", ["ivf_pq", "rabitq"])
@pytest.mark.usefixtures("small")
async def test_how_many_lists_hold_enough(store: EmbeddedStore, kind: Any) -> None:
    await indexed(store, kind)
    [part] = store.views._views[1].parts
    counts = np.bincount(part.segment.lists, minlength=part.segment.n_lists)
    query = np.ones((1, 32), np.float32) / np.sqrt(np.float32(32))
    order = faiss.extract_index_ivf(part.segment.index).quantizer.search(query, len(counts))[1][0]
    held = counts[order].cumsum()
    for wanted in (1, int(held[0]), int(held[0]) + 1, int(held[3]), int(held[-1]), int(held[-1]) + 1):
        lists = indexes.lists_holding(part.segment, query, counts, wanted)
        assert lists == min(len(counts), int(np.searchsorted(held, wanted)) + 1)


@pytest.mark.parametrize("kind", ["flat", *KINDS])
@pytest.mark.parametrize("size", ["index", "exact", "tail"])
async def test_a_kept_filter_gives_out_nothing_that_was_deleted(
    store: EmbeddedStore, kind: Any, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cached numbers still include items that were deleted later. The bitmaps of each part exclude them."""
    monkeypatch.setattr(building, "FLAT_BELOW", 100)
    monkeypatch.setattr(view, "EXACT_ROWS", 20 if size == "index" else 10_000)
    await store.create("c", CollectionSpec(TAG, D, index=IndexSpec(kind)))
    await store.upsert("c", items(1000), tag=TAG)
    if size != "tail":
        await store.settle("c")
    query = clustered(1)
    [nearest] = await ids(store, query, 20, where=EVEN)
    [truth] = await ids(store, query, 40, where=EVEN, params=SearchParams(exact=True))
    await store.delete("c", nearest)
    [found] = await ids(store, query, 20, where=EVEN)
    assert len(found) == 20
    assert not {*found} & {*nearest}
    assert share([found], [[name for name in truth if name not in nearest]]) >= 0.9
    [scanned] = await ids(store, query, 1000, where=EVEN, params=SearchParams(exact=True))
    assert len(scanned) == 480


@pytest.mark.parametrize("kind", ["flat", *KINDS])
@pytest.mark.usefixtures("small")
async def test_an_exact_search_gives_out_nothing_that_was_deleted(store: EmbeddedStore, kind: Any) -> None:
    await store.create("c", CollectionSpec(TAG, D, index=IndexSpec(kind)))
    await store.upsert("c", items(300), tag=TAG)
    await store.settle("c")
    await store.delete("c", [f"i{n}" for n in range(10)])
    [found] = await ids(store, np.ones((1, D)), 1000, params=SearchParams(exact=True))
    assert len(found) == 290
    assert not {*found} & {f"i{n}" for n in range(10)}


async def test_the_deleted_leave_a_tail_when_they_are_many(store: EmbeddedStore) -> None:
    """If a tail is rewritten again and again, its memory and time must stay proportional to the items in it."""
    for seed in range(8):
        await store.upsert("c", items(200, seed=seed), tag=TAG)
        await store.search("c", np.ones((1, D)), 5, tag=TAG)
    tail = store.views._views[1].tail
    assert len(tail.numbers) - len(tail.dead) == 200
    assert len(tail.numbers) <= 200 + view._FIRST_CAPACITY + 200
    assert len(tail.payloads) == len(tail.numbers)
    assert {*(await ids(store, np.ones((1, D)), 1000))[0]} == {f"i{n}" for n in range(200)}


# ---- as hard as it is told


@pytest.mark.usefixtures("small")
async def test_efsearch_is_that_of_the_request_or_of_the_store(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await indexed(store, "hnsw")
    effort = store.views._views[1].parts[0].segment.row.effort
    used: list[int] = []
    real = indexes._hnsw_params
    monkeypatch.setattr(indexes, "_hnsw_params", lambda ef, selector: used.append(ef) or real(ef, selector))
    query = clustered(1, 32, seed=7)
    await ids(store, query, 5)
    await ids(store, query, 5, params=SearchParams(ef_search=333))
    await ids(store, query, 5, params=SearchParams(ef_search=2))  # faiss keeps no fewer than k
    monkeypatch.setattr(store._maintenance, "boost", lambda row: 2.0)
    await ids(store, query, 5, params=SearchParams(ef_search=333))
    await ids(store, query, 6)
    assert used == [effort, 333, 6, 666, 2 * effort]


@pytest.mark.parametrize("kind", ["ivf_pq", "rabitq"])
@pytest.mark.usefixtures("small")
async def test_nprobe_is_that_of_the_request_or_of_the_store(
    store: EmbeddedStore, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await indexed(store, kind)
    effort = store.views._views[1].parts[0].segment.row.effort
    probed, query = probes(monkeypatch), clustered(1, 32, seed=7)
    await ids(store, query, 5)
    await ids(store, query, 5, params=SearchParams(nprobe=7))
    monkeypatch.setattr(store._maintenance, "boost", lambda row: 2.0)
    await ids(store, query, 5, params=SearchParams(nprobe=7))
    assert probed == [effort, 7, 14]
    probed.clear()
    monkeypatch.setattr(store._maintenance, "boost", lambda row: 1.0)
    for nprobe in (1, 4):
        await ids(store, query, 5, where=EVEN, params=SearchParams(nprobe=nprobe))
    few, more = probed
    assert few < more


async def test_an_index_has_the_parameters_of_its_collection() -> None:
    vectors = clustered(2000, 32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    chunk = database.Chunk(np.arange(1, 2001), vectors, [b""] * 2000)

    def built(kind: Any, **given: Any) -> Any:
        return building.build(kind, CollectionSpec(TAG, 32, index=IndexSpec(kind, **given)), [chunk]).index

    graph, usual = built("hnsw", m=12, ef_construction=33), built("hnsw")
    assert (graph.hnsw.nb_neighbors(1), graph.hnsw.efConstruction) == (12, 33)
    assert (usual.hnsw.nb_neighbors(1), usual.hnsw.efConstruction) == (32, 100)
    for kind in ("ivf_pq", "rabitq"):
        assert faiss.extract_index_ivf(built(kind, n_lists=9)).nlist == 9
        assert faiss.extract_index_ivf(built(kind, n_lists=1000)).nlist == 2000 // 39


# ---- never an outdated state


async def test_an_older_transaction_does_not_take_a_newer_view_away(store: EmbeddedStore) -> None:
    await store.upsert("c", items(3), tag=TAG)
    db = store._connect()
    with sqlite.snapshot(db):
        row = database.find(db, "c")
        await store.delete("c", ["i0"])
        await store.upsert("c", items(2, seed=1, prefix="more"), tag=TAG)
        await ids(store, np.ones((1, D)), 5)
        newest = store.views._views[row.key]
        assert store.views.at(db, row) is None
    assert store.views._views[row.key] is newest
    assert {*(await ids(store, np.ones((1, D)), 5))[0]} == {"i1", "i2", "more0", "more1"}


async def test_a_write_is_told_after_its_commit_and_before_its_answer(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that finds the stamp unchanged has therefore seen every acknowledged write."""
    await store.upsert("c", items(1), tag=TAG)
    other, seen = store._connect(), list[int]()
    bump = Stamp.bump

    def watched(stamp: Stamp) -> None:
        seen.append(database.find(other, "c").count)
        bump(stamp)

    monkeypatch.setattr(Stamp, "bump", watched)
    await store.upsert("c", items(4), tag=TAG)
    assert seen == [4]


async def test_what_is_written_while_a_view_is_read_is_found_by_the_next_search(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.upsert("c", items(3), tag=TAG)
    db, newest = store._connect(), Views.newest
    late: list[int] = []

    def slow(views: Views, reader: sqlite3.Connection, row: Any) -> Any:
        made = newest(views, reader, row)
        if not late:
            late.append(1)
            with sqlite.transaction(db):
                vector = np.ones(D, "<f4") / np.float32(np.sqrt(D))
                database.upsert(db, row.key, [(Item("late", vector), vector.tobytes(), "{}")])
            store.stamp.bump()
        return made

    monkeypatch.setattr(Views, "newest", slow)
    assert "late" not in (await ids(store, np.ones((1, D)), 5))[0]
    assert (await ids(store, np.ones((1, D)), 5))[0][0] == "late"


@pytest.mark.parametrize("attempts", [searcher.ATTEMPTS, 1])
async def test_an_item_that_is_changed_while_it_is_searched_for_is_not_given_out(
    store: EmbeddedStore, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The item stops passing between the filter's evaluation and the search. With only one attempt, the other items are
    returned.
    """
    monkeypatch.setattr(searcher, "ATTEMPTS", attempts)
    await store.upsert("c", items(6), tag=TAG)
    db, allowed = store._connect(), Selections.allowed
    changed: list[int] = []

    def slow(kept: Selections, reader: sqlite3.Connection, *given: Any) -> Any:
        answer = allowed(kept, reader, *given)
        if not changed:
            changed.append(1)
            with sqlite.transaction(db):
                database.edit(db, 1, 1, '{"n": 0, "even": false}', None)
            store.stamp.bump()
            store._maintenance._current(db, "c")
        return answer

    monkeypatch.setattr(Selections, "allowed", slow)
    await ids(store, np.ones((1, D)), 5)
    [hits] = await store.search("c", np.ones((1, D)), 5, tag=TAG, where=EVEN)
    assert {hit.id for hit in hits} == {"i2", "i4"}
    assert all(hit.metadata["even"] for hit in hits)


def test_another_process_that_opens_a_stamp_leaves_it_as_it_is(tmp_path: Path) -> None:
    one = Stamp(tmp_path / "stamp")
    one.bump()
    number = one.read()
    assert Stamp(tmp_path / "stamp").read() == one.read() == number != 0


async def test_a_write_waits_for_that_of_another_process(store: EmbeddedStore) -> None:
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writing = asyncio.create_task(store.upsert("c", items(3), tag=TAG))
    await asyncio.wait([writing], timeout=0.1)
    assert not writing.done()
    other.execute("COMMIT")
    other.close()
    assert (await writing).count == 3


async def test_delete_by_filter_on_a_declared_key_goes_in_the_order_of_writing(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages are in the order of item numbers, although the key's index has another order. No item may be left out."""
    monkeypatch.setattr(reading, "_PAGE", 7)
    await store.create("c", CollectionSpec(TAG, D, indexed=("n",)))
    made = items(100)
    await store.upsert("c", made[::-1], tag=TAG)
    await store._write(lambda db: db.execute("ANALYZE"))
    assert await store.delete_where("c", parse_filter({"key": "n", "in": list(range(50))})) == 50
    assert {item.id for item in (await store.scroll("c")).items} == {item.id for item in made[50:]}


async def test_a_declared_key_has_an_index(store: EmbeddedStore) -> None:
    await store.create("c", CollectionSpec(TAG, D, indexed=("n", "shelf.row")))

    def plan(db: sqlite3.Connection) -> list[str]:
        queries = [
            "SELECT number FROM items_1 WHERE " + database.extract(path) + " = ?" for path in (("n",), ("shelf", "row"))
        ]
        return [db.execute("EXPLAIN QUERY PLAN " + query, (1,)).fetchall()[0][3] for query in queries]

    assert all("USING" in step and f"metadata_1_{n}" in step for n, step in enumerate(await store._read(plan)))


# ---- in which thread, and with whom


async def test_only_searches_that_want_the_same_share_a_call(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searches share a call only if collection, k, tag, parameters and dimension are equal."""
    await store.upsert("c", items(9), tag=TAG)
    await store.set_alias("d", "c")
    keys: list[Hashable] = []
    inner = store._searcher

    async def watched(query: Any, key: Hashable = None) -> Any:
        keys.append(key)
        raise asyncio.CancelledError

    monkeypatch.setattr(inner, "_at_once", lambda query: None)
    monkeypatch.setattr(inner._workers, "do", watched)
    monkeypatch.setattr(inner, "_read", lambda work, as_one: watched(work, object()))  # with a filter
    usual: dict[str, Any] = {"collection": "c", "vectors": np.ones((1, D)), "k": 3, "tag": TAG}
    changes: list[dict[str, Any]] = [
        {},
        {"vectors": -np.ones((2, D))},  # the only one that may share a call with the first
        {"collection": "d"},
        {"vectors": np.ones((1, D + 1))},
        {"k": 4},
        {"tag": "another"},
        {"params": SearchParams(exact=True)},
        {"where": EVEN},
        {"where": EVEN},
    ]
    for change in changes:
        with pytest.raises(asyncio.CancelledError):
            await store.search(**{**usual, **change})
    assert keys[0] == keys[1]
    assert len(set(keys)) == len(keys) - 1


async def test_a_search_that_is_slow_leaves_the_event_loop(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured time per vector decides whether a search is slow."""
    await store.upsert("c", items(300), tag=TAG)
    used: list[str] = []
    hits_of = searcher._hits
    monkeypatch.setattr(
        searcher, "_hits", lambda *given: used.append(threading.current_thread().name) or hits_of(*given)
    )
    known, vectors = store._searcher._seconds, -clustered(4)
    expected = []
    for seconds, count, in_thread in ((0.9, 1, False), (1.1, 1, True), (0.3, 4, True), (0.2, 4, False)):
        await store.search("c", -clustered(1), 5, tag=TAG, params=SearchParams(ef_search=64))  # makes the view known
        used.clear()
        known["c"] = seconds * searcher.AT_ONCE_S
        await store.search("c", vectors[:count], 5, tag=TAG)
        expected.append((in_thread, [name.startswith("store-search") for name in used]))
    assert expected == [(in_thread, [in_thread] * len(used)) for in_thread, used in expected]


async def test_the_usual_time_of_a_search_is_that_of_one_vector(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.upsert("c", items(30), tag=TAG)
    ticks = iter(range(1000))
    monkeypatch.setattr(searcher, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    await store.search("c", clustered(4), 5, tag=TAG)
    assert store._searcher._seconds == {"c": 0.25}
    await store.search("c", clustered(1), 5, tag=TAG)
    assert store._searcher._seconds == {"c": pytest.approx(0.8 * 0.25 + 0.2 * 1)}


async def test_a_search_that_cannot_run_does_not_fail_those_that_share_its_call(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.upsert("c", items(30), tag=TAG)
    monkeypatch.setattr(store._searcher, "_at_once", lambda query: None)
    vectors = [clustered(1), np.zeros((1, D)), -clustered(2)]
    work = store._searcher._make_worker()
    queries = [searcher._Query("c", each, 5, TAG, None, SearchParams(), False, None) for each in vectors]
    good, refused, two = work(queries)
    assert good == await store.search("c", vectors[0], 5, tag=TAG)
    assert isinstance(refused, InvalidRequest)
    assert two == await store.search("c", vectors[2], 5, tag=TAG)
    assert len(two) == 2


async def test_a_vector_of_length_1_is_searched_as_it_is(store: EmbeddedStore) -> None:
    """Other vectors are scaled, and the answers are the same."""
    await store.upsert("c", items(300), tag=TAG)
    [vector] = clustered(1, seed=3).astype(np.float64)
    unit = (vector / np.linalg.norm(vector)).astype(np.float32)[None]
    assert searcher._units(unit) is unit
    for scale, kind in ((1, np.float32), (1 + 1e-5, np.float32), (1e-30, np.float32), (7, np.float64), (3, ">f4")):
        scaled = (unit.astype(np.float64) * scale).astype(kind)
        np.testing.assert_allclose(searcher._units(scaled), unit, atol=1e-7)
        assert await ids(store, scaled, 9) == await ids(store, unit, 9)
    with pytest.raises(InvalidRequest, match="zero"):
        await store.search("c", np.zeros((1, D), np.float32), 3, tag=TAG)


@pytest.mark.parametrize(
    "payloads",
    [[b'["a", {}]'], [b'["a", {}, null', b'"b", {}, null]'], [b'["a", {}, null], ["b", {}, null]'], [b"{"], [b"7"]],
)
def test_a_broken_payload_is_damage(payloads: list[bytes]) -> None:
    good = searcher._columns([b'["a",{"n":1},null]', b'["b",{},"s"]'], None)
    assert good == (("a", "b"), ({"n": 1}, {}), (None, "s"))
    with pytest.raises(StorageDamaged, match="metadata of an item is broken"):
        searcher._columns(payloads, None)


def test_hits_are_a_sequence_of_hits() -> None:
    plain = [Hit("a", 0.9, {"n": 1}, "s"), Hit("b", 0.8, {})]
    hits = Hits.of(plain)
    assert (hits.ids, hits.scores, hits.sources) == (("a", "b"), (0.9, 0.8), ("s", None))
    assert hits == plain
    assert [*hits] == plain
    assert (hits[0], hits[-1]) == (plain[0], plain[1])
    assert hits[1:] == plain[1:]
    assert hits != plain[:1]
    assert not Hits.of([])
    assert eval(repr(hits)) == hits
