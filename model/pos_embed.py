"""Resizes position embeddings to another grid of patches, by one of three rules.

A backbone stores positions for one square grid of M x M patches (37 x 37 for the published weights, trained at 518
pixels). For any other grid, the positions are resized bicubically. The published implementations resize an axis from M
to n patches by different rules:

- `offset`: by the factor (n + 0.1) / M, without antialiasing. Meta's models without registers use this rule. Meta added
  the 0.1 as a guard against rounding, but it shifts every sampling point, so the features depend on it.
- `antialias`: by the factor n / M, with a wider kernel when the grid shrinks. Every model with registers uses this
  rule, and so do all of timm's models.
- `size`: by the factor n / M, without antialiasing. Hugging Face's models without registers use this rule.

For every grid except M x M, the rules give different features, so the rule is part of a model's fingerprint.

Bicubic resizing is linear and separable, so the positions P are resized by two small matrices, Wh for the rows and Ww
for the columns: `P' = Wh @ P @ Ww^T`. This module computes the matrices in numpy. The torch model applies them. The
ONNX writer applies them to store positions that are already resized for one input size. The tests compare the resized
positions with those from `torch.nn.functional.interpolate`.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from model.config import PosEmbedRule

FloatArray = npt.NDArray[np.float32]


def _cubic(distance: npt.NDArray[np.float64], a: float) -> npt.NDArray[np.float64]:
    """Evaluate Keys' cubic convolution kernel (IEEE ASSP 29, 1981) with parameter `a` at each distance."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _sampled(n_in: int, n_out: int, step: float) -> npt.NDArray[np.float64]:
    """Return the matrix [n_out, n_in] that samples an axis of n_in cells at n_out points, `step` cells apart.

    The kernel is cubic with parameter a = -0.75. Cells beyond the border have the value of the border cell.
    """
    matrix = np.zeros((n_out, n_in))
    source = (np.arange(n_out) + 0.5) * step - 0.5
    first = np.floor(source).astype(int)
    for tap in range(-1, 3):
        weights = _cubic(source - (first + tap), a=-0.75)
        np.add.at(matrix, (np.arange(n_out), np.clip(first + tap, 0, n_in - 1)), weights)
    return matrix


def _antialiased(n_in: int, n_out: int) -> npt.NDArray[np.float64]:
    """Return the matrix [n_out, n_in] that resizes an axis from n_in to n_out cells with antialiasing.

    The kernel is cubic with parameter a = -0.5. If n_out is less than n_in, the kernel is stretched by n_in / n_out.
    Each row is normalised to sum to one.
    """
    step = n_in / n_out
    stretch = max(step, 1.0)
    centre = (np.arange(n_out)[:, None] + 0.5) * step
    cell = np.arange(n_in)[None, :] + 0.5
    weights = _cubic((cell - centre) / stretch, a=-0.5)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


@lru_cache(maxsize=256)
def resize_matrix(n_in: int, n_out: int, rule: PosEmbedRule) -> FloatArray:
    """Return the matrix [n_out, n_in] that resizes one axis of a patch grid from n_in to n_out patches by `rule`.

    The matrix is cached and read-only.
    """
    if rule == "offset":
        matrix = _sampled(n_in, n_out, step=n_in / (n_out + 0.1))
    elif rule == "size":
        matrix = _sampled(n_in, n_out, step=n_in / n_out)
    else:
        matrix = _antialiased(n_in, n_out)
    result = matrix.astype(np.float32)
    result.setflags(write=False)
    return result


def _product(matrix: FloatArray, x: FloatArray) -> FloatArray:
    """Return the product of `matrix` [n, M] and `x` [M, ...], with the same bits on every processor.

    Each addition is done in float64 and its result is rounded to float32, as in a fused multiply-add. BLAS is not used,
    because its results differ between processors, and graphs that contain the positions must be identical everywhere.
    """
    total = np.zeros((len(matrix), *x.shape[1:]), np.float32)
    for column, row in zip(matrix.T.astype(np.float64), x.astype(np.float64), strict=True):
        total = (total + np.multiply.outer(column, row)).astype(np.float32)
    return total


def resize_pos_embed(pos_embed: FloatArray, grid: tuple[int, int], rule: PosEmbedRule) -> FloatArray:
    """Return a position embedding resized to a grid of (h, w) patches by `rule`.

    `pos_embed` is [1, 1 + M*M, D] for a grid of M x M patches and a model of width D, and the result is [1, 1 + h*w,
    D]. The class token's position comes first and is not resized. If `grid` is (M, M), `pos_embed` is returned
    unchanged.
    """
    side = round((pos_embed.shape[1] - 1) ** 0.5)
    assert side * side == pos_embed.shape[1] - 1, f"pos_embed of shape {pos_embed.shape} is not 1 + a square"
    if grid == (side, side):
        return pos_embed
    h, w = grid
    patches = pos_embed[0, 1:].reshape(side, side, -1)  # [M, M, D]
    by_row = _product(resize_matrix(side, h, rule), patches)  # [h, M, D]
    resized = _product(resize_matrix(side, w, rule), by_row.swapaxes(0, 1)).swapaxes(0, 1)  # [w, h, D] -> [h, w, D]
    return np.concatenate([pos_embed[:, :1], resized.reshape(1, h * w, -1)], axis=1).astype(np.float32)
