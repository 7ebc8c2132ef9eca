"""Tests of durability: writes are synced, a file is named after its content is written, deleted items do not reappear,
and a failed write affects no other write.
"""

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.files import lock_file
from service import sqlite
from service.errors import CollectionNotFound, Conflict, StorageFailed
from service.search import building, database, maintenance, reading, snapshots
from service.search.embedded import EmbeddedStore
from service.search.filters import parse_filter
from service.search.quotas import Quotas
from service.search.store import CollectionSpec, IndexSpec, Item, SearchParams, SnapshotInfo
from tests.dict_store import DictStore
from tests.service.search.embedded_store import TAG, D, build_one, items, opened, same

EVERY = parse_filter({"key": "n", "gte": 0})


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path) -> Iterator[None]:
    """Hold the lock of maintenance, so that only the tests build segments."""
    held = lock_file(tmp_path / "maintenance.lock")
    assert held is not None
    with held:
        yield


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    made = await opened(tmp_path, interval_s=60.0)
    yield made
    await made.close()


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that records the synced and renamed paths in order. SQLite's own syncs are not recorded."""
    calls: list[str] = []
    real_sync, real_rename = os.fsync, Path.replace

    def sync(handle: int) -> None:
        calls.append(f"sync {os.readlink(f'/proc/self/fd/{handle}')}")
        real_sync(handle)

    def rename(path: Path, to: Path) -> Path:
        calls.append(f"rename {path} {to}")
        return real_rename(path, to)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    return calls


async def found(store: EmbeddedStore, query: Any, **given: Any) -> list[str]:
    [hits] = await store.search("c", np.asarray(query)[None], 1000, tag=TAG, **given)
    return [hit.id for hit in hits]


# ---- synced


async def test_a_commit_is_synced_by_sqlite(store: EmbeddedStore) -> None:
    """`synchronous` must be FULL (2). With NORMAL, a power cut loses the last commits of a log in WAL mode."""
    await store.upsert("c", items(1), tag=TAG)
    assert await store._write(lambda db: db.execute("PRAGMA synchronous").fetchone()) == (2,)
    assert await store._write(lambda db: db.execute("PRAGMA journal_mode").fetchone()) == ("wal",)


async def test_a_snapshot_is_synced_before_it_gets_its_name(
    store: EmbeddedStore, tmp_path: Path, order: list[str]
) -> None:
    await store.upsert("c", items(3), tag=TAG)
    taken = await store.snapshot("c")
    folder = tmp_path / "snapshots" / "c"
    part = folder / f".{taken.name}.part"
    assert order == [f"sync {part}", f"rename {part} {folder / taken.name}.sqlite3", f"sync {folder}"]
    assert [path.name for path in folder.iterdir()] == [f"{taken.name}.sqlite3"]


async def test_a_segment_is_synced_before_it_gets_its_name(
    store: EmbeddedStore, tmp_path: Path, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "FLAT_BELOW", 10)
    await store.create("c", CollectionSpec(TAG, D, index=IndexSpec("hnsw")))
    await store.upsert("c", items(20), tag=TAG)
    await store.settle("c")
    [folder] = (tmp_path / "segments").iterdir()
    part = folder.with_name(f".{folder.name}.part")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["index.faiss", "numbers.npy", "payloads.bin", "payloads.npy", "vectors.faiss"]
    assert sorted(order[:5]) == [f"sync {part / name}" for name in names]
    assert order[5:] == [f"sync {part}", f"rename {part} {folder}", f"sync {folder.parent}"]


# ---- what is deleted or changed stays so


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
async def test_what_was_deleted_of_an_older_segment_stays_so(
    tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed items are tested too, while newer segments are built, merged and extended, and after the store is
    reopened.
    """
    monkeypatch.setattr(building, "FLAT_BELOW", 100)
    monkeypatch.setattr(maintenance, "MANY", 1)
    store, plain = await opened(tmp_path, interval_s=60.0), DictStore()
    first = items(200)
    for one in (store, plain):
        await one.create("c", CollectionSpec(TAG, D, index=IndexSpec(kind)))
        await one.upsert("c", first, tag=TAG)
    await store.settle("c")
    for one in (store, plain):
        await one.delete("c", ["i3"])
        await one.patch("c", "i2", {"even": False})
    await same(store, plain, 9)
    for part, step in enumerate(("seal", "seal", "merge", "grow")):
        for one in (store, plain):
            if step == "seal":
                await one.upsert("c", items(8, seed=part + 1, prefix=f"{part}-"), tag=TAG)
        if step == "grow":
            await store.settle("c")
        else:
            build_one(store, seal_rows=1)
        segments = (await store.stats("c"))["segments"]
        assert len(segments) == {"seal": part + 2, "merge": 2, "grow": 1}[step]
        await same(store, plain, part)
        await store.close()
        store = await opened(tmp_path, interval_s=60.0)
        for where in (None, EVERY):
            answer = await found(store, first[3].vector, where=where)
            assert "i3" not in answer
            assert len(set(answer)) == len(answer) == await plain.count("c")
        await same(store, plain, part)
    await store.close()


async def test_records_of_the_deleted_go_when_no_segment_needs_them(store: EmbeddedStore) -> None:
    await store.create("c", CollectionSpec(TAG, D, index=IndexSpec("flat")))
    await store.upsert("c", items(200), tag=TAG)
    await store.settle("c")
    await store.delete("c", [f"i{n}" for n in range(60)])
    await store.patch("c", "i70", {"n": 7})
    await store.settle("c")
    [segment] = (await store.stats("c"))["segments"]
    assert (segment["vectors"], segment["deleted"]) == (140, 0)

    def records(db: sqlite3.Connection) -> list[int]:
        return [db.execute(f"SELECT count(*) FROM {table}_1").fetchone()[0] for table in ("removed", "edited")]

    assert await store._read(records) == [0, 0]


@pytest.mark.parametrize("before", ["deleted", "changed"])
async def test_what_changes_while_a_segment_is_built_is_not_lost(
    tmp_path: Path, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The items are deleted and changed after the build has read them. The records of these changes must remain for the
    next process that opens the store. The number of earlier changes must not matter.
    """
    store, plain = await opened(tmp_path, interval_s=60.0), DictStore()
    for one in (store, plain):
        await one.create("c", CollectionSpec(TAG, D, index=IndexSpec("flat")))
        await one.upsert("c", items(50), tag=TAG)
        for n in range(20, 26):
            await (one.delete("c", [f"i{n}"]) if before == "deleted" else one.patch("c", f"i{n}", {"n": -n}))
    await same(store, plain, 0)
    loop, real = asyncio.get_running_loop(), maintenance.write

    async def change() -> None:
        for one in (store, plain):
            await one.delete("c", ["i3"])
            await one.patch("c", "i4", {"even": False})
            await one.upsert("c", items(3, seed=9, prefix="new"), tag=TAG)
            await one.delete("c", ["new1"])
            await one.patch("c", "new2", {"n": 77})

    def write(folder: Path, built: building.Built) -> Any:
        asyncio.run_coroutine_threadsafe(change(), loop).result(10)
        return real(folder, built)

    with monkeypatch.context() as patch:
        patch.setattr(maintenance, "write", write)
        await asyncio.to_thread(build_one, store, seal_rows=1)
    await same(store, plain, 1)
    await store.close()
    again = await opened(tmp_path, interval_s=60.0)
    assert [(len(again.views._views[1].parts)), (await again.stats("c"))["tail"]] == [1, 2]
    await same(again, plain, 2, k=100)
    await again.close()


async def test_what_was_deleted_from_the_tail_stays_so_when_what_lies_before_it_is_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item is written, found, deleted and searched for again while a segment is built. The view must know that it is
    deleted.
    """
    store, plain = await opened(tmp_path, interval_s=60.0), DictStore()
    for one in (store, plain):
        await one.upsert("c", items(20), tag=TAG)
    loop, real = asyncio.get_running_loop(), maintenance.write

    async def change() -> None:
        for one in (store, plain):
            await one.upsert("c", items(3, seed=9, prefix="new"), tag=TAG)
        await same(store, plain, 0, k=100)
        for one in (store, plain):
            await one.delete("c", ["new1"])
        await same(store, plain, 0, k=100)

    def write(folder: Path, built: building.Built) -> Any:
        asyncio.run_coroutine_threadsafe(change(), loop).result(10)
        return real(folder, built)

    with monkeypatch.context() as patch:
        patch.setattr(maintenance, "write", write)
        await asyncio.to_thread(build_one, store, seal_rows=1)
    await same(store, plain, 0, k=100)
    assert (await store.stats("c"))["tail"] == 2
    await store.close()


async def test_another_store_learns_of_changes_to_its_tail_when_they_are_sealed_elsewhere(tmp_path: Path) -> None:
    """Building a segment removes the records of its items. Records of later items must remain."""
    one, two = await opened(tmp_path, interval_s=60.0), await opened(tmp_path, interval_s=60.0)
    plain = DictStore()
    for part in range(2):
        for store in (one, plain):
            await store.upsert("c", items(20, seed=part, prefix=f"{part}-"), tag=TAG)
    await same(two, plain, 0)
    for store in (one, plain):
        await store.upsert("c", items(5, seed=7, prefix="late"), tag=TAG)
    await same(two, plain, 1)
    view = one._maintenance._current(one._connect(), "c")
    for store in (one, plain):
        await store.upsert("c", items(5, seed=8, prefix="later"), tag=TAG)
    await same(two, plain, 2)
    for store in (one, plain):
        await store.delete("c", ["later1", "0-3"])
        await store.patch("c", "later2", {"even": False, "n": 2})
        await store.patch("c", "1-2", {"even": False, "n": 3})
    now = one._maintenance._current(one._connect(), "c")
    sealed = now.row.sealed
    assert sealed == 0
    db = one._connect()
    new = _segment_of(one, db, view.last)
    with sqlite.transaction(db):
        assert database.swap_segments(db, now.row, [], new, sealed=view.last, point=now.point)
    one.stamp.bump()
    await same(two, plain, 3, k=100)
    await same(one, plain, 3, k=100)
    await one.close()
    await two.close()


def _segment_of(store: EmbeddedStore, db: sqlite3.Connection, last: int) -> database.SegmentRow:
    """Build a flat segment of the items up to a number, without putting it into use."""
    row = database.find(db, "c")
    built = building.build("flat", row.spec, list(database.read_items(db, row, after=0, to=last)))
    folder = building.new_folder()
    files = building.write(store.path.parent / "segments" / folder, built)
    numbers = built.numbers
    return database.SegmentRow(0, folder, "flat", int(numbers[0]), int(numbers[-1]), len(numbers), 1, files)


async def test_a_segment_of_outdated_ones_is_not_taken(store: EmbeddedStore) -> None:
    """Where locks do not work, two processes may build at once. The slower one must detect that the other one finished
    first.
    """
    await store.upsert("c", items(20), tag=TAG)
    db = store._connect()
    before = database.find(db, "c")
    new = _segment_of(store, db, 20)
    with sqlite.transaction(db):
        assert database.swap_segments(db, before, [], new, sealed=20, point=database.Point())
        assert not database.swap_segments(db, before, [], new, sealed=20, point=database.Point())
    now = database.find(db, "c")
    old = database.segments(db, now.key)
    with sqlite.transaction(db):
        assert database.swap_segments(db, now, old, new, sealed=20, point=database.Point())
        assert not database.swap_segments(db, now, old, new, sealed=20, point=database.Point())
    assert len(database.segments(db, now.key)) == 1
    store.stamp.bump()
    assert len(await found(store, np.ones(D))) == 20


async def test_a_part_that_is_made_anew_moves_no_other(tmp_path: Path) -> None:
    """The first of two segments is rebuilt. The second segment's items must not return to the tail, and the items in
    the tail must remain there.
    """
    store = await opened(tmp_path, interval_s=60.0)
    await store.create("c", CollectionSpec(TAG, D, index=IndexSpec("flat")))
    await store.upsert("c", items(100), tag=TAG)
    await store.settle("c")
    await store.upsert("c", items(20, seed=1, prefix="more"), tag=TAG)
    build_one(store, seal_rows=1)
    await store.upsert("c", items(5, seed=2, prefix="last"), tag=TAG)
    await store.delete("c", [f"i{n}" for n in range(50)])
    build_one(store, seal_rows=1000)
    for _ in range(2):
        stats = await store.stats("c")
        assert ([segment["vectors"] for segment in stats["segments"]], stats["tail"]) == ([50, 20], 5)
        answer = await found(store, np.ones(D))
        assert len(answer) == len(set(answer)) == 75
        await store.close()
        store = await opened(tmp_path, interval_s=60.0)
    await store.close()


async def test_what_is_sealed_unseen_is_in_no_tail(tmp_path: Path) -> None:
    """Another store wrote and sealed items since this store last looked. This store must hold those items once."""
    one, two = await opened(tmp_path, interval_s=60.0), await opened(tmp_path, interval_s=60.0)
    await one.upsert("c", items(20), tag=TAG)
    assert len(await found(two, np.ones(D))) == 20
    await one.upsert("c", items(30, seed=1, prefix="more"), tag=TAG)
    await one.settle("c")
    await one.upsert("c", items(5, seed=2, prefix="last"), tag=TAG)
    answer = await found(two, np.ones(D))
    assert len(answer) == len(set(answer)) == 55
    await one.close()
    await two.close()


# ---- together, and each by itself


async def test_delete_by_filter_leaves_what_is_written_meanwhile(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_PAGE", 1)
    await store.upsert("c", items(3), tag=TAG)
    write, written = store._write, False

    async def between(work: Any, **named: Any) -> Any:
        nonlocal written
        done = await write(work, **named)
        if not written:
            written = True
            await store.upsert("c", [Item("new", np.ones(D), {"n": 7}), Item("i2", np.ones(D), {"n": 8})], tag=TAG)
        return done

    monkeypatch.setattr(store, "_write", between)
    assert await store.delete_where("c", EVERY) == 2
    assert [item.id for item in (await store.scroll("c")).items] == ["new", "i2"]


async def test_delete_by_filter_of_a_collection_that_is_dropped_meanwhile(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_PAGE", 1)
    await store.upsert("c", items(3), tag=TAG)
    write, dropped = store._write, False

    async def between(work: Any, **named: Any) -> Any:
        nonlocal dropped
        done = await write(work, **named)
        if not dropped:
            dropped = True
            await store.drop("c")
        return done

    monkeypatch.setattr(store, "_write", between)
    with pytest.raises(CollectionNotFound):
        await store.delete_where("c", EVERY)


async def held_back(store: EmbeddedStore, writes: Sequence[Any]) -> list[Any]:
    """Hold several writes back so that they are committed together, and return their results or errors."""
    go_on, started = threading.Event(), threading.Event()
    first = asyncio.create_task(store._write(lambda db: (started.set(), go_on.wait(20))))
    await asyncio.to_thread(started.wait, 20)
    tasks = [asyncio.create_task(write) for write in writes]
    await asyncio.sleep(0)  # each is queued in its first step
    assert len(store._access.writer._waiting) == len(tasks)
    go_on.set()
    await first
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_write_that_the_disk_refuses_takes_no_other_with_it(store: EmbeddedStore) -> None:
    await store.upsert("c", items(3), tag=TAG)

    def full(db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM items_1")
        raise sqlite3.OperationalError("database or disk is full")

    more = [items(1, seed=n, prefix=f"more{n}-") for n in range(2)]
    results = await held_back(
        store, [store.upsert("c", more[0], tag=TAG), store._write(full), store.upsert("c", more[1], tag=TAG)]
    )
    assert [type(result).__name__ for result in results] == ["CollectionInfo", "InsufficientStorage", "CollectionInfo"]
    assert {item.id for item in (await store.scroll("c")).items} == {"i0", "i1", "i2", "more0-0", "more1-0"}
    assert len(await found(store, np.ones(D))) == 5


async def test_a_write_that_is_refused_leaves_nothing_of_itself(store: EmbeddedStore) -> None:
    """If a write is refused in a common commit, only this write is undone."""
    await store.upsert("c", items(3), tag=TAG)

    def refused(db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM items_1 WHERE id = 'i0'")
        raise Conflict("no")

    results = await held_back(store, [store._write(refused), store.upsert("c", items(1, prefix="more"), tag=TAG)])
    assert [type(result).__name__ for result in results] == ["Conflict", "CollectionInfo"]
    assert {item.id for item in (await store.scroll("c")).items} == {"i0", "i1", "i2", "more0"}


async def test_an_idempotency_key_counts_for_a_day(store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    start, hour = time.time(), 3600
    new = items(2)

    async def write_at(now: float) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: now)
            await store.upsert("c", new, tag=TAG, request_key="key")
        return await store.delete("c", ["i0"])

    assert await write_at(start) == 1
    assert await write_at(start + 23 * hour) == 0
    assert await write_at(start + 25 * hour) == 1
    assert await store._read(lambda db: db.execute("SELECT count(*) FROM requests").fetchone()) == (1,)


@pytest.mark.parametrize(
    "change", [{"source": "s3://x"}, {"digest": "a" * 64}, {"metadata": {"n": 1}}, {"vector": -np.ones(D)}]
)
async def test_an_idempotency_key_covers_every_part_of_an_item(store: EmbeddedStore, change: dict[str, Any]) -> None:
    whole: dict[str, Any] = {"id": "x", "vector": np.ones(D), "metadata": {}, "source": None, "digest": None}
    await store.upsert("c", [Item(**whole)], tag=TAG, request_key="key")
    with pytest.raises(Conflict, match="idempotency key"):
        await store.upsert("c", [Item(**{**whole, **change})], tag=TAG, request_key="key")
    await store.upsert("d", [Item(**{**whole, **change})], tag=TAG, request_key="key")
    assert await store.count("d") == 1


# ---- one state


async def test_a_page_is_of_one_moment(store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that is deleted between the reads of its row and of its vector is still on the page, complete."""
    await store.upsert("c", items(3), tag=TAG)
    db = store._connect()

    read = reading.items_of

    def items_of(reader: sqlite3.Connection, row: Any, rows: Any) -> Any:
        with sqlite.transaction(db):
            database.remove(db, 1, [2])
        return read(reader, row, rows)

    monkeypatch.setattr(reading, "items_of", items_of)
    assert [item.id for item in (await store.scroll("c")).items] == ["i0", "i1", "i2"]
    assert [item.id for item in (await store.scroll("c")).items] == ["i0", "i2"]


async def test_a_snapshot_is_of_one_moment(store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write during a snapshot does not wait for it and is not part of it."""
    await store.upsert("c", items(3), tag=TAG)
    make, db = database.make, store._connect()
    db.execute("PRAGMA busy_timeout = 0")

    def between(*given: Any, **options: Any) -> database.Row:
        row = make(*given, **options)
        with sqlite.transaction(db):
            database.remove(db, 1, [2])
        return row

    monkeypatch.setattr(database, "make", between)
    taken = await store.snapshot("c")
    monkeypatch.undo()
    assert (taken.count, await store.count("c")) == (3, 2)
    assert (await store.restore("again", "c", taken.name)).count == 3
    assert [item.id for item in (await store.scroll("again")).items] == ["i0", "i1", "i2"]


async def test_a_dropped_collection_leaves_no_rows_and_no_tables(store: EmbeddedStore) -> None:
    await store.upsert("c", items(30), tag=TAG, request_key="key")
    await store.settle("c")
    await store.patch("c", "i1", {"n": 0})
    await store.delete("c", ["i2"])
    await store.drop("c")

    def left(db: sqlite3.Connection) -> list[Any]:
        counts = [db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("segments", "requests")]
        tables = db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return [*counts, [name for (name,) in tables if name.endswith("_1")]]

    assert await store._read(left) == [0, 0, []]


# ---- names and versions


async def test_a_store_of_another_version_is_refused(tmp_path: Path) -> None:
    await (await opened(tmp_path)).close()
    with closing(sqlite3.connect(tmp_path / "search.sqlite3")) as db:
        db.execute("PRAGMA user_version = 5")
    with pytest.raises(StorageFailed, match=r"not a vector store of this version .*version 5; expected"):
        await opened(tmp_path)


async def test_a_name_that_is_taken_while_a_restore_goes_on(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.upsert("c", items(3), tag=TAG)
    taken = await store.snapshot("c")
    read, loop = snapshots.read, asyncio.get_running_loop()

    def meanwhile(path: Path) -> Any:
        work = store.create("again", CollectionSpec(TAG, D))
        asyncio.run_coroutine_threadsafe(work, loop).result(10)
        return read(path)

    monkeypatch.setattr(snapshots, "read", meanwhile)
    with pytest.raises(Conflict, match="'again' is a collection already"):
        await store.restore("again", "c", taken.name)
    assert await store.count("again") == 0
    assert [info.name for info in await store.collections()] == ["again", "c"]
    assert await store._read(database.hidden) == []


async def test_a_collection_that_is_being_restored_is_not_listed(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.upsert("c", items(3), tag=TAG)
    taken = await store.snapshot("c")
    insert, seen = snapshots.insert, list[list[str]]()

    def watched(db: sqlite3.Connection, **given: Any) -> None:
        seen.append([row.name for row in database.every(db)])
        insert(db, **given)

    monkeypatch.setattr(snapshots, "insert", watched)
    await store.restore("again", "c", taken.name)
    assert seen == [["c"]]
    assert [info.name for info in await store.collections()] == ["again", "c"]


async def test_a_snapshot_of_more_than_one_page_comes_back(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "_CHUNK", 7)
    await store.upsert("c", items(30), tag=TAG)
    await store.delete("c", ["i3"])
    taken = await store.snapshot("c")
    assert (await store.restore("again", "c", taken.name)).count == 29
    pages = [(await store.scroll(name)).items for name in ("c", "again")]
    assert [item.id for item in pages[0]] == [item.id for item in pages[1]]
    assert len(await store.search("again", np.ones((1, D)), 5, tag=TAG, params=SearchParams(exact=True))) == 1


async def test_snapshots_that_fail_or_meet_leave_the_others(
    store: EmbeddedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Snapshots in the same moment get different names, and all of them are whole. A failed snapshot leaves no file."""
    await store.upsert("c", items(3), tag=TAG)
    now, write = time.time(), snapshots._write
    met: list[SnapshotInfo] = []

    def meets(source: Path, collection: str, target: Path) -> None:
        if len(met) < 2:  # a snapshot that begins while this one is written, and an uploaded one
            patch.setattr(snapshots, "_write", write)
            met.append(snapshots.take(source, collection, tmp_path / "snapshots", Quotas()))
            (tmp_path / "upload").write_bytes((tmp_path / "snapshots" / "c" / f"{met[0].name}.sqlite3").read_bytes())
            met.append(snapshots.add(tmp_path / "snapshots", collection, tmp_path / "upload", Quotas()))
        write(source, collection, target)

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now)
        patch.setattr(snapshots, "_write", meets)
        taken = await store.snapshot("c")
        last = await store.snapshot("c")
    every = [taken, *met, last]
    assert len({info.name for info in every}) == 4
    assert await store.snapshots("c") == every
    assert {info.count for info in every} == {3}
    for info in every[1:]:
        await store.restore(f"again{info.name[-4:-1]}", "c", info.name)
        await store.drop_snapshot("c", info.name)

    def full(*_given: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "_write", full)
        handles = []
        for _ in range(3):
            with pytest.raises(StorageFailed, match="disk is full"):
                await store.snapshot("c")
            handles.append(len(os.listdir("/proc/self/fd")))
    assert len(set(handles)) == 1
    assert [path.name for path in (tmp_path / "snapshots" / "c").iterdir()] == [f"{taken.name}.sqlite3"]
    await store.restore("again", "c", taken.name)
    assert list((tmp_path / "snapshots").glob(".*")) == []
