"""Boxes by their distribution, and crops by Pillow's `resize` with a box."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from training.data.augment import View
from training.data.boxes import crop_resize, resize_weights, sample_boxes, window_sides
from training.data.crops import least_cache_side
from training.randomness import SampleRandom, sample_keys

ONE_LEVEL = 1.01 / 255  # Pillow works on bytes
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    smooth = [Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((48, 48)) for _ in range(3)]
    return np.stack([np.asarray(image) for image in smooth])  # uint8 [3, 48, 48, 3]


def keyed(n, seed=0):
    return SampleRandom(sample_keys(seed, 0, torch.arange(n)))


BOXES = torch.tensor(
    [
        [0.1, 0.2, 0.2, 0.3],
        [0.0, 0.0, 1.0, 1.0],
        [0.33, 0.05, 0.21, 0.9],
        [0.0, 0.8, 0.2, 0.2],
        [0.9, 0.5, 0.1, 0.1],
    ]
)


def pillow_box(box, side):
    """A box (top, left, height, width) in shares of the sides as Pillow's (left, upper, right, lower) in pixels."""
    top, left, height, width = (side * box).tolist()
    return (left, top, min(float(side), left + width), min(float(side), top + height))


@pytest.mark.parametrize("size", [12, 31, 70])
@pytest.mark.parametrize("side", [48, 144])  # the larger ones are cut out of the image first
@pytest.mark.parametrize("kernel", FILTERS)
def test_crop_is_pillows_resize_with_a_box(images, size, side, kernel):
    images = np.stack([np.asarray(Image.fromarray(image).resize((side, side))) for image in images])
    flips = torch.tensor([[False, False], [False, True], [True, False], [True, True], [False, True]])
    which = torch.tensor([0, 1, 2, 2, 0])
    squares = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    windows = window_sides(BOXES, side, size, kernel)
    assert (windows <= side).all()
    assert side == 48 or windows.min() < side
    for i in range(len(BOXES)):
        (crop,) = crop_resize(squares, which[[i]], BOXES[[i]], size, flips[[i]], int(windows[i]), kernel)
        assert crop.shape == (3, size, size)
        image = Image.fromarray(images[which[i]])
        expected = image.resize((size, size), FILTERS[kernel], box=pillow_box(BOXES[i], side))
        expected = ImageOps.flip(expected) if flips[i, 0] else expected
        expected = ImageOps.mirror(expected) if flips[i, 1] else expected
        difference = crop.permute(1, 2, 0).numpy() - np.asarray(expected, np.float32) / 255
        assert np.abs(difference).max() < 2 * ONE_LEVEL  # Pillow rounds after each of its two passes


@pytest.mark.parametrize("size", [12, 31, 70])
@pytest.mark.parametrize("kernel", FILTERS)
def test_weights_are_pillows_before_it_rounds(size, kernel):
    """Pillow does not round images of floats. Noise shows each weight."""
    noise = np.random.default_rng(0).random((40, 60), np.float32)
    for top, left, height, width in ([0, 0, 40, 60], [3.3, 7.7, 30.1, 21.9], [30, 50, 10, 10], [12.5, 0, 3, 60]):
        rows = resize_weights(torch.tensor([top]), torch.tensor([height]), 40, size, kernel)[0]
        columns = resize_weights(torch.tensor([left]), torch.tensor([width]), 60, size, kernel)[0]
        ours = rows @ torch.from_numpy(noise) @ columns.T
        box = (left, top, left + width, top + height)
        expected = np.asarray(Image.fromarray(noise).resize((size, size), FILTERS[kernel], box=box))
        np.testing.assert_allclose(ours.numpy(), expected, atol=2e-5)
        mirrored = resize_weights(torch.tensor([left + width]), torch.tensor([-width]), 60, size, kernel)[0]
        torch.testing.assert_close(mirrored, columns.flip(0), atol=1e-5, rtol=0)


def test_bicubic_crops_are_clipped_as_pillow_clips_bytes():
    edge = np.zeros((24, 24, 3), np.uint8)
    edge[:, 12:] = 255  # the filter makes values below 0 and above 1 beside the edge
    box = torch.tensor([[0.25, 0.25, 0.5, 0.5]])
    still = torch.zeros(1, 2, dtype=torch.bool)
    (crop,) = crop_resize(
        torch.from_numpy(edge).permute(2, 0, 1)[None], torch.tensor([0]), box, 48, still, 24, "bicubic"
    )
    expected = Image.fromarray(edge).resize((48, 48), Image.Resampling.BICUBIC, box=pillow_box(box[0], 24))
    assert np.abs(crop.permute(1, 2, 0).numpy() - np.asarray(expected, np.float32) / 255).max() < ONE_LEVEL
    assert float(crop.min()) == 0
    assert float(crop.max()) == 1


@pytest.mark.parametrize("kernel", FILTERS)
def test_a_window_changes_nothing(kernel):
    images = torch.randint(0, 256, (4, 3, 160, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = sample_boxes(torch.tensor([0.4, 1.0, 1.7, 1.0]).repeat(50), (0.01, 1.0), keyed(200))
    which, flips = torch.arange(200) % 4, torch.stack((torch.arange(200) % 2 == 0, torch.arange(200) % 3 == 0), dim=1)
    windows = window_sides(boxes, 160, 21, kernel)
    assert len(windows.unique()) > 3
    whole = crop_resize(images, which, boxes, 21, flips, 160, kernel)
    for window in windows.unique().tolist():
        chosen = windows == window
        cut = crop_resize(images, which[chosen], boxes[chosen], 21, flips[chosen], window, kernel)
        torch.testing.assert_close(cut, whole[chosen], atol=2e-5, rtol=0)


def test_boxes_keep_area_and_aspect_in_the_images_own_pixels():
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


def test_an_image_that_no_box_fits_gets_its_largest_centred_one():
    boxes = sample_boxes(torch.tensor([10.0, 0.1]), (1.0, 1.0), keyed(2))
    torch.testing.assert_close(boxes[0], torch.tensor([0.0, (1 - 4 / 30) / 2, 1.0, 4 / 30]))
    torch.testing.assert_close(boxes[1], torch.tensor([(1 - 4 / 30) / 2, 0.0, 4 / 30, 1.0]))


VIEWS = {
    "vits14": (View(224, (0.32, 1.0)), View(98, (0.05, 0.32))),
    "smoke": (View(56, (0.3, 1.0)), View(28, (0.1, 0.4))),
    "high resolution": (View(518, (0.32, 1.0)), View(98, (0.05, 0.32))),
}


def smallest_crops(view, width, height, side):
    """The sides in pixels of crops of the smallest area: in a square cache, and in the image itself, each [n, 2]."""
    boxes = sample_boxes(torch.full((2000,), width / height), (view.scale[0], view.scale[0]), keyed(2000))
    return boxes[:, 2:] * side, boxes[:, 2:] * torch.tensor([height, width])


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize(("width", "height"), [(6000, 4000), (4000, 6000), (3000, 3000), (500, 375), (120, 90)])
def test_no_crop_is_enlarged_more_than_a_crop_of_the_full_image(views, width, height):
    side = least_cache_side(views)
    assert side % 16 == 0
    for view in views:
        cached, full = smallest_crops(view, width, height, side)
        by_cache, by_image = (view.size / pixels for pixels in (cached, full))  # enlargement of each axis
        assert (by_cache <= by_image.clamp(min=1) + 1e-4).all()


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
def test_a_smaller_cache_enlarges_some_crops(views):
    side = least_cache_side(views) - 16
    crops = [(view, smallest_crops(view, 6000, 4000, side)[0]) for view in views]
    assert any((view.size / cached).max() > 1 for view, cached in crops)


def test_the_exception_for_wide_images_is_as_documented():
    view = View(98, (0.05, 0.32))
    cached, _ = smallest_crops(view, 8000, 4000, view.size * math.sqrt(2 / 0.05))
    assert float((view.size / cached).max()) == pytest.approx(math.sqrt(2 / 1.5), abs=0.01)


def test_the_side_of_the_cache_for_dinov2s_crops():
    assert least_cache_side(VIEWS["vits14"]) == 624  # local crops need 98 * sqrt(2 / 0.05) = 619.8
    assert least_cache_side(VIEWS["vits14"][:1]) == 560  # a view alone: 224 * sqrt(2 / 0.32) = 560
    assert least_cache_side(VIEWS["smoke"]) == 160


def test_crops_of_a_small_image_are_those_of_the_image_itself():
    """Enlarging an image to the square, and then cropping it, neither adds nor loses detail."""
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (45, 60, 3), dtype=np.uint8)).resize(
        (120, 90), Image.Resampling.BICUBIC
    )
    views, box = VIEWS["smoke"], torch.tensor([[0.2, 0.4, 0.4, 0.3]])
    full = image.resize((28, 28), Image.Resampling.BICUBIC, box=(48, 18, 84, 54))
    still, differences = torch.zeros(1, 2, dtype=torch.bool), {}
    for side in (least_cache_side(views), least_cache_side(views) // 4):
        square = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)[None]
        (crop,) = crop_resize(torch.from_numpy(square.copy()), torch.tensor([0]), box, 28, still, side, "bicubic")
        differences[side] = float(np.abs(crop.permute(1, 2, 0).numpy() - np.asarray(full, np.float32) / 255).mean())
    assert differences[160] < 0.01
    assert differences[40] > 10 * differences[160]
