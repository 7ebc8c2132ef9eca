"""Tests of the nine checks. Small images made by code have exactly the issues that they were made for."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.training.curate.test_table import make_table
from training.curate import quality
from training.curate.table import Images, Pixels


def noise(height: int = 30, width: int = 40, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def table(images: list[Pixels], modes: list[str] | None = None) -> Images:
    modes = modes or ["RGB"] * len(images)
    rows = [quality.measure(pixels, mode) for pixels, mode in zip(images, modes, strict=True)]
    return replace(
        make_table(len(images)),
        width=np.array([pixels.shape[1] for pixels in images], np.int32),
        height=np.array([pixels.shape[0] for pixels in images], np.int32),
        measures={name: np.array([row[name] for row in rows], np.float32) for name in quality.MEASURES},
    )


@pytest.mark.parametrize("shape", [(90, 120), (1, 1), (3, 200), (300, 211)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_measures_follow_their_definitions(shape: tuple[int, int], mode: str) -> None:
    pixels = noise(*shape) // 2 + 60
    if mode == "L":
        pixels = np.repeat(pixels[..., :1], 3, axis=2)
    measures = quality.measure(pixels, mode)
    brightness = np.sqrt(pixels.astype(np.float64) ** 2 @ [0.241, 0.691, 0.068]) / 255
    low, high = np.percentile(brightness, [5, 99])
    assert measures["brightness_5"] == pytest.approx(low, abs=3e-4)
    assert measures["brightness_99"] == pytest.approx(high, abs=3e-4)
    assert measures["brightness"] == pytest.approx(brightness.mean(), abs=3e-4)
    stored = pixels[..., :1] if mode == "L" else pixels
    share = np.bincount((stored + 256 * np.arange(stored.shape[2])).ravel()) / stored.size
    share = share[share > 0]
    assert measures["entropy"] == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-9)
    assert measures["grayscale"] == (mode == "L")
    image = Image.fromarray(pixels)
    ratio = max(max(image.size) / 64, 1)
    gray = image.resize((max(int(image.width // ratio), 1), max(int(image.height // ratio), 1))).convert("L")
    edges = np.asarray(gray.filter(ImageFilter.FIND_EDGES), np.float64)
    assert measures["sharpness"] == pytest.approx(edges.std(), rel=0.01)
    assert measures["tone_spread"] == pytest.approx(np.std(gray.histogram()), rel=0.2)


def test_the_brightness_of_an_image_does_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise()
    whole = quality.measure(pixels, "RGB")
    monkeypatch.setattr(quality, "_BLOCK_PIXELS", 100)
    assert quality.measure(pixels, "RGB") == whole


def test_each_image_has_the_issues_that_it_was_made_for() -> None:
    y, x = np.mgrid[:30, :40]
    smooth = np.stack([np.sin(x / 13), np.sin(y / 13), np.sin((x + y) / 20)], axis=2) * 30 + 60
    gray = np.repeat(noise()[..., :1], 3, axis=2)
    images = {
        "fine": noise(),
        "dark": noise() // 4,
        "light": 245 + noise() // 25,
        "odd_aspect_ratio": noise(20, 60),  # with the area of the others
        "low_information": noise() // 128 * 255,
        "blurry": smooth.astype(np.uint8),
        "grayscale": gray,
        "odd_size": noise(9, 12),
    }
    modes = ["L" if name == "grayscale" else "RGB" for name in images]
    issues = quality.find_issues(table(list(images.values()), modes))
    assert tuple(issues) == quality.ISSUES
    for i, name in enumerate(images):
        found = {issue for issue in quality.ISSUES if issues[issue][i]}
        assert found == (set() if name == "fine" else {name})


def test_a_limit_decides() -> None:
    images = table([noise() // 4])
    score = quality.scores(images)["dark"]
    assert not quality.find_issues(images, quality.Limits(dark=score[0]))["dark"][0]
    assert quality.find_issues(images, quality.Limits(dark=score[0] + 1e-6))["dark"][0]


def test_few_strong_tones_keep_a_plain_image_from_being_blurry() -> None:
    images = table([np.full((30, 40, 3), 60, np.uint8)])
    assert not quality.find_issues(images)["blurry"][0]
    assert quality.find_issues(images, quality.Limits(plain=1))["blurry"][0]


def test_the_odd_sizes_depend_on_the_other_images() -> None:
    sides = [100, 110, 120, 130, 140, 200, 220]
    images = table([noise(side, side) for side in sides])
    assert quality.find_issues(images)["odd_size"].tolist() == [False] * 7
    narrow = quality.find_issues(images, quality.Limits(odd_size=0.6))["odd_size"]
    assert narrow.tolist() == [False] * 6 + [True]


def test_copies_with_equal_pixels_are_exact_and_others_with_the_same_hash_are_near() -> None:
    images = table([noise(seed=seed) for seed in range(6)])
    pixels = np.repeat(np.array([1, 1, 2, 3, 4, 4], np.uint8)[:, None], 32, 1)
    images = replace(images, pixels_sha256=pixels, phash=np.array([7, 7, 7, 8, 9, 9], np.uint64))
    issues = quality.find_issues(images)
    assert issues["exact_duplicates"].tolist() == [True, True, False, False, True, True]
    assert issues["near_duplicates"].tolist() == [True, True, True, False, False, False]


def test_a_set_without_images_has_no_issues() -> None:
    images = make_table(3).take(np.zeros(0, np.int64))
    images = replace(images, measures={name: np.zeros(0, np.float32) for name in quality.MEASURES})
    assert all(len(flags) == 0 for flags in quality.find_issues(images).values())
