"""Tests of prototypes: compared with their definition, one example at a time."""

import numpy as np
import pytest

from service.vision.prototypes import Prototypes

D = 5


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def examples(count: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, D)))


def test_a_prototype_is_the_mean_of_unit_vectors() -> None:
    rows, labels = examples(5), ["b", "a", "b", "a", "b"]
    prototypes = Prototypes.of(rows, labels)
    assert prototypes.names == ("b", "a")
    expected = np.stack([unit(rows[[0, 2, 4]].mean(axis=0)), unit(rows[[1, 3]].mean(axis=0))])
    queries = examples(7, seed=1)
    np.testing.assert_allclose(prototypes.similarities(queries), queries @ expected.T, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_leave_one_out_makes_the_prototypes_again_without_the_example(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = [f"c{label}" for label in rng.integers(0, 4, 14)] + ["alone"]
    rows = examples(15, seed)
    expected = []
    for left_out in range(15):
        rest = [i for i in range(15) if i != left_out]
        if labels[left_out] not in [labels[i] for i in rest]:
            continue
        without = Prototypes.of(rows[rest], [labels[i] for i in rest])
        expected.append(without.similarities(rows[left_out : left_out + 1]).max())
    assert len(expected) < 15  # "alone" has no further example
    np.testing.assert_allclose(Prototypes.of(rows, labels).leave_one_out(), np.sort(expected), atol=1e-6)


def test_classes_with_one_example_have_nothing_to_leave_out() -> None:
    assert Prototypes.of(examples(3), ["a", "b", "c"]).leave_one_out().shape == (0,)


def test_opposite_examples_have_no_direction() -> None:
    rows = np.stack([examples(1)[0], -examples(1)[0]])
    prototypes = Prototypes.of(rows, ["a", "a"])
    np.testing.assert_array_equal(prototypes.similarities(examples(2, seed=3)), np.zeros((2, 1)))
