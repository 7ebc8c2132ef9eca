"""Make pictures: PNG files, colours for numbers, overlays, and maps of patches at the size of the image.

Each colour map is defined by a few colours, with linear interpolation between them. The colour maps differ by a few
levels from those with the same names in matplotlib and from Google's "Turbo" (2019).

Legend: H, W size of the image in pixels; h, w size of the patch grid.
"""

import io
import zlib
from functools import cache
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Box = tuple[float, float, float, float]
ColourMap = Literal["viridis", "magma", "magma_r", "turbo", "grey"]

_ANCHORS: Final[dict[str, tuple[int, ...]]] = {
    "viridis": (0x440154, 0x482878, 0x3E4A89, 0x31688E, 0x26828E, 0x1F9E89, 0x35B779, 0x6DCD59, 0xB4DE2C, 0xFDE725),
    "magma": (0x000004, 0x180F3E, 0x451077, 0x721F81, 0x9F2F7F, 0xCD4071, 0xF1605D, 0xFD9567, 0xFEC98D, 0xFCFDBF),
    "turbo": (
        *(0x30123B, 0x4145AB, 0x4675ED, 0x39A2FC, 0x1BCFD4, 0x24ECA6, 0x61FC6C, 0xA4FC3C),
        *(0xD1E834, 0xF3C63A, 0xFE9B2D, 0xF36315, 0xD93806, 0xB11901, 0x7A0402),
    ),
    "grey": (0x000000, 0xFFFFFF),
}


@cache
def colour_map(name: ColourMap) -> Pixels:
    """Return 256 colours, uint8 [256, 3]. A name that ends in `_r` reverses the map."""
    anchors = np.array([[a >> 16, a >> 8 & 255, a & 255] for a in _ANCHORS[name.removesuffix("_r")]], np.float64)
    at = np.linspace(0, len(anchors) - 1, 256)
    table = np.stack([np.interp(at, np.arange(len(anchors)), anchors[:, c]) for c in range(3)], axis=1)
    colours = np.rint(table).astype(np.uint8)
    colours = colours[::-1].copy() if name.endswith("_r") else colours
    colours.setflags(write=False)  # cached and shared
    return colours


def coloured(values: Floats, name: ColourMap = "viridis") -> Pixels:
    """Return the colours of values from 0 to 1, uint8 [..., 3]. Values outside this range get the colour at its end.
    NaN gets the colour of 0."""
    indices = np.rint(np.fmin(np.fmax(values, 0), 1) * 255).astype(np.uint8)
    return np.asarray(np.take(colour_map(name), indices, axis=0, mode="clip"))  # faster than indexing


def blend(image: Pixels, colours: Pixels, alpha: float | Floats = 0.6) -> Pixels:
    """Draw a picture over an image [H, W, 3] of the same size, and return the result. `alpha`, from 0 to 1, is the
    opacity of the picture. An array [H, W, 1] gives the opacity of each pixel."""
    assert image.shape == colours.shape, (image.shape, colours.shape)
    return np.asarray(image + (colours.astype(np.float32) - image) * np.float32(alpha) + 0.5, np.float32).astype(
        np.uint8
    )


def png_bytes(pixels: npt.NDArray[Any]) -> bytes:
    """Encode an image as a PNG: uint8 [H, W, 3] or [H, W], or uint16 [H, W]. Run-length compression takes two thirds of
    the time of the default compression, and makes images 1 % larger and figures 3 % larger."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def to_image(values: Floats, size: tuple[int, int], crop_box: Box, outside: float = 0.0) -> Floats:
    """Enlarge a map of patches [h, w] to the size (H, W) of the image, float32 [H, W].

    The patches cover `crop_box`, (x, y, width, height) in pixels of the image. The values are interpolated bilinearly
    between the centres of the patches, and are constant beyond the outermost centres. Pixels with their centre outside
    the box get the value `outside`.
    """
    rows, row_weights = bilinear_weights(size[0], crop_box[1], crop_box[3], values.shape[0])
    columns, column_weights = bilinear_weights(size[1], crop_box[0], crop_box[2], values.shape[1])
    image = np.full(size, outside, np.float32)
    image[rows, columns] = row_weights @ values.astype(np.float32) @ column_weights.T
    return image


def bilinear_weights(size: int, start: float, extent: float, cells: int) -> tuple[slice, Floats]:
    """Return two values for linear interpolation along one axis of an image with `size` pixels. The range from `start`
    to `start + extent` is divided into `cells` cells of equal length. The first value is the slice of the pixels with
    their centre in this range. The second value, [pixels, cells], contains the weight of each cell for each of these
    pixels."""
    centres = np.arange(size) + 0.5
    inside = np.flatnonzero((centres >= start) & (centres < start + extent))
    # in cells, from the centre of the first cell
    at = ((centres[inside] - start) * (cells / extent) - 0.5).clip(0, cells - 1)
    low = np.minimum(at.astype(np.int64), max(cells - 2, 0))
    high = np.minimum(low + 1, cells - 1)
    weights = np.zeros((len(inside), cells), np.float32)
    pixel = np.arange(len(inside))
    np.add.at(weights, (pixel, low), (1 - (at - low)).astype(np.float32))
    np.add.at(weights, (pixel, high), (at - low).astype(np.float32))
    first = int(inside[0]) if len(inside) else 0
    return slice(first, first + len(inside)), weights
