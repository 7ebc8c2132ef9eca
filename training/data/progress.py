"""Tell how far a long piece of work is, in lines such as `listing images: 12,000 so far`."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread

from rich.console import Console

Tell = Callable[[str], None]
"""A function that shows one line to the user."""

WORTH_A_LINE_S = 2.0
"""Work that takes less than this time, in seconds, is not told."""

EVERY_S = 5.0


def tell(console: Console, *lines: str) -> None:
    """Print lines with the time of day. They are not wrapped, so that log files have one event per line."""
    for line in lines:
        console.print(f"{time.strftime('%H:%M:%S')}  {line}", markup=False, highlight=False, soft_wrap=True)


@dataclass
class Tally:
    """The number of images that have been found so far, and the number of tar shards that have been read."""

    images: int = 0
    shards: int = 0
    all_shards: int = 0

    def __str__(self) -> str:
        shards = f" ({self.shards:,} of {self.all_shards:,} shards)" if self.all_shards else ""
        return f"{self.images:,} so far{shards}"


@contextmanager
def progress(tell: Tell | None, line: Callable[[], str], share: Callable[[], float] | None = None) -> Iterator[None]:
    """Tell the progress of the work in the block.

    A thread tells, so that a slow disk or server does not silence it. The first line comes after 2 seconds, or after
    1 second if less than half of the work is done by then. Further lines follow every 5 seconds.

    Args:
        tell: function that shows a line; None: nothing is told.
        line: function that returns the line to show.
        share: function that returns the share of the work that is done, 0 to 1; None: the share is unknown.
    """
    if tell is None:
        yield
        return
    ended = Event()

    def keep_telling(tell: Tell) -> None:
        if ended.wait(WORTH_A_LINE_S / 2):
            return
        if (share is None or share() >= 0.5) and ended.wait(WORTH_A_LINE_S / 2):
            return
        tell(line())
        while not ended.wait(EVERY_S):
            tell(line())

    thread = Thread(target=keep_telling, args=(tell,), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
