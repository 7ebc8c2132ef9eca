"""A collection's vectors as they are at one moment: segments, a tail in memory, and what of them is deleted.

A `View` never changes, so a search runs on one without a lock and without waiting for writes. `Views` keeps the newest
of each collection and makes the next from it and from what the database says is new, whoever wrote it: this process or
another. The tail grows in place: rows are appended behind the length that older views know, and existing rows never
change.
"""

import logging
import sqlite3
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import faiss
import numpy as np

from service.errors import StorageFailed
from service.search import database
from service.search.database import Numbers, Row, SegmentRow
from service.search.segments import (
    Bits,
    Found,
    Positions,
    Segment,
    are_set,
    bits_of,
    bits_without,
    in_memory,
    merged,
    open_segment,
    top,
)
from service.search.store import Floats, SearchParams

log = logging.getLogger(__name__)

EXACT_ROWS: Final = 20_000
EXACT_SHARE: Final = 0.02
"""A filter that passes at most this many items, or this share of them, is searched exactly: the index's graph or cells
would lead past most of what passes."""
_FIRST_CAPACITY: Final = 256


class Tail:
    """Vectors that are in no segment yet. Appended to under the lock of `Views`, read without."""

    def __init__(self, dimension: int) -> None:
        self.numbers = np.empty(_FIRST_CAPACITY, np.int64)
        self.matrix = np.empty((_FIRST_CAPACITY, dimension), np.float32)
        self.length = 0

    def append(self, numbers: Numbers, matrix: Floats) -> None:
        needed = self.length + len(numbers)
        if needed > len(self.numbers):  # older views keep the arrays they have
            capacity = max(needed, 2 * len(self.numbers))
            self.numbers = np.concatenate([self.numbers[: self.length], np.empty(capacity - self.length, np.int64)])
            room = np.empty((capacity - self.length, self.matrix.shape[1]), np.float32)
            self.matrix = np.concatenate([self.matrix[: self.length], room])
        self.numbers[self.length : needed] = numbers
        self.matrix[self.length : needed] = matrix
        self.length = needed


class LiveTail(NamedTuple):
    """The tail's first rows, and which of them are deleted."""

    numbers: Numbers
    matrix: Floats
    dead: Positions

    def search(self, queries: Floats, k: int) -> Found:
        wanted = min(k + len(self.dead), len(self.numbers))
        scores, positions = faiss.knn(queries, self.matrix, wanted, metric=faiss.METRIC_INNER_PRODUCT)
        if len(self.dead):
            scores = np.where(np.isin(positions, self.dead), -np.inf, scores)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores, positions = np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1)
        return Found(scores, np.where(np.isneginf(scores), -1, self.numbers[positions]))


class LivePart(NamedTuple):
    """A segment, and which of its vectors are not deleted (None: all)."""

    segment: Segment
    dead: Positions
    alive: Bits | None


class Allowed:
    """What a filter lets pass: numbers, ascending, and where they lie in each segment, found once."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers
        self._positions: dict[str, Positions] = {}
        self._bits: dict[str, Bits] = {}

    def positions(self, segment: Segment) -> Positions:
        known = self._positions.get(segment.row.folder)
        if known is None:
            known = self._positions[segment.row.folder] = segment.positions_of(self.numbers)
        return known

    def bits(self, segment: Segment) -> Bits:
        known = self._bits.get(segment.row.folder)
        if known is None:
            known = self._bits[segment.row.folder] = bits_of(len(segment.numbers), self.positions(segment))
        return known

    @property
    def nbytes(self) -> int:
        arrays: list[np.ndarray[Any, Any]] = [self.numbers, *self._positions.values(), *self._bits.values()]
        return sum(array.nbytes for array in arrays)


@dataclass(frozen=True)
class View:
    """One state of one collection."""

    row: Row
    parts: tuple[LivePart, ...]
    tail: LiveTail
    last: int  # the highest number seen
    seq: int  # how far `removed` was read

    def search(
        self, queries: Floats, k: int, params: SearchParams, allowed: Allowed | None = None, widen: float = 1.0
    ) -> Found:
        """The k nearest [q, k] of all, or of what a filter allows; `widen` multiplies efSearch and nprobe."""
        if allowed is not None:
            return self._search_among(queries, k, params, allowed, widen)
        found = [part.segment.search(queries, k, part.alive, params, widen) for part in self.parts]
        if len(self.tail.numbers):
            found.append(self.tail.search(queries, k))
        if not found:
            return top(np.empty((len(queries), 0), np.float32), np.empty(0, np.int64), k)
        return merged(found, k)

    def stats(self) -> dict[str, Any]:
        """Segments and tail, for people."""
        segments = [
            {
                "kind": part.segment.row.kind,
                "vectors": len(part.segment.numbers),
                "deleted": len(part.dead),
                "bytes": sum(size for size, _ in part.segment.row.files.values()),
                "effort": part.segment.row.effort,
                "whole": part.segment.whole,
            }
            for part in self.parts
        ]
        return {"segments": segments, "tail": len(self.tail.numbers) - len(self.tail.dead)}

    def _search_among(self, queries: Floats, k: int, params: SearchParams, allowed: Allowed, widen: float) -> Found:
        found = []
        for part in self.parts:
            positions = allowed.positions(part.segment)
            positions = positions[are_set(part.alive, positions)]
            count, total = len(positions), len(part.segment.numbers)
            if not count:
                continue
            if params.exact or part.segment.index is None or count <= max(EXACT_ROWS, EXACT_SHARE * total):
                found.append(part.segment.exact(queries, k, positions))
                continue
            bits = allowed.bits(part.segment)
            alive = bits if part.alive is None else bits & part.alive
            wider = widen * min(total / count, 1 / EXACT_SHARE)
            some = part.segment.search(queries, k, alive, params, wider)
            lacking = (some.numbers[:, min(k, count) - 1] < 0).any()
            found.append(part.segment.exact(queries, k, positions) if lacking else some)
        found.append(self._tail_among(queries, k, allowed))
        return merged(found, k)

    def _tail_among(self, queries: Floats, k: int, allowed: Allowed) -> Found:
        inside = np.isin(self.tail.numbers, allowed.numbers, assume_unique=True)
        inside[self.tail.dead] = False
        return top(queries @ self.tail.matrix[inside].T, self.tail.numbers[inside], k)


class Views:
    """The newest view of each collection. Safe to use from several threads, each with its own connection."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._views: dict[int, View] = {}
        self._tails: dict[int, Tail] = {}

    def at(self, db: sqlite3.Connection, row: Row) -> View | None:
        """The view of a collection as the transaction that read `row` sees it; None if that is already outdated: begin
        another."""
        view = self._views.get(row.key)
        if view is None or view.row.version != row.version:
            with self._lock:
                view = self._views.get(row.key)
                if view is None or view.row.version < row.version:
                    view = self._follow(db, row, view)
                    self._views[row.key] = view
        return view if view.row.version == row.version else None

    def forget(self, keys: set[int]) -> None:
        """Of collections that are gone."""
        with self._lock:
            for key in keys:
                self._views.pop(key, None)
                self._tails.pop(key, None)

    def keys(self) -> set[int]:
        return set(self._views)

    def _follow(self, db: sqlite3.Connection, row: Row, old: View | None) -> View:
        seq, removed = database.removed_since(db, row, old.seq if old else 0)
        parts = self._parts(db, row, old, removed)
        last, tail = self._tail(db, row, old, removed)
        return View(row, parts, tail, last, seq)

    def _parts(self, db: sqlite3.Connection, row: Row, old: View | None, removed: Numbers) -> tuple[LivePart, ...]:
        known = {part.segment.row.folder: part for part in (old.parts if old else ())}
        every: Numbers | None = None
        parts = []
        for wanted in database.segments(db, row.key):
            part = known.get(wanted.folder)
            if part is None:
                segment = self._open(db, row, wanted)
                if every is None:
                    every = np.sort(database.removed_since(db, row, 0)[1])
                dead = segment.positions_of(np.unique(every))
                part = LivePart(segment, dead, bits_without(len(segment.numbers), dead))
            elif len(more := part.segment.positions_of(np.unique(removed))):
                dead = np.union1d(part.dead, more)
                part = LivePart(part.segment, dead, bits_without(len(part.segment.numbers), dead))
            parts.append(part)
        return tuple(parts)

    def _tail(self, db: sqlite3.Connection, row: Row, old: View | None, removed: Numbers) -> tuple[int, LiveTail]:
        tail = self._tails.get(row.key)
        last = max(old.last if old else 0, row.sealed)
        dead = old.tail.dead if old else np.empty(0, np.int64)
        if tail is None or old is None or row.sealed > old.row.sealed:  # what is in segments now leaves the tail
            kept = Tail(row.spec.dimension)
            if tail is not None and old is not None:
                stays = old.tail.numbers > row.sealed
                stays[dead] = False
                kept.append(old.tail.numbers[stays], old.tail.matrix[stays])
            dead = np.empty(0, np.int64)
            tail = self._tails[row.key] = kept
        for numbers, matrix in database.read_vectors(db, row, after=last):
            tail.append(numbers, matrix)
            last = int(numbers[-1])
        numbers = tail.numbers[: tail.length]
        if len(removed):
            dead = np.union1d(dead, np.flatnonzero(np.isin(numbers, removed)))
        if len(dead) > max(_FIRST_CAPACITY, tail.length // 4):
            stays = np.ones(tail.length, bool)
            stays[dead] = False
            kept = Tail(row.spec.dimension)
            kept.append(numbers[stays], tail.matrix[: tail.length][stays])
            tail, dead = kept, np.empty(0, np.int64)
            self._tails[row.key] = tail
        return last, LiveTail(tail.numbers[: tail.length], tail.matrix[: tail.length], dead)

    def _open(self, db: sqlite3.Connection, row: Row, wanted: SegmentRow) -> Segment:
        """The segment, or the same vectors from the database when its files are damaged."""
        try:
            return open_segment(self._root, wanted, row.spec.dtype)
        except (StorageFailed, RuntimeError, ValueError, OSError) as error:
            log.error("%s; searching the database's vectors instead, until it is built again", error)
        chunks = list(database.read_vectors(db, row, after=wanted.first - 1, to=wanted.last))
        numbers = np.concatenate([numbers for numbers, _ in chunks] or [np.empty(0, np.int64)])
        matrix = np.concatenate([part for _, part in chunks] or [np.empty((0, row.spec.dimension), np.float32)])
        return in_memory(replace(wanted, kind="flat"), numbers, matrix, row.spec.dtype)
