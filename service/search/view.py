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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service.errors import StorageFailed
from service.search import database
from service.search.database import Chunk, Numbers, Point, Row, SegmentRow
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
    nearest_rows,
    nothing,
    open_segment,
    top_of,
)
from service.search.store import Floats, SearchParams

log = logging.getLogger(__name__)

EXACT_ROWS: Final = 4_000
EXACT_SHARE: Final = 0.02
"""A filter that passes at most this many items, or this share of them, is searched exactly: the index's graph or cells
would lead past most of what passes."""
OVERSAMPLE: Final = 3
MAX_OVERSAMPLED: Final = 4096
"""Of a graph, for a filter: times as many as are expected to hold k that pass, and how many at most."""
DENSER: Final = 1.5
"""Of inverted lists, for a filter: times as many candidates as without one."""
FAR: Final = 2
"""A filter for which so many times more lists must be searched than if its items were spread evenly passes what is far
from the query. The nearest of them are then spread over all lists that hold any, so all are searched."""
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
        kept.append(Chunk(self.numbers[stays], self.matrix[stays], [self.payloads[place] for place in stays]))
        return kept


class LiveTail(NamedTuple):
    """The tail's first rows, and which of them are deleted."""

    numbers: Numbers
    matrix: Floats
    payloads: list[bytes]  # and perhaps later ones
    dead: Positions
    buffer: Tail  # which the next view's tail continues

    def search(self, queries: Floats, k: int) -> Found:
        wanted = min(k + len(self.dead), len(self.numbers))
        scores, places = nearest_rows(queries, self.matrix, wanted)
        if len(self.dead):
            scores = np.where(np.isin(places, self.dead), -np.inf, scores)
        return Found(*top_of(scores, places, k))

    def among(self, queries: Floats, k: int, allowed: Numbers) -> Found:
        """The k nearest of those rows that are allowed (ascending)."""
        inside = np.isin(self.numbers, allowed, assume_unique=True)
        inside[self.dead] = False
        rows = np.flatnonzero(inside)
        if not len(rows):
            return nothing(len(queries))
        scores, places = nearest_rows(queries, self.matrix[rows], k)
        return Found(scores, np.where(places < 0, -1, rows[places]))


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
        self._in_lists: dict[str, Numbers] = {}

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

    def in_lists(self, segment: Segment) -> Numbers:
        """How many are in each of the segment's inverted lists."""
        known = self._in_lists.get(segment.row.folder)
        if known is None:
            known = np.bincount(segment.lists[self.positions(segment)], minlength=segment.n_lists)
            self._in_lists[segment.row.folder] = known
        return known

    @property
    def nbytes(self) -> int:
        arrays: list[np.ndarray[Any, Any]] = [self.numbers]
        for kept in (self._positions, self._bits, self._in_lists):
            arrays += kept.values()  # in one go: another thread may be adding to it
        return sum(array.nbytes for array in arrays)


@dataclass(frozen=True)
class View:
    """One state of one collection. A place is a position in all its parts laid end to end, the tail last."""

    row: Row
    parts: tuple[LivePart, ...]
    starts: tuple[int, ...]  # the place at which each part begins, and in the end the tail
    tail: LiveTail
    edited: dict[int, bytes]  # payloads of items that changed since; shared with later views
    last: int  # the highest number seen
    point: Point

    def search(
        self, queries: Floats, k: int, params: SearchParams, allowed: Allowed | None = None, widen: float = 1.0
    ) -> Found:
        """The k nearest [q, k] of all, or of what a filter allows; `widen` multiplies efSearch and nprobe."""
        if allowed is not None:
            return self._search_among(queries, k, params, allowed, widen)
        if len(self.parts) == 1 and not len(self.tail.numbers):
            return _all_of(self.parts[0], queries, k, params, widen)
        found = [
            _moved(_all_of(part, queries, k, params, widen), start)
            for part, start in zip(self.parts, self.starts, strict=False)
        ]
        if len(self.tail.numbers):
            found.append(_moved(self.tail.search(queries, k), self.starts[-1]))
        return merged(found or [nothing(len(queries))], k)

    def payloads(self, places: Sequence[int]) -> Iterator[bytes]:
        """What an answer says of the item at each of these places: JSON [id, metadata, source]."""
        for place in places:
            part = bisect.bisect_right(self.starts, place) - 1
            position = place - self.starts[part]
            where: LiveTail | Segment = self.tail if part == len(self.parts) else self.parts[part].segment
            changed = self.edited.get(int(where.numbers[position])) if self.edited else None
            yield where.payloads[position] if changed is None else changed

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
        for part, start in zip(self.parts, self.starts, strict=False):
            positions = allowed.positions(part.segment)
            positions = positions[are_set(part.alive, positions)]
            count, total = len(positions), len(part.segment.numbers)
            if not count:
                continue
            if count <= max(EXACT_ROWS, EXACT_SHARE * total):
                found.append(_moved(part.segment.exact(queries, k, positions), start))
                continue
            some = _indexed_among(part, queries, k, params, allowed, total / count, widen)
            found.append(_moved(part.segment.exact(queries, k, positions) if some is None else some, start))
        if len(self.tail.numbers):
            found.append(_moved(self.tail.among(queries, k, allowed.numbers), self.starts[-1]))
        return merged(found or [nothing(len(queries))], k)


def _all_of(part: LivePart, queries: Floats, k: int, params: SearchParams, widen: float) -> Found:
    """The k nearest of a segment: by its index, or exactly where that leads to fewer than there are (many equal vectors
    are not all linked in a graph, nor in the lists that are looked at)."""
    found = part.segment.search(queries, k, part.alive, params, widen)
    there = min(k, len(part.segment.numbers) - len(part.dead))
    if there and min(found.places[:, there - 1].tolist()) < 0:
        return part.segment.search(queries, k, part.alive, replace(params, exact=True))
    return found


def _indexed_among(
    part: LivePart, queries: Floats, k: int, params: SearchParams, allowed: Allowed, rarity: float, widen: float
) -> Found | None:
    """The k nearest of a segment that a filter allows, by its index; None when the index does not lead to so many.
    `rarity` is how many items the segment has for each that is allowed."""
    segment = part.segment
    if segment.row.kind == "hnsw":
        found = _graph_among(part, queries, k, params, allowed.bits(segment), OVERSAMPLE * rarity * widen)
    else:
        bits = allowed.bits(segment)
        alive = bits if part.alive is None else bits & part.alive
        if segment.index is None:
            found = segment.search(queries, k, alive, params)
        else:
            effort = widen * (params.nprobe or segment.row.effort)
            found = _lists_among(segment, queries, k, alive, allowed.in_lists(segment), effort, rarity)
    return None if found is None or (found.places[:, -1] < 0).any() else found


def _graph_among(
    part: LivePart, queries: Floats, k: int, params: SearchParams, bits: Bits, times: float
) -> Found | None:
    """Searched without the filter, so many times deeper: with it, faiss goes through all of a graph whose allowed items
    lie far from the query."""
    depth = int(times * k)
    if depth > MAX_OVERSAMPLED:
        return None
    some = part.segment.search(queries, depth, part.alive, params)
    passing = are_set(bits, np.maximum(some.places, 0).ravel()).reshape(some.places.shape) & (some.places >= 0)
    return Found(*top_of(np.where(passing, some.scores, -np.inf), some.places, k))


def _lists_among(
    segment: Segment, queries: Floats, k: int, alive: Bits, in_lists: Numbers, effort: float, rarity: float
) -> Found:
    """So many lists are searched that they hold more allowed items than those of a search without a filter hold items:
    the nearest that are allowed lie further apart."""
    usual = effort * len(segment.numbers) / len(in_lists)
    nprobe = segment.lists_holding(queries, in_lists, int(DENSER * usual))
    if nprobe <= FAR * DENSER * effort * rarity:
        return segment.search(queries, k, alive, SearchParams(nprobe=nprobe))
    found = segment.search(queries, 2 * k, alive, SearchParams(nprobe=len(in_lists)))  # codes tell far ones apart less
    return Found(found.scores[:, :k], found.places[:, :k])


def _moved(found: Found, start: int) -> Found:
    """A part's positions as places of the view."""
    if not start:
        return found
    return Found(found.scores, np.where(found.places < 0, -1, found.places + start))


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
            with database.snapshot(db):
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
        known = {part.segment.row.folder: part for part in (old.parts if old else ())}
        every: Numbers | None = None
        removed = np.unique(removed)
        parts = []
        for wanted in database.segments(db, row.key):
            part = known.get(wanted.folder)
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
        return in_memory(replace(wanted, kind="flat"), chunks, row.spec.dimension, row.spec.dtype)


def _rows_gone(tail: LiveTail, sealed: int) -> npt.NDArray[np.bool_]:
    gone: npt.NDArray[np.bool_] = tail.numbers <= sealed
    gone[tail.dead] = True
    return gone
