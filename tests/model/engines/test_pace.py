"""Tests of the measurement of batches and threads, with engines whose speed is given and a clock that they advance."""

from collections.abc import Callable

import numpy as np
import pytest

from model.engines.pace import measure_batches, smallest_good, split_if_faster, with_fewer_threads
from model.engines.protocol import FloatArray
from model.engines.split import SplitEngine
from tests.fakes import FakeEngine

IMAGE = np.zeros((3, 14, 14), np.float32)


class Timed:
    """An engine whose passes take `seconds(batch)` on its own clock. The first pass of each size takes three times
    as long."""

    now = 0.0

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds = seconds
        self.batches: list[int] = []
        self.closed = False

    def run(self, pixels: FloatArray) -> None:
        Timed.now += self.seconds(len(pixels)) * (1 if len(pixels) in self.batches else 3)
        self.batches.append(len(pixels))

    def close(self) -> None:
        self.closed = True


def clock() -> float:
    return Timed.now


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda batch: 0.01 * batch, 1),
        (lambda batch: 0.01 * batch + 0.0001, 1),  # a batch of 8 is 1 % faster
        (lambda batch: 0.01 * batch + 0.001, 4),  # 1: 91, 2: 95, 4: 98, 8: 99 images/s
        (lambda batch: 0.01 * batch * (1 if batch < 8 else 1.2), 1),
        (lambda batch: 0.01, 8),
    ],
)
def test_the_smallest_batch_within_two_percent(seconds: Callable[[int], float], expected: int) -> None:
    speeds = measure_batches(Timed(seconds).run, IMAGE, 8, clock=clock)  # type: ignore[arg-type]
    assert list(speeds) == [1, 2, 4, 8]
    assert speeds[8] == pytest.approx(8 / seconds(8))
    assert smallest_good(speeds) == expected


def test_a_disturbed_pass_does_not_decide() -> None:
    """The first measured pass of two images takes nine times as long as the others."""
    engine = Timed(lambda batch: 0.01 * batch * (9 if batch == 2 and engine.batches.count(2) == 1 else 1))
    assert measure_batches(engine.run, IMAGE, 2, clock=clock) == pytest.approx({1: 100, 2: 100})


@pytest.mark.parametrize(
    ("seconds_of_one", "sizes", "most"),
    [(0.01, [1, 2, 4, 8], 1.2), (0.05, [1, 2, 4], 1.5), (3.0, [1], 12.5)],
)
def test_large_models_are_not_measured_for_long(seconds_of_one: float, sizes: list[int], most: float) -> None:
    start, engine = clock(), Timed(lambda batch: seconds_of_one * batch)
    assert list(measure_batches(engine.run, IMAGE, 8, clock=clock)) == sizes
    assert clock() - start <= most


def test_batches_up_to_a_number_that_is_no_power() -> None:
    assert list(measure_batches(Timed(lambda batch: 0.001).run, IMAGE, 7, clock=clock)) == [1, 2, 4]


@pytest.mark.parametrize(
    ("threads", "useful", "expected"), [(16, 16, 16), (16, 8, 8), (16, 3, 4), (2, 1, 2), (5, 2, 2), (4, 2, 2)]
)
def test_threads_that_gain_nothing_are_left_out(threads: int, useful: int, expected: int) -> None:
    opened: dict[int, Timed] = {}

    def open_with(number: int) -> Timed:
        opened[number] = Timed(lambda batch: 0.01 * batch / min(number, useful))
        return opened[number]

    pixels = np.zeros((8, 3, 14, 14), np.float32)
    engine, chosen = with_fewer_threads(open_with(threads), threads, open_with, pixels, clock=clock)  # type: ignore[arg-type]
    assert chosen == expected
    assert engine is opened[expected]
    assert [number for number, each in opened.items() if not each.closed] == [expected]


def test_long_passes_keep_all_threads() -> None:
    engine = Timed(lambda batch: 1.0)
    kept = with_fewer_threads(engine, 16, lambda number: pytest.fail("opened"), IMAGE[None], clock=clock)  # type: ignore[arg-type]
    assert kept == (engine, 16)


@pytest.mark.parametrize(("single_s", "faster"), [(0.002, True), (0.03, False)])
def test_batches_are_split_only_if_this_is_faster(single_s: float, faster: bool) -> None:
    engine, single = FakeEngine(delay_s=0.02), FakeEngine(delay_s=single_s)
    chosen = split_if_faster(engine, 2, lambda threads: {1: single}[threads], np.repeat(IMAGE[None], 2, axis=0))
    assert isinstance(chosen, SplitEngine) == faster
    assert faster or (chosen is engine and single.closed)


def test_batches_of_slow_models_are_not_split() -> None:
    engine = Timed(lambda batch: 0.3 * batch)
    pixels = np.repeat(IMAGE[None], 2, axis=0)
    kept = split_if_faster(engine, 2, lambda number: pytest.fail("opened"), pixels, clock=clock)  # type: ignore[arg-type]
    assert kept is engine
