"""The stamp: a number that all processes with the same data folder share, and that changes with every commit.

A search compares the stamp with the value that an earlier search read. If the values differ, something has been
written. Checking for writes with an SQLite query would take longer than all other Python code of a search. A writer
changes the stamp before it acknowledges the write, so a reader that finds the stamp unchanged has seen every
acknowledged write. Each new value is random. If the stamp were a counter, two processes that increment it at the same
time could set it back to a value that a reader has already seen. If a process dies after the commit but before it
changes the stamp, it has not acknowledged the write. Readers see this write after the next change of the stamp.
"""

import mmap
import os
from pathlib import Path

from service.sqlite import translated


class Stamp:
    """A 64-bit number in a memory-mapped file."""

    def __init__(self, path: Path) -> None:
        with translated(str(path)):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if os.fstat(handle).st_size < mmap.PAGESIZE:
                    os.ftruncate(handle, mmap.PAGESIZE)
                self._map = mmap.mmap(handle, mmap.PAGESIZE)
            finally:
                os.close(handle)
        self._number = memoryview(self._map)[:8].cast("Q")

    def read(self) -> int:
        return self._number[0]

    def bump(self) -> None:
        self._number[0] = int.from_bytes(os.urandom(8), "little")
