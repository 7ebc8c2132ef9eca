"""Compute durations in milliseconds for answers."""

import time
from collections.abc import Iterable

from service.features.pipeline import Embedded


def ms_since(started: float) -> float:
    """Return the time since `started`, a value of `time.perf_counter()`, in milliseconds."""
    return round((time.perf_counter() - started) * 1e3, 3)


def slowest(images: Iterable[Embedded]) -> dict[str, float]:
    """Return a dictionary that maps the name of each stage to the longest time that any of the images spent in this
    stage, in milliseconds."""
    stages: dict[str, float] = {}
    for image in images:
        for stage, seconds in image.timings.items():
            stages[stage] = max(stages.get(stage, 0.0), round(seconds * 1e3, 3))
    return stages
