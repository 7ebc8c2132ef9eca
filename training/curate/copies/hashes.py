"""Perceptual hashes of 64 bits, and the hashes of mirrored and rotated images, which follow from them.

The hash has one bit for each of the 8 x 8 lowest frequencies of the image's discrete cosine transform: whether the
coefficient exceeds the median of the 64. The ImageHash package (`phash`), and therefore CleanVision, define it the same
way, and the bits are equal.

Mirroring an image changes the sign of the coefficients with an odd horizontal frequency. Rotating it by 90 degrees
also transposes them. Since the median is close to zero, the hash of a mirrored or rotated image follows from the
hash of the image, except for a few bits whose coefficients are close to the median.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.fft import dct

from training.curate.shrink import LANCZOS, shrink
from training.curate.table import Pixels

Hashes = npt.NDArray[np.uint64]

SIDE: Final = 8
SAMPLED_SIDE: Final = 32
SYMMETRIES: Final = 8
"""The number of ways to mirror an image and rotate it by multiples of 90 degrees, including the image itself."""


def perceptual_hash(pixels: Pixels) -> int:
    """Return the hash of an image. Its most significant bit belongs to the lowest frequency.

    Args:
        pixels: RGB [H, W, 3] or gray [H, W], uint8, upright.
    """
    gray = pixels if pixels.ndim == 2 else np.asarray(Image.fromarray(pixels).convert("L"))
    sampled = shrink(gray, (SAMPLED_SIDE, SAMPLED_SIDE), LANCZOS)
    columns = dct(sampled.astype(np.float64), axis=0)  # not normalised, which does not change the bits
    low = dct(columns, axis=1)[:SIDE, :SIDE]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def _bits(hashes: Hashes) -> npt.NDArray[np.uint8]:
    """Return the bits of hashes [n] as [n, 8, 8]: vertical frequency, horizontal frequency."""
    return np.unpackbits(hashes.astype(">u8").view(np.uint8).reshape(-1, 8), axis=1).reshape(-1, SIDE, SIDE)


def _hashes(bits: npt.NDArray[np.uint8]) -> Hashes:
    packed = np.packbits(bits.reshape(-1, SIDE * SIDE), axis=1)
    return packed.reshape(-1).view(">u8").astype(np.uint64)


def symmetric_hashes(hashes: Hashes) -> Hashes:
    """Return the hashes [n, 8] of the images with these hashes [n] after each of the 8 symmetries.

    The first column contains the hashes themselves. The hash of a symmetric image can differ from the one given here
    in a few bits.
    """
    odd = (np.arange(SIDE) % 2).astype(np.uint8)
    bits = _bits(hashes)
    flips = [(rows * odd[:, None]) ^ (columns * odd) for rows in (0, 1) for columns in (0, 1)]
    variants = [_hashes(turned ^ flip) for turned in (bits, bits.transpose(0, 2, 1)) for flip in flips]
    return np.stack(variants, axis=1)


def distances(hashes: Hashes, others: Hashes) -> npt.NDArray[np.uint8]:
    """Return the number of bits in which hashes differ. The two arrays are broadcast against each other."""
    different = np.ascontiguousarray(np.bitwise_xor(hashes, others))
    counts = _ONES[different.view(np.uint16)]
    return counts.reshape(*different.shape, 4).sum(axis=-1, dtype=np.uint8)


_ONES: Final = np.array([number.bit_count() for number in range(1 << 16)], np.uint8)
