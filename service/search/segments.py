"""Immutable files of vectors with a faiss index over them, mapped into memory.

A segment is a folder of `numbers.npy` (what each item is called in the database), `payloads.bin` with `payloads.npy`
(what an answer says of each, and where that begins), `vectors.faiss` (a flat index: float32 or float16) and, but for
the kind `flat`, `index.faiss` (an HNSW graph without its vectors, or inverted lists of codes). Files are mapped
(`IO_FLAG_MMAP_IFC`), so opening costs nothing but their checksums, and all processes of a host share one copy. Nothing
here is ever changed: what is deleted is a bit in a bitmap that comes with each search, since faiss aborts or answers
wrongly when an index changes under a search (faiss#1504).

`ivf_pq` and `rabitq` find candidates by their codes, whose scores are approximate; the candidates are then scored by
their vectors, so a score is the cosine whatever the kind.

Legend: n vectors in the segment, D dimension, q queries, k neighbours wanted.
"""

import io
import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt
import xxhash

from service.errors import StorageFailed
from service.search.database import Chunk, Numbers, SegmentRow
from service.search.store import Floats, SearchParams

Bits = npt.NDArray[np.uint8]  # a bit for each vector, lowest first
Positions = npt.NDArray[np.int64]

REFINE: Final = 8
"""Candidates by code for each neighbour wanted."""
_GATHER: Final = 2048  # 3 MB at a time stay in the cache
_CHUNK: Final = 2**20


class Found(NamedTuple):
    """Answers of one part of a collection, best first; missing ones have place -1 and score -inf."""

    scores: Floats  # [q, k]
    places: Positions  # [q, k], within the part


class Mapped:
    """Vectors [n, D] in memory, or mapped into it."""

    def __init__(self, matrix: npt.NDArray[Any]) -> None:
        self._type = matrix.dtype
        # As bytes: mapped floats lie at odd addresses, and numpy would copy all of them to take a few.
        self._rows = matrix.view(np.uint8).reshape(len(matrix), matrix.shape[1] * matrix.itemsize)

    def take(self, positions: Positions) -> Floats:
        rows = self._rows.take(positions, axis=0)
        return rows.view(self._type).astype(np.float32, copy=False)


class OnDisk:
    """Vectors [n, D] that are read from their file when they are wanted: mapped, every one would bring its neighbours
    into memory."""

    def __init__(self, path: Path, dimension: int, dtype: str, count: int) -> None:
        self._type = np.dtype("<f4" if dtype == "float32" else "<f2")
        self._dimension = dimension
        self._size = dimension * self._type.itemsize
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._start = path.stat().st_size - count * self._size  # faiss writes them last

    def take(self, positions: Positions) -> Floats:
        handle, size, start = self._file.fileno(), self._size, self._start
        if len(positions) > 1 and (np.diff(positions) == 1).all():
            data = os.pread(handle, size * len(positions), start + int(positions[0]) * size)
        else:
            data = b"".join([os.pread(handle, size, start + place * size) for place in positions.tolist()])
        return np.frombuffer(data, self._type).reshape(-1, self._dimension).astype(np.float32)


class Payloads(Sequence[bytes]):
    """What an answer says of each item of a segment, in a file: mapped, or read when it is wanted, as with `OnDisk`."""

    def __init__(self, data: bytes | mmap.mmap | io.FileIO, starts: npt.NDArray[np.int64]) -> None:
        self._data = data
        self._starts = memoryview(starts)  # type: ignore[arg-type]  # [n + 1]; gives integers faster than numpy does

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

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(place)
        start, end = self._starts[place], self._starts[place + 1]
        if isinstance(self._data, io.FileIO):
            return os.pread(self._data.fileno(), end - start, start)
        return self._data[start:end]


@dataclass(frozen=True)
class Segment:
    """One opened segment. Safe to search from several threads."""

    row: SegmentRow
    folder: Path
    numbers: Numbers  # [n], ascending
    flat: Any  # faiss.IndexFlatIP or IndexScalarQuantizer (float16)
    matrix: "Mapped | OnDisk"  # [n, D], the flat index's own vectors
    index: Any  # over the same positions; None for the kind flat
    payloads: "Payloads"
    whole: bool = True  # False: its files are damaged, and this was made of the database's rows

    def search(self, queries: Floats, k: int, alive: Bits | None, params: SearchParams, widen: float = 1.0) -> Found:
        """The k nearest of each query among those alive (None: all).

        `widen` multiplies efSearch or nprobe: a filter that few pass needs more candidates.
        """
        if self.index is None or params.exact:
            return self._scan(queries, k, alive)
        selector = None if alive is None else faiss.IDSelectorBitmap(alive)  # must outlive the search
        if self.row.kind != "hnsw":
            return self._by_code(queries, k, int((params.nprobe or self.row.effort) * widen), selector)
        wanted = max(k, int((params.ef_search or self.row.effort) * widen))
        return Found(*self.index.search(queries, k, params=_hnsw_params(wanted, selector)))

    @property
    def n_lists(self) -> int:
        """Of an index of inverted lists."""
        return int(faiss.extract_index_ivf(self.index).nlist)

    @cached_property
    def lists(self) -> npt.NDArray[np.int32]:
        """[n]: the inverted list that each vector is in."""
        inverted, lists = faiss.extract_index_ivf(self.index).invlists, np.empty(len(self.numbers), np.int32)
        for number in range(inverted.nlist):
            if size := inverted.list_size(number):  # of none, faiss makes an array of floats
                lists[faiss.rev_swig_ptr(inverted.get_ids(number), size)] = number
        return lists

    def lists_holding(self, queries: Floats, counts: Numbers, wanted: int) -> int:
        """How many of a query's nearest lists hold as many vectors, of which list i has counts[i]: of the queries the
        most."""
        quantizer = faiss.extract_index_ivf(self.index).quantizer
        if_even = int(wanted / max(1, counts.sum()) * len(counts))
        for depth in (min(2 * if_even + 1, len(counts)), len(counts)):
            held = counts[quantizer.search(queries, depth)[1]].cumsum(axis=1)
            if (held[:, -1] >= wanted).all():
                break
        return min(len(counts), int((held < wanted).sum(axis=1).max()) + 1)

    def exact(self, queries: Floats, k: int, positions: Positions) -> Found:
        """The k nearest of each query among some positions, by their vectors."""
        found = []
        for begin in range(0, len(positions), _GATHER):
            some = positions[begin : begin + _GATHER]
            scores, places = nearest_rows(queries, self.rows(some), k)
            found.append(Found(scores, np.where(places < 0, -1, some[places])))
        return merged(found or [nothing(len(queries))], k)

    def rows(self, positions: Positions) -> Floats:
        """Vectors [len(positions), D] float32."""
        return self.matrix.take(positions)

    def positions_of(self, numbers: Numbers) -> Positions:
        """Where those of the numbers (ascending) lie that this segment holds."""
        if not len(self.numbers):
            return np.empty(0, np.int64)
        inside = numbers[np.searchsorted(numbers, self.row.first) : np.searchsorted(numbers, self.row.last, "right")]
        places = np.searchsorted(self.numbers, inside)
        held: Positions = places[self.numbers[np.minimum(places, len(self.numbers) - 1)] == inside]
        return held

    def _scan(self, queries: Floats, k: int, alive: Bits | None) -> Found:
        """All vectors that are alive. Those on disk are read through, not mapped: they would fill the memory."""
        if isinstance(self.matrix, Mapped):
            selector = None if alive is None else faiss.IDSelectorBitmap(alive)
            return Found(*self.flat.search(queries, k, params=faiss.SearchParameters(sel=selector)))
        every = np.arange(len(self.numbers))
        return self.exact(queries, k, every if alive is None else every[are_set(alive, every)])

    def _by_code(self, queries: Floats, k: int, nprobe: int, selector: Any) -> Found:
        ivf = faiss.SearchParametersIVF(nprobe=min(nprobe, self.n_lists), sel=selector)
        if self.row.kind == "rabitq":
            wanted = min(2 * k, len(self.numbers))
            refine = faiss.IndexRefineSearchParameters(k_factor=REFINE, base_index_params=ivf)
            _, places = self.index.search(queries, wanted, params=refine)
        else:
            wanted = min(max(REFINE * k, 64), len(self.numbers))
            _, places = self.index.search(queries, wanted, params=ivf)
        vectors = self.rows(np.maximum(places, 0).ravel()).reshape(*places.shape, -1)  # [q, wanted, D]
        scores = np.einsum("qwd,qd->qw", vectors, queries)
        return Found(*top_of(np.where(places < 0, -np.inf, scores), places, k))


def nearest_rows(queries: Floats, rows: Floats, k: int) -> tuple[Floats, Positions]:
    """The k nearest rows [m, D] of each query: scores and row numbers [q, min(k, m)].

    By faiss, in this thread: numpy's product would wake a thread for every CPU, and wait for those that are busy.
    """
    scores, places = faiss.knn(queries, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
    return scores, places


@lru_cache(256)
def _all_alive(ef_search: int) -> Any:
    return faiss.SearchParametersHNSW(efSearch=ef_search)


def _hnsw_params(ef_search: int, selector: Any) -> Any:
    """Making one takes as long as a good part of a search, so the usual ones are kept."""
    if selector is None:
        return _all_alive(ef_search)
    return faiss.SearchParametersHNSW(efSearch=ef_search, sel=selector)


def nothing(queries: int) -> Found:
    """The answer of a part that holds nothing."""
    return Found(np.empty((queries, 0), np.float32), np.empty((queries, 0), np.int64))


def top_of(scores: Floats, labels: Numbers, k: int) -> tuple[Floats, Numbers]:
    """The k best of each row [q, m], best first; a missing one is (-inf, -1)."""
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
    """All alive but these; None when all are."""
    if not len(dead):
        return None
    flags = np.ones(count, bool)
    flags[dead] = False
    return np.packbits(flags, bitorder="little")


def bits_of(count: int, positions: Positions) -> Bits:
    """Only these alive."""
    flags = np.zeros(count, bool)
    flags[positions] = True
    return np.packbits(flags, bitorder="little")


def are_set(bits: Bits | None, positions: Positions) -> npt.NDArray[np.bool_]:
    """For each position whether its bit is set."""
    if bits is None:
        return np.ones(len(positions), bool)
    found: npt.NDArray[np.bool_] = (bits[positions >> 3] >> (positions & 7).astype(np.uint8)) & 1 == 1
    return found


# ---- opening


def new_flat(dimension: int, dtype: str) -> Any:
    if dtype == "float32":
        return faiss.IndexFlatIP(dimension)
    return faiss.IndexScalarQuantizer(dimension, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)


def matrix_of(flat: Any, dtype: str) -> npt.NDArray[Any]:
    """The vectors [n, D] within a flat index, without a copy; valid as long as the index is."""
    size = np.dtype("<f4" if dtype == "float32" else "<f2")
    data = faiss.rev_swig_ptr(flat.codes.data(), flat.ntotal * flat.d * size.itemsize)
    matrix: npt.NDArray[Any] = data.view(size).reshape(flat.ntotal, flat.d)
    return matrix


def with_storage(graph: Any, storage: Any) -> Any:
    """An HNSW graph over these vectors; Python keeps them as long as the graph."""
    graph.storage = storage
    graph.own_fields = False
    graph.referenced_objects = [storage]  # as faiss itself does
    return graph


def checksum(path: Path) -> str:
    """xxh3 of a file, at the speed of memory: every opening checks every byte."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(_CHUNK)
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


def open_segment(root: Path, row: SegmentRow, dtype: str) -> Segment:
    """Check a segment's files and map them.

    Raises:
        StorageFailed: a file is missing, or is not what was written.
    """
    folder = root / row.folder
    for name, (size, digest) in row.files.items():
        try:
            whole = (folder / name).stat().st_size == size and checksum(folder / name) == digest
        except OSError as error:
            raise StorageFailed(f"segment {row.folder}: {name}: {error.strerror}") from error
        if not whole:
            raise StorageFailed(f"segment {row.folder}: {name} is damaged")
    # As a plain array: a memmap is slow to index.
    numbers = np.asarray(np.load(folder / "numbers.npy", mmap_mode="r", allow_pickle=False))
    flat = faiss.read_index(str(folder / "vectors.faiss"), faiss.IO_FLAG_MMAP_IFC)
    index = None
    if row.kind != "flat":
        index = faiss.read_index(str(folder / "index.faiss"), faiss.IO_FLAG_MMAP_IFC)
        if row.kind == "hnsw":
            index = with_storage(index, flat)
    on_disk = row.kind == "rabitq"
    matrix: Mapped | OnDisk = Mapped(matrix_of(flat, dtype))
    if on_disk:
        matrix = OnDisk(folder / "vectors.faiss", flat.d, dtype, len(numbers))
    return Segment(row, folder, numbers, flat, matrix, index, Payloads.opened(folder, on_disk=on_disk))


def in_memory(row: SegmentRow, chunks: Sequence[Chunk], dimension: int, dtype: str) -> Segment:
    """What takes the place of a damaged segment: the same vectors, from the database, searched exactly."""
    flat = new_flat(dimension, dtype)
    for chunk in chunks:
        flat.add(chunk.vectors)
    numbers = np.concatenate([np.empty(0, np.int64), *(chunk.numbers for chunk in chunks)])
    payloads = Payloads.of([one for chunk in chunks for one in chunk.payloads])
    return Segment(row, Path(), numbers, flat, Mapped(matrix_of(flat, dtype)), None, payloads, whole=False)


def merged(parts: Sequence[Found], k: int) -> Found:
    """The k best of several parts' answers."""
    if len(parts) == 1 and parts[0].scores.shape[1] == k:
        return parts[0]
    scores = np.concatenate([part.scores for part in parts], axis=1)
    return Found(*top_of(scores, np.concatenate([part.places for part in parts], axis=1), k))
