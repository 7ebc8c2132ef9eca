"""Tests of the p-values: compared with their definition, and the error rate measured on random data."""

import numpy as np
import pytest

from service.vision.conformal import can_promise, least_error_rate, p_values

K = 3


def test_p_values_are_as_defined() -> None:
    rng = np.random.default_rng(0)
    calibration = np.sort(rng.integers(0, 20, 50) / 10)  # with ties
    scores = np.concatenate([rng.integers(-2, 24, 40) / 10, calibration[:5]])
    expected = [(1 + sum(known <= score for known in calibration)) / 51 for score in scores]
    assert p_values(calibration, scores).tolist() == expected


def test_the_lowest_and_the_highest_p_value() -> None:
    assert p_values([0.1, 0.2, 0.3], [0.0, 0.1, 1.0]).tolist() == [0.25, 0.5, 1.0]
    assert p_values([], [0.3]).tolist() == [1.0]


@pytest.mark.parametrize(("count", "error_rate"), [(19, 0.05), (99, 0.01), (999, 0.001), (1, 0.5), (9, 0.1)])
def test_an_error_rate_needs_its_number_of_items(count: int, error_rate: float) -> None:
    assert can_promise(count, error_rate)
    assert not can_promise(count - 1, error_rate)
    assert least_error_rate(count) == pytest.approx(error_rate)
    assert p_values(np.zeros(count), [-1.0])[0] <= error_rate  # the limit itself is reached
    assert p_values(np.zeros(count - 1), [-1.0])[0] > error_rate


def kth_similarity(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.sort(rows @ others.T, axis=1)[:, -K]


def leave_one_out(points: np.ndarray) -> np.ndarray:
    similarities = points @ points.T
    np.fill_diagonal(similarities, -2)
    return np.sort(np.sort(similarities, axis=1)[:, -K])


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def in_clusters(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return points with near-duplicates, like several images of the same object."""
    centres = unit(np.random.default_rng(5).normal(size=(40, 6)))
    return unit(centres[rng.integers(0, 40, count)] + 0.05 * rng.normal(size=(count, 6)))


@pytest.mark.parametrize("error_rate", [0.1, 0.05])
def test_known_images_are_called_unknown_at_the_error_rate(error_rate: float) -> None:
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(200):
        points = in_clusters(rng, 130)
        known, new = points[:100], points[100:]
        errors.append(p_values(leave_one_out(known), kth_similarity(new, known)) <= error_rate)
    assert np.mean(errors) == pytest.approx(error_rate, abs=0.015)


def test_a_p_value_is_never_below_that_of_full_conformal_prediction() -> None:
    """Full conformal prediction adds the new image to the known images before it leaves one out. Its error rate is
    exact. Without the new image, similarities to the k-th neighbour can only be lower, so p-values can only be
    higher."""
    rng = np.random.default_rng(2)
    points = in_clusters(rng, 90)
    known = points[:60]
    for new in points[60:]:
        ours = p_values(leave_one_out(known), kth_similarity(new[None], known))[0]
        together = np.concatenate([known, new[None]])
        similarities = together @ together.T
        np.fill_diagonal(similarities, -2)
        scores = np.sort(similarities, axis=1)[:, -K]
        full = np.mean(scores <= scores[-1])
        assert ours >= full - 1e-12
