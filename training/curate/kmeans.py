"""Cluster vectors with k-means (Lloyd 1982; initial centres by k-means++, Arthur and Vassilvitskii 2007).

The result depends only on the vectors, their order and the seed. Vectors are assigned in fixed blocks (`blocks.py`),
and their sums are computed in float64, block after block. `cluster` is k-means for a large number of
clusters: it divides the vectors into cells, and finds the centroids of each cell on its own.

Legend: n vectors, k clusters, D dimensions.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from training.curate.blocks import in_order, one_blas_thread
from training.curate.table import Indices

Floats = npt.NDArray[np.float32]

ROWS = 4096  # vectors of one block; their sums are added in this unit
TILE_ROWS, TILE_COLUMNS = 512, 1024  # a tile of products takes 2 MB and stays in the cache of a core
SAMPLE = 8  # vectors per cluster among which k-means++ chooses
CHOSEN_PER_DRAW = 16  # k-means++ draws one more centroid at a time for each 16 that it has
LARGEST = 1024  # clusters that `cluster` computes without cells
PER_CELL = 256  # vectors per cell from which `cluster` computes the cells
SAME = 1e-6  # vectors are the same if their squared distance is below this share of the largest squared length


class Clusters(NamedTuple):
    """A division of n vectors into clusters. No cluster is empty.

    `centroids` are the centres of the clusters [k, D], `labels` the cluster of each vector [n], and `distances` the
    squared distances of the vectors from the centroids of their clusters [n].
    """

    centroids: Floats
    labels: npt.NDArray[np.int32]
    distances: Floats


def assign(vectors: Floats, centroids: Floats, *, threads: int | None = None) -> tuple[npt.NDArray[np.int32], Floats]:
    """Return the nearest centroid [k, D] of each vector [n, D], and the squared distances. Both arrays are [n].

    If two centroids are equally near, the first is taken.
    """
    with one_blas_thread():
        halves = _half_squares(centroids)
        blocks = list(
            in_order(lambda top: _nearest(vectors[top : top + ROWS], centroids, halves), _tops(vectors), threads)
        )
    return np.concatenate([labels for labels, _ in blocks]), np.concatenate([distances for _, distances in blocks])


def kmeans(
    vectors: Floats, k: int, *, seed: int | list[int] = 0, iterations: int = 20, threads: int | None = None
) -> Clusters:
    """Divide the vectors [n, D] into at most k clusters. There are fewer if the vectors have fewer different values.

    Iterations stop when no vector changes its cluster.

    Raises:
        ValueError: k is less than 1, or there are no vectors.
    """
    if k < 1:
        raise ValueError(f"the number of clusters is {k}; it must be at least 1")
    if not len(vectors):
        raise ValueError("there are no vectors to cluster")
    with one_blas_thread():
        centroids = initial_centroids(vectors, min(k, len(vectors)), np.random.default_rng(seed))
        labels = np.full(len(vectors), -1, np.int32)
        for _ in range(iterations):
            before = labels
            labels, distances, sums = _assign_and_sum(vectors, centroids, threads)
            if np.array_equal(labels, before):
                break
            centroids = _means(vectors, labels, distances, sums)
    return _clusters(vectors, centroids, threads)


def initial_centroids(vectors: Floats, k: int, rng: np.random.Generator) -> Floats:
    """Choose at most k different vectors [k, D] by k-means++, among `SAMPLE` * k vectors that are chosen by lot.

    After the first, each is chosen with a probability proportional to the squared distance from the nearest one. Once
    there are `2 * CHOSEN_PER_DRAW` of them, several are drawn at a time, which makes one matrix product of many.
    """
    points = vectors[np.sort(rng.choice(len(vectors), min(len(vectors), SAMPLE * k), replace=False))]
    halves = _half_squares(points)
    same = SAME * 2 * halves.max()
    chosen = rng.integers(len(points), size=1)
    added, distances = chosen, np.full(len(points), np.inf, np.float32)
    while True:
        _, to_added = _nearest(points, points[added], halves[added])
        distances = np.minimum(distances, to_added)
        distances[distances < same] = 0
        cumulated = np.cumsum(distances, dtype=np.float64)
        if len(chosen) == k or cumulated[-1] == 0:  # if 0, each point has been chosen, or is the same as a chosen one
            return points[chosen]
        n_added = min(k - len(chosen), max(1, len(chosen) // CHOSEN_PER_DRAW))
        added = np.unique(np.searchsorted(cumulated, rng.random(n_added) * cumulated[-1], side="right"))
        chosen = np.concatenate((chosen, added))


def cluster(
    vectors: Floats, k: int, *, seed: int | list[int] = 0, iterations: int = 20, threads: int | None = None
) -> Clusters:
    """Divide the vectors [n, D] into about k clusters, also if k is large.

    More than `LARGEST` clusters are computed within cells, which k-means finds on a sample. Each cell gets a share of
    the clusters in proportion to the sum of its squared distances, which is what k-means of all vectors would do in
    many dimensions. Cells are clustered at the same time, each with one thread. Then each vector moves to the nearest
    centroid of all cells, because the border of a cell can divide a dense group of vectors.

    Raises:
        ValueError: see `kmeans`.
    """
    entropy = [seed] if isinstance(seed, int) else seed
    if k <= LARGEST:
        return kmeans(vectors, k, seed=entropy, iterations=iterations, threads=threads)
    n_cells = round(k**0.5)
    sample = np.random.default_rng([*entropy, 0]).choice(len(vectors), min(len(vectors), PER_CELL * n_cells), False)
    centroids = kmeans(
        vectors[np.sort(sample)], n_cells, seed=[*entropy, 1], iterations=iterations, threads=threads
    ).centroids
    cells, spread = assign(vectors, centroids, threads=threads)
    members = [positions for positions in groups(cells, len(centroids)) if len(positions)]
    shares = k * np.array([spread[positions].sum(dtype=np.float64) for positions in members])
    if len(members) == 1 or not shares.any():
        return kmeans(vectors, k, seed=entropy, iterations=iterations, threads=threads)

    def divide(cell: int) -> Floats:
        return cluster(
            vectors[members[cell]],
            min(len(members[cell]), max(1, int(shares[cell] / spread.sum(dtype=np.float64)))),
            seed=[*entropy, 2, cell],
            iterations=iterations,
            threads=1,
        ).centroids

    with one_blas_thread():
        parts = list(in_order(divide, range(len(members)), threads))
    return _clusters(vectors, np.concatenate(parts), threads)


def resample(
    vectors: Floats,
    clusters: Clusters,
    *,
    steps: int,
    seed: list[int],
    iterations: int = 20,
    threads: int | None = None,
) -> Clusters:
    """Spread the clusters of the vectors [n, D] over the space instead of over the density (arXiv 2405.15613).

    A step takes from each cluster the vectors that are nearest to its centroid, half as many as the mean size of a
    cluster. It clusters these with k-means, and then assigns all vectors to the new centroids.
    """
    k = len(clusters.centroids)
    for step in range(steps):
        each = max(1, len(vectors) // (2 * k))
        near = nearest_members(clusters, np.full(len(clusters.centroids), each))
        again = kmeans(vectors[near], k, seed=[*seed, 3, step], iterations=iterations, threads=threads)
        clusters = _clusters(vectors, again.centroids, threads)
    return clusters


def groups(labels: npt.NDArray[np.int32], count: int) -> list[Indices]:
    """Return the positions of each label from 0 to `count` - 1, in ascending order."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels, minlength=count))[:-1])


def nearest_members(clusters: Clusters, counts: Indices) -> Indices:
    """Return, in ascending order, the positions of the `counts[c]` vectors of each cluster c nearest to its centroid.

    The first of two equally near vectors is taken.
    """
    order = np.lexsort((clusters.distances, clusters.labels))
    sizes = np.bincount(clusters.labels, minlength=len(counts))
    ranks = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within the cluster
    return np.sort(order[ranks < np.repeat(counts, sizes)])


def _clusters(vectors: Floats, centroids: Floats, threads: int | None) -> Clusters:
    """Return the clusters of the vectors around the centroids. Centroids without a vector are left out."""
    labels, distances = assign(vectors, centroids, threads=threads)
    used, numbers = np.unique(labels, return_inverse=True)
    return Clusters(centroids[used], numbers.astype(np.int32), distances)


def _half_squares(vectors: Floats) -> Floats:
    return np.asarray(0.5 * np.einsum("ij,ij->i", vectors, vectors), np.float32)


def _tops(vectors: Floats) -> range:
    return range(0, len(vectors), ROWS)


def _nearest(vectors: Floats, centroids: Floats, halves: Floats) -> tuple[npt.NDArray[np.int32], Floats]:
    """Return the nearest centroid of each vector of a block, and the squared distance.

    The nearest centroid c of x has the largest x.c - |c|^2 / 2. `halves` are the |c|^2 / 2.
    """
    labels, best = np.zeros(len(vectors), np.int32), np.full(len(vectors), -np.inf, np.float32)
    for top in range(0, len(vectors), TILE_ROWS):
        rows = slice(top, min(top + TILE_ROWS, len(vectors)))
        for left in range(0, len(centroids), TILE_COLUMNS):
            columns = slice(left, left + TILE_COLUMNS)
            tile = vectors[rows] @ centroids[columns].T  # [TILE_ROWS, TILE_COLUMNS]
            tile -= halves[columns]
            winners = tile.argmax(axis=1)
            values = np.take_along_axis(tile, winners[:, None], axis=1)[:, 0]
            better = values > best[rows]
            best[rows][better], labels[rows][better] = values[better], winners[better] + left
    return labels, np.maximum(0, 2 * (_half_squares(vectors) - best))


def _assign_and_sum(
    vectors: Floats, centroids: Floats, threads: int | None
) -> tuple[npt.NDArray[np.int32], Floats, npt.NDArray[np.float64]]:
    """Return the nearest centroid of each vector, its squared distance, and the sum of the vectors of each centroid."""
    halves = _half_squares(centroids)

    def block(top: int) -> tuple[npt.NDArray[np.int32], Floats, npt.NDArray[np.int32], npt.NDArray[np.float64]]:
        rows = vectors[top : top + ROWS]
        labels, distances = _nearest(rows, centroids, halves)
        order = np.argsort(labels, kind="stable")
        used, starts = np.unique(labels[order], return_index=True)
        return labels, distances, used, np.add.reduceat(rows[order].astype(np.float64), starts, axis=0)

    all_labels, all_distances = [], []
    sums = np.zeros(centroids.shape)
    for labels, distances, used, part in in_order(block, _tops(vectors), threads):
        all_labels.append(labels)
        all_distances.append(distances)
        sums[used] += part
    return np.concatenate(all_labels), np.concatenate(all_distances), sums


def _means(vectors: Floats, labels: npt.NDArray[np.int32], distances: Floats, sums: npt.NDArray[np.float64]) -> Floats:
    """Return the mean of each cluster. An empty cluster gets one of the vectors farthest from their centroids."""
    counts = np.bincount(labels, minlength=len(sums))
    centroids = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        centroids[empty] = vectors[np.argsort(-distances, kind="stable")[: len(empty)]]
    return centroids
