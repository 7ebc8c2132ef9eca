"""Tests of foreground masks from patch features: a salient object is found at its place in the image, or the mask is
empty.
"""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as coco

from model.preprocess import REFERENCE_224, REFERENCE_518, PreprocessSpec, crop_box, output_size, preprocess
from service.vision.foreground import (
    first_component,
    foreground_scores,
    orient,
    otsu_threshold,
    segment_foreground,
    upsample_mask,
)
from service.vision.mask import coco_rle_decode, coco_rle_encode, overlay_png, png_mask
from service.vision.region import image_weights

NO_CROP = PreprocessSpec(resize=224, crop=None)
RNG = np.random.default_rng(5)
PROJECT = RNG.normal(size=(3, 32)).astype(np.float32)


def features_of(image: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """Return each patch's mean colour after the real preprocessing, mixed into 32 dimensions, instead of a network's
    features.
    """
    pixels = preprocess(image, spec)
    p = spec.patch_size
    h, w = pixels.shape[1] // p, pixels.shape[2] // p
    means = pixels.reshape(3, h, p, w, p).mean((2, 4)).reshape(3, h * w).T
    return (means @ PROJECT + 3).astype(np.float32)


def picture(height: int, width: int, box: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return an image of a red box (top, left, bottom, right) on noisy green, and its true mask."""
    image = np.random.default_rng(1).integers(0, 40, (height, width, 3)).astype(np.uint8)
    image[:, :, 1] += 100
    truth = np.zeros((height, width), bool)
    truth[box[0] : box[2], box[1] : box[3]] = True
    image[truth] = (220, 30, 30)
    return image, truth


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (300, 300, (100, 100, 200, 200)),
        (300, 500, (60, 150, 180, 260)),  # off centre, towards the left
        (300, 500, (60, 260, 180, 370)),  # and towards the right
        (640, 360, (350, 60, 470, 200)),
        (100, 120, (40, 20, 80, 60)),  # smaller than the network's input
    ],
)
@pytest.mark.parametrize("spec", [REFERENCE_224, REFERENCE_518, NO_CROP], ids=["224", "518", "no-crop"])
def test_the_mask_lies_where_the_object_is(
    height: int, width: int, box: tuple[int, int, int, int], spec: PreprocessSpec
) -> None:
    image, truth = picture(height, width, box)
    found = segment_foreground(features_of(image, spec), height, width, spec)
    assert found.mask.shape == (height, width)
    assert iou(found.mask, truth) > 0.7  # a patch is 14 to 19 pixels wide here
    rows, columns = np.nonzero(found.mask)
    assert abs(rows.mean() - (box[0] + box[2] - 1) / 2) < 2  # no drift: a shifted square gives a shifted mask
    assert abs(columns.mean() - (box[1] + box[3] - 1) / 2) < 2
    assert found.contrast > 0.01


def test_outside_the_crop_is_background() -> None:
    image, _ = picture(200, 600, (60, 250, 140, 350))
    found = segment_foreground(features_of(image, REFERENCE_224), 200, 600, REFERENCE_224)
    x, y, width, height = found.crop_box
    assert (y, height) == (pytest.approx(12.5), pytest.approx(175))
    assert (x, width) == (pytest.approx(212.5), pytest.approx(175))
    full = upsample_mask(np.ones((16, 16), np.float32), 200, 600, found.crop_box)
    expected = np.zeros((200, 600), bool)
    expected[12:187, 212:387] = True  # pixels whose centre is in [12.5, 187.5) and [212.5, 387.5)
    np.testing.assert_array_equal(full, expected)


@pytest.mark.parametrize("size", [(480, 640), (333, 257), (1000, 231), (50, 60)])
@pytest.mark.parametrize("spec", [REFERENCE_224, NO_CROP])
def test_crop_box_is_what_preprocess_cuts(size: tuple[int, int], spec: PreprocessSpec) -> None:
    """The image contains its own coordinates, so each pixel of the network's input tells its position in the image."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([x * 255 / (width - 1), y * 255 / (height - 1), 0 * x], -1).round().astype(np.uint8)
    flat = spec.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    seen = preprocess(image, flat)
    out_h, out_w = output_size(height, width, spec)
    left, top, box_w, box_h = crop_box(height, width, spec)
    expected_x = (left + (np.arange(out_w) + 0.5) * box_w / out_w - 0.5) / (width - 1)
    expected_y = (top + (np.arange(out_h) + 0.5) * box_h / out_h - 0.5) / (height - 1)
    inner = slice(8, -8)  # bicubic bends at the image's rim
    assert np.abs(seen[0, out_h // 2] - expected_x)[inner].max() < 0.006
    assert np.abs(seen[1, :, out_w // 2] - expected_y)[inner].max() < 0.006


@pytest.mark.parametrize("value", [0.0, 1.0, -7.5])
def test_equal_patches_give_an_empty_mask(value: float) -> None:
    found = segment_foreground(np.full((256, 8), value, np.float32), 300, 400, REFERENCE_224)
    assert not found.mask.any()
    assert not found.patch_mask.any()
    assert found.contrast == 0
    assert np.isfinite(found.scores).all()


def test_rounding_noise_is_not_an_object() -> None:
    noise = np.float32(3) + RNG.normal(size=(256, 64)).astype(np.float32) * 1e-6
    assert not segment_foreground(noise, 224, 224, REFERENCE_224).mask.any()


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fill a grid of 16 x 16"):
        segment_foreground(np.zeros((255, 8), np.float32), 224, 224, REFERENCE_224)
    with pytest.raises(ValueError, match="finite"):
        foreground_scores(np.full((4, 2), np.nan, np.float32), (2, 2))


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(np.float32, (12, 5), elements=st.floats(-50, 50, width=32)))
def test_any_features_give_finite_scores(patches: np.ndarray) -> None:
    scores = foreground_scores(patches, (3, 4))
    assert scores.shape == (3, 4)
    assert np.isfinite(scores).all()


def test_one_patch_is_enough() -> None:
    assert foreground_scores(np.ones((1, 4), np.float32), (1, 1)).tolist() == [[0.0]]


@pytest.mark.parametrize("shape", [(200, 24), (24, 200)])
def test_first_component_is_the_eigenvector(shape: tuple[int, int]) -> None:
    rows = (RNG.normal(size=shape) * np.linspace(1, 3, shape[1])).astype(np.float32)
    rows -= rows.mean(0)
    expected = np.linalg.svd(rows, full_matrices=False)[2][0]
    assert abs(float(first_component(rows) @ expected)) > 0.999_99
    assert np.linalg.norm(first_component(rows)) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(first_component(100 * rows)) == pytest.approx(1, abs=1e-6)


def test_a_few_long_patches_are_not_the_first_component() -> None:
    """ViTs without registers have a few patches of high norm (arXiv 2309.16588). Here these lie along a minor axis."""
    rows = np.array([[1, 0], [-1, 0]] * 50 + [[0, 3], [0, -3]], np.float32)
    np.testing.assert_allclose(np.abs(first_component(rows)), [1, 0], atol=1e-6)


def test_otsu_is_the_best_split() -> None:
    """The result is compared with a search over every threshold by the definition."""
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=30).round(1)
        got = otsu_threshold(values.astype(np.float32))

        def inner_variance(threshold: float, values: np.ndarray = values) -> float:
            sides = values[values > threshold], values[values <= threshold]
            return sum(side.var() * len(side) for side in sides if len(side))

        best = min(inner_variance(t) for t in np.unique(values)[:-1])
        assert inner_variance(got) == pytest.approx(best, abs=1e-5)
    assert otsu_threshold(np.full(5, 2.0, np.float32)) == 2.0


def test_the_frame_is_background() -> None:
    projection = np.ones((5, 5), np.float32)
    projection[1:-1, 1:-1] = -1
    np.testing.assert_array_equal(orient(projection), -projection)
    np.testing.assert_array_equal(orient(-projection), -projection)
    thin = np.array([[1, 1, 1, -1]], np.float32)  # all border: the smaller side is the foreground
    np.testing.assert_array_equal(orient(thin), -thin)


# ---- masks on the wire


def masks() -> dict[str, np.ndarray]:
    y, x = np.mgrid[0:400, 0:300]
    return {
        "empty": np.zeros((7, 5), bool),
        "full": np.ones((7, 5), bool),
        "pixel": np.eye(1, dtype=bool),
        "first": np.arange(12).reshape(3, 4) == 0,
        "disc": (y - 200) ** 2 + (x - 140) ** 2 < 9000,
        "noise": RNG.random((64, 51)) > 0.5,
        "large": (y * 300 + x) % 70_001 < 35_000,
        "checkers": (y + x) % 2 == 1,
    }


@pytest.mark.parametrize("name", masks())
def test_rle_is_what_pycocotools_writes(name: str) -> None:
    mask = masks()[name]
    expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    got = coco_rle_encode(mask)
    assert got == {"size": list(mask.shape), "counts": expected["counts"].decode()}
    np.testing.assert_array_equal(coco_rle_decode(got), mask)
    np.testing.assert_array_equal(coco_rle_decode(expected), mask)
    np.testing.assert_array_equal(coco.decode(got).astype(bool), mask)


@settings(max_examples=150, deadline=None)
@given(arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)))
def test_rle_round_trip(mask: np.ndarray) -> None:
    encoded = coco_rle_encode(mask)
    assert encoded["counts"] == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    np.testing.assert_array_equal(coco_rle_decode(encoded), mask)


def test_uncompressed_rle_is_read() -> None:
    assert coco_rle_decode({"size": [2, 2], "counts": [1, 2, 1]}).tolist() == [[False, True], [True, False]]


WRONG_COUNTS = ["", "4", "o", "\x10", "999", b"\xff\xff", "P" * 30 + "0", "S" + "P" * 13 + "0", [5], [-1, 5], "é"]


@pytest.mark.parametrize("counts", WRONG_COUNTS)
def test_wrong_rle_is_refused(counts: object) -> None:
    with pytest.raises(ValueError, match=r"counts|run length"):
        coco_rle_decode({"size": [1, 3], "counts": counts})


def test_png_mask_and_overlay() -> None:
    mask = masks()["disc"]
    shown = np.asarray(Image.open(io.BytesIO(png_mask(mask))))
    np.testing.assert_array_equal(shown, mask * np.uint8(255))
    image = np.full((400, 300, 3), 200, np.uint8)
    overlay = np.asarray(Image.open(io.BytesIO(overlay_png(image, mask))))
    assert overlay.shape == image.shape
    assert (overlay[~mask] == 70).all()
    assert (overlay[mask] == [213, 166, 158]).all()
    with pytest.raises(ValueError, match="same size"):
        overlay_png(image[:10], mask)


PAD = PreprocessSpec(fit="pad", resize=None)


@pytest.mark.parametrize(("height", "width"), [(200, 600), (600, 200), (10, 1000)])
def test_padding_takes_no_part_in_the_foreground(height: int, width: int) -> None:
    """The patches of the padding differ from all others, so they would be the foreground if they took part."""
    box = crop_box(height, width, PAD)
    shares = image_weights((height, width), box, (16, 16))
    rng = np.random.default_rng(0)
    tokens = np.where(shares.reshape(256, 1) > 0, 0, 100) + rng.normal(0, 0.01, (256, 8)).astype(np.float32)
    front = np.zeros((16, 16), bool)
    if height < width:
        front[:, 4:8] = True
    else:
        front[4:8] = True
    tokens[front.ravel() & (shares.ravel() > 0), 0] += 1.0
    found = segment_foreground(tokens.astype(np.float32), height, width, PAD)
    centre = found.mask[height // 2] if height < width else found.mask[:, width // 2]
    wide = max(height, width)
    inside = np.zeros(wide, bool)
    inside[wide // 4 : wide // 2] = True
    assert (centre == inside).mean() > 0.95
    assert found.mask.shape == (height, width)
    assert not found.patch_mask[shares == 0].any()
    assert found.contrast > 0
