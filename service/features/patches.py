"""The patch features of an image, as they are cached: int8 vectors. Searches use them to compare images patch by patch.

Only the direction of a patch's vector matters, because patches are compared by their cosine. Each vector is therefore
stored as whole numbers from -127 to 127, in proportion to its components. This takes half the memory of float16.
docs/decisions/0029-patch-store.md gives the resulting error of a cosine. The sizes of the image and of the patch grid
are stored with the vectors, because both are needed to compute the box that a patch covers, in pixels of the image.

Legend: N patches, D features; H, W size in pixels of the upright image (after EXIF rotation); h, w size of the patch
grid; N = h * w. Patches are in row-major order.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_HEAD: Final = struct.Struct("<4I")  # H, W, h, w; the N * D numbers follow
_LARGEST: Final = 127


@dataclass(frozen=True)
class Patches:
    """The patch features of one image. `rows` is int8 [N, D], with one row per patch. A row has the direction of the
    patch's vector, scaled so that its largest absolute value is 127. A zero row stays zero."""

    rows: npt.NDArray[np.int8]
    grid: tuple[int, int]  # h, w
    size: tuple[int, int]  # H, W

    @staticmethod
    def of(tokens: Floats, grid: tuple[int, int], size: tuple[int, int]) -> "Patches":
        """Convert the patch tokens [N, D] of an image to `Patches`. `grid` is the size of the patch grid, and `size` is
        the size of the image in pixels. Both are (height, width)."""
        assert len(tokens) == grid[0] * grid[1], (tokens.shape, grid)
        largest = np.abs(tokens).max(axis=1, keepdims=True)  # [N, 1]
        scaled = tokens * (_LARGEST / np.where(largest > 0, largest, 1))
        return Patches(np.rint(scaled).astype(np.int8), grid, size)

    @staticmethod
    def of_batch(
        tokens: Floats, input_size: tuple[int, int], patch_size: int, sizes: Sequence[tuple[int, int]]
    ) -> "list[Patches | None]":
        """Convert the patch tokens [B, N, D] of a forward pass over images of `input_size` (h, w in pixels). `sizes`
        are the sizes of the images. Tokens that are not finite give None."""
        grid = input_size[0] // patch_size, input_size[1] // patch_size
        return [
            Patches.of(rows, grid, size) if np.isfinite(rows).all() else None
            for rows, size in zip(tokens, sizes, strict=True)
        ]

    def to_bytes(self) -> bytes:
        return _HEAD.pack(*self.size, *self.grid) + self.rows.tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> "Patches":
        height, width, h, w = _HEAD.unpack_from(data)
        rows = np.frombuffer(data, np.int8, offset=_HEAD.size).reshape(h * w, -1)  # [N, D], a view
        return Patches(rows, (h, w), (height, width))


def unit_rows(rows: npt.NDArray[Any]) -> Floats:
    """Return the rows [N, D] as float32, each scaled to length 1. The rows may have any number type. A zero row stays
    zero."""
    values = rows.astype(np.float32)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)  # [N, 1]
    return np.asarray(values / np.where(lengths > 0, lengths, 1), np.float32)
