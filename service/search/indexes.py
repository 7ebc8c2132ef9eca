"""faiss indexes over the vectors of a segment. There is one class for each index structure in
`service/search/kinds.py`.

Each class contains everything that is specific to its structure: how an index is built, written, opened, and searched
with and without a filter.

Legend: n vectors in the segment, D dimension, q queries, k neighbours requested. A position is the row of a vector in
its segment. A bitmap (`Bits`) has one bit for each position.
"""

import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import faiss
import numpy as np
import numpy.typing as npt

from service.search.database import Numbers
from service.search.kinds import IndexKind, StructureName
from service.search.segments import (
    Allowed,
    Bits,
    LivePart,
    Neighbours,
    Segment,
    are_set,
    new_flat,
    top_of,
)
from service.search.store import CollectionSpec, Floats, SearchParams

HNSW_M: Final = 32
HNSW_EF_CONSTRUCTION: Final = 100
OVERSAMPLE: Final = 3
MAX_OVERSAMPLED: Final = 4096
"""A filtered search of a graph fetches more than k vectors and drops those that do not pass the filter. It fetches
OVERSAMPLE times as many vectors as are needed on average to find k that pass. If this number is more than
MAX_OVERSAMPLED, the graph is not used."""
DENSER: Final = 1.5
"""The number of vectors that a filtered search of inverted lists compares, divided by the number that a search without
a filter compares."""
FAR: Final = 2
"""If the items that pass a filter were evenly spread over the lists, a filtered search would need a certain number of
lists. If it needs more than FAR times this number, these items are far from the query. The nearest of them may be in
any list, so all lists are searched."""
ADD: Final = 4096
"""The number of vectors that are added to an index in one step. Before each step, the build checks whether the store is
closing."""
INDEX_FILE: Final = "index.faiss"
FEW_QUERIES: Final = 16
FEW_RESULTS: Final = 256
FEW_SHAPES: Final = 32
"""For searches of graphs with at most this many queries, this many results for each, and this many combinations of
both, a thread keeps the arrays."""

Check = Callable[[], None]


class Effort(NamedTuple):
    """The effort that a search spends on an index. `params` may set efSearch (for graphs) and nprobe (for inverted
    lists). If a parameter is None, the search uses the value that tuning chose."""

    params: SearchParams
    widen: float = 1.0  # multiplies efSearch and nprobe


class Structure(Protocol):
    """A way to index the vectors of a segment."""

    can_grow: bool
    """Whether vectors can be added to an existing index. If this is false, the index must be rebuilt to add vectors."""
    write_flags: int
    """The flags with which `faiss.write_index` writes the index."""

    def begin(self, spec: CollectionSpec, base: Segment | None) -> tuple[Any, Any]:
        """Return two indexes: the index to which the caller adds the vectors, and the flat index that stores them. If
        the first one is None, the caller adds the vectors to the flat index.

        If the segment `base` is given, both indexes already contain its vectors: the first one is a copy of the
        segment's index. `base` may be given only if `can_grow` is true.
        """

    def finish(self, kind: IndexKind, spec: CollectionSpec, index: Any, matrix: npt.NDArray[Any], check: Check) -> Any:
        """Return the finished index, or None if the structure has no index. Before this call, the caller has added all
        vectors to one of the indexes that `begin` returned. `index` is the first of these indexes, and `matrix` [n, D]
        contains all vectors."""

    def open(self, folder: Path, flat: Any) -> Any:
        """Memory-map the index file in a segment's folder. Return the index, or None if the structure has no index.
        `flat` is the segment's open flat index, from which a graph takes its vectors."""

    def search(self, segment: Segment, queries: Floats, k: int, alive: Bits | None, effort: Effort) -> Neighbours:
        """Return the k nearest vectors of each query [q, D], using the index.

        If the bitmap `alive` is given, only vectors whose bits are set in it are returned.
        """

    def search_allowed(
        self, part: LivePart, queries: Floats, k: int, allowed: Allowed, effort: Effort, rarity: float
    ) -> Neighbours | None:
        """Return the k nearest vectors of each query [q, D] among those that are in `allowed` and not deleted.

        If the index does not find k such vectors, the result is None or contains entries with position -1. `rarity` is
        the number of items in the segment divided by the number of allowed items.
        """


class Scan:
    """The structure without an index. A search compares the query with every vector."""

    can_grow = False
    write_flags = 0

    def begin(self, spec: CollectionSpec, base: Segment | None) -> tuple[Any, Any]:
        assert base is None
        return None, new_flat(spec.dimension, spec.dtype)

    def finish(self, kind: IndexKind, spec: CollectionSpec, index: Any, matrix: npt.NDArray[Any], check: Check) -> Any:
        return None

    def open(self, folder: Path, flat: Any) -> Any:
        return None

    def search(self, segment: Segment, queries: Floats, k: int, alive: Bits | None, effort: Effort) -> Neighbours:
        return segment.scan(queries, k, alive)

    def search_allowed(
        self, part: LivePart, queries: Floats, k: int, allowed: Allowed, effort: Effort, rarity: float
    ) -> Neighbours | None:
        return part.segment.scan(queries, k, _alive_and_allowed(part, allowed))


class Graph:
    """An HNSW graph (Malkov and Yashunin 2016). Its file does not contain the vectors. Vectors can be added to an
    existing graph."""

    can_grow = True
    write_flags = int(faiss.IO_FLAG_SKIP_STORAGE)

    def begin(self, spec: CollectionSpec, base: Segment | None) -> tuple[Any, Any]:
        index = _new_graph(spec) if base is None else _copied_graph(base, spec)
        return index, faiss.downcast_index(index.storage)

    def finish(self, kind: IndexKind, spec: CollectionSpec, index: Any, matrix: npt.NDArray[Any], check: Check) -> Any:
        return index

    def open(self, folder: Path, flat: Any) -> Any:
        return _with_storage(_mapped(folder), flat)

    def search(self, segment: Segment, queries: Floats, k: int, alive: Bits | None, effort: Effort) -> Neighbours:
        selector = None if alive is None else faiss.IDSelectorBitmap(alive)  # must outlive the search
        ef_search = max(k, int((effort.params.ef_search or segment.row.effort) * effort.widen))
        return _found(segment, queries, k, _hnsw_params(ef_search, selector))

    def search_allowed(
        self, part: LivePart, queries: Floats, k: int, allowed: Allowed, effort: Effort, rarity: float
    ) -> Neighbours | None:
        """Search for more than k vectors without the filter, and return the k nearest of those that pass it. Return
        None if too many vectors would have to be fetched.

        faiss does not apply the filter, because it would traverse the whole graph if the allowed items were far from
        the query.
        """
        depth = int(OVERSAMPLE * rarity * effort.widen * k)
        if depth > MAX_OVERSAMPLED:
            return None
        nearest = search(part.segment, queries, depth, part.alive, Effort(effort.params))
        positions = nearest.positions
        passes = are_set(allowed.bits(part.segment), np.maximum(positions, 0).ravel()).reshape(positions.shape)
        passes &= positions >= 0
        return Neighbours(*top_of(np.where(passes, nearest.scores, -np.inf), positions, k))


class InvertedLists:
    """An index of inverted lists. k-means divides the vectors into cells, and each cell has a list with a short code
    for each of its vectors. Cells and codes are trained on the vectors, so the index is rebuilt if vectors are
    added."""

    can_grow = False
    write_flags = 0

    def begin(self, spec: CollectionSpec, base: Segment | None) -> tuple[Any, Any]:
        assert base is None
        return None, new_flat(spec.dimension, spec.dtype)

    def finish(self, kind: IndexKind, spec: CollectionSpec, index: Any, matrix: npt.NDArray[Any], check: Check) -> Any:
        assert kind.codes is not None
        n, dimension = matrix.shape
        lists = spec.index.n_lists or int(np.clip(2 ** round(np.log2(4 * np.sqrt(n))), 16, 65_536))
        lists = min(lists, max(1, n // 39))  # k-means warns if a list has fewer than 39 points
        code = kind.codes.factory.format(subvectors=dimension // 2 if dimension % 2 == 0 else dimension)
        index = faiss.index_factory(dimension, f"IVF{lists},{code}", faiss.METRIC_INNER_PRODUCT)
        sample = np.sort(np.random.default_rng(0).permutation(n)[: max(64 * lists, 65_536)])
        index.train(np.ascontiguousarray(matrix[sample], np.float32))
        add_in_steps(index, matrix, check)
        return index

    def open(self, folder: Path, flat: Any) -> Any:
        return _mapped(folder)

    def search(self, segment: Segment, queries: Floats, k: int, alive: Bits | None, effort: Effort) -> Neighbours:
        nprobe = int((effort.params.nprobe or segment.row.effort) * effort.widen)
        return search_lists(segment, queries, k, alive, nprobe)

    def search_allowed(
        self, part: LivePart, queries: Floats, k: int, allowed: Allowed, effort: Effort, rarity: float
    ) -> Neighbours | None:
        """Return the k nearest allowed vectors of each query [q, D]. More lists are searched than without a filter,
        because the nearest allowed items are spread over more lists.

        The number of lists is chosen so that at least `DENSER` times as many items are compared as in a search without
        a filter. If the allowed items are few or far from the query, all lists are searched. If `effort` requests an
        exact search, all allowed items are compared.
        """
        segment, alive = part.segment, _alive_and_allowed(part, allowed)
        if effort.params.exact:
            return segment.scan(queries, k, alive)
        in_lists = allowed.in_lists(segment)
        nprobe = effort.widen * (effort.params.nprobe or segment.row.effort)
        usual = nprobe * len(segment.numbers) / len(in_lists)
        enough = lists_holding(segment, queries, in_lists, int(DENSER * usual))
        if enough <= FAR * DENSER * nprobe * rarity:
            return search_lists(segment, queries, k, alive, enough)
        # Fetch twice as many, because codes distinguish distant vectors less well.
        nearest = search_lists(segment, queries, 2 * k, alive, len(in_lists))
        return Neighbours(nearest.scores[:, :k], nearest.positions[:, :k])


STRUCTURES: Final[dict[StructureName, Structure]] = {"scan": Scan(), "graph": Graph(), "lists": InvertedLists()}


def structure_of(kind: IndexKind) -> Structure:
    return STRUCTURES[kind.structure]


def search(segment: Segment, queries: Floats, k: int, alive: Bits | None, effort: Effort) -> Neighbours:
    """Return the k nearest vectors of each query [q, D] in a segment.

    If the bitmap `alive` is given, only vectors whose bits are set in it are returned. The segment's index is used,
    unless the segment has no index or `effort` requests an exact search.
    """
    if segment.index is None or effort.params.exact:
        return segment.scan(queries, k, alive)
    return STRUCTURES[segment.kind.structure].search(segment, queries, k, alive, effort)


def add_in_steps(index: Any, vectors: npt.NDArray[Any], check: Check) -> None:
    """Add vectors [n, D] to an index in steps of `ADD` vectors. Call `check` before each step."""
    for begin in range(0, len(vectors), ADD):
        check()
        index.add(np.ascontiguousarray(vectors[begin : begin + ADD], np.float32))


def _alive_and_allowed(part: LivePart, allowed: Allowed) -> Bits:
    bits = allowed.bits(part.segment)
    return bits if part.alive is None else bits & part.alive


def _mapped(folder: Path) -> Any:
    return faiss.read_index(str(folder / INDEX_FILE), faiss.IO_FLAG_MMAP_IFC)


# ---- graphs


def _new_graph(spec: CollectionSpec) -> Any:
    m = spec.index.m or HNSW_M
    if spec.dtype == "float32":
        index = faiss.IndexHNSWFlat(spec.dimension, m, faiss.METRIC_INNER_PRODUCT)
    else:
        half = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexHNSWSQ(spec.dimension, half, m, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = spec.index.ef_construction or HNSW_EF_CONSTRUCTION
    return index


def _copied_graph(base: Segment, spec: CollectionSpec) -> Any:
    """Return a copy of the graph of the segment `base`. The copy and its vectors are in memory, so vectors can be
    added."""
    graph = faiss.read_index(str(base.folder / INDEX_FILE))
    storage = new_flat(spec.dimension, spec.dtype)
    for begin in range(0, len(base.numbers), ADD):
        positions = np.arange(begin, min(begin + ADD, len(base.numbers)))
        storage.add(np.ascontiguousarray(base.matrix.take(positions), np.float32))
    return _with_storage(graph, storage)


def _with_storage(graph: Any, storage: Any) -> Any:
    """Attach the flat index `storage` to an HNSW graph and return the graph. The graph keeps a reference to
    `storage`."""
    graph.storage = storage
    graph.own_fields = False
    graph.referenced_objects = [storage]  # as faiss itself does
    return graph


@lru_cache(256)
def _all_alive(ef_search: int) -> Any:
    return faiss.SearchParametersHNSW(efSearch=ef_search)


def _hnsw_params(ef_search: int, selector: Any) -> Any:
    """Return faiss's parameters for a search of a graph. Parameters without a selector are cached, because creating
    them would slow down each search."""
    if selector is None:
        return _all_alive(ef_search)
    return faiss.SearchParametersHNSW(efSearch=ef_search, sel=selector)


class _Arrays:
    """Arrays for the queries and the results of calls of faiss that have the same shape, and faiss's pointers to these
    arrays."""

    def __init__(self, count: int, dimension: int, k: int) -> None:
        self.queries = np.empty((count, dimension), np.float32)
        self.scores, self.positions = np.empty((count, k), np.float32), np.empty((count, k), np.int64)
        self.pointers = [faiss.swig_ptr(array) for array in (self.queries, self.scores, self.positions)]


class _Kept(threading.local):
    """The arrays that a thread keeps between its searches, by their shape: number of queries, dimension and k."""

    def __init__(self) -> None:
        self.arrays: dict[tuple[int, int, int], _Arrays] = {}


_kept = _Kept()


def _found(segment: Segment, queries: Floats, k: int, params: Any) -> Neighbours:
    """Return what the method `search` of a segment's index returns. Small searches use arrays that the thread keeps.

    That method makes a pointer to each of its three arrays and reads the dimension of the index. These are four calls
    of faiss, and each of them releases the interpreter lock, so that another thread may take it before the search.
    """
    index = segment.index
    count, dimension = queries.shape
    if count > FEW_QUERIES or k > FEW_RESULTS or dimension != segment.dimension:
        return Neighbours(*index.search(queries, k, params=params))
    kept, shape = _kept.arrays, (count, dimension, k)
    arrays = kept.get(shape)
    if arrays is None:
        if len(kept) >= FEW_SHAPES:
            kept.clear()
        arrays = kept[shape] = _Arrays(*shape)
    np.copyto(arrays.queries, queries)
    vectors, scores, positions = arrays.pointers
    index.search_c(count, vectors, k, scores, positions, params)
    return Neighbours(arrays.scores.copy(), arrays.positions.copy())


# ---- inverted lists


def search_lists(segment: Segment, queries: Floats, k: int, alive: Bits | None, nprobe: int) -> Neighbours:
    """Return the k nearest vectors of each query [q, D], from the `nprobe` nearest inverted lists. Candidates are found
    with the approximate codes and then scored with their vectors, so every score is the exact cosine."""
    codes = segment.kind.codes
    assert codes is not None
    selector = None if alive is None else faiss.IDSelectorBitmap(alive)  # must outlive the search
    params = faiss.SearchParametersIVF(nprobe=min(nprobe, segment.n_lists), sel=selector)
    if codes.refine_factor is not None:
        params = faiss.IndexRefineSearchParameters(k_factor=codes.refine_factor, base_index_params=params)
    wanted = min(max(codes.candidates * k, codes.min_candidates), len(segment.numbers))
    _, positions = segment.index.search(queries, wanted, params=params)
    vectors = segment.rows(np.maximum(positions, 0).ravel()).reshape(*positions.shape, -1)  # [q, wanted, D]
    scores = np.einsum("qwd,qd->qw", vectors, queries)
    return Neighbours(*top_of(np.where(positions < 0, -np.inf, scores), positions, k))


def lists_holding(segment: Segment, queries: Floats, counts: Numbers, wanted: int) -> int:
    """Return how many inverted lists must be searched to compare each query [q, D] with at least `wanted` vectors. The
    same number is used for all queries, and the nearest lists are searched first.

    `counts[i]` is the number of vectors in list i that the search compares.
    """
    quantizer = faiss.extract_index_ivf(segment.index).quantizer
    if_even = int(wanted / max(1, counts.sum()) * len(counts))
    for depth in (min(2 * if_even + 1, len(counts)), len(counts)):
        held = counts[quantizer.search(queries, depth)[1]].cumsum(axis=1)
        if (held[:, -1] >= wanted).all():
            break
    return min(len(counts), int((held < wanted).sum(axis=1).max()) + 1)
