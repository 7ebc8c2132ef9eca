"""Tests of finding a marked region by patch features: against a plain definition, on planted features, and on generated
scenes with the bundled model.
"""

import colorsys
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageDraw

from model.preprocess import crop_box, preprocess
from service.features.patches import Patches, unit_rows
from service.vision.find_region import MAX_COMPARED, Reference, Region, learn_region, mask_scores, scores
from service.vision.foreground import upsample_mask
from service.vision.local import Vision
from service.vision.positional_bias import positional_basis
from service.vision.region import box_weights

D = 24
NO_BASIS = np.zeros((0, D), np.float32)


class Planted(NamedTuple):
    """The features of an image whose patches show an object or the background, and the patches that show the object."""

    rows: np.ndarray
    inside: np.ndarray


def planted(seed: int, count: int = 64, share: float = 0.25, noise: float = 0.5, kind: int = 0) -> Planted:
    """Return an image with an object of `kind`, which consists of three different parts."""
    shared = np.random.default_rng(100)
    base, grounds = shared.normal(size=D) * 2, shared.normal(size=(4, D))
    parts = np.random.default_rng(200 + kind).normal(size=(3, D)) + np.random.default_rng(300 + kind).normal(size=D)
    rng = np.random.default_rng(seed)
    inside = rng.random(count) < share
    inside[:3] = True
    which = np.arange(count) % 3
    rows = base + np.where(inside[:, None], parts[which], grounds[rng.integers(4, size=count)])
    return Planted((rows + noise * rng.normal(size=(count, D))).astype(np.float32), inside)


def reference(image: Planted) -> Reference:
    return Reference(image.rows, image.inside.astype(np.float32), np.ones(len(image.rows), bool))


def slow_score(region: Region, rows: np.ndarray) -> float:
    """Compute a score patch by patch, as the module's docstring defines it."""
    candidates, all_projected = [], []
    for row in rows.astype(np.float64):
        projected = row / np.linalg.norm(row) - region.origin
        for direction in region.basis:
            projected = projected - (projected @ direction) * direction
        all_projected.append(projected / np.linalg.norm(projected))
    middle = np.median([row @ region.prototype for row in all_projected])
    for projected in all_projected:
        is_above = projected @ region.prototype > max(region.threshold, middle)
        if is_above and max(region.inside @ projected) > max([-2.0, *(region.outside @ projected)]):
            candidates.append(projected)
    best = [max([0.0, *(row @ other for other in candidates)]) for row in region.inside]
    return max(float(np.mean(part)) for part in np.split(np.array(best), region.starts[1:]))


@pytest.mark.parametrize("directions", [0, 3])
@pytest.mark.parametrize("references", [1, 3])
def test_scores_equal_the_definition(directions: int, references: int) -> None:
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0][:directions].astype(np.float32)
    region = learn_region([reference(planted(i)) for i in range(references)], basis)
    images = [planted(i, count=20 + i, kind=i % 2, noise=1.2) for i in range(10, 18)]
    found = scores(region, [(3 * image.rows, None) for image in images])
    assert found == pytest.approx([slow_score(region, image.rows) for image in images], abs=1e-4)
    assert len(region.starts) == references
    assert np.abs(region.inside @ basis.T).max(initial=0) < 1e-5
    assert min(found[::2]) > max(found[1::2])  # the even ones contain the object


def test_an_image_with_only_a_part_of_the_region_has_a_lower_score() -> None:
    region = learn_region([reference(planted(0))], NO_BASIS)
    image = planted(1)
    part = np.where((image.inside & (np.arange(64) % 3 > 0))[:, None], planted(1, share=0.0).rows[5], image.rows)
    whole, partly = scores(region, [(image.rows, None), (part.astype(np.float32), None)])
    assert whole > 0.6
    assert partly < whole - 0.1


def test_masks_of_planted_objects() -> None:
    region = learn_region([reference(planted(0))], NO_BASIS)
    for seed in range(1, 6):
        image = planted(seed)
        found = mask_scores(region, image.rows) > 0
        assert (found & image.inside).sum() / (found | image.inside).sum() > 0.9
    assert not (mask_scores(region, planted(7, kind=1).rows) > 0).sum() > 16


def test_features_in_int8_give_nearly_the_same_scores() -> None:
    region = learn_region([reference(planted(0))], NO_BASIS)
    images = [planted(seed, kind=seed % 2).rows for seed in range(1, 9)]
    packed = [Patches.of(rows, (8, 8), (80, 80)).rows for rows in images]
    exact, rounded = (scores(region, [(rows, None) for rows in each]) for each in (images, packed))
    assert rounded == pytest.approx(exact, abs=0.02)


def test_images_do_not_affect_each_other() -> None:
    region = learn_region([reference(planted(0))], NO_BASIS)
    images = [(planted(seed, kind=seed % 3).rows, None) for seed in range(1, 9)]
    together = scores(region, images)
    assert together == pytest.approx([scores(region, [image])[0] for image in images], abs=1e-5)


def test_padding_is_no_candidate_and_no_background() -> None:
    image, shown = planted(0), np.arange(64) >= 16
    padded = image.rows.copy()
    padded[~shown] = planted(0).rows[image.inside][0]  # padding that looks like the object
    region = learn_region([Reference(padded, image.inside.astype(np.float32), shown)], NO_BASIS)
    assert len(region.outside) == (shown & ~image.inside).sum()
    assert len(region.inside) == (shown & image.inside).sum()
    empty = planted(1, share=0.0, kind=5)
    rows = np.where(shown[:, None], empty.rows, padded)
    assert scores(region, [(rows, None)])[0] > scores(region, [(rows, shown)])[0]
    assert not (mask_scores(region, rows, shown) > 0)[~shown].any()


@pytest.mark.parametrize("weight", [1e-14, 1e-30])
def test_a_tiny_region_marks_the_patch_that_contains_it(weight: float) -> None:
    image = planted(0)
    weights = np.zeros(len(image.rows), np.float32)
    weights[0] = weight
    region = learn_region([Reference(image.rows, weights, np.ones(len(image.rows), bool))], NO_BASIS)
    assert len(region.inside) == 1
    assert scores(region, [(image.rows, None)])[0] > 0.5


def test_marking_the_whole_image_still_finds_the_same_image_first() -> None:
    whole = planted(0)
    region = learn_region([Reference(whole.rows, np.ones(64, np.float32), np.ones(64, bool))], NO_BASIS)
    assert not len(region.outside)
    found = scores(region, [(planted(seed, kind=seed).rows, None) for seed in range(4)])
    assert found.argmax() == 0
    assert (mask_scores(region, whole.rows) > 0).mean() > 0.9


def test_features_without_any_difference_are_no_error() -> None:
    flat = np.ones((64, D), np.float32)
    weights = np.zeros(64, np.float32)
    weights[3] = 0.01  # a region far smaller than a patch
    region = learn_region([Reference(flat, weights, np.ones(64, bool))], NO_BASIS)
    assert np.isfinite(scores(region, [(flat, None), (np.zeros_like(flat), None)])).all()
    assert np.isfinite(mask_scores(region, flat)).all()


def test_the_number_of_compared_patches_is_bounded() -> None:
    region = learn_region([reference(planted(i, count=900, share=0.5)) for i in range(8)], NO_BASIS)
    assert (len(region.inside), len(region.outside)) == (MAX_COMPARED, MAX_COMPARED)
    assert region.starts.tolist() == [MAX_COMPARED // 8 * i for i in range(8)]


# Scenes


def texture(rng: np.random.Generator, hue: float, side: int) -> Image.Image:
    """Return a square with stripes, a checkerboard or dots in two shades of a hue."""
    light, dark = (np.array(colorsys.hsv_to_rgb(h % 1, 0.9, v)) * 255 for h, v in ((hue, 0.9), (hue + 0.12, 0.5)))
    y, x = np.mgrid[:side, :side]
    f = int(rng.integers(6, 14))
    dots = (x % (2 * f) - f) ** 2 + (y % (2 * f) - f) ** 2 < (0.7 * f) ** 2
    pattern = [x // f % 2, y // f % 2, (x // f + y // f) % 2, dots][rng.integers(4)][..., None]
    pixels = light * pattern + dark * (1 - pattern) + rng.normal(0, 4, (side, side, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


class Scene(NamedTuple):
    image: np.ndarray  # [256, 256, 3]
    mask: np.ndarray  # [256, 256]


def scene(rng: np.random.Generator, target: Image.Image, ellipse: bool, other: Image.Image) -> Scene:
    """Return an image of the target in front of another object, on a gradient of two random colours."""
    colours, t = rng.integers(30, 225, (2, 3)), np.linspace(0, 1, 256)[:, None, None]
    ground = np.broadcast_to(colours[0] * (1 - t) + colours[1] * t, (256, 256, 3)) + rng.normal(0, 6, (256, 256, 3))
    canvas = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    mask = Image.new("L", canvas.size, 0)
    for thing in (other, target):
        side = int(rng.integers(80, 140))
        place = tuple(int(rng.integers(28, 228 - side)) for _ in range(2))
        shape = Image.new("L", (side, side), 0)
        draw = ImageDraw.Draw(shape)
        (draw.ellipse if ellipse else draw.rectangle)((0, 0, side - 1, side - 1), fill=255)
        canvas.paste(thing.resize((side, side)), place, shape)
        mask.paste(0, (0, 0, *mask.size))
        mask.paste(shape, place, shape)
    return Scene(np.asarray(canvas), np.asarray(mask) > 127)


def pair(rng: np.random.Generator) -> tuple[Scene, Scene]:
    """Return two scenes with the same target at other places, in other sizes and on other backgrounds."""
    hue, ellipse = rng.random(), bool(rng.integers(2))
    target = texture(rng, hue, 160)
    others = [texture(rng, hue + rng.uniform(0.25, 0.75), 160) for _ in range(2)]
    first, second = (scene(rng, target, ellipse, other) for other in others)
    return first, second


@pytest.mark.parametrize("debias", [False, True])
def test_the_bundled_model_finds_shapes_in_scenes(vision: Vision, debias: bool) -> None:
    """The mean IoU is that of the pixels which the network sees."""
    rng, spec = np.random.default_rng(1), vision.artifact.manifest.preprocess
    zeros = vision.model.patches_of_zeros(224, 224)
    basis = positional_basis(zeros) if debias else np.zeros((0, zeros.shape[1]), np.float32)
    seen = crop_box(256, 256, spec)
    visible = np.asarray(upsample_mask(np.ones((1, 1), np.float32), 256, 256, seen))
    overlaps, ranks = [], []
    pairs = [pair(rng) for _ in range(24)]
    features = [[vision.engine.run(preprocess(s.image, spec)[None]).patches[0] for s in both] for both in pairs]
    for (first, second), (of_first, of_second) in zip(pairs, features, strict=True):
        ys, xs = np.nonzero(first.mask)
        box = (xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1)  # a box, not the mask
        weights = box_weights(tuple(map(float, box)), seen, (16, 16)).ravel()
        region = learn_region([Reference(of_first, weights, np.ones(256, bool))], basis)
        found = upsample_mask(mask_scores(region, of_second).reshape(16, 16), 256, 256, seen)
        truth = second.mask & visible
        overlaps.append((found & truth).sum() / (found | truth).sum())
        all_scores = scores(region, [(others[1], None) for others in features])
        ranks.append(int((all_scores >= scores(region, [(of_second, None)])[0] - 1e-6).sum()))
    assert np.mean(overlaps) >= 0.8
    assert np.median(ranks) <= 3  # of 24 images, of which one contains the object


def test_unit_rows_accepts_int8() -> None:
    assert unit_rows(np.array([[3, 4], [0, 0]], np.int8)).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]
