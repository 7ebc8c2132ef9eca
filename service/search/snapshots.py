"""A collection as it was at one moment, in a file of its own: a small store that holds nothing else.

Taken within one read transaction, so it is whole while others write, and written aside, synced and renamed. It holds
what is in the database; segments are built again after a restore. A restore writes into a collection that nobody can
name yet, some items at a time so that other writes go on, and gives it its name in the end.
"""

import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

from service.durable import sync_folder
from service.errors import InvalidRequest, NotFound, StorageFailed
from service.search import database
from service.search.database import Row, transaction, translated
from service.search.store import SnapshotInfo

_NAME: Final = re.compile(r"[0-9]{8}T[0-9]{6}\.[0-9]{3}Z")
_CHUNK: Final = 2000
RESTORING: Final = "restoring:"
"""What names of unfinished collections begin with; no client can give such a name."""

ItemRow = tuple[int, str, str, str | None, str | None]
VectorRow = tuple[int, bytes, int]


def take(source: Path, collection: str, root: Path) -> SnapshotInfo:
    """Write a snapshot of the collection (or alias) in the database `source`.

    Raises:
        CollectionNotFound, StorageFailed: there is none; the disk is full.
    """
    now = time.time()
    name = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
    with translated("the snapshot"):
        with closing(database.connect(source, read_only=True)) as db:
            collection = database.find(db, collection).name
        folder = root / collection
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{name}.{os.getpid()}.part"
        try:
            _write(source, collection, aside)
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            aside.rename(folder / f"{name}.sqlite3")
            sync_folder(folder)
        finally:
            aside.unlink(missing_ok=True)
    return describe(root, collection, name)


def _write(source: Path, collection: str, target: Path) -> None:
    database.prepare(target, mode="DELETE")  # one file, without a log beside it
    with closing(sqlite3.connect(target, isolation_level=None)) as db:
        db.execute("ATTACH ? AS source", (str(source),))
        with transaction(db):
            copied = database.find(db, collection, schema="source")
            made = database.make(db, collection, copied.spec)
            for table in ("items", "vectors"):
                db.execute(f"INSERT INTO main.{table}_{made.key} SELECT * FROM source.{table}_{copied.key}")
            db.execute("UPDATE main.collections SET count = ?", (copied.count,))


def listed(root: Path, collection: str) -> list[SnapshotInfo]:
    """Of one collection, oldest first; also when the collection itself is gone."""
    folder = root / collection
    names = sorted(path.stem for path in folder.glob("*.sqlite3")) if folder.is_dir() else []
    return [describe(root, collection, name) for name in names if _NAME.fullmatch(name)]


def describe(root: Path, collection: str, name: str) -> SnapshotInfo:
    """What a snapshot holds.

    Raises:
        NotFound, StorageFailed: there is none; it is damaged.
    """
    path = path_of(root, collection, name)
    with translated(f"snapshot {name}"), closing(_opened(path)) as db:
        (count,) = db.execute("SELECT count FROM collections").fetchone()
    created = f"{name[:4]}-{name[4:6]}-{name[6:11]}:{name[11:13]}:{name[13:]}"
    return SnapshotInfo(name, collection, created, path.stat().st_size, count)


def path_of(root: Path, collection: str, name: str) -> Path:
    """The snapshot's file.

    Raises:
        InvalidRequest, NotFound: no name of a snapshot; there is none.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"snapshot {name[:80]!r} is no name of a snapshot: 20260131T235959.123Z is", param="snapshot"
        )
    path = root / collection / f"{name}.sqlite3"
    if not path.is_file():
        raise NotFound(f"collection {collection!r} has no snapshot {name!r}")
    return path


def read(path: Path) -> tuple[Row, Iterator[tuple[list[ItemRow], list[VectorRow]]]]:
    """The collection in a snapshot, and its rows some at a time; every vector is checked.

    Raises:
        StorageFailed: it is damaged, or no snapshot.
    """
    with translated(f"snapshot {path.stem}"):
        db = _opened(path)
        (state,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise StorageFailed(f"snapshot {path.stem} is damaged: {state}")
        (row,) = database.every(db)

    def rows() -> Iterator[tuple[list[ItemRow], list[VectorRow]]]:
        after = 0
        with closing(db), translated(f"snapshot {path.stem}"):
            while True:
                page = f"_{row.key} WHERE number > {after} ORDER BY number LIMIT {_CHUNK}"
                items = db.execute("SELECT number, id, metadata, source, digest FROM items" + page).fetchall()
                vectors = db.execute("SELECT number, vector, crc FROM vectors" + page).fetchall()
                if [item[0] for item in items] != [vector[0] for vector in vectors]:
                    raise StorageFailed(f"snapshot {path.stem} is damaged: items and vectors differ")
                database.vectors_of(row, vectors)
                if not items:
                    return
                yield items, vectors
                after = items[-1][0]

    return row, rows()


def insert(db: sqlite3.Connection, row: Row, items: list[ItemRow], vectors: list[VectorRow]) -> None:
    """Rows of a snapshot into a collection that is being restored."""
    database.check_exists(db, row)
    db.executemany(f"INSERT INTO items_{row.key} (number, id, metadata, source, digest) VALUES (?, ?, ?, ?, ?)", items)
    db.executemany(f"INSERT INTO vectors_{row.key} VALUES (?, ?, ?)", vectors)
    db.execute("UPDATE collections SET count = count + ?, version = version + 1 WHERE id = ?", (len(items), row.key))


def _opened(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False)
    database.check_ours(db, path)
    return db
