"""Relate the patch grid of an image to its pixels: which patches show the image, and how a map over patches becomes a
map over pixels.

If the preprocessing pads images, some patches show only padding. Methods would take such patches for an object, so a
`PatchGrid` leaves them out. The remaining patches form a rectangle.

Legend: H, W size of the upright image; h, w size of the grid of the remaining patches; n = h * w; D features; K maps;
a, b size of a map. Boxes are (x, y, width, height) in pixels of the upright image.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service.errors import EngineFailed
from service.vision.region import Box, image_weights

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_VALUES_PER_BLOCK: Final = 2**22


@dataclass(frozen=True)
class PatchGrid:
    """The patches that show an image.

    size: (H, W).
    crop_box: the part of the image that the network sees.
    full: the size (h, w) of the network's grid, which includes patches that show only padding.
    rows, columns: the ranges of rows and columns whose patches show enough of the image: at least half as much as the
        patch that shows the most.
    """

    size: tuple[int, int]
    crop_box: Box
    full: tuple[int, int]
    rows: slice
    columns: slice

    @staticmethod
    def of(size: tuple[int, int], crop_box: Box, full: tuple[int, int]) -> "PatchGrid":
        """Return the grid for an image of `size` (H, W) that the network sees as `full` (h, w) patches."""
        shares = image_weights(size, crop_box, full)
        used = shares >= shares.max() / 2  # a rectangle, because shares are products of a row and a column
        rows, columns = np.flatnonzero(used.any(axis=1)), np.flatnonzero(used.any(axis=0))
        return PatchGrid(
            size, crop_box, full, slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
        )

    @property
    def shape(self) -> tuple[int, int]:
        """The number of patches down and across, (h, w)."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def box(self) -> Box:
        """The part of the image that the patches cover. It can extend beyond the image if the image was padded."""
        x, y, width, height = self.crop_box
        down, across = height / self.full[0], width / self.full[1]
        h, w = self.shape
        return x + self.columns.start * across, y + self.rows.start * down, w * across, h * down

    @property
    def seen_box(self) -> Box:
        """The part of the image that the network sees, without padding."""
        x, y, width, height = self.crop_box
        left, top = max(0.0, x), max(0.0, y)
        return left, top, min(float(self.size[1]), x + width) - left, min(float(self.size[0]), y + height) - top

    def select(self, tokens: Floats) -> Floats:
        """Return the rows of `tokens` [N, D] that belong to the patches of this grid, as float32 [n, D].

        Raises:
            EngineFailed: the tokens do not fill the network's grid or are not finite.
        """
        if tokens.ndim != 2 or len(tokens) != self.full[0] * self.full[1]:
            shape = list(tokens.shape)
            raise EngineFailed(f"features of shape {shape} do not fill a grid of {self.full[0]} x {self.full[1]}")
        if not np.isfinite(tokens).all():
            raise EngineFailed("the engine's features are not finite")
        inner = tokens.reshape(*self.full, -1)[self.rows, self.columns]  # [h, w, D]
        return np.ascontiguousarray(inner, np.float32).reshape(-1, tokens.shape[1])

    def crop_weights(self, weights: Floats) -> Floats:
        """Return the part of a map over the network's grid that belongs to the patches of this grid, [h, w]."""
        return weights[self.rows, self.columns]

    def blocks(self, maps: Floats, *, everywhere: bool = False) -> Iterator[tuple[slice, slice, Floats]]:
        """Upsample maps [K, a, b] to pixels, in blocks of rows that limit the memory.

        The cells of a map divide `box` evenly. They can be the patches or smaller cells. The values are interpolated
        bilinearly between the centres of the cells and are constant beyond the outermost centres. Yield for each block
        its rows, its columns and its values, float32 [K, rows, columns]. Pixels outside `seen_box` are in no block,
        unless `everywhere` is true.
        """
        left, top, width, height = self.box
        seen = (0, 0, self.size[1], self.size[0]) if everywhere else self.seen_box
        down = _between(self.size[0], top, height, maps.shape[1], seen[1::2])
        across = _between(self.size[1], left, width, maps.shape[2], seen[0::2])
        step = max(1, _VALUES_PER_BLOCK // max(1, len(maps) * len(across.share)))
        for start in range(0, len(down.share), step):
            part = slice(start, start + step)
            share = down.share[part, None]
            rows = maps[:, down.first[part]] * (1 - share) + maps[:, down.second[part]] * share  # [K, rows, b]
            values = rows[:, :, across.first] * (1 - across.share)
            values += rows[:, :, across.second] * across.share
            first = down.pixels.start + start
            yield slice(first, first + values.shape[1]), across.pixels, values


class _Between(NamedTuple):
    """For each pixel in the slice `pixels`, the indices of the two cells to interpolate between, and the weight of the
    second cell."""

    pixels: slice
    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    share: Floats


def _between(size: int, start: float, extent: float, cells: int, limits: tuple[float, ...]) -> _Between:
    """Return the cells and weights for linear interpolation along one axis of an image with `size` pixels. The range
    from `start` to `start + extent` is divided into `cells` cells of equal length. `limits` contains the start and the
    extent of the range from which pixels are returned."""
    centres = np.arange(size) + 0.5
    inside = np.flatnonzero((centres >= limits[0]) & (centres < limits[0] + limits[1]))
    at = ((centres[inside] - start) * (cells / extent) - 0.5).clip(0, cells - 1)  # from the centre of the first cell
    first = np.minimum(at.astype(np.int64), max(cells - 2, 0))
    begin = int(inside[0]) if len(inside) else 0
    pixels = slice(begin, begin + len(inside))
    return _Between(pixels, first, np.minimum(first + 1, cells - 1), (at - first).astype(np.float32))
