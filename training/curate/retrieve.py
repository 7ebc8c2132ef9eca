"""Choose the images of a large pool that resemble seed images (DINOv2, arXiv 2304.07193, appendix A).

Sample-based retrieval takes the nearest images of each seed. It suits a large set of seeds. Cluster-based retrieval
divides the pool into clusters and takes images from the clusters that contain enough seeds. It suits a small set, whose
nearest images alone would be few.
"""

import numpy as np

from training.curate.kmeans import Floats, assign, cluster, groups
from training.curate.neighbours import neighbours_above
from training.curate.table import Indices


def retrieve_by_sample(
    pool: Floats, seeds: Floats, *, k: int = 4, most: int | None = None, threads: int | None = None
) -> Indices:
    """Return the positions of the k nearest vectors of each seed, in ascending order and without repetition.

    If there are more than `most`, nearer vectors come first: the nearest of each seed, then the second nearest, and so
    on, and among these the most similar ones. All pairs are compared.

    Args:
        pool: vectors of length 1, [n, D].
        seeds: vectors of length 1, [m, D].
        k: the number of vectors for each seed. The paper uses 4 and 32.
        most: the largest number of vectors; by default, there is no limit.
        threads: number of threads; by default, one per CPU.

    Raises:
        ValueError: `most` is less than 1, or see `neighbours_above`.
    """
    _check_most(most)
    near = neighbours_above(seeds, pool, -1, k, exact=True, threads=threads)
    ranks = np.arange(len(near.query)) - np.searchsorted(near.query, near.query)
    order = np.lexsort((near.vector, -near.score, ranks))
    _, first = np.unique(near.vector[order], return_index=True)
    return np.sort(near.vector[order][np.sort(first)[:most]])


def retrieve_by_cluster(
    pool: Floats,
    seeds: Floats,
    *,
    clusters: int,
    min_seeds: int = 4,
    per_cluster: int = 10_000,
    most: int | None = 1_000_000,
    seed: int = 0,
    threads: int | None = None,
) -> Indices:
    """Return the positions of vectors from the clusters of the pool that contain seeds, in ascending order.

    The vectors of a cluster, and of all clusters if there are more than `most`, are chosen by lot.

    Args:
        pool: vectors of length 1, [n, D].
        seeds: vectors of length 1, [m, D].
        clusters: the number of clusters. The paper uses 100,000.
        min_seeds: the number of seeds that a cluster must contain. The paper uses more than three.
        per_cluster: the largest number of vectors of one cluster.
        most: the largest number of all vectors, or None for no limit.
        seed: number from which all random choices follow.
        threads: number of threads; by default, one per CPU.

    Raises:
        ValueError: a number is less than 1, or there are no vectors.
    """
    _check_most(most)
    for name, value in {"min_seeds": min_seeds, "per_cluster": per_cluster}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    divided = cluster(pool, clusters, seed=[seed, 0], threads=threads)
    n_clusters = len(divided.centroids)
    n_seeds = np.bincount(assign(seeds, divided.centroids, threads=threads)[0], minlength=n_clusters)
    chosen = [
        _by_lot(members, per_cluster, [seed, 1, number])
        for number, members in enumerate(groups(divided.labels, n_clusters))
        if n_seeds[number] >= min_seeds
    ]
    together = np.concatenate([np.empty(0, np.int64), *chosen])
    return np.sort(together if most is None else _by_lot(together, most, [seed, 2]))


def _by_lot(positions: Indices, most: int, seed: list[int]) -> Indices:
    return positions if len(positions) <= most else np.random.default_rng(seed).choice(positions, most, replace=False)


def _check_most(most: int | None) -> None:
    if most is not None and most < 1:
        raise ValueError(f"the largest number of images is {most}; it must be at least 1")
