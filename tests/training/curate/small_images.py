"""Small images made by code, and a fast stand-in for the model, for the tests of curation."""

from pathlib import Path

import numpy as np
from PIL import Image

from training.curate.embedding import unit


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Return a picture with coloured patches that differ with the seed. `size` is its width and height."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def fill_folder(folder: Path, n: int, first: int = 0) -> Path:
    """Write n pictures with the seeds from `first` on, alternately in two classes."""
    for seed in range(first, first + n):
        path = folder / ("a", "b")[seed % 2] / f"{seed:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)
    return folder


class FakeEmbedder:
    """Embeds an image by the colours of a few of its pixels."""

    made = 0
    images = 0

    def __init__(self, *args: object) -> None:
        type(self).made += 1

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        type(self).images += 1
        small = Image.fromarray(pixels).resize((3, 3), Image.Resampling.BOX)
        return unit(np.asarray(small, np.float32).reshape(-1) - 100)
