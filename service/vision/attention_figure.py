"""Draw all attention maps of an image in one figure: a grid of coloured maps with labels, the image and a colour bar.

The figure is drawn with Pillow alone. A cell shows the part of the image that the network sees, in its aspect ratio.
"""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from service.vision.pictures import Box, ColourMap, Pixels, bilinear_weights, coloured

Floats = npt.NDArray[np.float32]

_CELL: Final = 144  # side of a square cell in pixels; other cells have about the same area
_SMALLEST: Final = 104  # the same, in a figure of many cells
_AREA: Final = 800_000  # pixels of all cells, from which on they become smaller
_LONGEST: Final = 288  # longest side of a cell
_NARROWEST: Final = 104  # the least width of a column: a label has to fit
_FONT: Final = 13
_LINE: Final = 20  # height of a line of text
_GAP: Final = 8
_MARGIN: Final = 16
_BAR: Final = 18  # width of the colour bar
_TICKS: Final = 72  # width of the numbers beside the colour bar
_BAR_HEIGHT: Final = 320
_INK: Final = (32, 32, 32)


class Cell(NamedTuple):
    """One map of a figure: its label and its values [h, w], from 0 to 1."""

    label: str
    values: Floats


class Layout(NamedTuple):
    """The sizes of a figure in pixels: the width and height of a map, and the number of columns and rows of maps."""

    width: int
    height: int
    columns: int
    rows: int

    @property
    def column(self) -> int:
        return max(self.width, _NARROWEST) + _GAP

    @property
    def row(self) -> int:
        return _LINE + self.height + _GAP


def layout(cells: int, columns: int | None, aspect: float) -> Layout:
    """Arrange `cells` maps, whose ratio of width to height is `aspect`, in `columns` columns. If `columns` is None,
    their number is chosen so that the figure is about 4:3."""
    side = min(_CELL, max(_SMALLEST, math.sqrt(_AREA / cells)))
    width, height = side * math.sqrt(aspect), side / math.sqrt(aspect)
    shrink = min(1.0, _LONGEST / max(width, height))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    if columns is None:
        one = Layout(*size, 1, 1)
        columns = min(cells, max(1, round(math.sqrt(cells * one.row / one.column * 4 / 3))))
    return Layout(*size, columns, math.ceil(cells / columns))


def figure_size(plan: Layout) -> tuple[int, int]:
    """Return the height and width in pixels of the figure, without the title."""
    width = 2 * _MARGIN + (1 + plan.columns) * plan.column + _GAP + _BAR + _GAP + _TICKS
    return 2 * _MARGIN + plan.rows * plan.row, width


def draw_figure(
    cells: Sequence[Cell],
    image: Pixels,
    plan: Layout,
    *,
    title: str,
    ticks: Sequence[str],
    colours: ColourMap,
    binary: bool = False,
) -> Pixels:
    """Draw a figure and return it, uint8 [height, width, 3].

    Args:
        cells: the maps, row by row.
        image: the part of the image that the network sees, as `seen_image` returns it.
        plan: the sizes of the figure.
        title: the text above the maps.
        ticks: the texts beside the colour bar, evenly spaced, lowest value first.
        colours: the colour map.
        binary: whether the maps contain only 0 and 1. They are then drawn without colours in between.
    """
    font = ImageFont.load_default(_FONT)
    height, width = figure_size(plan)
    lines = _wrapped(title, font, width - 2 * _MARGIN)
    top = _MARGIN + len(lines) * _LINE + _GAP
    canvas = Image.new("RGB", (width, height + top - _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + number * _LINE), line, _INK, font)
    corners = [(_MARGIN, top)]  # of the image, then of the cells
    for number in range(len(cells)):
        row, column = divmod(number, plan.columns)
        corners.append((_MARGIN + (1 + column) * plan.column, top + row * plan.row))
    for (x, y), label in zip(corners, ("image", *(cell.label for cell in cells)), strict=True):
        draw.text((x, y + 2), label, _INK, font)
    left = _MARGIN + (1 + plan.columns) * plan.column + _GAP
    levels = np.linspace(1, 0, max(2 * _LINE, min(_BAR_HEIGHT, plan.rows * plan.row - _LINE - _GAP)), dtype=np.float32)
    maps = _enlarged(cells, plan)
    if binary:
        levels, maps = (np.asarray(each >= 0.5, np.float32) for each in (levels, maps))
    _draw_bar(canvas, (left, top + _LINE), coloured(levels, colours), ticks)
    drawn = np.array(canvas)
    for (x, y), picture in zip(corners, (image, *coloured(maps, colours)), strict=True):
        drawn[y + _LINE : y + _LINE + plan.height, x : x + plan.width] = picture
    return drawn


def _enlarged(cells: Sequence[Cell], plan: Layout) -> Floats:
    """Return all maps at the size of a cell, float32 [cells, height, width]."""
    maps = np.stack([cell.values for cell in cells]).astype(np.float32)  # [cells, h, w]
    _, down = bilinear_weights(plan.height, 0, plan.height, maps.shape[1])
    _, across = bilinear_weights(plan.width, 0, plan.width, maps.shape[2])
    return np.asarray(down @ maps @ across.T, np.float32)


def seen_image(image: Pixels, crop_box: Box, plan: Layout) -> Pixels:
    """Return the part of an image [H, W, 3] that the network sees, at the size of a map. Padding is grey."""
    x, y, width, height = crop_box
    scale = plan.width / width, plan.height / height
    left, top = max(0.0, x), max(0.0, y)
    right, bottom = min(image.shape[1], x + width), min(image.shape[0], y + height)
    size = max(1, round((right - left) * scale[0])), max(1, round((bottom - top) * scale[1]))
    shown = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, (left, top, right, bottom), reducing_gap=3)
    canvas = Image.new("RGB", (plan.width, plan.height), (128, 128, 128))
    canvas.paste(shown, (round((left - x) * scale[0]), round((top - y) * scale[1])))
    return np.asarray(canvas)


def _draw_bar(canvas: Image.Image, corner: tuple[int, int], shades: Pixels, ticks: Sequence[str]) -> None:
    """Draw the colour bar, with its colours [height, 3] from top to bottom, and its ticks."""
    shades = shades[: canvas.height - corner[1] - _GAP]
    canvas.paste(Image.fromarray(np.repeat(shades[:, None], _BAR, axis=1)), corner)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT)
    right, bottom = corner[0] + _BAR, corner[1] + len(shades)
    draw.rectangle((corner[0] - 1, corner[1] - 1, right, bottom), outline=_INK)
    for number, text in enumerate(ticks):
        y = bottom - 1 - round((len(shades) - 1) * number / (len(ticks) - 1))
        draw.line((right, y, right + 4, y), _INK)
        draw.text((right + _GAP, y), text, _INK, font, anchor="lm")


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a text into lines that are at most `width` pixels wide. A wider word gets its own line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
