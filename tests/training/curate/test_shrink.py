"""Shrinking with matrices gives Pillow's pixels, for every order of the two passes."""

import numpy as np
import pytest
from PIL import Image

from training.curate import shrink as module
from training.curate.shrink import BICUBIC, LANCZOS, Filter, shrink

FILTERS = [(BICUBIC, Image.Resampling.BICUBIC), (LANCZOS, Image.Resampling.LANCZOS)]
SHAPES = [
    (348, 348),
    (464, 348),
    (665, 348),
    (664, 348),
    (100, 701),
    (33, 24),
    (49, 40),
    (48, 40),
    (7, 9),
    (1, 1),
    (32, 90),
]


@pytest.mark.parametrize(("by", "resampling"), FILTERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(32, 32), (64, 41), (1, 64)])
def test_the_pixels_are_those_of_pillow(
    by: Filter, resampling: Image.Resampling, shape: tuple[int, int], size: tuple[int, int]
) -> None:
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, shape, dtype=np.uint8)
    for gray in (noise, (noise > 127).astype(np.uint8) * 255):  # the second overshoots 0 and 255
        assert (shrink(gray, size, by) == np.asarray(Image.fromarray(gray).resize(size, resampling))).all()


def test_the_pixels_do_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    gray = np.random.default_rng(0).integers(0, 256, (90, 120), dtype=np.uint8)
    whole = shrink(gray, (32, 32), LANCZOS)
    monkeypatch.setattr(module, "_BLOCK_PIXELS", 500)
    assert (shrink(gray, (32, 32), LANCZOS) == whole).all()
