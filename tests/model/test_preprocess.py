"""Tests of the reference transform: comparisons with hand-computed values and with Hugging Face's processor, and the
errors.
"""

import json

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from model.preprocess import (
    REFERENCE_224,
    REFERENCE_518,
    PreprocessSpec,
    changed_spec,
    crop_box,
    output_size,
    preprocess,
    read_spec,
)

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SIZES = [(224, 224), (256, 256), (300, 400), (401, 299), (97, 130), (14, 600), (256, 341), (480, 640), (1, 1), (2, 199)]


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return smooth waves with noise, so that bicubic overshoot and clipping both occur."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(rng.uniform(0.02, 0.3) * y + rng.uniform(0.02, 0.3) * x + c) for c in range(3)]
    image = 127 + 140 * np.stack(waves, axis=-1) + 30 * rng.standard_normal((height, width, 3))
    return image.clip(0, 255).astype(np.uint8)


def slow_reference(image: np.ndarray, resize: int, crop: int) -> np.ndarray:
    """Apply torchvision's Resize, CenterCrop, ToTensor and Normalize one after another, as their documentation defines
    them.
    """
    height, width = image.shape[:2]
    if height <= width:
        size = (resize, int(resize * width / height))
    else:
        size = (int(resize * height / width), resize)
    resized = np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
    top, left = (round((side - crop) / 2.0) for side in size)
    cropped = resized[top : top + crop, left : left + crop].astype(np.float64)
    return ((cropped / 255 - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize("spec", [REFERENCE_224, REFERENCE_518])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_definition(size: tuple[int, int], spec: PreprocessSpec) -> None:
    image = photo(*size)
    pixels = preprocess(image, spec)
    assert spec.resize is not None
    assert spec.crop is not None
    assert pixels.shape == (3, spec.crop, spec.crop) == (3, *output_size(*size, spec))
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous
    np.testing.assert_allclose(pixels, slow_reference(image, spec.resize, spec.crop), atol=1e-6)


def test_constant_image_by_hand() -> None:
    image = np.empty((50, 70, 3), np.uint8)
    image[:] = (255, 0, 102)
    expected = (np.array([1.0, 0.0, 0.4]) - MEAN) / STD
    pixels = preprocess(image, REFERENCE_224)
    np.testing.assert_allclose(pixels, np.broadcast_to(expected[:, None, None], (3, 224, 224)), atol=1e-6)


@pytest.mark.parametrize(("width", "left"), [(256, 16), (257, 16), (259, 18), (258, 17)])
def test_odd_margin_is_rounded_half_to_even(width: int, left: int) -> None:
    """The margins are 16, 16.5, 17.5 and 17 pixels. The height is 256 already, so nothing is resized."""
    image = np.zeros((256, width, 3), np.uint8)
    image[:, :, 0] = np.minimum(np.arange(width), 255)
    first = preprocess(image, REFERENCE_224)[0, 0, 0]
    assert round(float(first * STD[0] + MEAN[0]) * 255) == left


def hf_pixels(image: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    module = pytest.importorskip(
        "transformers.models.bit.image_processing_pil_bit", reason="needs transformers >= 5: pip install '.[reference]'"
    )
    processor = module.BitImageProcessorPil(
        size={"shortest_edge": spec.resize},
        crop_size={"height": spec.crop, "width": spec.crop},
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )
    return np.asarray(processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize("spec", [REFERENCE_224, REFERENCE_518])
@pytest.mark.parametrize("size", [(224, 224), (300, 400), (402, 300), (97, 130), (600, 80), (640, 480), (33, 1000)])
def test_equals_hugging_face_except_for_odd_margins(size: tuple[int, int], spec: PreprocessSpec) -> None:
    image = photo(*size, seed=3)
    assert spec.resize is not None
    assert spec.crop is not None
    margin = int(spec.resize * max(size) / min(size)) - spec.crop
    ours, theirs = preprocess(image, spec), hf_pixels(image, spec)
    if margin % 4 != 3:  # even, or half a pixel that is rounded down: the same as flooring
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
    else:  # half a pixel that is rounded up to even: ours starts one pixel later
        assert np.abs(ours - theirs).max() > 0.1
        one_later = (ours[:, :-1], theirs[:, 1:]) if size[0] > size[1] else (ours[:, :, :-1], theirs[:, :, 1:])
        np.testing.assert_allclose(*one_later, atol=2e-6)


def test_sizes_above_cover_both_kinds_of_margin() -> None:
    margins = {(256 * long // short - 224) % 4 for short, long in [(97, 130), (300, 402), (80, 600), (33, 1000)]}
    assert 3 in margins
    assert margins - {3}


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [
        ((224, 224), None, (224, 224)),
        ((220, 230), None, (224, 224)),  # 15.71 and 16.43 patches
        ((231, 217), None, (238, 224)),  # 16.5 and 15.5 patches: halves up
        ((480, 640), None, (476, 644)),
        ((480, 640), 224, (224, 294)),  # 298.67 pixels are 21.33 patches
        ((640, 480), 518, (686, 518)),  # 690.67 pixels are 49.33 patches
        ((3, 5), None, (14, 14)),
        ((10, 900), None, (14, 896)),
    ],
)
def test_no_crop_keeps_aspect_and_rounds_to_patches(
    size: tuple[int, int], resize: int | None, expected: tuple[int, int]
) -> None:
    spec = PreprocessSpec(resize=resize, crop=None)
    image = photo(*size)
    assert output_size(*size, spec) == expected
    pixels = preprocess(image, spec)
    assert pixels.shape == (3, *expected)
    resized = np.array(Image.fromarray(image).resize(expected[::-1], Image.Resampling.BICUBIC))
    np.testing.assert_allclose(pixels, ((resized / 255 - MEAN) / STD).transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize("spec", [REFERENCE_224, PreprocessSpec(resize=None, crop=None)])
@pytest.mark.parametrize("size", [(0, 10), (10, 0), (0, 0), (1, 101), (5000, 2)])
def test_impossible_sizes_are_refused(size: tuple[int, int], spec: PreprocessSpec) -> None:
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels"):
        output_size(*size, spec)
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels"):
        preprocess(np.zeros((*size, 3), np.uint8), spec)


@pytest.mark.parametrize(
    "image", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3), np.float32)]
)
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8 of shape"):
        preprocess(image, REFERENCE_224)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resize": None}, "needs resize"),
        ({"resize": 200}, "does not fit"),
        ({"crop": 225}, "multiple of patch_size"),
        ({"resize": 0}, "greater than or equal to 1"),
        ({"std": (0.1, 0.0, 0.1)}, "must be above 0"),
        ({"interpolation": "bilinear"}, "bicubic"),
        ({"crop_size": 224}, "Extra inputs"),
    ],
)
def test_specs_that_make_no_sense_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PreprocessSpec.model_validate(fields)


def test_spec_survives_json_and_is_frozen() -> None:
    spec = PreprocessSpec(resize=None, crop=None)
    assert PreprocessSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValidationError, match="frozen"):
        spec.crop = 14  # type: ignore[misc]


def test_input_is_not_changed_and_may_be_read_only() -> None:
    image = photo(256, 256)
    before = image.copy()
    image.setflags(write=False)
    preprocess(image, REFERENCE_224)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("spec", [REFERENCE_224, REFERENCE_518, PreprocessSpec(resize=224, crop=None)])
@pytest.mark.parametrize("size", [(300, 400), (401, 299), (640, 480), (1000, 333)])
def test_crop_box_says_where_a_pixel_of_the_input_lies(size: tuple[int, int], spec: PreprocessSpec) -> None:
    """The image contains ramps along x and y, so each value of the input is the coordinate that it came from."""
    height, width = size
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = np.round(255 * x)[None, :], np.round(255 * y)[:, None]
    seen = preprocess(image, spec) * STD[:, None, None] + MEAN[:, None, None]
    left, top, box_w, box_h = crop_box(height, width, spec)
    h, w = seen.shape[1:]
    expected_x = (left + (np.arange(w) + 0.5) * box_w / w) / width
    expected_y = (top + (np.arange(h) + 0.5) * box_h / h) / height
    inner = slice(4, -4)  # the ramp ends at the border, and bicubic bends there
    np.testing.assert_allclose(seen[0, h // 2, inner], expected_x[inner], atol=1 / 255)
    np.testing.assert_allclose(seen[1, inner, w // 2], expected_y[inner], atol=1 / 255)


PAD, SQUASH = PreprocessSpec(fit="pad", resize=None), PreprocessSpec(fit="squash", resize=None)


@pytest.mark.parametrize("size", SIZES)
def test_squash_equals_the_definition(size: tuple[int, int]) -> None:
    image = photo(*size)
    resized = np.array(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)).astype(np.float64)
    expected = ((resized / 255 - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(preprocess(image, SQUASH), expected, atol=1e-6)
    assert crop_box(*size, SQUASH) == (0, 0, size[1], size[0])


@pytest.mark.parametrize("size", SIZES)
def test_pad_equals_the_definition(size: tuple[int, int]) -> None:
    """The canvas has the mean colour, and the resized image is pasted into its middle."""
    image = photo(*size)
    long = max(size)
    height, width = (max(1, int(side * 224 / long + 0.5)) for side in size)
    resized = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
    canvas = np.broadcast_to(255 * MEAN, (224, 224, 3)).copy()
    top, left = round((224 - height) / 2), round((224 - width) / 2)
    canvas[top : top + height, left : left + width] = resized
    expected = ((canvas / 255 - MEAN) / STD).transpose(2, 0, 1)
    pixels = preprocess(image, PAD)
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    assert pixels.flags.c_contiguous
    assert pixels.shape == (3, *output_size(*size, PAD))


@pytest.mark.parametrize("size", [(100, 400), (400, 100), (301, 299)])
@pytest.mark.parametrize("spec", [REFERENCE_224, PAD, SQUASH])
def test_crop_box_maps_the_input_back_to_the_image(size: tuple[int, int], spec: PreprocessSpec) -> None:
    """The columns of the image are a ramp, so the value of a pixel of the input tells where it was in the image."""
    ramp = np.broadcast_to(np.linspace(0, 255, size[1])[None, :, None], (*size, 3)).astype(np.uint8)
    x, _, width, _ = crop_box(*size, spec)
    row = preprocess(ramp, spec)[0, 112] * STD[0] + MEAN[0]
    for column in (60, 112, 160):
        at = x + (column + 0.5) * width / 224
        if 2 < at < size[1] - 2:
            assert float(row[column]) * (size[1] - 1) == pytest.approx(at - 0.5, abs=0.01 * size[1] + 1)
    if spec is PAD:
        assert x <= 0
        assert x + width >= size[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fit": "pad", "resize": 256}, "resize=256 has no effect with fit=pad: crop sets the size of the input"),
        ({"fit": "squash", "resize": None, "crop": None}, "fit=squash needs crop, the side of the square input"),
        ({"fit": "stretch"}, "fit='stretch': must be 'crop', 'pad' or 'squash'"),
        ({"resize": None}, "crop=224 needs resize, the short side to crop from"),
    ],
)
def test_a_fit_that_makes_no_sense_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        read_spec(values)


def test_the_default_fit_is_not_serialised() -> None:
    """The serialised spec is part of the fingerprint, which must stay the same for existing artifacts."""
    assert "fit" not in PreprocessSpec().model_dump()
    assert "fit" not in json.loads(PreprocessSpec().model_dump_json())
    assert PAD.model_dump()["fit"] == "pad"
    assert read_spec(PAD.model_dump(mode="json")) == PAD


def test_another_fit_needs_no_resize() -> None:
    assert changed_spec(PreprocessSpec(), fit="pad") == PAD
    assert changed_spec(PreprocessSpec(), fit="squash", crop=518) == PreprocessSpec(fit="squash", resize=None, crop=518)
    assert changed_spec(PreprocessSpec(), resize=300) == PreprocessSpec(resize=300)
    assert changed_spec(PAD) == PAD
    with pytest.raises(ValueError, match=r"^resize=256 has no effect with fit=pad"):
        changed_spec(PreprocessSpec(), fit="pad", resize=256)
