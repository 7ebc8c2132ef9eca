"""The embedded store: SQLite holds the truth, faiss answers, exactly.

One thread owns both. Every call is sent to it, so nothing overlaps: faiss aborts or answers wrongly when an index is
changed while it is searched (faiss#1504), SQLite connections belong to a thread, and the event loop never waits for
either. The price is that a search waits for a write before it; a store with snapshots takes that away, behind the same
protocol.

A write is acknowledged after SQLite's commit with `synchronous=FULL` in WAL mode, which has then been synced to disk.
The faiss indexes live in memory only and are built from SQLite at start, so there is no second file to disagree. If the
index cannot follow a committed write, it is dropped and built again by the next call.

The database is opened exclusively: a second process on the same folder would not see the first one's writes, so it is
refused with a message instead.
"""

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import faiss
import numpy as np
import numpy.typing as npt

from service.errors import CollectionNotFound, InvalidRequest, StorageFailed
from service.search.store import (
    CollectionInfo,
    Floats,
    Hit,
    Item,
    VectorStore,
    check_id,
    check_k,
    check_match,
    check_name,
    metadata_text,
    normalised,
)

T = TypeVar("T")

_APPLICATION_ID: Final = 0x64763273  # "dv2s", in the file's header: a foreign database is told from ours
_SCHEMA_VERSION: Final = 1
_SCHEMA: Final = f"""
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_SCHEMA_VERSION};
CREATE TABLE collections (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, tag TEXT NOT NULL, dimension INTEGER NOT NULL
);
CREATE TABLE items (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- what faiss calls the item, never used again for another
    collection INTEGER NOT NULL REFERENCES collections (id) ON DELETE CASCADE,
    id TEXT NOT NULL, vector BLOB NOT NULL, metadata TEXT NOT NULL,  -- float32, little-endian, length 1
    UNIQUE (collection, id)
);
"""
_UPSERT: Final = """
INSERT INTO items (collection, id, vector, metadata) VALUES (?, ?, ?, ?)
ON CONFLICT (collection, id) DO UPDATE SET vector = excluded.vector, metadata = excluded.metadata RETURNING number
"""
_BYTES: Final = np.dtype("<f4")


async def open_store(data_dir: Path) -> VectorStore:
    """Opens, or makes, the store in `data_dir`/search.sqlite3 and loads its vectors.

    Raises:
        StorageFailed: the folder or file cannot be used, is in use by another process, is damaged or is not ours; the
            message names the file.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="search")
    try:
        tables = await asyncio.get_running_loop().run_in_executor(thread, _Tables, data_dir / "search.sqlite3")
    except BaseException:
        thread.shutdown(wait=False)
        raise
    return ExactStore(tables, thread)


class ExactStore:
    """`VectorStore` over `_Tables`, called on its one thread."""

    def __init__(self, tables: "_Tables", thread: ThreadPoolExecutor) -> None:
        self._tables = tables
        self._thread = thread

    async def collections(self) -> list[CollectionInfo]:
        return await self._call(self._tables.collections)

    async def info(self, collection: str) -> CollectionInfo:
        check_name(collection)
        return await self._call(lambda: self._tables.info(collection))

    async def drop(self, collection: str) -> None:
        check_name(collection)
        await self._call(lambda: self._tables.drop(collection))

    async def upsert(self, collection: str, items: Sequence[Item], *, tag: str) -> CollectionInfo:
        check_name(collection)
        if not items:
            raise InvalidRequest("no items to write")
        return await self._call(lambda: self._tables.upsert(collection, items, tag))

    async def get(self, collection: str, ids: Sequence[str]) -> list[Item | None]:
        check_name(collection)
        return await self._call(lambda: self._tables.get(collection, ids))

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        check_name(collection)
        return await self._call(lambda: self._tables.delete(collection, ids))

    async def count(self, collection: str) -> int:
        return (await self.info(collection)).count

    async def search(self, collection: str, vector: npt.ArrayLike, k: int, *, tag: str) -> list[Hit]:
        check_name(collection)
        check_k(k)
        query = normalised(vector)
        return await self._call(lambda: self._tables.search(collection, query, k, tag))

    async def close(self) -> None:
        """Calls under way finish; calling again does nothing."""
        if self._tables.is_open:
            await self._call(self._tables.close)
            self._thread.shutdown()

    async def _call(self, action: Callable[[], T]) -> T:
        """On the owner's thread. A caller that is cancelled leaves a write that either happens or does not."""
        if not self._tables.is_open:
            raise StorageFailed("the vector store is closed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, action)


class _Tables:
    """SQLite and the indexes, for one thread only."""

    def __init__(self, path: Path) -> None:
        faiss.omp_set_num_threads(1)  # of this thread: a query is one row, and the cores belong to the engine
        self._path = path
        self._what = f"vector store {path}"  # in messages: to whoever starts it
        self._indexes: dict[str, Any] = {}  # collection name -> faiss.IndexIDMap2
        self.is_open = False
        with self._translated():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None)
            try:
                self._prepare()
                for info in self.collections():
                    self._index(info)
            except BaseException:
                self._db.close()
                raise
        self._what = "the vector store"  # to clients, whom the server's folders do not concern
        self.is_open = True

    def _prepare(self) -> None:
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        with self._transaction():  # also takes the lock, now rather than at the first write
            (application,) = self._db.execute("PRAGMA application_id").fetchone()
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not tables:
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
            elif (application, version) != (_APPLICATION_ID, _SCHEMA_VERSION):
                raise StorageFailed(
                    f"{self._path} is not a vector store of this version (application id {application:#x}, "
                    f"version {version}; expected {_APPLICATION_ID:#x}, version {_SCHEMA_VERSION})"
                )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The border to SQLite and the file system: their errors become ours."""
        try:
            yield
        except sqlite3.OperationalError as error:
            why = "it is in use by another process" if "locked" in str(error) else str(error)
            raise StorageFailed(f"{self._what}: {why}") from error
        except sqlite3.DatabaseError as error:
            raise StorageFailed(
                f"{self._what} is damaged or not a database ({error}); restore it from a backup, or move "
                "it away to start empty"
            ) from error
        except OSError as error:
            raise StorageFailed(f"{self._what}: {error.strerror}") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def close(self) -> None:
        self.is_open = False
        self._indexes.clear()
        with self._translated():
            self._db.close()

    # ---- collections

    def collections(self) -> list[CollectionInfo]:
        query = """SELECT name, tag, dimension, (SELECT count(*) FROM items WHERE collection = c.id)
                   FROM collections c ORDER BY name"""
        with self._translated():
            return [CollectionInfo(*row) for row in self._db.execute(query)]

    def info(self, name: str) -> CollectionInfo:
        number, tag, dimension = self._collection(name)
        index = self._indexes.get(name)
        if index is not None:  # it follows every write; SQLite would walk through all rows to count them
            return CollectionInfo(name, tag, dimension, index.ntotal)
        with self._translated():
            (count,) = self._db.execute("SELECT count(*) FROM items WHERE collection = ?", (number,)).fetchone()
        return CollectionInfo(name, tag, dimension, count)

    def _collection(self, name: str) -> tuple[int, str, int]:
        with self._translated():
            row = self._db.execute("SELECT id, tag, dimension FROM collections WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise CollectionNotFound(f"there is no collection {name!r}")
        return row[0], row[1], row[2]

    def drop(self, name: str) -> None:
        number, _, _ = self._collection(name)
        with self._translated(), self._transaction():
            self._db.execute("DELETE FROM collections WHERE id = ?", (number,))
        self._indexes.pop(name, None)

    # ---- items

    def upsert(self, name: str, items: Sequence[Item], tag: str) -> CollectionInfo:
        rows = {check_id(item.id): (normalised(item.vector), metadata_text(item.metadata)) for item in items}
        vectors = np.stack([vector for vector, _ in rows.values()]) if _same_length(rows) else None
        if vectors is None:
            raise InvalidRequest("the vectors of one call must have the same dimension")
        try:
            info = self.info(name)
        except CollectionNotFound:
            info = CollectionInfo(name, tag, vectors.shape[1], 0)
        check_match(info, tag=tag, dimension=vectors.shape[1])
        with self._translated(), self._transaction():
            make = "INSERT INTO collections (name, tag, dimension) VALUES (?, ?, ?) ON CONFLICT (name) DO NOTHING"
            self._db.execute(make, (name, tag, info.dimension))
            (number,) = self._db.execute("SELECT id FROM collections WHERE name = ?", (name,)).fetchone()
            (highest,) = self._db.execute("SELECT coalesce(max(number), 0) FROM items").fetchone()
            numbers = np.empty(len(rows), np.int64)
            for i, (item_id, (vector, metadata)) in enumerate(rows.items()):
                values = (number, item_id, vector.astype(_BYTES).tobytes(), metadata)
                (numbers[i],) = self._db.execute(_UPSERT, values).fetchone()
        # If memory ends between commit and index, the index is gone, and built again when it is next wanted.
        index = self._indexes.pop(name, None)
        if index is not None:
            replaced = numbers[numbers <= highest]
            if len(replaced):  # removing walks through the whole index, whatever it removes
                index.remove_ids(replaced)
            index.add_with_ids(vectors, numbers)
            self._indexes[name] = index
        return self.info(name)

    def get(self, name: str, ids: Sequence[str]) -> list[Item | None]:
        number, _, _ = self._collection(name)
        query = "SELECT vector, metadata FROM items WHERE collection = ? AND id = ?"
        found: list[Item | None] = []
        with self._translated():
            for item_id in ids:
                row = self._db.execute(query, (number, check_id(item_id))).fetchone()
                vector = None if row is None else np.frombuffer(row[0], _BYTES).astype(np.float32)
                found.append(None if vector is None else Item(item_id, vector, self._metadata(item_id, row[1])))
        return found

    def delete(self, name: str, ids: Sequence[str]) -> int:
        number, _, _ = self._collection(name)
        query = "DELETE FROM items WHERE collection = ? AND id = ? RETURNING number"
        with self._translated(), self._transaction():
            gone = [
                row[0] for item_id in ids for row in self._db.execute(query, (number, check_id(item_id))).fetchall()
            ]
        index = self._indexes.pop(name, None)
        if index is not None:
            if gone:
                index.remove_ids(np.array(gone, np.int64))
            self._indexes[name] = index
        return len(gone)

    def search(self, name: str, query: Floats, k: int, tag: str) -> list[Hit]:
        info = self.info(name)
        check_match(info, tag=tag, dimension=len(query))
        k = min(k, info.count)
        if not k:
            return []
        scores, numbers = self._index(info).search(query[None], k)
        query_rows = "SELECT number, id, metadata FROM items WHERE number IN (SELECT value FROM json_each(?))"
        with self._translated():
            rows = self._db.execute(query_rows, (json.dumps(numbers[0].tolist()),))
            items = {number: (item_id, self._metadata(item_id, text)) for number, item_id, text in rows}
        hits = [
            Hit(items[number][0], float(np.clip(score, -1, 1)), items[number][1])
            for number, score in zip(numbers[0].tolist(), scores[0], strict=True)
        ]
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))

    def _metadata(self, item_id: str, text: str) -> dict[str, Any]:
        """What `metadata_text` has made, unless the file was damaged since."""
        try:
            metadata = json.loads(text)
            if not isinstance(metadata, dict):
                raise ValueError(f"a JSON object was stored, and it is {type(metadata).__name__}")
        except (TypeError, ValueError, RecursionError) as error:
            raise StorageFailed(f"{self._what} is damaged: the metadata of item {item_id!r} is broken") from error
        return metadata

    def _index(self, info: CollectionInfo) -> Any:
        """The collection's faiss index; built from SQLite if there is none."""
        index = self._indexes.get(info.name)
        if index is None:
            index = faiss.IndexIDMap2(faiss.IndexFlatIP(info.dimension))
            number, _, dimension = self._collection(info.name)
            with self._translated():
                cursor = self._db.execute("SELECT number, vector FROM items WHERE collection = ?", (number,))
                while rows := cursor.fetchmany(4096):
                    index.add_with_ids(self._vectors(rows, dimension), np.array([row[0] for row in rows], np.int64))
            self._indexes[info.name] = index
        return index

    def _vectors(self, rows: list[tuple[int, bytes]], dimension: int) -> Floats:
        """Stored vectors [n, D]. SQLite has no checksums, but a vector whose norm is not 1 is none of ours."""
        if any(len(vector) != dimension * _BYTES.itemsize for _, vector in rows):
            raise StorageFailed(f"{self._what} is damaged: a vector has the wrong size")
        vectors = np.frombuffer(b"".join(vector for _, vector in rows), _BYTES).reshape(len(rows), dimension)
        with np.errstate(all="ignore"):
            whole = np.abs(np.linalg.norm(vectors, axis=1) - 1) < 1e-3  # False for NaN
        if not whole.all():
            number = rows[int(np.argmin(whole))][0]
            raise StorageFailed(f"{self._what} is damaged: the vector of item number {number} is broken")
        return vectors.astype(np.float32)


def _same_length(rows: dict[str, tuple[Floats, str]]) -> bool:
    return len({len(vector) for vector, _ in rows.values()}) == 1
