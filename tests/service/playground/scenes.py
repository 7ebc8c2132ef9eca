"""Generated images: a coloured object in front of a striped background."""

from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw


def scene(number: int, width: int = 320, height: int = 240) -> bytes:
    """Return a JPEG file. Scenes with the same number are equal, and `number` % 4 decides the colour of the object."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (width, height), tuple(int(value) for value in rng.integers(120, 200, 3)))
    draw = ImageDraw.Draw(image)
    for x in range(0, width, 24):
        draw.line([(x, 0), (x + 40, height)], fill=(110, 120, 130), width=4)
    colour = [(200, 40, 40), (40, 160, 60), (40, 70, 200), (220, 180, 40)][number % 4]
    left, top = int(rng.integers(20, width // 2)), int(rng.integers(20, height // 2))
    draw.ellipse([left, top, left + 110, top + 90], fill=colour, outline=(20, 20, 20), width=3)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
