"""The service's SQLite files: creation, upgrades, connections, checks and transactions.

Every file has a `Schema` with an application id, so that a file of another kind is never changed. A file of an older
version is upgraded when it is opened. Writes are committed in WAL mode with `synchronous=FULL`, so every committed
write is synced to disk. Several processes may use a file at the same time. A transaction is not committed if the file
is no longer the one at its path, because a file that was deleted or replaced loses everything when it is closed.
"""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from service.disk import InPlace, is_full, lend_space, replaced
from service.errors import InsufficientStorage, StorageBusy, StorageDamaged, StorageFailed

_BUSY_MS: Final = 30_000
_FULL: Final = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")  # the second one: of the file that WAL mode shares in memory
_DAMAGED_TEXT: Final = ("Could not decode to UTF-8 column", "malformed JSON")
"""The beginnings of messages about damaged text. Python and SQLite report it with the same class as other errors."""


@dataclass(frozen=True)
class Schema:
    """The tables of one kind of file.

    what: what the file is, with an article, for error messages: "a vector store".
    application_id: a number in the header of the file that distinguishes this kind of file from all others.
    scripts: SQL scripts. The first script creates a file of version `first_version`. Each further script upgrades a
        file by one version. Statements end with a semicolon at the end of a line.
    """

    what: str
    application_id: int
    scripts: tuple[str, ...]
    first_version: int = 1

    @property
    def version(self) -> int:
        return self.first_version + len(self.scripts) - 1


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Convert SQLite and file system errors within a `with` block to StorageFailed. The message begins with `what`. It
    omits the path in an error from the file system, because clients see the message."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise _storage_error(what, error) from error
    except FileNotFoundError as error:
        raise replaced() from error
    except OSError as error:
        kind = InsufficientStorage if is_full(error) else StorageFailed
        raise kind(f"{what}: {error.strerror or error}") from error


def _storage_error(what: str, error: sqlite3.DatabaseError) -> StorageFailed:
    name, text = getattr(error, "sqlite_errorname", ""), str(error)
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or "locked" in text:
        return StorageBusy(f"{what}: it is in use by another process")
    if name in _FULL or "disk is full" in text:
        return InsufficientStorage(f"{what}: the disk is full: delete items, collections or snapshots, or make space")
    if is_damage(error):
        return StorageDamaged(
            f"{what} is damaged or not a database ({damage_in(error)}); restore it from a backup, or move it away to "
            "start empty"
        )
    return StorageFailed(f"{what}: {text}")


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether an error says that the content of the file is damaged. Python uses the class DatabaseError itself
    for this, and subclasses for other errors."""
    return type(error) is sqlite3.DatabaseError or str(error).startswith(_DAMAGED_TEXT)


def damage_in(error: sqlite3.Error) -> str:
    """Return what is damaged, without the damaged bytes, which a message may contain."""
    return next((text for text in _DAMAGED_TEXT if str(error).startswith(text)), str(error))


class Connection(sqlite3.Connection):
    """A connection that `connect` made. It knows which files it has open: the database, and the write-ahead log after
    the first write."""

    files: tuple[InPlace, ...] = ()

    def check_in_place(self) -> None:
        """Raise StorageReplaced if a file that this connection has open is no longer at its path."""
        if len(self.files) == 1 and os.path.exists(log := f"{self.files[0].path}-wal"):
            self.files = (*self.files, InPlace(log))
        for file in self.files:
            file.check()


def connect(path: Path, *, read_only: bool = False) -> Connection:
    """Open a connection to the database at `path`, for use in one thread. `prepare` must have created or checked the
    file before. A file that is gone is not created again."""
    file = InPlace(path)
    if file.is_missing:
        raise replaced()
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        timeout=_BUSY_MS / 1000,
        isolation_level=None,
        check_same_thread=False,
        factory=Connection,
        uri=True,
    )
    db.files = (file,)
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA cache_size = -16384")
    db.execute(f"PRAGMA mmap_size = {2**40}")  # halves the time to look up hits; SQLite caps it at 2 GB
    if read_only:
        db.execute("PRAGMA query_only = ON")
    return db


def anchor(path: Path) -> Connection:
    """Open a connection that is only kept. While it is open, the files of the write-ahead log stay. The last connection
    removes them, and the next one needs space for new ones, which a full disk does not have."""
    db = connect(path)
    db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return db


def prepare(path: Path, schema: Schema, *, mode: Literal["WAL", "DELETE"] = "WAL", what: str | None = None) -> None:
    """Create the file, or check that the existing file has this schema, and upgrade it to the current version.

    Raises:
        StorageFailed: the file cannot be used, is damaged, or has another schema or a newer version. The message begins
            with `what`. If `what` is None, the message begins with the kind of file and the path.
    """
    what = what or f"{schema.what.partition(' ')[2]} {path}"
    with translated(what):
        path.parent.mkdir(parents=True, exist_ok=True)
        lend_space(path.parent)
        with closing(sqlite3.connect(path, timeout=_BUSY_MS / 1000, isolation_level=None)) as db:
            if not _is_empty(db):
                check_ours(db, schema, what)  # before changing anything in it
            db.execute("PRAGMA page_size = 8192")
            _set_journal_mode(db, mode)
            db.execute("PRAGMA synchronous = FULL")
            with transaction(db):
                _upgrade(db, schema)


def _set_journal_mode(db: sqlite3.Connection, mode: str) -> None:
    """Set the journal mode. While another connection is switching it, SQLite refuses at once, whatever the time limit
    of the connection is, so this waits."""
    deadline = time.monotonic() + _BUSY_MS / 1000
    while True:
        try:
            db.execute(f"PRAGMA journal_mode = {mode}")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _is_empty(db: sqlite3.Connection) -> bool:
    return bool(db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,))


def _upgrade(db: sqlite3.Connection, schema: Schema) -> None:
    """Run the scripts that the file has not seen yet. Another process may have run them in the meantime."""
    next_version = schema.first_version if _is_empty(db) else _pragma(db, "user_version") + 1
    for script in schema.scripts[next_version - schema.first_version :]:
        run_script(db, script)
    db.execute(f"PRAGMA application_id = {schema.application_id}")
    db.execute(f"PRAGMA user_version = {max(schema.version, next_version - 1)}")


def check_ours(db: sqlite3.Connection, schema: Schema, what: str) -> None:
    """Raise StorageFailed if the database has another schema, or a version that this service cannot read. The message
    begins with `what`."""
    application, version = _pragma(db, "application_id"), _pragma(db, "user_version")
    if application != schema.application_id or not schema.first_version <= version <= schema.version:
        raise StorageFailed(
            f"{what} is not {schema.what} of this version (application id {application:#x}, version {version}; "
            f"expected {schema.application_id:#x}, version {schema.version})"
        )


def _pragma(db: sqlite3.Connection, name: str) -> int:
    (value,) = db.execute(f"PRAGMA {name}").fetchone()
    return int(value)


def run_script(db: sqlite3.Connection, script: str) -> None:
    """Run the statements of an SQL script within the open transaction. The connection's own method `executescript`
    would commit the transaction first."""
    for statement in script.split(";\n"):
        db.execute(statement)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Run the block of a `with` statement in one write transaction. When the block ends, its changes are on disk. If
    the block raises an error, the database is not changed.

    Raises:
        StorageReplaced: the file was removed or replaced since the connection was opened with `connect`.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        if isinstance(db, Connection):
            db.check_in_place()
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
