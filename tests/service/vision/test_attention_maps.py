"""Tests of attention maps, against plain definitions in float64 and against the complete matrices."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from service.vision import attention_maps
from service.vision.attention_maps import (
    class_weights,
    entropy,
    fuse_heads,
    patch_attention,
    renormalised,
    rollout,
    stretched,
    top_mass,
)

DEPTH, HEADS, WIDTH, TOKENS = 3, 4, 24, 17
FUSE = {"mean": np.mean, "max": np.max, "min": np.min}


@pytest.fixture(scope="module")
def outputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = [f"{name}.{block}" for block in range(DEPTH) for name in ("queries", "keys")]
    return {name: rng.normal(size=(TOKENS, WIDTH)).astype(np.float32) for name in names}


def matrices(outputs: dict[str, np.ndarray], block: int) -> np.ndarray:
    """Return the attention matrices of a block by the definition, float64 [A, T, T]."""
    q, k = (outputs[f"{name}.{block}"].astype(np.float64) for name in ("queries", "keys"))
    d = WIDTH // HEADS
    rows = []
    for head in range(HEADS):
        own = slice(head * d, (head + 1) * d)
        weights = np.exp(q[:, own] @ k[:, own].T / math.sqrt(d))
        rows.append(weights / weights.sum(1, keepdims=True))
    return np.stack(rows)


@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [2], [3, 1]])
@pytest.mark.parametrize("block", range(DEPTH))
def test_weights_are_the_class_row_of_the_matrix(outputs: dict[str, np.ndarray], block: int, heads: list[int]) -> None:
    queries, keys = outputs[f"queries.{block}"].copy(), outputs[f"keys.{block}"].copy()
    weights = class_weights(queries, keys, HEADS, heads)
    np.testing.assert_allclose(weights, matrices(outputs, block)[heads, 0], atol=1e-6)
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(queries, outputs[f"queries.{block}"])
    np.testing.assert_array_equal(keys, outputs[f"keys.{block}"])


def test_large_logits_do_not_overflow() -> None:
    rows = np.full((3, 4), 1e3, np.float32)
    rows[2] *= -1
    np.testing.assert_allclose(class_weights(rows, rows, 2, [0, 1]), [[0.5, 0.5, 0]] * 2)
    outputs = {"queries.0": rows, "keys.0": rows}
    np.testing.assert_allclose(rollout(outputs, 1, 2, [0, 1], "mean"), [0.75, 0.25, 0])


@pytest.mark.parametrize("fusion", FUSE)
@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [2], [3, 1]])
def test_rollout_is_the_product_of_the_matrices(outputs: dict[str, np.ndarray], fusion: str, heads: list[int]) -> None:
    before = {name: array.copy() for name, array in outputs.items()}
    product = np.eye(TOKENS)
    for block in range(DEPTH):
        mixed = FUSE[fusion](matrices(outputs, block)[heads], axis=0) + np.eye(TOKENS)
        product = (mixed / mixed.sum(1, keepdims=True)) @ product
    row = rollout(outputs, DEPTH, HEADS, heads, fusion)
    np.testing.assert_allclose(row, product[0], atol=1e-6)
    assert row.sum() == pytest.approx(1, abs=1e-6)
    assert all(np.array_equal(before[name], outputs[name]) for name in outputs)


def test_rollout_in_blocks_of_rows(outputs: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rollout(outputs, DEPTH, HEADS, [0, 1], "max")
    monkeypatch.setattr(attention_maps, "_ROWS", 5)
    np.testing.assert_allclose(rollout(outputs, DEPTH, HEADS, [0, 1], "max"), whole, atol=1e-7)


@pytest.mark.parametrize("fusion", FUSE)
def test_heads_are_fused_weight_by_weight(fusion: str) -> None:
    weights = np.random.default_rng(1).random((2, 3, 5), np.float32)
    fused = fuse_heads(weights, fusion)
    assert fused.shape == (2, 1, 5)
    np.testing.assert_allclose(fused[:, 0], FUSE[fusion](weights, 1), rtol=1e-6)


@pytest.mark.parametrize("registers", [0, 1, 4])
def test_special_tokens_are_removed_by_count(registers: int) -> None:
    weights = np.random.default_rng(2).random((2, 3, 11), np.float32)
    weights /= weights.sum(-1, keepdims=True)
    split = patch_attention(weights, registers)
    np.testing.assert_array_equal(split.patches, weights[..., 1 + registers :])
    np.testing.assert_allclose(split.class_share, weights[..., 0], rtol=1e-6)
    np.testing.assert_allclose(split.register_share, weights[..., 1 : 1 + registers].sum(-1), rtol=1e-6, atol=1e-9)
    rest = split.patches.sum(-1)
    assert (rest < 1).all()
    np.testing.assert_allclose(rest + split.class_share + split.register_share, 1, atol=1e-6)
    whole = renormalised(split.patches)
    np.testing.assert_allclose(whole.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(whole, split.patches / rest[..., None], rtol=1e-5)


def test_shares_of_a_fused_row_are_fractions_of_its_sum() -> None:
    split = patch_attention(np.array([0.8, 0.4, 0.2, 0.2], np.float32), registers=1)  # sums to 1.6
    assert (split.class_share, split.register_share) == (pytest.approx(0.5), pytest.approx(0.25))


def test_the_smallest_set_that_holds_the_share() -> None:
    maps = np.array([[0.1, 0.4, 0.2, 0.3], [0.3, 0.3, 0.3, 0.3], [0, 0, 0, 0], [0, 1, 0, 0]], np.float32)
    assert top_mass(maps, 0.6).astype(int).tolist() == [[0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert top_mass(maps, 1).astype(int).tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert top_mass(maps, 1e-6).sum(-1).tolist() == [1, 1, 0, 1]


@settings(max_examples=200, deadline=None)
@given(arrays.arrays(np.float32, 9, elements=st.floats(0, 1, width=32)), st.floats(0.01, 0.99))
def test_no_smaller_set_would_do(weights: np.ndarray, share: float) -> None:
    marked = top_mass(weights, share)
    total, held = weights.sum(dtype=np.float64), weights[marked].sum(dtype=np.float64)
    assert held >= share * total * (1 - 1e-12)
    if marked.any():
        heaviest = np.sort(weights.astype(np.float64))[::-1]
        assert heaviest[: marked.sum() - 1].sum() < share * total * (1 + 1e-12)
        assert weights[marked].min() >= weights[~marked].max(initial=0)


def test_dinos_rule_gives_the_same_set() -> None:
    """DINO sorts the weights in ascending order and keeps those whose cumulative sum is above 1 - share."""
    maps = np.random.default_rng(3).random((6, 40)).astype(np.float32) ** 4
    for weights, marked in zip(maps, top_mass(maps, 0.6), strict=True):
        order = np.argsort(weights)
        sums = np.cumsum(weights[order] / weights.sum(), dtype=np.float64)
        kept = np.zeros(40, bool)
        kept[order[sums > 0.4]] = True
        np.testing.assert_array_equal(marked, kept)


def test_entropy_runs_from_one_patch_to_all() -> None:
    maps = np.array([[0, 0, 0.3, 0], [0.2, 0.2, 0.2, 0.2], [0.5, 0.25, 0.25, 0], [0, 0, 0, 0]], np.float32)
    assert entropy(maps).tolist() == pytest.approx([0, math.log(4), 1.5 * math.log(2), 0], abs=1e-6)


def test_maps_stretch_from_0_to_1() -> None:
    maps = np.array([[0.1, 0.2, 0.3], [0.2, 0.2, 0.2]], np.float32)
    np.testing.assert_allclose(stretched(maps), [[0, 0.5, 1], [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(renormalised(np.zeros((1, 3), np.float32)), 0)
