"""The files of snapshots: their names, and how a file from elsewhere is opened.

A snapshot may have been made by anyone, so its file is opened read-only and with few rights: an authorizer allows only
the statements that reading a snapshot needs, the schema may contain only plain tables and indexes, and reading stops
when it takes much longer than a disk needs. A link is never followed.
"""

import os
import re
import reprlib
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from model.files import lock_file
from service import sqlite
from service.errors import InvalidRequest, NotFound, StorageFailed
from service.search.schema import SCHEMA
from service.sqlite import translated

NAME: Final = re.compile(r"[0-9]{8}T[0-9]{6}\.[0-9]{3}Z")
"""The form of a snapshot's name: the time at which it was taken, in UTC, with milliseconds."""
_COMPUTED: Final = re.compile(r"\b(virtual|generated|as|check)\b", re.IGNORECASE)
_INDEX: Final = re.compile(
    r"CREATE INDEX \w+ ON (items_\d+ \(json_extract\(metadata, '[^']*'\)\)|requests \([\w, ]+\))"
)
"""The indexes that the store makes. SQLite's own setting `trusted_schema` would also refuse `json_extract`."""
_NO_DAMAGE: Final = tuple(f"SQLITE_{name}" for name in ("BUSY", "CANTOPEN", "FULL", "IOERR", "NOMEM"))
_PRAGMAS: Final = frozenset({"application_id", "user_version", "quick_check", "table_info"})
_FUNCTIONS: Final = frozenset({"count", "json_extract", "like"})
_TIME_S: Final = 60.0
_BYTES_PER_S: Final = 2**20
"""Reading a snapshot may take `_TIME_S` seconds, and one second more for each `_BYTES_PER_S` of its size. Even a slow
disk is several times as fast."""
_STEPS: Final = 10_000
"""The number of SQLite's instructions between two looks at the clock."""


def name_at(seconds: float) -> str:
    """Return the name of a snapshot that is taken at this time, in seconds since 1970."""
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds)) + f".{int(seconds * 1000) % 1000:03d}Z"


@contextmanager
def new_name(root: Path, collection: str) -> Iterator[tuple[str, Path]]:
    """Reserve a name for a snapshot of a collection. Yield the name and an empty temporary file.

    If another snapshot has the name of the current time or is getting it, the next free millisecond is taken. The
    temporary file is locked, so that `tidy` does not remove it. At the end it is removed if it is still there.
    """
    folder = root / collection
    root.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    moment = time.time()
    while True:
        name = name_at(moment)
        aside = folder / f".{name}.part"
        moment += 0.001
        try:
            os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644))
        except FileExistsError:
            continue
        if not os.path.lexists(file_of(root, collection, name)):  # it may have got its name just before
            break
        aside.unlink()
    lock = lock_file(aside)
    try:
        yield name, aside
    finally:
        aside.unlink(missing_ok=True)
        if lock is not None:
            lock.close()


def file_of(root: Path, collection: str, name: str) -> Path:
    return root / collection / f"{name}.sqlite3"


def path_of(root: Path, collection: str, name: str) -> Path:
    """Return the path of a snapshot's file.

    Raises:
        InvalidRequest: `name` is not a valid snapshot name.
        NotFound: the snapshot does not exist, or it is not a regular file below `root`.
    """
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name[:80]!r} is not a snapshot name; a valid one is 20260131T235959.123Z", param="snapshot"
        )
    path = file_of(root, collection, name)
    if path.parent.is_symlink() or not is_regular(path):
        raise NotFound(f"collection {collection!r} has no snapshot {name!r}")
    return path


def is_regular(path: Path) -> bool:
    """Return whether there is a regular file at `path`. A link to one does not count."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


class Snapshot(sqlite3.Connection):
    """A connection to the file of a snapshot, with limited rights and limited time."""

    _left_s = _TIME_S
    _until = float("inf")

    def limit(self, size: int) -> None:
        """Limit what this connection may do. `size` is the size of its file in bytes."""
        self.execute("PRAGMA cell_size_check = ON")
        self._left_s = _TIME_S + size / _BYTES_PER_S
        self.set_authorizer(_authorised)
        self.set_progress_handler(lambda: time.monotonic() > self._until, _STEPS)

    def rows(self, query: str) -> list[Any]:
        """Run a query within the time that is left, and return its rows."""
        started = time.monotonic()
        self._until = started + self._left_s
        try:
            return self.execute(query).fetchall()
        finally:
            self._left_s -= time.monotonic() - started
            self._until = float("inf")


def _authorised(action: int, first: str | None, second: str | None, *_: Any) -> int:
    """Allow SQLite to run the statements of this module and of `service/search/snapshots.py`, and nothing else."""
    allowed = (
        action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
        or (action == sqlite3.SQLITE_PRAGMA and first in _PRAGMAS)
        or (action == sqlite3.SQLITE_FUNCTION and second in _FUNCTIONS)
    )
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def opened(path: Path, what: str | None = None) -> Snapshot:
    """Open the file of a snapshot, and check its kind and its schema. `what` names the snapshot in error messages.

    Raises:
        InvalidRequest: the file is not a regular file or not a snapshot.
    """
    what = what or f"snapshot {path.stem}"
    if not is_regular(path):
        raise InvalidRequest(f"{what} is not a regular file")
    uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"  # makes no files beside it, even if it is in WAL mode
    db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, factory=Snapshot)
    try:
        db.limit(path.stat().st_size)
        try:
            sqlite.check_ours(db, SCHEMA, what)
        except StorageFailed as error:
            raise InvalidRequest(error.detail) from error  # the snapshot is wrong, not this server's storage
        _check_schema(db, what)
    except BaseException:
        db.close()
        raise
    return db


def _check_schema(db: Snapshot, what: str) -> None:
    """Check that the file contains only plain tables and the store's own indexes. A view could make a query endless,
    and a computed column, a check or an index could call any function.

    Raises:
        InvalidRequest: the file contains anything else.
    """
    for kind, name, sql in db.rows("SELECT type, name, sql FROM sqlite_master"):
        is_plain = kind == "table" and not _COMPUTED.search(sql or "")
        is_index = kind == "index" and (sql is None or _INDEX.fullmatch(sql))
        if not (is_plain or is_index):
            raise InvalidRequest(f"{what} is damaged: {reprlib.repr(name)} is not a plain table or index")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Convert the errors of a snapshot file within a `with` block. A damaged file becomes InvalidRequest, because the
    snapshot is wrong and not the store. A file that cannot be read becomes StorageFailed. The message begins with
    `what`."""
    with translated(what):
        try:
            yield
        except sqlite3.DatabaseError as error:
            name = getattr(error, "sqlite_errorname", "")
            if name.startswith(_NO_DAMAGE):
                raise
            if name == "SQLITE_INTERRUPT":
                raise InvalidRequest(f"{what} is damaged: reading it takes too long for its size") from error
            raise InvalidRequest(f"{what} is damaged or not a snapshot: {error}") from error
