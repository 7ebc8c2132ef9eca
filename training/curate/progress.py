"""Show how far a stage is and how much time is left: as a bar on a terminal, otherwise as lines in a log.

Work that is done in several blocks, such as the comparison of pairs, is shown as one: the blocks with the same name add
up.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Thread
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from training.data.progress import Tell

EVERY_S: Final = 10.0
"""The least time in seconds between two lines in a log, also if they are about different work."""

Advance = Callable[[int], object]
"""A function that is called with the number of units of work that have been done since the last call."""

Track = Callable[[str, int], AbstractContextManager[Advance]]
"""Shows the progress of the work in its block. The arguments are what is done, and the number of units of work."""


@dataclass
class _Work:
    """The work of all blocks with one name: the units done and those of all blocks so far, and the seconds taken."""

    done: int = 0
    total: int = 0
    seconds: float = 0.0
    begin: float = 0.0  # of the current block

    @contextmanager
    def block(self, units: int) -> Iterator[Advance]:
        """Do a block of so many units."""
        self.total += units
        self.begin = time.monotonic()

        def advance(count: int) -> None:
            self.done += count

        try:
            yield advance
        finally:
            self.seconds += time.monotonic() - self.begin

    def time_left(self) -> str:
        """Return the time left, during a block. See `time_left`."""
        return time_left(self.done, self.total, self.seconds + time.monotonic() - self.begin)


def in_lines(tell: Tell, every_s: float = EVERY_S) -> Track:
    """Return a `Track` that tells the progress in lines such as `scan: 1,024 of 2,640, 0:00:41 left`.

    There is at most one line in `every_s` seconds. A thread tells it, so that a slow disk or server does not silence
    it. The first line comes after `every_s` seconds.
    """
    works = defaultdict[str, _Work](_Work)
    due = time.monotonic() + every_s

    def keep_telling(what: str, work: _Work, ended: Event) -> None:
        nonlocal due
        while not ended.wait(max(0.0, due - time.monotonic())):
            due = time.monotonic() + every_s
            tell(f"{what}: {work.done:,} of {work.total:,}{work.time_left()}")

    @contextmanager
    def track(what: str, total: int) -> Iterator[Advance]:
        work, ended = works[what], Event()
        with work.block(total) as advance:
            thread = Thread(target=keep_telling, args=(what, work, ended), name="progress", daemon=True)
            thread.start()
            try:
                yield advance
            finally:
                ended.set()
                thread.join()

    return track


def in_bars(console: Console) -> Track:
    """Return a `Track` that shows the current work as one bar with the time left, which disappears with the work."""
    works = defaultdict[str, _Work](_Work)

    @contextmanager
    def track(what: str, total: int) -> Iterator[Advance]:
        work = works[what]
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        with work.block(total) as advance, Progress(*columns, console=console, transient=True) as progress:

            def left() -> str:
                return work.time_left().removeprefix(", ")

            def move(count: int) -> None:
                advance(count)
                progress.update(bar, completed=work.done, left=left())

            bar = progress.add_task(what, total=work.total, completed=work.done, left=left())
            yield move

    return track


def time_left(done: int, total: int, seconds: float) -> str:
    """Return the time that the rest of the work takes at the speed so far, such as `, 0:01:41 left`.

    `seconds` is the time that `done` of `total` units of work have taken. If nothing is done, the result is empty.
    """
    if not done:
        return ""
    return f", {timedelta(seconds=round((total - done) * seconds / done))} left"
