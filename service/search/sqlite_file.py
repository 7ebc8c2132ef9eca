"""The embedded store's SQLite file: creation, connections, checks and transactions.

Writes are committed in WAL mode with `synchronous=FULL`, so every committed write is synced to disk. The statements
that read and write collections are in `service/search/database.py`.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, Literal

from service.errors import StorageFailed

_APPLICATION_ID: Final = 0x64763273  # "dv2s", in the file header; distinguishes our files from other databases
_SCHEMA_VERSION: Final = 2
_BUSY_MS: Final = 30_000
_SCHEMA: Final = f"""
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_SCHEMA_VERSION};
CREATE TABLE collections (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, spec TEXT NOT NULL,
    count INTEGER NOT NULL DEFAULT 0,    -- of items
    version INTEGER NOT NULL DEFAULT 0,  -- grows with every change
    edits INTEGER NOT NULL DEFAULT 0,    -- grows when metadata changes without its vector
    sealed INTEGER NOT NULL DEFAULT 0    -- vectors up to this number are in segments
);
CREATE TABLE aliases (name TEXT PRIMARY KEY, collection INTEGER NOT NULL REFERENCES collections (id));
CREATE TABLE segments (
    id INTEGER PRIMARY KEY AUTOINCREMENT, collection INTEGER NOT NULL REFERENCES collections (id) ON DELETE CASCADE,
    folder TEXT NOT NULL, kind TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, count INTEGER NOT NULL,
    effort INTEGER NOT NULL,  -- efSearch or nprobe that reaches the target recall
    files TEXT NOT NULL       -- JSON: name -> [bytes, xxh3]
);
CREATE TABLE requests (
    collection INTEGER NOT NULL REFERENCES collections (id) ON DELETE CASCADE, key TEXT NOT NULL,
    digest BLOB NOT NULL, created REAL NOT NULL, PRIMARY KEY (collection, key)
);
"""


@contextmanager
def translated(what: str = "the vector store") -> Iterator[None]:
    """Convert SQLite and file system errors within a `with` block to StorageFailed. The message begins with `what`. It
    omits the path in an error from the file system, because clients see the message."""
    try:
        yield
    except sqlite3.OperationalError as error:
        why = "it is in use by another process" if "locked" in str(error) else str(error)
        raise StorageFailed(f"{what}: {why}") from error
    except sqlite3.DatabaseError as error:
        raise StorageFailed(
            f"{what} is damaged or not a database ({error}); restore it from a backup, or move it away to start empty"
        ) from error
    except OSError as error:
        raise StorageFailed(f"{what}: {error.strerror or error}") from error


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open a connection to the database at `path`, for use in one thread. `prepare` must have created or checked the
    file before."""
    db = sqlite3.connect(path, timeout=_BUSY_MS / 1000, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA cache_size = -16384")
    db.execute(f"PRAGMA mmap_size = {2**40}")  # halves the time to look up hits; SQLite caps it at 2 GB
    if read_only:
        db.execute("PRAGMA query_only = ON")
    return db


def prepare(path: Path, *, mode: Literal["WAL", "DELETE"] = "WAL", what: str | None = None) -> None:
    """Create the database file, or check that the existing file is a vector store.

    Raises:
        StorageFailed: the file cannot be used, is damaged or is not a vector store. The message begins with `what`. If
            `what` is None, the message begins with "vector store" and the path.
    """
    what = what or f"vector store {path}"
    with translated(what):
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=_BUSY_MS / 1000, isolation_level=None)) as db:
            if db.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
                check_ours(db, what)  # before changing anything in it
            db.execute("PRAGMA page_size = 8192")
            db.execute(f"PRAGMA journal_mode = {mode}")
            db.execute("PRAGMA synchronous = FULL")
            with transaction(db):
                if db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                    run_script(db, _SCHEMA)


def check_ours(db: sqlite3.Connection, what: str) -> None:
    """Raise StorageFailed if the database is not a vector store of this version. The message begins with `what`."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if (application, version) != (_APPLICATION_ID, _SCHEMA_VERSION):
        raise StorageFailed(
            f"{what} is not a vector store of this version (application id {application:#x}, version {version}; "
            f"expected {_APPLICATION_ID:#x}, version {_SCHEMA_VERSION})"
        )


def run_script(db: sqlite3.Connection, script: str) -> None:
    """Run the statements of an SQL script within the open transaction. The connection's own method `executescript`
    would commit the transaction first."""
    for statement in script.split(";\n"):
        db.execute(statement)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Run the block of a `with` statement in one write transaction. When the block ends, its changes are on disk. If
    the block raises an error, the database is not changed."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def snapshot(db: sqlite3.Connection) -> Iterator[None]:
    """Run the block of a `with` statement in one read transaction. All reads see the database as it was at the first
    read."""
    db.execute("BEGIN")
    try:
        yield
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
