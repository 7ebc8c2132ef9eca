"""Tests of the positions of images on a map."""

import numpy as np
import pytest

from training.curate import map2d
from training.curate.map2d import moments, positions


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def test_the_map_shows_the_principal_components() -> None:
    draws = np.random.default_rng(0)
    embedding = unit(draws.normal(size=(500, 6)) * [5, 3, 1, 0.5, 0.5, 0.5])
    xy, shown = positions(embedding)
    centred = embedding - embedding.mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    for axis in range(2):
        expected = centred @ directions[axis]
        assert abs(np.corrcoef(xy[:, axis], expected)[0, 1]) > 0.9999
        largest = np.abs(directions[axis]).argmax()
        assert np.corrcoef(xy[:, axis], centred[:, largest])[0, 1] > 0
    assert shown == pytest.approx((sizes[:2] ** 2).sum() / (sizes**2).sum(), abs=1e-3)
    spread = xy.max(axis=0) - xy.min(axis=0)
    assert spread.max() == pytest.approx(1)
    assert (xy.max(axis=0) + xy.min(axis=0)).tolist() == pytest.approx([1, 1])
    assert spread[0] / spread[1] == pytest.approx(
        np.ptp(centred @ directions[0]) / np.ptp(centred @ directions[1]), 1e-3
    )


def test_the_map_does_not_depend_on_blocks_or_on_the_order_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = unit(np.random.default_rng(1).normal(size=(300, 16)))
    xy, _ = positions(embedding)
    total, products = moments(embedding)
    monkeypatch.setattr(map2d, "BLOCK", 7)
    for sums in (moments(embedding), moments(embedding[::-1])):
        assert (sums[0] == total).all()
        assert (sums[1] == products).all()
    assert (positions(embedding)[0] == xy).all()
    assert (positions(embedding[::-1])[0][::-1] == xy).all()


@pytest.mark.parametrize(
    "embedding", [np.ones((1, 4), np.float32), np.zeros((5, 3), np.float32), np.ones((3, 1), np.float32)]
)
def test_images_that_are_all_alike_have_one_position(embedding: np.ndarray) -> None:
    xy, _ = positions(embedding)
    assert xy.tolist() == [[0.5, 0.5]] * len(embedding)
