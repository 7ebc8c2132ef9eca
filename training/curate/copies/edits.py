"""The edits that make copies of an image, with random parameters. They are the positive examples of a calibration."""

import math
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Final

import numpy as np
from PIL import Image, ImageEnhance

from training.curate.table import Pixels

CROP_AREA: Final = 0.75
LARGEST_TILT: Final = 20.0
SHORTEST_SIDE: Final = 8

Rng = np.random.Generator
Edit = Callable[[Image.Image, Rng], Image.Image]


def _encode(image: Image.Image, rng: Rng) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(25, 96)))
    return Image.open(buffer).convert("RGB")


def _resize(image: Image.Image, rng: Rng) -> Image.Image:
    factor = math.exp(rng.uniform(math.log(0.4), math.log(2)))
    size = [max(SHORTEST_SIDE, round(side * factor)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, rng: Rng) -> Image.Image:
    width = min(image.width, round(image.width * math.sqrt(CROP_AREA * math.exp(rng.uniform(-0.22, 0.22)))))
    height = min(image.height, max(1, round(image.width * image.height * CROP_AREA / width)))
    left, top = int(rng.integers(0, image.width - width + 1)), int(rng.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def _mirror(image: Image.Image, rng: Rng) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _turn(image: Image.Image, rng: Rng) -> Image.Image:
    turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    return image.transpose(turns[int(rng.integers(3))])


def _tilt(image: Image.Image, rng: Rng) -> Image.Image:
    degrees = rng.uniform(3, LARGEST_TILT) * (1 if rng.random() < 0.5 else -1)
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor="black" if rng.random() < 0.5 else "white")


def _recolour(image: Image.Image, rng: Rng) -> Image.Image:
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.6, 1.4))
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.6, 1.4))
    image = ImageEnhance.Color(image).enhance(rng.uniform(0, 2))
    hue, saturation, value = image.convert("HSV").split()
    shift = int(rng.integers(-25, 26))
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


EDITS: Final[Mapping[str, Edit]] = {
    "re-encoded": _encode,
    "resized": _resize,
    "cropped": _crop,
    "mirrored": _mirror,
    "turned": _turn,
    "tilted": _tilt,
    "recoloured": _recolour,
}
"""The edits by name: "turned" is a rotation by 90, 180 or 270 degrees, "tilted" one by up to 20 degrees."""


def edited(pixels: Pixels, kind: str, rng: Rng) -> Pixels:
    """Return a copy of an image, RGB [H, W, 3] uint8, made by an edit in `EDITS` and encoded as a JPEG."""
    image = EDITS[kind](Image.fromarray(pixels), rng)
    return np.asarray(image if kind == "re-encoded" else _encode(image, rng))
