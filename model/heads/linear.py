"""Computes linear heads with numpy: classification, segmentation and depth.

The depth rule is that of facebookresearch/dinov2 (`dinov2/hub/depth/decode_heads.py`): the logits of K bins are
enlarged by a factor of 4, the weight of a bin is relu(logit) + 0.1 divided by the sum of these values over all bins,
and the depth is the weighted mean of K evenly spaced depths. Meta's code enlarges the tokens and then computes the
logits. This module computes the logits first. This takes a sixteenth of the multiplications, and the result is the
same, because bilinear weights sum to 1.

Legend: C classes, D width, F inputs of a head, h x w = N patches, K bins, n blocks.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from model.heads.record import Floats

UPSAMPLE: Final = 4
BIN_FLOOR: Final = 0.1
_BLOCK_FLOATS: Final = 1 << 16  # number of logits that are enlarged at a time; they fit into the cache of a core


def fold_batch_norm(weight: Floats, bias: Floats, norm: Sequence[Floats], eps: float) -> tuple[Floats, Floats]:
    """Fold batch normalisation into the linear layer that follows it. Return the weight [C, F] and the bias [C] of the
    combined layer.

    Args:
        weight: the weight of the given linear layer, [C, F].
        bias: the bias of the given linear layer, [C].
        norm: the scale, shift, running mean and running variance of the normalisation, each [F].
        eps: the number that the normalisation adds to the variance.
    """
    scale, shift, mean, variance = (part.astype(np.float64) for part in norm)
    gain = scale / np.sqrt(variance + eps)
    wide = weight.astype(np.float64)
    return (wide * gain).astype(np.float32), (wide @ (shift - mean * gain) + bias).astype(np.float32)


def layer_norm(tokens: Floats, weight: Floats, bias: Floats, eps: float) -> Floats:
    """Apply layer normalisation to tokens [..., D]."""
    centred = tokens - tokens.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(eps))
    return np.asarray(centred / deviation * weight + bias, np.float32)


def classification_logits(weight: Floats, bias: Floats, cls: Sequence[Floats], mean_patch: Floats) -> Floats:
    """Compute the logits [C] of one image from the class tokens [D] of n blocks and the mean patch token [D]."""
    return np.asarray(weight @ np.concatenate([*cls, mean_patch]) + bias, np.float32)


def segmentation_logits(weight: Floats, bias: Floats, patches: Sequence[Floats], grid: tuple[int, int]) -> Floats:
    """Compute the logits [C, h, w] from the patch tokens [N, D] of n blocks."""
    logits = bias[:, None] + sum(part @ tokens.T for part, tokens in zip(_split(weight, patches), patches, strict=True))
    return np.asarray(logits, np.float32).reshape(-1, *grid)


def depth_map(
    weight: Floats,
    bias: Floats,
    layers: Sequence[tuple[Floats, Floats]],
    grid: tuple[int, int],
    depth_range: tuple[float, float],
) -> Floats:
    """Compute depths in metres, [4h, 4w].

    Args:
        weight: [K, 2nD].
        bias: [K].
        layers: the class token [D] and the patch tokens [N, D] of each of n blocks.
        grid: (h, w).
        depth_range: the depths of the first and the last bin, in metres.
    """
    parts = [part for cls, patches in layers for part in (patches, cls)]
    columns = _split(weight, parts)
    logits = bias + sum(tokens @ part.T for part, tokens in zip(columns, parts, strict=True))  # [N, K]
    h, w = grid
    logits = np.ascontiguousarray(logits, np.float32).reshape(h, w * len(bias))
    down, across = (bilinear_weights(side, UPSAMPLE * side) for side in grid)  # [4h, h], [4w, w]
    bins = np.linspace(*depth_range, len(bias), dtype=np.float32)
    sums = np.stack([np.ones_like(bins), bins], axis=1)  # [K, 2]
    floor = BIN_FLOOR * sums.sum(axis=0)  # what 0.1 for each bin adds to the two sums
    metres = np.empty((UPSAMPLE * h, UPSAMPLE * w), np.float32)
    rows = max(1, _BLOCK_FLOATS // (UPSAMPLE * w * len(bias)))
    for top in range(0, len(metres), rows):
        part = (down[top : top + rows] @ logits).reshape(-1, w, len(bias))
        part = across @ part  # [rows, 4w, K]
        np.maximum(part, 0, out=part)
        both = part @ sums + floor
        metres[top : top + rows] = both[..., 1] / both[..., 0]
    return metres


def bilinear_weights(side: int, new_side: int) -> Floats:
    """Return the matrix [new_side, side] that resizes a row of `side` values bilinearly, as in torch's `interpolate`
    with `align_corners=False`."""
    centres = np.clip((np.arange(new_side) + 0.5) * side / new_side - 0.5, 0, side - 1)
    low = np.minimum(centres.astype(np.int64), max(0, side - 2))
    share = centres - low
    matrix = np.zeros((new_side, side), np.float64)
    at = np.arange(new_side)
    matrix[at, low] += 1 - share
    matrix[at, np.minimum(low + 1, side - 1)] += share
    return matrix.astype(np.float32)


def _split(weight: Floats, parts: Sequence[Floats]) -> list[Floats]:
    """Split the columns of a weight [C, F] into one matrix for each part of the input."""
    ends = np.cumsum([part.shape[-1] for part in parts])
    return np.split(weight, ends[:-1], axis=1)
