"""Segments: immutable files of vectors with a faiss index, mapped into memory.

A segment is a folder with these files:

    numbers.npy    the database number of each item
    payloads.bin   the JSON text [id, metadata, source] of each item, from which a search makes a hit
    payloads.npy   the offsets of these texts in payloads.bin
    vectors.faiss  a flat index that contains the vectors in float32 or float16
    index.faiss    an HNSW graph without the vectors, or inverted lists of codes; absent if the kind is `flat`

Segments never change, because faiss aborts or gives wrong answers if an index changes during a search (faiss#1504). The
positions of deleted items are kept outside the segment, and a search receives a bitmap of all other positions.

This module reads the vectors and searches exactly. `service/search/indexes.py` searches with an index, and
`service/search/segment_files.py` opens the files.

Legend: n vectors in the segment, D dimension, q queries, k neighbours requested. A position is the row of a vector in
its segment.
"""

import io
import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt

from service.search.database import Numbers, SegmentRow
from service.search.kinds import IndexKind, kind_named
from service.search.store import Floats

Bits = npt.NDArray[np.uint8]  # one bit per vector, lowest bit first
Positions = npt.NDArray[np.int64]

_GATHER: Final = 2048  # rows at a time; 3 MB of float32 at 384 dimensions fit in the cache


class Neighbours(NamedTuple):
    """The nearest vectors of each query, best first. If fewer than k vectors were found, the remaining entries have
    position -1 and score -inf."""

    scores: Floats  # [q, k]
    positions: Positions  # [q, k], within the part that was searched, or over all parts of a view


class Mapped:
    """Vectors [n, D] in memory or in a memory-mapped file."""

    def __init__(self, matrix: npt.NDArray[Any]) -> None:
        self._type = matrix.dtype
        # View the rows as bytes. Mapped floats may be unaligned, and numpy would copy all of them to take a few.
        self._rows = matrix.view(np.uint8).reshape(len(matrix), matrix.shape[1] * matrix.itemsize)

    def take(self, positions: Positions) -> Floats:
        rows = self._rows.take(positions, axis=0)
        return rows.view(self._type).astype(np.float32, copy=False)


class OnDisk:
    """Vectors [n, D] that are read from their file on demand. If the file were mapped, each access would also load
    neighbouring vectors."""

    def __init__(self, path: Path, dimension: int, dtype: str, count: int) -> None:
        self._type = np.dtype("<f4" if dtype == "float32" else "<f2")
        self._dimension = dimension
        self._size = dimension * self._type.itemsize
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._start = path.stat().st_size - count * self._size  # faiss writes the vectors last

    def take(self, positions: Positions) -> Floats:
        handle, size, start = self._file.fileno(), self._size, self._start
        if len(positions) > 1 and (np.diff(positions) == 1).all():
            data = os.pread(handle, size * len(positions), start + int(positions[0]) * size)
        else:
            data = b"".join([os.pread(handle, size, start + position * size) for position in positions.tolist()])
        return np.frombuffer(data, self._type).reshape(-1, self._dimension).astype(np.float32)


class Payloads(Sequence[bytes]):
    """The payloads of a segment: for each item, the JSON text [id, metadata, source]. They are in memory, in a mapped
    file, or in a file that is read on demand."""

    def __init__(self, data: bytes | mmap.mmap | io.FileIO, starts: npt.NDArray[np.int64]) -> None:
        self._data = data
        self._starts = memoryview(starts)  # type: ignore[arg-type]  # [n + 1]; indexing is faster than with numpy

    @staticmethod
    def of(payloads: Sequence[bytes]) -> "Payloads":
        return Payloads(b"".join(payloads), np.cumsum([0, *map(len, payloads)]))

    @staticmethod
    def opened(folder: Path, *, on_disk: bool) -> "Payloads":
        starts = np.asarray(np.load(folder / "payloads.npy", mmap_mode="r", allow_pickle=False))
        file = (folder / "payloads.bin").open("rb", buffering=0)
        if on_disk:
            payloads = Payloads(file, starts)
            weakref.finalize(payloads, file.close)
            return payloads
        with file:
            return Payloads(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), starts)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def at(self, positions: Sequence[int]) -> list[bytes]:
        """Return the payloads at these positions, which must be in the segment."""
        data, starts = self._data, self._starts
        if isinstance(data, io.FileIO):
            return [self[position] for position in positions]
        return [data[starts[position] : starts[position + 1]] for position in positions]

    def __getitem__(self, position: Any) -> Any:
        if not 0 <= position < len(self):
            raise IndexError(position)
        start, end = self._starts[position], self._starts[position + 1]
        if isinstance(self._data, io.FileIO):
            return os.pread(self._data.fileno(), end - start, start)
        return self._data[start:end]


@dataclass(frozen=True)
class Segment:
    """An open segment. Several threads may search it at the same time."""

    row: SegmentRow
    folder: Path
    numbers: Numbers  # [n], ascending
    flat: Any  # faiss.IndexFlatIP or IndexScalarQuantizer (float16)
    matrix: Mapped | OnDisk  # [n, D], the vectors of the flat index
    index: Any  # faiss index with the same positions; None for the kind flat
    payloads: Payloads
    whole: bool = True  # false if the files are damaged and this segment was built from the database

    @cached_property
    def kind(self) -> IndexKind:
        """The index kind of this segment. Raises ValueError if this version does not know the kind."""
        return kind_named(self.row.kind)

    @cached_property
    def dimension(self) -> int:
        return int(self.flat.d)

    @property
    def n_lists(self) -> int:
        """The number of inverted lists in the index."""
        return int(faiss.extract_index_ivf(self.index).nlist)

    @cached_property
    def lists(self) -> npt.NDArray[np.int32]:
        """An array [n] that contains, for each vector, the number of the inverted list that stores the vector."""
        inverted, lists = faiss.extract_index_ivf(self.index).invlists, np.empty(len(self.numbers), np.int32)
        for number in range(inverted.nlist):
            if size := inverted.list_size(number):  # faiss returns an array of floats for an empty list
                lists[faiss.rev_swig_ptr(inverted.get_ids(number), size)] = number
        return lists

    def exact(self, queries: Floats, k: int, positions: Positions) -> Neighbours:
        """Return the k nearest vectors of each query [q, D] among the vectors at `positions`. Each query is compared
        with all of these vectors."""
        nearest = []
        for begin in range(0, len(positions), _GATHER):
            gathered = positions[begin : begin + _GATHER]
            scores, rows = nearest_rows(queries, self.rows(gathered), k)
            nearest.append(Neighbours(scores, np.where(rows < 0, -1, gathered[rows])))
        return merged(nearest or [nothing(len(queries))], k)

    def rows(self, positions: Positions) -> Floats:
        """Return the vectors at these positions, as a float32 array [len(positions), D]."""
        return self.matrix.take(positions)

    def positions_of(self, numbers: Numbers) -> Positions:
        """Return the positions of the items with these numbers. `numbers` must be in ascending order. Numbers that are
        not in this segment are ignored."""
        if not len(self.numbers):
            return np.empty(0, np.int64)
        inside = numbers[np.searchsorted(numbers, self.row.first) : np.searchsorted(numbers, self.row.last, "right")]
        positions = np.searchsorted(self.numbers, inside)
        held: Positions = positions[self.numbers[np.minimum(positions, len(self.numbers) - 1)] == inside]
        return held

    def scan(self, queries: Floats, k: int, alive: Bits | None) -> Neighbours:
        """Return the k nearest vectors of each query [q, D] by comparing the query with all vectors. If the bitmap
        `alive` is given, only vectors whose bits are set in it are compared.

        If the vectors are stored on disk and not mapped, they are read in batches.
        """
        if isinstance(self.matrix, Mapped):
            selector = None if alive is None else faiss.IDSelectorBitmap(alive)
            return Neighbours(*self.flat.search(queries, k, params=faiss.SearchParameters(sel=selector)))
        every = np.arange(len(self.numbers))
        return self.exact(queries, k, every if alive is None else every[are_set(alive, every)])


class LivePart(NamedTuple):
    """A segment and the positions of its deleted vectors."""

    segment: Segment
    dead: Positions
    alive: Bits | None  # bitmap of the vectors that are not deleted; None if no vector is deleted


class Allowed:
    """The items that pass a filter, as item numbers in ascending order. The positions of the items in a segment are
    computed when they are first needed, and then cached."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers
        self._positions: dict[str, Positions] = {}
        self._bits: dict[str, Bits] = {}
        self._in_lists: dict[str, Numbers] = {}

    def positions(self, segment: Segment) -> Positions:
        positions = self._positions.get(segment.row.folder)
        if positions is None:
            positions = self._positions[segment.row.folder] = segment.positions_of(self.numbers)
        return positions

    def bits(self, segment: Segment) -> Bits:
        bits = self._bits.get(segment.row.folder)
        if bits is None:
            bits = self._bits[segment.row.folder] = bits_of(len(segment.numbers), self.positions(segment))
        return bits

    def in_lists(self, segment: Segment) -> Numbers:
        """Return the number of allowed items in each inverted list of a segment, as an array [number of lists]."""
        counts = self._in_lists.get(segment.row.folder)
        if counts is None:
            counts = np.bincount(segment.lists[self.positions(segment)], minlength=segment.n_lists)
            self._in_lists[segment.row.folder] = counts
        return counts

    @property
    def nbytes(self) -> int:
        arrays: list[np.ndarray[Any, Any]] = [self.numbers]
        for kept in (self._positions, self._bits, self._in_lists):
            arrays += kept.values()  # in one step, because another thread may be adding entries
        return sum(array.nbytes for array in arrays)


def nearest_rows(queries: Floats, rows: Floats, k: int) -> tuple[Floats, Positions]:
    """Return the k nearest of the rows [m, D] for each query [q, D]: their scores and their row numbers, both of shape
    [q, min(k, m)].

    The search uses faiss, which runs in the calling thread. numpy's matrix product would use a thread on every CPU, and
    would wait until busy CPUs have run their threads.
    """
    scores, row_numbers = faiss.knn(queries, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
    return scores, row_numbers


def nothing(queries: int) -> Neighbours:
    """Return an empty result for a number of queries: scores and positions, both of shape [queries, 0]."""
    return Neighbours(np.empty((queries, 0), np.float32), np.empty((queries, 0), np.int64))


def top_of(scores: Floats, labels: Numbers, k: int) -> tuple[Floats, Numbers]:
    """Return the k highest scores of each row of `scores` [q, m], best first, and the labels of these scores. Both
    results have the shape [q, k]. If m < k, the remaining entries have score -inf and label -1."""
    if scores.shape[1] > k:
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        scores, labels = np.take_along_axis(scores, best, 1), np.take_along_axis(labels, best, 1)
    order = np.argsort(-scores, axis=1, kind="stable")
    scores, labels = np.take_along_axis(scores, order, 1), np.take_along_axis(labels, order, 1)
    lacking = k - scores.shape[1]
    if lacking > 0:
        scores = np.pad(scores, ((0, 0), (0, lacking)), constant_values=-np.inf)
        labels = np.pad(labels, ((0, 0), (0, lacking)), constant_values=-1)
    return scores.astype(np.float32, copy=False), np.where(np.isneginf(scores), -1, labels)


def bits_without(count: int, dead: Positions) -> Bits | None:
    """Return a bitmap for `count` positions in which all bits are set except those at the positions `dead`. Return None
    if `dead` is empty."""
    if not len(dead):
        return None
    flags = np.ones(count, bool)
    flags[dead] = False
    return np.packbits(flags, bitorder="little")


def bits_of(count: int, positions: Positions) -> Bits:
    """Return a bitmap for `count` positions in which only the bits at `positions` are set."""
    flags = np.zeros(count, bool)
    flags[positions] = True
    return np.packbits(flags, bitorder="little")


def are_set(bits: Bits | None, positions: Positions) -> npt.NDArray[np.bool_]:
    """Return an array of bools that shows for each position whether its bit is set. If `bits` is None, all bits count
    as set."""
    if bits is None:
        return np.ones(len(positions), bool)
    flags: npt.NDArray[np.bool_] = (bits[positions >> 3] >> (positions & 7).astype(np.uint8)) & 1 == 1
    return flags


def new_flat(dimension: int, dtype: str) -> Any:
    if dtype == "float32":
        return faiss.IndexFlatIP(dimension)
    return faiss.IndexScalarQuantizer(dimension, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)


def matrix_of(flat: Any, dtype: str) -> npt.NDArray[Any]:
    """Return the vectors [n, D] of a flat index without copying them. The array is valid only while the index
    exists."""
    size = np.dtype("<f4" if dtype == "float32" else "<f2")
    data = faiss.rev_swig_ptr(flat.codes.data(), flat.ntotal * flat.d * size.itemsize)
    matrix: npt.NDArray[Any] = data.view(size).reshape(flat.ntotal, flat.d)
    return matrix


def merged(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """Merge the neighbours that were found in several parts of a collection. Return the k best neighbours of each
    query."""
    if len(parts) == 1 and parts[0].scores.shape[1] == k:
        return parts[0]
    scores = np.concatenate([part.scores for part in parts], axis=1)
    return Neighbours(*top_of(scores, np.concatenate([part.positions for part in parts], axis=1), k))
