"""Tests of scores that are learned from examples."""

import numpy as np
import pytest

from training.curate.examples import (
    Embeddings,
    ExampleSettings,
    Share,
    learn_score,
    threshold_for,
    wilson,
)


def examples(n: int, distance: float, seed: int) -> tuple[Embeddings, Embeddings]:
    """Make embeddings of n wanted and n other images whose means are `distance` apart in the first dimension."""
    values = np.random.default_rng(seed).normal(size=(2, n, 8))
    values[0, :, 0] += distance
    values /= np.linalg.norm(values, axis=2, keepdims=True)
    return values[0].astype(np.float32), values[1].astype(np.float32)


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (190, 200, 0.9104, 0.9726)],
)
def test_wilsons_interval(count: int, of: int, low: float, high: float) -> None:
    assert wilson(count, of) == pytest.approx((low, high), abs=1e-4)


def test_a_share_of_nothing_has_no_interval() -> None:
    with pytest.raises(ValueError, match="0 images"):
        wilson(0, 0)


def test_a_share_is_shown_with_its_interval() -> None:
    assert str(Share(190, 200)) == "95.0% (190 of 200; 95 % interval 91.0% to 97.3%)"


@pytest.mark.parametrize(("recall", "expected"), [(1.0, 0.0), (0.95, 1.0), (0.9, 2.0), (0.05, 19.0), (0.01, 19.0)])
def test_the_threshold_is_the_highest_that_reaches_the_recall(recall: float, expected: float) -> None:
    assert threshold_for(np.random.default_rng(0).permutation(20).astype(np.float64), recall) == expected


def test_the_wished_recall_is_reached_on_new_images_and_the_interval_tells_how_surely() -> None:
    wanted, others = examples(200, 3, seed=0)
    new_wanted, new_others = examples(4000, 3, seed=1)
    for recall in (0.8, 0.95):
        score = learn_score(wanted, others, ExampleSettings(recall=recall))
        on_new = score.wanted(new_wanted).mean()
        assert on_new == pytest.approx(recall, abs=0.05)
        low, high = score.recall.interval
        assert low <= on_new <= high
        assert score.false_alarms.value == pytest.approx(score.wanted(new_others).mean(), abs=0.12)


def test_the_held_out_examples_have_no_influence_on_the_score() -> None:
    wanted, others = examples(12, 3, seed=0)
    settings = ExampleSettings(held_out_share=0.5)
    score = learn_score(wanted, others, settings)
    changed = 0
    for i in range(len(wanted)):
        replaced = wanted.copy()
        replaced[i] = -replaced[i]
        again = learn_score(replaced, others, settings)
        changed += not np.array_equal(again.weight, score.weight)
        assert np.array_equal(again.weight, score.weight) == (again.threshold == score.threshold)
    assert changed == 6
    assert score.recall.of == score.false_alarms.of == 6


def test_images_that_cannot_be_told_apart_need_many_false_alarms() -> None:
    wanted, others = examples(100, 0, seed=0)
    score = learn_score(wanted, others, ExampleSettings(recall=0.9))
    assert score.false_alarms.value > 0.6


def test_the_seed_draws_the_held_out_examples() -> None:
    wanted, others = examples(60, 2, seed=0)
    first, again, other = (learn_score(wanted, others, ExampleSettings(seed=seed)) for seed in (0, 0, 1))
    assert np.array_equal(first.weight, again.weight)
    assert first.threshold == again.threshold
    assert not np.array_equal(first.weight, other.weight)


def test_a_set_without_images_has_no_scores() -> None:
    score = learn_score(*examples(20, 2, seed=0), ExampleSettings())
    assert score.scores(np.zeros((0, 8), np.float32)).shape == (0,)


@pytest.mark.parametrize(
    ("n_wanted", "n_others", "settings", "message"),
    [
        (9, 20, ExampleSettings(), "9 wanted example images are too few; at least 10"),
        (20, 9, ExampleSettings(), "9 other example images are too few; at least 10"),
        (20, 20, ExampleSettings(recall=0), "recall=0 must be"),
        (20, 20, ExampleSettings(recall=1.1), "recall=1.1 must be"),
        (20, 20, ExampleSettings(held_out_share=0.6), "held_out_share=0.6 must be"),
    ],
)
def test_what_cannot_be_learned_is_an_error(
    n_wanted: int, n_others: int, settings: ExampleSettings, message: str
) -> None:
    wanted, others = examples(20, 2, seed=0)
    with pytest.raises(ValueError, match=message):
        learn_score(wanted[:n_wanted], others[:n_others], settings)
