"""Every batched operation against a plain definition on one image: Pillow's or a formula in a loop."""

import colorsys
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from model.preprocess import PreprocessSpec, preprocess
from training.data import augment
from training.data.augment import (
    BRIGHTNESS,
    CONTRAST,
    SATURATION,
    Jitter,
    View,
    adjust_hue_,
    adjust_white_balance_,
    augmented_views,
    blend_,
    change_colors_,
    crop_resize,
    draw_views,
    gaussian_blur,
    grayscale,
    normalize,
    sample_boxes,
    solarize,
    window_sides,
)
from training.randomness import SampleRandom, sample_keys

ONE_LEVEL = 1.01 / 255  # Pillow works on bytes


@pytest.fixture
def photos():
    rng = np.random.default_rng(0)
    smooth = [Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((48, 48)) for _ in range(3)]
    return np.stack([np.asarray(photo) for photo in smooth])  # uint8 [3, 48, 48, 3]


def to_tensor(photos):
    return torch.from_numpy(photos).permute(0, 3, 1, 2).float() / 255


def keyed(n, seed=0):
    return SampleRandom(sample_keys(seed, 0, torch.arange(n)))


@pytest.mark.parametrize("size", [12, 31, 70])
@pytest.mark.parametrize("side", [48, 144])  # the larger ones are cut out of the image first
def test_crop_is_pillows_resize_with_a_box(photos, size, side):
    photos = np.stack([np.asarray(Image.fromarray(photo).resize((side, side))) for photo in photos])
    boxes = torch.tensor(
        [
            [0.1, 0.2, 0.2, 0.3],
            [0.0, 0.0, 1.0, 1.0],
            [0.33, 0.05, 0.21, 0.9],
            [0.0, 0.8, 0.2, 0.2],
            [0.9, 0.5, 0.1, 0.1],
        ]
    )
    flips = torch.tensor([False, True, False, True, True])
    which = torch.tensor([0, 1, 2, 2, 0])
    images = torch.from_numpy(photos).permute(0, 3, 1, 2).contiguous()
    windows = window_sides(boxes, side, size)
    assert (windows <= side).all()
    assert side == 48 or windows.min() < side
    for i in range(len(boxes)):
        (crop,) = crop_resize(images, which[[i]], boxes[[i]], size, flips[[i]], int(windows[i]))
        assert crop.shape == (3, size, size)
        top, left, height, width = (side * boxes[i]).tolist()
        pillow_box = (left, top, min(float(side), left + width), min(float(side), top + height))
        photo = Image.fromarray(photos[which[i]])
        expected = photo.resize((size, size), Image.Resampling.BILINEAR, box=pillow_box)
        expected = ImageOps.mirror(expected) if flips[i] else expected
        difference = crop.permute(1, 2, 0).numpy() - np.asarray(expected, np.float32) / 255
        assert np.abs(difference).max() < 2 * ONE_LEVEL  # Pillow rounds after each of its two passes


def test_a_window_changes_nothing():
    images = torch.randint(0, 256, (4, 3, 160, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = sample_boxes(torch.tensor([0.4, 1.0, 1.7, 1.0]).repeat(50), (0.01, 1.0), keyed(200))
    which, flips = torch.arange(200) % 4, torch.arange(200) % 3 == 0
    windows = window_sides(boxes, 160, 21)
    assert len(windows.unique()) > 3
    whole = crop_resize(images, which, boxes, 21, flips, 160)
    for window in windows.unique().tolist():
        chosen = windows == window
        cut = crop_resize(images, which[chosen], boxes[chosen], 21, flips[chosen], window)
        torch.testing.assert_close(cut, whole[chosen], atol=2e-5, rtol=0)


def test_boxes_keep_area_and_aspect_in_the_photos_own_pixels():
    aspect = torch.tensor([0.5, 1.0, 2.0]).repeat(2000)
    top, left, height, width = sample_boxes(aspect, (0.1, 0.4), keyed(6000)).unbind(1)
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
    assert ratio.min() < 0.755  # the whole range is used
    assert ratio.max() > 1.325


def test_boxes_lie_anywhere_and_their_two_places_are_drawn_apart():
    top, left, height, width = sample_boxes(torch.ones(6000), (0.1, 0.4), keyed(6000)).unbind(1)
    across, down = left / (1 - width), top / (1 - height)  # 0 to 1 of the room that there is
    for place in (across, down):
        assert place.min() < 0.01
        assert place.max() > 0.99
        assert float(place.var()) == pytest.approx(1 / 12, abs=0.003)
    assert abs(float(torch.corrcoef(torch.stack((across, down)))[0, 1])) < 0.05


def test_an_image_gets_ten_attempts_at_a_box():
    # Of the log ratios, uniform up to log(4 / 3), those up to log(1 / area) fit.
    boxes = sample_boxes(torch.ones(6000), (0.9, 0.9), keyed(6000))
    fallback = (boxes == torch.tensor([0.0, 0.0, 1.0, 1.0])).all(dim=1).float().mean()
    expected = (1 - math.log(1 / 0.9) / math.log(4 / 3)) ** 10
    assert float(fallback) == pytest.approx(expected, abs=0.01)


def test_a_photo_that_no_box_fits_gets_its_largest_centred_one():
    boxes = sample_boxes(torch.tensor([10.0, 0.1]), (1.0, 1.0), keyed(2))
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


def recolor(images, jitter, seed=0):
    n = len(images)
    draws = draw_views(torch.ones(n), View(8, (0.5, 1.0)), jitter, keyed(n, seed))
    return change_colors_(images.clone(), draws, torch.arange(n))


def test_brightness_contrast_saturation_are_their_definitions(photos):
    images, factors = to_tensor(photos)[:, :, ::4, ::4], torch.tensor([0.6, 1.0, 1.4])
    f = factors.tolist()
    means = [sum(luma(p) for p in im.flatten(1).T.tolist()) / im[0].numel() for im in images]

    def blended(pixel, other, i):
        return [clip(f[i] * v + (1 - f[i]) * other) for v in pixel]

    expected = {
        BRIGHTNESS: per_pixel(images, lambda pixel, i: [clip(f[i] * v) for v in pixel]),
        CONTRAST: per_pixel(images, lambda pixel, i: blended(pixel, means[i], i)),
        SATURATION: per_pixel(images, lambda pixel, i: blended(pixel, luma(pixel), i)),
    }
    for kind, answer in expected.items():
        torch.testing.assert_close(blend_(images.clone(), torch.tensor([kind] * 3), factors), answer)
    for kinds in itertools.permutations(expected):  # each image another kind, in one call
        answer = torch.stack([expected[kind][i] for i, kind in enumerate(kinds)])
        torch.testing.assert_close(blend_(images.clone(), torch.tensor(kinds), factors), answer)
    neutral = blend_(images.clone(), torch.tensor([BRIGHTNESS, CONTRAST, SATURATION]), torch.tensor([1.0, 1.0, 1.0]))
    assert torch.equal(neutral, images)
    gray = per_pixel(images, lambda pixel, i: [luma(pixel)] * 3)
    torch.testing.assert_close(grayscale(images).expand_as(images), gray)


def test_white_balance_is_a_gain_per_channel(photos):
    images = to_tensor(photos)[:, :, ::4, ::4]
    gains = torch.tensor([[1.2, 1.0, 0.8], [1.0, 1.0, 1.0], [0.5, 1.1, 3.0]])

    def lit(pixel, i):
        return [min(1.0, value * gain) for value, gain in zip(pixel, gains[i].tolist(), strict=True)]

    ours = adjust_white_balance_(images.clone(), gains)
    torch.testing.assert_close(ours, per_pixel(images, lit), atol=1e-6, rtol=0)
    only = Jitter(white_balance=0.2, brightness=0, contrast=0, saturation=0, hue=0, probability=1.0, gray=0.0)
    ratio = recolor(torch.full((64, 3, 2, 2), 0.5), only)[:, :, 0, 0] / 0.5
    assert 0.8 <= ratio.min() < 0.85
    assert 1.15 < ratio.max() <= 1.2
    assert (ratio[:, 0] - ratio[:, 1]).abs().max() > 0.1  # the channels are drawn apart


def test_hue_is_colorsys(photos):
    images, shifts = to_tensor(photos)[:, :, ::4, ::4], torch.tensor([-0.5, 0.0, 0.13])
    images[0, :, 0, :6] = torch.tensor(  # ties of two channels, black, white
        [[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1], [0.2, 0.7, 0.7]]
    ).T

    def turned(pixel, i):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb((h + shifts[i].item()) % 1, s, v)

    torch.testing.assert_close(adjust_hue_(images.clone(), shifts), per_pixel(images, turned), atol=1e-5, rtol=0)
    flat = torch.full((1, 3, 2, 2), 0.5)
    torch.testing.assert_close(adjust_hue_(flat.clone(), torch.tensor([0.3])), flat)


@pytest.mark.parametrize("taps_from", [0, 100])  # tap by tap, and by matrices
def test_blur_is_a_nine_tap_gaussian_with_reflected_edges(photos, taps_from, monkeypatch):
    monkeypatch.setattr(augment, "TAPS_FROM_SIDE", taps_from)
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
    for photo, image in zip(photos, solarize(to_tensor(photos)), strict=True):
        expected = np.asarray(ImageOps.solarize(Image.fromarray(photo), 128))
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy() * 255, expected, atol=1e-3)


def test_normalisation_is_the_servings(photos):
    spec = PreprocessSpec(resize=48, crop=42)
    images = to_tensor(photos)
    np.testing.assert_allclose(normalize(images)[0, :, 3:45, 3:45], preprocess(photos[0], spec), atol=1e-5)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    torch.testing.assert_close(normalize(images) * std + mean, images, atol=1e-6, rtol=0)
    torch.testing.assert_close(normalize(images)[0] * std + mean, images[0], atol=1e-6, rtol=0)


def test_unchosen_images_pass_the_jitter_unchanged(photos):
    images = to_tensor(photos)
    assert torch.equal(recolor(images, Jitter(probability=0.0, gray=0.0)), images)
    always = recolor(images, Jitter(probability=1.0, gray=0.0))
    assert all((a - b).abs().max() > 0.01 for a, b in zip(always, images, strict=True))
    gray = recolor(images, Jitter(probability=0.0, gray=1.0))
    torch.testing.assert_close(gray, grayscale(images).expand_as(images))


ALL = View(28, (0.3, 1.0), blur=0.5, solarize=0.2)


def test_the_draws_have_the_shares_and_ranges_asked_for():
    n = 6000
    jitter = Jitter(white_balance=0.3)
    draws = draw_views(torch.ones(n), ALL, jitter, keyed(n))

    def share(chosen):
        return float(chosen.float().mean())

    jittered = draws.hue_round >= 0
    assert share(jittered) == pytest.approx(0.8, abs=0.02)
    assert share(draws.flips) == pytest.approx(0.5, abs=0.02)
    assert share(draws.gray) == pytest.approx(0.2, abs=0.02)
    assert share(draws.solarize) == pytest.approx(0.2, abs=0.02)
    assert share(draws.sigma > 0) == pytest.approx(0.5, abs=0.02)
    assert draws.sigma[draws.sigma > 0].min() >= 0.1
    assert draws.sigma.max() < 2
    blurred = draws.sigma[draws.sigma > 0]
    assert blurred.min() < 0.11
    assert blurred.max() > 1.99
    assert float(blurred.mean()) == pytest.approx((0.1 + 2.0) / 2, abs=0.04)
    assert float(blurred.std()) == pytest.approx(1.9 / 12**0.5, abs=0.02)
    for chosen in (draws.flips, draws.gray, draws.solarize, draws.sigma > 0):  # each apart from the jitter
        assert share(chosen[jittered]) == pytest.approx(share(chosen), abs=0.02)
    assert (draws.factors[~jittered] == 1).all()
    assert (draws.gains[~jittered] == 1).all()
    strength = torch.tensor([0.4, 0.4, 0.2])[draws.blends]
    change = ((draws.factors - 1) / strength)[jittered]
    assert change.abs().max() <= 1.001
    assert float(change.mean()) == pytest.approx(0, abs=0.02)
    assert float(change.var()) == pytest.approx(1 / 3, abs=0.02)
    assert draws.hue[jittered].abs().max() <= 0.1
    assert float(draws.hue[jittered].std()) == pytest.approx(0.2 / 12**0.5, abs=0.002)
    # brightness, contrast, saturation (0 to 2) and hue (3) come in each of their 24 orders equally often
    orders = Counter()
    for blends, turn in zip(draws.blends[jittered].tolist(), draws.hue_round[jittered].tolist(), strict=True):
        orders[(*blends[:turn], 3, *blends[turn:])] += 1
    assert set(orders) == set(itertools.permutations(range(4)))
    assert sum((count - 200) ** 2 / 200 for count in orders.values()) < 60  # chi-square, 23 degrees of freedom


def test_leaving_one_operation_out_moves_no_other():
    full = draw_views(torch.ones(50), ALL, Jitter(), keyed(50))
    less = draw_views(torch.ones(50), View(28, (0.3, 1.0)), Jitter(hue=0.0, gray=0.0), keyed(50))
    for name in ("boxes", "flips", "blends", "factors"):
        assert torch.equal(getattr(full, name), getattr(less, name))
    assert not less.sigma.any()
    assert not less.solarize.any()
    assert not less.gray.any()


def plain_view(image, draws, i, size):
    """One crop by the definitions above, one image and one operation at a time."""
    one = torch.tensor([i])
    crop = crop_resize(image[None], torch.tensor([0]), draws.boxes[one], size, draws.flips[one], image.shape[-1])
    crop = adjust_white_balance_(crop, draws.gains[one])
    for turn in range(4):
        if draws.hue_round[i] == turn:
            crop = adjust_hue_(crop, draws.hue[one])
        if turn < 3:
            crop = blend_(crop, draws.blends[one, turn], draws.factors[one, turn])
    crop = grayscale(crop).expand_as(crop) if draws.gray[i] else crop
    crop = gaussian_blur(crop, draws.sigma[one])
    crop = solarize(crop) if draws.solarize[i] else crop
    return normalize(crop)[0]


@pytest.mark.parametrize("chunk", [1, 3 * 64**2 * 5, 2**21])
def test_views_are_the_operations_on_one_photo_at_a_time(photos, chunk, monkeypatch):
    monkeypatch.setattr(augment, "CPU_CHUNK", chunk)
    images = torch.nn.functional.interpolate(to_tensor(photos), 100, mode="bilinear").mul(255).byte()
    aspect, jitter, random = torch.tensor([1.0, 0.7, 1.5]), Jitter(white_balance=0.1, hue=0.3), keyed(3)
    view = View(28, (0.05, 1.0), blur=0.5, solarize=0.4)
    views = augmented_views(images, aspect, view, 8, jitter, random)
    assert views.shape == (24, 3, 28, 28)
    draws = draw_views(aspect.repeat(8), view, jitter, random.views(8))
    assert len(window_sides(draws.boxes, 100, 28).unique()) > 1
    expected = torch.stack([plain_view(images[i % 3], draws, i, 28) for i in range(24)])
    torch.testing.assert_close(views, expected, atol=1e-4, rtol=0)


def test_views_depend_on_the_photos_key_alone(photos):
    images, aspect = torch.from_numpy(photos).permute(0, 3, 1, 2).contiguous(), torch.tensor([1.0, 0.7, 1.5])
    images, aspect = images.repeat(3, 1, 1, 1), aspect.repeat(3)

    def draw(seed, which):
        keys = sample_keys(seed, 7, torch.tensor(which))
        views = augmented_views(images[which], aspect[which], ALL, 4, Jitter(), SampleRandom(keys))
        return views.unflatten(0, (4, len(which)))

    torch.manual_seed(0)
    whole = draw(1, list(range(9)))
    torch.manual_seed(1)
    assert torch.isfinite(whole).all()
    assert torch.equal(whole, draw(1, list(range(9))))
    assert (whole - draw(2, list(range(9)))).abs().amax(dim=(0, 2, 3, 4)).min() > 0.1
    for split in ([[0, 1, 2, 3], [4, 5, 6, 7, 8]], [[i] for i in range(9)], [[8, 0, 4], [7, 6, 5, 3, 2, 1]]):
        for part in split:
            torch.testing.assert_close(draw(1, part), whole[:, part], atol=1e-5, rtol=0)
    repeated = draw(1, [0, 3])  # the same image at two positions is cropped twice
    assert (repeated[:, 0] - repeated[:, 1]).abs().max() > 0.1
