"""Tests of prompts on planted features: points, boxes and masks in, the similar region out."""

import numpy as np
import pytest
from scipy import ndimage

from benchmarks.vision_scenes import patch_masks, planted_features, scene
from service.features.patches import unit_rows
from service.vision.prompt import parts_with, region_in_box, similar_region

GRID = (16, 16)
NONE = np.zeros(GRID, bool)


def planted(seed: int, objects: int) -> tuple[np.ndarray, list[np.ndarray]]:
    masks = scene(seed, (128, 128), objects).masks
    return unit_rows(planted_features(masks, GRID, seed)[0]), patch_masks(masks, GRID)


def middle_of(mask: np.ndarray) -> np.ndarray:
    """Return a mask of the patch of an object that is farthest from its outline."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    point = np.zeros_like(mask)
    point.ravel()[int(depth.argmax())] = True
    return point


def box_around(mask: np.ndarray, margin: int = 1) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    box = np.zeros_like(mask)
    box[
        max(0, rows.min() - margin) : rows.max() + 1 + margin,
        max(0, columns.min() - margin) : columns.max() + 1 + margin,
    ] = True
    return box


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


@pytest.mark.parametrize("objects", [1, 2, 3])
@pytest.mark.parametrize("kind", ["point", "box", "mask"])
def test_a_prompt_finds_its_object(kind: str, objects: int) -> None:
    overlaps = []
    for seed in range(6):
        features, truths = planted(200 + seed, objects)
        for truth in truths:
            if kind == "box":
                found = region_in_box(features, box_around(truth), NONE, NONE)
            else:
                seeds = middle_of(truth) if kind == "point" else ndimage.binary_erosion(truth) | middle_of(truth)
                found = similar_region(features, seeds, NONE)
            overlaps.append(iou(found, truth))
    assert np.mean(overlaps) > 0.8


def test_negative_points_remove_a_region() -> None:
    features, truths = planted(300, 2)
    like = np.random.default_rng(0).choice(np.flatnonzero(truths[0]), truths[1].sum())
    features[truths[1].ravel()] = features[like]  # two similar objects
    point = middle_of(truths[0])
    both = similar_region(features, point, NONE, connected=False)
    assert iou(both, truths[0] | truths[1]) > 0.7
    assert iou(similar_region(features, point, NONE), truths[0]) > 0.7  # only the connected part
    without = similar_region(features, point, middle_of(truths[1]), connected=False)
    assert not (without & truths[1]).any()
    assert iou(without, truths[0]) > 0.7
    box = box_around(truths[0], margin=3)
    marked = middle_of(truths[0])
    assert not region_in_box(features, box, NONE, marked)[marked].any()
    assert region_in_box(features, box, middle_of(~box_around(truths[0])) & box | marked, NONE)[marked].all()


def test_a_negative_point_divides_an_object() -> None:
    """The features of an object change steadily from its left to its right side, by 40 degrees."""
    axes = np.eye(3)
    cells = np.broadcast_to(axes[2], (*GRID, 3)).copy()
    for column in range(4, 12):
        angle = np.deg2rad(40) * (column - 4) / 7
        cells[4:12, column] = np.cos(angle) * axes[0] + np.sin(angle) * axes[1]
    features = unit_rows(cells.reshape(256, 3))
    left, right = np.zeros(GRID, bool), np.zeros(GRID, bool)
    left[8, 4] = right[8, 11] = True
    whole = similar_region(features, left, NONE)
    assert whole.sum() == whole[4:12, 4:12].sum() == 64
    divided = similar_region(features, left, right)
    assert divided[4:12, 4:8].all()
    assert divided.sum() < 64 - 8


def test_a_negative_point_never_adds_patches() -> None:
    features, truths = planted(301, 3)
    point = middle_of(truths[0])
    before = similar_region(features, point, NONE, connected=False)
    for seed in range(20):
        negative = np.zeros(GRID, bool)
        negative.ravel()[np.random.default_rng(seed).integers(256)] = True
        negative &= ~point
        after = similar_region(features, point, negative, connected=False)
        assert not after[negative].any()
        assert after[point].all()
        assert after.sum() <= before.sum() + 2  # the mean of the region moves a little


def test_regions_stay_in_the_box_and_are_never_empty() -> None:
    rng = np.random.default_rng(0)
    features = unit_rows(rng.normal(size=(256, 8)))
    for _ in range(30):
        inside = np.zeros(GRID, bool)
        top, left = rng.integers(0, 16, 2)
        inside[top : top + rng.integers(1, 17), left : left + rng.integers(1, 17)] = True
        found = region_in_box(features, inside, NONE, NONE)
        assert found.any()
        assert not (found & ~inside).any()
    assert region_in_box(features, ~NONE, NONE, NONE).all()
    equal = unit_rows(np.ones((256, 4), np.float32))
    assert similar_region(equal, middle_of(~NONE), NONE).any()


def test_parts_with_seeds() -> None:
    mask = np.array([[1, 0, 1], [1, 0, 1]], bool)
    seeds = np.array([[0, 1, 1], [0, 0, 0]], bool)
    np.testing.assert_array_equal(parts_with(mask, seeds), [[False, False, True]] * 2)
