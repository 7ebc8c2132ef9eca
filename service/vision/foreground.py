"""Separate the foreground of an image from its background, without labels. The input is the patch features from one
forward pass.

The first principal component of an image's DINOv2 patch features, the direction along which they vary most, separates
the object from its background. The DINOv2 paper (arXiv 2304.07193, figure 1) thresholds this component, too. The code
centres the patches [N, D], projects them onto the component, chooses the sign so that the foreground has the higher
values, and applies Otsu's threshold.

- The sign of a principal component is arbitrary. `orient` chooses the sign based on the positions of the patches.
  docs/decisions/0003-foreground-sign.md compares this rule with others.
- The computation of Otsu's threshold is exact: it tries all N - 1 splits of the sorted projection and uses no
  histogram.
- The projection is upsampled (bilinear between patch centres) and then thresholded. Upsampling a mask that is already
  thresholded would give jagged outlines.
- The network sees a crop of the image. Pixels outside the crop are background. `crop_box` is the position of the crop.
- If the preprocessing pads images, patches that show mostly padding are not used.

Legend: H, W size of the upright image (after EXIF rotation); h, w size of the patch grid; N = h * w patches in
row-major order; D features.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from model.preprocess import PreprocessSpec, crop_box, output_size
from service.vision.pictures import bilinear_weights
from service.vision.region import image_weights

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Box = tuple[float, float, float, float]

MIN_SPREAD: Final = 1e-6
"""If the variance of the patches divided by their mean square is at most this value, all patches count as equal.
Rounding errors of float32 alone give values of about 1e-13."""

_ROWS_PER_BLOCK: Final = 256


@dataclass(frozen=True)
class Foreground:
    """The foreground of one image, as `segment_foreground` returns it.

    mask: bool [H, W], True for each foreground pixel of the upright image. Pixels outside `crop_box` are False.
    patch_mask: bool [h, w], True for each patch with a score above 0.
    scores: float32 [h, w]. A score above 0 means foreground. All scores are 0 if there is no foreground.
    contrast: the cosine distance, from 0 to 2, between the mean of the foreground patches and the mean of the
        background patches. It is 0 if there is no foreground.
    crop_box: the part of the image that the network sees, (x, y, width, height) in pixels of the upright image.
    """

    mask: Mask
    patch_mask: Mask
    scores: Floats
    contrast: float
    crop_box: Box


def segment_foreground(patches: Floats, height: int, width: int, spec: PreprocessSpec) -> Foreground:
    """Separate the foreground of one image from its background, and return the mask and the scores of the patches.

    Args:
        patches: [N, D] patch features, row-major over the grid that `spec` gives for this image.
        height, width: the size of the upright image in pixels.
        spec: the preprocessing of the image.

    Raises:
        ValueError: N is not the number of patches that `spec` gives for an image of this size, or a feature is not
            finite.
    """
    out_h, out_w = output_size(height, width, spec)
    grid = out_h // spec.patch_size, out_w // spec.patch_size
    box = crop_box(height, width, spec)
    if spec.fit == "pad":
        return _of_padded(patches, (height, width), box, grid)
    scores = foreground_scores(patches, grid)
    patch_mask = scores > 0
    return Foreground(
        mask=upsample_mask(scores, height, width, box),
        patch_mask=patch_mask,
        scores=scores,
        contrast=_contrast(patches, patch_mask.ravel()),
        crop_box=box,
    )


def _of_padded(patches: Floats, size: tuple[int, int], box: Box, grid: tuple[int, int]) -> Foreground:
    """Return the foreground of an image of size (H, W) that was padded to fill `box`. Only patches that show at least
    half as much of the image as the patch that shows the most are used. Each other patch gets the score of the nearest
    patch that is used."""
    shares = image_weights(size, box, grid)
    used = shares >= shares.max() / 2  # a rectangle of patches
    rows, columns = np.flatnonzero(used.any(axis=1)), np.flatnonzero(used.any(axis=0))
    inner = patches.reshape(*grid, -1)[used]  # [n, D], row-major
    part = foreground_scores(inner, (len(rows), len(columns)))
    margins = [(int(kept[0]), side - 1 - int(kept[-1])) for kept, side in zip((rows, columns), grid, strict=True)]
    scores = np.pad(part, margins, mode="edge")
    return Foreground(
        mask=upsample_mask(scores, *size, box),
        patch_mask=(scores > 0) & used,
        scores=scores,
        contrast=_contrast(inner, part.ravel() > 0),
        crop_box=box,
    )


def foreground_scores(patches: Floats, grid: tuple[int, int]) -> Floats:
    """Return a score for each patch, float32 [h, w]. Patches with a score above 0 are foreground. The score of a patch
    is its projection onto the direction of the largest variance, minus Otsu's threshold. If all patches are equal, all
    scores are 0 and there is no foreground.

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
    """Return the direction of the largest variance of the rows [N, D], which must have mean 0. The direction is a unit
    vector [D] with an arbitrary sign.

    The vector is computed from an eigenvector of the smaller of the two Gram matrices, [D, D] or [N, N]. Power
    iteration would be faster for large matrices, but it returns a wrong vector if its start vector happens to be
    another eigenvector.
    """
    rows = centred.astype(np.float64)
    if len(rows) >= rows.shape[1]:
        direction = np.linalg.eigh(rows.T @ rows)[1][:, -1]  # [D]; eigh sorts ascending
    else:
        direction = rows.T @ np.linalg.eigh(rows @ rows.T)[1][:, -1]  # [D]
    return np.asarray(direction / np.linalg.norm(direction), np.float32)


def orient(projection: Floats) -> Floats:
    """Return the projection [h, w], or its negative, so that the foreground has the higher values.

    The background usually touches the border of the image. Therefore, the sign is chosen so that the border patches
    have a lower mean than the inner patches. If the means are equal or there are no inner patches, Otsu's threshold
    divides the patches into two classes, and the sign is chosen so that the smaller class has the higher values.
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
    """Return the threshold that divides the values into the two classes with the least variance within the classes
    (Otsu 1979). The threshold is the midpoint between the highest value of the lower class and the lowest value of the
    upper class.

    If all values are equal, the threshold is this value, so no value is above it.
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
    """Return the cosine distance between the mean of the patches inside the mask and the mean of the other patches.
    Return 0 if all patches are inside, all are outside, or one of the means is zero."""
    if inside.all() or not inside.any():
        return 0.0
    front, back = patches[inside].mean(axis=0, dtype=np.float64), patches[~inside].mean(axis=0, dtype=np.float64)
    norms = float(np.linalg.norm(front) * np.linalg.norm(back))
    return float(np.clip(1 - front @ back / norms, 0, 2)) if norms > 0 else 0.0


def upsample_mask(scores: Floats, height: int, width: int, box: Box) -> Mask:
    """Upsample the scores of patches [h, w] to the size of the image, and return a mask [H, W]. The patches cover `box`
    (x, y, width, height) of the image.

    The scores are interpolated bilinearly between the centres of the patches. They are constant beyond the outermost
    centres. A pixel is True if its score is above 0. Pixels with their centre outside the box are False. The image is
    processed in blocks of rows, because the scores of all its pixels could use too much memory.
    """
    x, y, box_width, box_height = box
    rows, row_weights = bilinear_weights(height, y, box_height, scores.shape[0])
    columns, column_weights = bilinear_weights(width, x, box_width, scores.shape[1])
    mask = np.zeros((height, width), bool)
    for start in range(0, len(row_weights), _ROWS_PER_BLOCK):
        block = row_weights[start : start + _ROWS_PER_BLOCK] @ scores @ column_weights.T
        top = rows.start + start
        mask[top : top + len(block), columns] = block > 0
    return mask
