"""Compare the patches of a large image with words in overlapping windows.

A backbone that was trained on small images sees more detail if an image is enlarged and then divided into windows of
the size on which the backbone was trained. Meta's notebook for dino.txt does this with a short side of 512 pixels,
windows of 384 pixels and steps of 192 pixels, for patches of 16 pixels. This module uses the nearest sizes for DINOv2's
patches of 14 pixels.

Legend: C words, h x w size of the patch grid of the enlarged image.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from model.preprocess import PreprocessSpec, output_size, preprocess
from service.errors import InvalidRequest
from service.features.pipeline import Analysed
from service.features.served_model import FloatArray, ServedModel
from service.vision.pictures import Box, Floats

SHORT_SIDE: Final = 37  # patches: 518 pixels with patches of 14 pixels, the largest size of DINOv2's training
WINDOW: Final = 28  # patches: 392 pixels
STEP: Final = 14  # patches: 196 pixels
MAX_WINDOWS: Final = 16


class WindowedMap(NamedTuple):
    """The similarity of each patch of an enlarged image to C words, [C, h, w], and the part of the image that the
    patches cover, (x, y, width, height) in pixels of the original image."""

    similarities: Floats
    crop_box: Box


def windowed_similarities(
    analysed: Analysed, model: ServedModel, compare: Callable[[FloatArray], Floats]
) -> WindowedMap:
    """Enlarge an image, and compare each window with words. Return the similarities of each patch, averaged over the
    windows that contain the patch.

    Args:
        analysed: the image.
        model: the model with its preprocessing.
        compare: returns the similarities [C, WINDOW, WINDOW] of the patches of a window to C words, given the pixels of
            the window as the network's input [3, height, width].

    Raises:
        InvalidRequest: the image is so long that it needs more than `MAX_WINDOWS` windows.
        ServiceError: a forward pass failed.
    """
    patch = model.config.patch_size
    spec = model.spec(SHORT_SIDE * patch)
    assert spec is not None
    starts = _window_starts(analysed.size, spec)
    pixels = preprocess(analysed.image, spec)
    h, w = (side // patch for side in pixels.shape[1:])
    sums: Floats | None = None
    counts = np.zeros((h, w), np.float32)
    for top in starts[0]:
        for left in starts[1]:
            rows, columns = slice(top, top + WINDOW), slice(left, left + WINDOW)
            window = pixels[:, top * patch : (top + WINDOW) * patch, left * patch : (left + WINDOW) * patch]
            similarities = compare(np.ascontiguousarray(window))
            if sums is None:
                sums = np.zeros((len(similarities), h, w), np.float32)
            sums[:, rows, columns] += similarities
            counts[rows, columns] += 1
    assert sums is not None
    mean = np.asarray(sums / counts, np.float32)
    return WindowedMap(mean, (0.0, 0.0, float(analysed.size[1]), float(analysed.size[0])))


def _window_starts(size: tuple[int, int], spec: PreprocessSpec) -> tuple[list[int], list[int]]:
    """Return the first rows and the first columns of all windows, in patches, for an image of size (H, W)."""
    down, across = (side // spec.patch_size for side in output_size(*size, spec))
    rows, columns = (sorted({*range(0, side - WINDOW, STEP), side - WINDOW}) for side in (down, across))
    if len(rows) * len(columns) > MAX_WINDOWS:
        raise InvalidRequest(
            f"windows: an image of {size[1]} x {size[0]} pixels needs {len(rows)} x {len(columns)} windows, but at "
            f"most {MAX_WINDOWS} are allowed: divide the image, or do not set windows",
            param="windows",
        )
    return rows, columns
