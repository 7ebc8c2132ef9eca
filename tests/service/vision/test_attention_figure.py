"""Tests of the figure of attention maps: its maps, labels and sizes, at any aspect ratio."""

import numpy as np
import pytest
from PIL import Image

from service.vision.attention_figure import Cell, Layout, draw_figure, figure_size, layout, seen_image
from service.vision.pictures import coloured, to_image

RNG = np.random.default_rng(6)


def figure(plan: Layout, count: int, grid: tuple[int, int] = (3, 4), title: str = "a title") -> np.ndarray:
    cells = [Cell(f"block {i}", RNG.random(grid, np.float32)) for i in range(count)]
    image = np.full((plan.height, plan.width, 3), 90, np.uint8)
    return draw_figure(cells, image, plan, title=title, ticks=["0", "1"], colours="viridis")


def occurs_at(part: np.ndarray, whole: np.ndarray) -> list[tuple[int, int]]:
    """Return the (row, column) of each place where `part` is in `whole`."""
    h, w = part.shape[:2]
    corner = np.argwhere((whole[: whole.shape[0] - h + 1, : whole.shape[1] - w + 1] == part[0, 0]).all(-1))
    return [(int(y), int(x)) for y, x in corner if np.array_equal(whole[y : y + h, x : x + w], part)]


def test_every_map_is_at_its_place_in_row_major_order() -> None:
    plan = layout(6, 3, 1.5)
    maps = [RNG.random((4, 6), np.float32) for _ in range(6)]
    image = RNG.integers(0, 256, (plan.height, plan.width, 3), dtype=np.uint8)
    cells = [Cell(f"block {i // 3}, head {i % 3}", each) for i, each in enumerate(maps)]
    drawn = draw_figure(cells, image, plan, title="t", ticks=["0", "1"], colours="magma")
    [(top, left)] = occurs_at(image, drawn)
    for i, each in enumerate(maps):
        enlarged = to_image(each, (plan.height, plan.width), (0, 0, plan.width, plan.height))
        [place] = occurs_at(coloured(enlarged, "magma"), drawn)
        assert place == (top + i // 3 * plan.row, left + (1 + i % 3) * plan.column)


def test_labels_title_and_colour_bar_are_drawn() -> None:
    plan = layout(4, 2, 1.0)
    drawn = figure(plan, 4, title="word " * 40)
    lines = (figure(plan, 4, title="").shape[0] - drawn.shape[0]) / -20
    assert lines >= 2  # the long title is broken into lines
    assert drawn.shape[1] == figure_size(plan)[1]
    dark = (drawn < 100).all(-1)
    rows, columns = np.nonzero(dark)
    assert rows.min() < 40
    assert columns.min() >= 16  # nothing touches the margin
    assert columns.max() < drawn.shape[1] - 16
    for row in range(2):
        for column in range(1, 3):
            top = drawn.shape[0] - 16 - plan.row * (2 - row)
            left = 16 + column * plan.column
            assert dark[top : top + 20, left : left + plan.column].sum() > 60  # a label
    bar = drawn[:, 16 + 3 * plan.column + 8 + 9]  # a column of pixels through the bar
    shades = bar[(bar != 255).any(-1)][1:-1]
    assert shades[0].tolist() == coloured(np.float32(1)).tolist()
    assert shades[-1].tolist() == coloured(np.float32(0)).tolist()
    assert len(np.unique(shades, axis=0)) > 150


def test_binary_maps_have_two_colours() -> None:
    plan = layout(2, 2, 1.0)
    cells = [Cell("", np.eye(5, dtype=np.float32)), Cell("", np.zeros((5, 5), np.float32))]
    white = np.full((plan.height, plan.width, 3), 255, np.uint8)
    options = {"title": "", "ticks": ["", ""], "colours": "viridis"}
    drawn = draw_figure(cells, white, plan, binary=True, **options)
    two = {tuple(coloured(np.float32(value)).tolist()) for value in (0, 1)}
    saturated = drawn[drawn.max(-1) - drawn.min(-1) > 30]  # neither text nor white
    assert {tuple(colour) for colour in saturated.tolist()} == two
    assert len(np.unique(draw_figure(cells, white, plan, **options).reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize("aspect", [0.01, 0.2, 0.66, 1, 1.5, 4, 100])
@pytest.mark.parametrize(("count", "columns"), [(1, None), (3, 3), (12, None), (12, 6), (72, 6)])
def test_any_aspect_ratio_and_number_of_maps(aspect: float, count: int, columns: int | None) -> None:
    plan = layout(count, columns, aspect)
    assert plan.columns * plan.rows >= count > plan.columns * (plan.rows - 1)
    assert columns is None or plan.columns == columns
    assert 1 <= min(plan.width, plan.height) <= max(plan.width, plan.height) <= 288
    if 0.3 < aspect < 3:
        assert plan.width / plan.height == pytest.approx(aspect, rel=0.02)
    drawn = figure(plan, count)
    height, width = figure_size(plan)
    assert drawn.shape == (height + 28, width, 3)  # one line of title
    if columns is None and count > 1:
        assert 0.5 < width / drawn.shape[0] < 3.5


@pytest.mark.parametrize("box", [(10.0, 5.0, 40.0, 30.0), (0.0, 0.0, 60.0, 40.0)])
def test_the_image_is_what_the_network_sees(box: tuple[float, float, float, float]) -> None:
    image = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    x, y, width, height = box
    part = Image.fromarray(image).crop((int(x), int(y), int(x + width), int(y + height)))
    plan = Layout(int(width), int(height), 1, 1)
    np.testing.assert_array_equal(seen_image(image, box, plan), np.asarray(part))


def test_padding_is_grey() -> None:
    wide, tall = np.full((20, 60, 3), 200, np.uint8), np.full((60, 20, 3), 200, np.uint8)
    expected = np.full((120, 120, 3), 128, np.uint8)
    expected[40:80] = 200
    plan = Layout(120, 120, 1, 1)
    np.testing.assert_array_equal(seen_image(wide, (0.0, -20.0, 60.0, 60.0), plan), expected)
    np.testing.assert_array_equal(seen_image(tall, (-20.0, 0.0, 60.0, 60.0), plan), expected.transpose(1, 0, 2))
