"""Atomic file writes, and locks between processes.

Everything that the project writes and later reads goes through this module. Content is written to a temporary file in
the target's folder and flushed to the disk; a rename gives it its final name, and the folder is flushed too. After a
crash or a power cut the target is either the old version or the new one, never a part of one. A killed process leaves
temporary files named `.<name>.<...>.part`.
"""

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(finished: Path, target: Path) -> None:
    """Rename a finished file or folder of files to `target`, durably. A file replaces an existing one.

    Raises:
        OSError: a disk operation failed; `target` is unchanged.
    """
    if finished.is_dir():
        for path in sorted(finished.iterdir()):
            sync(path)
    sync(finished)
    finished.replace(target)
    sync(target.parent)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path next to `target`. On success it is published as `target`; on an error it is removed.

    Raises:
        OSError: a disk operation failed; `target` is unchanged.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        yield temporary
        publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(target: Path, content: bytes) -> None:
    """Write a whole file atomically. Raises the errors of `replacing`."""
    with replacing(target) as path:
        path.write_bytes(content)


def write_text(target: Path, content: str) -> None:
    """Write a whole file atomically as UTF-8. Raises the errors of `replacing`."""
    write_bytes(target, content.encode())


def lock_file(path: Path, *, wait: bool = False) -> BinaryIO | None:
    """Lock a file, creating it if needed, until it is closed or the process ends.

    The file is never deleted: two processes that lock a path must lock the same file. SQLite's locks on a file are
    independent of this one.

    Args:
        path: the file.
        wait: wait until another holder releases the lock, instead of returning None.

    Returns:
        The open file (positioned at its end), or None if another process holds the lock.

    Raises:
        OSError: the file cannot be opened, or its file system does not support locks.
    """
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file
