"""Pillow's resize of a gray image as products of matrices: the pixels are equal, and it takes a third of the time.

The perceptual hash and the sharpness each shrink an image, and with Pillow this takes longer than decoding the image.
Pillow rounds its weights to multiples of 2**-22, adds integers, and rounds to pixels after each of two passes, one over
the rows and one over the columns. Here the same integers are added as floats of 64 bits, which is exact in any order. A
pixel of the result depends only on some neighbouring pixels, so there is a small matrix for every few of them.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_WEIGHT_BITS: Final = 22
_MATRIX_COLUMNS: Final = 8
_BLOCK_PIXELS: Final = 1 << 15  # so that the numbers of a block of rows stay in the CPU's cache


class Filter(NamedTuple):
    """The weight of a pixel by its distance in pixels of the result, and the distance from which on it is 0."""

    weight: Callable[[Floats], Floats]
    radius: int


def _bicubic(distance: Floats) -> Floats:
    x = np.abs(distance)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((x - 5) * x + 8) * x * -0.5 + 2)


def _lanczos(distance: Floats) -> Floats:
    return np.asarray(np.sinc(distance) * np.sinc(distance / 3))


BICUBIC: Final = Filter(_bicubic, 2)
LANCZOS: Final = Filter(_lanczos, 3)


def shrink(gray: npt.NDArray[np.uint8], size: tuple[int, int], by: Filter) -> npt.NDArray[np.uint8]:
    """Return a gray image [H, W] resized to `size`, width and height. The pixels are those of Pillow 13's `resize`."""
    width, height = size
    if gray.shape[0] - height > max(2 * (gray.shape[1] - width), 0):  # Pillow shrinks the columns of tall images first
        return _shrunk_rows(_shrunk_rows(gray.T, height, by).T, width, by)
    return _shrunk_rows(_shrunk_rows(gray, width, by).T, height, by).T


def _shrunk_rows(rows: npt.NDArray[np.uint8], size: int, by: Filter) -> npt.NDArray[np.uint8]:
    """Shrink each of the rows [n, length], and return them [n, size]."""
    sums = np.empty((len(rows), size))
    matrices = _matrices(rows.shape[1], size, by)
    step = max(_BLOCK_PIXELS // rows.shape[1], 1)
    block = np.empty((min(step, len(rows)), rows.shape[1]))
    for top in range(0, len(rows), step):
        part = rows[top : top + step]
        block[: len(part)] = part
        for pixels, results, weights in matrices:
            np.matmul(block[: len(part), pixels], weights, out=sums[top : top + step, results])
    sums *= 2.0**-_WEIGHT_BITS
    sums += 0.5
    np.floor(sums, out=sums)
    return sums.clip(0, 255, out=sums).astype(np.uint8)


@lru_cache(maxsize=64)
def _matrices(length: int, size: int, by: Filter) -> list[tuple[slice, slice, Floats]]:
    """Return the weights for shrinking rows from `length` to `size` pixels.

    Each matrix [p, r] holds the weights of p neighbouring pixels in r neighbouring pixels of the result. The slices say
    which ones these are.
    """
    scale = max(length / size, 1)
    centre = (np.arange(size)[:, None] + 0.5) * length / size
    first = np.maximum((centre - by.radius * scale + 0.5).astype(np.int64), 0)  # of the pixels with a weight
    end = np.minimum((centre + by.radius * scale + 0.5).astype(np.int64), length)
    pixels = first + np.arange((end - first).max())  # [size, at most 2 radii]
    distance = (pixels - centre + 0.5) / scale
    weights = np.where((pixels < end) & (np.abs(distance) < by.radius), by.weight(distance), 0)
    weights = np.rint(weights / weights.sum(axis=1, keepdims=True) * 2**_WEIGHT_BITS)
    matrices = []
    for left in range(0, size, _MATRIX_COLUMNS):
        results = slice(left, min(left + _MATRIX_COLUMNS, size))
        start, stop = int(first[results].min()), int(end[results].max())
        matrix = np.zeros((max(stop, int(pixels[results].max()) + 1) - start, results.stop - left))
        np.put_along_axis(matrix, (pixels[results] - start).T, weights[results].T, axis=0)
        matrices.append((slice(start, stop), results, matrix[: stop - start]))
    return matrices
