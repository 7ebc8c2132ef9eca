"""The writer thread of the embedded store: commits writes together, and keeps deletions possible on a full disk.

Before a write that needs space, the reserve (`service/disk.py`) must be there, or the database must have free pages
that deleted items have left. If a deletion finds the disk full, the write-ahead log is emptied, then the reserve is
removed, and the deletion is tried again each time.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from service.disk import InPlace, Reserve
from service.errors import InsufficientStorage, StorageBusy, StorageFailed
from service.search.threads import Change, commit_together
from service.sqlite import translated
from service.stamp import Stamp

_WAIT_MS: Final = 1000
"""How long emptying the write-ahead log waits for readers, in milliseconds."""


class Writer:
    """Runs the writes of one store. `connect` opens a connection to its database, and `place` is that of the
    database."""

    def __init__(
        self, connect: Callable[[], sqlite3.Connection], stamp: Stamp, place: InPlace, reserve: Reserve
    ) -> None:
        self._connect, self._stamp, self._place, self._reserve = connect, stamp, place, reserve

    def make(self) -> Callable[[Sequence[Change]], Sequence[Any]]:
        """Return the function with which the writer thread runs its writes. Call this method in that thread."""
        db = self._connect()

        def work(changes: Sequence[Change]) -> Sequence[Any]:
            try:
                return self._together(db, changes)
            except StorageBusy:
                raise  # each of them would wait as long again
            except StorageFailed as error:
                if len(changes) == 1:
                    return [self._freed(db, changes[0], error)]
                return [self._alone(db, change) for change in changes]  # perhaps only one is too large for the disk
            finally:
                self._stamp.bump()

        return work

    def _together(self, db: sqlite3.Connection, changes: Sequence[Change]) -> list[Any]:
        if not all(change.frees for change in changes):
            self._check_space(db)
        return commit_together(db, changes)

    def _alone(self, db: sqlite3.Connection, change: Change) -> Any:
        try:
            return self._together(db, [change])[0]
        except StorageFailed as error:
            return self._freed(db, change, error)

    def _freed(self, db: sqlite3.Connection, change: Change, error: StorageFailed) -> Any:
        """Try a deletion again if it failed because the disk is full. Return its result, or the error.

        The first attempt uses the space of the write-ahead log, and the second one also that of the reserve.
        """
        result: Any = error
        for uses_reserve in (False, True):
            if not (change.frees and isinstance(result, InsufficientStorage)):
                break
            if uses_reserve and not self._reserve.spend():
                break
            _empty_log(db)
            try:
                with _quick_deletion(db):
                    [result] = commit_together(db, [change])
            except StorageFailed as again:
                result = again
        else:
            _empty_log(db)
        return result

    def _check_space(self, db: sqlite3.Connection) -> None:
        """Raise InsufficientStorage if the space that is left is kept for deletions."""
        if self._reserve.has_enough():
            return
        self._place.check()  # before the reserve is made in another folder
        with translated("the vector store"):
            if self._reserve.keep():
                return
            (pages,), (size,) = (db.execute(f"PRAGMA {name}").fetchone() for name in ("freelist_count", "page_size"))
        if pages * size < self._reserve.size // 4:
            raise InsufficientStorage(
                "the vector store: the disk is full, and the space that is left is kept for deletions"
            )


@contextmanager
def _quick_deletion(db: sqlite3.Connection) -> Iterator[None]:
    """Do not overwrite deleted rows with zeros within a `with` block, if SQLite would write more pages for this. In
    many builds, SQLite overwrites them, so a deletion needs as much space as what it deletes."""
    (usual,) = db.execute("PRAGMA secure_delete").fetchone()
    db.execute("PRAGMA secure_delete = FAST").fetchone()
    try:
        yield
    finally:
        db.execute(f"PRAGMA secure_delete = {usual}").fetchone()


def _empty_log(db: sqlite3.Connection) -> None:
    """Copy the write-ahead log into the database and give its space back to the disk, as far as readers and the space
    in the database allow it."""
    (usual,) = db.execute("PRAGMA busy_timeout").fetchone()
    db.execute(f"PRAGMA busy_timeout = {_WAIT_MS}")
    with suppress(sqlite3.OperationalError):  # the database cannot grow; the reserve comes next
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    db.execute(f"PRAGMA busy_timeout = {usual}")
