"""Durations of a request's stages in milliseconds, as answers show them."""

import time
from collections.abc import Iterable

from service.features.pipeline import Embedded


def ms_since(started: float) -> float:
    """Return the milliseconds since a `time.perf_counter()` value."""
    return round((time.perf_counter() - started) * 1e3, 3)


def slowest(images: Iterable[Embedded]) -> dict[str, float]:
    """Return the milliseconds of each stage, each for the image that took longest in it."""
    stages: dict[str, float] = {}
    for image in images:
        for stage, seconds in image.timings.items():
            stages[stage] = max(stages.get(stage, 0.0), round(seconds * 1e3, 3))
    return stages
