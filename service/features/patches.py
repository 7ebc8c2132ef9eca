"""The patch features of one image as they are kept for comparisons: directions only, in half the bytes.

Every row has length 1, so that a product of two is a cosine; float16 errs by 1 in 2000 of a component, which moves the
cosine of two such rows by about 1e-5. Size and grid travel with them, because boxes are told in the image's own pixels.

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
    """rows: float16 [N, D], each of length 1 (or 0, of a feature without direction)."""

    rows: npt.NDArray[np.float16]
    grid: tuple[int, int]  # h, w
    size: tuple[int, int]  # H, W

    @staticmethod
    def of(tokens: Floats, grid: tuple[int, int], size: tuple[int, int]) -> "Patches":
        """Of patch tokens [N, D] as the network gives them."""
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
    """Rows [N, D] to float32 of length 1; a row of zeros stays."""
    values = rows.astype(np.float32)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)  # [N, 1]
    return np.asarray(values / np.where(lengths > 0, lengths, 1), np.float32)
