"""Position embeddings for a grid other than the trained one: three rules, one implementation.

A backbone stores positions for one square grid (37 x 37 for the released weights, trained at 518 pixels). For any other
input size they are resized bicubically, and the published implementations use different rules:

- `offset`: by the scale (n + 0.1) / M, no antialias. Meta's models without registers. The 0.1 was introduced as a guard
  against rounding and became part of the features: it shifts every sampling point.
- `antialias`: by size, antialiased (wider kernel when shrinking). Every register model, and all of timm's.
- `size`: by size, no antialias. Hugging Face's models without registers.

Features differ at every size but the native one, so the rule is part of a model's identity (it is in the fingerprint).

Bicubic resizing is linear and separable, so each rule is a pair of small matrices: `P' = Wh @ P @ Ww^T`. The matrices
are computed here in numpy. Training applies them in torch, and the ONNX writer uses them to bake in an input size. The
tests compare them with `torch.nn.functional.interpolate`.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from model.config import PosEmbedRule

FloatArray = npt.NDArray[np.float32]


def _cubic(distance: npt.NDArray[np.float64], a: float) -> npt.NDArray[np.float64]:
    """Return Keys' cubic convolution kernel (IEEE ASSP 29, 1981) with parameter `a`; zero beyond a distance of 2."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _sampled(n_in: int, n_out: int, step: float) -> npt.NDArray[np.float64]:
    """Return the matrix [n_out, n_in] of bicubic sampling (a = -0.75) every `step` input cells, with the border
    repeated.
    """
    matrix = np.zeros((n_out, n_in))
    source = (np.arange(n_out) + 0.5) * step - 0.5
    first = np.floor(source).astype(int)
    for tap in range(-1, 3):
        weights = _cubic(source - (first + tap), a=-0.75)
        np.add.at(matrix, (np.arange(n_out), np.clip(first + tap, 0, n_in - 1)), weights)
    return matrix


def _antialiased(n_in: int, n_out: int) -> npt.NDArray[np.float64]:
    """Return the matrix [n_out, n_in] of antialiased bicubic resampling (a = -0.5).

    The kernel is stretched when shrinking, and rows are normalised.
    """
    step = n_in / n_out
    stretch = max(step, 1.0)
    centre = (np.arange(n_out)[:, None] + 0.5) * step
    cell = np.arange(n_in)[None, :] + 0.5
    weights = _cubic((cell - centre) / stretch, a=-0.5)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


@lru_cache(maxsize=256)
def resize_matrix(n_in: int, n_out: int, rule: PosEmbedRule) -> FloatArray:
    """Return the matrix [n_out, n_in] that resizes one axis of the grid by `rule`. It is cached, hence read-only."""
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
    """`matrix` [n, M] times x [M, ...], the same bits on every processor.

    Each term is added in float64 and the sum rounded to float32, as a fused multiply-add does. BLAS differs between
    processors, and a graph that bakes the positions must be derived byte for byte.
    """
    total = np.zeros((len(matrix), *x.shape[1:]), np.float32)
    for column, row in zip(matrix.T.astype(np.float64), x.astype(np.float64), strict=True):
        total = (total + np.multiply.outer(column, row)).astype(np.float32)
    return total


def resize_pos_embed(pos_embed: FloatArray, grid: tuple[int, int], rule: PosEmbedRule) -> FloatArray:
    """Resize [1, 1 + M*M, D] (class position first) to [1, 1 + h*w, D] for a grid of (h, w) patches.

    At the native square grid the embedding is returned unchanged under every rule.
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
