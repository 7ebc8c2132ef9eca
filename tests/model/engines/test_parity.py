"""The comparison's own arithmetic: crops at other sizes, and values that are not finite."""

import numpy as np
import pytest

from model.artifact import ParityRecord
from model.engines import parity
from model.engines.parity import pixels_at
from model.engines.protocol import Features
from model.preprocess import PreprocessSpec, preprocess

SPEC = PreprocessSpec(resize=80, crop=70)


def test_photos_at_other_sizes_show_the_same_crop() -> None:
    photos = parity.sample_photos(2)
    same = pixels_at(photos, SPEC, (70, 70))
    np.testing.assert_array_equal(same[0], preprocess(photos[0], SPEC))
    double, wide = pixels_at(photos, SPEC, (140, 140)), pixels_at(photos, SPEC, (84, 140))
    assert double.shape == (2, 3, 140, 140)
    np.testing.assert_array_equal(wide, double[:, :, 28:112])
    shrunk = double.reshape(2, 3, 70, 2, 70, 2).mean(axis=(3, 5))
    assert np.corrcoef(shrunk.ravel(), same.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("part", ["cls", "patches", "registers"])
def test_a_nan_anywhere_is_no_parity(part: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {"cls": (3, 8), "patches": (3, 4, 8), "registers": (3, 2, 8)}
    theirs = Features(**{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})
    ours = Features(*(array.copy() for array in theirs))
    getattr(ours, part).flat[5] = np.nan
    error, cls, patches, agreement = parity.compare(theirs, ours)
    record = ParityRecord(
        engine="x",
        precision="bf16",
        images=3,
        max_abs_error=error,
        min_cosine_cls=cls,
        min_cosine_patches=patches,
        neighbour_agreement=agreement,
    )
    assert np.isnan(error)
    with pytest.raises(parity.ParityError, match="max error nan"):
        parity.check(record)


def test_a_nan_in_a_further_output_is_no_parity() -> None:
    record = ParityRecord(
        engine="x",
        precision="bf16",
        images=3,
        max_abs_error=0.0,
        min_cosine_cls=1.0,
        min_cosine_patches=1.0,
        neighbour_agreement=1.0,
    )
    right = np.ones((2, 3, 4), np.float32)
    wrong = right.copy()
    wrong[1, 1, 1] = np.nan
    with pytest.raises(parity.ParityError):
        parity.check(parity.with_extras(record, {"layer.0": right}, {"layer.0": wrong}))
