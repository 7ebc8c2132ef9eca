"""Which collections of the embedded store are damaged.

All collections share one SQLite file, but each has its own tables. A damaged page therefore usually belongs to one
collection. When a read or a write finds damage, that collection is marked. From then on this process refuses to read or
write its items, because an answer could lack some of them. The other collections are served as before. The mark ends
when the collection is deleted, or when the process ends.
"""

import logging
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from service.errors import CollectionNotFound, StorageDamaged
from service.search import database
from service.search.database import Row
from service.sqlite import damage_in, is_damage

log = logging.getLogger(__name__)


class Damage:
    """The damaged collections of one store, by key. Several threads may use it at the same time."""

    def __init__(self) -> None:
        self._reasons: dict[int, str] = {}

    def __bool__(self) -> bool:
        return bool(self._reasons)

    def __contains__(self, key: object) -> bool:
        return key in self._reasons

    def holds(self, row: Row) -> bool:
        """Return whether a collection or its partner is marked."""
        return row.key in self._reasons or row.partner in self._reasons

    def names(self, rows: Iterable[Row]) -> list[str]:
        """Return the names of the marked collections among `rows`."""
        return [row.name for row in rows if self.holds(row)]

    def mark(self, row: Row, error: Exception) -> None:
        """Mark a collection. `error` says what is damaged."""
        if row.key not in self._reasons:
            self._reasons[row.key] = _reason(error)
            log.error("collection %r is damaged and no longer served: %s", row.name, self._reasons[row.key])

    def forget(self, keys: Iterable[int]) -> None:
        """Remove the marks of deleted collections."""
        for key in keys:
            self._reasons.pop(key, None)

    @contextmanager
    def watching(self, db: sqlite3.Connection, name: str | None, *, is_write: bool = False) -> Iterator[None]:
        """Run a `with` block that reads or writes a collection. If the block finds damage, mark the collection.

        `name` is the name of the collection, an alias or a reference. If it is None, the block belongs to no
        collection. A write also changes the partner of the collection, so it is refused if that is marked.

        Raises:
            StorageDamaged: the collection is marked already. The block is not run.
        """
        if name is not None and self._reasons:
            row = _found(db, name)
            if row is not None and row.key in self._reasons:
                raise StorageDamaged(self._reasons[row.key])
            if row is not None and is_write and row.partner in self._reasons:
                raise StorageDamaged(f"its vectors of another model: {self._reasons[row.partner]}")
        try:
            yield
        except (StorageDamaged, sqlite3.Error) as error:
            if name is not None and (isinstance(error, StorageDamaged) or is_damage(error)):
                row = _found(db, name)
                if row is not None:
                    self.mark(row, error)
            raise


def explained(name: str, error: StorageDamaged) -> StorageDamaged:
    """Return the error for the client: which collection is damaged, and what to do."""
    return StorageDamaged(
        f"collection {name.partition('@')[0]!r} is damaged ({_reason(error)}): delete it, and then restore a snapshot "
        "or a backup of it; snapshots are not deleted with their collection"
    )


def _reason(error: Exception) -> str:
    """Return what is damaged."""
    cause = error.__cause__ if isinstance(error.__cause__, sqlite3.Error) else error
    if isinstance(cause, sqlite3.Error):
        return damage_in(cause)
    return cause.detail if isinstance(cause, StorageDamaged) else str(cause)


def _found(db: sqlite3.Connection, name: str) -> Row | None:
    try:
        return database.find(db, name)
    except (CollectionNotFound, sqlite3.Error, ValueError):
        return None
