"""Tests of k-means on patches."""

import numpy as np
import pytest

from service.features.patches import unit_rows
from service.vision.cluster import MAX_GROUPS, cluster, k_means, silhouette

RNG = np.random.default_rng(8)


def blobs(count: int, each: int = 40, noise: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    """Return unit features around `count` directions, and the number of the direction of each."""
    directions = np.random.default_rng(count).normal(size=(count, 24))
    truth = np.repeat(np.arange(count), each)
    return unit_rows(directions[truth] + RNG.normal(size=(len(truth), 24)) * noise), truth


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_the_number_of_groups_is_found(count: int) -> None:
    features, truth = blobs(count)
    groups = cluster(features)
    assert groups.max() + 1 == count
    assert len({(int(t), int(g)) for t, g in zip(truth, groups, strict=True)}) == count  # one group for each direction


def test_groups_are_deterministic_and_sorted_by_size() -> None:
    features, _ = blobs(4)
    features = features[: 40 + 30 + 20]
    first = cluster(features, 3)
    np.testing.assert_array_equal(first, cluster(features.copy(), 3))
    sizes = np.bincount(first)
    assert sizes.tolist() == sorted(sizes, reverse=True) == [40, 40, 10]


@pytest.mark.parametrize("k", [2, 3, 7])
def test_k_means_is_as_good_as_any_of_many_starts(k: int) -> None:
    """Compare with the plain definition: Lloyd's algorithm from 200 random starts."""
    features = unit_rows(RNG.normal(size=(60, 5)))
    labels, centres = k_means(features, k)
    error = np.square(features - centres[labels]).sum()
    best = np.inf
    for _ in range(200):
        means = features[RNG.choice(60, k, replace=False)]
        for _ in range(50):
            nearest = np.square(features[:, None] - means).sum(-1).argmin(1)
            means = np.array([features[nearest == j].mean(0) if (nearest == j).any() else means[j] for j in range(k)])
        best = min(best, np.square(features - means[nearest]).sum())
    assert error <= 1.06 * best
    np.testing.assert_array_equal(labels, np.square(features[:, None] - centres).sum(-1).argmin(1))
    for group in range(k):
        np.testing.assert_allclose(centres[group], features[labels == group].mean(0), atol=1e-5)


def test_silhouette_is_the_definition() -> None:
    features, _ = blobs(3)
    labels, centres = k_means(features, 3)
    distances = np.linalg.norm(features[:, None] - centres, axis=2)
    own = distances[np.arange(len(features)), labels]
    other = np.array([np.delete(row, label).min() for row, label in zip(distances, labels, strict=True)])
    assert silhouette(features, labels, centres) == pytest.approx(np.mean((other - own) / np.maximum(own, other)), 1e-4)


def test_few_or_equal_patches() -> None:
    assert cluster(np.ones((16, 4), np.float32) / 2).tolist() == [0] * 16
    assert cluster(np.ones((1, 4), np.float32) / 2, 2).tolist() == [0]
    assert sorted(cluster(np.eye(3, dtype=np.float32), MAX_GROUPS)) == [0, 1, 2]
    two = np.repeat(np.eye(2, dtype=np.float32), [5, 3], axis=0)
    assert cluster(two, 6).tolist() == [0] * 5 + [1] * 3  # no more groups than different patches
