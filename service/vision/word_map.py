"""Assign a word to each pixel of an image, from the similarity of each patch to each word.

Legend: C words, H x W size of the image, h x w size of the patch grid.
"""

import colorsys
from typing import Final

import numpy as np
import numpy.typing as npt

from service.vision.pictures import Box, Floats, Pixels, bilinear_weights

Labels = npt.NDArray[np.uint8]

MAX_LABELLED: Final = 1 << 20
"""The number of pixels up to which each pixel gets its own label. In a larger image, squares of pixels share one."""
_BLOCK_FLOATS: Final = 1 << 23  # 32 MiB


def label_map(similarities: Floats, size: tuple[int, int], crop_box: Box, lowest: float | None = None) -> Labels:
    """Return the label of each pixel, uint8 [H, W]: the number of the most similar word, counted from 1.

    The similarities of the patches are interpolated bilinearly. The label is 0 outside `crop_box`, and where the
    similarity to every word is below `lowest`.

    Args:
        similarities: [C, h, w], at most 255 words. The patches cover `crop_box`.
        size: (H, W).
        crop_box: (x, y, width, height) in pixels of the image.
        lowest: the lowest similarity that gets a label.
    """
    assert len(similarities) <= 255
    step = 1
    while -(-size[0] // step) * -(-size[1] // step) > MAX_LABELLED:
        step += 1
    height, width = (-(-side // step) for side in size)
    x, y, box_width, box_height = (value / step for value in crop_box)
    rows, row_weights = bilinear_weights(height, y, box_height, similarities.shape[1])
    columns, column_weights = bilinear_weights(width, x, box_width, similarities.shape[2])
    labels = np.zeros((height, width), np.uint8)
    per_block = max(1, _BLOCK_FLOATS // max(1, len(similarities) * len(column_weights)))
    for start in range(0, len(row_weights), per_block):
        block = row_weights[start : start + per_block] @ similarities @ column_weights.T  # [C, rows, columns]
        best = block.argmax(axis=0).astype(np.uint8) + np.uint8(1)
        if lowest is not None:
            best[block.max(axis=0) < lowest] = 0
        top = rows.start + start
        labels[top : top + len(best), columns] = best
    if step > 1:
        labels = labels.repeat(step, axis=0).repeat(step, axis=1)[: size[0], : size[1]]
    contiguous: Labels = np.ascontiguousarray(labels)
    return contiguous


def palette(count: int) -> Pixels:
    """Return the colours of the labels 0 to `count`, uint8 [count + 1, 3]. Label 0 is black. Consecutive labels have
    very different hues."""
    golden = (5**0.5 - 1) / 2
    colours = [
        colorsys.hsv_to_rgb(i * golden % 1, 0.75 if i % 2 else 1.0, 1.0 if i % 3 else 0.75) for i in range(count)
    ]
    levels: Pixels = np.rint(np.array([(0.0, 0.0, 0.0), *colours]) * 255).astype(np.uint8)
    return levels
