"""Which items a filter lets pass, as the numbers of their vectors; asked once, then kept up to date.

The database answers through its indexes on declared keys, or by reading all metadata. A filter that is used again
(most are: a shop, a language, "in stock") costs only what was added since: numbers above the last seen; deleted ones
drop out by the view's bitmaps. A change of metadata alone makes every answer of that collection void.
"""

import sqlite3
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import numpy as np

from service.search.database import Numbers, Row, check_exists
from service.search.filter_sql import to_sql
from service.search.filters import Filter, Scalar
from service.search.segments import Allowed
from service.search.sqlite_file import snapshot
from service.search.view import View

MAX_KEPT_BYTES: Final = 64 * 2**20
MAX_KEPT: Final = 256


@dataclass(frozen=True)
class _Kept:
    allowed: Allowed
    edits: int
    through: int  # numbers up to here were looked at
    segments: frozenset[str]  # whose positions it may hold


class Selections:
    """Filters and what passes them, the most recently used. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, str, tuple[Scalar, ...]], _Kept] = OrderedDict()

    def allowed(self, db: sqlite3.Connection, view: View, where: Filter) -> Allowed:
        """What passes now, of the view and perhaps of what was deleted before it. Outside of a transaction.

        Raises:
            CollectionNotFound: it was dropped since the view was made.
        """
        row = view.row
        condition, parameters = to_sql(where)  # also what tells filters apart: to Python, 1 and True are equal
        key = (row.key, condition, tuple(parameters))
        with self._lock:
            kept = self._kept.get(key)
        if kept is None or kept.edits != row.edits or kept.through > view.last:
            kept = None
        folders = frozenset(part.segment.row.folder for part in view.parts)
        if kept is not None and kept.through == view.last and kept.segments == folders:
            allowed = kept.allowed
        else:
            with snapshot(db):
                check_exists(db, row)
                numbers = passing(db, row, where, after=kept.through if kept else 0, to=view.last)
            if kept is not None:
                numbers = np.concatenate([kept.allowed.numbers, numbers])
            allowed = Allowed(numbers)
        with self._lock:
            self._kept[key] = _Kept(allowed, row.edits, view.last, folders)
            self._kept.move_to_end(key)
            total = sum(entry.allowed.nbytes for entry in self._kept.values())
            while self._kept and (total > MAX_KEPT_BYTES or len(self._kept) > MAX_KEPT):
                total -= self._kept.popitem(last=False)[1].allowed.nbytes
        return allowed


def passing(db: sqlite3.Connection, row: Row, where: Filter, *, after: int = 0, to: int = 2**62) -> Numbers:
    """Numbers of the items that pass a filter, ascending."""
    condition, parameters = to_sql(where)
    query = f"SELECT number FROM items_{row.key} WHERE {condition}"
    if after or to != 2**62:
        # The plus keeps SQLite from walking through the numbers instead of using an index on metadata.
        limits = "number > ? AND number <= ?" if after else "+number > ? AND +number <= ?"
        query, parameters = f"{query} AND {limits}", [*parameters, after, to]
    numbers = np.fromiter((number for (number,) in db.execute(query, parameters)), np.int64)
    return np.sort(numbers)
