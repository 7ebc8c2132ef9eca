"""Tests of poolings: the parts that they join, the widths of their vectors, and that all callers compute the same
vectors.
"""

import numpy as np
import pytest

from model.pooling import DEFAULT_POOLING, PARTS, PATCH_PARTS, POOLINGS, parts_of, pool, width


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def join(parts: object) -> np.ndarray:
    return np.concatenate(parts, axis=-1)


def test_the_poolings_are_these() -> None:
    assert POOLINGS == ("cls", "mean", "cls+mean")
    assert DEFAULT_POOLING == "cls"
    assert [parts_of(pooling) for pooling in POOLINGS] == [("cls",), ("mean",), ("cls", "mean")]
    assert [width(pooling, 384) for pooling in POOLINGS] == [384, 384, 768]


def test_the_parts_are_those_that_the_poolings_join() -> None:
    assert set(PARTS) == {part for pooling in POOLINGS for part in parts_of(pooling)}
    patches = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(PATCH_PARTS["mean"](patches), [[4, 5, 6, 7], [16, 17, 18, 19]])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_single_part_is_left_alone_and_joined_parts_have_length_one(pooling: str) -> None:
    rng = np.random.default_rng(0)
    parts = {"cls": 10 * rng.standard_normal((3, 5)), "mean": rng.standard_normal((3, 5))}
    vectors = pool(parts, pooling, unit=unit, join=join)
    assert vectors.shape == (3, width(pooling, 5))
    if pooling == "cls+mean":
        np.testing.assert_allclose(np.linalg.norm(vectors[:, :5], axis=1), 1)
        np.testing.assert_allclose(np.linalg.norm(vectors[:, 5:], axis=1), 1)
        np.testing.assert_allclose(vectors[:, :5], unit(parts["cls"]))
    else:
        np.testing.assert_array_equal(vectors, parts[pooling])


def test_an_unknown_pooling_is_an_error() -> None:
    with pytest.raises(KeyError):
        pool({"cls": np.ones(2), "mean": np.ones(2)}, "max", unit=unit, join=join)
