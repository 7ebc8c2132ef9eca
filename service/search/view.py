"""Views of a collection. A view contains the state of the collection at one moment: its segments, its tail (the items
that are in no segment yet), and the positions of deleted vectors.

A `View` never changes, so a search needs no lock and does not wait for writes. `Views` stores the latest view of each
collection. To make the next view, `Views` adds the changes that this or another process has since written to the
database. Views share the arrays of the tail: new rows are appended after the rows that older views use, and existing
rows never change.

Legend: q queries, D dimension, k neighbours requested.
"""

import bisect
import logging
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service import sqlite
from service.errors import StorageFailed
from service.search import database
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
"""If a filter passes at most EXACT_ROWS items of a segment, or at most the share EXACT_SHARE of its items, these items
are searched exactly. A search with the index would miss most of them."""
_FIRST_CAPACITY: Final = 256


class Tail:
    """The items that are in no segment yet. To call `append`, a thread must hold the lock of `Views`. No lock is needed
    for reading."""

    def __init__(self, dimension: int) -> None:
        self.numbers = np.empty(_FIRST_CAPACITY, np.int64)
        self.matrix = np.empty((_FIRST_CAPACITY, dimension), np.float32)
        self.payloads: list[bytes] = []

    def append(self, chunk: Chunk) -> None:
        length, needed = len(self.payloads), len(self.payloads) + len(chunk.numbers)
        if needed > len(self.numbers):  # new arrays; older views still use the old ones
            room = max(needed, 2 * len(self.numbers)) - length
            self.numbers = np.concatenate([self.numbers[:length], np.empty(room, np.int64)])
            empty = np.empty((room, self.matrix.shape[1]), np.float32)
            self.matrix = np.concatenate([self.matrix[:length], empty])
        self.numbers[length:needed] = chunk.numbers
        self.matrix[length:needed] = chunk.vectors
        self.payloads += chunk.payloads

    def without(self, gone: npt.NDArray[np.bool_]) -> "Tail":
        """Return a new tail without the rows for which `gone` is true."""
        stays = np.flatnonzero(~gone)
        kept = Tail(self.matrix.shape[1])
        kept.append(Chunk(self.numbers[stays], self.matrix[stays], [self.payloads[row] for row in stays]))
        return kept


class LiveTail(NamedTuple):
    """The rows of the tail (the items that are in no segment yet) that belong to one view, and the positions of the
    deleted rows."""

    numbers: Numbers
    matrix: Floats
    payloads: list[bytes]  # may also contain payloads of later rows
    dead: Positions
    buffer: Tail  # shared with the next view, which appends to it

    def search(self, queries: Floats, k: int) -> Neighbours:
        wanted = min(k + len(self.dead), len(self.numbers))
        scores, positions = nearest_rows(queries, self.matrix, wanted)
        if len(self.dead):
            scores = np.where(np.isin(positions, self.dead), -np.inf, scores)
        return Neighbours(*top_of(scores, positions, k))

    def among(self, queries: Floats, k: int, allowed: Numbers) -> Neighbours:
        """For each of the queries [q, D], return the k rows nearest to it, among the rows whose item number is in
        `allowed`."""
        inside = np.isin(self.numbers, allowed, assume_unique=True)
        inside[self.dead] = False
        rows = np.flatnonzero(inside)
        if not len(rows):
            return nothing(len(queries))
        scores, positions = nearest_rows(queries, self.matrix[rows], k)
        return Neighbours(scores, np.where(positions < 0, -1, rows[positions]))


@dataclass(frozen=True)
class View:
    """A collection at one moment: its segments and its tail (the items that are in no segment yet). A position in a
    view is an index into the vectors of all segments, in order, followed by the vectors of the tail."""

    row: Row
    parts: tuple[LivePart, ...]
    starts: tuple[int, ...]  # the first position of each part, and finally of the tail
    tail: LiveTail
    edited: dict[int, bytes]  # payloads that changed after their segment was built; shared with later views
    last: int  # the highest item number that was read
    point: Point

    def search(
        self, queries: Floats, k: int, params: SearchParams, allowed: Allowed | None = None, widen: float = 1.0
    ) -> Neighbours:
        """Return the k nearest items of each query, best first. `queries` has the shape [q, D], and the scores and
        positions in the result have the shape [q, k]. If `allowed` is given, only items in `allowed` are returned. The
        search parameters efSearch and nprobe are multiplied by `widen`."""
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

    def payloads(self, positions: Sequence[int]) -> list[bytes]:
        """Return, for each position, the JSON text [id, metadata, source] of its item. A search makes a hit from this
        text."""
        if len(self.parts) == 1 and not self.edited and max(positions, default=0) < self.starts[-1]:
            return self.parts[0].segment.payloads.at(positions)
        return [self._payload(position) for position in positions]

    def _payload(self, position: int) -> bytes:
        part = bisect.bisect_right(self.starts, position) - 1
        row = position - self.starts[part]
        holder: LiveTail | Segment = self.tail if part == len(self.parts) else self.parts[part].segment
        changed = self.edited.get(int(holder.numbers[row])) if self.edited else None
        payload: bytes = holder.payloads[row] if changed is None else changed
        return payload

    def stats(self) -> dict[str, Any]:
        """Return statistics for operators: the properties of each segment, and the number of items that are in no
        segment yet."""
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
    """Return the k nearest vectors of each query [q, D] in a segment, using the segment's index.

    If the index returns fewer than k vectors although the segment contains more, the query is compared with all vectors
    instead. This happens, for example, if many vectors are identical, because some of them may not be reachable in a
    graph.
    """
    nearest = search(part.segment, queries, k, part.alive, effort)
    reachable = min(k, len(part.segment.numbers) - len(part.dead))
    if reachable and min(nearest.positions[:, reachable - 1].tolist()) < 0:
        return part.segment.scan(queries, k, part.alive)
    return nearest


def _search_allowed(
    part: LivePart, queries: Floats, k: int, allowed: Allowed, effort: Effort, positions: Positions
) -> Neighbours:
    """Return the k nearest vectors of each query [q, D] among the allowed items of a segment. `positions` contains the
    positions of those allowed items that are not deleted.

    The search uses the segment's index. If few items are allowed, or if the index does not find k of them, the query is
    compared with all allowed items instead.
    """
    segment, total = part.segment, len(part.segment.numbers)
    if len(positions) <= max(EXACT_ROWS, EXACT_SHARE * total):
        return segment.exact(queries, k, positions)
    structure = structure_of(segment.kind)
    nearest = structure.search_allowed(part, queries, k, allowed, effort, total / len(positions))
    if nearest is None or (nearest.positions[:, -1] < 0).any():
        return segment.exact(queries, k, positions)
    return nearest


def _moved(nearest: Neighbours, start: int) -> Neighbours:
    """Convert positions in one segment or in the tail to positions in the view, and return the converted neighbours.
    `start` is the position in the view at which the segment or tail begins."""
    if not start:
        return nearest
    return Neighbours(nearest.scores, np.where(nearest.positions < 0, -1, nearest.positions + start))


class Views:
    """A cache that contains the latest view of each collection. Several threads may use it at the same time, each with
    its own database connection."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._views: dict[int, View] = {}

    def at(self, db: sqlite3.Connection, row: Row) -> View | None:
        """Return the view of a collection in the state that the current transaction of `db` sees. `row` must have been
        read in this transaction.

        Return None if a newer view exists. In this case, the caller must begin a new transaction.
        """
        view = self._views.get(row.key)
        if view is None or view.row.version != row.version:
            with self._lock:
                view = self._views.get(row.key)
                if view is None or view.row.version < row.version:
                    view = self._follow(db, row, view)
                    self._views[row.key] = view
        return view if view.row.version == row.version else None

    def newest(self, db: sqlite3.Connection, row: Row) -> View:
        """Return a view of the collection. Its state is the one in which `row` was read, or a later one. Call this
        method outside a transaction.

        Raises:
            CollectionNotFound: the collection was dropped after `row` was read.
        """
        view = self._views.get(row.key)
        if view is not None and view.row.version >= row.version:
            return view
        while True:
            with sqlite.snapshot(db):
                view = self.at(db, database.by_key(db, row.key))
            if view is not None:
                return view

    def forget(self, keys: set[int]) -> None:
        """Discard the views of the collections with these keys."""
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
            changed = database.edited_since(db, row, 0)[1]  # new segments may already include the other edits
        else:
            changed = old.edited
            changed.update(edited)
        return View(row, parts, tuple(starts), tail, changed, last, Point(removed_to, edited_to))

    def _parts(self, db: sqlite3.Connection, row: Row, old: View | None, removed: Numbers) -> tuple[LivePart, ...]:
        open_parts = {part.segment.row.folder: part for part in (old.parts if old else ())}
        every: Numbers | None = None
        if len(removed):  # the first call of np.unique imports numpy.ma, which takes 10 to 20 ms
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
        elif row.sealed > old.row.sealed:  # items that are now in segments leave the tail
            tail, dead = old.tail.buffer.without(_rows_gone(old.tail, row.sealed)), np.empty(0, np.int64)
        else:
            tail, dead = old.tail.buffer, old.tail.dead
            del tail.payloads[len(old.tail.numbers) :]  # appended by a call that failed before it made its view
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
        """Open a segment and return it. If its files are damaged, log the error and return a replacement that is built
        in memory from the database."""
        try:
            return open_segment(self._root, wanted, row.spec.dtype)
        except (StorageFailed, RuntimeError, ValueError, OSError) as error:
            log.error("%s; searching the database's vectors instead until the segment is rebuilt", error)
        chunks = list(database.read_items(db, row, after=wanted.first - 1, to=wanted.last))
        return in_memory(wanted, chunks, row.spec.dimension, row.spec.dtype)


def _rows_gone(tail: LiveTail, sealed: int) -> npt.NDArray[np.bool_]:
    gone: npt.NDArray[np.bool_] = tail.numbers <= sealed
    gone[tail.dead] = True
    return gone
