"""The embedded store: SQLite is the source of truth, and faiss answers searches. Searches and writes do not wait for
each other.

    write       ─▶ writer thread ─▶ SQLite (one transaction, synced) ─▶ stamp
    search      ─▶ update the view if the stamp has changed ─▶ View ─▶ faiss ─▶ ids and metadata of the hits
    background  maintenance turns the tail into segments, merges segments and measures recall

The stamp is a shared number that changes with every commit. A view contains the state of a collection at one moment:
its segments and its tail (the items that are in no segment yet).

The module `database` contains the SQL statements, `view` and `segments` manage the data that is searched, `searcher`
runs searches, and `maintenance` and `building` do the background work. This module implements the protocol
`VectorStore`. It checks the arguments of each call and chooses the thread that runs the call.
"""

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy.typing as npt

from model.cpus import available_cpus
from service import sqlite
from service.errors import CollectionNotFound, Conflict, InvalidRequest, ItemNotFound, StorageFailed
from service.search import database, partners, snapshots
from service.search.checks import (
    check_id,
    check_name,
    check_reference,
    check_source_text,
    checked_items,
    merged,
    metadata_text,
)
from service.search.filters import Filter
from service.search.filters import Path as MetadataPath
from service.search.maintenance import Maintenance
from service.search.partners import EmbeddedMigrations
from service.search.reading import (
    ITEM,
    delete_some,
    items_of,
    key_in,
    metadata_of,
    number_after,
    page_by_number,
    sampled,
    value_counts,
)
from service.search.restoring import restore
from service.search.schema import SCHEMA
from service.search.scrolling import page_in_order, position_in
from service.search.searcher import Searcher
from service.search.selection import passing
from service.search.specs import check_spec
from service.search.store import (
    CollectionInfo,
    CollectionSpec,
    Facets,
    Hit,
    Item,
    Metadata,
    Order,
    Page,
    SearchParams,
    SnapshotInfo,
    Usage,
    VectorStore,
)
from service.search.threads import Workers, Write, commit_together
from service.search.usage import measure
from service.search.view import Views
from service.sqlite import snapshot, translated
from service.stamp import Stamp

T = TypeVar("T")
log = logging.getLogger(__name__)


async def open_embedded(data_dir: Path, *, threads: int | None = None, **maintenance: Any) -> VectorStore:
    """Open the embedded store in the folder `data_dir` and return it. If the folder contains no store, create one.

    Args:
        threads: the number of search threads. The default is half the number of CPUs, because each thread holds
            Python's global interpreter lock for part of its time.
        maintenance: optional keyword arguments for `Maintenance`.

    Raises:
        StorageFailed: the folder cannot be used, or its database is damaged or not a vector store. The message contains
            the path.
    """
    return await asyncio.to_thread(
        EmbeddedStore, data_dir, threads=threads or max(1, available_cpus() // 2), **maintenance
    )


class EmbeddedStore:
    """A `VectorStore` in a folder. Several processes on one host may use the same folder at the same time."""

    capabilities = frozenset(
        {
            "atomic_upsert",
            "idempotency",
            "index_kinds",
            "indexed",
            "migrations",
            "order",
            "sample",
            "snapshots",
            "stats",
            "usage",
        }
    )

    def __init__(self, data_dir: Path, *, threads: int, **maintenance: Any) -> None:
        self.path = data_dir / "search.sqlite3"
        sqlite.prepare(self.path, SCHEMA)
        self.views = Views(data_dir / "segments")
        self.stamp = Stamp(data_dir / "search.stamp")
        self._snapshots = data_dir / "snapshots"
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._maintenance = Maintenance(data_dir, self.views, self.stamp, self._connect, **maintenance)
        self._load()
        self._writer: Workers[Write] = Workers("store-write", 1, self._make_writer)
        self._searcher = Searcher(self.views, self.stamp, self._maintenance, self._connect, threads)
        self._readers = ThreadPoolExecutor(max(2, threads), thread_name_prefix="store-read")
        self.migrations = EmbeddedMigrations(self._read, self._write, self.views.forget, self._maintenance.wake)
        self._is_open = True
        self._maintenance.start()

    # ---- collections

    async def create(self, collection: str, spec: CollectionSpec) -> CollectionInfo:
        check_name(collection), check_spec(spec)

        def work(db: sqlite3.Connection) -> CollectionInfo:
            try:
                row = database.find(db, collection)
            except CollectionNotFound:
                return database.make(db, collection, spec).info
            if row.name != collection:
                raise Conflict(f"{collection!r} is an alias of {row.name!r}")
            if row.spec != spec:
                raise Conflict(f"collection {collection!r} exists with other settings: {_difference(row.spec, spec)}")
            return row.info

        return await self._write(work)

    async def collections(self) -> list[CollectionInfo]:
        return await self._read(lambda db: [row.info for row in database.every(db)])

    async def info(self, collection: str) -> CollectionInfo:
        check_reference(collection)
        return await self._read(lambda db: partners.info_of(db, database.find(db, collection)))

    async def set_indexed(self, collection: str, indexed: Sequence[str]) -> CollectionInfo:
        check_name(collection)

        def work(db: sqlite3.Connection) -> CollectionInfo:
            row = database.find(db, collection)
            check_spec(replace(row.spec, indexed=tuple(indexed)))
            database.set_indexed(db, row, tuple(indexed))
            if (partner := partners.partner_of(db, row)) is not None:
                database.set_indexed(db, partner, tuple(indexed))
            return database.find(db, collection).info

        return await self._write(work)

    async def drop(self, collection: str) -> None:
        check_name(collection)

        def work(db: sqlite3.Connection) -> set[int]:
            row = database.find(db, collection)
            if row.name != collection:
                raise Conflict(f"{collection!r} is an alias of {row.name!r}: delete the alias, or the collection")
            names = [name for (name,) in db.execute("SELECT name FROM aliases WHERE collection = ?", (row.key,))]
            if names:
                raise Conflict(f"collection {collection!r} has the aliases {', '.join(map(repr, names))}")
            return database.drop(db, row.key)

        self.views.forget(await self._write(work))
        self._maintenance.wake()

    async def aliases(self) -> dict[str, str]:
        query = "SELECT a.name, c.name FROM aliases a JOIN collections c ON c.id = a.collection ORDER BY 1"
        return await self._read(lambda db: dict(db.execute(query).fetchall()))

    async def set_alias(self, alias: str, collection: str) -> str | None:
        check_name(alias), check_name(collection)

        def work(db: sqlite3.Connection) -> str | None:
            if db.execute("SELECT 1 FROM collections WHERE name = ?", (alias,)).fetchone():
                raise Conflict(f"{alias!r} is a collection, so it cannot be an alias")
            row = database.find(db, collection)
            query = "SELECT c.name FROM aliases a JOIN collections c ON c.id = a.collection WHERE a.name = ?"
            before = db.execute(query, (alias,)).fetchone()
            db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?)", (alias, row.key))
            return before[0] if before else None

        return await self._write(work)

    async def drop_alias(self, alias: str) -> None:
        check_name(alias)

        def work(db: sqlite3.Connection) -> None:
            if not db.execute("DELETE FROM aliases WHERE name = ?", (alias,)).rowcount:
                raise CollectionNotFound(f"there is no alias {alias!r}")

        await self._write(work)

    # ---- items

    async def upsert(
        self,
        collection: str,
        items: Sequence[Item],
        *,
        tag: str,
        request_key: str | None = None,
        other: tuple[str, Sequence[Item]] | None = None,
    ) -> CollectionInfo:
        check_name(collection)
        checked, dimension = checked_items(items)
        others = (other[0], checked_items(other[1])[0]) if other is not None and other[1] else None

        def work(db: sqlite3.Connection) -> CollectionInfo:
            try:
                row = database.find(db, collection)
            except CollectionNotFound:
                row = database.make(db, collection, check_spec(CollectionSpec(tag, dimension)))
            if request_key is not None:
                digest = database.request_digest(partners.rows_of(row, checked))
                done = database.already_done(db, row.key, request_key, digest, time.time())
                if done is None:
                    raise Conflict(f"the idempotency key {request_key[:80]!r} was used with other items")
                if done:
                    return row.info
            partners.write(db, row, tag, checked, others)
            return database.find(db, collection).info

        info: CollectionInfo = await self._write(work)
        self._maintenance.wake()
        return info

    async def get(self, collection: str, ids: Sequence[str]) -> list[Item | None]:
        check_reference(collection)
        wanted = [check_id(item_id) for item_id in ids]

        def work(db: sqlite3.Connection) -> list[Item | None]:
            row = database.find(db, collection)
            query = f"SELECT {ITEM} FROM items_{row.key} i WHERE id = ?"
            rows = [db.execute(query, (item_id,)).fetchone() for item_id in wanted]
            items = iter(items_of(db, row, [columns for columns in rows if columns is not None]))
            return [None if columns is None else next(items) for columns in rows]

        return await self._read(work)

    async def patch(
        self, collection: str, item_id: str, metadata: Metadata, *, source: str | None = None, keep_source: bool = True
    ) -> Item:
        check_reference(collection), check_id(item_id), metadata_text(metadata)
        check_source_text(source)

        def work(db: sqlite3.Connection) -> Item:
            row = database.find(db, collection)
            query = f"SELECT {ITEM} FROM items_{row.key} i WHERE id = ?"
            columns = db.execute(query, (item_id,)).fetchone()
            if columns is None:
                raise ItemNotFound(f"collection {collection!r} holds no item {item_id[:80]!r}", param="id")
            text = metadata_text(merged(metadata_of(item_id, columns[2]), metadata))
            kept = columns[3] if keep_source else source
            partners.edit(db, row, columns[0], item_id, text, kept)
            return items_of(db, row, [(*columns[:2], text, kept, columns[4])])[0]

        return await self._write(work)

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        check_reference(collection)
        wanted = [check_id(item_id) for item_id in ids]

        def work(db: sqlite3.Connection) -> int:
            return partners.remove(db, database.find(db, collection), wanted)

        return await self._write(work)

    async def delete_where(self, collection: str, where: Filter) -> int:
        """Delete the items that match a filter, and return the number of deleted items. The items are deleted page by
        page, so that other writes can run in between. Items that are written in the meantime are not deleted."""
        check_reference(collection)
        row, last = await self._read(lambda db: (row := database.find(db, collection), database.last_number(db, row)))
        gone, after = 0, 0
        while after < last:
            deleted, after = await self._write(partial(delete_some, row=row, where=where, after=after, to=last))
            gone += deleted
        self._maintenance.wake()
        return gone

    async def count(self, collection: str, where: Filter | None = None) -> int:
        if where is None:
            return (await self.info(collection)).count
        check_reference(collection)
        return len(await self._read(lambda db: passing(db, database.find(db, collection), where)))

    async def facets(
        self, collection: str, path: MetadataPath, *, where: Filter | None = None, limit: int = 100
    ) -> Facets:
        check_reference(collection)
        return await self._read(lambda db: value_counts(db, database.find(db, collection), path, where, limit))

    async def scroll(
        self,
        collection: str,
        *,
        where: Filter | None = None,
        cursor: str | None = None,
        limit: int = 100,
        order: Order | None = None,
        max_bytes: int | None = None,
    ) -> Page:
        """Return a page of items. If `order` is None, the items are in the order in which they were written.

        A cursor also contains the key of the collection. If the collection has been re-embedded since, the next page
        still comes from the former collection, which has the same items.
        """
        check_reference(collection)
        key, inner = key_in(cursor)
        after = number_after(inner) if order is None else 0
        position = None if order is None else position_in(order, inner)

        def work(db: sqlite3.Connection) -> Page:
            row = database.find(db, collection)
            if key not in (None, row.key):
                if key != row.partner:
                    raise InvalidRequest("cursor: the collection has been re-embedded; begin again", param="cursor")
                row = database.by_key(db, key)
            if order is None:
                page = page_by_number(db, row, where, after, limit, max_bytes)
            else:
                page = page_in_order(db, row, where, order, position, limit, max_bytes)
            cursor_with_key = None if page.cursor is None else f"{row.key}.{page.cursor}"
            return Page(page.items, cursor_with_key, row.spec.tag)

        return await self._read(work)

    async def sample(self, collection: str, size: int, *, where: Filter | None = None) -> list[Item]:
        check_reference(collection)
        return await self._read(lambda db: sampled(db, database.find(db, collection), where, size))

    # ---- snapshots

    @property
    def folder(self) -> Path:
        return self.path.parent

    async def snapshot(self, collection: str) -> SnapshotInfo:
        """Take a snapshot of a collection in its current state, and return the description of the snapshot."""
        return await asyncio.to_thread(snapshots.take, self.path, check_name(collection), self._snapshots)

    async def snapshots(self, collection: str) -> list[SnapshotInfo]:
        """Return the snapshots of a collection, oldest first. Snapshots are not deleted when their collection is
        dropped."""
        return await asyncio.to_thread(snapshots.listed, self._snapshots, await self._own_name(collection))

    async def snapshot_path(self, collection: str, name: str) -> Path:
        return snapshots.path_of(self._snapshots, await self._own_name(collection), name)

    async def drop_snapshot(self, collection: str, name: str) -> None:
        path = await self.snapshot_path(collection, name)
        with translated(f"snapshot {name}"):
            path.unlink()

    async def restore(self, collection: str, source: str, name: str) -> CollectionInfo:
        """Create the collection `collection` from the snapshot `name` of the collection `source`, and return the
        description of the new collection.

        Raises:
            Conflict: a collection or alias with the name `collection` already exists.
            NotFound: the snapshot does not exist.
            InvalidRequest: the snapshot is damaged.
        """
        path = snapshots.path_of(self._snapshots, check_name(source), name)
        try:
            [info] = await self.restore_files({collection: path}, {})
        except Conflict as error:
            raise Conflict(f"{error.detail}; restore to another name") from error
        return info

    async def restore_files(
        self, files: Mapping[str, Path], aliases: Mapping[str, str], *, replace: bool = False
    ) -> list[CollectionInfo]:
        for name in (*files, *aliases, *aliases.values()):
            check_name(name)
        try:
            restored = await restore(self._snapshots, files, aliases, replace=replace, write=self._write)
        finally:
            self._maintenance.wake()
        self.views.forget(restored.replaced)
        return restored.infos

    async def snapshot_to(self, collection: str, root: Path) -> Path:
        taken = await asyncio.to_thread(snapshots.take, self.path, check_name(collection), root)
        return snapshots.path_of(root, taken.collection, taken.name)

    async def add_snapshot(self, collection: str, file: Path) -> SnapshotInfo:
        return await asyncio.to_thread(snapshots.add, self._snapshots, check_name(collection), file)

    def upload_path(self) -> Path:
        return snapshots.upload_path(self._snapshots)

    async def _own_name(self, collection: str) -> str:
        """Return the name of the collection to which an alias points. If `collection` is not an alias, return it
        unchanged."""
        return (await self.aliases()).get(check_name(collection), collection)

    async def usage(self) -> Usage:
        return await self._read(lambda db: measure(db, self.path, self._snapshots))

    async def stats(self, collection: str) -> dict[str, Any]:
        """Return statistics about a collection for operators: the number of items, the properties of each segment, the
        number of items that are in no segment yet, the measured recall, and the factor by which searches multiply the
        tuned search effort."""
        check_reference(collection)

        def work(db: sqlite3.Connection) -> dict[str, Any]:
            view = self.views.newest(db, database.find(db, collection))
            return {"count": view.row.count, **view.stats(), **self._maintenance.stats(view.row)}

        return await self._read(work, as_one=False)

    # ---- search

    async def search(
        self,
        collection: str,
        vectors: npt.ArrayLike,
        k: int,
        *,
        tag: str,
        where: Filter | None = None,
        params: SearchParams | None = None,
        assumed: bool = False,
        max_bytes: int | None = None,
    ) -> list[list[Hit]]:
        return await self._searcher.search(
            collection, vectors, k, tag=tag, where=where, params=params, assumed=assumed, max_bytes=max_bytes
        )

    # ---- threads

    def _connect(self) -> sqlite3.Connection:
        db = sqlite.connect(self.path)
        self._connections.append(db)
        return db

    def _load(self) -> None:
        """Open all segments at startup, so that the first search does not wait and damaged files are found early."""
        db = self._connect()
        with translated(f"vector store {self.path}"), snapshot(db):
            for row in database.with_partners(db):
                self.views.at(db, row)

    def _make_writer(self) -> Callable[[Sequence[Write]], Sequence[Any]]:
        db = self._connect()

        def work(writes: Sequence[Write]) -> Sequence[Any]:
            try:
                return commit_together(db, writes)
            except StorageFailed:
                if len(writes) == 1:
                    raise
                return [_alone(db, write) for write in writes]  # perhaps only one write is too large for the disk
            finally:
                self.stamp.bump()

        return work

    async def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        done: T = await self._writer.do(work)
        return done

    async def _read(self, work: Callable[[sqlite3.Connection], T], *, as_one: bool = True) -> T:
        """Run the function `work` in a reader thread, with the database connection of that thread. Return its result.
        If `as_one` is true, all queries of `work` run in one transaction."""
        if not self._is_open:
            raise StorageFailed("the vector store is closed")

        def run() -> T:
            db = getattr(self._local, "db", None)
            if db is None:
                db = self._local.db = self._connect()
            with translated("the vector store"), snapshot(db) if as_one else nullcontext():
                return work(db)

        return await asyncio.get_running_loop().run_in_executor(self._readers, run)

    async def settle(self, collection: str) -> None:
        """Merge all items of a collection into one segment, and return when this is done."""
        await asyncio.to_thread(self._maintenance.settle, check_name(collection))

    async def close(self) -> None:
        """Wait for running calls and close the store. A second call has no effect."""
        if not self._is_open:
            return
        self._is_open = False
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._maintenance.close()
        self._writer.close()
        self._searcher.close()
        self._readers.shutdown()
        for db in self._connections:
            db.close()


def _alone(db: sqlite3.Connection, write: Write) -> Any:
    try:
        return commit_together(db, [write])[0]
    except StorageFailed as error:
        return error


def _difference(old: CollectionSpec, new: CollectionSpec) -> str:
    fields = [name for name in CollectionSpec.__dataclass_fields__ if getattr(old, name) != getattr(new, name)]
    return "; ".join(f"{name} is {getattr(old, name)!r}, not {getattr(new, name)!r}" for name in fields)
