"""Tests of the exact bootstrap distribution."""

import itertools

import numpy as np
import pytest

from service.jobs.bootstrap import bootstrap_quantiles

PROBABILITIES = (0.001, 0.025, 0.3, 0.5, 0.9, 0.975, 0.9999)


def test_it_is_the_distribution_of_all_possible_samples() -> None:
    scores = np.array([-2, 0, 0, 5])
    means = np.sort([np.mean(sample) for sample in itertools.product(scores, repeat=4)])
    shares = np.arange(1, len(means) + 1) / len(means)
    expected = [means[np.argmax(shares >= p - 1e-12)] for p in PROBABILITIES]
    assert bootstrap_quantiles(scores, PROBABILITIES) == pytest.approx(expected)


def test_it_agrees_with_random_samples() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(-4, 5, 400)
    samples = scores[rng.integers(0, 400, (20_000, 400))].mean(axis=1)
    found = bootstrap_quantiles(scores, (0.025, 0.5, 0.975))
    assert found == pytest.approx(np.quantile(samples, (0.025, 0.5, 0.975)), abs=0.01)
    assert found[2] - found[0] > 0.4


def test_equal_scores_have_no_noise() -> None:
    assert bootstrap_quantiles(np.full(7, 3), (0.01, 0.99)) == [3, 3]


def test_the_tails_are_finite_for_many_scores() -> None:
    scores = np.repeat([0, 1], [49_999, 1])
    low, high = bootstrap_quantiles(scores, (1e-8, 1 - 1e-6))
    assert low == 0
    assert 5 / 50_000 < high < 15 / 50_000


def test_no_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="0 scores"):
        bootstrap_quantiles(np.array([], int), (0.5,))
