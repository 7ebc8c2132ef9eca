"""Tests of the decisions of maintenance: which segments it builds and from which, and what it removes, retries and
measures.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from model.files import lock_file
from service.search import building, database, maintenance
from service.search.building import Stopped
from service.search.embedded import EmbeddedStore
from service.search.indexes import Effort
from service.search.kinds import KINDS
from service.search.maintenance import Plan, plan
from service.search.store import CollectionSpec, IndexSpec, SearchParams
from tests.service.search.embedded_store import TAG, D, items, maintained_by_the_test, opened


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    async with maintained_by_the_test(tmp_path) as made:
        yield made


class Clock:
    """A replacement for the module `time` that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(maintenance, "time", made)
    return made


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


# ---- what to make of which

SEAL = 8


class Shape:
    """A view with the attributes that `plan` reads: parts (kind, vectors, deleted, whole) and a tail."""

    def __init__(self, folder: Path, kind: str, parts: list[tuple[str, int, int, bool]], tail: int) -> None:
        (folder / "index.faiss").touch()
        self.row = SimpleNamespace(spec=SimpleNamespace(index=IndexSpec(kind)))  # type: ignore[arg-type]
        self.tail = SimpleNamespace(numbers=np.arange(tail))
        self.parts = tuple(
            SimpleNamespace(
                segment=SimpleNamespace(
                    numbers=np.arange(count), whole=whole, row=SimpleNamespace(kind=of), folder=folder
                ),
                dead=np.arange(dead),
            )
            for of, count, dead, whole in parts
        )


def flat(*sizes: int) -> list[tuple[str, int, int, bool]]:
    return [("flat", size, 0, True) for size in sizes]


def first(kind: str, *sizes: int) -> list[tuple[str, int, int, bool]]:
    """Return the parts of a view: a large indexed segment, then small flat segments."""
    return [(kind, sizes[0], 0, True), *flat(*sizes[1:])]


@pytest.mark.parametrize(
    ("kind", "parts", "tail", "when", "wanted"),
    [
        # a tail is sealed at its length, beside larger segments or with smaller ones
        ("flat", [], SEAL - 1, "", None),
        ("flat", [], SEAL, "", ([], True, False)),
        ("flat", flat(100), SEAL - 1, "", None),
        ("flat", flat(SEAL + 1), SEAL, "", ([], True, False)),
        ("flat", flat(SEAL), SEAL, "", ([0], True, False)),
        # a graph takes a tail that is a good share of it
        ("hnsw", first("hnsw", 1000), 99, "", ([], True, False)),
        ("hnsw", first("hnsw", 1000), 100, "", ([0], True, True)),
        ("ivf_pq", first("ivf_pq", 1000), 999, "", ([], True, False)),
        ("ivf_pq", first("ivf_pq", 1000), 1000, "", ([0], True, False)),
        # small segments go into the large one when they are a good share of it
        ("flat", flat(1000, 100), 0, "", None),
        ("flat", flat(1000, 50, 51), 0, "", ([0, 1, 2], False, False)),
        ("hnsw", first("hnsw", 1000, 100), 0, "", None),
        ("hnsw", first("hnsw", 1000, 101), 0, "", ([0, 1], False, True)),
        ("ivf_pq", first("ivf_pq", 1000, 250), 0, "", None),
        ("ivf_pq", first("ivf_pq", 1000, 251), 0, "", ([0, 1], False, False)),
        # a graph also takes what was sealed when nobody writes
        ("hnsw", first("hnsw", 1000, SEAL), 0, "", None),
        ("hnsw", first("hnsw", 1000, SEAL), 0, "idle", ([0, 1], False, True)),
        ("hnsw", first("hnsw", 1000, SEAL - 1), 0, "idle", None),
        ("ivf_pq", first("ivf_pq", 1000, SEAL), 0, "idle", None),
        # many small ones become one
        ("flat", flat(1000, 1, 1, 1, 1), 0, "", None),
        ("flat", flat(1000, 1, 1, 1, 1, 1), 0, "", ([1, 2, 3, 4, 5], False, False)),
        # the size asks for another kind
        ("hnsw", flat(19), 0, "", None),
        ("hnsw", flat(20), 0, "", ([0], False, False)),
        # deleted or damaged
        ("flat", [("flat", 100, 20, True)], 0, "", None),
        ("flat", [*flat(100), ("flat", 100, 21, True)], 0, "", ([1], False, False)),
        ("flat", [("flat", 100, 0, False)], 100, "", ([0], False, False)),
        # settled: one segment of the right kind, no tail
        ("flat", [], 0, "settle", None),
        ("flat", [], 1, "settle", ([], True, False)),
        ("flat", flat(100), 0, "settle", None),
        ("flat", flat(100), 1, "settle", ([0], True, False)),
        ("flat", flat(100, 1), 0, "settle", ([0, 1], False, False)),
        ("hnsw", first("hnsw", 100), 1, "settle", ([0], True, True)),
    ],
)
def test_what_is_made_of_which(
    kind: str, parts: Any, tail: int, when: str, wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "FLAT_BELOW", 20)
    shape: Any = Shape(tmp_path, kind, parts, tail)
    made = plan(shape, seal_rows=SEAL, idle=when == "idle", settle=when == "settle")
    if wanted is None:
        assert made is None
    else:
        places, with_tail, grow = wanted
        assert made == Plan(tuple(shape.parts[place] for place in places), with_tail, grow)


# ---- what is left behind


async def test_a_replaced_folder_stays_for_readers_that_are_just_opening_it(
    store: EmbeddedStore, tmp_path: Path, clock: Clock
) -> None:
    await store.upsert("c", items(20), tag=TAG)
    await store.settle("c")
    [used] = (tmp_path / "segments").iterdir()
    replaced = tmp_path / "segments" / "replaced"
    replaced.mkdir()
    db = store._connect()
    for after, is_there in ((0, True), (60, True), (59, True), (2, False)):
        clock.now += after
        store._maintenance._tidy(db, idle=False)
        assert replaced.exists() is is_there
        assert used.exists()


async def test_the_views_of_dropped_collections_are_let_go(tmp_path: Path) -> None:
    one, two = await opened(tmp_path, interval_s=60.0), await opened(tmp_path, interval_s=60.0)
    for name in ("c", "d"):
        await one.upsert(name, items(5), tag=TAG)
        await two.search(name, np.ones((1, D)), 5, tag=TAG)
        await one.search(name, np.ones((1, D)), 5, tag=TAG)
    await one.drop("c")
    assert one.views.keys() == {2}
    two._maintenance._tidy(two._connect(), idle=False)
    assert two.views.keys() == {2}
    await one.close()
    await two.close()


async def test_a_closed_store_keeps_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "FLAT_BELOW", 100)
    closed: list[Any] = []
    store = await opened(tmp_path, interval_s=60.0)
    await store.upsert("c", items(20), tag=TAG)
    await store.search("c", np.ones((1, D)), 5, tag=TAG)
    await store.settle("c")
    await store.close()
    for db in store._access.connections:
        with pytest.raises(Exception, match="closed database"):
            db.execute("SELECT 1")
        closed.append(db)
    assert len(closed) >= 4
    assert not any(thread.is_alive() for thread in (store._maintenance._thread, *store._access.writer._threads))


# ---- who does it, and what goes wrong


async def test_one_process_maintains_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process waits for the lock and takes over when the first one has ended."""
    tries, tidied = 0, list[bool]()
    exclusive, tidy = maintenance.lock_file, maintenance.Maintenance._tidy

    def counted(path: Path) -> Any:
        nonlocal tries
        tries += 1
        return exclusive(path)

    def watched(self: maintenance.Maintenance, *given: Any, **named: Any) -> None:
        tidied.append(self._working.locked())
        tidy(self, *given, **named)

    monkeypatch.setattr(maintenance, "lock_file", counted)
    monkeypatch.setattr(maintenance.Maintenance, "_tidy", watched)
    held = lock_file(tmp_path / "maintenance.lock")
    assert held is not None
    store = await opened(tmp_path, interval_s=0.01, seal_rows=10)
    await store.upsert("c", items(20), tag=TAG)
    await until(lambda: tries >= 3 or bool(tidied))
    assert tidied == []
    held.close()
    await until(lambda: any(view.parts for view in store.views._views.values()))
    assert all(tidied), "changed beside `settle`"
    assert lock_file(tmp_path / "maintenance.lock") is None
    await store.close()
    again = lock_file(tmp_path / "maintenance.lock")
    assert again is not None
    again.close()


async def test_what_cannot_be_built_holds_up_no_other_and_is_tried_again_later(
    store: EmbeddedStore, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        await store.upsert(name, items(20), tag=name)
    tried: list[str] = []
    build = maintenance.build

    def fails(kind: Any, spec: CollectionSpec, *given: Any, **named: Any) -> building.Built:
        tried.append(spec.tag)
        if spec.tag == "a":
            raise OSError(28, "No space left on device")
        return build(kind, spec, *given, **named)

    monkeypatch.setattr(maintenance, "build", fails)
    db = store._connect()
    store._maintenance._seal_rows = 10
    for after, wanted in ((0, ["a", "b"]), (1, []), (maintenance.RETRY_S - 2, []), (2, ["a"]), (1, [])):
        clock.now += after
        tried.clear()
        store._maintenance._tidy(db, idle=False)
        assert tried == wanted
    assert [(await store.stats(name))["tail"] for name in ("a", "b")] == [20, 0]
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(told) == 2
    assert "collection 'a': cannot build a segment" in told[0]


async def test_maintenance_outlives_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tidy, calls = maintenance.Maintenance._tidy, 0

    def fails_once(self: maintenance.Maintenance, *given: Any, **named: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ZeroDivisionError("unexpected")
        tidy(self, *given, **named)

    monkeypatch.setattr(maintenance.Maintenance, "_tidy", fails_once)
    store = await opened(tmp_path, interval_s=0.01, seal_rows=10)
    await until(lambda: calls > 2)
    assert "maintenance of the vector store failed" in caplog.text
    await store.close()


async def test_a_build_under_way_is_given_up_when_the_store_closes(store: EmbeddedStore, tmp_path: Path) -> None:
    await store.upsert("c", items(20), tag=TAG)
    store._maintenance._stop.set()
    with pytest.raises(Stopped):
        store._maintenance._step(store._connect(), "c", settle=True)
    assert not (tmp_path / "segments").exists()


@pytest.mark.parametrize(("kind", "steps"), [("flat", 4), ("hnsw", 4), ("ivf_pq", 8), ("rabitq", 8)])
def test_a_build_asks_at_every_step_whether_to_go_on(kind: Any, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.search.indexes.ADD", 50)
    spec = CollectionSpec(TAG, D, index=IndexSpec(kind))
    vectors = np.stack([item.vector for item in items(200)])
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1

    chunk = database.Chunk(np.arange(1, 201), vectors / np.linalg.norm(vectors, axis=1, keepdims=True), [b""] * 200)
    building.build(kind, spec, [chunk], check=check)
    assert asked == steps


@pytest.mark.parametrize("fails", [False, True])
async def test_only_a_build_uses_several_threads(tmp_path: Path, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await opened(tmp_path, interval_s=60.0, build_threads=3)
    await store.upsert("c", items(20), tag=TAG)
    build, seen = maintenance.build, list[int]()

    def watched(*given: Any, **named: Any) -> building.Built:
        seen.append(faiss.omp_get_max_threads())
        if fails:
            raise OSError(28, "No space left on device")
        return build(*given, **named)

    monkeypatch.setattr(maintenance, "build", watched)

    def settle() -> int:
        try:
            store._maintenance.settle("c")
        except OSError:
            assert fails
        return int(faiss.omp_get_max_threads())

    assert await asyncio.to_thread(settle) == 1
    assert seen == [3]
    await store.close()


# ---- recall


class Half:
    """A view with an index that finds positions 0 to 4 and a scan that finds positions 0 to 9."""

    def __init__(self, *, indexed: bool = True) -> None:
        self.row = SimpleNamespace(key=1, name="c", spec=CollectionSpec(TAG, D))
        self.parts = [SimpleNamespace(segment=SimpleNamespace(index=object() if indexed else None))]

    def search(self, _queries: Any, k: int, params: SearchParams) -> Any:
        assert params.exact
        return SimpleNamespace(positions=np.arange(k)[None])


FOUND = [[(1.0, place) for place in (0, 1, 2, 3, 4, 15, 16, 17, 18, 19, 5, 6)]]


async def test_recall_is_measured_against_the_exact_answer(store: EmbeddedStore, clock: Clock) -> None:
    """Recall is that of the ten nearest items. It is measured for one query per second, and only for queries that do
    not set the search effort.
    """
    view: Any = Half()
    keeper, told = store._maintenance, list[tuple[str, float]]()
    keeper._on_recall = lambda name, ratio: told.append((name, ratio))
    one = np.ones((1, D), np.float32)
    keeper.observe(view, one, FOUND, SearchParams())
    keeper.observe(view, one, FOUND, SearchParams())  # too soon
    clock.now += maintenance.RECALL_EVERY_S
    keeper.observe(view, one, FOUND, SearchParams(ef_search=1))
    keeper.observe(view, one, FOUND, SearchParams(exact=True))
    flat_only: Any = Half(indexed=False)
    keeper.observe(flat_only, one, FOUND, SearchParams())
    assert len(keeper._samples) == 1
    keeper.observe(view, one, FOUND, SearchParams())
    assert len(keeper._samples) == 2
    keeper._measure()
    assert told == [("c", 0.5), ("c", 0.5)]
    assert keeper.stats(view.row) == {"recall": 0.5, "boost": 1.0}


def test_a_boost_waits_for_what_the_last_one_brought() -> None:
    recalled = maintenance.Recall(0.9)
    boosts = []
    for _ in range(3 * maintenance.RECALL_ENOUGH):
        recalled.add(0.5)
        boosts.append(recalled.boost)
    assert [boosts.count(boost) for boost in (1.0, 1.5, 2.25, 3.375)] == [15, 16, 16, 1]
    assert recalled.mean == 0.5


def test_recall_counts_the_true_neighbours_that_were_found() -> None:
    """A missing neighbour is -1: in the exact answer it is not expected, in the measured answer it is not found."""
    truth = np.array([[0, 1, 2, -1], [3, 4, -1, -1]])
    assert building.recall(np.array([[2, 0, 7, -1], [4, 3, 9, 8]]), truth) == 4 / 5
    assert building.recall(np.array([[-1, -1]]), np.array([[-1, -1]])) == 1.0


@pytest.mark.parametrize(
    ("target", "lacking", "effort"), [(0.79, (64,), 64), (0.81, (64,), 96), (0.81, KINDS["hnsw"].efforts, 512)]
)
def test_tuning_takes_the_least_effort_that_reaches_the_target(
    target: float, lacking: tuple[int, ...], effort: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The goal is half way between the target and perfect recall. With too little effort nine of the ten neighbours are
    found. A vector that finds itself does not count.
    """
    vectors = np.stack([item.vector for item in items(300)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(D)
    index.add(vectors)

    def search(_segment: Any, queries: Any, k: int, _alive: Any, tried: Effort) -> Any:
        positions = index.search(queries, k)[1]
        if tried.params.ef_search in lacking:
            positions[:, -1] = -1
        return SimpleNamespace(positions=positions)

    monkeypatch.setattr(building, "search", search)
    assert building.tune(index, vectors, index, "hnsw", target) == effort
