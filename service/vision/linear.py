"""Segment an image with a supervised head (`model/heads/`): one class per pixel.

The logits of the patches are interpolated bilinearly to the pixels of the image, as in Meta's evaluation, and each
pixel gets the class with the largest logit. The logits of a large image with many classes would not fit into memory, so
they are computed for a few rows at a time. To bound the time, at most `MAX_LOGITS` logits are computed: if there are
more, the classes are determined on a coarser grid of pixels, and each pixel of the image gets the class of the nearest
pixel of this grid.

Legend: C classes, H, W size of the image in pixels; h, w size of the patch grid.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from model.heads.store import Head
from service.errors import EngineFailed
from service.features.pipeline import Analysed
from service.vision.heads import tokens_of
from service.vision.pictures import bilinear_weights

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]

MAX_LOGITS: Final = 100_000_000
_BLOCK_LOGITS: Final = 1 << 16  # they fit into the cache of a core


def segment_linear(head: Head, analysed: Analysed) -> Labels:
    """Segment an image with a segmentation head. Return the label of each pixel, uint8 [H, W]: the number of its class
    plus 1, or 0 outside the part of the image that the network sees. `analysed` must have the inner outputs that the
    head needs.

    Raises:
        EngineFailed: a logit is not finite, because the numbers of the head are too large.
    """
    logits = head.segment(tokens_of(analysed))
    if not np.isfinite(logits).all():
        raise EngineFailed(f"the head {head.record.name!r} gives classes that are not finite")
    return pixel_classes(logits, analysed.size, analysed.crop_box)


def pixel_classes(logits: Floats, size: tuple[int, int], crop_box: Box) -> Labels:
    """Return 1 plus the number of the class with the largest interpolated logit for each pixel, uint8 [H, W].

    Args:
        logits: [C, h, w], of at most 255 classes.
        size: (H, W).
        crop_box: the part of the image that the patches cover, (x, y, width, height) in pixels. The other pixels get
            the value 0.
    """
    scale = min(1.0, (MAX_LOGITS / (len(logits) * size[0] * size[1])) ** 0.5)
    if scale < 1:
        coarse = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
        down, across = coarse[0] / size[0], coarse[1] / size[1]
        x, y, width, height = crop_box
        labels = pixel_classes(logits, coarse, (x * across, y * down, width * across, height * down))
        rows, columns = (
            np.minimum(((np.arange(n) + 0.5) * k / n).astype(np.int64), k - 1)
            for n, k in zip(size, coarse, strict=True)
        )
        return labels[rows[:, None], columns]
    rows_seen, row_weights = bilinear_weights(size[0], crop_box[1], crop_box[3], logits.shape[1])
    columns_seen, column_weights = bilinear_weights(size[1], crop_box[0], crop_box[2], logits.shape[2])
    labels = np.zeros(size, np.uint8)
    seen = labels[rows_seen, columns_seen]  # a view
    classes, h, w = logits.shape
    flat = np.ascontiguousarray(logits.transpose(1, 2, 0), np.float32).reshape(h, w * classes)
    step = max(1, _BLOCK_LOGITS // max(1, classes * seen.shape[1]))
    for top in range(0, len(seen), step):
        block = (row_weights[top : top + step] @ flat).reshape(-1, w, classes)
        seen[top : top + step] = 1 + (column_weights @ block).argmax(axis=2)  # [rows, W, C] -> [rows, W]
    return labels
