"""Tests of segmentation with a head: the class of a pixel is the one with the largest interpolated logit."""

import numpy as np
import pytest

from service.vision import linear
from service.vision.linear import pixel_classes
from service.vision.pictures import to_image

RNG = np.random.default_rng(0)
BOX = (3.5, 2.0, 20.0, 24.5)
SIZE = (30, 26)


def plain(logits: np.ndarray) -> np.ndarray:
    """Interpolate the map of each class, and compare the maps pixel by pixel."""
    maps = np.stack([to_image(one, SIZE, BOX, outside=np.nan) for one in logits])
    return np.where(np.isnan(maps[0]), 0, 1 + np.nan_to_num(maps, nan=0).argmax(axis=0))


@pytest.mark.parametrize("block", [1, 500, 10**9])
def test_classes_are_those_of_the_interpolated_logits(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_BLOCK_LOGITS", block)
    logits = RNG.standard_normal((5, 4, 3), dtype=np.float32)
    labels = pixel_classes(logits, SIZE, BOX)
    assert (labels.shape, labels.dtype) == (SIZE, np.uint8)
    np.testing.assert_array_equal(labels, plain(logits))
    assert len(np.unique(labels)) == 6


def test_a_large_image_with_many_classes_is_computed_on_a_coarser_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.repeat(np.repeat(RNG.standard_normal((3, 2, 2), dtype=np.float32), 4, axis=1), 4, axis=2)
    exact = pixel_classes(logits, (160, 120), (10.0, 0.0, 100.0, 160.0))
    monkeypatch.setattr(linear, "MAX_LOGITS", 3 * 40 * 30)
    coarse = pixel_classes(logits, (160, 120), (10.0, 0.0, 100.0, 160.0))
    assert coarse.shape == exact.shape
    assert (coarse == exact).mean() > 0.9
    assert (coarse == 0).any()


def test_a_part_outside_the_image_is_ignored() -> None:
    """If the preprocessing pads images, the box of the patches is larger than the image."""
    logits = np.zeros((2, 2, 2), np.float32)
    logits[1, :, 1] = 1
    labels = pixel_classes(logits, (4, 8), (0.0, -2.0, 8.0, 8.0))
    # The left patches have their centre at x = 2, so the logit of class 1 is above 0 from pixel 2 on.
    np.testing.assert_array_equal(labels, np.repeat([[1, 1, 2, 2, 2, 2, 2, 2]], 4, axis=0))
