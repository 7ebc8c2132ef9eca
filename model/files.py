"""Names of files, atomic file writes, and locks between processes.

The project uses this module for files that it writes and later reads. Content is written to a temporary file in the
target's folder and flushed to the disk. Then the file is renamed to its final name, and the folder is flushed too.
After a crash or a power cut, the target is either the old version or the new one, never a mixture. If a process is
killed, temporary files named `.<name>.<...>.part` can remain.
"""

import fcntl
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""The names of models and heads. Folders have these names, so a name contains no separator and no leading dot."""

_LOCK: Final = ".lock"
_SURELY_LOCKED_S: Final = 60  # a folder of this age has its lock, if its process still runs


def expanded(path: Path) -> Path:
    """Return the path with `~` or `~name` at its start replaced with the home folder of the current or the named user.

    Raises:
        ValueError: the home folder is unknown.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: the home folder that {path.parts[0]} names is unknown") from error


def name_problem(name: str) -> str | None:
    """Return what is wrong with a name that a user chose for a model or a head, or None if the name is allowed.

    Every command that names a folder after user input calls this function, before it does any work.
    """
    if re.fullmatch(NAME_PATTERN, name):
        return None
    rule = "use up to 64 letters, digits, dots, dashes and underscores, and begin with a letter or a digit"
    return f"name {name[:100]!r}: {rule}"


def sync(path: Path) -> None:
    """Flush the content of a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(finished: Path, target: Path) -> None:
    """Flush a finished file, or a folder and its files, to the disk and rename it to `target`.

    An existing file at `target` is replaced.

    Raises:
        OSError: a disk operation failed. The old `target` is unchanged unless the rename had already succeeded.
    """
    if finished.is_dir():
        for path in sorted(finished.iterdir()):
            sync(path)
    sync(finished)
    finished.replace(target)
    sync(target.parent)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield the path of a temporary file in the folder of `target`, for the `with` block to write.

    If the block succeeds, the temporary file is renamed to `target`. If the block raises an exception, the temporary
    file is removed.

    Raises:
        OSError: a disk operation failed. The old `target` is unchanged unless the rename had already succeeded.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        yield temporary
        publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(target: Path, content: bytes) -> None:
    """Write `content` to the file `target` atomically.

    Raises:
        OSError: see `replacing`.
    """
    with replacing(target) as path:
        path.write_bytes(content)


def write_text(target: Path, content: str) -> None:
    """Write `content` to the file `target` atomically, as UTF-8.

    Raises:
        OSError: see `replacing`.
    """
    write_bytes(target, content.encode())


def lock_file(path: Path, *, wait: bool = False) -> BinaryIO | None:
    """Lock the file at `path`, creating it if needed. The lock ends when the file is closed or the process ends.

    The file is never deleted, because two processes that lock the same path must lock the same file. This lock is
    independent of SQLite's locks.

    Args:
        path: the file.
        wait: whether to wait if another process holds the lock, instead of returning None.

    Returns:
        The open file (positioned at its end), or None if another process holds the lock and `wait` is False.

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


@contextmanager
def waiting_lock(path: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """Hold the lock of the file at `path`. If another process holds it, call `on_wait` and wait.

    Raises:
        OSError: the file cannot be opened, or its file system does not support locks.
    """
    file = lock_file(path)
    if file is None:
        on_wait()
        file = lock_file(path, wait=True)
    assert file is not None
    with file:
        yield


@contextmanager
def working_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder in `parent` whose name begins with `prefix`, and delete it at the end.

    Folders that killed processes have left are deleted first. A folder in use is recognised by its lock.

    Raises:
        OSError: the folder cannot be created.
    """
    for old in parent.glob(f"{prefix}*"):
        if time.time() - old.stat().st_mtime > _SURELY_LOCKED_S:
            lock = lock_file(old / _LOCK)
            if lock is not None:
                with lock:
                    shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as folder:
        lock = lock_file(Path(folder) / _LOCK)
        assert lock is not None
        with lock:
            yield Path(folder)
