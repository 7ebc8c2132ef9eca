"""A collection's vectors as they are at one moment: segments, a tail in memory, and what of them is deleted.

A `View` never changes, so a search runs on one without a lock and without waiting for writes. `Views` keeps the newest
of each collection and makes the next from it and from what the database says is new, whoever wrote it: this process or
another. The tail grows in place: rows are appended behind the length that older views know, and existing rows never
change.
"""

import bisect
import logging
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service.errors import StorageFailed
from service.search import database, sqlite_file
from service.search.database import Chunk, Numbers, Point, Row, SegmentRow
from service.search.indexes import Effort, search, structure_of
from service.search.segment_files import in_memory, open_segment
from service.search.segments import (
    Allowed,
    LivePart,
    Neighbours,
    Positions,
    Segment,
    are_set,
    bits_without,
    merged,
    nearest_rows,
    nothing,
    top_of,
)
from service.search.store import Floats, SearchParams

log = logging.getLogger(__name__)

EXACT_ROWS: Final = 4_000
EXACT_SHARE: Final = 0.02
"""A filter that passes at most this many items, or this share of them, is searched exactly: the index's graph or cells
would lead past most of what passes."""
_FIRST_CAPACITY: Final = 256


class Tail:
    """Items that are in no segment yet. Appended to under the lock of `Views`, read without."""

    def __init__(self, dimension: int) -> None:
        self.numbers = np.empty(_FIRST_CAPACITY, np.int64)
        self.matrix = np.empty((_FIRST_CAPACITY, dimension), np.float32)
        self.payloads: list[bytes] = []

    def append(self, chunk: Chunk) -> None:
        length, needed = len(self.payloads), len(self.payloads) + len(chunk.numbers)
        if needed > len(self.numbers):  # older views keep the arrays they have
            room = max(needed, 2 * len(self.numbers)) - length
            self.numbers = np.concatenate([self.numbers[:length], np.empty(room, np.int64)])
            empty = np.empty((room, self.matrix.shape[1]), np.float32)
            self.matrix = np.concatenate([self.matrix[:length], empty])
        self.numbers[length:needed] = chunk.numbers
        self.matrix[length:needed] = chunk.vectors
        self.payloads += chunk.payloads

    def without(self, gone: npt.NDArray[np.bool_]) -> "Tail":
        """A new tail of the other rows."""
        stays = np.flatnonzero(~gone)
        kept = Tail(self.matrix.shape[1])
        kept.append(Chunk(self.numbers[stays], self.matrix[stays], [self.payloads[row] for row in stays]))
        return kept


class LiveTail(NamedTuple):
    """The tail's first rows, and which of them are deleted."""

    numbers: Numbers
    matrix: Floats
    payloads: list[bytes]  # and perhaps later ones
    dead: Positions
    buffer: Tail  # which the next view's tail continues

    def search(self, queries: Floats, k: int) -> Neighbours:
        wanted = min(k + len(self.dead), len(self.numbers))
        scores, positions = nearest_rows(queries, self.matrix, wanted)
        if len(self.dead):
            scores = np.where(np.isin(positions, self.dead), -np.inf, scores)
        return Neighbours(*top_of(scores, positions, k))

    def among(self, queries: Floats, k: int, allowed: Numbers) -> Neighbours:
        """The k nearest of those rows that are allowed (ascending)."""
        inside = np.isin(self.numbers, allowed, assume_unique=True)
        inside[self.dead] = False
        rows = np.flatnonzero(inside)
        if not len(rows):
            return nothing(len(queries))
        scores, positions = nearest_rows(queries, self.matrix[rows], k)
        return Neighbours(scores, np.where(positions < 0, -1, rows[positions]))


@dataclass(frozen=True)
class View:
    """One state of one collection. Its positions count over all its parts laid end to end, the tail last."""

    row: Row
    parts: tuple[LivePart, ...]
    starts: tuple[int, ...]  # the position at which each part begins, and in the end the tail
    tail: LiveTail
    edited: dict[int, bytes]  # payloads of items that changed since; shared with later views
    last: int  # the highest number seen
    point: Point

    def search(
        self, queries: Floats, k: int, params: SearchParams, allowed: Allowed | None = None, widen: float = 1.0
    ) -> Neighbours:
        """The k nearest [q, k] of all, or of what a filter allows; `widen` multiplies efSearch and nprobe."""
        if allowed is not None:
            return self._search_allowed(queries, k, allowed, Effort(params, widen))
        effort = Effort(params, widen)
        if len(self.parts) == 1 and not len(self.tail.numbers):
            return _search_part(self.parts[0], queries, k, effort)
        answers = [
            _moved(_search_part(part, queries, k, effort), start)
            for part, start in zip(self.parts, self.starts, strict=False)
        ]
        if len(self.tail.numbers):
            answers.append(_moved(self.tail.search(queries, k), self.starts[-1]))
        return merged(answers or [nothing(len(queries))], k)

    def payloads(self, positions: Sequence[int]) -> Iterator[bytes]:
        """What an answer says of the item at each of these positions: JSON [id, metadata, source]."""
        for position in positions:
            part = bisect.bisect_right(self.starts, position) - 1
            row = position - self.starts[part]
            holder: LiveTail | Segment = self.tail if part == len(self.parts) else self.parts[part].segment
            changed = self.edited.get(int(holder.numbers[row])) if self.edited else None
            yield holder.payloads[row] if changed is None else changed

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

    def _search_allowed(self, queries: Floats, k: int, allowed: Allowed, effort: Effort) -> Neighbours:
        answers = []
        for part, start in zip(self.parts, self.starts, strict=False):
            positions = allowed.positions(part.segment)
            positions = positions[are_set(part.alive, positions)]
            if len(positions):
                answers.append(_moved(_search_allowed(part, queries, k, allowed, effort, positions), start))
        if len(self.tail.numbers):
            answers.append(_moved(self.tail.among(queries, k, allowed.numbers), self.starts[-1]))
        return merged(answers or [nothing(len(queries))], k)


def _search_part(part: LivePart, queries: Floats, k: int, effort: Effort) -> Neighbours:
    """The k nearest of a segment: by its index, or exactly where that leads to fewer than there are (many equal vectors
    are not all linked in a graph, nor in the lists that are looked at)."""
    nearest = search(part.segment, queries, k, part.alive, effort)
    reachable = min(k, len(part.segment.numbers) - len(part.dead))
    if reachable and min(nearest.positions[:, reachable - 1].tolist()) < 0:
        return part.segment.scan(queries, k, part.alive)
    return nearest


def _search_allowed(
    part: LivePart, queries: Floats, k: int, allowed: Allowed, effort: Effort, positions: Positions
) -> Neighbours:
    """The k nearest of a segment that a filter allows, which lie at `positions`: by its index, or exactly where they
    are few or the index does not lead to k of them."""
    segment, total = part.segment, len(part.segment.numbers)
    if len(positions) <= max(EXACT_ROWS, EXACT_SHARE * total):
        return segment.exact(queries, k, positions)
    structure = structure_of(segment.kind)
    nearest = structure.search_allowed(part, queries, k, allowed, effort, total / len(positions))
    if nearest is None or (nearest.positions[:, -1] < 0).any():
        return segment.exact(queries, k, positions)
    return nearest


def _moved(nearest: Neighbours, start: int) -> Neighbours:
    """A part's positions as positions of the view."""
    if not start:
        return nearest
    return Neighbours(nearest.scores, np.where(nearest.positions < 0, -1, nearest.positions + start))


class Views:
    """The newest view of each collection. Safe to use from several threads, each with its own connection."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._views: dict[int, View] = {}

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

    def newest(self, db: sqlite3.Connection, row: Row) -> View:
        """The view of the state that `row` was read in, or of a later one. Outside of a transaction.

        Raises:
            CollectionNotFound: it was dropped since.
        """
        view = self._views.get(row.key)
        if view is not None and view.row.version >= row.version:
            return view
        while True:
            with sqlite_file.snapshot(db):
                view = self.at(db, database.by_key(db, row.key))
            if view is not None:
                return view

    def forget(self, keys: set[int]) -> None:
        """Of collections that are gone."""
        with self._lock:
            for key in keys:
                self._views.pop(key, None)

    def keys(self) -> set[int]:
        return set(self._views)

    def _follow(self, db: sqlite3.Connection, row: Row, old: View | None) -> View:
        removed_to, removed = database.removed_since(db, row, old.point.removed if old else 0)
        edited_to, edited = database.edited_since(db, row, old.point.edited if old else 0)
        parts = self._parts(db, row, old, removed)
        last, tail = self._tail(db, row, old, removed)
        starts = np.cumsum([0, *(len(part.segment.numbers) for part in parts)]).tolist()
        if old is None or [part.segment for part in parts] != [part.segment for part in old.parts]:
            changed = database.edited_since(db, row, 0)[1]  # what was built meanwhile may know the rest
        else:
            changed = old.edited
            changed.update(edited)
        return View(row, parts, tuple(starts), tail, changed, last, Point(removed_to, edited_to))

    def _parts(self, db: sqlite3.Connection, row: Row, old: View | None, removed: Numbers) -> tuple[LivePart, ...]:
        open_parts = {part.segment.row.folder: part for part in (old.parts if old else ())}
        every: Numbers | None = None
        removed = np.unique(removed)
        parts = []
        for wanted in database.segments(db, row.key):
            part = open_parts.get(wanted.folder)
            if part is None:
                segment = self._open(db, row, wanted)
                if every is None:
                    every = np.unique(database.removed_since(db, row, 0)[1])
                dead = segment.positions_of(every)
                part = LivePart(segment, dead, bits_without(len(segment.numbers), dead))
            elif len(more := part.segment.positions_of(removed)):
                dead = np.union1d(part.dead, more)
                part = LivePart(part.segment, dead, bits_without(len(part.segment.numbers), dead))
            parts.append(part)
        return tuple(parts)

    def _tail(self, db: sqlite3.Connection, row: Row, old: View | None, removed: Numbers) -> tuple[int, LiveTail]:
        last = max(old.last if old else 0, row.sealed)
        if old is None:
            tail, dead = Tail(row.spec.dimension), np.empty(0, np.int64)
        elif row.sealed > old.row.sealed:  # what is in segments now leaves the tail
            tail, dead = old.tail.buffer.without(_rows_gone(old.tail, row.sealed)), np.empty(0, np.int64)
        else:
            tail, dead = old.tail.buffer, old.tail.dead
            del tail.payloads[len(old.tail.numbers) :]  # appended by a call that failed before its view was made
        for chunk in database.read_items(db, row, after=last):
            tail.append(chunk)
            last = int(chunk.numbers[-1])
        length = len(tail.payloads)
        if len(removed):
            dead = np.union1d(dead, np.flatnonzero(np.isin(tail.numbers[:length], removed)))
        if len(dead) > max(_FIRST_CAPACITY, length // 4):
            gone = np.zeros(length, bool)
            gone[dead] = True
            tail, dead = tail.without(gone), np.empty(0, np.int64)
            length = len(tail.payloads)
        return last, LiveTail(tail.numbers[:length], tail.matrix[:length], tail.payloads, dead, tail)

    def _open(self, db: sqlite3.Connection, row: Row, wanted: SegmentRow) -> Segment:
        """The segment, or the same vectors from the database when its files are damaged."""
        try:
            return open_segment(self._root, wanted, row.spec.dtype)
        except (StorageFailed, RuntimeError, ValueError, OSError) as error:
            log.error("%s; searching the database's vectors instead, until it is built again", error)
        chunks = list(database.read_items(db, row, after=wanted.first - 1, to=wanted.last))
        return in_memory(wanted, chunks, row.spec.dimension, row.spec.dtype)


def _rows_gone(tail: LiveTail, sealed: int) -> npt.NDArray[np.bool_]:
    gone: npt.NDArray[np.bool_] = tail.numbers <= sealed
    gone[tail.dead] = True
    return gone
