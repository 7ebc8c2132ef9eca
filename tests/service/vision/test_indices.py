"""Tests of the options that choose blocks and heads."""

from typing import Any

import pytest

from service.errors import InvalidRequest
from service.options import parse_options
from service.schemas import VisionOptions
from service.vision.indices import MOST, Indices, chosen


class Options(VisionOptions):
    blocks: Indices = None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("all", "all"),
        (["all"], "all"),
        (3, [3]),
        ("3", [3]),
        (-1, [-1]),
        ("0, 5,-1", [0, 5, -1]),
        ([0, 5.0, "-1"], [0, 5, -1]),
        (None, None),
    ],
)
def test_lists_arrive_in_many_forms(value: Any, expected: Any) -> None:
    assert parse_options(Options, {"blocks": value}).blocks == expected


@pytest.mark.parametrize(
    "value",
    ["", "x", "1;2", "1,,2", 1.5, [1.5], [[1]], {}, True, [True], float("nan"), "9" * 10, 10**400, "all,1", ["all", 1]],
)
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^blocks: must be all, or integers such as 0,5,-1, not ") as caught:
        parse_options(Options, {"blocks": value})
    assert caught.value.param == "blocks"


@pytest.mark.parametrize("value", [[], list(range(MOST + 1)), ",".join("1" * (MOST + 1))])
def test_the_number_of_numbers_is_limited(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"blocks: must be a list of 1 to {MOST} integers, or all, not "):
        parse_options(Options, {"blocks": value})


def test_negative_numbers_count_from_the_end() -> None:
    assert chosen([0, -1, 5, -12], 13, "blocks") == [0, 12, 5, 1]
    assert chosen("all", 3, "heads") == [0, 1, 2]


@pytest.mark.parametrize("index", [3, -4, 999_999_999])
def test_a_number_out_of_range(index: int) -> None:
    message = f"heads: {index} is out of range; the model has 3 heads, 0 to 2, and -1 is the last one"
    with pytest.raises(InvalidRequest, match=message) as caught:
        chosen([0, index], 3, "heads")
    assert caught.value.param == "heads"


def test_a_number_chosen_twice() -> None:
    with pytest.raises(InvalidRequest, match="blocks: -1 is chosen twice"):
        chosen([2, -1], 3, "blocks")
