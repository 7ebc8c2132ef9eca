"""Draw line charts as SVG for the pages about training runs. No plotting library is needed.

Colours and fonts come from a style sheet (`CSS`) with a light and a dark scheme, so a chart follows the reader's colour
scheme. Each point has a `<title>`, which browsers show when the pointer is over it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 38
MAX_POINTS = 400  # more points than pixels only enlarge the page
MAX_DOTS = 100  # approximate number of points per line that show their value under the pointer
COLOURS = 6

CSS = """
.chart { width: 100%; height: auto; display: block; }
.chart text { font: 11px system-ui, sans-serif; fill: var(--muted); }
.chart .axis { stroke: var(--line); stroke-width: 1; fill: none; }
.chart .mark { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 3 3; }
.chart path, .chart circle { stroke-width: 1.7; fill: none; stroke-linejoin: round; }
.chart .hover { stroke: none; fill: transparent; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; color: var(--muted); padding-left: 12px; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; }
:root { --c0: #2563eb; --c1: #d9480f; --c2: #2b8a3e; --c3: #9c36b5; --c4: #0b7285; --c5: #a17400; }
@media (prefers-color-scheme: dark) {
  :root { --c0: #74a9ff; --c1: #ff9a62; --c2: #69db7c; --c3: #da8fee; --c4: #5cd0e4; --c5: #ffd43b; }
}
"""
"""The style sheet of a chart. The page must define the colours `--muted` and `--line`."""


@dataclass(frozen=True)
class Series:
    """A named line of points (x, y) in order of x. The line has a gap where y is None or not finite."""

    name: str
    points: Sequence[tuple[float, float | None]]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return approximately `about` round numbers from `low` to `high`, spaced by 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_label(value: float) -> str:
    """Format the label of a tick with at most about six characters, for example 0.05, 1,200, 25k, 3M or 2e-6."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 1e-3 or size < 1e-12 else f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")


def _finite(series: Sequence[Series]) -> list[tuple[float, float]]:
    return [(x, y) for line in series for x, y in line.points if y is not None and math.isfinite(y)]


def _thinned(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Return at most `MAX_POINTS` of the points, evenly spaced and including the last one."""
    stride = max(1, math.ceil(len(points) / MAX_POINTS))
    return [point for i, point in enumerate(points) if (len(points) - 1 - i) % stride == 0]


def _bounds(values: list[float], mark: float | None, floor: float | None) -> tuple[float, float]:
    """Return the lower and the upper end of the y axis. The axis includes all values, and also `mark` and `floor` if
    they are not None. It extends slightly beyond these numbers, but not below `floor` if that is the lowest of them."""
    low, high = min(values), max(values)
    if mark is not None:
        low, high = min(low, mark), max(high, mark)
    if floor is not None:
        low = min(low, floor)
    air = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return (low if low == floor else low - air), high + air


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    y_label: str = "",
    x_label: str = "step",
    mark: tuple[float, str] | None = None,
    floor: float | None = None,
) -> str:
    """Return a chart as HTML: a `<figure>` with an SVG and a legend. If no point is finite, return an empty string.

    Args:
        series: the lines. There are six colours, so the seventh line has the same colour as the first.
        title: the heading, which is also the label for screen readers.
        y_label, x_label: labels of the axes, with units.
        mark: the y value and the label of a dashed horizontal line. If it is None, no such line is drawn.
        floor: a value that the y axis must include, such as 0 for counts. If it is None, the axis fits the values.
    """
    points = _finite(series)
    if not points:
        return ""
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = _bounds([y for _, y in points], mark[0] if mark else None, floor)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in ticks(y_low, y_high):
        parts.append(f'<path class="axis" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{py(y) + 4:.1f}" text-anchor="end">{tick_label(y)}</text>')
    below = HEIGHT - BOTTOM + 16
    parts += [
        f'<text x="{px(x):.1f}" y="{below}" text-anchor="middle">{tick_label(x)}</text>' for x in ticks(x_low, x_high)
    ]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    if mark:
        parts.append(f'<path class="mark" d="M{LEFT} {py(mark[0]):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{py(mark[0]) - 4:.1f}" text-anchor="end">{escape(mark[1])}</text>')
    for index, line in enumerate(series):
        parts.append(_line(line, index, px, py))
    name = escape(title)
    legend = "".join(
        f'<span><i style="background:var(--c{i % COLOURS})"></i>{escape(line.name)}</span>'
        for i, line in enumerate(series)
        if _finite([line])
    )
    return (
        f'<figure><figcaption>{name}</figcaption><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{name}">{"".join(parts)}</svg><div class="legend">{legend}</div></figure>'
    )


def _line(line: Series, index: int, px: Callable[[float], float], py: Callable[[float], float]) -> str:
    """Return the SVG of one series: a path with gaps, and invisible circles that show values under the pointer.

    The functions `px` and `py` map x and y to pixels. `index` selects the colour.
    """
    path, dots, pen_down = [], [], False
    colour = f'style="stroke:var(--c{index % COLOURS})"'
    points = _thinned(line.points)
    few, stride = len(points) <= 25, math.ceil(len(points) / MAX_DOTS)
    for i, (x, y) in enumerate(points):
        if y is None or not math.isfinite(y):
            pen_down = False
            continue
        path.append(f"{'L' if pen_down else 'M'}{px(x):.1f} {py(y):.1f}")
        pen_down, at = True, f'cx="{px(x):.1f}" cy="{py(y):.1f}"'
        if few:
            dots.append(f'<circle {colour} {at} r="1.8"/>')
        if (len(points) - 1 - i) % stride == 0:
            text = escape(f"{line.name}: {y:.5g} at {tick_label(x)}")
            dots.append(f'<circle class="hover" {at} r="5"><title>{text}</title></circle>')
    return f'<path {colour} d="{"".join(path)}"/>' + "".join(dots)
