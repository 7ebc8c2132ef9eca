"""The SQL statements of the embedded store.

The SQLite database (`service/search/schema.py`) is the source of truth. The faiss segments in the same data folder
can be rebuilt from it.

An item's `number` identifies one vector permanently. If an item is replaced, its number is deleted and the new item
gets a higher number. Therefore, the vector with a given number never changes, and a process finds new items by reading
those with numbers above the highest number that it has read. A segment contains the items within a range of numbers.
Only two events make it outdated: an item is deleted, or the metadata of an item changes. The tables `removed` and
`edited` record these changes until every segment includes them. A process that keeps items in memory reads only the
records that were added since its last read. The `version` of a collection increases with every change.

Each collection has its own tables for items and vectors. This way, a collection can be dropped quickly, a filter that
reads all metadata does not read the vectors, and the numbers of a collection have few gaps.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import sqlite3
import zlib
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from service.errors import CollectionNotFound, StorageDamaged
from service.search.filter_sql import extract
from service.search.filters import parse_path
from service.search.store import CollectionInfo, CollectionSpec, Floats, IndexSpec, Item
from service.sqlite import run_script

Numbers = npt.NDArray[np.int64]
Role = Literal["live", "candidate", "former"]

_TABLES: Final = """
CREATE TABLE items_{0} (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, metadata TEXT NOT NULL, source TEXT, digest TEXT
);
CREATE TABLE vectors_{0} (number INTEGER PRIMARY KEY, vector BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE removed_{0} (seq INTEGER PRIMARY KEY AUTOINCREMENT, number INTEGER NOT NULL);
CREATE TABLE edited_{0} (seq INTEGER PRIMARY KEY AUTOINCREMENT, number INTEGER NOT NULL);
"""
_FIRST_COLUMNS: Final = "c.id, c.name, c.spec, c.count, c.version, c.edits, c.sealed"
_COLUMNS: Final = f"{_FIRST_COLUMNS}, c.partner, c.role, c.earlier"
_FIND: Final = f"""
SELECT {_COLUMNS} FROM {{0}}.collections c WHERE c.name = :name
UNION ALL SELECT {_COLUMNS} FROM {{0}}.aliases a JOIN {{0}}.collections c ON c.id = a.collection WHERE a.name = :name
"""
_FIND_HERE: Final = _FIND.format("main")
HIDDEN: Final = "restoring:"
"""The prefix of the names of collections that are being restored. Clients cannot use names with this prefix. The names
of partners also contain a colon (service/search/partners.py)."""
_REQUESTS_KEPT_S: Final = 24 * 3600
MAX_REQUESTS: Final = 1_000_000
MAX_REQUESTS_OF_CLIENT: Final = 100_000
"""How many idempotency keys are kept, of all clients and of each client. The oldest are forgotten first."""
_FORGOTTEN_AT_ONCE: Final = 1000
"""The highest number of keys that one write forgets for each reason, so that no write has to wait long."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """The state of a collection, as read in one transaction."""

    key: int
    name: str
    spec: CollectionSpec
    count: int
    version: int
    edits: int
    sealed: int
    partner: int | None = None
    role: Role = "live"
    earlier: str = "[]"

    @functools.cached_property  # each search reads it
    def info(self) -> CollectionInfo:
        version = f"{self.key}.{self.version}"
        return CollectionInfo(self.name, self.spec, self.count, version, self.key, earlier_of(self.earlier))

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<f4" if self.spec.dtype == "float32" else "<f2")


@dataclass(frozen=True)
class SegmentRow:
    """The database row of a segment. The segment contains the vectors with numbers from `first` to `last`. `files` maps
    the name of each file in `folder` to its size in bytes and its checksum."""

    key: int
    folder: str
    kind: str
    first: int
    last: int
    count: int
    effort: int
    files: dict[str, tuple[int, str]]


@functools.cache
def earlier_of(text: str) -> tuple[tuple[str, int], ...]:
    """Parse the column `earlier`. Raises ValueError or TypeError if the text is damaged."""
    return tuple((str(fingerprint), int(dimension)) for fingerprint, dimension in json.loads(text))


# ---- collections


def _row(columns: tuple[Any, ...]) -> Row:
    key, name, spec, *rest = columns
    return Row(key, name, _spec(spec), *rest)


_SPECS: dict[str, CollectionSpec] = {}


def _spec(text: str) -> CollectionSpec:
    """Parse the settings of a collection from JSON text. Results are cached, because every search needs the
    settings."""
    spec = _SPECS.get(text)
    if spec is None:
        fields = json.loads(text)
        fields |= {"index": IndexSpec(**fields["index"]), "indexed": tuple(fields["indexed"])}
        if len(_SPECS) > 10_000:
            _SPECS.clear()
        spec = _SPECS[text] = CollectionSpec(**fields)
    return spec


def find(db: sqlite3.Connection, name: str, *, schema: str = "main") -> Row:
    """Return the collection with this name, alias or reference (`CollectionInfo.ref`). `schema` is the name under which
    the database to read is attached to the connection.

    Raises:
        CollectionNotFound: no collection or alias has this name.
    """
    name, _, key = name.partition("@")
    if key:
        return dataclasses.replace(by_key(db, int(key)), name=name)
    query = _FIND_HERE if schema == "main" else _FIND.format(schema)
    columns = db.execute(query, {"name": name}).fetchone()
    if columns is None:
        raise CollectionNotFound(f"there is no collection {name!r}")
    return _row(columns)


def by_key(db: sqlite3.Connection, key: int) -> Row:
    """Return the collection with this key (its id in the database). Raises CollectionNotFound if the collection no
    longer exists."""
    columns = db.execute(f"SELECT {_COLUMNS} FROM collections c WHERE id = ?", (key,)).fetchone()
    if columns is None:
        raise CollectionNotFound("the collection no longer exists")
    return _row(columns)


def check_exists(db: sqlite3.Connection, row: Row) -> None:
    """Raise CollectionNotFound if the collection of `row` no longer exists."""
    if not db.execute("SELECT 1 FROM collections WHERE id = ?", (row.key,)).fetchone():
        raise CollectionNotFound(f"there is no collection {row.name!r}")


def every(db: sqlite3.Connection) -> list[Row]:
    """Return all collections that clients can see, sorted by name."""
    query = f"SELECT {_COLUMNS} FROM collections c WHERE name NOT LIKE '%:%' ORDER BY name"
    return [_row(columns) for columns in db.execute(query)]


def with_partners(db: sqlite3.Connection) -> list[Row]:
    """Return all collections and their partners, sorted by name. Collections that are being restored are omitted."""
    query = f"SELECT {_COLUMNS} FROM collections c WHERE name NOT LIKE '{HIDDEN}%' ORDER BY name"
    return [_row(columns) for columns in db.execute(query)]


def in_snapshot(db: sqlite3.Connection) -> list[Row]:
    """Return the collections in the file of a snapshot, but at most two, because a second one is an error. The file may
    have been made by an older version."""
    names = {name for _, name, *_ in db.execute("PRAGMA table_info(collections)")}
    columns = _COLUMNS if "earlier" in names else _FIRST_COLUMNS
    return [_row(row) for row in db.execute(f"SELECT {columns} FROM collections c WHERE name NOT LIKE '%:%' LIMIT 2")]


def hidden(db: sqlite3.Connection) -> list[tuple[int, str]]:
    """Return the key and name of each collection whose restore has not finished. The restore may be running, or a crash
    may have ended it."""
    unfinished: list[tuple[int, str]] = db.execute(
        "SELECT id, name FROM collections WHERE name LIKE ?", (f"{HIDDEN}%",)
    ).fetchall()
    return unfinished


def make(db: sqlite3.Connection, name: str, spec: CollectionSpec, *, earlier: str = "[]") -> Row:
    """Create an empty collection and return its state. The name must not belong to another collection. `earlier` is
    that of `Row`."""
    text = json.dumps(dataclasses.asdict(spec))
    query = "INSERT INTO collections (name, spec, earlier) VALUES (?, ?, ?) RETURNING id"
    (key,) = db.execute(query, (name, text, earlier)).fetchone()
    run_script(db, _TABLES.format(key))
    _index(db, key, spec.indexed)
    return Row(key, name, spec, 0, 0, 0, 0, earlier=earlier)


def set_indexed(db: sqlite3.Connection, row: Row, indexed: tuple[str, ...]) -> None:
    """Replace the list of the metadata keys that have an index. Drop the indexes that are no longer needed, and build
    those that are missing."""
    _index(db, row.key, indexed)
    text = json.dumps(dataclasses.asdict(dataclasses.replace(row.spec, indexed=indexed)))
    db.execute("UPDATE collections SET spec = ?, version = version + 1 WHERE id = ?", (text, row.key))


def _index(db: sqlite3.Connection, key: int, indexed: Sequence[str]) -> None:
    """Drop the indexes on metadata keys that are not in `indexed`, and build those that are missing."""
    query = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = ? AND sql IS NOT NULL"
    existing = dict(db.execute(query, (f"items_{key}",)).fetchall())
    wanted = {f" ON items_{key} ({extract(parse_path(declared))})" for declared in indexed}
    for name, sql in existing.items():
        expression = sql.removeprefix(f"CREATE INDEX {name}")
        if expression in wanted:
            wanted.remove(expression)
        else:
            db.execute(f"DROP INDEX {name}")
    names = (f"metadata_{key}_{number}" for number in itertools.count())
    free = (name for name in names if name not in existing)
    for expression in sorted(wanted):
        db.execute(f"CREATE INDEX {next(free)}{expression}")


def drop(db: sqlite3.Connection, key: int, *, damaged: Container[int] = ()) -> set[int]:
    """Delete a collection and its partner. Return the keys of the deleted collections. `damaged` are the keys of those
    whose tables are damaged."""
    (partner,) = db.execute("SELECT partner FROM collections WHERE id = ?", (key,)).fetchone()
    keys = {key} if partner is None else {key, partner}
    for each in keys:
        drop_one(db, each, damaged=damaged)
    return keys


def drop_one(db: sqlite3.Connection, key: int, *, damaged: Container[int] = ()) -> None:
    """Delete a collection, but not its partner. If its tables are damaged, SQLite cannot drop them. They then stay in
    the file, but no collection uses them any more."""
    if key in damaged:
        log.error("the damaged tables items_%d and vectors_%d cannot be dropped and stay in the file", key, key)
    else:
        for table in ("items", "vectors", "removed", "edited"):
            db.execute(f"DROP TABLE {table}_{key}")
    db.execute("DELETE FROM collections WHERE id = ?", (key,))


# ---- items


def upsert(db: sqlite3.Connection, key: int, rows: Sequence[tuple[Item, bytes, str]]) -> None:
    """Write items. An item replaces the existing item with the same id. Each row is a tuple of an item, the bytes of
    its vector, and its metadata as JSON text. Each id may occur only once."""
    fresh = 0
    for item, vector, metadata in rows:
        old = db.execute(f"DELETE FROM items_{key} WHERE id = ? RETURNING number", (item.id,)).fetchone()
        if old is None:
            fresh += 1
        else:
            db.execute(f"DELETE FROM vectors_{key} WHERE number = ?", old)
            db.execute(f"INSERT INTO removed_{key} (number) VALUES (?)", old)
        number = db.execute(
            f"INSERT INTO items_{key} (id, metadata, source, digest) VALUES (?, ?, ?, ?)",
            (item.id, metadata, item.source, item.digest),
        ).lastrowid
        db.execute(f"INSERT INTO vectors_{key} VALUES (?, ?, ?)", (number, vector, zlib.crc32(vector)))
    db.execute("UPDATE collections SET count = count + ?, version = version + 1 WHERE id = ?", (fresh, key))


def remove(db: sqlite3.Connection, key: int, numbers: Iterable[int]) -> int:
    """Delete the items with these numbers. Return the number of items that were deleted."""
    gone = 0
    for number in numbers:
        if db.execute(f"DELETE FROM items_{key} WHERE number = ?", (number,)).rowcount:
            db.execute(f"DELETE FROM vectors_{key} WHERE number = ?", (number,))
            db.execute(f"INSERT INTO removed_{key} (number) VALUES (?)", (number,))
            gone += 1
    if gone:
        db.execute("UPDATE collections SET count = count - ?, version = version + 1 WHERE id = ?", (gone, key))
    return gone


def last_number(db: sqlite3.Connection, row: Row) -> int:
    """Return the highest item number in a collection, or 0 if the collection is empty."""
    (last,) = db.execute(f"SELECT coalesce(max(number), 0) FROM items_{row.key}").fetchone()
    return int(last)


def edit(db: sqlite3.Connection, key: int, number: int, metadata: str, source: str | None) -> None:
    db.execute(f"UPDATE items_{key} SET metadata = ?, source = ? WHERE number = ?", (metadata, source, number))
    db.execute(f"INSERT INTO edited_{key} (number) VALUES (?)", (number,))
    db.execute("UPDATE collections SET edits = edits + 1, version = version + 1 WHERE id = ?", (key,))


def already_done(
    db: sqlite3.Connection, key: int, request_key: str, client: str, digest: bytes, now: float
) -> bool | None:
    """Return True if this request was carried out before, None if an earlier request with other items had the same
    `request_key`, and False otherwise. `digest` is the hash of the items, and `now` is the current Unix time.

    If the result is False, the request is recorded. Records older than a day are deleted, and the oldest records beyond
    `MAX_REQUESTS` and beyond `MAX_REQUESTS_OF_CLIENT`. `client` identifies the sender.
    """
    since = now - _REQUESTS_KEPT_S
    query = "SELECT digest FROM requests WHERE collection = ? AND key = ? AND created >= ?"
    earlier = db.execute(query, (key, request_key, since)).fetchone()
    if earlier is not None:
        return True if bytes(earlier[0]) == digest else None
    sender = hashlib.blake2b(client.encode(), digest_size=8).digest()  # an address is nobody else's business
    (last,) = db.execute("SELECT coalesce(max(ordinal), 0) FROM requests WHERE client = ?", (sender,)).fetchone()
    query = (
        "INSERT OR REPLACE INTO requests (collection, key, digest, created, client, ordinal) VALUES (?, ?, ?, ?, ?, ?)"
    )
    rowid = db.execute(query, (key, request_key, digest, now, sender, last + 1)).lastrowid
    assert rowid is not None
    for condition, values in (
        ("created < ? ORDER BY created", (since,)),
        ("rowid <= ? ORDER BY rowid", (rowid - MAX_REQUESTS,)),
        ("client = ? AND ordinal <= ? ORDER BY ordinal", (sender, last + 1 - MAX_REQUESTS_OF_CLIENT)),
    ):
        oldest = f"SELECT rowid FROM requests WHERE {condition} LIMIT {_FORGOTTEN_AT_ONCE}"
        db.execute(f"DELETE FROM requests WHERE rowid IN ({oldest})", values)
    return False


def request_digest(rows: Sequence[tuple[Item, bytes, str]]) -> bytes:
    """Return the sha256 of the items of a request. Requests with the same idempotency key must have the same digest.

    The image stands for the vector that was computed from it. Otherwise, a request that is repeated after a change of
    the model would seem to have other items.
    """
    digest = hashlib.sha256()
    for item, vector, metadata in rows:
        for part in (item.id, metadata, item.source or "", item.digest or ""):
            digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
        if item.digest is None:
            digest.update(vector)
    return digest.digest()


# ---- vectors


def vectors_of(
    row: Row, rows: Sequence[tuple[int, bytes, int]], what: str = "the vector store"
) -> tuple[Numbers, Floats]:
    """Convert rows (number, vector, crc) to an array of numbers [n] and float32 vectors [n, D]. `what` names the
    database in error messages.

    Raises:
        StorageDamaged: a vector does not match its checksum or has the wrong size.
    """
    size = row.spec.dimension * row.dtype.itemsize
    for number, vector, crc in rows:
        if not isinstance(vector, bytes) or len(vector) != size or zlib.crc32(vector) != crc:
            raise StorageDamaged(f"{what} is damaged: the vector of item number {number} is broken")
    numbers = np.fromiter((number for number, _, _ in rows), np.int64, len(rows))
    matrix = np.frombuffer(b"".join(vector for _, vector, _ in rows), row.dtype).reshape(-1, row.spec.dimension)
    return numbers, matrix.astype(np.float32)


class Point(NamedTuple):
    """The position up to which a process has read the tables `removed` and `edited`: the last sequence number that was
    read from each table."""

    removed: int = 0
    edited: int = 0


class Chunk(NamedTuple):
    """A batch of items, sorted by number."""

    numbers: Numbers  # [n]
    vectors: Floats  # [n, D]
    payloads: list[bytes]  # JSON text [id, metadata, source] of each item, for its hit


def read_items(
    db: sqlite3.Connection, row: Row, *, after: int, to: int | None = None, chunk: int = 8192
) -> Iterator[Chunk]:
    """Yield the items with numbers above `after` and up to `to`, in ascending order of number. Each chunk has at most
    `chunk` items. If `to` is None, the numbers have no upper limit."""
    query = f"""SELECT v.number, vector, crc, id, metadata, source FROM vectors_{row.key} v
                LEFT JOIN items_{row.key} i ON i.number = v.number
                WHERE v.number > ? AND v.number <= ? ORDER BY v.number"""
    cursor = db.execute(query, (after, 2**62 if to is None else to))
    while rows := cursor.fetchmany(chunk):
        numbers, vectors = vectors_of(row, [columns[:3] for columns in rows])
        yield Chunk(numbers, vectors, [payload(*columns[3:]) for columns in rows])


def payload(item_id: str | None, metadata: str, source: str | None) -> bytes:
    """Return an item as the JSON text [id, metadata, source]. A search makes its hits from these texts. `metadata` is
    JSON text.

    Raises:
        StorageDamaged: the id is None or the metadata is not text, because the database is damaged.
    """
    if item_id is None:
        raise StorageDamaged("the vector store is damaged: a vector has no item")
    try:
        text = bytes(metadata, "utf-8")
    except TypeError as error:
        raise StorageDamaged(f"the vector store is damaged: the metadata of item {item_id!r} is broken") from error
    return b"[%b,%b,%b]" % (orjson.dumps(item_id), text, orjson.dumps(source))


def removed_since(db: sqlite3.Connection, row: Row, seq: int) -> tuple[int, Numbers]:
    """Read the records in the table `removed` with sequence numbers above `seq`. Return the last sequence number (`seq`
    if there are no records) and the numbers of the removed items."""
    rows = db.execute(f"SELECT seq, number FROM removed_{row.key} WHERE seq > ? ORDER BY seq", (seq,)).fetchall()
    return (rows[-1][0] if rows else seq), np.fromiter((number for _, number in rows), np.int64, len(rows))


def edited_since(db: sqlite3.Connection, row: Row, seq: int) -> tuple[int, dict[int, bytes]]:
    """Read the records in the table `edited` with sequence numbers above `seq`. Return the last sequence number (`seq`
    if there are no records) and a dictionary that maps the number of each edited item to its current payload (the JSON
    text [id, metadata, source])."""
    query = f"""SELECT max(seq), e.number, id, metadata, source FROM edited_{row.key} e
                JOIN items_{row.key} i ON i.number = e.number WHERE seq > ? GROUP BY e.number"""
    rows = db.execute(query, (seq,)).fetchall()
    last = max((columns[0] for columns in rows), default=seq)
    return last, {number: payload(*rest) for _, number, *rest in rows}


# ---- segments


def segments(db: sqlite3.Connection, key: int) -> list[SegmentRow]:
    """Return the segments of a collection, sorted by the item numbers that they contain."""
    query = """SELECT id, folder, kind, first, last, count, effort, files FROM segments WHERE collection = ?
               ORDER BY first"""
    return [
        SegmentRow(
            number, folder, kind, first, last, count, effort, {n: tuple(v) for n, v in json.loads(files).items()}
        )
        for number, folder, kind, first, last, count, effort, files in db.execute(query, (key,))
    ]


def swap_segments(
    db: sqlite3.Connection, row: Row, old: Sequence[SegmentRow], new: SegmentRow | None, *, sealed: int, point: Point
) -> bool:
    """Replace the segments `old` with the segment `new`. If `new` is None, only remove the segments `old`.

    Items with numbers up to `sealed` that were in no segment are now in the new segment. The new segment includes the
    changes that the tables `removed` and `edited` record up to `point`. These records are deleted, except those that
    other segments still need.

    Returns:
        True if the segments were replaced. If the segments in the database have changed since `row` was read, nothing
        is replaced, and the result is False.
    """
    state = db.execute("SELECT sealed FROM collections WHERE id = ?", (row.key,)).fetchone()
    in_use = {segment.key for segment in segments(db, row.key)}
    if state is None or state[0] != row.sealed or not {segment.key for segment in old} <= in_use:
        return False
    for segment in old:
        db.execute("DELETE FROM segments WHERE id = ?", (segment.key,))
    made = 0
    if new is not None:
        made = db.execute(
            """INSERT INTO segments (collection, folder, kind, first, last, count, effort, files)
               VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING id""",
            (row.key, new.folder, new.kind, new.first, new.last, new.count, new.effort, json.dumps(new.files)),
        ).fetchone()[0]
    db.execute("UPDATE collections SET sealed = max(sealed, ?), version = version + 1 WHERE id = ?", (sealed, row.key))
    for table, until in (("removed", point.removed), ("edited", point.edited)):
        db.execute(
            f"""DELETE FROM {table}_{row.key} WHERE seq <= ? AND number <= ? AND NOT EXISTS (
                SELECT 1 FROM segments s WHERE s.collection = ? AND number BETWEEN s.first AND s.last AND s.id != ?)""",
            (until, sealed, row.key, made),
        )
    return True


def folders(db: sqlite3.Connection) -> set[str]:
    """Return the folder names of all segments in use."""
    return {folder for (folder,) in db.execute("SELECT folder FROM segments")}
