"""Show how far a stage is and how much time is left, as lines such as `scan: 1,024 of 2,640 images, 0:41 left`."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

from training.data.progress import Tell, progress

Advance = Callable[[int], object]
"""A function that is called with the number of units of work that have been done since the last call."""

Track = Callable[[str, int], AbstractContextManager[Advance]]
"""Shows the progress of the work in its block. The arguments are what is done, and the number of units of work."""


def in_lines(tell: Tell) -> Track:
    """Return a `Track` that tells the progress in lines, every few seconds."""

    @contextmanager
    def track(what: str, total: int) -> Iterator[Advance]:
        done, begin = 0, time.monotonic()

        def advance(count: int) -> None:
            nonlocal done
            done += count

        def line() -> str:
            return f"{what}: {done:,} of {total:,}{time_left(done, total, time.monotonic() - begin)}"

        with progress(tell, line, lambda: done / max(total, 1)):
            yield advance

    return track


def time_left(done: int, total: int, seconds: float) -> str:
    """Return the time that the rest of the work takes at the speed so far, such as `, 0:01:41 left`.

    `seconds` is the time that `done` of `total` units of work have taken. If nothing is done, the result is empty.
    """
    if not done:
        return ""
    return f", {timedelta(seconds=round((total - done) * seconds / done))} left"
