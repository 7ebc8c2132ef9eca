"""Tests of the vote of the nearest neighbours."""

import math

import pytest

from service.vision.knn import TEMPERATURE, vote


def test_a_vote_is_as_defined() -> None:
    labels, similarities = ["b", "a", "a", None, "c"], [0.9, 0.85, 0.84, 0.83, 0.2]
    weights = {"a": math.exp(0.85 / TEMPERATURE) + math.exp(0.84 / TEMPERATURE)}
    weights |= {"b": math.exp(0.9 / TEMPERATURE), "c": math.exp(0.2 / TEMPERATURE)}
    total = sum(weights.values())
    expected = sorted(((label, weight / total) for label, weight in weights.items()), key=lambda pair: -pair[1])
    assert [(label, pytest.approx(score)) for label, score in vote(labels, similarities)] == expected
    assert sum(score for _, score in vote(labels, similarities)) == pytest.approx(1)


def test_two_near_neighbours_outvote_a_nearer_one() -> None:
    assert [label for label, _ in vote(["b", "a", "a"], [0.9, 0.89, 0.89])] == ["a", "b"]
    assert [label for label, _ in vote(["b", "a", "a"], [0.9, 0.6, 0.6])] == ["b", "a"]


def test_true_and_one_are_different_classes() -> None:
    scores = vote([True, 1, 1.0], [0.5, 0.5, 0.5])
    assert [(label, round(score, 6)) for label, score in scores] == [(1, 0.666667), (True, 0.333333)]
    assert [type(label) for label, _ in scores] == [int, bool]


def test_nobody_votes() -> None:
    assert vote([], []) == []
    assert vote([None, None], [0.5, 0.4]) == []
