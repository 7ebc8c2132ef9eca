"""Tests of patch grids and refined masks: a mask has the size of the image, and its outline follows the image."""

import numpy as np
import pytest
from scipy import ndimage

from benchmarks.vision_scenes import patch_masks, scene
from model.preprocess import REFERENCE_224, PreprocessSpec, crop_box, output_size
from service.errors import EngineFailed
from service.vision import refine
from service.vision.foreground import upsample_mask
from service.vision.patch_grid import PatchGrid
from service.vision.refine import holes, label_pixels, tidy
from service.vision.regions import label_colours, pixel_labels, tinted

PAD = PreprocessSpec(fit="pad", resize=None)
SQUASH = PreprocessSpec(fit="squash", resize=None)
WHOLE = PreprocessSpec(resize=112, crop=None)
SPECS = {"crop": REFERENCE_224, "pad": PAD, "squash": SQUASH, "whole": WHOLE}
RNG = np.random.default_rng(2)


def grid_for(size: tuple[int, int], spec: PreprocessSpec) -> PatchGrid:
    height, width = output_size(*size, spec)
    return PatchGrid.of(size, crop_box(*size, spec), (height // 14, width // 14))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("size", [(300, 300), (61, 317), (317, 61), (40, 40), (1000, 20)])
@pytest.mark.parametrize("refined", [False, True])
def test_labels_have_the_size_of_the_image(size: tuple[int, int], spec: PreprocessSpec, refined: bool) -> None:
    grid = grid_for(size, spec)
    masks = [RNG.random(grid.shape) < 0.3 for _ in range(2)]
    image = RNG.integers(0, 256, (*size, 3)).astype(np.uint8)
    labels = pixel_labels(grid, masks, image if refined else None)
    assert labels.shape == size
    x, y, width, height = grid.seen_box
    rows, columns = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    outside = ~(((rows >= y) & (rows < y + height))[:, None] & ((columns >= x) & (columns < x + width)))
    assert not labels[outside].any()
    full = pixel_labels(grid, [np.ones(grid.shape, bool)], image if refined else None, cover=True)
    np.testing.assert_array_equal(full > 0, ~outside)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("size", [(300, 300), (120, 317)])
def test_upsampling_is_that_of_the_foreground(size: tuple[int, int], spec: PreprocessSpec) -> None:
    grid = grid_for(size, spec)
    scores = RNG.normal(size=grid.shape).astype(np.float32)
    expected = upsample_mask(scores, *size, grid.box)
    labels = label_pixels(grid, scores[None])
    x, y, width, height = (round(side) for side in grid.seen_box)
    inner = slice(y + 1, y + height - 1), slice(x + 1, x + width - 1)
    if spec is not PAD:  # the rows of pixels beside the padding have no patch of their own
        np.testing.assert_array_equal(labels[inner] > 0, expected[inner])


def test_padding_has_no_patches() -> None:
    grid = grid_for((100, 400), PAD)
    assert grid.full == (16, 16)
    assert grid.shape == (4, 16)
    assert grid.seen_box == (0, 0, 400, 100)
    tokens = np.arange(256, dtype=np.float32)[:, None]
    assert grid.select(tokens).ravel().tolist() == list(range(96, 160))
    with pytest.raises(EngineFailed, match="do not fill a grid of 16 x 16"):
        grid.select(tokens[1:])
    with pytest.raises(EngineFailed, match="not finite"):
        grid.select(np.full((256, 2), np.nan, np.float32))


@pytest.mark.parametrize("objects", [1, 3])
def test_refined_masks_are_better(objects: int) -> None:
    plain, better = [], []
    for seed in range(6):
        drawn = scene(40 + seed, (224, 224), objects)
        grid = grid_for((224, 224), SQUASH)
        patches = patch_masks(drawn.masks, grid.shape)
        for image, overlaps in ((None, plain), (drawn.image, better)):
            labels = pixel_labels(grid, patches, image)
            overlaps += [
                (mask & (labels == number)).sum() / (mask | (labels == number)).sum()
                for number, mask in enumerate(drawn.masks, start=1)
            ]
    assert np.mean(better) > 0.95
    assert np.mean(better) > np.mean(plain) + 0.05


def test_the_guided_filter_is_its_definition() -> None:
    """Fit a linear function of the colour in each window with a plain solver, and average the functions."""
    size = (64, 64)
    grid = PatchGrid.of(size, (0, 0, 64, 64), (16, 16))  # the small copy has the size of the image
    image = RNG.integers(0, 256, (*size, 3)).astype(np.uint8)
    values = RNG.normal(size=(16, 16)).astype(np.float32)
    fitted = refine._fit(grid, values[None], image)[0]
    wide = refine._resized(values[None], size)[0]
    slopes = np.empty((*size, 4))
    pad = ((4, 4), (4, 4))
    colours = np.stack([np.pad(image[..., c] / 255, pad, mode="edge") for c in range(3)], axis=-1)
    target = np.pad(wide, pad, mode="edge")
    for row in range(64):
        for column in range(64):
            x = colours[row : row + 9, column : column + 9].reshape(-1, 3)
            z = target[row : row + 9, column : column + 9].ravel()
            covariance = np.cov(x.T, bias=True) + refine._SMOOTHNESS * np.eye(3)
            slope = np.linalg.solve(covariance, ((x - x.mean(0)) * (z - z.mean())[:, None]).mean(0))
            slopes[row, column] = [*slope, z.mean() - slope @ x.mean(0)]
    expected = ndimage.uniform_filter(slopes, (9, 9, 0), mode="nearest")
    inner = slice(8, -8)
    np.testing.assert_allclose(np.moveaxis(fitted, 0, 2)[inner, inner], expected[inner, inner], atol=2e-3)


def test_tidy_keeps_one_part_and_fills_holes() -> None:
    mask = np.zeros((30, 40), np.uint8)
    mask[2:12, 2:12] = 1
    mask[5:7, 5:7] = 0  # a hole
    mask[9:11, 9:11] = 2  # another region in a hole of the first
    mask[20:24, 20:26] = 1  # a smaller part
    one = tidy(mask.copy(), one_part=True, smallest=0)
    assert (one[2:12, 2:12] > 0).all()
    assert (one[9:11, 9:11] == 2).all()
    assert not one[20:24, 20:26].any()
    assert (tidy(mask.copy(), one_part=False, smallest=20)[20:24, 20:26] == 1).all()
    assert not tidy(mask.copy(), one_part=False, smallest=30)[20:24, 20:26].any()


def test_holes_are_those_of_scipy() -> None:
    for share in (0.4, 0.6, 0.8):
        mask = RNG.random((40, 50)) < share
        np.testing.assert_array_equal(holes(mask), ndimage.binary_fill_holes(mask) & ~mask)


def test_large_images_are_labelled_in_a_smaller_size(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = scene(1, (400, 300))
    grid = grid_for((400, 300), WHOLE)
    masks = patch_masks(drawn.masks, grid.shape)
    exact = {image is None: pixel_labels(grid, masks, image) for image in (None, drawn.image)}
    monkeypatch.setattr(refine, "_MAX_VALUES", 40_000)
    for image in (None, drawn.image):
        labels = pixel_labels(grid, masks, image)
        assert labels.shape == (400, 300)
        expected = exact[image is None]
        assert (labels & expected).sum() / (labels | expected).sum() > 0.9
    cropped = grid_for((400, 300), REFERENCE_224)
    full = pixel_labels(cropped, [np.ones(cropped.shape, bool)], None, cover=True)
    monkeypatch.undo()
    np.testing.assert_array_equal(full, pixel_labels(cropped, [np.ones(cropped.shape, bool)], None, cover=True))


def test_colours_and_tints() -> None:
    colours = label_colours()
    assert len(np.unique(colours[1:33], axis=0)) == 32
    labels = np.zeros((6, 6), np.uint8)
    labels[2:4, 2:4] = 3
    image = np.full((6, 6, 3), 100, np.uint8)
    picture = tinted(image, labels)
    assert (picture[labels == 0] == 35).all()
    assert picture[2, 2].tolist() == [(100 + int(value)) // 2 for value in colours[3]]
