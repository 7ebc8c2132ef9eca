"""Turn maps over patches into masks over pixels whose outlines follow the edges of the image.

A patch covers 14 or more pixels, so a mask that is only interpolated misses the outline of the object by several
pixels. The guided filter (He et al. 2010; He and Sun 2015, "Fast Guided Filter", arXiv 1505.00996) fits the map as a
linear function of the colour in each window of the image. The functions are fitted on a small copy of the image with
box filters, so the time does not depend on the size of the window. They are then applied to all pixels.

Legend: H, W size of the upright image; h, w size of the patch grid; K maps; a, b size of the small copy.
"""

from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from service.vision.patch_grid import PatchGrid

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Pixels = npt.NDArray[np.uint8]

MAX_LABELS: Final = 255

_CELLS_PER_PATCH: Final = 4
_MAX_SIDE: Final = 512
_MAX_VALUES: Final = 2**25  # maps * pixels; more would take seconds
_WINDOW_IN_PATCHES: Final = 1.0
_SMOOTHNESS: Final = 1e-3


def label_pixels(grid: PatchGrid, maps: Floats, image: Pixels | None = None, *, everywhere: bool = False) -> Labels:
    """Return the label of each pixel, uint8 [H, W]: the number of the map with the highest value there, counted from 1,
    or 0 if no map has a value above 0 there. Pixels that the network does not see have the label 0.

    If there are many maps or pixels, the labels are computed for a smaller image, and then enlarged.

    Args:
        grid: the patches of the image.
        maps: float32 [K, h, w], at most 255 maps.
        image: uint8 [H, W, 3]. If it is given, the outlines follow its edges.
        everywhere: also label pixels at which no map has a value above 0.
    """
    assert len(maps) <= MAX_LABELS, len(maps)
    if not len(maps):
        return np.zeros(grid.size, np.uint8)
    filters = maps[:, None] if image is None else _fit(grid, maps, image)  # [K, 1 or 4, a, b]
    smaller, small_image = _within_bounds(grid, len(maps), image)
    labels = np.zeros(smaller.size, np.uint8)
    reduced = smaller.size != grid.size
    for rows, columns, values in smaller.blocks(filters.reshape(-1, *filters.shape[2:]), everywhere=reduced):
        found = values.reshape(*filters.shape[:2], *values.shape[1:])  # [K, 1 or 4, rows, columns]
        heights: Floats = found[:, -1]
        if small_image is not None:
            colours = small_image[rows, columns].astype(np.float32) / 255  # [rows, columns, 3]
            for channel in range(3):
                heights = np.asarray(heights + found[:, channel] * colours[:, :, channel], np.float32)
        best = heights.argmax(axis=0)
        above = everywhere or np.take_along_axis(heights, best[None], axis=0)[0] > 0
        labels[rows, columns] = np.where(above, best + 1, 0)
    if not reduced:
        return labels
    enlarged = Image.fromarray(labels).resize((grid.size[1], grid.size[0]), Image.Resampling.NEAREST)
    return _only_seen(np.array(enlarged), grid)


def _within_bounds(grid: PatchGrid, maps: int, image: Pixels | None) -> tuple[PatchGrid, Pixels | None]:
    """Return the grid and the image. If the image has too many pixels for this number of maps, return smaller versions
    of the grid and the image."""
    height, width = grid.size
    factor = (_MAX_VALUES / (maps * height * width)) ** 0.5
    if factor >= 1:
        return grid, image
    size = max(1, int(height * factor)), max(1, int(width * factor))
    down, across = size[0] / height, size[1] / width
    x, y, box_width, box_height = grid.crop_box
    smaller = replace(grid, size=size, crop_box=(x * across, y * down, box_width * across, box_height * down))
    if image is None:
        return smaller, None
    return smaller, np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BOX))


def _only_seen(labels: Labels, grid: PatchGrid) -> Labels:
    """Set the labels [H, W] of the pixels that the network does not see to 0, and return the labels."""
    x, y, width, height = grid.seen_box
    rows, columns = np.arange(grid.size[0]) + 0.5, np.arange(grid.size[1]) + 0.5
    labels[(rows < y) | (rows >= y + height)] = 0
    labels[:, (columns < x) | (columns >= x + width)] = 0
    return labels


def tidy(labels: Labels, *, one_part: bool, smallest: float) -> Labels:
    """Fill holes and remove small parts in `labels`, which is changed in place, and return it.

    Args:
        labels: uint8 [H, W].
        one_part: keep only the largest connected part of each label.
        smallest: parts with fewer pixels are removed, except for the largest part of a label.
    """
    from scipy import ndimage

    for number, where in enumerate(ndimage.find_objects(labels), start=1):
        if where is None:
            continue
        window = labels[where]  # a view
        parts, count = ndimage.label(window == number)
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        keep = sizes == sizes.max() if one_part else (sizes >= smallest) | (sizes == sizes.max())
        if one_part:
            keep[int(sizes.argmax()) + 1 :] = False  # the first, if several are equally large
        keep[0] = False
        if not keep[1 : count + 1].all():
            window[(window == number) & ~keep[parts]] = 0
        window[holes(window == number) & (window == 0)] = number
    return labels


def holes(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the holes of a mask [H, W]: the pixels outside the mask that are not connected to the border of the array.
    Pixels are connected through common edges."""
    from scipy import ndimage

    parts, _ = ndimage.label(~mask)
    border = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
    enclosed = np.ones(int(parts.max()) + 1, bool)
    enclosed[border] = False
    enclosed[0] = False
    return np.asarray(enclosed[parts])


def _fit(grid: PatchGrid, maps: Floats, image: Pixels) -> Floats:
    """Fit each map as a linear function of the colour. Return the factors of red, green and blue and the constant in
    each cell of the small copy, float32 [K, 4, a, b]. The cells divide the patches evenly."""
    copy, seen = _small_copy(grid, image)  # [a, b, 3], [a, b]
    wide = _resized(maps, copy.shape[:2])  # [K, a, b]
    side = max(copy.shape[0] / grid.shape[0], copy.shape[1] / grid.shape[1])
    window = 2 * max(1, round(_WINDOW_IN_PATCHES * side)) + 1

    def mean(values: Floats) -> Floats:
        return np.asarray(_box_mean(values * seen, window) / weight, np.float32)

    weight = np.maximum(_box_mean(seen, window), 1e-6)
    colours = np.moveaxis(copy, 2, 0)  # [3, a, b]
    mean_colours = mean(colours)
    products = mean(colours[:, None] * colours[None]) - mean_colours[:, None] * mean_colours[None]  # [3, 3, a, b]
    inverses = np.linalg.inv(np.moveaxis(products, (0, 1), (2, 3)) + _SMOOTHNESS * np.eye(3, dtype=np.float32))
    factors = np.empty((len(maps), 4, *copy.shape[:2]), np.float32)
    for number, values in enumerate(wide):
        mean_value = mean(values)
        together = mean(colours * values) - mean_colours * mean_value  # [3, a, b]
        slopes = np.einsum("ijcd,dij->cij", inverses, together)
        factors[number, :3] = slopes
        factors[number, 3] = mean_value - (slopes * mean_colours).sum(axis=0)
    flat = factors.reshape(-1, *copy.shape[:2])
    return mean(flat).reshape(factors.shape)


def _small_copy(grid: PatchGrid, image: Pixels) -> tuple[Floats, Floats]:
    """Return a copy of the part of the image that the patches cover, float32 [a, b, 3] from 0 to 1, and the share of
    each of its pixels that is in the image, [a, b]. Padding is black, with the share 0."""
    per_patch = max(1, min(_CELLS_PER_PATCH, _MAX_SIDE // max(grid.shape)))
    down, across = grid.shape[0] * per_patch, grid.shape[1] * per_patch
    x, y, width, height = grid.box
    left, top = max(0, x), max(0, y)
    right, bottom = min(image.shape[1], x + width), min(image.shape[0], y + height)
    columns = round((left - x) * across / width), round((right - x) * across / width)
    rows = round((top - y) * down / height), round((bottom - y) * down / height)
    size = max(1, columns[1] - columns[0]), max(1, rows[1] - rows[0])
    part = Image.fromarray(image).resize(size, Image.Resampling.BOX, box=(left, top, right, bottom))
    copy = np.zeros((down, across, 3), np.float32)
    seen = np.zeros((down, across), np.float32)
    inside = slice(rows[0], rows[0] + size[1]), slice(columns[0], columns[0] + size[0])
    copy[inside] = np.asarray(part, np.float32) / 255
    seen[inside] = 1
    return copy, seen


def _resized(maps: Floats, size: tuple[int, int]) -> Floats:
    """Return the maps [K, h, w] as float32 [K, a, b], interpolated bilinearly between the centres of the patches."""
    return np.stack(
        [np.asarray(Image.fromarray(m).resize((size[1], size[0]), Image.Resampling.BILINEAR)) for m in maps]
    )


def _box_mean(values: Floats, window: int) -> Floats:
    """Return the mean over a square window around each cell of the last two axes."""
    from scipy import ndimage

    for axis in (-1, -2):
        values = ndimage.uniform_filter1d(values, window, axis=axis, mode="nearest")
    return values
