"""Separate foreground from background without labels, from the patch features of one forward pass.

DINOv2's patch features of an image vary most along the direction that separates the object from its background. The
paper thresholds this component too (arXiv 2304.07193, figure 1). So the code centres the patches [N, D], projects them
onto their first principal component, determines which sign is the foreground, and applies Otsu's threshold.

- The sign of a principal component is arbitrary. `orient` chooses it from the positions of the patches.
  docs/decisions/0003-foreground-sign.md compares this rule with others.
- Otsu's threshold is exact: it tries all N - 1 splits of the sorted projection and uses no histogram.
- The projection is upsampled (bilinear between patch centres) and then thresholded. Upsampling the mask would give
  jagged outlines.
- The network sees a crop of the image. Outside the crop the mask is background; `crop_box` is the crop's position.

Legend: H, W size of the upright image; h, w size of the patch grid; N = h * w patches in row-major order; D features.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from model.preprocess import PreprocessSpec, crop_box, output_size

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Box = tuple[float, float, float, float]

MIN_SPREAD: Final = 1e-6
"""If the variance of the patches divided by their mean square is at most this, all patches count as equal. Rounding
errors of float32 give about 1e-13."""

_ROWS_PER_BLOCK: Final = 256


@dataclass(frozen=True)
class Foreground:
    """The result of `segment_foreground`.

    mask: bool [H, W], True on the foreground, in the pixels of the image as sent; False outside `crop_box`.
    patch_mask: bool [h, w], True for each patch with a score above 0.
    scores: float32 [h, w], the projection minus the threshold: above 0 is foreground. All 0 if there is no foreground.
    contrast: cosine distance between the mean foreground and the mean background patch, 0 (no foreground) to 2.
    crop_box: (x, y, width, height) in pixels of the image as sent: the part that the network sees.
    """

    mask: Mask
    patch_mask: Mask
    scores: Floats
    contrast: float
    crop_box: Box


def segment_foreground(patches: Floats, height: int, width: int, spec: PreprocessSpec) -> Foreground:
    """Return the foreground mask of one image.

    Args:
        patches: [N, D] patch features, row-major over the grid that `spec` gives for this image.
        height, width: size of the image as sent, after its EXIF rotation.
        spec: the preprocessing of the features.

    Raises:
        ValueError: N does not match an image of this size under `spec`, or a feature is not finite.
    """
    out_h, out_w = output_size(height, width, spec)
    grid = out_h // spec.patch_size, out_w // spec.patch_size
    scores = foreground_scores(patches, grid)
    box = crop_box(height, width, spec)
    patch_mask = scores > 0
    return Foreground(
        mask=upsample_mask(scores, height, width, box),
        patch_mask=patch_mask,
        scores=scores,
        contrast=_contrast(patches, patch_mask.ravel()),
        crop_box=box,
    )


def foreground_scores(patches: Floats, grid: tuple[int, int]) -> Floats:
    """Project the patches onto the direction of their largest variance, subtract Otsu's threshold, and return the
    result as float32 [h, w]. Values above 0 are foreground. If all patches are equal, all values are 0 and there is no
    foreground.

    Raises:
        ValueError: the patches do not fill the grid or are not finite.
    """
    if patches.ndim != 2 or patches.shape[0] != grid[0] * grid[1]:
        raise ValueError(f"patches of shape {list(patches.shape)} do not fill a grid of {grid[0]} x {grid[1]}")
    if not np.isfinite(patches).all():
        raise ValueError("patch features must be finite")
    features = patches.astype(np.float32)
    centred = features - features.mean(axis=0)  # [N, D]
    if np.square(centred).mean() <= MIN_SPREAD * np.square(features).mean():
        return np.zeros(grid, np.float32)
    projection = orient((centred @ first_component(centred)).reshape(grid))  # [h, w]
    return projection - otsu_threshold(projection.ravel())


def first_component(centred: Floats) -> Floats:
    """Return the direction in which centred rows [N, D] have the largest variance, as a unit vector [D]. Its sign is
    arbitrary.

    It is computed from an eigenvector of the smaller of the two Gram matrices, [D, D] or [N, N]. Power iteration would
    be quicker for large matrices, but it would return its start vector if that happened to be another eigenvector.
    """
    rows = centred.astype(np.float64)
    if len(rows) >= rows.shape[1]:
        direction = np.linalg.eigh(rows.T @ rows)[1][:, -1]  # [D]; eigh sorts ascending
    else:
        direction = rows.T @ np.linalg.eigh(rows @ rows.T)[1][:, -1]  # [D]
    return np.asarray(direction / np.linalg.norm(direction), np.float32)


def orient(projection: Floats) -> Floats:
    """Return the projection [h, w] with the sign that makes the foreground positive.

    The background usually touches the frame of the image, so the sign is chosen with which the border patches have a
    lower mean than the inner patches. If the means are equal or there are no inner patches, the smaller of the two
    classes becomes the foreground.
    """
    h, w = projection.shape
    if h > 2 and w > 2:
        border = np.ones((h, w), bool)
        border[1:-1, 1:-1] = False
        lean = float(projection[~border].mean() - projection[border].mean())
        if lean != 0:
            return projection if lean > 0 else -projection
    above = projection > otsu_threshold(projection.ravel())
    return -projection if above.mean() > 0.5 else projection


def otsu_threshold(values: Floats) -> float:
    """Return the threshold that divides the values into two classes with the least variance within the classes (Otsu
    1979). It is in the middle between the two values next to it.

    If all values are equal, return this value, so that no value is above the threshold.
    """
    ordered = np.sort(values.astype(np.float64))
    if ordered[0] == ordered[-1]:
        return float(ordered[-1])
    count = len(ordered)
    below = np.arange(1, count)  # number of values below each of the N - 1 splits
    sums = np.cumsum(ordered)
    gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / (count - below)
    between = below * (count - below) * gap**2
    between[ordered[1:] == ordered[:-1]] = -1  # equal values cannot be separated
    split = int(np.argmax(between))
    return float((ordered[split] + ordered[split + 1]) / 2)


def _contrast(patches: Floats, inside: Mask) -> float:
    """Return the cosine distance between the mean of the patches inside the mask and the mean of the others. Return 0
    if all patches are on one side."""
    if inside.all() or not inside.any():
        return 0.0
    front, back = patches[inside].mean(axis=0, dtype=np.float64), patches[~inside].mean(axis=0, dtype=np.float64)
    norms = float(np.linalg.norm(front) * np.linalg.norm(back))
    return float(np.clip(1 - front @ back / norms, 0, 2)) if norms > 0 else 0.0


def upsample_mask(scores: Floats, height: int, width: int, box: Box) -> Mask:
    """Upsample scores [h, w], which cover `box` (x, y, width, height) of an image, to a mask [H, W] of the image.

    The scores are interpolated bilinearly between patch centres; beyond the outermost centres they are constant. A
    pixel is True if its score is above 0. Pixels with their centre outside the box are False. The image is processed in
    blocks of rows, because all its pixels as floats could take too much memory.
    """
    x, y, box_width, box_height = box
    rows, row_weights = _bilinear(height, y, box_height, scores.shape[0])
    columns, column_weights = _bilinear(width, x, box_width, scores.shape[1])
    mask = np.zeros((height, width), bool)
    for start in range(0, len(row_weights), _ROWS_PER_BLOCK):
        block = row_weights[start : start + _ROWS_PER_BLOCK] @ scores @ column_weights.T
        top = rows.start + start
        mask[top : top + len(block), columns] = block > 0
    return mask


def _bilinear(size: int, start: float, extent: float, cells: int) -> tuple[slice, Floats]:
    """Return the weights for linear interpolation along one axis of an image with `size` pixels. `cells` cells divide
    the range from `start` to `start + extent` evenly. The first result is the slice of the pixels with their centre in
    this range. The second is the weight of each cell in each of these pixels, [pixels, cells]."""
    centres = np.arange(size) + 0.5
    inside = np.flatnonzero((centres >= start) & (centres < start + extent))
    at = ((centres[inside] - start) * (cells / extent) - 0.5).clip(
        0, cells - 1
    )  # in cells, from the centre of the first cell
    low = np.minimum(at.astype(np.int64), max(cells - 2, 0))
    high = np.minimum(low + 1, cells - 1)
    weights = np.zeros((len(inside), cells), np.float32)
    pixel = np.arange(len(inside))
    np.add.at(weights, (pixel, low), (1 - (at - low)).astype(np.float32))
    np.add.at(weights, (pixel, high), (at - low).astype(np.float32))
    first = int(inside[0]) if len(inside) else 0
    return slice(first, first + len(inside)), weights
