"""Show the patch features of images as colours: one principal component analysis for all images, and one picture.

Legend: H, W size of an image in pixels; h, w size of its patch grid; D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from service.errors import InvalidRequest
from service.vision.foreground import upsample_mask
from service.vision.pca import COMPONENTS, colour_range, fit_pca, project, to_colours
from service.vision.pictures import Box, Pixels, to_image

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

JOINT_HEIGHT: Final = 512
"""The largest height in pixels of an image in a picture of several images."""
MAX_PIXELS: Final = 2**26
_GAP: Final = 8  # pixels between two images


@dataclass(frozen=True)
class Shown:
    """How a picture shows one image.

    size: the size (H, W) of the upright image.
    crop_box: the part of the image that the network sees.
    used: bool [h, w], the patches from which the colours are computed.
    scores: float32 [h, w], above 0 where the picture shows colours. If None, it shows colours in all of `crop_box`.
    image: the image itself, at `thumbnail_size` or smaller, if the picture also shows the image.
    """

    size: tuple[int, int]
    crop_box: Box
    used: Mask
    scores: Floats | None = None
    image: Pixels | None = None


def joint_colours(features: Sequence[Floats], used: Sequence[Mask]) -> list[Floats]:
    """Return the colours of all patches of several images, float32 [h, w, 3] from 0 to 1 for each image.

    Args:
        features: the patch features [h, w, D] of each image.
        used: bool [h, w] for each image, the patches from which the components and the ranges of the colours are
            computed. If no patch of any image is used, all colours are 0.

    Raises:
        ValueError: a feature is not finite.
    """
    groups = [each[mask] for each, mask in zip(features, used, strict=True)]  # each [n, D]
    if not sum(map(len, groups)):
        return [np.zeros((*each.shape[:2], COMPONENTS), np.float32) for each in features]
    pca = fit_pca(groups)
    limits = colour_range(np.concatenate([project(group, pca) for group in groups]))
    return [
        to_colours(project(each.reshape(-1, each.shape[2]), pca), limits).reshape(*each.shape[:2], -1)
        for each in features
    ]


def thumbnail_size(size: tuple[int, int], height: int = JOINT_HEIGHT) -> tuple[int, int]:
    """Return the size (H, W) to which an image of this size is reduced: at most `height` pixels high, with the same
    aspect ratio."""
    height = min(height, size[0])
    return height, max(1, round(size[1] * height / size[0]))


def draw_colours(colours: Sequence[Floats], shown: Sequence[Shown]) -> Pixels:
    """Draw the colours [h, w, 3] of images, and return a picture, uint8 [height, width, 3].

    The picture of a single image has the size of the image. Several images are drawn side by side at the same height,
    with at most JOINT_HEIGHT pixels. If `shown` contains the images themselves, each image is drawn above its colours,
    also with at most this height. Parts that the network does not see or that are not in the foreground are black.

    Raises:
        InvalidRequest: the picture would be too large.
    """
    with_images = shown[0].image is not None
    sizes = [each.size for each in shown]
    if with_images or len(shown) > 1:
        height = min(JOINT_HEIGHT, max(size[0] for size in sizes))
        sizes = [(height, max(1, round(size[1] * height / size[0]))) for size in sizes]
    rows = 2 if with_images else 1
    total = sizes[0][0] * rows + _GAP * (rows - 1), sum(size[1] for size in sizes) + _GAP * (len(sizes) - 1)
    if total[0] * total[1] > MAX_PIXELS:
        raise InvalidRequest(
            f"format=pca: the picture would have {total[0]} x {total[1]} pixels (height, width), but at most "
            f"{MAX_PIXELS:,} pixels are allowed; send smaller or fewer images",
            param="format",
        )
    canvas = np.full((*total, 3), 255, np.uint8)
    left = 0
    for values, each, size in zip(colours, shown, sizes, strict=True):
        columns = slice(left, left + size[1])
        canvas[-size[0] :, columns] = _enlarged(values, each, size)
        if each.image is not None:
            resized = Image.fromarray(each.image).resize(size[::-1], Image.Resampling.BICUBIC)
            canvas[: size[0], columns] = np.asarray(resized)
        left += size[1] + _GAP
    return canvas


def _enlarged(colours: Floats, shown: Shown, size: tuple[int, int]) -> Pixels:
    """Enlarge the colours [h, w, 3] of an image to `size` (H, W), and return them as uint8 [H, W, 3]."""
    down, across = size[0] / shown.size[0], size[1] / shown.size[1]
    x, y, width, height = shown.crop_box
    box = x * across, y * down, width * across, height * down
    pixels = np.empty((*size, COMPONENTS), np.uint8)
    for channel in range(COMPONENTS):  # one at a time, because floats need four times the memory
        pixels[:, :, channel] = np.rint(to_image(colours[:, :, channel], size, box) * 255)
    if shown.scores is not None:
        pixels[~upsample_mask(shown.scores, *size, box)] = 0
    return pixels
