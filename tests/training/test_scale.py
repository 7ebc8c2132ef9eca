"""The settings that are chosen from the number of images are monotone, in range, and leave enough steps."""

import math
from pathlib import Path

import pytest

from training import scale
from training.config import TrainConfig
from training.scale import (
    DEFAULT_STEPS,
    MAX_EPOCHS,
    MIN_STEPS,
    TABLE_SIZES,
    batch_for,
    continue_settings,
    images_seen,
    power_of_two,
    prototypes_for,
    steps_of,
    table,
    warning,
)

SIZES = (2, 10, 31, 50, 300, 301, 1_000, 2_640, 3_000, 30_000, 300_000, 2_000_000, 50_000_000)
WIDTHS = (128, 192, 384, 768, 1024, 1536)


def test_the_power_of_two_is_the_largest_up_to_the_value():
    assert [power_of_two(value) for value in (1, 1.9, 2, 31.9, 32, 1024, 1025)] == [1, 1, 2, 16, 32, 1024, 1024]
    with pytest.raises(ValueError, match=r"value=0\.5 must be at least 1"):
        power_of_two(0.5)


@pytest.mark.parametrize("rule", [batch_for, prototypes_for])
def test_the_batch_and_the_prototypes_grow_with_the_images(rule):
    values = [rule(n) for n in SIZES]
    assert values == sorted(values)
    assert values[0] < values[-1]
    assert all(value == power_of_two(value) for value in values)


def test_the_rules_at_the_sizes_of_the_published_table():
    assert [batch_for(n) for n in TABLE_SIZES] == [32, 32, 128, 512, 1024]
    assert [prototypes_for(n) for n in TABLE_SIZES] == [256, 1024, 2048, 8192, 16384]
    assert prototypes_for(10**9) == 65536


@pytest.mark.parametrize("n_images", SIZES)
@pytest.mark.parametrize("hours", [None, 0.01, 2, 100])
def test_a_batch_is_never_larger_than_the_set_and_every_setting_is_accepted(n_images, hours, tmp_path):
    settings = continue_settings(n_images, 384, hours=hours, images_per_s=None if hours is None else 50.0)
    assert 2 <= settings.batch_size <= n_images
    config = TrainConfig(data="-", out=tmp_path, model="dinov2_vits14", **settings.as_overrides())
    assert 0.9 <= config.momentum[0] < config.momentum[1] == 1
    assert 0 < config.warmup < 1 - config.freeze_backbone
    assert steps_of(settings, n_images) >= 1


@pytest.mark.parametrize("n_images", [n for n in SIZES if n >= 300])
def test_without_a_budget_the_run_has_enough_steps_and_not_too_many_epochs(n_images):
    settings = continue_settings(n_images, 384)
    assert MIN_STEPS <= steps_of(settings, n_images) <= DEFAULT_STEPS * 1.01
    assert settings.epochs <= MAX_EPOCHS * 1.1 or steps_of(settings, n_images) <= MIN_STEPS * 1.01
    assert warning(settings, n_images) is None


def test_the_budget_limits_the_images_seen():
    assert images_seen(30_000, 2, 10) == pytest.approx(scale.TRAINING_SHARE * 7200 * 10)
    assert images_seen(30_000, 4, 10) == 2 * images_seen(30_000, 2, 10)
    assert images_seen(300, 1000, 1000) == MAX_EPOCHS * 300
    short = continue_settings(30_000, 384, hours=0.5, images_per_s=10)
    assert steps_of(short, 30_000) * short.batch_size == pytest.approx(images_seen(30_000, 0.5, 10), rel=0.01)


def test_a_small_budget_makes_the_batch_smaller_and_never_below_32():
    assert batch_for(300_000) == 512
    assert batch_for(300_000, budget=100_000) == 64
    assert batch_for(300_000, budget=100) == 32
    sizes = [batch_for(300_000, budget) for budget in (1e3, 1e4, 1e5, 1e6, 1e7)]
    assert sizes == sorted(sizes)


def test_the_peak_learning_rate_depends_on_the_width_alone():
    def peak(n_images, width):
        settings = continue_settings(n_images, width)
        return settings.lr * math.sqrt(settings.batch_size / 1024)

    peaks = [peak(30_000, width) for width in WIDTHS]
    assert peaks == sorted(peaks, reverse=True)
    assert peak(3_000, 128) == pytest.approx(scale.PEAK_LR, rel=0.05)
    assert peak(3_000, 768) == pytest.approx(scale.PEAK_LR * scale.LR_WIDTH / 768, rel=0.05)
    for n_images in TABLE_SIZES:
        assert peak(n_images, 384) == pytest.approx(peak(300, 384), rel=0.05)


def test_the_moving_average_covers_the_same_share_of_each_short_run():
    for hours in (0.02, 0.05):
        settings = continue_settings(3_000, 384, hours=hours, images_per_s=100)
        window = 1 / (1 - settings.momentum[0])
        assert window / steps_of(settings, 3_000) == pytest.approx(scale.EMA_SHARE, rel=0.1)


def test_a_run_that_cannot_help_is_announced():
    short = continue_settings(3_000, 384, hours=0.01, images_per_s=20)
    assert "steps, and the shortest run that improved a backbone had 125" in (warning(short, 3_000) or "")
    assert "40 images are too few" in (warning(continue_settings(40, 384), 40) or "")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_images": 1}, "n_images=1 must be at least 2"),
        ({"embed_dim": 0}, "embed_dim=0 must be at least 1"),
        ({"hours": 0.0, "images_per_s": 1.0}, "hours=0.0 must be a finite number above 0"),
        ({"hours": math.inf, "images_per_s": 1.0}, "hours=inf must be"),
        ({"hours": 1.0, "images_per_s": -1.0}, "images_per_s=-1.0 must be"),
        ({"hours": 1.0}, "hours=1 needs the speed of training"),
    ],
)
def test_impossible_values_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        continue_settings(**{"n_images": 300, "embed_dim": 384} | given)


def test_the_published_table_says_which_rows_were_measured():
    lines = table().splitlines()
    assert len(lines) == 2 + len(TABLE_SIZES)
    assert [("extrapolated" in line, line.split(" | ")[0]) for line in lines[2:]] == [
        (False, "| 300"),
        (False, "| 3,000"),
        (True, "| 30,000"),
        (True, "| 300,000"),
        (True, "| 2,000,000"),
    ]


def test_the_documentation_contains_the_table():
    docs = Path(__file__).parents[2] / "docs"
    assert any(table() in page.read_text() for page in docs.glob("training*.md"))
