"""The embedded store: SQLite is the source of truth, and faiss answers searches. Searches and writes do not wait for
each other.

    write       ─▶ writer thread ─▶ SQLite (one transaction, synced) ─▶ stamp
    search      ─▶ update the view if the stamp has changed ─▶ View ─▶ faiss ─▶ ids and metadata of the hits
    background  maintenance turns the tail into segments, merges segments and measures recall

The stamp is a shared number that changes with every commit. A view contains the state of a collection at one moment:
its segments and its tail (the items that are in no segment yet).

The module `database` contains the SQL statements, `view` and `segments` manage the data that is searched, `searcher`
runs searches, and `maintenance` and `building` do the background work. This module implements the protocol
`VectorStore`. It checks the arguments of each call. The module `access` has the connections and the threads.
"""

import asyncio
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt

from model.cpus import available_cpus
from service import sqlite
from service.errors import (
    CollectionNotFound,
    Conflict,
    InvalidRequest,
    ItemNotFound,
    StorageDamaged,
)
from service.search import database, partners, snapshots
from service.search.access import Access
from service.search.checks import (
    check_id,
    check_name,
    check_reference,
    check_source_text,
    checked_items,
    merged,
    metadata_text,
)
from service.search.damage import explained
from service.search.database import Row
from service.search.filters import Filter
from service.search.filters import Path as MetadataPath
from service.search.maintenance import Maintenance
from service.search.partners import EmbeddedMigrations
from service.search.quotas import Quotas
from service.search.reading import (
    ITEM,
    choose_some,
    delete_chosen,
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
from service.search.searcher import ATTEMPTS, Searcher
from service.search.selection import passing
from service.search.snapshot_files import path_of
from service.search.specs import check_spec
from service.search.store import (
    CollectionInfo,
    CollectionSpec,
    Facets,
    Hits,
    Item,
    Metadata,
    Order,
    Page,
    SearchParams,
    SnapshotInfo,
    StoreHealth,
    Usage,
    VectorStore,
)
from service.search.usage import measure
from service.search.view import Views
from service.sqlite import snapshot, translated
from service.stamp import Stamp


async def open_embedded(
    data_dir: Path, *, threads: int | None = None, quotas: Quotas | None = None, **maintenance: Any
) -> VectorStore:
    """Open the embedded store in the folder `data_dir` and return it. If the folder contains no store, create one.

    Args:
        threads: the number of search threads. The default is the number of CPUs.
        quotas: how much the store accepts. The default is any amount.
        maintenance: optional keyword arguments for `Maintenance`.

    Raises:
        StorageFailed: the folder cannot be used, or its database is damaged or not a vector store. The message contains
            the path. If only the tables of some collections are damaged, the store opens without these collections.
    """
    threads = threads or available_cpus()
    return await asyncio.to_thread(EmbeddedStore, data_dir, threads=threads, quotas=quotas, **maintenance)


class EmbeddedStore:
    """A `VectorStore` in a folder. Several processes on one host may use the same folder at the same time."""

    capabilities = frozenset(
        {
            "atomic_upsert",
            "health",
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

    def __init__(self, data_dir: Path, *, threads: int, quotas: Quotas | None = None, **maintenance: Any) -> None:
        self.path = data_dir / "search.sqlite3"
        sqlite.prepare(self.path, SCHEMA)
        self._quotas = quotas or Quotas()
        self.views = Views(data_dir / "segments")
        self.stamp = Stamp(data_dir / "search.stamp")
        self._snapshots = data_dir / "snapshots"
        access = self._access = Access(self.path)
        self._read, self._write, self._connect = access.read, access.write, access.connect
        self._maintenance = Maintenance(
            data_dir,
            self.views,
            self.stamp,
            self._connect,
            may_work=access.may_work,
            damage=access.damage,
            **maintenance,
        )
        self._load()
        access.start(self.stamp, max(2, threads))
        self._searcher = Searcher(self.views, self.stamp, self._maintenance, access.connect, access.read, threads)
        self.migrations = EmbeddedMigrations(
            self._read, self._write, self.views.forget, self._maintenance.wake, damaged=access.damage
        )
        self._maintenance.start()

    # ---- collections

    async def create(self, collection: str, spec: CollectionSpec) -> CollectionInfo:
        check_name(collection), check_spec(spec)

        def work(db: sqlite3.Connection) -> CollectionInfo:
            try:
                row = database.find(db, collection)
            except CollectionNotFound:
                return self._made(db, collection, spec).info
            if row.name != collection:
                raise Conflict(f"{collection!r} is an alias of {row.name!r}")
            if row.spec != spec:
                raise Conflict(f"collection {collection!r} exists with other settings: {_difference(row.spec, spec)}")
            return row.info

        return await self._write(work)

    def _made(self, db: sqlite3.Connection, name: str, spec: CollectionSpec) -> Row:
        row = database.make(db, name, spec)
        self._quotas.check_collections(db)
        return row

    async def collections(self) -> list[CollectionInfo]:
        def work(db: sqlite3.Connection) -> list[CollectionInfo]:
            return [replace(row.info, is_damaged=self._access.damage.holds(row)) for row in database.every(db)]

        return await self._read(work)

    async def info(self, collection: str) -> CollectionInfo:
        check_reference(collection)

        def work(db: sqlite3.Connection) -> CollectionInfo:
            row = database.find(db, collection)
            return replace(partners.info_of(db, row), is_damaged=self._access.damage.holds(row))

        return await self._read(work)

    async def set_indexed(self, collection: str, indexed: Sequence[str]) -> CollectionInfo:
        check_name(collection)

        def work(db: sqlite3.Connection) -> CollectionInfo:
            row = database.find(db, collection)
            check_spec(replace(row.spec, indexed=tuple(indexed)))
            database.set_indexed(db, row, tuple(indexed))
            if (partner := partners.partner_of(db, row)) is not None:
                database.set_indexed(db, partner, tuple(indexed))
            return database.find(db, collection).info

        return await self._write(work, of=collection)

    async def drop(self, collection: str) -> None:
        check_name(collection)

        def work(db: sqlite3.Connection) -> set[int]:
            row = database.find(db, collection)
            if row.name != collection:
                raise Conflict(f"{collection!r} is an alias of {row.name!r}: delete the alias, or the collection")
            names = [name for (name,) in db.execute("SELECT name FROM aliases WHERE collection = ?", (row.key,))]
            if names:
                raise Conflict(f"collection {collection!r} has the aliases {', '.join(map(repr, names))}")
            return database.drop(db, row.key, damaged=self._access.damage)

        try:
            dropped = await self._write(work, frees=True)
        except StorageDamaged as error:
            await self._access.mark(collection, error)
            dropped = await self._write(work, frees=True)  # leaves its tables in the file
        self.views.forget(dropped)
        self._access.damage.forget(dropped)
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

        await self._write(work, frees=True)

    # ---- items

    async def upsert(
        self,
        collection: str,
        items: Sequence[Item],
        *,
        tag: str,
        request_key: str | None = None,
        client: str = "",
        other: tuple[str, Sequence[Item]] | None = None,
    ) -> CollectionInfo:
        check_name(collection)
        checked, dimension = checked_items(items)
        others = (other[0], checked_items(other[1])[0]) if other is not None and other[1] else None

        def work(db: sqlite3.Connection) -> CollectionInfo:
            try:
                row = database.find(db, collection)
            except CollectionNotFound:
                row = self._made(db, collection, check_spec(CollectionSpec(tag, dimension)))
            if request_key is not None:
                digest = database.request_digest(partners.rows_of(row, checked))
                done = database.already_done(db, row.key, request_key, client, digest, time.time())
                if done is None:
                    raise Conflict(f"the idempotency key {request_key[:80]!r} was used with other items")
                if done:
                    return row.info
            partners.write(db, row, tag, checked, others)
            info = database.find(db, collection).info
            self._quotas.check_items(db, row.count, info)
            return info

        info: CollectionInfo = await self._write(work, of=collection)
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

        return await self._read(work, of=collection)

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

        return await self._write(work, of=collection)

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        check_reference(collection)
        wanted = [check_id(item_id) for item_id in ids]

        def work(db: sqlite3.Connection) -> int:
            return partners.remove(db, database.find(db, collection), wanted)

        return await self._write(work, of=collection, frees=True)

    async def delete_where(self, collection: str, where: Filter) -> int:
        """Delete the items that match a filter, and return the number of deleted items. The items are deleted page by
        page, so that other writes can run in between. Items that are written in the meantime are not deleted."""
        check_reference(collection)

        def span(db: sqlite3.Connection) -> tuple[Row, int]:
            row = database.find(db, collection)
            return row, database.last_number(db, row)

        row, last = await self._read(span, of=collection)
        gone, after, attempts = 0, 0, 0
        while after < last:
            choose = partial(choose_some, row=row, where=where, after=after, to=last)
            chosen = await self._read(choose, of=collection)  # a filter may take long, and writes wait for each other
            again = where if attempts == ATTEMPTS else None
            delete = partial(delete_chosen, row=row, chosen=chosen, where=again)
            deleted = await self._write(delete, of=collection, frees=True)
            if deleted is None:
                attempts += 1
            else:
                gone, after, attempts = gone + deleted, chosen.through, 0
        self._maintenance.wake()
        return gone

    async def count(self, collection: str, where: Filter | None = None) -> int:
        if where is None:
            return (await self.info(collection)).count
        check_reference(collection)
        return len(await self._read(lambda db: passing(db, database.find(db, collection), where), of=collection))

    async def facets(
        self, collection: str, path: MetadataPath, *, where: Filter | None = None, limit: int = 100
    ) -> Facets:
        check_reference(collection)

        def work(db: sqlite3.Connection) -> Facets:
            return value_counts(db, database.find(db, collection), path, where, limit)

        return await self._read(work, of=collection)

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

        return await self._read(work, of=collection)

    async def sample(self, collection: str, size: int, *, where: Filter | None = None) -> list[Item]:
        check_reference(collection)
        return await self._read(lambda db: sampled(db, database.find(db, collection), where, size), of=collection)

    # ---- snapshots

    @property
    def folder(self) -> Path:
        return self.path.parent

    async def snapshot(self, collection: str) -> SnapshotInfo:
        """Take a snapshot of a collection in its current state, and return the description of the snapshot."""
        return await self._taken(collection, self._snapshots, self._quotas)

    async def snapshots(self, collection: str) -> list[SnapshotInfo]:
        """Return the snapshots of a collection, oldest first. Snapshots are not deleted when their collection is
        dropped."""
        return await asyncio.to_thread(snapshots.listed, self._snapshots, await self._own_name(collection))

    async def snapshot_path(self, collection: str, name: str) -> Path:
        return path_of(self._snapshots, await self._own_name(collection), name)

    async def drop_snapshot(self, collection: str, name: str) -> None:
        path = await self.snapshot_path(collection, name)
        self._access.place.check()
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
        path = path_of(self._snapshots, check_name(source), name)
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
            restored = await restore(
                self._snapshots,
                files,
                aliases,
                replace=replace,
                write=self._write,
                quotas=self._quotas,
                damaged=self._access.damage,
            )
        finally:
            self._maintenance.wake()
        self.views.forget(restored.replaced)
        self._access.damage.forget(restored.replaced)
        return restored.infos

    async def snapshot_to(self, collection: str, root: Path) -> Path:
        taken = await self._taken(collection, root, Quotas())
        return path_of(root, taken.collection, taken.name)

    async def _taken(self, collection: str, root: Path, quotas: Quotas) -> SnapshotInfo:
        """Take a snapshot in the folder `root`, and return its description."""
        check_name(collection)
        if self._access.damage:
            await self._read(lambda db: None, of=collection)  # refuses a damaged collection
        self._access.place.check()
        try:
            return await asyncio.to_thread(snapshots.take, self.path, collection, root, quotas)
        except StorageDamaged as error:
            await self._access.mark(collection, error)
            raise explained(collection, error) from error

    async def add_snapshot(self, collection: str, file: Path) -> SnapshotInfo:
        self._access.place.check()
        return await asyncio.to_thread(snapshots.add, self._snapshots, check_name(collection), file, self._quotas)

    def upload_path(self) -> Path:
        self._access.place.check()
        return snapshots.upload_path(self._snapshots)

    async def _own_name(self, collection: str) -> str:
        """Return the name of the collection to which an alias points. If `collection` is not an alias, return it
        unchanged."""
        return (await self.aliases()).get(check_name(collection), collection)

    async def health(self) -> StoreHealth:
        return await self._access.health()

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

        return await self._read(work, of=collection, as_one=False)

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
    ) -> list[Hits]:
        if self._access.damage:
            await self._read(lambda db: None, of=collection)  # refuses a damaged collection
        try:
            return await self._searcher.search(
                collection, vectors, k, tag=tag, where=where, params=params, assumed=assumed, max_bytes=max_bytes
            )
        except StorageDamaged as error:
            await self._access.mark(collection, error)
            raise explained(collection, error) from error

    # ---- opening and closing

    def _load(self) -> None:
        """Open all segments at startup, so that the first search does not wait and damaged files are found early."""
        db = self._connect()
        with translated(f"vector store {self.path}"), snapshot(db):
            for row in database.with_partners(db):
                try:
                    self.views.at(db, row)
                except (StorageDamaged, sqlite3.DatabaseError) as error:
                    if isinstance(error, sqlite3.DatabaseError) and not sqlite.is_damage(error):
                        raise
                    self._access.damage.mark(row, error)

    async def settle(self, collection: str) -> None:
        """Merge all items of a collection into one segment, and return when this is done."""
        await asyncio.to_thread(self._maintenance.settle, check_name(collection))

    async def close(self) -> None:
        """Wait for running calls and close the store. A second call has no effect."""
        if self._access.is_open:
            self._access.is_open = False
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._maintenance.close()
        self._access.close_writer()
        self._searcher.close()
        self._access.close()


def _difference(old: CollectionSpec, new: CollectionSpec) -> str:
    fields = [name for name in CollectionSpec.__dataclass_fields__ if getattr(old, name) != getattr(new, name)]
    return "; ".join(f"{name} is {getattr(old, name)!r}, not {getattr(new, name)!r}" for name in fields)
