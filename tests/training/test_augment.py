"""Every batched operation against a plain definition on one image: Pillow's or a formula in a loop."""

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from model.preprocess import PreprocessSpec, preprocess
from training.augment import (
    Jitter,
    View,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    adjust_white_balance,
    augmented_views,
    color_jitter,
    crop_resize,
    gaussian_blur,
    grayscale,
    normalize,
    sample_boxes,
    solarize,
)

ONE_LEVEL = 1.01 / 255  # Pillow works on bytes


@pytest.fixture
def photos():
    rng = np.random.default_rng(0)
    smooth = [Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((48, 48)) for _ in range(3)]
    return np.stack([np.asarray(photo) for photo in smooth])  # uint8 [3, 48, 48, 3]


def to_tensor(photos):
    return torch.from_numpy(photos).permute(0, 3, 1, 2).float() / 255


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [12, 31, 70])
def test_crop_is_pillows_resize_with_a_box(photos, size):
    boxes = torch.tensor([[[0.1, 0.2, 0.5, 0.6], [0.0, 0.0, 1.0, 1.0], [0.33, 0.05, 0.21, 0.9]]])
    flips = torch.tensor([[False, True, False]])
    crops = crop_resize(to_tensor(photos), boxes, size, flips)
    assert crops.shape == (1, 3, 3, size, size)
    for photo, box, flip, crop in zip(photos, boxes[0], flips[0], crops[0], strict=True):
        top, left, height, width = (48 * box).tolist()
        pillow_box = (left, top, min(48.0, left + width), min(48.0, top + height))
        expected = Image.fromarray(photo).resize((size, size), Image.Resampling.BILINEAR, box=pillow_box)
        expected = ImageOps.mirror(expected) if flip else expected
        difference = crop.permute(1, 2, 0).numpy() - np.asarray(expected, np.float32) / 255
        assert np.abs(difference).max() < 2 * ONE_LEVEL  # Pillow rounds after each of its two passes


def test_boxes_keep_area_and_aspect_in_the_photos_own_pixels():
    aspect = torch.tensor([0.5, 1.0, 2.0]).repeat(2000)
    top, left, height, width = sample_boxes(aspect, (0.1, 0.4), gen()).unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 1 + 1e-6).all()
    assert (left + width <= 1 + 1e-6).all()
    area = height * width
    assert area.min() >= 0.1 - 1e-5
    assert area.max() <= 0.4 + 1e-5
    assert abs(float(area.mean()) - 0.25) < 0.01
    ratio = width * aspect / height
    assert ratio.min() >= 0.75 - 1e-4
    assert ratio.max() <= 4 / 3 + 1e-4
    assert abs(float(ratio.log().mean())) < 0.01


def test_a_photo_that_no_box_fits_gets_its_largest_centred_one():
    boxes = sample_boxes(torch.tensor([10.0, 0.1]), (1.0, 1.0), gen())
    torch.testing.assert_close(boxes[0], torch.tensor([0.0, (1 - 4 / 30) / 2, 1.0, 4 / 30]))
    torch.testing.assert_close(boxes[1], torch.tensor([(1 - 4 / 30) / 2, 0.0, 4 / 30, 1.0]))


def luma(pixel):
    return 0.2989 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]


def per_pixel(images, function):
    """Apply `function(rgb, image index)` to every pixel, slowly."""
    out = torch.empty_like(images)
    for i, image in enumerate(images):
        for y in range(image.shape[1]):
            for x in range(image.shape[2]):
                out[i, :, y, x] = torch.tensor(function(image[:, y, x].tolist(), i))
    return out


def clip(value):
    return min(1.0, max(0.0, value))


def test_brightness_contrast_saturation_are_their_definitions(photos):
    images, factors = to_tensor(photos)[:, :, ::4, ::4], torch.tensor([0.6, 1.0, 1.4])
    f = factors.tolist()
    means = [sum(luma(p) for p in im.flatten(1).T.tolist()) / im[0].numel() for im in images]

    def blended(pixel, other, i):
        return [clip(f[i] * v + (1 - f[i]) * other) for v in pixel]

    expected = per_pixel(images, lambda pixel, i: [clip(f[i] * v) for v in pixel])
    torch.testing.assert_close(adjust_brightness(images, factors), expected)
    expected = per_pixel(images, lambda pixel, i: blended(pixel, means[i], i))
    torch.testing.assert_close(adjust_contrast(images, factors), expected)
    expected = per_pixel(images, lambda pixel, i: blended(pixel, luma(pixel), i))
    torch.testing.assert_close(adjust_saturation(images, factors), expected)
    gray = per_pixel(images, lambda pixel, i: [luma(pixel)] * 3)
    torch.testing.assert_close(grayscale(images).expand_as(images), gray)


def test_white_balance_is_a_gain_per_channel(photos):
    images = to_tensor(photos)[:, :, ::4, ::4]
    gains = torch.tensor([[1.2, 1.0, 0.8], [1.0, 1.0, 1.0], [0.5, 1.1, 3.0]])

    def lit(pixel, i):
        return [min(1.0, value * gain) for value, gain in zip(pixel, gains[i].tolist(), strict=True)]

    torch.testing.assert_close(adjust_white_balance(images, gains), per_pixel(images, lit), atol=1e-6, rtol=0)
    only = Jitter(white_balance=0.2, brightness=0, contrast=0, saturation=0, hue=0, probability=1.0, gray=0.0)
    ratio = color_jitter(torch.full((64, 3, 2, 2), 0.5), only, gen())[:, :, 0, 0] / 0.5
    assert 0.8 <= ratio.min() < 0.85
    assert 1.15 < ratio.max() <= 1.2
    assert (ratio[:, 0] - ratio[:, 1]).abs().max() > 0.1  # the channels are drawn apart


def test_hue_is_colorsys(photos):
    images, shifts = to_tensor(photos)[:, :, ::4, ::4], torch.tensor([-0.4, 0.0, 0.13])

    def turned(pixel, i):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb((h + shifts[i].item()) % 1, s, v)

    torch.testing.assert_close(adjust_hue(images, shifts), per_pixel(images, turned), atol=1e-5, rtol=0)
    flat = torch.full((1, 3, 2, 2), 0.5)
    torch.testing.assert_close(adjust_hue(flat, torch.tensor([0.3])), flat)


def test_blur_is_a_nine_tap_gaussian_with_reflected_edges(photos):
    images, sigmas = to_tensor(photos)[:, :, :12, :12], torch.tensor([0.0, 0.5, 2.0])
    blurred = gaussian_blur(images, sigmas)
    torch.testing.assert_close(blurred[0], images[0])
    for image, sigma, ours in zip(images[1:], sigmas[1:].tolist(), blurred[1:], strict=True):
        taps = [math.exp(-0.5 * (d / sigma) ** 2) for d in range(-4, 5)]
        kernel = np.outer(taps, taps) / sum(taps) ** 2
        padded = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
        expected = np.array(
            [
                [[(channel[y : y + 9, x : x + 9] * kernel).sum() for x in range(12)] for y in range(12)]
                for channel in padded
            ]
        )
        np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


def test_solarize_is_pillows(photos):
    chosen = torch.tensor([True, False, True])
    ours = solarize(to_tensor(photos), chosen)
    for photo, yes, image in zip(photos, chosen, ours, strict=True):
        expected = np.asarray(ImageOps.solarize(Image.fromarray(photo), 128)) if yes else photo
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy() * 255, expected, atol=1e-3)


def test_normalisation_is_the_servings(photos):
    spec = PreprocessSpec(resize=48, crop=42)
    np.testing.assert_allclose(normalize(to_tensor(photos))[0, :, 3:45, 3:45], preprocess(photos[0], spec), atol=1e-5)


def test_unchosen_images_pass_the_jitter_unchanged(photos):
    images = to_tensor(photos)
    never = Jitter(probability=0.0, gray=0.0)
    torch.testing.assert_close(color_jitter(images, never, gen()), images, atol=1e-5, rtol=0)
    always = color_jitter(images, Jitter(probability=1.0, gray=0.0), gen())
    assert all((a - b).abs().max() > 0.01 for a, b in zip(always, images, strict=True))
    gray = color_jitter(images, Jitter(probability=0.0, gray=1.0), gen())
    torch.testing.assert_close(gray[:, 0], gray[:, 2])


def test_views_depend_on_the_generator_alone(photos):
    images, aspect = to_tensor(photos), torch.tensor([1.0, 0.7, 1.5])
    view = View(28, (0.3, 1.0), blur=0.5, solarize=0.2)

    def draw(seed):
        return augmented_views(images, aspect, view, 4, Jitter(), gen(seed))

    torch.manual_seed(0)
    first = draw(1)
    torch.manual_seed(1)
    assert first.shape == (12, 3, 28, 28)
    assert torch.isfinite(first).all()
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))
