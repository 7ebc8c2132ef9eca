"""Caches the numbers (internal ids) of the items that pass a filter, and keeps the cached results up to date.

To evaluate a filter, the database uses its indexes on metadata keys, or reads all metadata. Most filters are used
repeatedly, for example a filter for a shop or a language. If the result of a filter is cached, the database evaluates
the filter only for items that were added later, which have higher numbers. A cached result may contain deleted items,
but searches ignore them. When metadata is edited, all cached results of the collection become invalid.
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
from service.search.view import View
from service.sqlite import snapshot

MAX_KEPT_BYTES: Final = 64 * 2**20
MAX_KEPT: Final = 256


@dataclass(frozen=True)
class _Kept:
    allowed: Allowed
    edits: int
    through: int  # the highest item number that was checked
    segments: frozenset[str]  # folders of the segments that `allowed` may have positions for


class Selections:
    """A cache that contains the most recently used filters and the items that pass each of them. It is safe to use from
    several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, str, tuple[Scalar, ...]], _Kept] = OrderedDict()

    def allowed(self, db: sqlite3.Connection, view: View, where: Filter) -> Allowed:
        """Return the items in a view that pass the filter `where`. The result may contain deleted items. If metadata
        has changed since the view was made, the filter may already see the new metadata.

        Call this method outside a transaction.

        Raises:
            CollectionNotFound: the collection was dropped after the view was made.
        """
        row = view.row
        condition, parameters = to_sql(where)  # also the cache key: filters with 1 and True are equal in Python
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
    """Return the numbers (internal ids) of the items that pass a filter, in ascending order. Only numbers above `after`
    and up to `to` are returned."""
    condition, parameters = to_sql(where)
    query = f"SELECT number FROM items_{row.key} WHERE {condition}"
    if after or to != 2**62:
        # The plus sign prevents SQLite from scanning the numbers instead of using an index on metadata.
        limits = "number > ? AND number <= ?" if after else "+number > ? AND +number <= ?"
        query, parameters = f"{query} AND {limits}", [*parameters, after, to]
    numbers = np.fromiter((number for (number,) in db.execute(query, parameters)), np.int64)
    return np.sort(numbers)
