"""CleanVision's nine checks: dark, light, odd aspect ratio, low information, blurry, grayscale, odd size, copies.

The definitions and the limits are those of CleanVision 0.3.7, so an image gets the same verdicts as there.
docs/decisions/0057-quality.md has the measurement, and lists the few files for which the verdicts differ on purpose.
The scan calls `measure` on each image while its pixels are in memory. `find_issues` then needs only the table, so other
limits need no new scan.

The brightness of a pixel is sqrt(0.241 R^2 + 0.691 G^2 + 0.068 B^2) / 255. Its percentiles come from a histogram that
is counted in integers, so they do not depend on the machine or on the number of threads. The bins are narrow enough for
the verdicts: near the limit of a dark image, a percentile is off by at most 0.0002.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from training.curate.shrink import BICUBIC, shrink
from training.curate.table import Images, Pixels

MEASURES: Final = (
    "brightness",  # mean over the pixels, 0 to 1
    "brightness_5",  # 5th percentile
    "brightness_99",  # 99th percentile
    "entropy",  # bits, of the values of all channels together
    "sharpness",  # standard deviation of the edges of the gray image, shrunk to at most 64 pixels
    "tone_spread",  # standard deviation of the 256 counts in the histogram of the same gray image
    "grayscale",  # 1 if the file stores a gray image, else 0
)
ISSUES: Final = (
    "dark",
    "light",
    "odd_aspect_ratio",
    "low_information",
    "blurry",
    "grayscale",
    "odd_size",
    "exact_duplicates",
    "near_duplicates",
)
BLUR_SIDE: Final = 64
REDUCING_GAP: Final = 3  # images of more than 6 times `BLUR_SIDE` are first reduced by averaging, which is faster

_WEIGHTS: Final = (241, 691, 68)  # of the squared channels, in thousandths
_BIN_BITS: Final = 14  # a bin has 2**14 values of the weighted sum
_N_BINS: Final = (sum(_WEIGHTS) * 255**2 >> _BIN_BITS) + 1
_BIN_BRIGHTNESS: Final = np.minimum(
    np.sqrt((np.arange(_N_BINS) + 0.5) * 2**_BIN_BITS / sum(_WEIGHTS)) / 255, 1
)  # of the middle of each bin
_BLOCK_PIXELS: Final = 1 << 15  # so that the numbers of a block stay in the CPU's cache


@dataclass(frozen=True)
class Limits:
    """The limits of the checks. An image has an issue if its score, from 0 to 1, is below the limit.

    `dark`, `light`, `odd_aspect_ratio`, `low_information` and `blurry` are these limits. `plain` is the value above
    which few, strongly populated tones keep an image from being called blurry. `odd_size` is the number of
    interquartile ranges by which the side of an image may lie outside the middle half of all sides.
    """

    dark: float = 0.32
    light: float = 0.05
    odd_aspect_ratio: float = 0.35
    low_information: float = 0.3
    blurry: float = 0.29
    plain: float = 0.18
    odd_size: float = 3.0


DEFAULT_LIMITS: Final = Limits()


def measure(
    pixels: Pixels, mode: str, image: Image.Image | None = None, gray: Pixels | None = None
) -> dict[str, float]:
    """Return the measures of one image by name, those in MEASURES.

    Args:
        pixels: RGB [H, W, 3] uint8, upright.
        mode: the mode in which Pillow opens the file, such as "RGB" or "L". "L" is 8-bit gray.
        image: the same pixels as an image of mode RGB; None: they are copied into one.
        gray: the same image, converted to mode L: [H, W] uint8; None: it is converted.
    """
    is_gray = mode == "L"
    if image is None:
        image = Image.fromarray(pixels)
    if gray is None:
        gray = np.asarray(image.convert("L"))
    if is_gray:
        image = image.getchannel(0)
    counts = _brightness_counts(pixels)
    dark_end, bright_end = _percentiles(counts, (5, 99))
    sharpness, tone_spread = _sharpness(gray)
    return {
        "brightness": float(counts @ _BIN_BRIGHTNESS / counts.sum()),
        "brightness_5": dark_end,
        "brightness_99": bright_end,
        "entropy": image.entropy(),
        "sharpness": sharpness,
        "tone_spread": tone_spread,
        "grayscale": float(is_gray),
    }


def _brightness_counts(pixels: Pixels) -> npt.NDArray[np.int64]:
    """Count the pixels of an image by the square of their brightness, in bins of equal width."""
    flat = pixels.reshape(-1, 3)
    counts = np.zeros(_N_BINS, np.int64)
    total, channel = np.empty((2, min(len(flat), _BLOCK_PIXELS)), np.uint32)
    for top in range(0, len(flat), _BLOCK_PIXELS):
        block = flat[top : top + _BLOCK_PIXELS]
        sums, squares = total[: len(block)], channel[: len(block)]
        sums[:] = 0
        for c, weight in enumerate(_WEIGHTS):
            squares[:] = block[:, c]
            squares *= squares
            squares *= weight
            sums += squares
        sums >>= _BIN_BITS
        counts += np.bincount(sums, minlength=_N_BINS)
    return counts


def _percentiles(counts: npt.NDArray[np.int64], percentiles: tuple[int, ...]) -> list[float]:
    """Return percentiles of the brightness, interpolated between neighbouring pixels as NumPy does by default."""
    up_to = np.cumsum(counts)
    last = int(up_to[-1]) - 1
    values = []
    for percentile in percentiles:
        rank, part = divmod(percentile * last, 100)
        below, above = np.searchsorted(up_to, [rank, min(rank + 1, last)], side="right")
        low, high = _BIN_BRIGHTNESS[below], _BIN_BRIGHTNESS[above]
        values.append(float(low + (high - low) * part / 100))
    return values


def _sharpness(gray: Pixels) -> tuple[float, float]:
    """Return the standard deviations of the shrunk gray image's edges and of the counts in its histogram."""
    height, width = gray.shape
    ratio = max(height, width) / BLUR_SIDE
    image = Image.fromarray(gray)
    if ratio > 1:
        size = max(int(width // ratio), 1), max(int(height // ratio), 1)
        if max(width / size[0], height / size[1]) < 2 * REDUCING_GAP:
            image = Image.fromarray(shrink(gray, size, BICUBIC))
        else:
            image = image.resize(size, reducing_gap=REDUCING_GAP)
    edges = np.asarray(image.filter(ImageFilter.FIND_EDGES))
    return float(edges.std()), float(np.std(image.histogram()))


def scores(images: Images, limits: Limits = DEFAULT_LIMITS) -> dict[str, npt.NDArray[np.float64]]:
    """Return the scores [n] of the five checks that compare a score with a limit. A low score is bad."""
    of = {name: values.astype(np.float64) for name, values in images.measures.items()}
    width, height = images.width.astype(np.float64), images.height.astype(np.float64)
    plain = 1 - np.exp(-0.01 * of["tone_spread"])
    plain[plain <= limits.plain] = 0
    return {
        "dark": of["brightness_99"],
        "light": 1 - of["brightness_5"],
        "odd_aspect_ratio": np.minimum(width / height, height / width),
        "low_information": np.minimum(0.1 * of["entropy"], 1),
        "blurry": np.minimum(1 - np.exp(-0.01 * of["sharpness"]) + plain, 1),
    }


def find_issues(images: Images, limits: Limits = DEFAULT_LIMITS) -> dict[str, npt.NDArray[np.bool_]]:
    """Check every image, and return for each of ISSUES which images have it, [n].

    Odd sizes and duplicates depend on the whole set of images. All members of a group of duplicates have the issue,
    also the one that a later stage keeps. Images whose pixels are equal are not near duplicates, unless another image
    has the same perceptual hash.
    """
    issues = {name: score < getattr(limits, name) for name, score in scores(images, limits).items()}
    issues["grayscale"] = images.measures["grayscale"] == 1
    issues["odd_size"] = _odd_sizes(images, limits.odd_size)
    issues["exact_duplicates"], issues["near_duplicates"] = _duplicates(images)
    return {name: issues[name] for name in ISSUES}


def _odd_sizes(images: Images, ranges: float) -> npt.NDArray[np.bool_]:
    """Find images whose side, the square root of the area, is far from the others.

    If the middle half of the images has one size, every other size is odd.
    """
    if not len(images):
        return np.zeros(0, np.bool_)
    side = np.sqrt(images.width.astype(np.float64)) * np.sqrt(images.height.astype(np.float64))
    low, high = np.percentile(side, [25, 75])
    margin = ranges * (high - low)
    return (side < low - margin) | (side > high + margin)


def _duplicates(images: Images) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Find images with the pixels of another image, and images with the perceptual hash of a different image."""
    digests = np.ascontiguousarray(images.pixels_sha256).view("V32").reshape(-1)
    _, first, group, sizes = np.unique(digests, return_index=True, return_inverse=True, return_counts=True)
    _, hash_number = np.unique(images.phash, return_inverse=True)
    different = np.bincount(hash_number[first], minlength=hash_number.max(initial=-1) + 1)  # images with each hash
    return sizes[group] > 1, different[hash_number] > 1
