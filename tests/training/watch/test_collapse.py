"""The signs of collapse, what they are together, and the recorded runs that the limits come from."""

import json
import math

import pytest

from training.watch.collapse import CollapseLimits, CollapseState, check_collapse, combinations, signs

LN_K = math.log(64)
HEALTHY = {
    "dino_over_ln_k": 0.8,
    "teacher_entropy": 0.6 * LN_K,
    "rankme_share": 0.4,
    "token_spread": 0.7,
    "lr_backbone": 1e-3,
    "measure": 0.6,
}
LIMITS = CollapseLimits(n_prototypes=64, n_measured=300, patience=3)
BEFORE = {"rankme_share": 0.4, "token_spread": 0.7, "measure": 0.6}
HIGHEST = CollapseState(BEFORE, BEFORE)
LOSS, UNIFORM = {"dino_over_ln_k": 0.995}, {"teacher_entropy": 0.999 * LN_K}
SOLVED, SHARP = {"dino_over_ln_k": 0.01}, {"teacher_entropy": 0.001}
RANK, SPREAD, MEASURE = {"rankme_share": 0.1}, {"token_spread": 0.1}, {"measure": 0.2}


def line(*changes):
    return HEALTHY | {name: value for change in changes for name, value in change.items()}


def found_in(lines, limits=LIMITS):
    """The step and the name of the first collapse in lines at steps 1, 2, ..."""
    state = CollapseState()
    for step, figures in enumerate(lines, 1):
        if (found := check_collapse(figures, limits, state)) is not None:
            return step, found.name
    return None


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (LOSS, "loss", "the DINO loss is at 0.995 of ln K"),
        (SOLVED, "solved", "the same prediction is right for all images"),
        (UNIFORM, "uniform", "its targets say nothing"),
        (SHARP, "sharp", "each image is assigned to a single prototype"),
        (RANK, "rank", "a share of 0.100 of the possible dimensions (RankMe; the limit is 0.200)"),
        (SPREAD, "spread", "have a mean cosine of 0.9000"),
        (MEASURE, "measure", "fell from 60.0% to 20.0%"),
    ],
)
def test_each_sign_is_told_in_words(change, name, words):
    found = signs(line(change), LIMITS, HIGHEST)
    assert list(found) == [name]
    assert words in found[name]


def test_a_healthy_line_has_no_sign():
    near = {"dino_over_ln_k": 0.98, "teacher_entropy": 0.98 * LN_K, "rankme_share": 0.21, "token_spread": 0.2}
    assert signs(line(near, {"measure": 0.4}), LIMITS, HIGHEST) == {}
    assert signs({}, LIMITS, HIGHEST) == {}
    assert signs(dict.fromkeys(HEALTHY), LIMITS, HIGHEST) == {}


def test_a_line_with_a_frozen_backbone_has_no_sign():
    worst = line(LOSS, UNIFORM, RANK, SPREAD, MEASURE)
    assert len(signs(worst, LIMITS, HIGHEST)) == 5
    assert signs(worst | {"lr_backbone": 0.0}, LIMITS, HIGHEST) == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], []),
        ([LOSS], []),  # fresh heads, fault T2
        ([SHARP], []),  # a low temperature
        ([SOLVED], []),
        ([RANK], []),
        ([SPREAD], ["equal features"]),
        ([MEASURE], []),  # the guard of the measure says this
        ([RANK, SPREAD], ["equal features"]),
        ([RANK, LOSS], ["equal features"]),
        ([SPREAD, SHARP], ["equal features"]),
        ([MEASURE, LOSS], ["lost features"]),
        ([MEASURE, RANK], ["equal features"]),
        ([SOLVED, SHARP], ["trivial solution"]),
        ([LOSS, UNIFORM], ["no information"]),
        ([LOSS, SHARP], []),
    ],
)
def test_signs_are_a_collapse_only_together(changes, expected):
    assert combinations(signs(line(*changes), LIMITS, HIGHEST)) == expected


def test_a_collapse_needs_several_lines_in_a_row():
    bad = line(RANK, SPREAD)
    assert found_in([HEALTHY] * 9 + [bad] * 2 + [HEALTHY] + [bad] * 2) is None
    assert found_in([HEALTHY] * 9 + [bad] * 3) == (12, "equal features")
    assert found_in([HEALTHY] * 9 + [bad | {"lr_backbone": 0.0}] * 9 + [bad] * 2) is None
    assert found_in([HEALTHY] * 9 + [line(LOSS, RANK), line(SPREAD, SHARP)] * 2) == (12, "equal features")


def test_uniform_targets_need_more_lines():
    start = line(LOSS, UNIFORM)
    assert found_in([start] * 8 + [HEALTHY] * 9) is None  # a run may begin so
    assert found_in([start] * 9) == (9, "no information")
    assert found_in([start] + [start | {"rankme_share": 0.6}] * 12) is None  # another loss teaches the network
    assert found_in([start] + [start | {"token_spread": 0.9}] * 12) is None


def test_features_are_compared_with_the_highest_of_the_run():
    begin = line({"rankme_share": 0.1, "token_spread": 0.2})
    low = line({"rankme_share": 0.15, "token_spread": 0.15})
    assert found_in([begin] * 3 + [low] * 9) is None
    assert found_in([begin] * 3 + [HEALTHY] + [low] * 9) == (7, "equal features")


def test_a_network_that_starts_with_equal_features_may_rise_and_is_found_if_it_does_not():
    """A LayerScale of 1e-5 makes the class tokens of a new network equal. The figures are those of a recorded run."""
    figures = [(0.003, 2e-8), (0.003, 9e-7), (0.004, 6e-5), (0.01, 0.0004), (0.03, 0.003), (0.1, 0.03), (0.3, 0.4)]
    rising = [line(LOSS, {"rankme_share": rank, "token_spread": spread}) for rank, spread in figures]
    assert found_in(rising) is None
    assert found_in(rising[:1] * 9) == (3, "equal features")


def test_a_fall_of_the_measure_within_its_noise_is_no_sign():
    few, low = (
        CollapseLimits(n_prototypes=64, n_measured=10, patience=3),
        CollapseState(BEFORE, BEFORE | {"measure": 0.3}),
    )
    assert "measure" in signs(line(MEASURE), few, HIGHEST)
    assert "measure" not in signs(line({"measure": 0.1}), few, low)
    assert "measure" in signs(line({"measure": 0.1}), LIMITS, low)
    assert "measure" not in signs(line(MEASURE), CollapseLimits(n_prototypes=64), HIGHEST)


def test_figures_that_are_not_finite_are_no_sign_and_are_forgotten():
    nothing = line(dict.fromkeys(HEALTHY, math.nan))
    state = CollapseState()
    assert [check_collapse(figures, LIMITS, state) for figures in [nothing] * 4 + [HEALTHY]] == [None] * 5
    assert state.highest == BEFORE
    assert found_in([nothing, HEALTHY, nothing] + [line(RANK, SPREAD)] * 3) == (6, "equal features")


def test_the_advice_fits_the_signs():
    def advice(*changes):
        state = CollapseState()
        return [check_collapse(figures, LIMITS, state) for figures in [HEALTHY] + [line(*changes)] * 9][-1].advice

    assert "Lower teacher_temp" in advice(LOSS, UNIFORM)
    assert "centering=sinkhorn" in advice(SOLVED, SHARP)
    assert "Lower lr" in advice(RANK, SPREAD)
    assert "Lower lr" in advice(MEASURE, LOSS, UNIFORM)


def test_a_resumed_run_decides_the_same():
    lines = [HEALTHY] * 3 + [line(RANK, SPREAD)] * 2 + [HEALTHY] + [line(RANK, LOSS)] * 4
    whole, broken = CollapseState(), CollapseState()
    for figures in lines:
        expected = check_collapse(figures, LIMITS, whole)
        broken = CollapseState(**json.loads(json.dumps(vars(broken))))  # killed after each line
        assert check_collapse(figures, LIMITS, broken) == expected
    assert expected is not None
    assert vars(whole) == vars(broken)
