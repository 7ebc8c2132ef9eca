"""Tests of outcomes: an item's error affects only this item, an internal error is raised, and `on_error` decides at the
end.
"""

import pytest

from service.errors import BrokenImage, InvalidItems, NotFound
from service.outcomes import Outcome, attempt, attempt_await, failures, indexed, numbered, split_items, successes

BROKEN = BrokenImage("not an image")


def fail(*_: object) -> int:
    raise BROKEN


async def fail_later(*_: object) -> int:
    raise BROKEN


def test_attempt_gives_the_value_or_the_error():
    assert attempt(3, divmod, 7, 2) == Outcome(3, (3, 1))
    assert attempt(3, fail) == Outcome(3, error=BROKEN)
    with pytest.raises(ZeroDivisionError):  # no ServiceError: not the item's
        attempt(3, divmod, 7, 0)


def test_then_works_on_values_and_keeps_errors():
    assert Outcome(2, 5).then(divmod, 3) == Outcome(2, (1, 2))
    assert Outcome(2, 5).then(fail) == Outcome(2, error=BROKEN)
    first = NotFound("gone")
    assert Outcome(2, error=first).then(fail) == Outcome(2, error=first)


async def test_awaited_work_is_no_different():
    async def double(value: int) -> int:
        return 2 * value

    assert await Outcome(2, 5).then_await(double) == Outcome(2, 10)
    assert await Outcome(2, 5).then_await(fail_later) == Outcome(2, error=BROKEN)
    first = NotFound("gone")
    assert await Outcome(2, error=first).then_await(fail_later) == Outcome(2, error=first)
    assert await attempt_await(4, double(1)) == Outcome(4, 2)
    assert await attempt_await(4, fail_later()) == Outcome(4, error=BROKEN)


def test_result_raises_the_error():
    assert Outcome(0, None).result() is None
    with pytest.raises(BrokenImage, match="not an image"):
        attempt(0, fail).result()


def test_outcomes_are_told_apart_with_their_indices():
    mixed = [*numbered(["a", "b"]), Outcome(2, error=BROKEN)]
    assert successes(mixed) == ["a", "b"]
    assert indexed(mixed[1:]) == [(1, "b")]
    assert [(failure.index, failure.error) for failure in failures(mixed)] == [(2, BROKEN)]


def test_on_error_says_whether_bad_items_fail_the_request():
    mixed = [Outcome(0, "a"), Outcome(1, error=BROKEN)]
    good, bad = split_items(mixed, "partial", "input")
    assert (good, [failure.index for failure in bad]) == ([(0, "a")], [1])
    for outcomes, on_error in ((mixed, "fail"), (mixed[1:], "partial")):
        with pytest.raises(InvalidItems, match=rf"1 of {len(outcomes)} items cannot be used: \[1\] not an image"):
            split_items(outcomes, on_error, "input")
    assert split_items(mixed[:1], "fail", "input") == ([(0, "a")], [])
