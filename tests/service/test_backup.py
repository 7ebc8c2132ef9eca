"""Tests of the backup and restore of all collections, with real stores and image files."""

import asyncio
import hashlib
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from service.backup import Contents, SavedArtifact, back_up, read_contents, restore
from service.errors import Conflict, InvalidRequest, StorageFailed
from service.originals import Originals, source_of
from service.search.embedded import EmbeddedStore
from service.search.store import CollectionSpec, Item
from tests.fakes import photo

TAG = "f" * 64 + "/cls/l2/224x224/fp32"
D = 8
ARTIFACTS = [SavedArtifact(name="demo", fingerprint="f" * 64)]


class Site:
    """A data folder with its vector store and its images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = EmbeddedStore(folder, threads=2, interval_s=60.0)
        self.originals = Originals(folder / "originals")

    async def fill(self, name: str, numbers: range, *, images: bool = False) -> None:
        await self.store.create(name, CollectionSpec(TAG, D, originals=images, indexed=("n",)))
        rng = np.random.default_rng(numbers.start)
        items = []
        for n in numbers:
            source = source_of(await self.originals.put(photo(n))) if images else f"file{n}"
            items.append(Item(f"i{n}", rng.normal(size=D).astype(np.float32), {"n": n}, source))
        await self.store.upsert(name, items, tag=TAG)

    async def content(self) -> dict[str, object]:
        found: dict[str, object] = {"aliases": await self.store.aliases()}
        for info in await self.store.collections():
            page = await self.store.scroll(info.name, limit=1000)
            items = [(i.id, i.vector.tobytes(), dict(i.metadata), i.source) for i in page.items]
            found[info.name] = (info.spec, items)
        return found

    async def back_up(self, out: Path):
        return await back_up(self.store, self.originals, ARTIFACTS, out)

    async def restore(self, source: Path, *, replace: bool = False):
        return await restore(self.store, self.originals, source, replace=replace)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path / "data")
    await made.fill("shop", range(5), images=True)
    await made.fill("art", range(10, 17))
    await made.store.set_alias("live", "shop")
    yield made
    await made.store.close()


@pytest.fixture
async def other(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path / "other")
    yield made
    await made.store.close()


async def test_everything_comes_back_elsewhere(site: Site, other: Site, tmp_path: Path) -> None:
    saved = await site.back_up(tmp_path / "backup")
    assert (saved.images.copied, saved.images.missing, saved.images.unreadable) == (5, 0, 0)
    contents = read_contents(tmp_path / "backup")
    assert contents == saved.contents
    assert {one.name: one.count for one in contents.collections} == {"art": 7, "shop": 5}
    assert contents.aliases == {"live": "shop"}
    assert contents.artifacts == ARTIFACTS
    restored, images = await other.restore(tmp_path / "backup")
    assert {info.name: info.count for info in restored} == {"art": 7, "shop": 5}
    assert images.copied == 5
    assert await other.content() == await site.content()
    [item] = await other.store.get("live", ["i3"])
    assert await other.originals.get(item.source.removeprefix("original:")) == photo(3)


async def test_writes_continue_and_each_collection_is_from_one_moment(site: Site, other: Site, tmp_path: Path) -> None:
    """Every write adds two items, so a snapshot that contained half a write would have an odd number."""
    await site.store.create("busy", CollectionSpec(TAG, D))
    done = asyncio.Event()

    async def write() -> int:
        count = 0
        while not done.is_set():
            vectors = np.random.default_rng(count).normal(size=(2, D)).astype(np.float32)
            pair = [Item(f"{count}-{n}", vector) for n, vector in enumerate(vectors)]
            await site.store.upsert("busy", pair, tag=TAG)
            count += 1
        return count

    writing = asyncio.create_task(write())
    await asyncio.sleep(0.05)
    await site.back_up(tmp_path / "backup")
    done.set()
    assert await writing > 0
    await other.restore(tmp_path / "backup")
    items = (await other.store.scroll("busy", limit=10_000)).items
    assert items
    assert {item.id for item in items} == {f"{n}-{m}" for n in range(len(items) // 2) for m in (0, 1)}


async def test_a_second_backup_copies_what_is_new_and_replaces_the_first(
    site: Site, other: Site, tmp_path: Path
) -> None:
    out = tmp_path / "backup"
    first = (await site.back_up(out)).contents
    await site.fill("new", range(20, 23), images=True)
    await site.store.drop("art")
    second = await site.back_up(out)
    assert (second.images.copied, second.images.present) == (3, 5)
    files = {path.relative_to(out).as_posix() for path in out.glob("snapshots/*/*.sqlite3")}
    assert files == {one.file for one in second.contents.collections}
    assert not files & {one.file for one in first.collections}
    await other.restore(out)
    assert await other.content() == await site.content()


async def test_an_interrupted_backup_leaves_the_older_one_whole(
    site: Site, other: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, before = tmp_path / "backup", await site.content()
    await site.back_up(out)
    await site.fill("new", range(20, 23), images=True)

    async def full(*_: object, **__: object) -> None:
        raise StorageFailed("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("service.backup.copy_photos", full)
        with pytest.raises(StorageFailed):
            await site.back_up(out)
    await other.restore(out)
    assert await other.content() == before
    await site.back_up(out)  # and runs again
    assert len(read_contents(out).collections) == 3
    assert len(list(out.glob("snapshots/*/*.sqlite3"))) == 3


async def test_existing_names_are_refused_and_nothing_changes(site: Site, tmp_path: Path) -> None:
    await site.back_up(tmp_path / "backup")
    await site.store.drop("art")
    before = await site.content()
    with pytest.raises(Conflict, match=r"'shop' is a collection already$"):
        await site.restore(tmp_path / "backup")
    assert await site.content() == before


async def test_replace_replaces_collections_and_aliases(site: Site, tmp_path: Path) -> None:
    saved = await site.content()
    await site.back_up(tmp_path / "backup")
    await site.store.delete("shop", ["i1"])
    await site.store.set_alias("also", "shop")
    await site.store.set_alias("live", "art")
    await site.fill("later", range(30, 32))
    query = np.ones((1, D), np.float32)
    await site.store.search("shop", query, 3, tag=TAG)  # opens a view of the collection that is replaced
    await site.restore(tmp_path / "backup", replace=True)
    now = await site.content()
    assert now["shop"] == saved["shop"]
    assert now["aliases"] == {"also": "shop", "live": "shop"}
    assert "later" in now
    [hits] = await site.store.search("also", query, 10, tag=TAG)
    assert {hit.id for hit in hits} == {f"i{n}" for n in range(5)}


@pytest.mark.parametrize("replace", [False, True])
async def test_a_collection_never_replaces_an_alias(site: Site, tmp_path: Path, replace: bool) -> None:
    await site.back_up(tmp_path / "backup")
    await site.store.drop("art")
    await site.store.set_alias("art", "shop")
    before = await site.content()
    with pytest.raises(Conflict, match="'art' is an alias already"):
        await site.restore(tmp_path / "backup", replace=replace)
    assert await site.content() == before


@pytest.mark.parametrize("hash_too", [False, True])
async def test_one_damaged_snapshot_restores_nothing(site: Site, other: Site, tmp_path: Path, hash_too: bool) -> None:
    """With `hash_too`, the hash in backup.json belongs to the changed file, so only the restore itself finds it."""
    out = tmp_path / "backup"
    contents = (await site.back_up(out)).contents
    path = out / next(one.file for one in contents.collections if one.name == "shop")
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE items_1 SET metadata = '[1]' WHERE number = 3")
    if hash_too:
        body = json.loads((out / "backup.json").read_text())
        for one in body["collections"]:
            if one["name"] == "shop":
                one |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        (out / "backup.json").write_text(json.dumps(body))
    with pytest.raises((InvalidRequest, ValueError)) as caught:
        await other.restore(out)
    assert ("metadata is not a JSON object" if hash_too else f"{path} is damaged: ") in str(caught.value)
    assert await other.content() == {"aliases": {}}
    assert await other.store._read(lambda db: db.execute("SELECT count(*) FROM collections").fetchone()) == (0,)


async def test_folders_that_are_no_backup_are_refused(site: Site, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"mine contains notes\.txt but no backup\.json"):
        await site.back_up(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match=r"mine contains no backup: backup\.json: No such file"):
        await site.restore(tmp_path / "mine")
    (tmp_path / "mine" / "backup.json").write_text('{"created": 5}')
    with pytest.raises(ValueError, match=r"backup\.json: not the description of a backup: created=5: must be text"):
        await site.restore(tmp_path / "mine")


async def test_a_file_outside_the_backup_is_refused(site: Site, tmp_path: Path) -> None:
    contents = (await site.back_up(tmp_path / "backup")).contents
    for file in ("../data/search.sqlite3", "/etc/passwd", "snapshots/../../x.sqlite3"):
        body = contents.model_dump()
        body["collections"][0]["file"] = file
        (tmp_path / "backup" / "backup.json").write_text(json.dumps(body))
        with pytest.raises(ValueError, match="must match the pattern"):
            await site.restore(tmp_path / "backup")


async def test_images_may_be_left_out(site: Site, other: Site, tmp_path: Path) -> None:
    saved = await back_up(site.store, None, [], tmp_path / "backup")
    assert isinstance(saved.contents, Contents)
    assert not (tmp_path / "backup" / "originals").exists()
    _, images = await other.restore(tmp_path / "backup")
    assert (images.copied, images.missing) == (0, 0)
    assert await other.content() == await site.content()


async def test_two_backups_to_one_folder_at_once_are_refused(site: Site, tmp_path: Path) -> None:
    from model.files import lock_file

    out = tmp_path / "backup"
    out.mkdir()
    held = lock_file(out / ".lock")
    assert held is not None
    with held, pytest.raises(ValueError, match=r"another backup to .* is running"):
        await site.back_up(out)


def free_space(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    import shutil

    used = type(shutil.disk_usage("/"))(10**12, 10**12 - free, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used)


async def test_a_restore_needs_free_space_before_it_copies(
    site: Site, other: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restore that fills the disk would also stop the writes of the service."""
    contents = (await site.back_up(tmp_path / "backup")).contents
    images = sum(len(photo(n)) for n in range(5))
    needed = 2 * sum(one.bytes for one in contents.collections) + images
    free_space(monkeypatch, needed - 1)
    with pytest.raises(StorageFailed, match=f"needs {needed} bytes on the disk of .*, but only {needed - 1} bytes are"):
        await other.restore(tmp_path / "backup")
    assert not (other.folder / "originals").exists()
    assert await other.store._read(lambda db: db.execute("SELECT count(*) FROM collections").fetchone()) == (0,)
    await other.originals.put(photo(0))  # an image that is there already needs no space
    free_space(monkeypatch, needed - len(photo(0)))
    restored, _ = await other.restore(tmp_path / "backup")
    assert len(restored) == 2


async def test_a_failed_restore_leaves_images_that_the_service_stored_meanwhile(
    site: Site, other: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.back_up(tmp_path / "backup")

    async def full(*_: object, **__: object) -> None:
        digest = await other.originals.put(photo(1))  # the service stores an image of the backup during the restore
        item = Item("mine", np.ones(D, np.float32), {}, source_of(digest))
        await other.store.upsert("live", [item], tag=TAG)
        raise StorageFailed("the disk is full")

    monkeypatch.setattr(other.store, "restore_files", full)
    with pytest.raises(StorageFailed, match="the disk is full"):
        await other.restore(tmp_path / "backup")
    [item] = await other.store.get("live", ["mine"])
    assert await other.originals.get(hashlib.sha256(photo(1)).hexdigest()) == photo(1)
    assert [info.name for info in await other.store.collections()] == ["live"]
    assert item is not None


def numbers_in(path: Path) -> list[int]:
    with closing(sqlite3.connect(path)) as db:
        return [number for (number,) in db.execute("SELECT number FROM kept ORDER BY number")]


async def test_the_databases_of_models_keys_and_jobs_are_copied_while_they_are_in_use(
    site: Site, tmp_path: Path
) -> None:
    """The copy of a database has its committed rows, also those in its write-ahead log, and no others."""
    state = tmp_path / "backup" / "state"
    (site.folder / "jobs").mkdir()
    names = ("keys.sqlite3", "jobs/jobs.sqlite3")
    opened = [sqlite3.connect(site.folder / name) for name in names]
    for db in opened:
        db.execute("PRAGMA journal_mode = wal")
        db.execute("CREATE TABLE kept (number INTEGER)")
        db.execute("INSERT INTO kept VALUES (1)")
        db.commit()
        db.execute("INSERT INTO kept VALUES (2)")  # a transaction that is open during the backup
    await site.back_up(tmp_path / "backup")
    assert {name: numbers_in(state / name) for name in names} == {name: [1] for name in names}
    assert all((state / name).stat().st_mode & 0o777 == 0o600 for name in names)
    assert not (state / "models.sqlite3").exists()

    for db in opened:
        db.commit()
        db.close()
    (site.folder / "keys.sqlite3").unlink()
    await site.back_up(tmp_path / "backup")
    assert numbers_in(state / "jobs/jobs.sqlite3") == [1, 2]
    assert sorted(path.name for path in state.rglob("*")) == ["jobs", "jobs.sqlite3"]


async def test_a_damaged_database_fails_the_backup_and_leaves_the_older_one(site: Site, tmp_path: Path) -> None:
    older = (await site.back_up(tmp_path / "backup")).contents
    (site.folder / "keys.sqlite3").write_bytes(b"no database" * 100)
    with pytest.raises(StorageFailed, match=r"keys\.sqlite3 cannot be copied"):
        await site.back_up(tmp_path / "backup")
    assert read_contents(tmp_path / "backup") == older
