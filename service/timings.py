"""How long the stages of a request took, in milliseconds, as answers show them."""

import time
from collections.abc import Iterable

from service.features.pipeline import Embedded


def ms_since(started: float) -> float:
    """Milliseconds since a `time.perf_counter()`."""
    return round((time.perf_counter() - started) * 1e3, 3)


def slowest(images: Iterable[Embedded]) -> dict[str, float]:
    """Milliseconds that each stage took for the image that it took longest for."""
    stages: dict[str, float] = {}
    for image in images:
        for stage, seconds in image.timings.items():
            stages[stage] = max(stages.get(stage, 0.0), round(seconds * 1e3, 3))
    return stages
