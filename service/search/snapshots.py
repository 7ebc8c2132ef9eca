"""Takes, lists, reads and restores snapshots. A snapshot is an SQLite file that contains one collection as it was at
one moment.

A snapshot is taken within one read transaction, so it is consistent even if items are written at the same time. It is
written to a temporary file, which is then synced and renamed. The file contains only the database rows of the
collection. Its segments are rebuilt after a restore. A restore writes the items to a hidden collection, page by page,
so that other writes can run between two pages. At the end, the hidden collection is renamed to the requested name.
"""

import json
import logging
import reprlib
import sqlite3
import time
import uuid
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from model.files import lock_file, publish
from service import sqlite
from service.errors import InvalidRequest, NotFound, StorageFailed
from service.search import database
from service.search.checks import check_id, check_source, metadata_text
from service.search.database import Row
from service.search.quotas import Quotas
from service.search.schema import SCHEMA
from service.search.snapshot_files import NAME, file_of, is_regular, new_name, opened, path_of, reading
from service.search.specs import check_spec
from service.search.store import Item, SnapshotInfo
from service.sqlite import transaction, translated

log = logging.getLogger(__name__)

_UPLOAD_KEPT_S: Final = 24 * 3600.0
_CHUNK: Final = 2000
_YOUNG_S: Final = 60.0
"""`tidy` does not remove files that are younger than this number of seconds, because the process that created such a
file may not have locked it yet."""
_LENGTH_ERROR: Final = 0.01  # many times the rounding error of float16 vectors with thousands of numbers
_NO_VECTOR: Final = np.zeros(0, np.float32)

ItemRow = tuple[int, str, str, str | None, str | None]
VectorRow = tuple[int, bytes, int]


def take(source: Path, collection: str, root: Path, quotas: Quotas) -> SnapshotInfo:
    """Write a snapshot of a collection in the database `source` to a new file below `root`. Return the description of
    the snapshot. `collection` is the name of the collection or an alias.

    Raises:
        CollectionNotFound: the collection does not exist.
        QuotaExceeded: there is no room for another snapshot.
        StorageFailed: the snapshot cannot be written, for example because the disk is full.
    """
    with translated("the snapshot"):
        quotas.check_snapshots(root)
        with closing(sqlite.connect(source, read_only=True)) as db:
            collection = database.find(db, collection).name
        with new_name(root, collection) as (name, aside):
            _write(source, collection, aside)
            quotas.check_snapshots(root, adding=aside.stat().st_size)
            publish(aside, file_of(root, collection, name))
    return describe(root, collection, name)


def _write(source: Path, collection: str, target: Path) -> None:
    sqlite.prepare(target, SCHEMA, mode="DELETE", what="the snapshot")  # a single file without a write-ahead log
    with closing(sqlite3.connect(target, isolation_level=None, uri=True)) as db:
        # The source is attached read-only. Otherwise, BEGIN IMMEDIATE would block its writers.
        db.execute("ATTACH ? AS source", (_read_only(source),))
        with transaction(db):
            copied = database.find(db, collection, schema="source")
            made = database.make(db, collection, copied.spec, earlier=copied.earlier)
            for table in ("items", "vectors"):
                db.execute(f"INSERT INTO main.{table}_{made.key} SELECT * FROM source.{table}_{copied.key}")
            db.execute("UPDATE main.collections SET count = ?", (copied.count,))


def upload_path(root: Path) -> Path:
    """Return a new path for a file that may become a snapshot with `add`. `tidy` removes the file after
    `_UPLOAD_KEPT_S` seconds if that does not happen."""
    with translated("the snapshot"):
        root.mkdir(exist_ok=True)
    return root / f".{uuid.uuid4().hex}.upload"


def add(root: Path, collection: str, file: Path, quotas: Quotas) -> SnapshotInfo:
    """Check the snapshot in `file` and move it into the folder of the collection's snapshots. Return its description.

    The whole file is checked: its structure, its settings, all items and vectors, and their number.

    Raises:
        InvalidRequest: the file is damaged or not a snapshot.
        QuotaExceeded: there is no room for another snapshot.
        StorageFailed: the file cannot be read or moved.
    """
    with translated("the snapshot"):
        quotas.check_snapshots(root, adding=file.lstat().st_size)
    _check_all(file, "the uploaded snapshot")
    with translated("the snapshot"), new_name(root, collection) as (name, _):
        publish(file, file_of(root, collection, name))
    return describe(root, collection, name)


def _check_all(file: Path, what: str) -> None:
    """Raise InvalidRequest if a restore of the snapshot in `file` would fail, or if its number of items is wrong."""
    row, pages = read(file, what)
    count = sum(len(items) for items, _ in pages)
    if count != row.count:
        raise InvalidRequest(f"{what} is damaged: it has {count} items, but its settings say {row.count}")
    with reading(what), closing(opened(file, what)) as db:
        # The table is read without its index, because the index of a damaged file may be wrong.
        query = f"SELECT id FROM items_{row.key} NOT INDEXED GROUP BY id HAVING count(*) > 1 LIMIT 1"
        twice = db.rows(query)
    if twice:
        raise InvalidRequest(f"{what} is damaged: two items have the id {reprlib.repr(twice[0][0])}")


def listed(root: Path, collection: str) -> list[SnapshotInfo]:
    """Return the snapshots of a collection, oldest first. The collection need not exist any more.

    If a snapshot is damaged, its `count` and `tag` are None.
    """
    folder = root / collection
    is_there = folder.is_dir() and not folder.is_symlink()
    names = sorted(path.stem for path in folder.glob("*.sqlite3") if is_regular(path)) if is_there else []
    infos = []
    for name in names:
        if NAME.fullmatch(name):
            with suppress(NotFound):  # the snapshot was just deleted
                infos.append(_described(root, collection, name))
    return infos


def _described(root: Path, collection: str, name: str) -> SnapshotInfo:
    try:
        return describe(root, collection, name)
    except (InvalidRequest, StorageFailed) as error:
        info = _info(root, collection, name, None, None)
        log.error("%s", error)
        return info


def describe(root: Path, collection: str, name: str) -> SnapshotInfo:
    """Return the description of a snapshot.

    Raises:
        NotFound: the snapshot does not exist.
        InvalidRequest: the snapshot is damaged.
        StorageFailed: the file cannot be read.
    """
    path = path_of(root, collection, name)
    with reading(f"snapshot {name}"), closing(opened(path)) as db:
        rows = db.rows("SELECT count, json_extract(spec, '$.tag') FROM collections LIMIT 2")
    count, tag = rows[0] if rows else (None, None)
    if not (isinstance(count, int) and isinstance(tag, str)):
        raise InvalidRequest(f"snapshot {name} is damaged: its count or its tag cannot be read")
    return _info(root, collection, name, count, tag)


def _info(root: Path, collection: str, name: str, count: int | None, tag: str | None) -> SnapshotInfo:
    created = f"{name[:4]}-{name[4:6]}-{name[6:11]}:{name[11:13]}:{name[13:]}"
    try:
        size = file_of(root, collection, name).lstat().st_size
    except FileNotFoundError as error:
        raise NotFound(f"collection {collection!r} has no snapshot {name!r}") from error
    return SnapshotInfo(name, collection, created, size, count, tag)


def read(path: Path, what: str | None = None) -> tuple[Row, Generator[tuple[list[ItemRow], list[VectorRow]]]]:
    """Open the snapshot at `path`. Return two things: the state of its collection, and a generator of pages of rows.
    Each page is a pair of lists: rows of the table `items`, and rows of the table `vectors`. `what` names the snapshot
    in error messages.

    The file may come from anywhere, so its contents are checked as strictly as the items in a request.

    Raises:
        InvalidRequest: the file is damaged, is not a snapshot, or contains values that are not allowed. The generator
            may also raise this error.
        StorageFailed: the file cannot be read.
    """
    what = what or f"snapshot {path.stem}"
    with reading(what):
        db = opened(path, what)
        try:
            [(state,)] = db.rows("PRAGMA quick_check(1)")
            if state != "ok":
                raise InvalidRequest(f"{what} is damaged: {state}")
            row = _only_collection(db, what)
        except BaseException:
            db.close()
            raise

    def rows() -> Generator[tuple[list[ItemRow], list[VectorRow]]]:
        after = 0
        with closing(db), reading(what):
            while True:
                page = f"_{row.key} WHERE number > {after} ORDER BY number LIMIT {_CHUNK}"
                items = db.rows("SELECT number, id, metadata, source, digest FROM items" + page)
                vectors = db.rows("SELECT number, vector, crc FROM vectors" + page)
                numbers = [item[0] for item in items]
                if numbers != [vector[0] for vector in vectors] or not all(map(_is_number, numbers)):
                    raise InvalidRequest(f"{what} is damaged: items and vectors differ")
                if len(set(numbers)) != len(numbers):
                    raise InvalidRequest(f"{what} is damaged: two items have the same number")
                try:
                    _, matrix = database.vectors_of(row, vectors, what)
                except StorageFailed as error:
                    raise InvalidRequest(error.detail) from error
                lengths = np.linalg.norm(matrix, axis=1)
                if not (np.abs(lengths - 1) < _LENGTH_ERROR).all():
                    raise InvalidRequest(f"{what} is damaged: the length of a vector is not 1")
                if not items:
                    return
                yield [_checked(item, what) for item in items], vectors
                after = items[-1][0]

    return row, rows()


class Reference(NamedTuple):
    """The two fields of an item that say which image it was made from."""

    source: str | None
    digest: str | None


def references(path: Path) -> Generator[list[Reference]]:
    """Open the snapshot at `path`, and return a generator of pages. Each page lists the references of some items.

    Raises:
        InvalidRequest, StorageFailed: see `read`.
    """
    _, pages = read(path)
    return ([Reference(source, digest) for _, _, _, source, digest in items] for items, _ in pages)


def _only_collection(db: sqlite3.Connection, what: str) -> Row:
    try:
        (row,) = database.in_snapshot(db)
        check_spec(row.spec)
        database.earlier_of(row.earlier)  # raises an error if the text is damaged
    except InvalidRequest as error:
        raise InvalidRequest(f"{what} cannot be restored: {error.detail}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:  # invalid JSON settings
        raise InvalidRequest(f"{what} is damaged: its settings cannot be read: {error}") from error
    if type(row.count) is not int or row.count < 0:
        raise InvalidRequest(f"{what} is damaged: its number of items is {reprlib.repr(row.count)}")
    return row


def _is_number(number: object) -> bool:
    """Return whether `number` is allowed as the number of an item. SQLite gives each new item a higher number than all
    previous ones, so numbers near SQLite's limit are not allowed."""
    return isinstance(number, int) and 0 < number < 2**53


def _checked(row: ItemRow, what: str) -> ItemRow:
    """Check an item's row, and return it with its metadata in the format that a write would store. Raises
    InvalidRequest if a value in the row is not allowed."""
    number, item_id, metadata, source, digest = row
    try:
        if not (isinstance(item_id, str) and isinstance(metadata, str)) or not (
            isinstance(source, str | None) and isinstance(digest, str | None)
        ):
            raise ValueError("its id, metadata, source or digest is not text")
        check_source(Item(check_id(item_id), _NO_VECTOR, source=source, digest=digest))
        value = json.loads(metadata)
        if not isinstance(value, dict):
            raise ValueError("its metadata is not a JSON object")
        return number, item_id, metadata_text(value), source, digest
    except (InvalidRequest, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} cannot be restored: item number {number}: {error}") from error


def insert(db: sqlite3.Connection, row: Row, items: list[ItemRow], vectors: list[VectorRow]) -> None:
    """Insert a page of rows from a snapshot into a collection that is being restored. `row` is the state of this
    collection.

    Raises:
        InvalidRequest: two items of the snapshot have the same id.
    """
    database.check_exists(db, row)
    query = f"INSERT INTO items_{row.key} (number, id, metadata, source, digest) VALUES (?, ?, ?, ?, ?)"
    try:
        db.executemany(query, items)
        db.executemany(f"INSERT INTO vectors_{row.key} VALUES (?, ?, ?)", vectors)
    except sqlite3.IntegrityError as error:
        raise InvalidRequest(f"the snapshot is damaged: two items have the same id or number ({error})") from error
    db.execute("UPDATE collections SET count = count + ?, version = version + 1 WHERE id = ?", (len(items), row.key))


# ---- running restores, and cleanup


@contextmanager
def restoring(root: Path) -> Iterator[str]:
    """Create a lock file for a restore, and yield a hidden name for the collection that the restore creates.

    `is_restoring` returns True for this name until the `with` block ends. If the process dies inside the block,
    `is_restoring` returns True until `tidy` removes the lock file.
    """
    name = f"{database.HIDDEN}{uuid.uuid4().hex}"
    path = _lock_path(root, name)
    with translated("the restore"):
        root.mkdir(exist_ok=True)
        lock = lock_file(path)
    try:
        yield name
    finally:
        path.unlink(missing_ok=True)
        if lock is not None:
            lock.close()


def is_restoring(root: Path, name: str) -> bool:
    return _lock_path(root, name).exists()


def tidy(root: Path) -> None:
    """Remove the temporary files of snapshots and restores whose processes have died."""
    for path in [*root.glob("*/.*.part"), *root.glob(".*.lock")]:
        with suppress(OSError):  # a file that cannot be deleted must not block the others
            if time.time() - path.stat().st_mtime > _YOUNG_S and (lock := lock_file(path)) is not None:
                with lock:
                    path.with_name(path.name + "-journal").unlink(missing_ok=True)  # SQLite's journal of a snapshot
                    path.unlink()
    for path in root.glob(".*.upload"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _UPLOAD_KEPT_S:
                path.unlink()


def _lock_path(root: Path, name: str) -> Path:
    return root / f".{name}.lock"


def _read_only(path: Path) -> str:
    return f"{path.resolve().as_uri()}?mode=ro"
