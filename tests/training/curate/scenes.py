"""Images made by code, for the tests of copies: rich in detail, and different for each number."""

import numpy as np
from PIL import Image, ImageDraw

from training.curate.table import Pixels


def scene(number: int, height: int = 240, width: int = 300) -> Pixels:
    """Return an image [height, width, 3] of random shapes on a smooth background."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y = rng.integers(0, width), rng.integers(0, height)
        across, down = rng.integers(6, 40, 2)
        box = (int(x), int(y), int(x + across), int(y + down))
        colour = tuple(rng.integers(0, 256, 3).tolist())
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=colour)
    return np.asarray(image)
