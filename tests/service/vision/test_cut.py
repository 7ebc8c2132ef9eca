"""Tests of cuts: they equal a dense eigen-solver, and they find planted objects in features of any kind."""

import numpy as np
import pytest
import scipy.linalg

from benchmarks.vision_scenes import patch_masks, planted_features, scene
from service.features.patches import unit_rows
from service.vision.cut import (
    LINK,
    first_object,
    link_threshold,
    normalised_cut,
    part_at,
    second_eigenvector,
    smallest_object,
    spread,
)
from service.vision.lost import lost_mask, several_lost
from service.vision.multi import several, several_cuts

GRID = (16, 16)
RNG = np.random.default_rng(3)


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def planted(seed: int, objects: int, grid: tuple[int, int] = GRID, shift: float = 0) -> tuple[np.ndarray, list]:
    """Return unit features of a scene and the patches of its objects. `shift` is the length of a component that all
    patches have in common."""
    masks = scene(seed, (8 * grid[0], 8 * grid[1]), objects).masks
    features, _ = planted_features(masks, grid, seed)
    common = np.random.default_rng(1).normal(size=features.shape[1])
    features = features + (shift * common / np.linalg.norm(common)).astype(np.float32)
    return unit_rows(features), patch_masks(masks, grid)


def random_links(kind: str) -> np.ndarray:
    """Return a symmetric matrix of zeros and ones with a unit diagonal."""
    if kind == "features":
        features, _ = planted(4, 2)
        return (features @ features.T > link_threshold(features)).astype(np.float32)
    count = {"small": 3, "sparse": 90, "dense": 150}[kind]
    links = RNG.random((count, count)) < {"small": 0.5, "sparse": 0.05, "dense": 0.6}[kind]
    return np.maximum(links | links.T, np.eye(count, dtype=bool)).astype(np.float32)


@pytest.mark.parametrize("kind", ["features", "small", "sparse", "dense"])
def test_lanczos_equals_a_dense_solver(kind: str) -> None:
    links = random_links(kind)
    weights = LINK + (1 - LINK) * links.astype(np.float64)
    degrees = np.diag(weights.sum(axis=1))
    values, vectors = scipy.linalg.eigh(degrees - weights, degrees)
    value, vector = second_eigenvector(links)
    assert value == pytest.approx(values[1], abs=1e-5)
    if values[2] - values[1] > 1e-3:  # otherwise every vector of the plane is an eigenvector
        expected = vectors[:, 1] / np.linalg.norm(vectors[:, 1])
        assert abs(float(expected @ vector)) == pytest.approx(1, abs=1e-4)
    residual = (degrees - weights) @ vector - value * degrees @ vector
    assert np.linalg.norm(residual) < 1e-3 * np.linalg.norm(degrees @ vector)


def test_the_cut_value_is_the_definition() -> None:
    features, _ = planted(5, 1)
    cut = normalised_cut(features, GRID, threshold=0.3)
    assert cut is not None
    inside = cut.mask.ravel()
    weights = np.where(features @ features.T > 0.3, 1, LINK).astype(np.float64)
    crossing = weights[inside][:, ~inside].sum()
    expected = crossing / weights[inside].sum() + crossing / weights[~inside].sum()
    assert cut.value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("grid", [(16, 16), (12, 20), (37, 37)])
def test_a_planted_object_is_cut_out(grid: tuple[int, int], shift: float) -> None:
    overlaps = []
    for seed in range(8 if grid[0] < 30 else 3):
        features, [truth] = planted(seed, 1, grid, shift)
        cut = first_object(features, grid)
        assert cut is not None
        overlaps.append(iou(cut.mask, truth))
    assert np.mean(overlaps) > 0.85, overlaps


def test_a_fixed_threshold_fails_where_the_default_does_not() -> None:
    """With a common component, all cosines are above 0.2."""
    features, [truth] = planted(2, 1, shift=3)
    assert (features @ features.T).min() > 0.2
    fixed = normalised_cut(features, GRID, threshold=0.2)
    default = normalised_cut(features, GRID)
    assert default is not None
    assert iou(default.mask, truth) > 0.9
    assert fixed is None or iou(fixed.mask, truth) < 0.5


def test_equal_patches_have_no_cut() -> None:
    equal = unit_rows(np.ones((256, 8), np.float32))
    assert normalised_cut(equal, GRID) is None
    assert first_object(equal, GRID) is None
    assert lost_mask(equal, GRID) is None
    assert normalised_cut(equal[:1], (1, 1)) is None
    assert first_object(equal, GRID, among=np.zeros(GRID, bool)) is None
    assert spread(equal) == pytest.approx(0, abs=1e-6)


def test_the_patches_that_take_part_are_respected() -> None:
    features, truths = planted(7, 3)
    among = ~truths[0]
    cut = first_object(features, GRID, among=among)
    assert cut is not None
    assert not (cut.mask & ~among).any()
    assert max(iou(cut.mask, truth) for truth in truths[1:]) > 0.8


def test_single_patches_are_no_objects() -> None:
    features, [truth] = planted(9, 1)
    for index in (0, 100, 255):  # patches that resemble nothing
        if not truth.ravel()[index]:
            features[index] = unit_rows(RNG.normal(size=(1, features.shape[1])))[0]
    cut = first_object(features, GRID)
    assert cut is not None
    assert cut.mask.sum() >= smallest_object(GRID) == 6
    assert iou(cut.mask, truth) > 0.8


@pytest.mark.parametrize("find", [several_cuts, several_lost])
@pytest.mark.parametrize("objects", [1, 2, 3])
def test_all_planted_objects_are_found(find, objects: int) -> None:
    hits, false = [], 0
    for seed in range(6):
        features, truths = planted(100 + seed, objects)
        found = find(features, GRID, max_objects=8, min_score=0.5)
        assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
        overlaps = np.array([[iou(each.mask, truth) for truth in truths] for each in found]).reshape(-1, objects)
        hits += list(overlaps.max(axis=0, initial=0) > 0.5)
        false += int((overlaps.max(axis=1) < 0.5).sum())
    assert np.mean(hits) > 0.8
    assert false <= 2


def test_the_bounds_of_a_search_are_kept() -> None:
    features, _ = planted(1, 3)
    assert len(several_cuts(features, GRID, max_objects=1, min_score=0.5)) == 1
    assert several_cuts(features, GRID, max_objects=5, min_score=1) == []
    calls = []

    def nothing_new(remaining: np.ndarray) -> np.ndarray:
        calls.append(1)
        mask = np.zeros(GRID, bool)
        mask[len(calls), :] = True
        return mask

    assert several(features, GRID, nothing_new, max_objects=32, min_score=1) == []
    assert len(calls) == 3  # it gives up after three parts that are no objects


def test_lost_centres_the_features() -> None:
    """All dot products are positive, so LOST's own rule finds everything similar to everything."""
    features, [truth] = planted(3, 1, shift=3)
    assert (features @ features.T > 0).all()
    found = lost_mask(features, GRID)
    assert found is not None
    assert iou(found, truth) > 0.8


def test_part_at() -> None:
    mask = np.array([[1, 1, 0], [0, 0, 1], [1, 0, 1]], bool)  # the corner contact does not connect
    assert part_at(mask, 5).tolist() == [[False, False, False], [False, False, True], [False, False, True]]
    assert not part_at(mask, 2).any()
