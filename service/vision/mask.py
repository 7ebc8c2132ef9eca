"""Encode masks as COCO's compressed run lengths, as PNG images, or as overlays on images. Decode run lengths.

COCO's run-length encoding (cocoapi, `common/maskApi.c`) is a list of the lengths of runs of equal pixels, in
column-major order. The first run is background. Its length is 0 if the mask begins with foreground. To compress the
list, each run length from the fourth on is replaced with its difference from the run length two positions before it.
Each number is divided into groups of 5 bits, lowest bits first, and each group is written as one character. The code of
this character is the value of the group plus 48, plus 32 if more groups of the number follow. The highest bit of the
last group is the sign of the number. pycocotools returns the same string. This module processes all runs at once with
numpy.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from service.vision.pictures import png_bytes

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]

_MAX_GROUPS: Final = 13  # 13 * 5 bits hold any 64-bit value
_DIM: Final = 0.35
_TINT: Final = (255, 64, 32)


def coco_rle_encode(mask: Mask) -> dict[str, Any]:
    """Encode a mask [H, W] and return `{"size": [H, W], "counts": str}`. `pycocotools.mask.encode` returns the same,
    but with `counts` as bytes."""
    flat = np.ravel(mask, order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(edges)
    if flat.size and flat[0]:
        counts = np.concatenate([[0], counts])
    return {"size": [int(side) for side in mask.shape], "counts": _pack(counts)}


def coco_rle_decode(rle: dict[str, Any]) -> Mask:
    """Decode run lengths in COCO's format, `{"size": [H, W], "counts": ...}`, and return the mask, bool [H, W].
    `counts` is a compressed string (str or bytes) or a list of uncompressed run lengths.

    Raises:
        ValueError: the run lengths are invalid, or their sum is not H * W.
    """
    height, width = (int(side) for side in rle["size"])
    counts = rle["counts"]
    if isinstance(counts, list):
        runs = np.asarray(counts, np.int64)
    else:
        runs = _unpack(counts.encode("ascii", "replace") if isinstance(counts, str) else counts)
    pixels = height * width
    wrong = runs[(runs < 0) | (runs > pixels)]  # check each run before the sum, which may wrap around
    if len(wrong):
        raise ValueError(f"a run length is {wrong[0]}, but must be from 0 to {pixels} ({height} x {width} pixels)")
    if min(height, width) < 0 or runs.sum() != pixels:
        raise ValueError(f"the run lengths sum to {runs.sum()}, not to {pixels} ({height} x {width} pixels)")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape((height, width), order="F")


def _pack(counts: npt.NDArray[np.int64]) -> str:
    """Compress run lengths and return the string in COCO's format."""
    values = counts.astype(np.int64)
    values[3:] -= counts[1:-2]
    groups = np.arange(_MAX_GROUPS)
    shifted = values[:, None] >> np.minimum(5 * groups, 63)  # [runs, groups], arithmetic
    rest = values[:, None] >> np.minimum(5 * groups + 4, 63)  # the value without the bits below the group's sign bit
    last = np.argmax((rest == 0) | (rest == -1), axis=1)  # the first group whose sign bit determines the rest
    chars = (shifted & 0x1F) + np.where(groups < last[:, None], 0x20, 0) + 48
    text: bytes = chars[groups <= last[:, None]].astype(np.uint8).tobytes()
    return text.decode("ascii")


def _unpack(text: bytes) -> npt.NDArray[np.int64]:
    """Decompress a string in COCO's format and return its run lengths.

    Raises:
        ValueError: `text` is not in this format, or a run length has more than 60 bits.
    """
    chars = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not len(chars):
        return np.zeros(0, np.int64)
    last = (chars & 0x20) == 0
    if chars.min() < 0 or chars.max() > 63 or not last[-1]:
        raise ValueError("not compressed COCO run lengths, as /v1/segment?format=rle returns them")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MAX_GROUPS - 1:
        raise ValueError("a run length has more than 60 bits")
    position = np.arange(len(chars)) - np.repeat(starts, lengths)
    values = np.add.reduceat((chars & 0x1F) << (5 * position), starts)
    values -= np.where(chars[ends] & 0x10, np.int64(1) << (5 * lengths), 0)  # the sign
    runs = values.copy()  # from the fourth run on, the difference to the run two before
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    return runs


def png_mask(mask: Mask) -> bytes:
    """Encode a mask [H, W] as an 8-bit grey PNG. The foreground is 255 and the background is 0."""
    return png_bytes(np.where(mask, np.uint8(255), np.uint8(0)))


def overlay_png(image: Pixels, mask: Mask) -> bytes:
    """Encode an image [H, W, 3] as a PNG, with the foreground of the mask [H, W] tinted and the background dimmed.

    Raises:
        ValueError: the image and the mask differ in size.
    """
    if image.shape[:2] != mask.shape:
        raise ValueError(f"the image {list(image.shape[:2])} and the mask {list(mask.shape)} must have the same size")
    levels = np.arange(256)
    dimmed = (levels * _DIM).astype(np.uint8)
    out = np.empty_like(image)
    for channel, tint in enumerate(_TINT):
        tinted = ((levels * 3 + tint) / 4).astype(np.uint8)
        out[:, :, channel] = np.where(mask, tinted[image[:, :, channel]], dimmed[image[:, :, channel]])
    return png_bytes(out)
