"""A number that all processes on a data folder share and that changes with every commit: "is there anything new?"
without asking SQLite, which costs a search more than its own Python does.

Whoever commits bumps it before the write is acknowledged, so a reader that finds it unchanged has seen every
acknowledged write. It is a new random number each time: counted up by two processes at once, one could set it back to
what a reader has seen. A process that dies between commit and bump acknowledged nothing; the next bump shows what it
wrote.
"""

import mmap
import os
from pathlib import Path

from service.search.sqlite_file import translated


class Stamp:
    """Eight bytes in a mapped file."""

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
