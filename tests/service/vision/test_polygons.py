"""Tests of polygons: with tolerance 0 they describe a mask exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco

from service.errors import InvalidRequest
from service.vision import polygons as module
from service.vision.polygons import Polygons, as_json, polygons


def filled(found: Polygons, shape: tuple[int, ...]) -> np.ndarray:
    """Fill exact polygons by the even-odd rule: count the vertical edges on the left of each pixel."""
    crossings = np.zeros(shape, int)
    for ring in found.outer + found.holes:
        points = np.array(ring).reshape(-1, 2)
        for (x, y), (_, next_y) in zip(points, np.roll(points, -1, 0), strict=True):
            crossings[min(y, next_y) : max(y, next_y), x:] += 1
    return crossings % 2 == 1


@settings(max_examples=150, deadline=None)
@given(arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)))
def test_exact_polygons_describe_the_mask(mask: np.ndarray) -> None:
    found = polygons(mask, tolerance=0)
    np.testing.assert_array_equal(filled(found, mask.shape), mask)
    for ring, sign in [(ring, 1) for ring in found.outer] + [(ring, -1) for ring in found.holes]:
        x, y = np.array(ring).reshape(-1, 2).T
        assert sign * int((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) > 0


def disc(radius: int = 60, hole: int = 0) -> np.ndarray:
    y, x = np.mgrid[:150, :170]
    distance = np.hypot(y - 70, x - 80)
    return (distance < radius) & (distance >= hole)


@pytest.mark.parametrize("tolerance", [0.5, 1.0, 3.0])
def test_simplified_polygons_stay_near(tolerance: float) -> None:
    mask = disc()
    exact, simple = polygons(mask, 0).outer[0], polygons(mask, tolerance).outer[0]
    assert len(simple) < len(exact)
    points = np.array(exact).reshape(-1, 2).astype(float)
    ends = np.array(simple).reshape(-1, 2).astype(float)
    starts = np.roll(ends, 1, axis=0)
    line = ends - starts
    along = np.einsum("pld,ld->pl", points[:, None] - starts, line) / np.square(line).sum(1)
    nearest = starts + along.clip(0, 1)[..., None] * line
    assert np.linalg.norm(points[:, None] - nearest, axis=2).min(1).max() <= tolerance + 1e-9


def test_pycocotools_reads_the_polygons() -> None:
    mask = disc()
    [outer] = polygons(mask, 1.0).outer
    read = coco.decode(coco.merge(coco.frPyObjects([outer], *mask.shape))).astype(bool)
    assert (read & mask).sum() / (read | mask).sum() > 0.97


def test_holes_are_separate_rings() -> None:
    found = polygons(disc(hole=20))
    assert (len(found.outer), len(found.holes)) == (1, 1)
    assert set(as_json(found)) == {"polygons", "holes"}
    assert set(as_json(polygons(disc()))) == {"polygons"}
    assert as_json(polygons(np.zeros((4, 4), bool))) == {"polygons": []}


def test_parts_that_touch_at_a_corner_are_separate() -> None:
    found = polygons(np.eye(3, dtype=bool), tolerance=0)
    assert sorted(map(len, found.outer)) == [8, 8, 8]
    ring = polygons(~np.eye(3, dtype=bool), tolerance=0)
    assert (len(ring.outer), len(ring.holes)) == (2, 0)


def test_a_thin_part_is_not_lost() -> None:
    mask = np.zeros((20, 20), bool)
    mask[4, 3:15] = True
    found = polygons(mask, tolerance=10)
    np.testing.assert_array_equal(filled(found, mask.shape), mask)


def test_ragged_masks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_EDGES", 500)
    with pytest.raises(InvalidRequest, match=r"has 1,152 edges; format=polygons accepts at most 500. Use format=rle"):
        polygons(np.indices((24, 24)).sum(0) % 2 == 0)
