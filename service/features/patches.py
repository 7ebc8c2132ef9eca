"""The patch features of an image, as they are cached: float16 vectors of length 1. Searches use them to compare images
patch by patch.

Because the vectors have length 1, the dot product of two vectors is their cosine similarity. In float16, each component
has a relative error of up to 1 in 2000, which changes a cosine by about 1e-5. The sizes of the image and of the patch
grid are stored with the vectors, because both are needed to compute the box that a patch covers, in pixels of the
image.

Legend: N patches, D features; H, W size in pixels of the upright image (after EXIF rotation); h, w size of the patch
grid; N = h * w. Patches are in row-major order.
"""

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_HEAD: Final = struct.Struct("<4I")  # H, W, h, w; the N * D numbers follow


@dataclass(frozen=True)
class Patches:
    """The patch features of one image. `rows` is float16 [N, D], with one row per patch. Each row is scaled to length
    1. A zero row stays zero."""

    rows: npt.NDArray[np.float16]
    grid: tuple[int, int]  # h, w
    size: tuple[int, int]  # H, W

    @staticmethod
    def of(tokens: Floats, grid: tuple[int, int], size: tuple[int, int]) -> "Patches":
        """Convert the patch tokens [N, D] of an image to `Patches`, with each row scaled to length 1. `grid` is the
        size of the patch grid, and `size` is the size of the image in pixels. Both are (height, width)."""
        assert len(tokens) == grid[0] * grid[1], (tokens.shape, grid)
        return Patches(unit_rows(tokens).astype(np.float16), grid, size)

    def to_bytes(self) -> bytes:
        return _HEAD.pack(*self.size, *self.grid) + self.rows.tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> "Patches":
        height, width, h, w = _HEAD.unpack_from(data)
        rows = np.frombuffer(data, np.float16, offset=_HEAD.size).reshape(h * w, -1)  # [N, D], a view
        return Patches(rows, (h, w), (height, width))


def unit_rows(rows: npt.NDArray[np.floating]) -> Floats:
    """Return the rows [N, D] as float32, each scaled to length 1. A zero row stays zero."""
    values = rows.astype(np.float32)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)  # [N, 1]
    return np.asarray(values / np.where(lengths > 0, lengths, 1), np.float32)
