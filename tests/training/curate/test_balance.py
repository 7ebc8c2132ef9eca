"""Tests of the choice of a balanced subset."""

import numpy as np
import pytest

from tests.training.curate.vectors import around_centres, unit
from training.curate import kmeans
from training.curate.balance import balance, default_levels, fill_up


def plain_fill(capacities: list[int], target: int) -> list[int]:
    """Fill up by the definition: give one to each cluster with free capacity, as long as all of these can get one."""
    shares = [0] * len(capacities)
    while True:
        free = [i for i, capacity in enumerate(capacities) if shares[i] < capacity]
        if not free or sum(shares) + len(free) > target:
            return shares
        for i in free:
            shares[i] += 1


@pytest.mark.parametrize("seed", range(20))
def test_filling_up_is_its_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacities = rng.integers(0, 12, size=rng.integers(1, 10))
    for target in range(int(capacities.sum()) + 1):
        shares = fill_up(capacities, target, rng)
        assert shares.sum() == target
        extra = shares - plain_fill(capacities.tolist(), target)
        assert set(extra.tolist()) <= {0, 1}
        assert (shares <= capacities).all()


def test_the_lot_decides_who_gets_one_more() -> None:
    capacities = np.array([9, 9, 9])
    shares = [tuple(fill_up(capacities, 10, np.random.default_rng(seed)).tolist()) for seed in range(20)]
    assert set(shares) == {(4, 3, 3), (3, 4, 3), (3, 3, 4)}


def test_more_than_there_is_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="the target is 6; it must be from 0 to 5"):
        fill_up(np.array([2, 3]), 6, np.random.default_rng(0))


def frequent_and_rare() -> np.ndarray:
    """One motif with 900 vectors, and ten with 30."""
    centres = np.eye(11, 16)
    which = np.concatenate((np.zeros(900, int), np.repeat(np.arange(1, 11), 30)))
    return unit(centres[which] + 0.05 * np.random.default_rng(0).normal(size=(1200, 16)))


def test_a_frequent_motif_is_cut_and_rare_ones_are_kept() -> None:
    kept = balance(frequent_and_rare(), 220, levels=(60, 11), seed=1)
    assert len(kept) == 220
    assert (np.diff(kept) > 0).all()
    of_the_rare = np.bincount(np.maximum(0, kept - 900) // 30 + (kept >= 900), minlength=11)[1:]
    assert (kept < 900).sum() <= 45  # a proportional choice would keep 165
    assert of_the_rare.min() >= 10  # a proportional choice would keep 5


def test_many_clusters_balance_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "LARGEST", 64)  # so that 40,000 vectors are divided as a million are
    rng = np.random.default_rng(0)
    frequency = 1 / np.sqrt(1 + np.arange(400))
    motifs = rng.choice(400, 40_000, p=frequency / frequency.sum())
    scale = 1 / np.sqrt(1 + np.arange(32))
    points = rng.normal(size=(400, 32))[motifs] + 0.5 * rng.normal(size=(40_000, 32))
    kept = balance(unit(points * scale), 10_000, resampling_steps=2)
    frequent = np.argsort(-np.bincount(motifs))[:40]
    before, after = (np.isin(part, frequent).mean() for part in (motifs, motifs[kept]))
    assert before > 0.28
    assert after < 0.16  # 0.18 if the clusters of the upper level are divided into cells


def test_one_level_keeps_the_vectors_nearest_to_the_centroid() -> None:
    vectors = around_centres(50, centres=1)
    kept = balance(vectors, 10, levels=(1,))
    distances = ((vectors - vectors.mean(axis=0)) ** 2).sum(axis=1)
    assert kept.tolist() == sorted(np.argsort(distances)[:10].tolist())


def test_the_number_of_threads_does_not_change_the_choice() -> None:
    vectors = around_centres(1500)
    one, three = (balance(vectors, 300, resampling_steps=2, threads=threads) for threads in (1, 3))
    assert one.tolist() == three.tolist()


def test_everything_is_kept_if_there_are_no_more() -> None:
    assert balance(around_centres(5), 5).tolist() == [0, 1, 2, 3, 4]
    assert balance(np.empty((0, 4), np.float32), 3).tolist() == []


def test_identical_vectors() -> None:
    assert len(balance(np.ones((100, 4), np.float32), 30)) == 30


def test_default_levels() -> None:
    assert default_levels(1_000_000) == (31250, 7812)
    assert default_levels(255) == (7,)
    assert default_levels(5) == (1,)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="the number of images to keep is 0"):
        balance(around_centres(5), 0)
    for levels in ((), (3, 3), (3, 0)):
        with pytest.raises(ValueError, match="must be positive and descending"):
            balance(around_centres(50), 10, levels=levels)
