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
    Geometry,
    Jitter,
    View,
    adjust_hue_,
    adjust_white_balance_,
    augmented_views,
    blend_,
    change_colors_,
    draw_views,
    gaussian_blur,
    grayscale,
    normalize,
    solarize,
)
from training.data.boxes import crop_resize, window_sides
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
    draws = draw_views(torch.ones(n), View(8, (0.5, 1.0)), jitter, Geometry(), keyed(n, seed))
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
TURNED = Geometry(vertical_flip=0.5, quarter_turns=0.75)


def test_the_draws_have_the_shares_and_ranges_asked_for():
    n = 6000
    jitter = Jitter(white_balance=0.3)
    draws = draw_views(torch.ones(n), ALL, jitter, Geometry(), keyed(n))

    def share(chosen):
        return float(chosen.float().mean())

    jittered = draws.hue_round >= 0
    assert share(jittered) == pytest.approx(0.8, abs=0.02)
    assert share(draws.flips[:, 1]) == pytest.approx(0.5, abs=0.02)
    assert not draws.flips[:, 0].any()
    assert not draws.transposed.any()
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
    for chosen in (draws.flips[:, 1], draws.gray, draws.solarize, draws.sigma > 0):  # each apart from the jitter
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
    full = draw_views(torch.ones(50), ALL, Jitter(), Geometry(), keyed(50))
    less = draw_views(torch.ones(50), View(28, (0.3, 1.0)), Jitter(hue=0.0, gray=0.0), Geometry(), keyed(50))
    for name in ("boxes", "flips", "blends", "factors"):
        assert torch.equal(getattr(full, name), getattr(less, name))
    assert not less.sigma.any()
    assert not less.solarize.any()
    assert not less.gray.any()


def test_the_draws_of_the_default_settings_stay_those_of_earlier_versions():
    """A run resumed with a newer version gets the same crops. The numbers were printed before crops could be turned."""
    keys = sample_keys(3, 7, torch.arange(4))
    draws = draw_views(
        torch.tensor([1.0, 0.7, 1.5, 1.0]), View(28, (0.05, 0.32)), Jitter(), Geometry(), SampleRandom(keys)
    )
    boxes = [
        [0.07154609, 0.48557293, 0.30931023, 0.37437496],
        [0.50810236, 0.01575106, 0.36950925, 0.45193604],
        [0.28833941, 0.22070991, 0.44756240, 0.25940087],
        [0.06108292, 0.38617644, 0.48919585, 0.48227257],
    ]
    factors = [
        [0.68234342, 1.39556146, 1.05116248],
        [0.78506505, 0.93554688, 1.11801696],
        [1.0, 1.0, 1.0],
        [0.92442310, 0.99442583, 1.22564292],
    ]
    torch.testing.assert_close(draws.boxes, torch.tensor(boxes), atol=1e-7, rtol=0)
    torch.testing.assert_close(draws.factors, torch.tensor(factors), atol=1e-7, rtol=0)
    assert draws.flips.tolist() == [[False, True]] * 4
    assert not draws.transposed.any()


PLAIN = Jitter(probability=0.0, gray=0.0)


def views_of(photos, geometry):
    """Eight views of each image without changes of colour, [24, 3, 12, 12]."""
    images = torch.from_numpy(photos).permute(0, 3, 1, 2).contiguous()
    return augmented_views(images, torch.ones(3), View(12, (0.2, 0.9)), 8, PLAIN, geometry, keyed(3))


def test_flips_and_turns_are_those_of_torch(photos):
    plain = views_of(photos, Geometry(0.0))
    torch.testing.assert_close(views_of(photos, Geometry(1.0)), plain.flip(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(views_of(photos, Geometry(0.0, 1.0)), plain.flip(2), atol=1e-5, rtol=0)
    turned, all_changes = views_of(photos, Geometry(0.0, 0.0, 1.0)), views_of(photos, Geometry(1.0, 1.0, 1.0))
    quarters = []
    for i in range(24):
        distance = [float((turned[i] - plain[i].rot90(k, (1, 2))).abs().max()) for k in range(4)]
        quarters.append(int(np.argmin(distance)))
        assert min(distance) < 1e-5
        expected = plain[i].flip((1, 2)).rot90(quarters[i], (1, 2))
        torch.testing.assert_close(all_changes[i], expected, atol=1e-5, rtol=0)
    assert set(quarters) == {1, 2, 3}
    for i in range(3):  # the views of an image are turned independently
        assert len(set(quarters[i::3])) > 1


def test_flips_and_turns_have_the_shares_asked_for():
    n = 6000
    draws = draw_views(torch.ones(n), ALL, Jitter(), Geometry(0.3, 0.2, 0.6), keyed(n))
    shares = Counter(zip(*draws.flips.T.tolist(), draws.transposed.tolist(), strict=True))
    turns = {0: 0.4, 1: 0.2, 2: 0.2, 3: 0.2}
    expected = Counter()
    for horizontal, vertical, turn in itertools.product((False, True), (False, True), turns):
        share = (0.3 if horizontal else 0.7) * (0.2 if vertical else 0.8) * turns[turn]
        expected[vertical ^ (turn >= 2), horizontal ^ (turn in (1, 2)), turn % 2 == 1] += share
    for outcome in itertools.product((False, True), repeat=3):
        assert shares[outcome] / n == pytest.approx(expected[outcome], abs=0.02)
    none = draw_views(torch.ones(n), ALL, Jitter(), Geometry(0.0), keyed(n))
    assert not none.flips.any()
    assert not none.transposed.any()


STILL = torch.zeros(1, 2, dtype=torch.bool)


def plain_view(image, draws, i, size, kernel):
    """One crop by the definitions above, one image and one operation at a time."""
    one = torch.tensor([i])
    crop = crop_resize(image[None], torch.tensor([0]), draws.boxes[one], size, STILL, image.shape[-1], kernel)
    crop = crop.flip([2 + axis for axis in range(2) if draws.flips[i, axis]])
    crop = crop.transpose(2, 3).contiguous() if draws.transposed[i] else crop
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
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_views_are_the_operations_on_one_photo_at_a_time(photos, chunk, kernel, monkeypatch):
    monkeypatch.setattr(augment, "CPU_CHUNK", chunk)
    images = torch.nn.functional.interpolate(to_tensor(photos), 100, mode="bilinear").mul(255).byte()
    aspect, jitter, random = torch.tensor([1.0, 0.7, 1.5]), Jitter(white_balance=0.1, hue=0.3), keyed(3)
    view = View(28, (0.05, 1.0), blur=0.5, solarize=0.4, filter=kernel)
    geometry = Geometry(vertical_flip=0.4, quarter_turns=0.6)
    views = augmented_views(images, aspect, view, 8, jitter, geometry, random)
    assert views.shape == (24, 3, 28, 28)
    draws = draw_views(aspect.repeat(8), view, jitter, geometry, random.views(8))
    assert len(window_sides(draws.boxes, 100, 28, kernel).unique()) > 1
    assert 0 < int(draws.transposed.sum()) < 24
    expected = torch.stack([plain_view(images[i % 3], draws, i, 28, kernel) for i in range(24)])
    torch.testing.assert_close(views, expected, atol=1e-4, rtol=0)


def test_views_depend_on_the_photos_key_alone(photos):
    images, aspect = torch.from_numpy(photos).permute(0, 3, 1, 2).contiguous(), torch.tensor([1.0, 0.7, 1.5])
    images, aspect = images.repeat(3, 1, 1, 1), aspect.repeat(3)

    def draw(seed, which):
        keys = sample_keys(seed, 7, torch.tensor(which))
        views = augmented_views(images[which], aspect[which], ALL, 4, Jitter(), TURNED, SampleRandom(keys))
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
