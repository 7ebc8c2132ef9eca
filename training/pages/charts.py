"""Draw line charts, histograms and maps of points as SVG for the pages about training. No plotting library is needed.

Colours and fonts come from a style sheet (`CSS`) with a light and a dark scheme, so a chart follows the reader's colour
scheme. Each point has a `<title>`, which browsers show when the pointer is over it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 38
MAX_POINTS = 400  # more points than pixels only enlarge the page
MAX_DOTS = 100  # approximate number of points per line that show their value under the pointer
FEW_POINTS = 2000  # of a map; with more points, the dots are smaller
COLOURS = 6

CSS = """
.chart { width: 100%; height: auto; display: block; }
.chart text { font: 11px system-ui, sans-serif; fill: var(--muted); }
.chart .axis { stroke: var(--line); stroke-width: 1; fill: none; }
.chart .mark { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 3 3; }
.chart path, .chart circle { stroke-width: 1.7; fill: none; stroke-linejoin: round; }
.chart .dots { stroke-linecap: round; stroke-opacity: .6; fill: none; }
.chart .bar { stroke: none; }
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
    names = [(i, line.name) for i, line in enumerate(series) if _finite([line])]
    return _figure(title, parts, HEIGHT, names)


def _figure(title: str, parts: Sequence[str], height: int, legend: Sequence[tuple[int, str]]) -> str:
    """Return a chart as HTML. `parts` are its SVG elements. `legend` contains the number of each colour, and its
    name."""
    name = escape(title)
    colours = "".join(
        f'<span><i style="background:var(--c{i % COLOURS})"></i>{escape(text)}</span>' for i, text in legend
    )
    return (
        f'<figure><figcaption>{name}</figcaption><svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{name}">{"".join(parts)}</svg><div class="legend">{colours}</div></figure>'
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


def histogram(edges: Sequence[float], counts: Mapping[str, Sequence[int]], *, title: str, x_label: str = "") -> str:
    """Return a histogram with stacked bars as HTML.

    Args:
        edges: the edges of the bins, in ascending order.
        counts: for each group its name, and its number of values in each bin. The first group is at the bottom.
        title: the heading, which is also the label for screen readers.
        x_label: label of the x axis, with the unit.
    """
    totals = [sum(column) for column in zip(*counts.values(), strict=True)]
    y_high, x_low, x_high = max([*totals, 1]) * 1.05, edges[0], edges[-1]

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - y / y_high * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in ticks(0, y_high, 4):
        parts.append(f'<path class="axis" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{py(y) + 4:.1f}" text-anchor="end">{tick_label(y)}</text>')
    below = HEIGHT - BOTTOM + 16
    parts += [
        f'<text x="{px(x):.1f}" y="{below}" text-anchor="middle">{tick_label(x)}</text>' for x in ticks(x_low, x_high)
    ]
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>')
    for i, total in enumerate(totals):
        base, left, width = 0, px(edges[i]) + 0.5, px(edges[i + 1]) - px(edges[i]) - 1
        words = ", ".join(f"{column[i]:,} {name}" for name, column in counts.items())
        bars = ""
        for number, column in enumerate(counts.values()):
            top, bottom, base = py(base + column[i]), py(base), base + column[i]
            if column[i]:
                bars += (
                    f'<rect class="bar" style="fill:var(--c{number % COLOURS})" x="{left:.1f}" y="{top:.1f}" '
                    f'width="{width:.1f}" height="{bottom - top:.1f}"/>'
                )
        if total:
            text = escape(f"{tick_label(edges[i])} to {tick_label(edges[i + 1])}: {words}")
            parts.append(f"<g><title>{text}</title>{bars}</g>")
    return _figure(title, parts, HEIGHT, list(enumerate(counts)))


def point_map(groups: Mapping[str, tuple[int, Sequence[tuple[float, float]]]], *, title: str) -> str:
    """Return a map of points as HTML.

    Args:
        groups: for each group its name, the number of its colour, and the positions (x, y) of its points, from 0 to 1,
            with y upwards. Later groups are drawn over earlier ones.
        title: the heading, which is also the label for screen readers.
    """
    side, parts = WIDTH - 2 * RIGHT, []
    width = 5 if sum(len(points) for _, points in groups.values()) <= FEW_POINTS else 3
    for colour, points in groups.values():
        pixels = dict.fromkeys((round(RIGHT + x * side, 1), round(RIGHT + (1 - y) * side, 1)) for x, y in points)
        path = "".join(f"M{x:g} {y:g}h0" for x, y in pixels)
        parts.append(f'<path class="dots" style="stroke:var(--c{colour % COLOURS});stroke-width:{width}" d="{path}"/>')
    return _figure(title, parts, WIDTH, [(colour, name) for name, (colour, _) in groups.items()])
