"""The recorded runs of benchmarks/false_alarms.py: the rule stops no healthy run, and finds each collapse in time."""

import json

import pytest

from benchmarks.recorded_runs import RESULT, old_rule, onset, replay, summary

LINES_TO_FIND = 10  # after the first line in which the features are lost
RECORDED = json.loads(RESULT.read_text())
RUNS = RECORDED["runs"]
HEALTHY = [name for name, record in RUNS.items() if onset(record) is None]
COLLAPSED = [name for name in RUNS if name not in HEALTHY]
MEASURES = [None, "knn", "retrieval_medium"]


def test_there_are_runs_of_both_kinds_and_of_each_recipe():
    assert len(RUNS) >= 30
    assert len(HEALTHY) >= 20
    assert len(COLLAPSED) >= 6
    recipes = {"smoke", "cifar", "grocery", "grocery_continue", "dino", "distill", "continue"}
    assert {record["recipe"] for record in RUNS.values()} == recipes


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("measure", MEASURES)
def test_a_healthy_run_is_not_stopped(name, measure):
    assert replay(RUNS[name], measure) is None


@pytest.mark.parametrize("name", COLLAPSED)
@pytest.mark.parametrize("measure", MEASURES[1:])
def test_a_collapse_is_found_in_time(name, measure):
    first, _ = onset(RUNS[name])
    line, _ = replay(RUNS[name], measure)
    assert line <= first + LINES_TO_FIND


def test_the_rule_before_stopped_healthy_runs_with_fresh_heads():
    """Fault T2: the recipe `continue` was stopped because the DINO loss of its fresh heads was at ln K."""
    stopped = [name for name in HEALTHY if old_rule(RUNS[name]) is not None]
    assert "continue" in stopped
    assert "continue, frozen for half" in stopped


def test_the_table_is_that_of_the_recorded_runs():
    assert RECORDED["table"] == json.loads(json.dumps(summary(RUNS)))
