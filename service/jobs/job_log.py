"""The log of a job: a text file in the job's folder, of which only the end is kept.

Positions are counted from the first byte that was ever written, so a reader can go on where it stopped although the
beginning of the file has been removed. The store knows the number of bytes written.
"""

import os
from pathlib import Path
from typing import Final

from model.files import replacing

LIMIT_BYTES: Final = 8 * 2**20
"""When a log is longer, its first half is removed. A training of a week writes about 1 MiB."""


class JobLog:
    """The log in a job's folder."""

    def __init__(self, folder: Path, limit: int = LIMIT_BYTES) -> None:
        self._path = folder / "log.txt"
        self._limit = limit

    def append(self, text: bytes, total: int) -> None:
        """Append text. `total` is the number of bytes that were written and stored before; bytes behind them are from a
        process that was killed before it stored them, and are removed.

        Raises:
            OSError: the file cannot be written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        start = total - self._size() if total <= self._limit else None
        with self._path.open("ab") as file:
            if start is not None and start < 0:
                os.truncate(file.fileno(), total)
            file.write(text)
        if self._size() > self._limit:
            self._cut()

    def read(self, total: int, after: int | None, limit: int) -> tuple[bytes, int]:
        """Return up to `limit` bytes from the position `after` on, or the end of the log if it is None. Also return the
        position behind them. `total` is the number of bytes written so far."""
        if limit <= 0 or not self._path.exists():
            return b"", total if after is None else after
        with self._path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = max(total - size, 0)
            begin = max(total - limit, first) if after is None else min(max(after, first), total)
            file.seek(begin - first)
            text = file.read(min(limit, total - begin))
        return text, begin + len(text)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _size(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    def _cut(self) -> None:
        """Keep the last half of the limit, from the beginning of a line."""
        with self._path.open("rb") as file:
            file.seek(-self._limit // 2, os.SEEK_END)
            kept = file.read()
        with replacing(self._path) as temporary:
            temporary.write_bytes(kept[kept.find(b"\n") + 1 :])
