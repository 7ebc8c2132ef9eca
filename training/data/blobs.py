"""Random access to large files by any thread: on this machine, over HTTP, or in a file system that fsspec knows.

A tar shard is such a file: its index is made by jumping from header to header, and an image is one range of it. Only
size, version and range reads are needed. HTTP uses httpx, which is a dependency already, and not fsspec's HTTP file
system, which needs another package. With httpx a server without range support gets a clear error.

Errors have one of two meanings. ValueError: the file cannot be used, and trying again will not help. OSError: the
server or disk failed three times, or the file is being changed; its content remains unknown.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec
import httpx

T = TypeVar("T")

TRIES = 3
HTTP_TIMEOUT_S = 30.0
REPEATABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP status codes of errors that may be temporary."""

VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""Names that fsspec's file systems use for a value that changes with the file."""


class Blob(Protocol):
    """A file of `size` bytes. `version` changes with the file ("" if the file system does not report one)."""

    url: str
    size: int
    version: str

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes.

        Raises:
            Changed: the file has changed since it was opened, or is shorter.
            OSError: the server or disk does not answer.
        """


class Changed(OSError):
    """The file differs from the one that was opened, so a run cannot continue with it."""

    def __init__(self, url: str) -> None:
        super().__init__(f"{url} has changed since it was opened; start again with files that do not change")


def _whole(data: bytes, length: int, url: str) -> bytes:
    if len(data) != length:
        raise Changed(url)
    return data


def _repeated(operation: Callable[[], T]) -> T:
    """Return the operation's result; on OSError try again after 1 and after 2 seconds."""
    for attempt in range(1, TRIES):
        try:
            return operation()
        except (FileNotFoundError, Changed):
            raise
        except OSError:
            time.sleep(attempt)
    return operation()


class LocalBlob:
    """A file on this machine. It is opened for each read (10 us), so thousands of shards need no open files."""

    def __init__(self, path: Path) -> None:
        self.url = str(path)
        status = path.stat()
        self.size, self._modified = status.st_size, status.st_mtime_ns
        self.version = str(status.st_mtime_ns)

    def read(self, offset: int, length: int) -> bytes:
        file = os.open(self.url, os.O_RDONLY)
        try:
            status = os.fstat(file)
            if (status.st_size, status.st_mtime_ns) != (self.size, self._modified):
                raise Changed(self.url)
            return _whole(os.pread(file, length, offset), length, self.url)
        finally:
            os.close(file)


class MemoryBlob:
    """Bytes in memory."""

    def __init__(self, url: str, data: bytes) -> None:
        self.url, self._data, self.size, self.version = url, data, len(data), ""

    def read(self, offset: int, length: int) -> bytes:
        return _whole(self._data[offset : offset + length], length, self.url)


class HttpBlob:
    """A file on a web server that answers range requests. `url` leaves out the secrets of a signed URL.

    Raises:
        ValueError: the server does not support ranges, or refuses the request.
        OSError: the server does not answer.
    """

    def __init__(self, url: str, client: httpx.Client) -> None:
        self._address, self._client = httpx.URL(url), client
        self.url = str(self._address.copy_with(query=None, userinfo=b""))
        self._match: dict[str, str] = {}
        response = _repeated(lambda: self._get(0, 1)[0])
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status_code == 200 or not total.isdecimal():
            raise ValueError(
                f"{self.url}: the server does not answer range requests; download the file and give its local path"
            )
        self.size = int(total)
        etag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
        self.version = etag or modified
        if etag and not etag.startswith("W/"):
            self._match = {"If-Match": etag}
        elif modified:
            self._match = {"If-Unmodified-Since": modified}

    def _get(self, offset: int, length: int) -> tuple[httpx.Response, bytes]:
        headers = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity", **self._match}
        try:
            with self._client.stream("GET", self._address, headers=headers) as response:
                status = response.status_code
                if status in REPEATABLE:
                    raise OSError(f"{self.url}: HTTP {status}")
                if status == 412:  # a condition of `_match` failed
                    raise Changed(self.url)
                if status == 404:
                    raise FileNotFoundError(f"{self.url}: HTTP 404, no such file")
                if status not in (200, 206):
                    raise ValueError(f"{self.url}: HTTP {status}" + (", the file is empty" if status == 416 else ""))
                # A server without range support sends the whole file, of any size: do not read it.
                return response, response.read() if status == 206 else b""
        except httpx.HTTPError as error:
            raise OSError(f"{self.url}: {str(error) or type(error).__name__}") from error

    def read(self, offset: int, length: int) -> bytes:
        return _whole(_repeated(lambda: self._get(offset, length)[1]), length, self.url) if length else b""


class FsspecBlob:
    """A file behind fsspec (s3, gs, memory, ...); its package, such as s3fs, must be installed.

    A change between opening and reading is only noticed if the file becomes shorter.
    """

    def __init__(self, url: str, system: fsspec.AbstractFileSystem, path: str) -> None:
        self.url, self._system, self._path = url, system, path
        info: dict[str, Any] = _repeated(lambda: self._guarded(lambda: system.info(path)))
        self.size = int(info["size"])
        self.version = next((str(info[key]) for key in VERSION_KEYS if info.get(key) is not None), "")

    def _guarded(self, operation: Callable[[], T]) -> T:
        try:
            return operation()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.url}: no such file") from error
        except OSError:
            raise
        except Exception as error:  # errors of botocore, gcsfs and others, which have no common class
            raise OSError(f"{self.url}: {str(error) or type(error).__name__}") from error

    def read(self, offset: int, length: int) -> bytes:
        if not length:
            return b""
        data = _repeated(lambda: self._guarded(lambda: self._system.cat_file(self._path, offset, offset + length)))
        return _whole(bytes(data), length, self.url)


def file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system that a URL names, and the path in it.

    Raises:
        ValueError: the protocol is unknown, or its package is not installed.
    """
    try:
        system, path = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: {error}") from error
    return system, path


def open_blob(url: str, client: httpx.Client) -> Blob:
    """Open a file by its URL or local path. `client` is for http and https; one client serves all files.

    Raises:
        ValueError: no such file, an unknown protocol, or a server without range requests.
        OSError: the server or disk does not answer.
    """
    try:
        if "://" not in url:
            return LocalBlob(Path(url))
        if url.startswith(("http://", "https://")):
            return HttpBlob(url, client)
        return FsspecBlob(url, *file_system(url))
    except FileNotFoundError as error:
        raise ValueError(str(error) if "://" in url else f"{url}: no such file") from error
    except httpx.InvalidURL as error:
        raise ValueError(f"{url}: {error}") from error
