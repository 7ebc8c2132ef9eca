"""The order of images with given shares: how often each group comes, in which order its images, and what resumes."""

import numpy as np
import pytest

import training.data.order
from training.data.order import MixedOrder, MixedPlan, Mixture, turns


def mixture(classes, sources=None, weights=None, balanced=True):
    classes = np.array(classes)
    sources = np.zeros(len(classes), np.int64) if sources is None else np.array(sources)
    return Mixture([f"source {i}" for i in range(sources.max() + 1)], sources, classes, weights, balanced)


def drawn(mixture, steps, batch_size=10, seed=3):
    plan = MixedPlan(mixture, batch_size, seed, slice(None))
    return np.concatenate([plan(len(mixture), step).numpy() for step in steps])


UNEVEN = [0] * 60 + [1] * 7 + [2] * 3 + [-1] * 30


def test_each_class_is_drawn_equally_often_and_images_without_a_class_are_one():
    order = drawn(mixture(UNEVEN), range(40))  # 4 epochs of 10 batches
    for epoch in np.split(order, 4):
        n_by_class = np.bincount(np.array(UNEVEN)[epoch] + 1)
        assert n_by_class.tolist() == pytest.approx([25] * 4, abs=1)
    assert np.bincount(np.array(UNEVEN)[order] + 1).tolist() == pytest.approx([100] * 4, abs=1)


def test_sources_are_drawn_by_their_weights_and_classes_equally_often_within_each():
    sources = [0] * 60 + [1] * 40
    classes = [0] * 50 + [1] * 10 + [1] * 35 + [2] * 3 + [3] * 2
    by_weight = drawn(mixture(classes, sources, (3.0, 1.0), balanced=False), range(40))
    assert np.bincount(np.array(sources)[by_weight]).tolist() == pytest.approx([300, 100], abs=1)
    first = by_weight[np.array(sources)[by_weight] == 0]
    assert np.bincount(first, minlength=60)[:60].tolist() == [5] * 60
    both = drawn(mixture(classes, sources, (3.0, 1.0)), range(40))
    pairs = np.bincount(4 * np.array(sources)[both] + np.array(classes)[both], minlength=8)
    assert pairs.tolist() == pytest.approx([150, 150, 0, 0, 0, 100 / 3, 100 / 3, 100 / 3], abs=1)


def test_images_of_a_group_come_again_only_after_all_others():
    order = drawn(mixture(UNEVEN), range(40))
    for number in (-1, 0, 1, 2):
        members = np.flatnonzero(np.array(UNEVEN) == number)
        stream = order[np.isin(order, members)]
        rounds = [stream[i : i + len(members)] for i in range(0, len(stream), len(members))]
        assert all(sorted(turn) == sorted(members) for turn in rounds[:-1])
        assert len(set(rounds[-1])) == len(rounds[-1])
        if len(rounds) > 2 and len(members) > 3:
            assert rounds[0].tolist() != rounds[1].tolist()


def test_a_step_gives_the_same_images_wherever_a_run_starts_and_on_every_rank():
    mixed = mixture(UNEVEN)
    whole = drawn(mixed, range(40))
    assert np.array_equal(drawn(mixed, range(17, 40)), whole[170:])
    assert np.array_equal(drawn(mixed, [33, 5]), np.concatenate((whole[330:340], whole[50:60])))
    ranks = [MixedPlan(mixed, 10, 3, share) for share in (slice(0, 5), slice(5, 10))]
    assert np.array_equal(np.concatenate([plan(100, 12) for plan in ranks]), whole[120:130])
    assert not np.array_equal(drawn(mixed, range(40), seed=4), whole)


@pytest.mark.parametrize("block", [1, 5, 64])
def test_the_size_of_blocks_changes_nothing(monkeypatch, block):
    whole = drawn(mixture(UNEVEN), range(40))
    monkeypatch.setattr(training.data.order, "BLOCK", block)
    assert np.array_equal(drawn(mixture(UNEVEN), range(40)), whole)


def test_every_order_of_a_group_is_equally_frequent():
    first = np.array([MixedOrder(np.zeros(4, np.int64), np.ones(1), seed).epoch(0, 4) for seed in range(2400)])
    _, counts = np.unique(first, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 100) ** 2 / 100).sum() < 49.7  # chi-squared, 23 degrees of freedom, p = 0.001


def plain_turns(shares, phases, total):
    """Sort the turns of all groups by time, and count the first ones."""
    events = sorted(((i + 1 - phases[g]) / shares[g], g) for g in range(len(shares)) for i in range(total))
    return np.bincount([g for _, g in events[:total]], minlength=len(shares))


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.5], [0.7, 0.2, 0.1], [0.9, 0.06, 0.04]])
def test_turns_are_those_of_the_plain_definition(shares):
    shares, phases = np.array(shares), np.random.default_rng(len(shares)).random(len(shares))
    before = np.zeros(len(shares), np.int64)
    for total in range(60):
        counts = turns(shares, phases, total)
        assert np.array_equal(counts, plain_turns(shares, phases, total))
        assert (counts >= before).all()
        before = counts


def test_turns_at_the_same_time_go_to_the_first_groups():
    shares, phases = np.full(4, 0.25), np.zeros(4)
    assert [turns(shares, phases, total).tolist() for total in (0, 1, 3, 4, 6)] == [
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
        [2, 2, 1, 1],
    ]
    late = 10**11  # after so many turns, float64 hardly tells neighbouring turns apart
    assert turns(np.full(3, 1 / 3), np.array([0.1, 0.5, 0.9]), late + 1).sum() == late + 1


def test_broken_images_are_left_out_and_a_class_without_readable_images_has_no_share():
    kept = np.flatnonzero(np.array(UNEVEN) != 2)[5:]
    plan = MixedPlan(mixture(UNEVEN), 10, 3, slice(None)).among(kept)
    order = np.concatenate([plan(len(kept), step).numpy() for step in range(27)])
    n_by_class = np.bincount(np.array(UNEVEN)[kept][order] + 1)
    assert n_by_class.tolist() == pytest.approx([90] * 3, abs=1)


def test_a_source_with_a_weight_and_no_readable_image_is_an_error():
    mixed = mixture([0, 0, 1, 1], [0, 0, 1, 1], (1.0, 1.0), balanced=False)
    with pytest.raises(ValueError, match="data=source 1 has a weight, but no image that can be read"):
        mixed.among(np.array([0, 1]))


@pytest.mark.parametrize("batch_size", [0, 101])
def test_a_batch_that_the_images_do_not_fill_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} must be 1 to 100"):
        drawn(mixture(UNEVEN), [0], batch_size)
