"""Tests of the embedded store with a removed or replaced folder, a full disk, a locked database and damaged pages.

What is acknowledged must be in the folder at the path of the store, and a fault of one collection must not affect
another.
"""

import asyncio
import dataclasses
import json
import os
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from service import disk, sqlite
from service.erasure import erase_image, erase_unreferenced
from service.errors import (
    Conflict,
    InsufficientStorage,
    QuotaExceeded,
    StorageBusy,
    StorageDamaged,
    StorageReplaced,
)
from service.features.patch_store import PatchStore
from service.generations import Generations
from service.keys import KeyStore
from service.originals import Originals
from service.search import database, snapshots
from service.search.embedded import EmbeddedStore, open_embedded
from service.search.filters import parse_filter
from service.search.quotas import Quotas
from service.search.schema import SCHEMA
from service.search.store import CollectionSpec, Item
from service.search.threads import Change
from service.search.writing import Writer
from service.stamp import Stamp
from tests.service.search.embedded_store import TAG, D, items, maintained_by_the_test, opened

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    made = await opened(tmp_path / "data", interval_s=60.0)
    yield made
    await made.close()


async def hits(store: EmbeddedStore, collection: str) -> int:
    [found] = await store.search(collection, np.ones((1, D)), 1000, tag=TAG)
    return len(found)


# ---- a folder that is removed or replaced


def unlink(folder: Path) -> None:
    folder.rename(folder.with_name("gone"))


def replace_with_empty(folder: Path) -> None:
    unlink(folder)
    folder.mkdir()


def replace_file(folder: Path) -> None:
    """Put a copy of the database in its place, as a restore by hand does."""
    path = folder / "search.sqlite3"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def replace_log(folder: Path) -> None:
    (folder / "search.sqlite3-wal").unlink()


def files(folder: Path) -> set[str]:
    """Return the names of the files in a folder, except the lock that maintenance makes at its first round, and the
    log, which a thread that connects late makes again, empty."""
    return {path.name for path in folder.glob("**/*")} - {"maintenance.lock", "search.sqlite3-wal"}


@pytest.mark.parametrize("change", [unlink, replace_with_empty, replace_file, replace_log])
async def test_nothing_is_acknowledged_that_the_folder_does_not_have(
    store: EmbeddedStore, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    await store.upsert("c", items(3), tag=TAG)
    change(tmp_path / "data")
    before = files(tmp_path / "data")
    for write in (
        store.upsert("c", items(1, prefix="new"), tag=TAG),
        store.upsert("new", items(1), tag=TAG),
        store.create("other", CollectionSpec(TAG, D)),
        store.patch("c", "i1", {"n": 7}),
        store.delete("c", ["i0"]),
        store.drop("c"),
    ):
        with pytest.raises(StorageReplaced, match="removed or replaced"):
            await write
    assert await hits(store, "c") == 3
    assert files(tmp_path / "data") == before


async def test_a_replaced_folder_gets_no_new_files_and_is_told(store: EmbeddedStore, tmp_path: Path) -> None:
    await store.upsert("c", items(3), tag=TAG)
    assert not (await store.health()).is_replaced
    replace_with_empty(tmp_path / "data")
    assert (await store.health()).is_replaced
    with pytest.raises(StorageReplaced):
        await store.snapshot("c")
    with pytest.raises(StorageReplaced):
        store.upload_path()
    with pytest.raises(StorageReplaced):
        await store.restore_files({"again": tmp_path / "gone" / "nothing"}, {})
    assert list((tmp_path / "data").iterdir()) == []


def test_a_folder_that_another_thread_makes_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = disk.InPlace(tmp_path / "new")

    def look_just_before_it_is_made(path: str) -> None:
        monkeypatch.undo()
        (tmp_path / "new").mkdir()
        assert place.holds()

    monkeypatch.setattr(disk, "identity_of", look_just_before_it_is_made)
    assert place.holds()


async def test_a_connection_never_opens_another_store_at_the_same_path(store: EmbeddedStore, tmp_path: Path) -> None:
    await store.upsert("c", items(3), tag=TAG)
    unlink(tmp_path / "data")
    await (await opened(tmp_path / "data")).close()
    with pytest.raises(StorageReplaced):
        store._connect()


async def test_a_folder_that_comes_back_is_used_again(store: EmbeddedStore, tmp_path: Path) -> None:
    await store.upsert("c", items(3), tag=TAG)
    unlink(tmp_path / "data")
    with pytest.raises(StorageReplaced):
        await store.delete("c", ["i0"])
    (tmp_path / "gone").rename(tmp_path / "data")
    assert await store.delete("c", ["i0"]) == 1
    assert not (await store.health()).is_replaced


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this container may not mount a tmpfs (CAP_SYS_ADMIN)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def free(folder: Path) -> int:
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


@ROOT_ONLY
async def test_deletions_work_on_a_full_disk(small_disk: Path) -> None:
    """Needs root. The disk is filled by writes, and then emptied by deletions of several kinds."""
    (small_disk / "other").write_bytes(bytes(24 * 2**20))
    async with maintained_by_the_test(small_disk) as store:
        with pytest.raises(InsufficientStorage, match="full"):
            await fill(store)
        assert (small_disk / "reserve").stat().st_size == store._access.reserve.size
        (small_disk / "rest").write_bytes(bytes(free(small_disk)))
        assert (await store.health()).is_full
        before = await store.count("c")
        for part in range(3):
            assert await store.delete("c", [f"{part}-{n}" for n in range(20)]) == 20
        where = parse_filter({"key": "part", "eq": "3-"})
        assert await store.delete_where("c", where) == 20
        assert await store.count("c") == before - 80
        await store.drop("c")
        (small_disk / "rest").unlink()
        (small_disk / "other").unlink()
        await store.upsert("d", big("again"), tag=TAG)
        assert (small_disk / "reserve").stat().st_size == store._access.reserve.size  # made again
        assert not (await store.health()).is_full


@ROOT_ONLY
async def test_everything_can_be_read_and_opened_on_a_full_disk(small_disk: Path) -> None:
    """Needs root. Keys and models are read again while the service runs, and after it has been started again."""
    keys, models = KeyStore(small_disk), Generations(small_disk)
    keys.create("one", ["read"])
    models.add("a" * 64, "model_a", Path("artifacts/a"), "fake", "fp32", reason="a test")
    store = await open_embedded(small_disk, threads=1)
    await store.upsert("c", items(3), tag=TAG)
    (small_disk / "rest").write_bytes(bytes(free(small_disk)))
    assert [key.name for key in keys.all_keys()] == ["one"]
    assert [model.name for model in models.all()] == ["model_a"]
    await store.close()
    del models  # with its open connection
    assert free(small_disk) < 2**17
    (small_disk / "more").write_bytes(bytes(free(small_disk)))
    store = await open_embedded(small_disk, threads=1)
    assert [key.name for key in KeyStore(small_disk).all_keys()] == ["one"]
    assert [model.name for model in Generations(small_disk).all()] == ["model_a"]
    assert await store.delete("c", ["i0"]) == 1
    await store.close()
    assert (small_disk / "reserve").stat().st_size > 0


async def fill(store: EmbeddedStore) -> None:
    for part in range(1000):
        await store.upsert("c", big(f"{part}-"), tag=TAG)


def big(prefix: str) -> list[Item]:
    return [Item(f"{prefix}{n}", np.ones(D), {"part": prefix, "text": "x" * 15000}) for n in range(20)]


class FakeReserve(disk.Reserve):
    """A reserve of 100 bytes on a disk whose free bytes the test sets."""

    free_bytes = 200

    def _free(self) -> int:
        return self.free_bytes

    def _make(self) -> bool:
        return self.free_bytes >= self.size and super()._make()


def test_the_reserve_is_for_deletions_and_comes_back(tmp_path: Path) -> None:
    """Here the disk is a fake, so no root is needed."""
    path, reserve = tmp_path / "search.sqlite3", FakeReserve(tmp_path, 100)
    sqlite.prepare(path, SCHEMA)
    db = sqlite.connect(path)
    write = Writer(lambda: db, Stamp(tmp_path / "stamp"), disk.InPlace(path), reserve).make()

    def full(_: sqlite3.Connection) -> str:
        if (tmp_path / "reserve").exists():
            raise sqlite3.OperationalError("database or disk is full")
        return "done"

    def other(_: sqlite3.Connection) -> str:
        return "written"

    assert write([Change(other)]) == ["written"]
    assert (tmp_path / "reserve").stat().st_size == 100  # made because the disk is nearly full
    [refused] = write([Change(full)])
    assert isinstance(refused, InsufficientStorage)
    assert (tmp_path / "reserve").exists()
    assert write([Change(other), Change(full, frees=True)]) == ["written", "done"]
    assert not (tmp_path / "reserve").exists()
    reserve.free_bytes = 0
    [refused] = write([Change(other)])
    assert isinstance(refused, InsufficientStorage)
    assert "kept for deletions" in refused.detail
    assert reserve.is_short()
    assert write([Change(full, frees=True)]) == ["done"]
    db.execute("CREATE TABLE deleted AS SELECT zeroblob(100000) x")
    db.execute("DROP TABLE deleted")
    assert write([Change(other)]) == ["written"]  # deleted rows have left space within the database
    assert not (tmp_path / "reserve").exists()
    reserve.free_bytes = 124
    assert not reserve.keep()  # a deletion may be about to use this space
    assert not (tmp_path / "reserve").exists()
    reserve.free_bytes = 200
    assert write([Change(other)]) == ["written"]
    assert (tmp_path / "reserve").exists()
    assert not reserve.is_short()
    db.close()


def test_the_reserve_of_a_killed_process_is_made_whole(tmp_path: Path) -> None:
    reserve = FakeReserve(tmp_path, 100)
    (tmp_path / "reserve").write_bytes(b"")
    assert reserve.is_short()
    assert reserve.keep()
    assert (tmp_path / "reserve").stat().st_size == 100


# ---- a locked database


async def test_a_database_that_stays_locked_is_busy_and_each_write_waits_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_BUSY_MS", 100)
    store = await opened(tmp_path, interval_s=60.0)
    try:
        await store.upsert("c", items(3), tag=TAG)
        with closing(sqlite3.connect(tmp_path / "search.sqlite3", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            started = time.monotonic()
            writes = [store.upsert("c", items(1, prefix=f"new{n}-"), tag=TAG) for n in range(40)]
            results = await asyncio.gather(*writes, return_exceptions=True)
            assert {type(result) for result in results} == {StorageBusy}
            assert time.monotonic() - started < 20 * 0.1  # together, not one after the other
            other.execute("ROLLBACK")
        assert results[0].headers == {"Retry-After": "5"}  # type: ignore[union-attr]
        assert (await store.upsert("c", items(1, prefix="new"), tag=TAG)).count == 4
    finally:
        await store.close()


# ---- damaged pages


def damage(folder: Path, *tables: str) -> None:
    """Overwrite the root pages of tables and indexes."""
    path = folder / "search.sqlite3"
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (size,) = db.execute("PRAGMA page_size").fetchone()
        pages = dict(db.execute("SELECT name, rootpage FROM sqlite_master").fetchall())
    with path.open("r+b") as file:
        for table in tables:
            file.seek((pages[table] - 1) * size)
            file.write(b"\xff" * size)


@pytest.fixture
async def site(tmp_path: Path) -> Path:
    """Return the folder of a store with the collections "c" and "d", and a snapshot of "c"."""
    store = await opened(tmp_path, interval_s=60.0)
    for name in ("c", "d"):
        await store.upsert(name, items(20), tag=TAG)
    await store.snapshot("c")
    await store.close()
    return tmp_path


async def test_three_damaged_pages_stop_one_collection(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(site, "items_1", "vectors_1", "sqlite_autoindex_items_1_1")
    store = await opened(site, interval_s=60.0)
    try:
        assert "collection 'c' is damaged" in caplog.text
        assert [(info.name, info.is_damaged) for info in await store.collections()] == [("c", True), ("d", False)]
        assert (await store.health()).damaged == ("c",)
        for use in (
            store.upsert("c", items(1), tag=TAG),
            store.delete("c", ["i1"]),
            store.delete_where("c", parse_filter({"key": "n", "gte": 0})),
            store.patch("c", "i1", {"n": 1}),
            store.get("c", ["i1"]),
            store.scroll("c"),
            store.sample("c", 3),
            store.count("c", parse_filter({"key": "n", "gte": 0})),
            store.search("c", np.ones((1, D)), 3, tag=TAG),
            store.stats("c"),
            store.snapshot("c"),
        ):
            with pytest.raises(StorageDamaged, match=r"'c' is damaged .*delete it, and then restore a snapshot"):
                await use
        assert (await store.upsert("d", items(1, prefix="new"), tag=TAG)).count == 21
        assert await hits(store, "d") == 21
    finally:
        await store.close()


async def test_a_snapshot_repairs_a_damaged_collection(site: Path) -> None:
    damage(site, "items_1", "vectors_1", "sqlite_autoindex_items_1_1")
    store = await opened(site, interval_s=60.0)
    [taken] = await store.snapshots("c")
    await store.drop("c")
    await store.restore("c", "c", taken.name)
    assert (await store.health()).damaged == ()
    assert [await hits(store, name) for name in ("c", "d")] == [20, 20]
    await store.close()
    store = await opened(site, interval_s=60.0)
    assert (await store.health()).damaged == ()
    assert [await hits(store, name) for name in ("c", "d")] == [20, 20]
    await store.close()


async def test_a_backup_replaces_a_damaged_collection(site: Path) -> None:
    damage(site, "items_1")
    store = await opened(site, interval_s=60.0)
    [path] = (site / "snapshots" / "c").iterdir()
    await store.restore_files({"c": path}, {}, replace=True)
    assert (await store.health()).damaged == ()
    assert await hits(store, "c") == 20
    await store.close()


async def test_images_of_a_damaged_collection_are_not_erased(site: Path) -> None:
    """Nobody knows any more which images its items need."""
    damage(site, "items_1")
    store, originals = await opened(site, interval_s=60.0), Originals(site / "originals")
    digest = await originals.put(b"photo")
    for path in (site / "originals").glob("*/*/*"):
        os.utime(path, (1e9, 1e9))
    patches = PatchStore(site / "patches.sqlite3", 0)
    for erase in (erase_unreferenced(store, originals, patches), erase_image(store, originals, patches, digest)):
        with pytest.raises(StorageDamaged, match="'c' is damaged"):
            await erase
    assert await originals.get(digest) == b"photo"
    await originals.close()
    await store.close()


async def test_damage_that_shows_later_marks_the_collection_at_its_first_use(site: Path) -> None:
    """The items of a segment are not read from the database when the store opens."""
    store = await opened(site, interval_s=60.0)
    await store.settle("c")
    await store.close()
    damage(site, "sqlite_autoindex_items_1_1")
    store = await opened(site, interval_s=60.0)
    assert (await store.health()).damaged == ()
    assert await hits(store, "c") == 20  # from the segment
    several = await asyncio.gather(
        store.upsert("d", items(1, prefix="new"), tag=TAG),
        store.upsert("c", items(1, prefix="new"), tag=TAG),
        store.upsert("d", items(1, prefix="more"), tag=TAG),
        return_exceptions=True,
    )
    assert [type(result).__name__ for result in several] == ["CollectionInfo", "StorageDamaged", "CollectionInfo"]
    assert (await store.health()).damaged == ("c",)
    with pytest.raises(StorageDamaged, match="'c' is damaged"):
        await hits(store, "c")
    assert await hits(store, "d") == 22
    await store.drop("c")
    assert [info.name for info in await store.collections()] == ["d"]
    await store.close()


async def test_a_drop_that_finds_the_damage_leaves_the_tables(site: Path) -> None:
    store = await opened(site, interval_s=60.0)
    await store.settle("c")
    await store.close()
    damage(site, "sqlite_autoindex_items_1_1")
    store = await opened(site, interval_s=60.0)
    await store.drop("c")
    assert (await store.upsert("c", items(5), tag=TAG)).count == 5
    await store.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE items_1 SET metadata = CAST(x'7b22ff227d' AS TEXT)",
        "UPDATE items_1 SET id = CAST(x'ff' || number AS TEXT)",
    ],
)
async def test_damaged_text_is_damage_and_is_not_shown(site: Path, statement: str) -> None:
    with closing(sqlite3.connect(site / "search.sqlite3", isolation_level=None)) as db:
        db.execute(statement)
    store = await opened(site, interval_s=60.0)
    assert (await store.health()).damaged == ("c",)
    with pytest.raises(StorageDamaged, match=r"damaged \(Could not decode to UTF-8 column\)"):
        await store.get("c", ["i1"])
    assert await hits(store, "d") == 20
    await store.close()


# ---- idempotency keys


async def test_keys_are_forgotten_by_age_and_by_number(store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "MAX_REQUESTS", 6)
    monkeypatch.setattr(database, "MAX_REQUESTS_OF_CLIENT", 4)
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)

    async def keys() -> list[str]:
        return await store._read(lambda db: [key for (key,) in db.execute("SELECT key FROM requests ORDER BY rowid")])

    for n in range(5):
        await store.upsert("c", items(1), tag=TAG, request_key=f"a{n}", client="a")
    assert await keys() == ["a1", "a2", "a3", "a4"]
    for n in range(3):
        await store.upsert("d", items(1), tag=TAG, request_key=f"b{n}", client="b")
    assert await keys() == ["a2", "a3", "a4", "b0", "b1", "b2"]
    assert (await store.upsert("d", items(1), tag=TAG, request_key="b0", client="c")).count == 1  # known already
    assert await keys() == ["a2", "a3", "a4", "b0", "b1", "b2"]
    now += 23 * 3600
    await store.upsert("d", items(1), tag=TAG, request_key="late", client="b")
    now += 2 * 3600
    await store.upsert("d", items(2), tag=TAG, request_key="b0", client="b")  # older than a day, so it is new
    assert await keys() == ["late", "b0"]


async def test_many_keys_are_forgotten_a_few_at_a_time(store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_FORGOTTEN_AT_ONCE", 10)
    await store.upsert("c", items(1), tag=TAG)
    old = [(1, f"old{n}", b"", 0.0) for n in range(25)]
    insert = "INSERT INTO requests (collection, key, digest, created) VALUES (?, ?, ?, ?)"
    await store._write(lambda db: db.executemany(insert, old))
    count = "SELECT count(*) FROM requests WHERE created = 0"
    for left in (15, 5, 0):
        await store.upsert("c", items(1), tag=TAG, request_key=f"new{left}")
        assert await store._read(lambda db: db.execute(count).fetchone()) == (left,)
    used = "EXPLAIN QUERY PLAN DELETE FROM requests WHERE created < 1"
    plan = await store._read(lambda db: db.execute(used).fetchall())
    assert "requests_by_age" in str(plan)


@pytest.mark.parametrize("version", [2, 3])
async def test_a_store_of_an_older_version_is_upgraded(tmp_path: Path, version: int) -> None:
    older = dataclasses.replace(SCHEMA, scripts=SCHEMA.scripts[: version - 1])
    assert older.version == version
    sqlite.prepare(tmp_path / "search.sqlite3", older)
    spec = json.dumps(dataclasses.asdict(CollectionSpec(TAG, D)))
    with closing(sqlite3.connect(tmp_path / "search.sqlite3")) as db, db:
        db.execute("INSERT INTO collections (name, spec) VALUES ('c', ?)", (spec,))
        for statement in database._TABLES.format(1).strip().split(";\n"):
            db.execute(statement)
        db.execute("INSERT INTO requests VALUES (1, 'key', x'00', 1e12)")
    store = await opened(tmp_path, interval_s=60.0)
    with pytest.raises(Conflict, match="idempotency key 'key'"):
        await store.upsert("c", items(1), tag=TAG, request_key="key")
    assert (await store.upsert("c", items(1), tag=TAG, request_key="other")).count == 1
    await store.close()


# ---- quotas


async def quota_store(folder: Path, **quotas: int) -> EmbeddedStore:
    return await opened(folder, interval_s=60.0, quotas=Quotas(**quotas))


async def test_quotas_of_collections_and_items(tmp_path: Path) -> None:
    store = await quota_store(tmp_path, max_collections=2, max_collection_items=5, max_items=7)
    await store.upsert("c", items(5), tag=TAG)
    await store.create("d", CollectionSpec(TAG, D))
    for refused, words in (
        (store.create("e", CollectionSpec(TAG, D)), "there would be 3 collections, but max_collections=2"),
        (store.upsert("e", items(1), tag=TAG), "there would be 3 collections"),
        (store.upsert("c", items(1, prefix="new"), tag=TAG), "'c' would have 6 items, but max_collection_items=5"),
        (store.upsert("d", items(3), tag=TAG), "would have 8 items, but max_items=7"),
    ):
        with pytest.raises(QuotaExceeded, match=words):
            await refused
    assert [(info.name, info.count) for info in await store.collections()] == [("c", 5), ("d", 0)]
    await store.upsert("c", items(5, seed=1), tag=TAG)  # replaces items
    await store.upsert("d", items(2), tag=TAG)
    await store.close()
    store = await quota_store(tmp_path, max_collections=1, max_items=1)
    await store.upsert("c", items(5, seed=2), tag=TAG)  # a lower quota refuses only what is new
    await store.drop("d")
    await store.close()


async def test_quotas_of_snapshots_and_of_what_they_restore(tmp_path: Path) -> None:
    store = await quota_store(tmp_path, max_snapshots=2, max_collections=2, max_items=9)
    await store.upsert("c", items(5), tag=TAG)
    taken = await store.snapshot("c")
    upload = tmp_path / "upload"
    upload.write_bytes((await store.snapshot_path("c", taken.name)).read_bytes())
    with pytest.raises(QuotaExceeded, match="would have 10 items, but max_items=9"):
        await store.restore("again", "c", taken.name)
    await store.add_snapshot("d", upload)
    for refused in (store.snapshot("c"), store.add_snapshot("e", await store.snapshot_path("c", taken.name))):
        with pytest.raises(QuotaExceeded, match="2 snapshots exist, and max_snapshots=2"):
            await refused
    await store.drop_snapshot("c", taken.name)
    await store.snapshot("c")
    await store.close()
    size = taken.bytes
    store = await quota_store(tmp_path, max_snapshot_bytes=2 * size + size // 2)
    with pytest.raises(QuotaExceeded, match=f"max_snapshot_bytes={2 * size + size // 2} has no room for {size} more"):
        await store.snapshot("c")
    assert len(list((tmp_path / "snapshots").glob("*/*"))) == 2
    await store.close()


@pytest.mark.parametrize("when", ["before it is read", "after it was read"])
async def test_a_snapshot_that_is_deleted_while_snapshots_are_listed_is_left_out(
    store: EmbeddedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    await store.upsert("c", items(3), tag=TAG)
    kept, gone = [await store.snapshot("c") for _ in range(2)]
    name = "path_of" if when == "before it is read" else "_info"
    inner = getattr(snapshots, name)

    def deleted(root: Path, collection: str, snapshot: str, *args: object) -> object:
        result = inner(root, collection, snapshot, *args) if name == "path_of" else None
        if snapshot == gone.name:
            (tmp_path / "data" / "snapshots" / "c" / f"{gone.name}.sqlite3").unlink(missing_ok=True)
        return result or inner(root, collection, snapshot, *args)

    monkeypatch.setattr(snapshots, name, deleted)
    assert [info.name for info in await store.snapshots("c")] == [kept.name]
