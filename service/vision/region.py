"""Convert image regions to patch weights, and patches to boxes.

The network sees a crop of the image, divided into a grid of patches. A region is a box or a mask in pixels of the
image, or a point, which stands for the patch that contains it. The weight of a patch is the fraction of its area that
the region covers, from 0 to 1. So a region smaller than a patch still has features, and its edges need not align with
the grid. The vector of a region is the weighted mean of the patch tokens. Such a vector can only be compared with
vectors of `pooling=mean`, because these are also means of patch tokens.

Legend: H, W size of the upright image (after EXIF rotation); h, w size of the patch grid; N = h * w; D features. Boxes
are (x, y, width, height) in pixels; pixel (X, Y) is the square from (X, Y) to (X + 1, Y + 1). `crop_box` is the part of
the image that the network sees.
"""

import math
import reprlib
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from service.errors import InvalidRequest
from service.vision.mask import Mask, coco_rle_decode

Floats = npt.NDArray[np.float32]
Box = tuple[float, float, float, float]

_PIXELS_PER_BLOCK: Final = 2**22


def image_weights(size: tuple[int, int], crop_box: Box, grid: tuple[int, int]) -> Floats:
    """Return the fraction of each patch that shows the image, float32 [h, w] from 0 to 1. It is below 1 only if the
    preprocessing pads images. `size` is the size of the image in pixels, (H, W)."""
    return box_weights((0, 0, size[1], size[0]), crop_box, grid)


def box_weights(
    box: Box, crop_box: Box, grid: tuple[int, int], size: tuple[int, int] | None = None, where: str = "region"
) -> Floats:
    """Return the fraction of each patch that the box covers, float32 [h, w] from 0 to 1.

    Args:
        box: the box in pixels of the image.
        crop_box: the part of the image that the network sees.
        grid: the size of the crop box in patches, (h, w).
        size: the size of the image in pixels, (H, W). The part of the box outside the image is ignored. If None, the
            box must be inside the image.
        where: the field of the request that contains the box, for error messages.

    Raises:
        InvalidRequest: the box has no area or is outside the crop box.
    """
    x, y, width, height = box
    if not all(map(math.isfinite, box)) or min(width, height) <= 0:
        raise InvalidRequest(
            f"{where}.box {list(box)} has no area: [x, y, width, height] in pixels needs width and height above 0",
            param=where,
        )
    limits = (math.inf, math.inf) if size is None else size
    low = 0 if size is not None else -math.inf
    rows = _overlap(np.clip([[y, y + height]], low, limits[0]), crop_box[1], crop_box[3], grid[0])  # [h, 1]
    columns = _overlap(np.clip([[x, x + width]], low, limits[1]), crop_box[0], crop_box[2], grid[1])  # [w, 1]
    return _seen(rows @ columns.T, crop_box, f"{where}.box {list(box)}", where)


def point_weights(
    point: tuple[float, float], size: tuple[int, int], crop_box: Box, grid: tuple[int, int], where: str = "region"
) -> Floats:
    """Return a map of the patches, float32 [h, w], that is 1 for the patch that contains a point and 0 for the others.
    `point` is (x, y) in pixels of the image. The other arguments are those of `box_weights`.

    Raises:
        InvalidRequest: the point is outside the image or outside the crop box.
    """
    x, y = point
    if not (0 <= x <= size[1] and 0 <= y <= size[0]):
        raise InvalidRequest(
            f"{where}.point {list(point)} is outside the image of {size[1]} x {size[0]} pixels (width x height)",
            param=where,
        )
    weights = np.zeros(grid)
    row = (y - crop_box[1]) / crop_box[3]
    column = (x - crop_box[0]) / crop_box[2]
    if 0 <= row <= 1 and 0 <= column <= 1:
        weights[min(int(row * grid[0]), grid[0] - 1), min(int(column * grid[1]), grid[1] - 1)] = 1
    return _seen(weights, crop_box, f"{where}.point {list(point)}", where)


def mask_weights(
    rle: dict[str, Any], size: tuple[int, int], crop_box: Box, grid: tuple[int, int], where: str = "region"
) -> Floats:
    """Return the fraction of each patch that the mask covers, float32 [h, w] from 0 to 1.

    Args:
        rle: the mask as COCO run lengths, `{"size": [H, W], "counts": ...}`.
        size: the size of the image in pixels, (H, W).
        crop_box: the part of the image that the network sees.
        grid: the size of the crop box in patches, (h, w).
        where: the field of the request that contains the mask, for error messages.

    Raises:
        InvalidRequest: the run lengths are invalid, or the mask is empty, is outside the crop box, or does not have the
            size of the image. The size is checked before the mask is decoded.
    """
    if list(rle["size"]) != list(size):
        raise InvalidRequest(
            f"{where}.mask.size is {list(rle['size'])}, but the image has {list(size)} pixels (height, width; upright)",
            param=where,
        )
    if isinstance(rle["counts"], list) and not {int}.issuperset(map(type, rle["counts"])):
        wrong = next(run for run in rle["counts"] if type(run) is not int)
        raise InvalidRequest(
            f"{where}.mask.counts must be a string or a list of integers; {reprlib.repr(wrong)} is not an integer",
            param=where,
        )
    try:
        mask = coco_rle_decode(rle)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"{where}.mask.counts: {error}", param=where) from error
    if not mask.any():
        raise InvalidRequest(f"{where}.mask is empty: it must have at least one pixel", param=where)
    return _seen(_covered(mask, crop_box, grid), crop_box, f"{where}.mask", where)


def region_weights(
    region: Mapping[str, Any], size: tuple[int, int], crop_box: Box, grid: tuple[int, int], where: str = "region"
) -> Floats:
    """Return the fraction of each patch that a region covers, float32 [h, w] from 0 to 1. `region` has exactly one of
    the keys `box`, `mask` and `point`. The other arguments are those of `mask_weights`.

    Raises:
        InvalidRequest: the region does not fit the image, or it does not have exactly one of these keys.
    """
    kinds = [kind for kind in ("box", "mask", "point") if region.get(kind) is not None]
    if len(kinds) != 1:
        raise InvalidRequest(
            f"{where}: exactly one of box, mask and point is needed, not {' and '.join(kinds) or 'none'}", param=where
        )
    if kinds == ["box"]:
        return box_weights(region["box"], crop_box, grid, size, where)
    if kinds == ["mask"]:
        return mask_weights(region["mask"], size, crop_box, grid, where)
    return point_weights(region["point"], size, crop_box, grid, where)


def region_mean(tokens: Floats, weights: Floats) -> Floats:
    """Return the mean of the patch tokens [N, D], weighted with `weights` [h, w], as float32 [D]. N is h * w."""
    by = weights.ravel().astype(np.float64)
    return np.asarray(by @ tokens / by.sum(), np.float32)


def patch_box(index: int, grid: tuple[int, int], crop_box: Box) -> list[float]:
    """Return the box of a patch, [x, y, width, height] in pixels of the upright image. `index` is the position of the
    patch in row-major order."""
    x, y, width, height = crop_box
    row, column = divmod(index, grid[1])
    w, h = width / grid[1], height / grid[0]
    return [round(value, 2) for value in (x + column * w, y + row * h, w, h)]


def _seen(weights: npt.NDArray[np.float64], crop_box: Box, what: str, where: str) -> Floats:
    """Return the weights as float32. `what` names the region in the error message. `where` is the field of the request
    that contains the region.

    Raises:
        InvalidRequest: all weights are 0, because the region is outside the crop box.
    """
    if weights.max() <= 0:
        raise InvalidRequest(
            f"{what} is outside the part of the image that the network sees, the crop box "
            f"{[round(side, 1) for side in crop_box]} (x, y, width, height)",
            param=where,
        )
    return weights.astype(np.float32)


def _covered(mask: Mask, crop_box: Box, grid: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Return the fraction of each patch that the mask [H, W] covers, float64 [h, w]. The mask is processed in blocks of
    rows, because converting the whole mask to floats could use too much memory."""
    height, width = mask.shape
    columns = _overlap(_spans(width), crop_box[0], crop_box[2], grid[1]).astype(np.float32)  # [w, W]
    rows = _overlap(_spans(height), crop_box[1], crop_box[3], grid[0]).astype(np.float32)  # [h, H]
    step = max(1, _PIXELS_PER_BLOCK // width)
    total = np.zeros(grid)
    for start in range(0, height, step):
        block = mask[start : start + step].astype(np.float32) @ columns.T  # [rows, w]
        total += rows[:, start : start + step] @ block
    return total.clip(0, 1)


def _spans(pixels: int) -> npt.NDArray[np.float64]:
    edges = np.arange(pixels + 1, dtype=np.float64)
    return np.stack([edges[:-1], edges[1:]], axis=1)  # [pixels, 2]


def _overlap(spans: npt.NDArray[np.float64], start: float, extent: float, cells: int) -> npt.NDArray[np.float64]:
    """For each cell and each span on one axis, return the fraction of the cell that the span covers, [cells, n].
    `spans` [n, 2] contains the start and the end of each span. The range from `start` to `start + extent` is divided
    into `cells` cells of equal length."""
    edges = start + np.arange(cells + 1) * (extent / cells)
    low = np.maximum(edges[:-1, None], spans[:, 0])
    high = np.minimum(edges[1:, None], spans[:, 1])
    shares: npt.NDArray[np.float64] = np.clip(high - low, 0, None) * (cells / extent)
    return shares
