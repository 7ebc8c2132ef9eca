"""Patch features of one image as they are cached for comparisons: unit vectors in float16.

Every row has length 1, so the product of two rows is their cosine. float16 has a relative error of 1 in 2000 per
component, which changes the cosine of two rows by about 1e-5. Image size and grid are stored with the rows, because
boxes are given in the image's own pixels.

Legend: N patches, D features; H, W the image as sent, upright; h, w the grid, N = h * w, row-major.
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
    """Unit patch features of one image. rows: float16 [N, D], each of length 1, or 0 for a feature without
    direction."""

    rows: npt.NDArray[np.float16]
    grid: tuple[int, int]  # h, w
    size: tuple[int, int]  # H, W

    @staticmethod
    def of(tokens: Floats, grid: tuple[int, int], size: tuple[int, int]) -> "Patches":
        """Make patches from the patch tokens [N, D] of the network."""
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
    """Scale rows [N, D] to float32 of length 1. A zero row stays zero."""
    values = rows.astype(np.float32)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)  # [N, 1]
    return np.asarray(values / np.where(lengths > 0, lengths, 1), np.float32)
