"""Tests of the parity check's arithmetic: crops at other sizes, and values that are not finite."""

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


def perfect(precision: str) -> ParityRecord:
    return ParityRecord(
        engine="x",
        precision=precision,
        images=3,
        max_abs_error=0.0,
        min_cosine_cls=1.0,
        min_cosine_patches=1.0,
        neighbour_agreement=1.0,
    )


# What an engine of each precision may have and still serve.
FIGURES = ("max_abs_error", "min_cosine_cls", "min_cosine_patches")
ALLOWED = {
    "fp32": (1e-3, 0.99999, 0.9999),
    "fp16": (np.inf, 0.999, 0.998),
    "bf16": (np.inf, 0.999, 0.998),
    "fp8": (np.inf, 0.999, 0.998),
    "int8": (np.inf, 0.998, 0.998),
}


@pytest.mark.parametrize("precision", ALLOWED)
@pytest.mark.parametrize("figure", FIGURES)
def test_each_figure_alone_decides_at_its_limit(precision: str, figure: str) -> None:
    limit = ALLOWED[precision][FIGURES.index(figure)]
    parity.check(perfect(precision).model_copy(update={figure: limit}))
    beyond = limit * 1.001 if figure == "max_abs_error" else limit - 1e-6
    worse = perfect(precision).model_copy(update={figure: beyond})
    if np.isinf(beyond):
        parity.check(worse)
    else:
        with pytest.raises(parity.ParityError, match=f"x {precision} differs too much from torch float32 on 3 images"):
            parity.check(worse)


def test_the_figures_are_of_the_worst_vector_and_value() -> None:
    rng = np.random.default_rng(1)
    theirs = Features(*(rng.normal(size=shape).astype(np.float32) for shape in ((3, 8), (3, 4, 8), (3, 2, 8))))
    ours = Features(*(array.copy() for array in theirs))
    ours.cls[1] = np.roll(theirs.cls[1], 1)
    ours.patches[2, 3] *= -1
    ours.registers[0, 1, 4] += 50
    error, cls, patches, _ = parity.compare(theirs, ours)
    a, b = theirs.cls[1], ours.cls[1]
    assert error == pytest.approx(50, rel=1e-5)
    assert cls == pytest.approx(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), abs=1e-5)
    assert patches == pytest.approx(-1, abs=1e-5)


def test_further_outputs_count_by_their_worst() -> None:
    theirs = np.eye(4, dtype=np.float32)[None]  # [1, 4, 4]
    ours = theirs.copy()
    ours[0, 2] = (0.0, 0.6, 0.8, 0.0)
    found = parity.with_extras(perfect("fp16"), {"a": theirs, "b": theirs}, {"a": theirs, "b": ours})
    assert found.max_abs_error == pytest.approx(0.6)
    assert found.min_cosine_patches == pytest.approx(0.8)
    assert found.min_cosine_cls == 1.0


def means(pixels: np.ndarray) -> Features:
    colours = pixels.mean(axis=(2, 3))
    return Features(colours, colours[:, None], colours[:, :0, None])


class Recorded:
    """An engine that records the size of each batch."""

    name, precision, device = "mean", "fp32", "cpu"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def run(self, pixels: np.ndarray) -> Features:
        self.batches.append(len(pixels))
        found = means(pixels)
        if len(pixels) > 4:  # the last rows of a large batch are wrong
            found.cls[5:] *= -1
        return found

    def close(self) -> None:
        pass


def test_a_batch_larger_than_the_set_is_filled_and_each_row_of_it_is_compared() -> None:
    pixels = np.random.default_rng(0).random((5, 3, 4, 4)).astype(np.float32)
    reference = means(pixels)
    engine = Recorded()
    record = parity.measure(reference, engine, pixels, batch=8)
    assert engine.batches == [8]
    assert (record.images, record.batch) == (5, 8)
    assert record.min_cosine_cls == pytest.approx(-1, abs=1e-5)
    assert record.neighbour_agreement == 1.0  # of the five images, none of them twice


def test_a_nan_in_a_further_output_is_no_parity() -> None:
    record = perfect("bf16")
    right = np.ones((2, 3, 4), np.float32)
    wrong = right.copy()
    wrong[1, 1, 1] = np.nan
    with pytest.raises(parity.ParityError):
        parity.check(parity.with_extras(record, {"layer.0": right}, {"layer.0": wrong}))
