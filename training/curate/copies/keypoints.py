"""Keypoints with descriptors: small round structures that are found again in a rotated, scaled or recoloured copy.

The method is SIFT (Lowe, "Distinctive image features from scale-invariant keypoints", 2004) on an image that is reduced
to a fixed area. Keypoints are extrema in space and scale of differences of Gaussians. Each has an orientation, and a
histogram of the gradients around it, relative to its orientation, describes it.

Legend: H, W height and width of the reduced image; K keypoints.
"""

from functools import cache
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import gaussian_filter

from training.curate.table import Pixels

FloatArray = npt.NDArray[np.float32]

SIDE: Final = 192
"""The reduced image has the area of a square with this side, so copies of different size have about the same scale."""
THUMBNAIL_SIDE: Final = 16
LEAST_SIDE: Final = 8
LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as in Pillow
MOST_KEYPOINTS: Final = 200
FIRST_SIGMA, LEVELS, LEVELS_PER_OCTAVE = 1.6, 8, 3
LEAST_CONTRAST: Final = 1.5
"""The smallest difference of Gaussians of a keypoint, in gray levels."""
LARGEST_EDGE_RATIO: Final = 10.0
CELLS, SAMPLES, ANGLES = 4, 16, 8  # the descriptor: cells and samples along a side, and directions
SAMPLE_SPACING, ORIENTATION_SAMPLES, ORIENTATION_BINS = 0.75, 13, 36


class Keypoints(NamedTuple):
    """The keypoints of an image, and what else a comparison with another image needs."""

    rgb: npt.NDArray[np.uint8]  # [H, W, 3], the reduced image
    thumbnail: npt.NDArray[np.uint8]  # [16, 16], gray; the whole image squashed to a square
    xy: FloatArray  # [K, 2], pixels of the reduced image
    scale: FloatArray  # [K], standard deviation of the Gaussian, in pixels
    angle: FloatArray  # [K], radians
    descriptors: FloatArray  # [K, 128], length 1


def keypoints_of(pixels: Pixels) -> Keypoints:
    """Find the keypoints of an RGB image [height, width, 3].

    There are at most `MOST_KEYPOINTS` positions, those of the highest contrast. A position with several orientations
    has a keypoint for each.
    """
    height, width = pixels.shape[:2]
    factor = SIDE / float(np.sqrt(height * width))
    size = max(LEAST_SIDE, round(width * factor)), max(LEAST_SIDE, round(height * factor))
    reduced = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    thumbnail = reduced.convert("L").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    rgb = np.asarray(reduced)
    return Keypoints(rgb, np.asarray(thumbnail), *_find(luma(rgb)))


def luma(rgb: npt.NDArray[np.generic]) -> FloatArray:
    """Return the gray levels [H, W] of an RGB image [H, W, 3], from 0 to 255."""
    return rgb.astype(np.float32) @ LUMA


def _find(gray: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Return the positions, scales, orientations and descriptors of the keypoints of a gray image [H, W]."""
    sigmas = FIRST_SIGMA * 2.0 ** (np.arange(LEVELS) / LEVELS_PER_OCTAVE)
    levels = [gaussian_filter(gray, float(sigmas[0]), truncate=3.0)]
    for before, sigma in pairwise(sigmas):
        levels.append(gaussian_filter(levels[-1], float(np.sqrt(sigma**2 - before**2)), truncate=3.0))
    stack = np.stack(levels)
    level, y, x = _extrema(np.diff(stack, axis=0))
    slopes = stack[:, :, 2:] - stack[:, :, :-2], stack[:, 2:] - stack[:, :-2]
    fields = np.pad(slopes[0], ((0, 0), (0, 0), (1, 1))), np.pad(slopes[1], ((0, 0), (1, 1), (0, 0)))
    xy, scale = np.stack([x, y], axis=1).astype(np.float32), sigmas[level].astype(np.float32)
    angle, owner = _orientations(fields, level, xy, scale)
    level, xy, scale = level[owner], xy[owner], scale[owner]
    return xy, scale, angle, _descriptors(fields, level, xy, scale, angle)


def mirrored_descriptors(descriptors: FloatArray) -> FloatArray:
    """Return the descriptors [K, 128] that the keypoints have in the mirrored image."""
    cells = descriptors.reshape(-1, CELLS, CELLS, ANGLES)  # [K, across the orientation, along it, direction]
    opposite = -np.arange(ANGLES) % ANGLES
    return np.ascontiguousarray(cells[:, ::-1, :, opposite]).reshape(-1, CELLS**2 * ANGLES)


def _extrema(differences: FloatArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the level, y and x of the extrema of differences of Gaussians [levels, H, W] that are not on edges."""
    peaks = np.zeros(differences[1:-1, 1:-1, 1:-1].shape, bool)
    for signed in (differences, -differences):
        highest = signed
        for axis in range(3):  # the maximum of 3 x 3 x 3 values, one axis after the other
            n = highest.shape[axis]
            before, here, after = (highest.take(range(start, n - 2 + start), axis) for start in range(3))
            highest = np.maximum(np.maximum(before, after), here)
        peaks |= (signed[1:-1, 1:-1, 1:-1] == highest) & (highest > LEAST_CONTRAST)
    level, y, x = (axis + 1 for axis in np.nonzero(peaks))
    centre = differences[level, y, x]
    dxx = differences[level, y, x + 1] + differences[level, y, x - 1] - 2 * centre
    dyy = differences[level, y + 1, x] + differences[level, y - 1, x] - 2 * centre
    dxy = differences[level, y + 1, x + 1] + differences[level, y - 1, x - 1]
    dxy = (dxy - differences[level, y + 1, x - 1] - differences[level, y - 1, x + 1]) / 4
    determinant = dxx * dyy - dxy**2
    ratio = (LARGEST_EDGE_RATIO + 1) ** 2 / LARGEST_EDGE_RATIO
    round_ones = np.flatnonzero((determinant > 0) & ((dxx + dyy) ** 2 < ratio * determinant))
    order = round_ones[np.argsort(-np.abs(centre[round_ones]), kind="stable")][:MOST_KEYPOINTS]
    return level[order], y[order], x[order]


@cache
def _grid(samples: int) -> tuple[FloatArray, FloatArray]:
    """Return the x and y offsets [samples²] of a square grid around 0, in units of the keypoint's scale."""
    steps = (np.arange(samples, dtype=np.float32) - (samples - 1) / 2) * SAMPLE_SPACING
    y, x = np.meshgrid(steps, steps, indexing="ij")
    return x.ravel(), y.ravel()


def _sampled(
    fields: tuple[FloatArray, FloatArray], level: npt.NDArray[np.int64], x: FloatArray, y: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the length and the direction of the gradient at the pixels nearest to the points x, y [K, samples].

    The gradient is 0 outside the image.
    """
    height, width = fields[0].shape[1:]
    column, row = np.rint(x).astype(np.int64), np.rint(y).astype(np.int64)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    place = level[:, None], row.clip(0, height - 1), column.clip(0, width - 1)
    gradient_x, gradient_y = fields[0][place] * inside, fields[1][place] * inside
    return np.hypot(gradient_x, gradient_y), np.arctan2(gradient_y, gradient_x)


def _orientations(
    fields: tuple[FloatArray, FloatArray], level: npt.NDArray[np.int64], xy: FloatArray, scale: FloatArray
) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Return the orientations of keypoints, and the number of the keypoint to which each belongs.

    A keypoint has a second orientation if another direction of the gradient is almost as frequent as the first.
    """
    offset_x, offset_y = _grid(ORIENTATION_SAMPLES)
    length, direction = _sampled(
        fields, level, xy[:, :1] + scale[:, None] * offset_x, xy[:, 1:] + scale[:, None] * offset_y
    )
    length = length * np.exp(-(offset_x**2 + offset_y**2) / (2 * 1.5**2))
    count, bins = len(xy), ORIENTATION_BINS
    index = np.rint(direction * (bins / (2 * np.pi))).astype(np.int64) % bins + bins * np.arange(count)[:, None]
    counted = np.bincount(index.ravel(), length.ravel(), count * bins)
    histogram: npt.NDArray[np.float64] = counted.astype(np.float64).reshape(count, bins)
    for _ in range(2):
        histogram = (np.roll(histogram, 1, 1) + histogram + np.roll(histogram, -1, 1)) / 3
    before, after = np.roll(histogram, 1, 1), np.roll(histogram, -1, 1)
    peaks = (histogram >= before) & (histogram > after) & (histogram >= 0.8 * histogram.max(1, keepdims=True))
    owner, place = np.nonzero(peaks)
    curvature = (before - 2 * histogram + after)[owner, place]
    shift = 0.5 * (before - after)[owner, place] / np.where(curvature < 0, curvature, -1)
    return ((place + shift) * (2 * np.pi / bins)).astype(np.float32), owner


@cache
def _cell_weights() -> FloatArray:
    """Return the weights [samples², cells²] with which the samples of a descriptor belong to its cells."""
    steps = (np.arange(SAMPLES) + 0.5) * CELLS / SAMPLES - 0.5  # in cells; cell c has its centre at c
    along = np.maximum(0, 1 - np.abs(steps[:, None] - np.arange(CELLS)))  # [samples, cells]
    x, y = _grid(SAMPLES)
    width = SAMPLES * SAMPLE_SPACING / 2
    weights = np.einsum("ya,xb->yxab", along, along).reshape(SAMPLES**2, CELLS**2)
    return (weights * np.exp(-(x**2 + y**2) / (2 * width**2))[:, None]).astype(np.float32)


def _descriptors(
    fields: tuple[FloatArray, FloatArray],
    level: npt.NDArray[np.int64],
    xy: FloatArray,
    scale: FloatArray,
    angle: FloatArray,
) -> FloatArray:
    """Return the descriptors [K, 128] of keypoints. They are normalised as in RootSIFT."""
    offset_x, offset_y = _grid(SAMPLES)
    cosine, sine = (scale * np.cos(angle))[:, None], (scale * np.sin(angle))[:, None]
    x, y = xy[:, :1] + cosine * offset_x - sine * offset_y, xy[:, 1:] + sine * offset_x + cosine * offset_y
    length, direction = _sampled(fields, level, x, y)
    place = ((direction - angle[:, None]) * (ANGLES / (2 * np.pi))) % ANGLES
    lower = np.floor(place)
    share = place - lower
    spread = np.zeros((len(xy), SAMPLES**2, ANGLES), np.float32)
    row, column = np.arange(len(xy))[:, None], np.arange(SAMPLES**2)
    first = lower.astype(np.int64) % ANGLES
    spread[row, column, first] = length * (1 - share)
    spread[row, column, (first + 1) % ANGLES] += length * share
    cells = np.einsum("ksa,sc->kca", spread, _cell_weights(), optimize=True).reshape(-1, CELLS**2 * ANGLES)
    cells = np.minimum(cells, 0.2 * np.linalg.norm(cells, axis=1, keepdims=True))
    return np.sqrt(cells / np.maximum(cells.sum(1, keepdims=True), 1e-6)).astype(np.float32)
