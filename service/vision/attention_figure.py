"""Draw all attention maps of an image in one figure: a grid of coloured maps with labels, the image and a colour bar.

The figure is drawn with Pillow alone. A cell shows the part of the image that the network sees, in its aspect ratio.
"""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from service.vision.pictures import Box, ColourMap, Pixels, colour_map, coloured, to_image

Floats = npt.NDArray[np.float32]

_CELL: Final = 144  # side of a square cell in pixels; other cells have about the same area
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
    """Arrange `cells` maps with this ratio of width to height. If `columns` is None, the figure becomes about 4:3."""
    width, height = _CELL * math.sqrt(aspect), _CELL / math.sqrt(aspect)
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
) -> Pixels:
    """Draw a figure and return it, uint8 [height, width, 3].

    Args:
        cells: the maps, row by row.
        image: the part of the image that the network sees, as `seen_image` returns it.
        plan: the sizes of the figure.
        title: the text above the maps.
        ticks: the texts beside the colour bar, evenly spaced, lowest value first.
        colours: the colour map.
    """
    font = ImageFont.load_default(_FONT)
    height, width = figure_size(plan)
    lines = _wrapped(title, font, width - 2 * _MARGIN)
    top = _MARGIN + len(lines) * _LINE + _GAP
    canvas = Image.new("RGB", (width, height + top - _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + number * _LINE), line, _INK, font)

    def place(row: int, column: int, label: str, pixels: Pixels) -> None:
        x, y = _MARGIN + column * plan.column, top + row * plan.row
        draw.text((x, y + 2), label, _INK, font)
        canvas.paste(Image.fromarray(pixels), (x, y + _LINE))

    place(0, 0, "image", image)
    whole: Box = (0, 0, plan.width, plan.height)
    for number, cell in enumerate(cells):
        row, column = divmod(number, plan.columns)
        enlarged = to_image(cell.values, (plan.height, plan.width), whole)
        place(row, 1 + column, cell.label, coloured(enlarged, colours))
    left = _MARGIN + (1 + plan.columns) * plan.column + _GAP
    _draw_bar(canvas, (left, top + _LINE), min(_BAR_HEIGHT, plan.rows * plan.row - _LINE - _GAP), ticks, colours)
    return np.asarray(canvas)


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


def _draw_bar(
    canvas: Image.Image, corner: tuple[int, int], height: int, ticks: Sequence[str], colours: ColourMap
) -> None:
    """Draw the colour bar, the highest value at the top, and its ticks."""
    height = max(height, len(ticks) * _LINE)
    height = min(height, canvas.height - corner[1] - _GAP)
    levels = np.rint(np.linspace(255, 0, height)).astype(np.uint8)
    bar = np.repeat(colour_map(colours)[levels][:, None], _BAR, axis=1)
    canvas.paste(Image.fromarray(bar), corner)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT)
    draw.rectangle((corner[0] - 1, corner[1] - 1, corner[0] + _BAR, corner[1] + height), outline=_INK)
    right = corner[0] + _BAR
    for number, text in enumerate(ticks):
        y = corner[1] + round((height - 1) * (1 - number / (len(ticks) - 1)))
        draw.line((right, y, right + 4, y), _INK)
        draw.text((right + _GAP, y), text, _INK, font, anchor="lm")


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a text into lines that are at most `width` pixels wide, if their words allow it."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
