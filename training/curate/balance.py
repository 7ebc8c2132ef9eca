"""Choose a balanced subset of images by hierarchical k-means (arXiv 2405.15613, section 3).

The vectors are clustered, then the centroids of the clusters, and so on. The levels above the lowest resample, so that
their clusters spread over the space instead of over the density. The wanted number of images is divided among the
clusters of the top level by filling up: all get the same number, but none gets more than it has. Each cluster divides
its number among its children in the same way. Frequent motifs are thereby cut, and rare ones are kept. A cluster of
the lowest level keeps the images nearest to its centroid.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from training.curate.kmeans import Clusters, Floats, cluster, groups, kmeans, nearest_members, resample
from training.curate.table import Indices

PER_CLUSTER = 32  # images per cluster of the lowest level, by default
PER_PARENT = 4  # clusters of the lowest level per cluster of the level above, by default


def default_levels(n: int) -> tuple[int, ...]:
    """Return the numbers of clusters for n images, lowest level first: 31250 and 7812 for a million images.

    A top level with fewer clusters than the images have motifs keeps too few images of rare motifs
    (docs/decisions/0059-scale-of-curation.md).
    """
    lowest = max(1, n // PER_CLUSTER)
    top = lowest // PER_PARENT
    return (lowest, top) if top > 1 else (lowest,)


def balance(
    vectors: Floats,
    size: int,
    *,
    levels: Sequence[int] | None = None,
    iterations: int = 20,
    resampling_steps: int = 10,
    seed: int = 0,
    threads: int | None = None,
) -> Indices:
    """Choose `size` of the vectors [n, D], and return their positions in ascending order [size].

    Args:
        vectors: embeddings of the images, [n, D].
        size: the number of images to keep. All images are kept if there are no more.
        levels: numbers of clusters of the levels, lowest level first, descending; see `default_levels`.
        iterations: the largest number of k-means iterations.
        resampling_steps: how often a level above the lowest is clustered again, see `resample`.
        seed: number from which all random choices follow.
        threads: number of threads; by default, one per CPU.

    Raises:
        ValueError: `size` is less than 1, or the levels are not descending.
    """
    if size < 1:
        raise ValueError(f"the number of images to keep is {size}; it must be at least 1")
    if size >= len(vectors):
        return np.arange(len(vectors))
    levels = default_levels(len(vectors)) if levels is None else levels
    if not levels or min(levels) < 1 or any(above >= below for below, above in pairwise(levels)):
        raise ValueError(f"the levels are {list(levels)}; they must be positive and descending")
    lowest, *above = levels
    tree = [cluster(vectors, lowest, seed=[seed, 0], iterations=iterations, threads=threads)]
    for level, k in enumerate(above, 1):
        centroids, entropy = tree[-1].centroids, [seed, level]
        # `cluster` would divide the centroids into cells, whose shares favour frequent motifs.
        clusters = kmeans(centroids, k, seed=entropy, iterations=iterations, threads=threads)
        tree.append(
            resample(centroids, clusters, steps=resampling_steps, seed=entropy, iterations=iterations, threads=threads)
        )
    return nearest_members(tree[0], _shares(tree, size, seed))


def fill_up(capacities: Indices, target: int, rng: np.random.Generator) -> Indices:
    """Divide `target` among clusters with these capacities [c] as evenly as possible. Return the numbers [c].

    Each number is the smaller of the capacity and a common cap. What is left over is less than one for each cluster
    with free capacity, and clusters chosen by lot get one more.

    Raises:
        ValueError: the target is negative, or larger than the sum of the capacities.
    """
    if not 0 <= target <= capacities.sum():
        raise ValueError(f"the target is {target}; it must be from 0 to {capacities.sum()}, the sum of the capacities")
    ascending = np.sort(capacities)
    below = np.concatenate(([0], np.cumsum(ascending)[:-1]))  # the sum of the smaller capacities
    sharing = np.arange(len(ascending), 0, -1)  # the clusters that are not smaller
    full = below + ascending * sharing <= target  # clusters whose capacity is at most the cap; a prefix
    n_full = int(full.sum())
    if n_full == len(capacities):
        return capacities.copy()
    cap, remainder = divmod(target - int(below[n_full]), int(sharing[n_full]))
    shares = np.minimum(capacities, cap)
    shares[rng.choice(np.flatnonzero(capacities > cap), remainder, replace=False)] += 1
    return shares


def _shares(tree: list[Clusters], size: int, seed: int) -> Indices:
    """Return the number of images that each cluster of the lowest level keeps."""
    capacities = [np.bincount(tree[0].labels)]
    for clusters in tree[1:]:
        capacities.append(np.bincount(clusters.labels, capacities[-1]).astype(np.int64))
    shares = fill_up(capacities[-1], size, np.random.default_rng([seed, len(tree)]))
    for level in range(len(tree) - 1, 0, -1):
        children_shares = np.empty_like(capacities[level - 1])
        for parent, children in enumerate(groups(tree[level].labels, len(shares))):
            rng = np.random.default_rng([seed, level, parent])
            children_shares[children] = fill_up(capacities[level - 1][children], int(shares[parent]), rng)
        shares = children_shares
    return shares
