"""A number that all processes on a data folder share and that changes with every commit.

It shows whether there is anything new without a query to SQLite, which would cost a search more time than its own
Python code. A writer changes the stamp before it acknowledges the write, so a reader that finds it unchanged has seen
every acknowledged write. Each new value is random: if it were a counter, two processes that increment it at once could
set it back to a value that a reader has seen. A process that dies between commit and change has acknowledged nothing;
the next change reveals its write.
"""

import mmap
import os
from pathlib import Path

from service.search.sqlite_file import translated


class Stamp:
    """A 64-bit number in a mapped file."""

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
