"""A calibrated threshold keeps its promise on images that it was not chosen with."""

import numpy as np
import pytest

from tests.training.curate.scenes import scene
from tests.training.curate.test_copies import table
from training.curate.copies import calibrate as module
from training.curate.copies.calibrate import (
    Reached,
    Threshold,
    _choose,
    _Examples,
    calibrate,
    lower_bound,
    sources_needed,
)


def examples(positive: list[float], negative: list[float]) -> _Examples:
    n = len(positive) + len(negative)
    copy = np.arange(n) < len(positive)
    return _Examples(np.zeros(n, np.int64), np.zeros(n, np.int64), copy, np.array(positive + negative))


def test_a_calibration_finds_the_copies_of_the_held_out_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPARE", 1.0)
    images = [scene(number, 96, 120) for number in range(6)]
    embedding = np.random.default_rng(0).normal(size=(6, 4))
    found = calibrate(table(images, embedding), lambda index: images[index], 0.7, 0)
    assert 0.3 < found.value < 0.99
    assert found.reached.precision == 1
    assert found.reached.recall > 0.8
    assert sum(found.reached.copies.values()) % 7 == 0
    assert found.set_aside == 0
    assert f"threshold {found.value:.3f} for a precision of 0.7" in found.describe()[0]
    again = calibrate(table(images, embedding), lambda index: images[index], 0.7, 0)
    assert again == found


def test_pairs_that_are_copies_already_are_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPARE", 1.0)
    images = [scene(number // 2, 96 + number % 2, 120) for number in range(8)]
    found = calibrate(table(images), lambda index: images[index], 0.5, 0)
    assert found.set_aside > 0
    assert found.reached.false == 0
    assert "are copies already" in found.describe()[-1]


def test_a_precision_that_the_held_out_part_does_not_reach_is_pointed_out() -> None:
    short = Threshold(0.8, 0.99, Reached({"cropped": 100}, {"cropped": 100}, others=400, false=2), set_aside=0)
    assert "precision is below 0.99; look at the copies in report.html" in short.describe()[-1]
    enough = Threshold(0.8, 0.98, short.reached, set_aside=0)
    assert len(enough.describe()) == 2


def test_the_threshold_lies_in_the_middle_of_the_range_that_keeps_the_promise() -> None:
    value = _choose(examples([0.95] * 300, [0.1] * 300 + [0.85]), 0.98)
    assert 0.5 < value < 0.9
    strict = _choose(examples([0.95] * 300, [0.1] * 290 + [0.85] * 10), 0.98)
    assert 0.85 < strict < 0.95


def test_a_promise_that_the_examples_cannot_show_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot show a precision of 0\.999: .* with 100 copies"):
        _choose(examples([0.95] * 100, [0.1] * 100), 0.999)
    with pytest.raises(ValueError, match="precision is 1; it must be above 0 and below 1"):
        calibrate(table([scene(0, 32, 32)]), lambda index: scene(index, 32, 32), 1, 0)
    with pytest.raises(ValueError, match="needs at least 6 different images, not 1"):
        calibrate(table([scene(0, 32, 32)]), lambda index: scene(index, 32, 32), 0.9, 0)


def test_the_sample_is_large_enough_for_the_promise() -> None:
    for precision in (0.5, 0.9, 0.99, 0.995):
        copies = 7 * sources_needed(precision) // 2
        assert lower_bound(copies, 0) >= precision


def test_the_lower_bound_is_that_of_wilson() -> None:
    assert lower_bound(90, 10) == pytest.approx(0.8395, abs=5e-4)
    assert lower_bound(0, 0) == 0
