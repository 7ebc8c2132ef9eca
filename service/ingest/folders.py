"""Read files for `dinov2 index` from the local disk, and from any file system that fsspec supports.

`Disk` and `Remote` implement the interface `Place`. `model/folder.py` decides which files are images. `Disk` does not
use fsspec, because fsspec's local file system does not follow links to files, and it silently omits a file that
vanishes during a listing. `Disk` yields a `Problem` for a broken link and for a file that vanishes.

The file systems of fsspec raise exceptions of many types. `translated` converts all of them to OSError.
"""

import datetime
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Protocol, cast

import fsspec

from model.folder import HEAD_BYTES, HIDDEN, HIDDEN_FOLDERS, ignored_as, list_folder
from service.errors import ImageTooLarge

Stamp = Mapping[str, int | str]
"""Properties of a file that change when the file changes: its size (`bytes`), the time of its last change (`modified`)
and its `etag`. Some file systems do not provide all three."""

_MODIFIED: Final = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""The keys under which the file systems of fsspec give the time of a file's last change."""


class Content(NamedTuple):
    """An image's bytes and its metadata."""

    data: bytes
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Photo:
    """An image that was found in a folder, archive or list, or at an address. Any thread may call `load` to get its
    bytes and metadata. If the image cannot be read, `load` raises a ServiceError, an OSError or a ValueError, with a
    message for the user."""

    id: str
    source: str
    load: Callable[[], Content] = field(repr=False)
    stamp: Stamp | None = None  # None: changes cannot be detected
    held_bytes: int = 0  # number of bytes in memory; not 0 if the image had to be read in advance


@dataclass(frozen=True)
class Problem:
    """An image, file or folder that could not be indexed, and the reason."""

    source: str
    reason: str


class Entry(NamedTuple):
    """A file or folder in the listing of its parent folder. If the entry is not used, `ignored` is the kind under which
    it is counted (see `model.folder.Listed`)."""

    path: str
    name: str
    is_folder: bool
    stamp: Stamp
    ignored: str | None = None


class Place(Protocol):
    """A file system. If a file or folder cannot be read, `listing` yields a `Problem`, and the other methods raise
    OSError."""

    is_local: bool

    def listing(self, folder: str) -> Iterator[Entry | Problem]:
        """Yield the entries of a folder, sorted by name. Yield a `Problem` for an entry that cannot be read, or for the
        folder if it cannot be listed."""

    def entry(self, path: str) -> Entry:
        """Return an `Entry` that describes the file or folder at `path`."""

    def open(self, path: str) -> BinaryIO: ...

    def read(self, path: str, max_bytes: int) -> bytes:
        """Return the bytes of a file that had at most `max_bytes` bytes. If it has grown, the result may be longer."""

    def join(self, folder: str, name: str) -> str: ...

    def address(self, path: str) -> str:
        """Return the address of a file. Search results show it as the source of the image."""


@dataclass(frozen=True)
class File:
    """A file in a file system. `path` is its path in the file system. `name` identifies it within the folder or list in
    which it was found, for instance `shelf/a.jpg`."""

    place: Place
    path: str
    name: str
    stamp: Stamp | None = None

    @property
    def address(self) -> str:
        return self.place.address(self.path)

    def open(self) -> BinaryIO:
        return self.place.open(self.path)

    def read(self, max_bytes: int) -> bytes:
        """Return the file's bytes.

        Raises:
            ImageTooLarge: the file has more than `max_bytes` bytes.
        """
        size = (self.stamp or {}).get("bytes")
        if size is None:
            with translated(self.path), self.open() as file:
                data = file.read(max_bytes + 1)
        else:
            data = self.place.read(self.path, max_bytes) if int(size) <= max_bytes else b""
        if len(data) > max_bytes or int(size or 0) > max_bytes:
            raise ImageTooLarge(f"the file exceeds the limit of {max_bytes} bytes")
        return data


class Disk:
    """The file system of this machine."""

    is_local = True

    def listing(self, folder: str) -> Iterator[Entry | Problem]:
        try:
            listed = list(list_folder(folder))
        except OSError as error:
            yield Problem(self.address(folder), error.strerror or str(error))
            return
        for path, name, is_folder, ignored, problem in listed:
            if problem is not None:
                yield Problem(self.address(path), problem)
                continue
            try:
                needs_stamp = ignored is None and not is_folder
                yield Entry(path, name, is_folder, _disk_stamp(os.stat(path)) if needs_stamp else {}, ignored)
            except OSError as error:
                yield Problem(self.address(path), error.strerror or str(error))

    def entry(self, path: str) -> Entry:
        return Entry(path, os.path.basename(path), os.path.isdir(path), _disk_stamp(os.stat(path)))

    def open(self, path: str) -> BinaryIO:
        """Open a plain file. Devices, pipes and sockets are not opened, because opening one may wait for ever or have
        an effect.

        Raises:
            OSError: the file cannot be opened, or is not a plain file.
        """
        _check_plain(os.stat(path).st_mode)
        return open(path, "rb", opener=_open_plain)

    def read(self, path: str, max_bytes: int) -> bytes:
        with self.open(path) as file:
            return file.read(max_bytes + 1)

    def join(self, folder: str, name: str) -> str:
        return os.path.join(folder, name)

    def address(self, path: str) -> str:
        absolute = os.path.abspath(path)
        return absolute if absolute.isprintable() else Path(absolute).as_uri()


class Remote:
    """A file system that is accessed through fsspec."""

    is_local = False

    def __init__(self, system: fsspec.AbstractFileSystem) -> None:
        self._system = system

    def listing(self, folder: str) -> Iterator[Entry | Problem]:
        try:
            with translated(folder):
                rows = sorted(self._system.ls(folder, detail=True), key=lambda row: str(row["name"]))
        except OSError as error:
            yield Problem(self.address(folder), str(error))
            return
        for row in rows:
            entry = _remote_entry(row)
            if not entry.name or entry.path.rstrip("/") == folder.rstrip("/"):
                continue
            try:
                yield entry._replace(ignored=self._ignored_as(entry))
            except OSError as error:
                yield Problem(self.address(entry.path), str(error))

    def _ignored_as(self, entry: Entry) -> str | None:
        """Return the kind under which an entry is ignored, or None. Raises OSError if its bytes cannot be read."""

        def head() -> bytes:
            with translated(entry.path):
                return bytes(self._system.cat_file(entry.path, 0, HEAD_BYTES))

        if entry.name.startswith("."):
            return HIDDEN_FOLDERS if entry.is_folder else HIDDEN
        return None if entry.is_folder else ignored_as(entry.name, head)

    def entry(self, path: str) -> Entry:
        with translated(path):
            return _remote_entry(self._system.info(path))

    def open(self, path: str) -> BinaryIO:
        with translated(path):
            return cast(BinaryIO, self._system.open(path, "rb"))

    def read(self, path: str, max_bytes: int) -> bytes:
        with translated(path):
            return bytes(self._system.cat_file(path))

    def join(self, folder: str, name: str) -> str:
        return f"{folder.rstrip('/')}/{name}"

    def address(self, path: str) -> str:
        return str(self._system.unstrip_protocol(path))


def _open_plain(path: str, flags: int) -> int:
    """Open a plain file, and return its descriptor. If a pipe has replaced the file, the call does not wait for it."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        _check_plain(os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_plain(mode: int) -> None:
    """Raise OSError if a file is a device, a pipe or a socket."""
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder raises an OSError that says so
        raise OSError("not a plain file")


def find_place(source: str) -> tuple[Place, str]:
    """Return two values: the file system of a path or URI, and the path within this file system.

    Raises:
        ValueError: the protocol is unknown, or the package that it requires is not installed.
    """
    if "://" not in source:
        return Disk(), os.path.abspath(source)
    try:
        system, path = fsspec.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
    return (Disk() if "file" in _protocols(system) else Remote(system)), path


@contextmanager
def translated(path: str) -> Iterator[None]:
    """Convert any exception that is raised in the `with` block into an OSError. An exception that is an OSError already
    keeps its type. The message of a converted exception, or of a FileNotFoundError, begins with `path`."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file or folder") from error
    except OSError:
        raise
    except Exception as error:  # errors of libraries such as botocore and aiohttp
        raise OSError(f"{path}: {str(error) or type(error).__name__}") from error


def _protocols(system: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def _disk_stamp(found: os.stat_result) -> Stamp:
    return {"bytes": found.st_size, "modified": iso_time(found.st_mtime)}


def _remote_entry(row: Mapping[str, Any]) -> Entry:
    path = str(row["name"])
    stamp: dict[str, int | str] = {}
    if isinstance(row.get("size"), int):
        stamp["bytes"] = row["size"]
    changed = next((row[key] for key in _MODIFIED if row.get(key) is not None), None)
    if isinstance(changed, int | float):
        stamp["modified"] = iso_time(changed)
    elif isinstance(changed, datetime.datetime):
        stamp["modified"] = changed.astimezone(datetime.UTC).isoformat()
    elif isinstance(changed, str):
        stamp["modified"] = changed
    if isinstance(row.get("ETag"), str):
        stamp["etag"] = row["ETag"]
    return Entry(path, path.rstrip("/").rpartition("/")[2], row.get("type") == "directory", stamp)


def iso_time(seconds: float) -> str:
    """Format a time, given in seconds since 1970, as ISO 8601 in UTC. If the time is outside the range of `datetime`,
    return the number as a string. Such times occur in damaged files."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()
    except (OverflowError, ValueError, OSError):
        return str(seconds)
