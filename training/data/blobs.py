"""Reading byte ranges of large files, from any thread.

The files are on this machine, on a web server or in a file system that fsspec supports. This module calls them blobs. A
blob needs only a size, a version and a method that reads a range of bytes. Tar shards are read as blobs: each image is
one range of bytes in a shard. Files on web servers are read with httpx, which this project needs anyway; fsspec's HTTP
file system would need another package. Opening a file raises a ValueError if its server does not support range
requests.

There are two kinds of errors. A ValueError means that the file cannot be used, so another attempt would not help. An
OSError means that the disk failed, that a server failed three times, or that the file was changed.
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
"""HTTP status codes of errors that may be temporary. Requests are repeated after them."""

VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""The names that fsspec's file systems use for a value that changes when the file changes."""


class Blob(Protocol):
    """A file of which any range of bytes can be read.

    `size` is the length of the file in bytes. `version` is a string that changes when the file changes, or "" if there
    is no such string.
    """

    url: str
    size: int
    version: str

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes, starting at byte `offset`, and return them.

        Raises:
            Changed: the file has changed since it was opened, or it ends too early.
            OSError: the server or the disk failed.
        """


class Changed(OSError):
    """The error for a file that has changed since it was opened. A run cannot continue with such a file."""

    def __init__(self, url: str) -> None:
        super().__init__(f"{url} has changed since it was opened; start again with files that do not change")


def _whole(data: bytes, length: int, url: str) -> bytes:
    if len(data) != length:
        raise Changed(url)
    return data


def _repeated(operation: Callable[[], T]) -> T:
    """Call `operation` and return its result.

    If the call raises an OSError, it is repeated up to two times, after waiting 1 and 2 seconds. If the error means
    that the file is missing or has changed, the call is not repeated.
    """
    for attempt in range(1, TRIES):
        try:
            return operation()
        except (FileNotFoundError, Changed):
            raise
        except OSError:
            time.sleep(attempt)
    return operation()


class LocalBlob:
    """A file on this machine.

    The file is opened for each read, which takes 10 us. Otherwise thousands of files would be open at the same time.
    """

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
    """A file whose bytes are in memory."""

    def __init__(self, url: str, data: bytes) -> None:
        self.url, self._data, self.size, self.version = url, data, len(data), ""

    def read(self, offset: int, length: int) -> bytes:
        return _whole(self._data[offset : offset + length], length, self.url)


class HttpBlob:
    """A file on a web server that supports range requests.

    The attribute `url` contains no query, user name or password, because they may be secret.

    Raises:
        ValueError: the server does not support range requests, or it refuses the request.
        FileNotFoundError: the server does not have the file.
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
                # A server without range support sends the whole file, which may be very large, so it is not read.
                return response, response.read() if status == 206 else b""
        except httpx.HTTPError as error:
            raise OSError(f"{self.url}: {str(error) or type(error).__name__}") from error

    def read(self, offset: int, length: int) -> bytes:
        return _whole(_repeated(lambda: self._get(offset, length)[1]), length, self.url) if length else b""


class FsspecBlob:
    """A file in a file system that fsspec supports, such as s3, gs or memory.

    The package for the file system, such as s3fs, must be installed. A change to the file after it was opened is
    noticed only when a read reaches beyond the new end of the file.
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
        except Exception as error:  # botocore, gcsfs and others have no common class of errors
            raise OSError(f"{self.url}: {str(error) or type(error).__name__}") from error

    def read(self, offset: int, length: int) -> bytes:
        if not length:
            return b""
        data = _repeated(lambda: self._guarded(lambda: self._system.cat_file(self._path, offset, offset + length)))
        return _whole(bytes(data), length, self.url)


def file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the fsspec file system for a URL, and the path of the file in this file system.

    Raises:
        ValueError: the protocol of the URL is unknown, or the package for it is not installed.
    """
    try:
        system, path = fsspec.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url} needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error
    return system, path


def open_blob(url: str, client: httpx.Client) -> Blob:
    """Open a file by its URL or local path, and return it.

    `client` sends the requests for http and https URLs. All files can share one client.

    Raises:
        ValueError: the file does not exist, the protocol of its URL is unknown, or its server does not support range
            requests.
        OSError: the server or the disk failed.
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
