"""Files that are there whole or not at all, also after a power cut."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def aside(out: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when all is written and synced; an older one stays if that fails."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            if not file.closed:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(out)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exclusive(path: Path) -> BinaryIO | None:
    """The file, made if need be, and locked until it is closed or the process ends, however it ends; None when another
    has it. Locks of SQLite on the same file are others, and stay."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
