"""Tests of pictures of patch features, on planted features."""

import numpy as np
import pytest
from PIL import Image

from service.errors import InvalidRequest
from service.vision import patch_colours
from service.vision.patch_colours import Shown, draw_colours, joint_colours, thumbnail_size

RNG = np.random.default_rng(8)
BLACK = np.zeros((1, 1, 3), np.uint8)
KINDS = RNG.normal(size=(4, 16)).astype(np.float32)  # features of four kinds of patches


def planted(kinds: np.ndarray) -> np.ndarray:
    """Return features [h, w, D] of patches of these kinds [h, w], with a little noise."""
    return KINDS[kinds] + 0.01 * RNG.normal(size=(*kinds.shape, 16)).astype(np.float32)


def all_of(features: np.ndarray) -> np.ndarray:
    return np.ones(features.shape[:2], bool)


def shown(size: tuple[int, int], **fields: object) -> Shown:
    return Shown(size, (0, 0, size[1], size[0]), np.ones((1, 1), bool), **fields)


def test_equal_kinds_have_equal_colours_in_all_images() -> None:
    kinds = [RNG.integers(0, 4, (5, 8)), RNG.integers(0, 4, (7, 3))]
    features = [planted(each) for each in kinds]
    colours = joint_colours(features, [all_of(each) for each in features])
    assert [each.shape for each in colours] == [(5, 8, 3), (7, 3, 3)]
    flat = np.concatenate([each.reshape(-1, 3) for each in colours])
    kind = np.concatenate([each.ravel() for each in kinds])
    means = np.stack([flat[kind == i].mean(axis=0) for i in range(4)])
    assert np.abs(flat - means[kind]).max() < 0.1
    assert min(np.abs(means[i] - means[j]).max() for i in range(4) for j in range(i)) > 0.3
    assert flat.min() == 0
    assert flat.max() == 1


def test_unused_patches_do_not_change_the_colours() -> None:
    kinds = np.tile(np.arange(4), (6, 2))
    features = planted(kinds)
    used = np.ones((6, 8), bool)
    used[0] = False
    [before] = joint_colours([features], [used])
    features[0] += 100
    [after] = joint_colours([features], [used])
    np.testing.assert_array_equal(before[1:], after[1:])
    [none] = joint_colours([features], [np.zeros((6, 8), bool)])
    assert not none.any()


def test_a_picture_of_one_image_has_its_size() -> None:
    colours = RNG.random((2, 3, 3), np.float32)
    picture = draw_colours([colours], [shown((700, 90))])
    assert picture.shape == (700, 90, 3)
    corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_array_equal(corners, np.rint(colours[[0, 0, 1, 1], [0, 2, 0, 2]] * 255))


def test_what_the_network_does_not_see_and_the_background_are_black() -> None:
    colours = np.ones((2, 2, 3), np.float32)
    scores = np.array([[1, -1], [1, -1]], np.float32)
    picture = draw_colours([colours], [Shown((20, 40), (10, 0, 20, 20), np.ones((2, 2), bool), scores)])
    expected = np.zeros((20, 40, 3))
    expected[:, 10:20] = 255
    np.testing.assert_array_equal(picture, expected)


def test_several_images_stand_side_by_side() -> None:
    sizes = [(100, 50), (1000, 2000), (64, 64)]
    colours = [np.full((1, 1, 3), value, np.float32) for value in (0.2, 0.4, 0.6)]
    picture = draw_colours(colours, [shown(size) for size in sizes])
    widths = [256, 1024, 512]
    assert picture.shape == (512, sum(widths) + 16, 3)
    left = 0
    for width, value in zip(widths, (51, 102, 153), strict=True):
        assert (picture[:, left : left + width] == value).all()
        assert (picture[:, left + width : left + width + 8] == 255).all()
        left += width + 8
    small = draw_colours(colours[:2], [shown((20, 30)), shown((40, 40))])
    assert small.shape == (40, 60 + 8 + 40, 3)


def test_the_crop_is_at_its_place_in_a_reduced_image() -> None:
    colours = np.ones((2, 2, 3), np.float32)
    picture = draw_colours([colours], [Shown((1024, 600), (100, 200, 400, 800), np.ones((2, 2), bool), image=BLACK)])
    expected = np.zeros((512, 300, 3))
    expected[100:500, 50:250] = 255
    np.testing.assert_array_equal(picture[520:], expected)


def test_images_stand_above_their_colours() -> None:
    image = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    black = np.zeros((2, 3, 3), np.float32)
    picture = draw_colours([black, black], [shown((40, 60), image=image)] * 2)
    assert picture.shape == (88, 128, 3)
    np.testing.assert_array_equal(picture[:40, :60], image)
    np.testing.assert_array_equal(picture[:40, 68:], image)
    assert (picture[40:48] == 255).all()
    assert not picture[48:, :60].any()
    assert thumbnail_size((1024, 300)) == (512, 150)
    assert thumbnail_size((100, 300)) == (100, 300)
    large = np.asarray(Image.new("RGB", (150, 512), (9, 9, 9)))
    assert draw_colours([black], [shown((1024, 300), image=large)]).shape == (1032, 150, 3)


def test_the_size_of_a_picture_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    colours = np.zeros((1, 1, 3), np.float32)
    monkeypatch.setattr(patch_colours, "MAX_PIXELS", 400)
    draw_colours([colours], [shown((20, 20))])
    with pytest.raises(InvalidRequest, match=r"the picture would have 20 x 21 pixels .* at most 400 pixels"):
        draw_colours([colours], [shown((20, 21))])
    with pytest.raises(InvalidRequest, match="the picture would have 20 x 48 pixels"):
        draw_colours([colours] * 2, [shown((20, 20))] * 2)
