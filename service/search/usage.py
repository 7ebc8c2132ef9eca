"""Measures how much disk space the collections of an embedded store use."""

import json
import sqlite3
from collections import Counter
from pathlib import Path

from service.search import database
from service.search.store import CollectionUsage, Usage


def measure(db: sqlite3.Connection, path: Path, snapshots: Path) -> Usage:
    """Return the disk use of each collection, of the database file at `path`, and of the folder of snapshots.

    The disk use of a collection consists of its segments and of its vectors in the database. The metadata of its items
    is not counted, because that would take a scan of the whole collection.
    """
    segments: Counter[int] = Counter()
    for key, files in db.execute("SELECT collection, files FROM segments"):
        segments[key] += sum(size for size, _ in json.loads(files).values())
    collections = [
        CollectionUsage(row.name, row.count, row.count * row.spec.dimension * row.dtype.itemsize + segments[row.key])
        for row in database.every(db)
    ]
    return Usage(
        collections,
        {
            "database": sum(_size(path.with_name(path.name + suffix)) for suffix in ("", "-wal")),
            "snapshots": sum(_size(file) for file in snapshots.glob("*/*.sqlite3")),
        },
    )


def _size(path: Path) -> int:
    """Return the size of a file in bytes, or 0 if there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
