"""Compute attention maps: how much weight the class token gives to each patch, in any block and head.

The weights are softmax(q k^T / sqrt(d)), computed from the queries and keys that the engine returns. Only the class
token's row of this matrix is computed. Rollout (Abnar and Zuidema 2020, arXiv 2005.00928) follows the attention through
all blocks, and needs their complete attention matrices A. It is the product of the matrices (A + I) / 2 of all blocks.
Only the class token's row of this product is needed, so a row vector is multiplied with the matrices from the last
block to the first. This avoids products of two T x T matrices.

The class token also attends to itself and to the registers. The first 1 + R columns, which belong to these tokens, are
removed. The remaining weights, those of the patches, therefore sum to less than 1.

Legend: L blocks, A heads of a block, D width, d = D / A; h, w size of the patch grid, N = h * w patches; R registers;
T = 1 + R + N tokens: class, registers, patches in row-major order.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
HeadFusion = Literal["mean", "max", "min"]

_ROWS: Final = 256


class PatchAttention(NamedTuple):
    """The weights that the class token gives to the patches, float32 [..., N], and its remaining weight, as two shares
    [...] of the total: that of the class token itself, and that of all registers."""

    patches: Floats
    class_share: Floats
    register_share: Floats


def class_weights(queries: Floats, keys: Floats, num_heads: int, heads: Sequence[int]) -> Floats:
    """Return the class token's attention weights over all tokens in the chosen heads of one block, float32 [heads, T].
    Each row sums to 1. `queries` and `keys` are [T, D], with the heads side by side."""
    tokens, width = keys.shape
    split = (num_heads, width // num_heads)
    by_head = keys.reshape(tokens, *split)[:, heads].transpose(1, 0, 2)  # [heads, T, d]
    logits = by_head @ queries[0].reshape(*split)[heads][:, :, None]  # [heads, T, 1]
    return _softmax(logits[:, :, 0] * np.float32(split[1] ** -0.5))


def rollout(
    outputs: Mapping[str, Floats], depth: int, num_heads: int, heads: Sequence[int], fusion: HeadFusion
) -> Floats:
    """Return the class token's row of the attention rollout over all blocks, float32 [T]. The row sums to 1.

    In each block, the chosen heads are fused into one matrix A, and the rows of A + I are scaled to sum 1. `outputs`
    has `queries.<i>` and `keys.<i>` [T, D] of all blocks.
    """
    row = np.zeros(len(outputs["queries.0"]), np.float32)
    row[0] = 1
    for block in reversed(range(depth)):
        queries, keys = outputs[f"queries.{block}"], outputs[f"keys.{block}"]
        row = _step_back(row, queries, keys, num_heads, heads, fusion)
    return row


def _step_back(
    row: Floats, queries: Floats, keys: Floats, num_heads: int, heads: Sequence[int], fusion: HeadFusion
) -> Floats:
    """Return the product of `row` [T] and the matrix A + I of one block, whose rows are scaled to sum 1. The rows of A
    are computed a few at a time, so that they stay in the CPU's cache and large inputs need little memory."""
    stepped = np.zeros_like(row)
    used = np.flatnonzero(row)  # in the last block, only the class token
    for start in range(0, len(used), _ROWS):
        rows = used[start : start + _ROWS]
        fused = _fused_weights(queries[rows], keys, num_heads, heads, fusion)  # [rows, T]
        scale = row[rows] / (fused.sum(axis=1) + 1)  # a row of A + I sums to that of A, plus 1
        stepped += scale @ fused
        stepped[rows] += scale
    return stepped


def _fused_weights(queries: Floats, keys: Floats, num_heads: int, heads: Sequence[int], fusion: HeadFusion) -> Floats:
    """Return the attention weights [Q, T] of the queries [Q, D] over the keys [T, D], fused over the chosen heads."""
    fused = _head_weights(queries, keys, num_heads, heads[0])
    for head in heads[1:]:
        weights = _head_weights(queries, keys, num_heads, head)
        if fusion == "mean":
            fused += weights
        else:
            (np.maximum if fusion == "max" else np.minimum)(fused, weights, out=fused)
    if fusion == "mean":
        fused /= len(heads)
    return fused


def _head_weights(queries: Floats, keys: Floats, num_heads: int, head: int) -> Floats:
    """Return the attention weights [Q, T] of the queries [Q, D] over the keys [T, D] in one head."""
    size = keys.shape[1] // num_heads
    columns = slice(head * size, (head + 1) * size)
    scaled: Floats = queries[:, columns] * np.float32(size**-0.5)
    return _softmax(scaled @ keys[:, columns].T)


def _softmax(logits: Floats) -> Floats:
    """Return the softmax of each row [..., T]. `logits` is overwritten."""
    logits -= logits.max(axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)
    return logits


def fuse_heads(weights: Floats, fusion: HeadFusion) -> Floats:
    """Fuse the weights [L, A, T] of several heads into [L, 1, T]. If the fusion is a maximum, the rows of the result
    can sum to more than 1; if it is a minimum, to less."""
    if fusion == "mean":
        return np.asarray(weights.mean(axis=1, keepdims=True))
    return np.asarray((np.max if fusion == "max" else np.min)(weights, axis=1, keepdims=True))


def patch_attention(weights: Floats, registers: int) -> PatchAttention:
    """Split the weights [..., T] into those of the patches, the class token and the registers."""
    totals = weights.sum(axis=-1)
    own, special = weights[..., 0], weights[..., 1 : 1 + registers].sum(axis=-1)
    return PatchAttention(weights[..., 1 + registers :], own / totals, special / totals)


def renormalised(maps: Floats) -> Floats:
    """Scale maps [..., N] so that each sums to 1. A map of zeros stays zero."""
    totals = maps.sum(axis=-1, keepdims=True)
    return np.asarray(np.divide(maps, totals, out=np.zeros_like(maps), where=totals > 0))


def stretched(maps: Floats) -> Floats:
    """Scale maps [..., N] so that the lowest value of each becomes 0 and the highest becomes 1. A constant map becomes
    0."""
    low = maps.min(axis=-1, keepdims=True)
    span = maps.max(axis=-1, keepdims=True) - low
    return np.asarray(np.divide(maps - low, span, out=np.zeros_like(maps), where=span > 0))


def entropy(maps: Floats) -> Floats:
    """Return the entropy of each map [..., N] in nats, after scaling the map to sum 1. The result [...] goes from 0, if
    one patch has all the weight, to ln N, if all patches have the same weight. It is 0 for a map of zeros."""
    shares = renormalised(maps)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.asarray(np.maximum(-(shares * logs).sum(axis=-1), 0))


def top_mass(maps: Floats, share: float) -> npt.NDArray[np.bool_]:
    """Mark the smallest set of patches that holds at least `share` of the weight of each map [..., N]. `share` is above
    0 and at most 1. DINO (arXiv 2104.14294, figure 3) uses 0.6. Among patches of the same weight, those that come first
    are marked first. A map of zeros has no marked patch."""
    order = np.argsort(-maps, axis=-1, kind="stable")
    heaviest = np.take_along_axis(maps, order, axis=-1).astype(np.float64)
    sums = heaviest.cumsum(axis=-1)
    wanted = sums - heaviest < share * sums[..., -1:]  # the heavier patches alone do not hold the share
    marked = np.zeros(maps.shape, bool)
    np.put_along_axis(marked, order, wanted & (heaviest > 0), axis=-1)
    return marked
