"""Convert masks to polygons.

The outline of a mask runs along the edges between pixels. Each of these edges has a direction, with the mask on its
right, so the edges form closed rings. A ring around a part of the mask runs clockwise, and a ring around a hole runs
counter-clockwise (in images, y points down). The exact polygon has a corner at each turn. The polygon is then
simplified with the method of Douglas and Peucker (1973).

Legend: H, W size of the image. A point (x, y) is the top left corner of the pixel in column x and row y.
"""

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service.errors import InvalidRequest

Mask = npt.NDArray[np.bool_]
Points = npt.NDArray[np.int64]

MAX_EDGES: Final = 400_000
"""The highest number of edges of an outline. Masks with more are too ragged for polygons."""

_STEPS: Final = ((1, 0), (0, 1), (-1, 0), (0, -1))  # right, down, left, up, as (x, y)


class Polygons(NamedTuple):
    """The outlines of a mask's parts and of its holes, each as [x1, y1, x2, y2, ...] in pixels."""

    outer: list[list[int]]
    holes: list[list[int]]


def polygons(mask: Mask, tolerance: float = 1.0) -> Polygons:
    """Return the outlines of a mask [H, W]. No point of the exact outline is further than `tolerance` pixels from the
    returned one. With a tolerance of 0, the polygons describe the mask exactly.

    Raises:
        InvalidRequest: the outline has more than MAX_EDGES edges.
    """
    outer: list[list[int]] = []
    holes: list[list[int]] = []
    for ring in _rings(mask):
        x, y = ring[:, 0], ring[:, 1]
        clockwise = int((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) > 0
        kept = ring if tolerance <= 0 else _simplified(ring, tolerance)
        if len(kept) < 3:
            kept = ring  # a part that is thinner than the tolerance
        (outer if clockwise else holes).append([int(value) for value in kept.ravel()])
    return Polygons(outer, holes)


def _rings(mask: Mask) -> list[Points]:
    """Return the closed outlines of a mask, each as the points [n, 2] at which its direction changes."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    top, left = int(rows[0]), int(columns[0])
    padded = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    starts, directions = _edges(padded)
    if len(starts) > MAX_EDGES:
        raise InvalidRequest(
            f"the outline of a mask has {len(starts):,} edges; format=polygons accepts at most {MAX_EDGES:,}. "
            "Use format=rle",
            param="format",
        )
    width = padded.shape[1] + 1
    follower = _followers(starts, directions, width)
    rings = []
    visited = [False] * len(starts)
    points = np.stack([starts % width - 1 + left, starts // width - 1 + top], axis=1)
    previous = np.empty_like(follower)
    previous[follower] = np.arange(len(follower))
    turns = (directions != directions[previous]).tolist()
    follower_list = follower.tolist()
    for first in range(len(starts)):
        if visited[first]:
            continue
        corners, edge = [], first
        while not visited[edge]:
            visited[edge] = True
            if turns[edge]:
                corners.append(edge)
            edge = follower_list[edge]
        rings.append(points[corners])
    return rings


def _edges(padded: Mask) -> tuple[Points, Points]:
    """Return the start (the index of a corner) and the direction of each edge between the mask and the rest."""
    width = padded.shape[1] + 1
    starts: list[Points] = []
    directions: list[Points] = []
    edges = (
        (padded[1:] & ~padded[:-1], 1, 0),  # the outline is above a pixel and runs to the right
        (padded[:, :-1] & ~padded[:, 1:], 0, 1),  # on its right, downwards
        (padded[:-1] & ~padded[1:], 1, 1),  # below it, to the left
        (padded[:, 1:] & ~padded[:, :-1], 1, 1),  # on its left, upwards
    )
    for direction, (pixels, down, across) in enumerate(edges):
        rows, columns = np.nonzero(pixels)
        starts.append((rows + down) * width + columns + across)
        directions.append(np.full(len(rows), direction))
    return np.concatenate(starts), np.concatenate(directions)


def _followers(starts: Points, directions: Points, width: int) -> Points:
    """Return the index of the edge that follows each edge. Where two parts of the mask touch at a corner only, the
    outline turns right, so the parts get separate rings."""
    offsets = np.array([dx + dy * width for dx, dy in _STEPS])
    ends = starts + offsets[directions]
    keys = starts * 4 + directions
    order = np.argsort(keys)
    ordered = keys[order]
    result = np.full(len(starts), -1, np.int64)
    for turn in (1, 0, 3):  # right, straight on, left
        wanted = ends * 4 + (directions + turn) % 4
        at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        exists = (ordered[at] == wanted) & (result < 0)
        result[exists] = order[at[exists]]
    return result


def _simplified(ring: Points, tolerance: float) -> Points:
    """Return the points of a ring that remain after simplification."""
    far = int(np.square(ring - ring[0]).sum(axis=1).argmax())
    closed = np.vstack([ring, ring[:1]]).astype(np.float64)
    keep = np.zeros(len(closed), bool)
    keep[[0, far, len(ring)]] = True
    pending = [(0, far), (far, len(ring))]
    while pending:
        start, end = pending.pop()
        if end - start < 2:
            continue
        between, line = closed[start + 1 : end] - closed[start], closed[end] - closed[start]
        length = float(line @ line)
        along = np.clip(between @ line / length, 0, 1)[:, None] if length > 0 else np.zeros((len(between), 1))
        distances = np.square(between - along * line).sum(axis=1)
        middle = int(distances.argmax())
        if distances[middle] > tolerance**2:
            keep[start + 1 + middle] = True
            pending += [(start, start + 1 + middle), (start + 1 + middle, end)]
    return ring[keep[:-1]]


def as_json(found: Polygons) -> dict[str, Any]:
    """Return polygons as the members `polygons` and, if there are any, `holes` of a JSON object."""
    return {"polygons": found.outer, **({"holes": found.holes} if found.holes else {})}
