"""Files and folders that exist whole or not at all, and locks between processes.

Everything that the project writes and later reads again goes through here. The durability is the same everywhere: the
content is written beside its target and flushed to the disk, a rename gives it its name, and the folder that holds the
name is flushed too. After a crash or a power cut the target is the old version or the new one, never a part of one.
What a killed process leaves behind is called `.<name>.<...>.part`.
"""

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(finished: Path, target: Path) -> None:
    """Rename a finished file, or a folder of files, to `target`, durably. A file replaces an older one.

    Raises:
        OSError: the disk refuses; `target` is as it was.
    """
    if finished.is_dir():
        for path in sorted(finished.iterdir()):
            sync(path)
    sync(finished)
    finished.replace(target)
    sync(target.parent)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to; on success it is published as `target`, on an error it is removed.

    Raises:
        OSError: the disk refuses; `target` is as it was.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        yield temporary
        publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(target: Path, content: bytes) -> None:
    """Write a whole file; errors as `replacing`."""
    with replacing(target) as path:
        path.write_bytes(content)


def write_text(target: Path, content: str) -> None:
    """Write a whole file as UTF-8; errors as `replacing`."""
    write_bytes(target, content.encode())


def lock_file(path: Path, *, wait: bool = False) -> BinaryIO | None:
    """Lock a file, which is created if needed, until it is closed or the process ends, however it ends.

    The file stays: two processes that lock a path must lock the same file. SQLite's locks on a file are independent of
    this one.

    Args:
        path: the file.
        wait: wait for another holder instead of returning None.

    Returns:
        The open file (positioned at its end), or None if another process holds it.

    Raises:
        OSError: the file cannot be opened, or its file system has no locks.
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
