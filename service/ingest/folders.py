"""Read files for `dinov2 index` from the local disk, from any file system that fsspec supports, and from the web.

`Disk` and `Remote` implement the interface `Place`. `Web` only reads files at given URLs and cannot list folders.
`model/folder.py` decides which files are images. `Disk` does not use fsspec, because fsspec's local file system does
not follow links to files, and it silently omits a file that vanishes during a listing. `Disk` yields a `Problem` for a
broken link and for a file that vanishes.

The file systems of fsspec raise exceptions of many types. `translated` converts all of them to OSError.
"""

import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Protocol, cast

import fsspec
import httpx

from model.folder import HEAD_BYTES, HIDDEN, HIDDEN_FOLDERS, ignored_as, list_folder
from service.errors import ImageTooLarge

Stamp = Mapping[str, int | str]
"""Properties of a file that change when the file changes: its size (`bytes`), the time of its last change (`modified`)
and its `etag`. Some file systems do not provide all three."""

_MODIFIED: Final = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""The keys under which the file systems of fsspec give the time of a file's last change."""
_WEB_TIMEOUT_S: Final = 30.0


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

    def read(self, path: str) -> bytes: ...

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
            data = self.place.read(self.path) if int(size) <= max_bytes else b""
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
        return open(path, "rb")

    def read(self, path: str) -> bytes:
        return Path(path).read_bytes()

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

    def read(self, path: str) -> bytes:
        with translated(path):
            return bytes(self._system.cat_file(path))

    def join(self, folder: str, name: str) -> str:
        return f"{folder.rstrip('/')}/{name}"

    def address(self, path: str) -> str:
        return str(self._system.unstrip_protocol(path))


class Web:
    """A reader of files at http and https addresses. All threads share one connection pool."""

    def __init__(self) -> None:
        self._client: httpx.Client | None = None

    def read(self, url: str, max_bytes: int) -> bytes:
        """Send a GET request and return the body of the response.

        Raises:
            OSError: the request failed, or the response has an error status.
            ImageTooLarge: the body has more than `max_bytes` bytes. The rest of the body is not read.
        """
        client = self._client = self._client or httpx.Client(follow_redirects=True, timeout=_WEB_TIMEOUT_S)
        parts, size = [], 0
        try:
            with client.stream("GET", url) as response:
                response.raise_for_status()
                for part in response.iter_bytes():
                    parts.append(part)
                    size += len(part)
                    if size > max_bytes:
                        raise ImageTooLarge(f"the file exceeds the limit of {max_bytes} bytes")
        except httpx.HTTPStatusError as error:
            raise OSError(f"HTTP {error.response.status_code}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise OSError(str(error) or type(error).__name__) from error
        return b"".join(parts)


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


def _disk_stamp(stat: os.stat_result) -> Stamp:
    return {"bytes": stat.st_size, "modified": iso_time(stat.st_mtime)}


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
