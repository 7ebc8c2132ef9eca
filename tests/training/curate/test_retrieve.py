"""Tests of retrieval around seeds."""

from unittest.mock import MagicMock

import numpy as np
import pytest

from tests.training.curate.vectors import around_centres, unit
from training.curate.embedding_stages import RETRIEVE
from training.curate.retrieve import retrieve_by_cluster, retrieve_by_sample
from training.curate.settings import load_settings


def plain_ranking(pool: np.ndarray, seeds: np.ndarray, k: int) -> list[int]:
    """The k nearest of each seed by the definition: first all nearest, by similarity, then all second nearest."""
    products = seeds.astype(np.float64) @ pool.astype(np.float64).T
    nearest = [np.argsort(-row, kind="stable")[:k] for row in products]
    ranked = [(rank, -products[seed, i], int(i)) for seed, row in enumerate(nearest) for rank, i in enumerate(row)]
    return list(dict.fromkeys(i for _, _, i in sorted(ranked)))


def test_the_nearest_images_of_each_seed() -> None:
    pool, seeds = around_centres(300), around_centres(12, seed=1)
    ranking = plain_ranking(pool, seeds, 4)
    assert retrieve_by_sample(pool, seeds).tolist() == sorted(ranking)
    assert len(ranking) > 12
    for most in (1, 5, 12, 20):
        assert retrieve_by_sample(pool, seeds, most=most).tolist() == sorted(ranking[:most])


def three_clusters() -> tuple[np.ndarray, np.ndarray]:
    """A pool of three clusters with 50 vectors each; four seeds in the first, three in the second, none in the last."""
    rng = np.random.default_rng(0)

    def near(which: np.ndarray) -> np.ndarray:
        return unit(np.eye(3, 8)[which] + 0.05 * rng.normal(size=(len(which), 8)))

    return near(np.repeat([0, 1, 2], 50)), near(np.repeat([0, 1], [4, 3]))


def test_clusters_with_enough_seeds() -> None:
    pool, seeds = three_clusters()
    assert retrieve_by_cluster(pool, seeds, clusters=3).tolist() == list(range(50))
    assert retrieve_by_cluster(pool, seeds, clusters=3, min_seeds=3).tolist() == list(range(100))
    assert retrieve_by_cluster(pool, seeds, clusters=3, min_seeds=5).tolist() == []


def test_limits_per_cluster_and_in_total() -> None:
    pool, seeds = three_clusters()
    kept = retrieve_by_cluster(pool, seeds, clusters=3, min_seeds=3, per_cluster=20)
    assert [(kept < 50).sum(), (kept >= 50).sum()] == [20, 20]
    assert (np.diff(kept) > 0).all()
    fewer = retrieve_by_cluster(pool, seeds, clusters=3, min_seeds=3, per_cluster=20, most=25)
    assert len(fewer) == 25
    assert set(fewer.tolist()) < set(kept.tolist())
    other = retrieve_by_cluster(pool, seeds, clusters=3, min_seeds=3, per_cluster=20, seed=1)
    assert other.tolist() != kept.tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["k=2", "most=5"], {"k": 2, "most": 5}),
        (["method='cluster'", "clusters=3", "min_seeds=4"], {"clusters": 3, "min_seeds": 4}),
        (
            ["method='cluster'", "clusters=3", "min_seeds=3", "per_cluster=20", "most=25"],
            {"clusters": 3, "min_seeds": 3, "per_cluster": 20, "most": 25},
        ),
    ],
)
def test_the_stage_uses_its_settings(settings: list[str], expected: dict[str, int]) -> None:
    pool, seeds = three_clusters()
    images = MagicMock(embedding=pool)
    images.__len__.return_value = len(pool)
    task = MagicMock(
        images=images,
        scanned={"seeds": MagicMock(images=MagicMock(embedding=seeds))},
        settings=load_settings(None, [f"retrieve.{one}" for one in settings]),
    )
    retrieve = retrieve_by_cluster if "clusters" in expected else retrieve_by_sample
    kept = retrieve(pool, seeds, **expected)
    dropped = [drop.index for drop in RETRIEVE.run(task).drops]
    assert sorted([*dropped, *kept.tolist()]) == list(range(len(pool)))


def test_bad_arguments() -> None:
    pool, seeds = three_clusters()
    with pytest.raises(ValueError, match="the largest number of images is 0"):
        retrieve_by_sample(pool, seeds, most=0)
    with pytest.raises(ValueError, match="min_seeds is 0"):
        retrieve_by_cluster(pool, seeds, clusters=3, min_seeds=0)
    with pytest.raises(ValueError, match="per_cluster is 0"):
        retrieve_by_cluster(pool, seeds, clusters=3, per_cluster=0)
    with pytest.raises(ValueError, match="the number of clusters is 0"):
        retrieve_by_cluster(pool, seeds, clusters=0)
