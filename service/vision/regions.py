"""Describe the regions of an image: as run lengths, polygons, a picture of labels, or coloured on the image.

Regions are given as labels, an array uint8 [H, W]: 0 outside all regions, and the number of the region, counted from 1,
elsewhere. So regions never overlap, and every mask has the size of the upright image.
"""

import io
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from service.vision.mask import coco_rle_encode
from service.vision.patch_grid import PatchGrid
from service.vision.polygons import as_json, polygons
from service.vision.refine import label_pixels, tidy

Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.uint8]
Pixels = npt.NDArray[np.uint8]

_DIM: Final = 0.35
_ALPHA: Final = 0.5
_ROWS_PER_BLOCK: Final = 256


def pixel_labels(
    grid: PatchGrid, masks: Sequence[Mask], image: Pixels | None, *, one_part: bool = False, cover: bool = False
) -> Labels:
    """Convert masks over patches to labels of pixels, uint8 [H, W]. Holes are filled, and parts that are smaller than
    half a patch are removed.

    Args:
        grid: the patches of the image.
        masks: each bool [h, w].
        image: uint8 [H, W, 3]. If it is given, the outlines follow its edges.
        one_part: keep only the largest part of each region.
        cover: whether the masks cover all patches. If so, each pixel that the network sees gets a label, and nothing is
            removed.
    """
    maps = np.stack([mask.astype(np.float32) for mask in masks]) if masks else np.zeros((0, *grid.shape), np.float32)
    if cover:
        return label_pixels(grid, maps, image, everywhere=True)
    patch = grid.box[2] * grid.box[3] / (grid.shape[0] * grid.shape[1])
    return tidy(label_pixels(grid, 2 * maps - 1, image), one_part=one_part, smallest=patch / 2)


def describe_regions(
    labels: Labels, scores: Sequence[float] | None, format_: str, tolerance: float
) -> list[dict[str, Any]]:
    """Return a JSON object for each region that has pixels: its label, its score if there are scores, its area in
    pixels, its box and, if `format_` is "rle" or "polygons", its outline.

    Raises:
        InvalidRequest: an outline has too many edges for polygons.
    """
    from scipy import ndimage

    regions: list[dict[str, Any]] = []
    for number, where in enumerate(ndimage.find_objects(labels), start=1):
        if where is None:
            continue
        rows, columns = where
        region: dict[str, Any] = {"label": number}
        if scores is not None:
            region["score"] = round(float(scores[number - 1]), 4)
        region["area"] = int((labels[where] == number).sum())
        region["box"] = [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
        if format_ == "rle":
            region["segmentation"] = coco_rle_encode(labels == number)
        elif format_ == "polygons":
            region |= as_json(polygons(labels == number, tolerance))
        regions.append(region)
    return regions


@cache
def label_colours() -> Pixels:
    """Return a colour for each label, uint8 [256, 3]. Consecutive labels have very different hues. The colour of the
    label 0 is black."""
    hues = (0.02 + np.arange(-1, 255) * 0.618034) % 1
    third = hues[:, None] + np.array([0, 2 / 3, 1 / 3])  # red, green, blue
    wave = np.clip(np.abs((third % 1) * 6 - 3) - 1, 0, 1)
    bright = np.where(np.arange(256) % 2, 1.0, 0.75)[:, None]
    colours: Pixels = np.asarray(255 * bright * (0.15 + 0.85 * wave)).astype(np.uint8)
    colours[0] = 0
    colours.setflags(write=False)  # cached and shared
    return colours


def labels_png(labels: Labels) -> bytes:
    """Encode labels [H, W] as a PNG with a palette. The value of a pixel is its label."""
    picture = Image.fromarray(labels)
    picture.putpalette(label_colours().tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def tinted(image: Pixels, labels: Labels) -> Pixels:
    """Return the image [H, W, 3] with each region tinted in its colour and everything else dimmed."""
    result = np.empty_like(image)
    for start in range(0, len(image), _ROWS_PER_BLOCK):
        block = slice(start, start + _ROWS_PER_BLOCK)
        inside = labels[block, :, None] > 0
        colours = label_colours()[labels[block]].astype(np.float32)
        mixed = image[block] * np.float32(1 - _ALPHA) + colours * np.float32(_ALPHA)
        result[block] = np.where(inside, mixed, image[block] * np.float32(_DIM)).astype(np.uint8)
    return result
