"""What the service asks the disk: whether files are still the ones that were opened, and whether there is space.

If a folder is deleted, unmounted or replaced while the service runs, its open files stay usable, and everything that is
written to them is lost. `InPlace` notices this. `Reserve` keeps space for deletions on a disk that is nearly full. See
docs/decisions/0046-storage-faults.md.
"""

import errno
import logging
import os
import time
from pathlib import Path
from typing import Final

from service.errors import StorageReplaced

log = logging.getLogger(__name__)

RESERVE: Final = "reserve"
RESERVE_BYTES: Final = 64 * 2**20
"""The size of the reserve. It has room for SQLite's write-ahead log, and for the deletion of a thousand items in one
transaction."""
_LENT_BYTES: Final = 2**21
"""Space that databases need to be opened."""
_SHARE: Final = 4  # the reserve of a small disk is this part of it
_LOW: Final = 16  # the reserve is made when less than this many times its size is free
_ASK_AGAIN_S: Final = 0.2
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)

Identity = tuple[int, int]


def identity_of(path: str | Path) -> Identity | None:
    """Return the device and the inode of the file or folder at `path`, or None if there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def is_full(error: OSError) -> bool:
    """Return whether a file operation failed because the disk or a quota is full."""
    return error.errno in _FULL


class InPlace:
    """Notices if the file or folder at a path is removed or replaced after it was opened.

    The object remembers the device and inode that the path had when the object was created. If there was nothing at the
    path then, it remembers what it finds there at a later call.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._identity = identity_of(path)
        self._told = False

    def holds(self) -> bool:
        """Return whether the path still leads to the same file or folder."""
        known, now = self._identity, identity_of(self.path)  # in this order: another thread may make the folder
        if known is None:
            self._identity = now
            return True
        return now == known

    @property
    def is_missing(self) -> bool:
        """Whether nothing has been at the path yet."""
        return self._identity is None

    def check(self) -> None:
        """Raise StorageReplaced if the path no longer leads to the same file or folder. Log each change once."""
        holds = self.holds()
        if holds and self._told:
            log.warning("%s is back; writes continue", self.path)
        elif not holds and not self._told:
            log.error("%s was removed or replaced while the service used it; nothing is written any more", self.path)
        self._told = not holds
        if not holds:
            raise replaced()


def replaced() -> StorageReplaced:
    """Return the error for a data folder that is not the one that was opened."""
    return StorageReplaced(
        "the data folder was removed or replaced while the service ran, so nothing was written; put the right folder "
        "back, or restart the service with it"
    )


class Reserve:
    """Space for deletions: a file that is made when the disk is nearly full, and removed when a deletion needs its
    space. Other writes are refused until it can be made again. Several processes may share it."""

    def __init__(self, folder: Path, size: int | None = None) -> None:
        """Prepare the reserve in `folder`. `size` is its size in bytes; the default depends on the size of the disk."""
        self._folder = folder
        self._path = folder / RESERVE
        self.size = self._default_size() if size is None else size
        self._enough_until = 0.0

    def _default_size(self) -> int:
        try:
            disk = os.statvfs(self._folder)
        except OSError:
            return RESERVE_BYTES
        return min(RESERVE_BYTES, disk.f_blocks * disk.f_frsize // _SHARE)

    def keep(self) -> bool:
        """Make the reserve if the disk is nearly full. Return False if there is not enough space for it."""
        free = self._free()
        if free >= _LOW * self.size:
            self._enough_until = time.monotonic() + _ASK_AGAIN_S
            return True
        if self._is_there():
            return True
        # With less space, the attempt would fill the disk for a moment, or take back what a deletion is about to use.
        return free >= self.size + self.size // 4 and self._make()

    def has_enough(self) -> bool:
        """Return whether `keep` has just found a disk with enough space. This needs no system call."""
        return time.monotonic() < self._enough_until

    def is_short(self) -> bool:
        """Return whether writes are refused or about to be: the disk is full, or the reserve is missing."""
        try:
            free = self._free()
        except OSError:
            return False
        return free < self.size // 4 or (free < _LOW * self.size and not self._is_there())

    def _free(self) -> int:
        return _free_bytes(self._folder)

    def spend(self) -> bool:
        """Remove the file, so that a deletion can use its space. Return whether there was a file."""
        try:
            self._path.unlink()
        except FileNotFoundError:
            return False
        log.warning("the disk is full; the reserve of %d bytes is used for deletions", self.size)
        return True

    def _is_there(self) -> bool:
        try:
            return self._path.stat().st_size >= self.size
        except FileNotFoundError:
            return False

    def _make(self) -> bool:
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        before = os.fstat(handle).st_size
        try:
            os.posix_fallocate(handle, 0, self.size)
        except OSError as error:
            if before:  # a part of it was lent
                os.ftruncate(handle, before)
            else:
                self._path.unlink(missing_ok=True)
            if not is_full(error):
                raise
            return False
        finally:
            os.close(handle)
        return True


def lend_space(folder: Path) -> None:
    """On a full disk, make the reserve smaller, so that the databases in `folder` can be opened."""
    path = folder / RESERVE
    if _free_bytes(folder) < _LENT_BYTES and path.is_file() and not path.is_symlink():
        os.truncate(path, max(0, path.stat().st_size - _LENT_BYTES))


def _free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize
