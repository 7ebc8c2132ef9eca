"""Encode masks as COCO's compressed run lengths, as PNG, and as an overlay over the image; decode run lengths.

COCO's RLE (cocoapi, `common/maskApi.c`) has run lengths over the mask in column-major order, starting with background
(a first run of 0 if the mask starts with foreground). In the compressed string, each run from the fourth on is replaced
by its difference to the run two before it. Each number is divided into groups of 5 bits, lowest first. A group becomes
a character from "0" on. Bit 5 of a character is set if more groups of the number follow, and bit 4 of the last group is
the sign. The text is equal to that of pycocotools. This code processes all runs at once with numpy.
"""

import io
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]

_MAX_GROUPS: Final = 13  # 13 * 5 bits hold any 64-bit value
_DIM: Final = 0.35
_TINT: Final = (255, 64, 32)


def coco_rle_encode(mask: Mask) -> dict[str, Any]:
    """Encode a mask [H, W] as `{"size": [H, W], "counts": str}`. `pycocotools.mask.encode` returns the same, but with
    `counts` as bytes."""
    flat = np.ravel(mask, order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(edges)
    if flat.size and flat[0]:
        counts = np.concatenate([[0], counts])
    return {"size": [int(side) for side in mask.shape], "counts": _pack(counts)}


def coco_rle_decode(rle: dict[str, Any]) -> Mask:
    """Decode run lengths to a mask [H, W]. `counts` is a string as `coco_rle_encode` returns it, the same as bytes, or
    a list of uncompressed run lengths.

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
        raise ValueError(f"a run length is {wrong[0]}: 0 to {pixels} ({height} x {width} pixels) is allowed")
    if min(height, width) < 0 or runs.sum() != pixels:
        raise ValueError(f"the run lengths sum to {runs.sum()}, not to {pixels} ({height} x {width} pixels)")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape((height, width), order="F")


def _pack(counts: npt.NDArray[np.int64]) -> str:
    """Compress run lengths to a string in COCO's format."""
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
    """Parse a compressed string in COCO's format to run lengths."""
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
    return _png(np.where(mask, np.uint8(255), np.uint8(0)))


def overlay_png(image: Pixels, mask: Mask) -> bytes:
    """Encode the image [H, W, 3] as PNG, with the foreground tinted and the background dimmed.

    Raises:
        ValueError: image and mask differ in size.
    """
    if image.shape[:2] != mask.shape:
        raise ValueError(f"image of {list(image.shape[:2])} and mask of {list(mask.shape)} must have the same size")
    levels = np.arange(256)
    dimmed = (levels * _DIM).astype(np.uint8)
    out = np.empty_like(image)
    for channel, tint in enumerate(_TINT):
        tinted = ((levels * 3 + tint) / 4).astype(np.uint8)
        out[:, :, channel] = np.where(mask, tinted[image[:, :, channel]], dimmed[image[:, :, channel]])
    return _png(out)


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
