"""Find the neighbours of vectors whose cosine similarity is above a threshold, also among a million vectors.

If there are few vectors, all pairs are compared. If there are many, k-means divides them into lists, and a query is
compared only with the vectors of its `PROBES` nearest lists. This can miss a neighbour. How many it misses is in
docs/decisions/0059-scale-of-curation.md. Products in float32 find the pairs. The score of each pair is then computed
in float64, so it does not depend on the blocks. Equal input gives equal output for any number of threads.

Legend: m queries, n vectors, D dimensions, p pairs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from training.curate.blocks import in_order, one_blas_thread
from training.curate.kmeans import Floats, assign, cluster, groups
from training.curate.table import Indices

EXACT_PAIRS = 2_500_000_000  # up to this number of pairs, all are compared: 10 s on two cores at D = 384
LISTS = 4  # there are LISTS * sqrt(n) lists
PER_LIST = 64  # vectors per list from which the lists are computed
PROBES = 32
QUERIES = 65_536  # queries whose pairs are in memory at once
ROWS, COLUMNS = 1024, 4096  # a tile of products takes 16 MB
MARGIN = 1e-5  # more than the error of a product in float32
SCORED = 8192  # pairs whose score is computed at once


class Pairs(NamedTuple):
    """Pairs of a query and a vector. All arrays are [p].

    `query` and `vector` are numbers of rows, and `score` is the cosine similarity.
    """

    query: Indices
    vector: Indices
    score: Floats

    def take(self, selected: Indices | npt.NDArray[np.bool_]) -> "Pairs":
        """Return the pairs at these positions, or where the mask is true."""
        return Pairs(self.query[selected], self.vector[selected], self.score[selected])


def neighbours_above(
    queries: Floats,
    vectors: Floats,
    threshold: float,
    k: int,
    *,
    leave_one_out: bool = False,
    exact: bool | None = None,
    threads: int | None = None,
) -> Pairs:
    """Find, for each query, the k most similar vectors whose similarity is at least `threshold`.

    The pairs are sorted by query, then by descending score, then by vector. A query with k pairs may have more
    neighbours. If scores differ by less than 1e-5, any of these vectors can be among the k. The result takes 20 bytes
    per pair, and twice as much while it is put together. The work takes about 0.5 GB.

    Args:
        queries: vectors of length 1, [m, D].
        vectors: vectors of length 1, [n, D].
        threshold: the lowest cosine similarity of a neighbour, from -1 to 1.
        k: the largest number of neighbours of a query.
        leave_one_out: True if the queries are the vectors. A vector is then not its own neighbour.
        exact: compare all pairs. By default, all are compared if there are at most `EXACT_PAIRS`.
        threads: number of threads; by default, one per CPU.

    Raises:
        ValueError: an argument is out of range, or the shapes do not fit.
    """
    _check(queries, vectors, threshold, k, leave_one_out)
    exact = len(queries) * len(vectors) <= EXACT_PAIRS if exact is None else exact
    lists = None if exact else _Lists(vectors, threads)
    found = []
    with one_blas_thread():
        for top in range(0, len(queries), QUERIES):
            block = queries[top : top + QUERIES]
            tiles = lists.tiles(block, threads) if lists else _all_tiles(np.arange(len(block)), np.arange(len(vectors)))
            first = top if leave_one_out else None
            best = _best_pairs(block, vectors, tiles, threshold - MARGIN, k, first, threads)
            scored = _scored(block, vectors, best, threshold, threads)
            found.append(Pairs(scored.query + top, scored.vector, scored.score))
    return _joined(found)


def similarities(
    queries: Floats, vectors: Floats, query: Indices, vector: Indices, *, threads: int | None = None
) -> npt.NDArray[np.float64]:
    """Return the cosine similarity of each pair of row numbers `query` [p] and `vector` [p], [p]."""

    def compute(top: int) -> npt.NDArray[np.float64]:
        left = queries[query[top : top + SCORED]].astype(np.float64)
        return np.einsum("ij,ij->i", left, vectors[vector[top : top + SCORED]].astype(np.float64))

    return np.concatenate([np.empty(0), *in_order(compute, range(0, len(query), SCORED), threads)])


Tile = tuple[Indices, Indices]  # rows of the queries, rows of the vectors


def _check(queries: Floats, vectors: Floats, threshold: float, k: int, leave_one_out: bool) -> None:
    if queries.ndim != 2 or vectors.ndim != 2 or queries.shape[1] != vectors.shape[1]:
        raise ValueError(
            f"the queries are {list(queries.shape)} and the vectors {list(vectors.shape)}; "
            "they must be [m, D] and [n, D] with the same D"
        )
    if leave_one_out and len(queries) != len(vectors):
        raise ValueError(f"leave_one_out: {len(queries)} queries cannot be the {len(vectors)} vectors")
    if not -1 <= threshold <= 1:
        raise ValueError(f"the threshold is {threshold}; a cosine similarity is from -1 to 1")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")


def _all_tiles(rows: Indices, columns: Indices) -> Iterator[Tile]:
    """Yield tiles that cover all pairs of these queries and vectors."""
    for left in range(0, len(columns), COLUMNS):
        for top in range(0, len(rows), ROWS):
            yield rows[top : top + ROWS], columns[left : left + COLUMNS]


class _Lists:
    """The vectors in lists, one per cluster of a sample."""

    def __init__(self, vectors: Floats, threads: int | None) -> None:
        n_lists = max(1, round(LISTS * len(vectors) ** 0.5))
        size = min(len(vectors), PER_LIST * n_lists)
        sample = np.sort(np.random.default_rng(0).choice(len(vectors), size, replace=False))
        self.centroids = cluster(vectors[sample], n_lists, iterations=10, threads=threads).centroids
        self.members = groups(assign(vectors, self.centroids, threads=threads)[0], len(self.centroids))
        self.halves = 0.5 * (self.centroids**2).sum(axis=1)

    def tiles(self, queries: Floats, threads: int | None) -> Iterator[Tile]:
        """Yield tiles that cover the pairs of each query and the vectors of its nearest lists."""
        tops = range(0, len(queries), ROWS)
        nearest = np.concatenate(list(in_order(lambda top: self._nearest(queries[top : top + ROWS]), tops, threads)))
        probes = nearest.shape[1]
        for asking, members in zip(groups(nearest.ravel(), len(self.members)), self.members, strict=True):
            yield from _all_tiles(asking // probes, members)

    def _nearest(self, queries: Floats) -> npt.NDArray[np.int32]:
        """Return the nearest lists of each query [rows, probes]."""
        probes = min(PROBES, len(self.centroids))
        closeness = queries @ self.centroids.T  # [rows, lists]
        closeness -= self.halves
        return np.argpartition(closeness, -probes, axis=1)[:, -probes:].astype(np.int32)


def _best_pairs(
    queries: Floats,
    vectors: Floats,
    tiles: Iterator[Tile],
    least: float,
    k: int,
    first: int | None,
    threads: int | None,
) -> Pairs:
    """Return the pairs of the tiles with a product of at least `least`, at most k per query.

    If `first` is not None, query i is the vector `first` + i, and their pair is left out.
    """
    floors = np.full(len(queries), least, np.float32)  # a query needs no pair with a smaller product

    def compare(tile: Tile) -> Pairs:
        rows, columns = tile
        products = queries[rows] @ vectors[columns].T
        if first is not None:
            own = np.minimum(np.searchsorted(columns, rows + first), len(columns) - 1)
            same = np.flatnonzero(columns[own] == rows + first)
            products[same, own[same]] = -np.inf
        i, j = _above(products, floors[rows], k)
        return Pairs(rows[i], columns[j], products[i, j])

    kept = _joined([])
    parts: list[Pairs] = []
    for chunk in _chunks(tiles):
        parts += in_order(compare, chunk, threads)
        if sum(len(part.query) for part in parts) > k * len(queries):
            kept = _first_k(_joined([kept, *parts]), k)
            parts = []
            counts = np.bincount(kept.query, minlength=len(queries))
            full = counts == k
            floors[full] = kept.score[np.cumsum(counts)[full] - 1]
    return _first_k(_joined([kept, *parts]), k)


def _chunks(tiles: Iterator[Tile]) -> Iterator[list[Tile]]:
    """Divide the tiles into lists with about `QUERIES` rows. The floors change only between these."""
    chunk: list[Tile] = []
    n_rows = 0
    for tile in tiles:
        chunk.append(tile)
        n_rows += len(tile[0])
        if n_rows >= QUERIES:
            yield chunk
            chunk, n_rows = [], 0
    yield chunk


def _above(products: Floats, floors: Floats, k: int) -> tuple[Indices, Indices]:
    """Return the rows and columns of products of at least the floor of their row, among them the k largest of each row.

    At most k per row are returned on average.
    """
    hits = products >= floors[:, None]
    if np.count_nonzero(hits) <= k * len(products):
        i, j = np.nonzero(hits)
        return i, j
    largest = np.argpartition(products, -k, axis=1)[:, -k:]  # more pairs than k per row, so there are more columns
    i, j = (axis.ravel() for axis in np.broadcast_arrays(np.arange(len(products))[:, None], largest))
    wanted = hits[i, j]
    return i[wanted], j[wanted]


def _first_k(pairs: Pairs, k: int) -> Pairs:
    """Sort the pairs by query and descending score, and return the first k of each query."""
    order = np.lexsort((-pairs.score, pairs.query))
    query = pairs.query[order]
    ranks = np.arange(len(order)) - np.searchsorted(query, query)  # within the query
    return pairs.take(order[ranks < k])


def _scored(queries: Floats, vectors: Floats, pairs: Pairs, threshold: float, threads: int | None) -> Pairs:
    """Return the pairs with a similarity of at least `threshold`, sorted. Their scores are computed in float64."""
    scores = similarities(queries, vectors, pairs.query, pairs.vector, threads=threads)
    wanted = scores >= threshold
    close = Pairs(pairs.query[wanted], pairs.vector[wanted], scores[wanted].astype(np.float32))
    order = np.lexsort((close.vector, -close.score, close.query))
    return close.take(order)


def _joined(parts: list[Pairs]) -> Pairs:
    if not parts:  # np.concatenate needs an array
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    return Pairs(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
