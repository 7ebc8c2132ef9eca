"""Measures the batch and the number of threads that suit an engine on this CPU.

A larger batch makes all its images wait for the whole pass. This is worth while only if the engine then processes more
images per second, which depends on the model, the runtime and the CPU (docs/decisions/0051-batches-on-cpus.md). The
same holds for threads: a core that gains nothing is better used to decode images. So both functions return the smallest
number with which the throughput is within 2 % of the best one.

Passes of different sizes take turns, and the shortest pass of each size counts, because other programs on the machine
only ever make a pass longer.
"""

import time
from collections.abc import Callable
from typing import Final

import numpy as np

from model.engines.protocol import Engine, FloatArray
from model.engines.split import SplitEngine

TOLERANCE: Final = 0.02
ROUNDS: Final = 5
SECONDS: Final = 1.0
"""The time after which no further round of passes begins."""
MOST_SECONDS: Final = 2.0
"""The time that may be spent on the first pass of each size. A batch that needs more is not tried."""
FEWEST_THREADS: Final = 4
"""With fewer threads than this, none is superfluous."""
LONGEST_PASS_S: Final = 0.25
"""A pass that takes longer keeps all threads busy, so fewer threads are not tried, and batches are not split."""
SPLIT_GAIN: Final = 0.05
"""How much faster split batches must be, because they need memory for another copy of the weights."""

Run = Callable[[FloatArray], object]
Clock = Callable[[], float]


def measure_batches(run: Run, image: FloatArray, largest: int, *, clock: Clock = time.perf_counter) -> dict[int, float]:
    """Measure the throughput of batches of 1, 2, 4 and so on images, up to `largest`.

    Args:
        run: a forward pass over pixels [B, 3, H, W].
        image: the pixels of one image [3, H, W].
        largest: the largest batch.
        clock: returns the time in seconds.

    Returns:
        Images per second by batch size. Batches for which the time does not suffice are left out.
    """
    start = clock()
    shortest: dict[int, float] = {}
    batches = {size: np.repeat(image[None], size, axis=0) for size in _powers(largest)}
    for size, pixels in batches.items():
        passes = 2 * size * min((seconds / each for each, seconds in shortest.items()), default=0.0)
        if clock() - start + passes > MOST_SECONDS:
            break
        run(pixels)  # a runtime prepares itself for each new shape
        shortest[size] = _seconds(run, pixels, clock)
    for _ in range(ROUNDS - 1):
        if len(shortest) < 2 or clock() - start > SECONDS:
            break
        for size in shortest:
            shortest[size] = min(shortest[size], _seconds(run, batches[size], clock))
    return {size: size / max(seconds, 1e-9) for size, seconds in shortest.items()}


def smallest_good(speeds: dict[int, float]) -> int:
    """Return the smallest number whose speed is within 2 % of the highest speed. `speeds` is a dict by number."""
    return min(number for number, speed in speeds.items() if speed >= (1 - TOLERANCE) * max(speeds.values()))


def with_fewer_threads(
    engine: Engine,
    threads: int,
    reopen: Callable[[int], Engine],
    pixels: FloatArray,
    *,
    clock: Clock = time.perf_counter,
) -> tuple[Engine, int]:
    """Halve the threads of an engine as long as its throughput stays within 2 %.

    Args:
        engine: the engine, which uses `threads` threads per pass.
        threads: the number of threads.
        reopen: opens the same engine with another number of threads.
        pixels: the largest batch that the service uses, [B, 3, H, W].
        clock: returns the time in seconds.

    Returns:
        The engine to use and its number of threads. The other engines are closed.
    """
    while threads >= FEWEST_THREADS:
        engine.run(pixels)
        if _seconds(engine.run, pixels, clock) > LONGEST_PASS_S:
            break
        fewer = reopen(threads // 2)
        fewer.run(pixels)
        shortest = {threads: float("inf"), threads // 2: float("inf")}
        for _ in range(ROUNDS):
            for number, each in ((threads, engine), (threads // 2, fewer)):
                shortest[number] = min(shortest[number], _seconds(each.run, pixels, clock))
        if smallest_good({number: 1 / max(seconds, 1e-9) for number, seconds in shortest.items()}) == threads:
            fewer.close()
            break
        engine.close()
        engine, threads = fewer, threads // 2
    return engine, threads


def split_if_faster(
    engine: Engine,
    threads: int,
    reopen: Callable[[int], Engine],
    pixels: FloatArray,
    *,
    clock: Clock = time.perf_counter,
) -> Engine:
    """Return an engine that splits batches among the threads, if its throughput is higher by `SPLIT_GAIN`.

    Args:
        engine: the engine, which uses `threads` threads per pass.
        threads: the number of threads, at least 2.
        reopen: opens the same engine with another number of threads.
        pixels: a batch of as many images as threads, [B, 3, H, W].
        clock: returns the time in seconds.

    Returns:
        The engine to use. It is `engine` itself, or it contains it.
    """
    engine.run(pixels[:1])
    if _seconds(engine.run, pixels[:1], clock) > LONGEST_PASS_S:
        return engine
    split = SplitEngine(engine, reopen(1), threads)

    def one_by_one(batch: FloatArray) -> None:
        for image in batch:
            engine.run(image[None])

    runs: list[Run] = [split.run, engine.run, one_by_one]
    for run in runs:
        run(pixels)
    times: list[list[float]] = []
    start = clock()
    while not times or (len(times) < ROUNDS and clock() - start < SECONDS):
        times.append([_seconds(run, pixels, clock) for run in runs])
    seconds = [min(each) for each in zip(*times, strict=True)]
    return split if seconds[0] * (1 + SPLIT_GAIN) < min(seconds[1:]) else split.close_single()


def _powers(largest: int) -> list[int]:
    """Return the powers of two from 1 to `largest`."""
    return [2**exponent for exponent in range(largest.bit_length())]


def _seconds(run: Run, pixels: FloatArray, clock: Clock) -> float:
    start = clock()
    run(pixels)
    return clock() - start
