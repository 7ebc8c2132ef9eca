"""Tests of k-means: the plain definition, the same bytes for any number of threads, and many clusters."""

import numpy as np
import numpy.typing as npt
import pytest

from tests.training.curate.vectors import around_centres, unit
from training.curate import kmeans as module
from training.curate.blocks import in_order
from training.curate.kmeans import (
    Clusters,
    Floats,
    assign,
    cluster,
    groups,
    initial_centroids,
    kmeans,
    nearest_members,
    resample,
)


def plain_kmeans(vectors: Floats, centroids: npt.NDArray[np.float64], iterations: int) -> npt.NDArray[np.int64]:
    """Lloyd's algorithm by its definition, in float64. Return the label of each vector."""
    for _ in range(iterations):
        labels = np.array([((vector - centroids) ** 2).sum(axis=1).argmin() for vector in vectors.astype(np.float64)])
        centroids = np.array([vectors[labels == label].mean(axis=0) for label in range(len(centroids))])
    return labels


def same(one: Clusters, other: Clusters) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROWS": 64, "TILE_ROWS": 16, "TILE_COLUMNS": 5}.items():
        monkeypatch.setattr(module, name, value)


def test_kmeans_is_lloyds_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    vectors = around_centres(300, centres=8)
    start = initial_centroids(vectors, 8, np.random.default_rng(5))
    clusters = kmeans(vectors, 8, seed=5, iterations=10)
    assert len(start) == 8
    expected = plain_kmeans(vectors, start.astype(np.float64), 11)
    assert clusters.labels.tolist() == expected.tolist()
    means = np.array([vectors[expected == label].mean(axis=0) for label in range(8)])
    np.testing.assert_allclose(clusters.centroids, means, atol=1e-6)
    np.testing.assert_allclose(clusters.distances, ((vectors - means[expected]) ** 2).sum(axis=1), atol=1e-5)


def test_assignment_takes_the_nearest_centroid(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    vectors, centroids = around_centres(200), 2 * around_centres(13, seed=1)
    labels, distances = assign(vectors, centroids)
    squares = ((vectors[:, None] - centroids[None]) ** 2).sum(axis=2)
    assert labels.tolist() == squares.argmin(axis=1).tolist()
    np.testing.assert_allclose(distances, squares.min(axis=1), atol=1e-5)


@pytest.mark.parametrize("k", [10, 300])
def test_the_number_of_threads_does_not_change_a_byte(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    monkeypatch.setattr(module, "ROWS", 128)
    monkeypatch.setattr(module, "LARGEST", 64)
    vectors = around_centres(2000, dimensions=48)
    one, three = (cluster(vectors, k, iterations=5, threads=threads) for threads in (1, 3))
    assert same(one, three)
    assert not same(one, cluster(vectors, k, seed=1, iterations=5))


def test_many_clusters_are_almost_as_good_as_lloyds(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = around_centres(3000, centres=100, spread=0.4)
    lloyd = kmeans(vectors, 200)
    monkeypatch.setattr(module, "LARGEST", 64)
    divided = cluster(vectors, 200)
    assert 180 <= len(divided.centroids) <= 200
    assert np.bincount(divided.labels).min() >= 1
    squares = ((vectors - divided.centroids[divided.labels]) ** 2).sum(axis=1)
    np.testing.assert_allclose(divided.distances, squares, atol=1e-5)
    assert lloyd.distances.sum() <= divided.distances.sum() <= 1.1 * lloyd.distances.sum()


def test_cells_get_clusters_by_their_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 16)
    frequent, wide = around_centres(1500, centres=1, spread=0.01), around_centres(500, centres=50, seed=1)
    labels = cluster(np.concatenate((frequent, wide)), 100).labels
    assert len(np.unique(labels[:1500])) <= 10  # in proportion to the vectors, there would be 75
    assert len(np.unique(labels[1500:])) >= 70


def test_resampling_spreads_the_clusters() -> None:
    vectors = np.concatenate((around_centres(2000, centres=1, spread=0.3), around_centres(200, centres=20, seed=1)))
    clusters = kmeans(vectors, 40)
    again, three = (resample(vectors, clusters, steps=5, seed=[0], threads=threads) for threads in (1, 3))
    assert same(again, three)
    before, after = (len(np.unique(labels[:2000])) for labels in (clusters.labels, again.labels))
    assert after < before


def test_the_border_of_a_cell_does_not_divide_a_motif(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 32)
    vectors = around_centres(4000, centres=100, spread=0.6, dimensions=16)
    clusters = cluster(vectors, 200)
    labels, _ = assign(vectors, clusters.centroids)
    assert clusters.labels.tolist() == labels.tolist()


def test_many_initial_centroids_are_spread_over_all_groups() -> None:
    vectors = around_centres(4000, centres=200, spread=0.05)
    centroids = initial_centroids(vectors, 200, np.random.default_rng(0))
    assert len(centroids) == 200
    _, distances = assign(vectors, centroids)
    assert (distances < 0.1).mean() > 0.95  # the vectors of a group without a centroid are farther away


def test_fewer_different_vectors_than_clusters() -> None:
    vectors = np.repeat(around_centres(3, centres=3), 40, axis=0)
    clusters = kmeans(vectors, 10)
    assert len(clusters.centroids) == 3
    assert sorted(np.bincount(clusters.labels)) == [40, 40, 40]
    assert clusters.distances.max() < 1e-5


def test_an_empty_cluster_gets_a_far_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(np.array([[1, 0], [1, 0.1], [0, 1], [-1, 0]]))
    start = np.array([[1, 0], [0.9, 0], [5, 5]], np.float32)  # no vector is nearest to the last
    monkeypatch.setattr(module, "initial_centroids", lambda *_: start)
    assert np.bincount(kmeans(vectors, 3).labels).tolist() == [2, 1, 1]


def test_a_centroid_without_vectors_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    start = np.array([[5, 5], [1, 0], [0, 1]], np.float32)
    monkeypatch.setattr(module, "initial_centroids", lambda *_: start)
    clusters = kmeans(np.eye(2, dtype=np.float32), 3, iterations=0)
    assert clusters.centroids.tolist() == start[1:].tolist()
    assert clusters.labels.tolist() == [0, 1]


def test_members_nearest_to_the_centroids() -> None:
    labels = np.array([1, 0, 1, 1, 0], np.int32)
    distances = np.array([0.3, 0.2, 0.1, 0.2, 0.2], np.float32)
    clusters = Clusters(np.zeros((2, 2), np.float32), labels, distances)
    assert nearest_members(clusters, np.array([1, 2])).tolist() == [1, 2, 3]
    assert nearest_members(clusters, np.array([0, 9])).tolist() == [0, 2, 3]
    assert [members.tolist() for members in groups(labels, 3)] == [[1, 4], [0, 2, 3], []]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="the number of clusters is 0; it must be at least 1"):
        kmeans(around_centres(5), 0)
    with pytest.raises(ValueError, match="no vectors"):
        kmeans(np.empty((0, 4), np.float32), 2)
    with pytest.raises(ValueError, match="threads is 0"):
        list(in_order(str, [1], 0))


def test_results_are_in_order_and_errors_are_raised() -> None:
    assert list(in_order(lambda item: item * item, range(20), 3)) == [item * item for item in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda item: 1 // (item - 5), range(20), 3))
