"""Keeps patch features on disk, so they are computed only once.

The store is one SQLite file with a row for each image and model. It is a cache: an entry that is missing, damaged or
cannot be read is a miss, and a write that fails is skipped. In both cases a warning is logged, and no request fails.
Several processes may use the same file. A commit is atomic, so a killed process leaves no partial entry, and each entry
has a checksum. A file that is damaged or has another version is replaced with an empty one.

The entries of an image are adjacent, whatever model they belong to, so that they can be erased together. Erasing them
changes a stamp that all processes share, because they may have copies in memory. Unlike reads and writes, erasing
raises an error if it fails.

When the file has reached its size limit, each write first deletes random entries. To delete the oldest entries would be
worse: a search that reads more entries than fit would always delete the ones that it needs next, and would never find
any (docs/decisions/0029-patch-store.md).
"""

import hashlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import xxhash

from service.errors import StorageFailed
from service.settings import Settings
from service.stamp import Stamp

log = logging.getLogger(__name__)

_APPLICATION_ID: Final = 0x64763270  # "dv2p", in the file header; distinguishes our files from other databases
_VERSION: Final = 2
_PAGE_BYTES: Final = 16_384
_WAL_PAGES: Final = 1024  # the write-ahead log is copied into the file when it has this many pages
_BUSY_MS: Final = 2000
_RETRY_S: Final = 0.005
_KEYS_PER_READ: Final = 256
_ENTRIES_PER_DELETE: Final = 64
_IMAGES_PER_ERASE: Final = 256
_WARNING_INTERVAL_S: Final = 60.0
_CHECKSUM_BYTES: Final = 8
_HALF_KEY_BYTES: Final = 16
_SCHEMA: Final = "CREATE TABLE entries (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, value BLOB NOT NULL)"


class PatchStore:
    """A cache on disk from text keys to bytes. The part of a key before the first slash names the image. Any thread may
    call the methods, which block while they read or write.

    `file` and its folder are created by the first write. `max_bytes` limits the size of the file. While it is written,
    its write-ahead log temporarily takes about 16 MiB more. If `max_bytes` is 0, the store keeps nothing, but entries
    that an earlier process has written can still be erased.
    """

    def __init__(self, file: Path, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes} must be at least 0")
        self.file = file
        self.max_bytes = max_bytes
        self._idle: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._stamp_file = file.with_name(file.name + ".stamp")
        self._stamp: Stamp | None = None
        self._closed = False
        self._is_foreign = False  # the file is another program's database
        self._next_warning = 0.0

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values in the order of the keys, with None for a key that is not stored."""
        rows = [_row_key(key) for key in keys]
        found = dict(self._selected("key, value", rows))
        return [_unframed(row, found[row]) if row in found else None for row in rows]

    def stored(self, keys: Sequence[str]) -> set[str]:
        """Return those of the keys that are stored. The values are not read, so damaged ones are included."""
        rows = {_row_key(key): key for key in keys}
        return {rows[row] for (row,) in self._selected("key", list(rows))}

    def _selected(self, columns: str, rows: Sequence[bytes]) -> list[Any]:
        """Return these columns of the entries with these row keys, as one tuple for each entry that is stored."""
        selected: list[Any] = []
        if not self.max_bytes or not self.file.exists():
            return selected
        with self._guarded("cannot be read"), self._connection() as db:
            for start in range(0, len(rows), _KEYS_PER_READ):
                wanted = rows[start : start + _KEYS_PER_READ]
                marks = ",".join("?" * len(wanted))
                selected += db.execute(f"SELECT {columns} FROM entries WHERE key IN ({marks})", wanted)  # noqa: S608  only question marks
        return selected

    def set_many(self, items: Mapping[str, bytes]) -> None:
        """Store each value under its key. A value that takes more than half of `max_bytes` is not stored."""
        rows = [(_row_key(key), value) for key, value in items.items() if _file_bytes(value) <= self.max_bytes // 2]
        if not rows:
            return
        with self._guarded("cannot be written"), self._connection() as db:
            self._make_room(db, sum(_file_bytes(value) for _, value in rows))
            with _transaction(db):
                framed = [(row, _framed(row, value)) for row, value in rows]
                db.executemany("INSERT OR REPLACE INTO entries (key, value) VALUES (?, ?)", framed)

    def erase(self, images: Sequence[str]) -> None:
        """Delete all entries of these images.

        Raises:
            StorageFailed: they cannot be deleted.
        """
        if not images:
            return
        try:
            if self.file.exists():
                self._delete([_row_range(image) for image in images])
            self.file.parent.mkdir(exist_ok=True)
            self._opened_stamp().bump()
        except (sqlite3.Error, OSError) as error:
            raise StorageFailed(f"the patch features of the image cannot be erased: {error}") from error

    def _delete(self, ranges: Sequence[tuple[bytes, bytes]]) -> None:
        try:
            with self._connection() as db:
                for start in range(0, len(ranges), _IMAGES_PER_ERASE):  # between two, other processes can write
                    with _transaction(db):
                        part = ranges[start : start + _IMAGES_PER_ERASE]
                        db.executemany("DELETE FROM entries WHERE key BETWEEN ? AND ?", part)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:  # the file is damaged or has another version, so a write would replace it
            self._remove()
            if self.file.exists():
                raise

    def erasures(self) -> int:
        """Return a number that changes with every call of `erase` in any process."""
        if self._stamp is None and not self._stamp_file.exists():
            return 0
        try:
            return self._opened_stamp().read()
        except StorageFailed as error:
            self._warn("cannot find out which images were erased", error)
            return 0

    def _opened_stamp(self) -> Stamp:
        if self._stamp is None:
            self._stamp = Stamp(self._stamp_file)
        return self._stamp

    def close(self) -> None:
        """Close the file. Later reads find nothing, and later writes do nothing."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for db in idle:
            db.close()

    def _make_room(self, db: sqlite3.Connection, needed: int) -> None:
        """Delete random entries until `needed` more bytes fit into `max_bytes`."""
        while _used_bytes(db) + needed > self.max_bytes:
            with _transaction(db):
                start = os.urandom(hashlib.sha256().digest_size)
                after = "SELECT id FROM entries WHERE key >= ? ORDER BY key LIMIT ?"
                gone = db.execute(f"DELETE FROM entries WHERE id IN ({after})", (start, _ENTRIES_PER_DELETE)).rowcount  # noqa: S608
                if not gone:  # no entry has a higher key
                    gone = db.execute(f"DELETE FROM entries WHERE id IN ({after})", (b"", _ENTRIES_PER_DELETE)).rowcount  # noqa: S608
            if not gone:
                return
        if _pragma(db, "page_count") * _PAGE_BYTES > self.max_bytes:  # the limit was higher before
            db.executescript("PRAGMA incremental_vacuum")  # `execute` would free only one page

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection to the calling thread. Raise sqlite3.Error if the file cannot be opened or the store is
        closed."""
        with self._lock:
            if self._closed or self._is_foreign:
                raise sqlite3.OperationalError("the store is closed" if self._closed else f"{self.file} is not ours")
            db = self._idle.pop() if self._idle else None
        if db is None:
            db = self._opened()
        try:
            yield db
        except BaseException:
            db.close()
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(db)
                return
        db.close()

    def _opened(self) -> sqlite3.Connection:
        """Open the file, which is created if it does not exist. The data folder is not: it may have been unmounted."""
        self.file.parent.mkdir(exist_ok=True)
        db = sqlite3.connect(self.file, timeout=_BUSY_MS / 1000, isolation_level=None, check_same_thread=False)
        try:
            db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            if (
                _pragma(db, "application_id") == 0
                and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            ):
                self._create(db)
            if _pragma(db, "application_id") != _APPLICATION_ID:
                self._is_foreign = True
                raise sqlite3.OperationalError(f"{self.file} is the database of another program")
            if _pragma(db, "user_version") != _VERSION:
                raise sqlite3.DatabaseError(f"its version is not {_VERSION}")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
            db.execute(f"PRAGMA journal_size_limit = {_WAL_PAGES * _PAGE_BYTES}")
            db.execute("PRAGMA mmap_size = 0")  # a read of a mapped file that was cut off would kill the process
        except BaseException:
            db.close()
            raise
        return db

    @staticmethod
    def _create(db: sqlite3.Connection) -> None:
        _use_write_ahead_log(db)
        with _transaction(db):
            if _is_empty(db):  # unless another process was faster
                db.execute(_SCHEMA)
                db.execute(f"PRAGMA user_version = {_VERSION}")
                db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Turn any error of SQLite or the file system within a `with` block into a warning. Delete a damaged file."""
        try:
            yield
        except sqlite3.OperationalError as error:  # the disk is full, or the file is locked or cannot be opened
            self._warn(what, error)
        except (sqlite3.DatabaseError, OSError) as error:
            self._warn(what, error)
            if isinstance(error, sqlite3.DatabaseError) and not self._is_foreign:
                self._remove()

    def _remove(self) -> None:
        """Delete the file, so that the next write creates a new one."""
        with self._lock:
            idle, self._idle = self._idle, []
        for db in idle:
            db.close()
        for suffix in ("", "-wal", "-shm"):
            with suppress(OSError):
                self.file.with_name(self.file.name + suffix).unlink(missing_ok=True)

    def _warn(self, what: str, error: Exception) -> None:
        if not self._closed and time.monotonic() >= self._next_warning:
            self._next_warning = time.monotonic() + _WARNING_INTERVAL_S
            log.warning("the patch store %s: %s", what, error)


def patch_store_of(settings: Settings) -> PatchStore:
    """Return the store in the data folder. Its file is not opened yet."""
    return PatchStore(settings.patch_store_file, settings.patch_store_bytes)


def _row_key(key: str) -> bytes:
    """Return the bytes that identify the row of a key: the hash of the image and the hash of the key. Hashes are evenly
    distributed, so the entries after a random value are a random choice."""
    return _half_key(key.partition("/")[0]) + _half_key(key)


def _row_range(image: str) -> tuple[bytes, bytes]:
    """Return the lowest and the highest row key that an entry of an image can have."""
    half = _half_key(image)
    return half + bytes(_HALF_KEY_BYTES), half + b"\xff" * _HALF_KEY_BYTES


def _half_key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:_HALF_KEY_BYTES]


def _framed(row: bytes, value: bytes) -> bytes:
    return xxhash.xxh3_64_digest(row + value) + value


def _unframed(row: bytes, framed: bytes) -> bytes | None:
    """Return the value that `_framed` packed, or None if the bytes are damaged."""
    value = framed[_CHECKSUM_BYTES:]
    return value if xxhash.xxh3_64_digest(row + value) == framed[:_CHECKSUM_BYTES] else None


def _file_bytes(value: bytes) -> int:
    """Return an upper bound on the bytes that an entry takes in the file."""
    return (len(value) // _PAGE_BYTES + 2) * _PAGE_BYTES


def _used_bytes(db: sqlite3.Connection) -> int:
    return (_pragma(db, "page_count") - _pragma(db, "freelist_count")) * _PAGE_BYTES


def _is_empty(db: sqlite3.Connection) -> bool:
    return not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


def _use_write_ahead_log(db: sqlite3.Connection) -> None:
    """Switch a new file to write-ahead logging. While another connection does the same, SQLite refuses the switch at
    once, whatever the time limit of the connection is, so it is tried again."""
    give_up = time.monotonic() + _BUSY_MS / 1000
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() >= give_up:
                raise
            time.sleep(_RETRY_S)
        else:
            return


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise
