"""A number that all processes with the same data folder share. It changes with every commit.

From the number, called the stamp, a search learns whether anything was written since its last read. A query to SQLite
would take longer than all other Python code of a search. A writer changes the stamp before it acknowledges the write,
so a reader that finds the stamp unchanged has seen every acknowledged write. Each new value is random. With a counter,
two processes that increment it at once could set it back to a value that a reader has seen. If a process dies between
the commit and the change of the stamp, it has not acknowledged the write; readers see the write after the next change.
"""

import mmap
import os
from pathlib import Path

from service.search.sqlite_file import translated


class Stamp:
    """A 64-bit number in a memory-mapped file."""

    def __init__(self, path: Path) -> None:
        with translated(f"vector store {path}"):
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
