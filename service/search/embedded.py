"""The embedded store: SQLite holds the truth, faiss answers, and neither waits for the other.

    write   ─▶ writer thread ─▶ SQLite (one transaction, synced) ─▶ the view follows
    search  ─▶ search threads ─▶ stamp? ─▶ View ─▶ faiss ─▶ what the view says of the hits
    meanwhile  maintenance: tail ─▶ segment, segments ─▶ one segment; recall measured (`service/search/maintenance.py`)

A search looks at the stamp that every commit changes and, if it has changed, brings the view up to date, so it sees
every acknowledged write, of this process or of another on the same folder, and none half.

Equal scores come by id, so scores are rounded to six digits: sums in another order differ in the seventh.
"""

import asyncio
import logging
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import faiss
import numpy as np
import numpy.typing as npt
import orjson

from model.engine import available_cpus
from service.errors import CollectionNotFound, Conflict, InvalidRequest, ItemNotFound, StorageFailed
from service.search import database, snapshots
from service.search.database import Numbers, Row, snapshot, translated
from service.search.filter_sql import to_sql
from service.search.filters import Filter, matches
from service.search.maintenance import Maintenance
from service.search.segments import Found
from service.search.selection import Selections, passing
from service.search.stamp import Stamp
from service.search.store import (
    MAX_DEPTH,
    CollectionInfo,
    CollectionSpec,
    Floats,
    Hit,
    Item,
    Metadata,
    Page,
    SearchParams,
    SnapshotInfo,
    VectorStore,
    check_id,
    check_k,
    check_match,
    check_name,
    check_source,
    merged,
    metadata_text,
    normalised,
    normalised_rows,
)
from service.search.threads import Workers, Write, commit_together
from service.search.view import View, Views

T = TypeVar("T")
log = logging.getLogger(__name__)

DIGITS: Final = 6
"""Of a score."""
MAX_KNOWN: Final = 10_000
_PAGE: Final = 1000
"""Items that one transaction deletes by filter: others may write in between."""
_ATTEMPTS: Final = 100
"""Of a search with a filter; after them it is not a write in between, and the thread must not turn for ever."""
_ITEM: Final = "i.number, i.id, i.metadata, i.source, i.digest"


async def open_embedded(data_dir: Path, *, threads: int | None = None, **maintenance: Any) -> VectorStore:
    """Opens, or makes, the store in `data_dir`.

    Args:
        threads: that search; by default half as many as CPUs, since each needs the interpreter for a part of its time.

    Raises:
        StorageFailed: the folder or file cannot be used, is damaged or is not ours; the message names the file.
    """
    return await asyncio.to_thread(
        EmbeddedStore, data_dir, threads=threads or max(1, available_cpus() // 2), **maintenance
    )


@dataclass(frozen=True)
class _Query:
    """One call of `search`."""

    collection: str
    vectors: Floats  # [q, D], length 1
    k: int
    tag: str
    where: Filter | None
    params: SearchParams


class EmbeddedStore:
    """`VectorStore` in a folder. Several processes of one host may have it open."""

    capabilities = frozenset({"atomic_upsert", "idempotency", "index_kinds", "snapshots", "stats"})

    def __init__(self, data_dir: Path, *, threads: int, **maintenance: Any) -> None:
        self.path = data_dir / "search.sqlite3"
        database.prepare(self.path)
        self.views = Views(data_dir / "segments")
        self.stamp = Stamp(data_dir / "search.stamp")
        self._known: dict[str, tuple[int, View]] = {}  # name or alias -> stamp and the view that it stands for
        self._snapshots = data_dir / "snapshots"
        self._selections = Selections()
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._maintenance = Maintenance(data_dir, self.views, self.stamp, self._connect, **maintenance)
        self._load()
        self._writer: Workers[Write] = Workers("store-write", 1, self._make_writer)
        self._searchers: Workers[_Query] = Workers("store-search", threads, self._make_searcher)
        self._readers = ThreadPoolExecutor(max(2, threads), thread_name_prefix="store-read")
        self._is_open = True
        self._maintenance.start()

    # ---- collections

    async def create(self, collection: str, spec: CollectionSpec) -> CollectionInfo:
        check_name(collection)

        def work(db: sqlite3.Connection) -> CollectionInfo:
            try:
                row = database.find(db, collection)
            except CollectionNotFound:
                return _info(database.make(db, collection, spec))
            if row.name != collection:
                raise Conflict(f"{collection!r} is an alias of {row.name!r}")
            if row.spec != spec:
                raise Conflict(f"collection {collection!r} exists with other settings: {_difference(row.spec, spec)}")
            return _info(row)

        return await self._write(work)

    async def collections(self) -> list[CollectionInfo]:
        return await self._read(lambda db: [_info(row) for row in database.every(db)])

    async def info(self, collection: str) -> CollectionInfo:
        check_name(collection)
        return await self._read(lambda db: _info(database.find(db, collection)))

    async def drop(self, collection: str) -> None:
        check_name(collection)

        def work(db: sqlite3.Connection) -> int:
            row = database.find(db, collection)
            if row.name != collection:
                raise Conflict(f"{collection!r} is an alias of {row.name!r}: delete the alias, or the collection")
            names = [name for (name,) in db.execute("SELECT name FROM aliases WHERE collection = ?", (row.key,))]
            if names:
                raise Conflict(f"collection {collection!r} has the aliases {', '.join(map(repr, names))}")
            database.drop(db, row.key)
            return row.key

        self.views.forget({await self._write(work)})
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
        self, collection: str, items: Sequence[Item], *, tag: str, request_key: str | None = None
    ) -> CollectionInfo:
        check_name(collection)
        if not items:
            raise InvalidRequest("no items to write")
        checked = {check_id(check_source(i).id): (i, normalised(i.vector), metadata_text(i.metadata)) for i in items}
        dimensions = {len(vector) for _, vector, _ in checked.values()}
        if len(dimensions) > 1:
            raise InvalidRequest("the vectors of one call must have the same dimension")
        dimension = dimensions.pop()

        def work(db: sqlite3.Connection) -> CollectionInfo:
            try:
                row = database.find(db, collection)
            except CollectionNotFound:
                row = database.make(db, collection, CollectionSpec(tag, dimension))
            check_match(_info(row), tag=tag, dimension=dimension)
            rows = [(item, vector.astype(row.dtype).tobytes(), text) for item, vector, text in checked.values()]
            if request_key is not None:
                digest = database.request_digest(rows)
                done = database.already_done(db, row.key, request_key, digest, time.time())
                if done is None:
                    raise Conflict(f"the idempotency key {request_key[:80]!r} was used with other items")
                if done:
                    return _info(row)
            database.upsert(db, row.key, rows)
            return _info(database.find(db, collection))

        info: CollectionInfo = await self._write(work)
        self._maintenance.wake()
        return info

    async def get(self, collection: str, ids: Sequence[str]) -> list[Item | None]:
        check_name(collection)
        wanted = [check_id(item_id) for item_id in ids]

        def work(db: sqlite3.Connection) -> list[Item | None]:
            row = database.find(db, collection)
            query = f"SELECT {_ITEM} FROM items_{row.key} i WHERE id = ?"
            found = [db.execute(query, (item_id,)).fetchone() for item_id in wanted]
            items = iter(_items(db, row, [place for place in found if place is not None]))
            return [None if place is None else next(items) for place in found]

        return await self._read(work)

    async def patch(self, collection: str, item_id: str, metadata: Metadata) -> Item:
        check_name(collection), check_id(item_id), metadata_text(metadata)

        def work(db: sqlite3.Connection) -> Item:
            row = database.find(db, collection)
            query = f"SELECT {_ITEM} FROM items_{row.key} i WHERE id = ?"
            found = db.execute(query, (item_id,)).fetchone()
            if found is None:
                raise ItemNotFound(f"collection {collection!r} holds no item {item_id[:80]!r}", param="id")
            text = metadata_text(merged(_metadata(item_id, found[2]), metadata))
            database.edit(db, row.key, found[0], text)
            return _items(db, row, [(*found[:2], text, *found[3:])])[0]

        return await self._write(work)

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        check_name(collection)
        wanted = [check_id(item_id) for item_id in ids]

        def work(db: sqlite3.Connection) -> int:
            row = database.find(db, collection)
            query = f"SELECT number FROM items_{row.key} WHERE id = ?"
            found = [db.execute(query, (item_id,)).fetchone() for item_id in dict.fromkeys(wanted)]
            return database.remove(db, row.key, [place[0] for place in found if place is not None])

        return await self._write(work)

    async def delete_where(self, collection: str, where: Filter) -> int:
        """Some at a time, so that other writes need not wait; what is written meanwhile stays."""
        check_name(collection)
        row, last = await self._read(lambda db: (row := database.find(db, collection), database.last_number(db, row)))
        gone, after = 0, 0
        while after < last:
            some, after = await self._write(partial(_delete_some, row=row, where=where, after=after, to=last))
            gone += some
        self._maintenance.wake()
        return gone

    async def count(self, collection: str, where: Filter | None = None) -> int:
        if where is None:
            return (await self.info(collection)).count
        check_name(collection)
        return len((await self._read(lambda db: _found(db, collection, where)))[1])

    async def scroll(
        self, collection: str, *, where: Filter | None = None, cursor: str | None = None, limit: int = 100
    ) -> Page:
        """In the order of writing."""
        check_name(collection)
        after = _after(cursor)

        def work(db: sqlite3.Connection) -> Page:
            row = database.find(db, collection)
            condition, parameters = _condition(where)
            query = f"SELECT {_ITEM} FROM items_{row.key} i WHERE number > ? AND {condition} ORDER BY number LIMIT ?"
            found = db.execute(query, (after, *parameters, limit + 1)).fetchall()
            more = len(found) > limit
            return Page(_items(db, row, found[:limit]), f"n{found[limit - 1][0]}" if more else None)

        return await self._read(work)

    # ---- snapshots

    async def snapshot(self, collection: str) -> SnapshotInfo:
        """Keeps the collection as it is now."""
        return await asyncio.to_thread(snapshots.take, self.path, check_name(collection), self._snapshots)

    async def snapshots(self, collection: str) -> list[SnapshotInfo]:
        """Of a collection by its own name, oldest first; they outlive it."""
        return await asyncio.to_thread(snapshots.listed, self._snapshots, await self._own_name(collection))

    async def snapshot_path(self, collection: str, name: str) -> Path:
        return snapshots.path_of(self._snapshots, await self._own_name(collection), name)

    async def drop_snapshot(self, collection: str, name: str) -> None:
        path = await self.snapshot_path(collection, name)
        with translated(f"snapshot {name}"):
            path.unlink()

    async def restore(self, collection: str, source: str, name: str) -> CollectionInfo:
        """Makes `collection` of a snapshot that was taken of `source`.

        Raises:
            Conflict: the name is taken; NotFound, StorageFailed: there is no such snapshot; it is damaged.
        """
        path = snapshots.path_of(self._snapshots, check_name(source), name)
        await self._read(lambda db: _check_free(db, check_name(collection)))
        kept, rows = await asyncio.to_thread(snapshots.read, path)
        hidden = f"{snapshots.RESTORING}{int(time.time())}:{uuid.uuid4().hex}"
        row: Row = await self._write(lambda db: database.make(db, hidden, kept.spec))
        try:
            while (some := await asyncio.to_thread(next, rows, None)) is not None:
                await self._write(partial(snapshots.insert, row=row, items=some[0], vectors=some[1]))
            return await self._write(partial(_named, row=row, name=collection))
        except BaseException:
            await asyncio.shield(self._write(partial(database.drop, key=row.key)))
            raise
        finally:
            self._maintenance.wake()

    async def _own_name(self, collection: str) -> str:
        """What an alias leads to; any other name as it is."""
        return (await self.aliases()).get(check_name(collection), collection)

    async def stats(self, collection: str) -> dict[str, Any]:
        """How the collection is indexed, for whoever looks after it."""
        check_name(collection)

        def work(db: sqlite3.Connection) -> dict[str, Any]:
            view = self._view(db, collection)
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
    ) -> list[list[Hit]]:
        query = _Query(
            check_name(collection), normalised_rows(vectors), check_k(k), tag, where, params or SearchParams()
        )
        alike = (collection, k, tag, query.params, query.vectors.shape[1]) if where is None else object()
        found: list[list[Hit]] = await self._searchers.do(query, alike)
        return found

    def _make_searcher(self) -> Callable[[Sequence[_Query]], Sequence[Any]]:
        faiss.omp_set_num_threads(
            1
        )  # of this thread: queries run beside each other, and the cores belong to the engine
        db = self._connect()

        def work(together: Sequence[_Query]) -> Sequence[Any]:
            vectors = together[0].vectors if len(together) == 1 else np.concatenate([one.vectors for one in together])
            with translated():
                answers = iter(self._answer(db, together[0], vectors))
            return [[next(answers) for _ in one.vectors] for one in together]

        return work

    def _answer(self, db: sqlite3.Connection, query: _Query, vectors: Floats) -> list[list[Hit]]:
        """For each of the vectors; `query` says the rest."""
        attempts = 0
        while True:
            attempts += 1
            view = self._view(db, query.collection)
            row = view.row
            check_match(_info(row), tag=query.tag, dimension=vectors.shape[1])
            if not row.count:
                return [[] for _ in vectors]
            allowed = None if query.where is None else self._selections.allowed(db, view, query.where)
            widen = self._maintenance.boost(row)
            candidates = _nearest(
                partial(view.search, vectors, params=query.params, allowed=allowed, widen=widen),
                query.k,
                row.count,
            )
            answers = [_hits(view, best, query.k) for best in candidates]
            if query.where is None:
                self._maintenance.observe(view, vectors, candidates, query.params)
            elif not all(matches(query.where, hit.metadata) for hits in answers for hit in hits):
                if attempts < _ATTEMPTS:
                    continue  # it was changed between the filter's answer and this one
                answers = [[hit for hit in hits if matches(query.where, hit.metadata)] for hits in answers]
            return answers

    def _view(self, db: sqlite3.Connection, name: str) -> View:
        """The view of a collection (or alias) that holds every write acknowledged until now."""
        stamp = self.stamp.read()
        known = self._known.get(name)
        if known is not None and known[0] == stamp:
            return known[1]
        self._known.pop(name, None)
        view = self.views.newest(db, database.find(db, name))
        if len(self._known) > MAX_KNOWN:
            self._known.clear()
        self._known[name] = (stamp, view)
        return view

    # ---- threads

    def _connect(self) -> sqlite3.Connection:
        db = database.connect(self.path)
        self._connections.append(db)
        return db

    def _load(self) -> None:
        """Open all segments now, so that the first search does not wait for it, and damage is found at the start."""
        db = self._connect()
        with translated(f"vector store {self.path}"), snapshot(db):
            rows = database.every(db)
            for row in rows:
                self.views.at(db, row)

    def _make_writer(self) -> Callable[[Sequence[Write]], Sequence[Any]]:
        db = self._connect()

        def work(writes: Sequence[Write]) -> Sequence[Any]:
            try:
                return commit_together(db, writes)
            except StorageFailed:
                if len(writes) == 1:
                    raise
                return [_alone(db, write) for write in writes]  # one may be too large for the disk, and the others not
            finally:
                self.stamp.bump()

        return work

    async def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        done: T = await self._writer.do(work)
        return done

    async def _read(self, work: Callable[[sqlite3.Connection], T], *, as_one: bool = True) -> T:
        """In a thread, in one transaction unless `as_one` is false."""
        if not self._is_open:
            raise StorageFailed("the vector store is closed")

        def run() -> T:
            db = getattr(self._local, "db", None)
            if db is None:
                db = self._local.db = self._connect()
            with translated(), snapshot(db) if as_one else nullcontext():
                return work(db)

        return await asyncio.get_running_loop().run_in_executor(self._readers, run)

    async def settle(self, collection: str) -> None:
        """Build now what maintenance would build when the store is idle, and wait for it."""
        await asyncio.to_thread(self._maintenance.settle, check_name(collection))

    async def close(self) -> None:
        """Calls under way finish; calling again does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._maintenance.close()
        self._writer.close()
        self._searchers.close()
        self._readers.shutdown()
        for db in self._connections:
            db.close()


def _alone(db: sqlite3.Connection, write: Write) -> Any:
    try:
        return commit_together(db, [write])[0]
    except StorageFailed as error:
        return error


def _info(row: Row) -> CollectionInfo:
    return CollectionInfo(row.name, row.spec, row.count)


def _check_free(db: sqlite3.Connection, name: str) -> None:
    try:
        row = database.find(db, name)
    except CollectionNotFound:
        return
    raise Conflict(f"{name!r} is {'a collection' if row.name == name else 'an alias'} already: restore to another name")


def _named(db: sqlite3.Connection, row: Row, name: str) -> CollectionInfo:
    """A restored collection gets its name."""
    _check_free(db, name)
    db.execute("UPDATE collections SET name = ?, version = version + 1 WHERE id = ?", (name, row.key))
    return _info(database.find(db, name))


def _difference(old: CollectionSpec, new: CollectionSpec) -> str:
    fields = [name for name in CollectionSpec.__dataclass_fields__ if getattr(old, name) != getattr(new, name)]
    return "; ".join(f"{name} is {getattr(old, name)!r}, not {getattr(new, name)!r}" for name in fields)


def _condition(where: Filter | None) -> tuple[str, list[Any]]:
    return ("1", []) if where is None else to_sql(where)


def _found(db: sqlite3.Connection, collection: str, where: Filter) -> tuple[Row, Numbers]:
    row = database.find(db, collection)
    return row, passing(db, row, where)


def _delete_some(db: sqlite3.Connection, row: Row, where: Filter, after: int, to: int) -> tuple[int, int]:
    """Delete the next of what passes; how many, and up to which number it has looked."""
    database.check_exists(db, row)
    condition, parameters = to_sql(where)
    query = f"SELECT number FROM items_{row.key} WHERE number > ? AND number <= ? AND {condition} ORDER BY 1 LIMIT ?"
    numbers = [number for (number,) in db.execute(query, (after, to, *parameters, _PAGE))]
    return database.remove(db, row.key, numbers), numbers[-1] if len(numbers) == _PAGE else to


def _after(cursor: str | None) -> int:
    """The number that a cursor continues behind."""
    if cursor is None:
        return 0
    digits = cursor.removeprefix("n")
    if digits == cursor or not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        raise InvalidRequest(f"cursor {cursor[:80]!r} is none of this store's", param="cursor")
    return int(digits)


def _items(db: sqlite3.Connection, row: Row, found: Sequence[tuple[Any, ...]]) -> list[Item]:
    """Items of rows (number, id, metadata, source, digest), with their vectors."""
    query = f"SELECT number, vector, crc FROM vectors_{row.key} WHERE number = ?"
    vectors = [db.execute(query, (place[0],)).fetchone() for place in found]
    if None in vectors:
        raise StorageFailed("the vector store is damaged: an item has no vector")
    matrix = database.vectors_of(row, vectors)[1]
    return [
        Item(item_id, vector, _metadata(item_id, text), source, digest)
        for (_, item_id, text, source, digest), vector in zip(found, matrix, strict=True)
    ]


def _metadata(item_id: str, text: Any) -> dict[str, Any]:
    """What `metadata_text` has made, unless the file was damaged since."""
    try:
        metadata = orjson.loads(text)
        if not isinstance(metadata, dict):
            raise ValueError(f"a JSON object was stored, and it is {type(metadata).__name__}")
    except (TypeError, ValueError) as error:
        raise StorageFailed(f"the vector store is damaged: the metadata of item {item_id!r} is broken") from error
    return metadata


def _nearest(find: Callable[..., Found], k: int, count: int) -> list[list[tuple[float, int]]]:
    """For each vector the (score, place) of its k nearest, best first, and of those that tie with the last of them.
    `find` is the search, still without its k."""
    depth = min(k + 1, count)
    while True:
        found = find(k=depth)
        answers = [
            [(round(score, DIGITS), place) for score, place in zip(scores, places, strict=True) if place >= 0]
            for scores, places in zip(found.scores.tolist(), found.places.tolist(), strict=True)
        ]
        tied = any(len(best) == depth > k and best[-1][0] == best[k - 1][0] for best in answers)
        if not tied or depth >= min(count, MAX_DEPTH):
            break
        depth = min(4 * depth, count, MAX_DEPTH)
    return [[pair for pair in best if pair[0] >= best[min(k, len(best)) - 1][0]] for best in answers]


def _hits(view: View, best: list[tuple[float, int]], k: int) -> list[Hit]:
    """Candidates (score, place) with their ids and metadata; the k best, equal scores by id."""
    hits = []
    for score, place in best:
        try:
            item_id, metadata, source = orjson.loads(view.payload(place))
        except ValueError as error:
            raise StorageFailed("the vector store is damaged: the metadata of an item is broken") from error
        hits.append(Hit(item_id, min(1.0, max(-1.0, score)), metadata, source))
    hits.sort(key=lambda hit: (-hit.score, hit.id))
    return hits[:k]
