"""Values of settings that every evaluation task refuses, and the messages that say why."""

import math

import pytest

from training.evaluate.settings import SETTINGS, make_settings

WRONG = [0, -1, 1.5, True, "x", "", [], [0], ["a"], [1, "a"], [True], {"a": 1}, math.inf, -math.inf, math.nan, 10**30]


@pytest.mark.parametrize("task", SETTINGS)
def test_no_text_of_pydantic_reaches_a_user(task):
    refused = 0
    for name in SETTINGS[task].model_fields:
        for value in WRONG:
            try:
                make_settings(task, {name: value})
            except ValueError as error:
                refused += 1
                message = str(error)
                assert name in message, (name, value, message)
                for word in ("pydantic", "http", "Input", "should", "Tuple", "validation", "Value error", "type="):
                    assert word not in message, (name, value, message)
    assert refused > 50


@pytest.mark.parametrize(
    ("task", "name", "values"),
    [
        ("knn", "k", [0, -1, [], [0], True, 1.0]),
        ("retrieval", "k", [0, [1, -1]]),
        ("linear", "blocks", [0, [1, 0]]),
        ("logistic", "tolerance", [math.inf, 0, 2]),
        ("knn", "seed", [-1, 2**32]),
        ("depth", "lr", [math.inf, 0, 1e30]),
        ("segmentation", "weight_decay", [math.inf, math.nan, 100]),
        ("depth", "max_depth", [math.inf, 1e-3, 0]),
        ("depth", "iterations", [10**9]),
    ],
)
def test_values_without_a_meaning_are_refused_before_the_work(task, name, values):
    for value in values:
        with pytest.raises(ValueError, match=name):
            make_settings(task, {name: value})


def test_a_message_names_the_entry_of_a_list_and_only_that():
    with pytest.raises(ValueError, match=r"^k\.1=0: must be at least 1$"):
        make_settings("knn", {"k": [5, 0]})
    with pytest.raises(ValueError, match=r"^min_depth=inf: must be a finite number$"):
        make_settings("depth", {"min_depth": math.inf})
    with pytest.raises(ValueError, match=r"^k\.0='a': must be an integer$"):
        make_settings("knn", {"k": ["a"]})
    with pytest.raises(ValueError, match=r"^k=\[\]: must have 1 or more entries$"):
        make_settings("knn", {"k": []})


@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
@pytest.mark.parametrize("task", ["knn", "linear", "retrieval"])
def test_fit_without_a_crop_is_an_error(task, fit):
    with pytest.raises(ValueError, match=f"fit={fit} has no effect with crop=0, which uses the whole image"):
        make_settings(task, {"crop": 0, "fit": fit})
    assert make_settings(task, {"crop": 0}).crop == 0
    assert make_settings(task, {"crop": 28, "fit": fit}).fit == fit
