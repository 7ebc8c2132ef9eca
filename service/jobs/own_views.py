"""Random crops of an image, by which a model must find the image again.

A crop shows 30 to 60 % of the image, and its light, colours and sharpness are changed, as for the measure of a training
run without classes (`training/evaluate/label_free.py`). The service does not import the training, so the crops are made
with Pillow. They are not pixel-identical to those of the training: they are square, and the hue is not changed.

All random choices are derived from the sha256 of the image file, not from a generator of a library. The champion's
features may be months older than the challenger's, so the crops must stay the same. `VERSION` must be raised if the
crops change.
"""

import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageFilter

Pixels = npt.NDArray[np.uint8]

VERSION: Final = 1
AREA: Final = (0.3, 0.6)  # of a crop, as a share of the image's area
CHANGES: Final = ((ImageEnhance.Brightness, 0.4), (ImageEnhance.Contrast, 0.4), (ImageEnhance.Color, 0.2))
CHANGED, GREY, BLURRED = 0.8, 0.2, 0.5  # probabilities
BLUR_SIGMA: Final = (0.1, 2.0)  # in pixels of a crop with sides of 224 pixels
BLUR_SIDE: Final = 224


def own_views(image: Pixels, sha256: str, count: int) -> list[Pixels]:
    """Return `count` random crops of an image [H, W, 3], each a square [S, S, 3] with its own side S.

    `sha256` identifies the image file and determines the random choices.
    """
    return [_view(image, _uniform(f"{sha256}/{view}/{VERSION}", 11)) for view in range(count)]


def _uniform(key: str, count: int) -> list[float]:
    """Return `count` numbers from 0 to 1, which depend on the key only."""
    words = np.frombuffer(hashlib.shake_256(key.encode()).digest(8 * count), "<u8")
    return [float(word) / 2.0**64 for word in words]


def _view(image: Pixels, random: list[float]) -> Pixels:
    height, width = image.shape[:2]
    share = AREA[0] + (AREA[1] - AREA[0]) * random[0]
    side = max(1, min(height, width, round((share * height * width) ** 0.5)))
    top, left = round((height - side) * random[1]), round((width - side) * random[2])
    crop = Image.fromarray(image[top : top + side, left : left + side])
    if random[3] < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if random[4] < CHANGED:
        for (change, strength), number in zip(CHANGES, random[5:8], strict=True):
            crop = change(crop).enhance(1 + strength * (2 * number - 1))
    if random[8] < GREY:
        crop = crop.convert("L").convert("RGB")
    if random[9] < BLURRED:
        sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * random[10]
        crop = crop.filter(ImageFilter.GaussianBlur(sigma * side / BLUR_SIDE))
    return np.asarray(crop)
