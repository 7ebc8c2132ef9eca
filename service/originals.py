"""Store each original image in a file that is named after the image's sha256, so that identical images are stored only
once.

The storage is a local folder, or any file system that fsspec supports, for instance `s3://bucket/prefix` with the
package s3fs. The files are in two levels of subfolders, which are named after the first characters of the sha256. So
each folder has few entries even with millions of images.

In a local folder, an image is written to a temporary file, which is synced to the disk and then renamed. So a stored
image is always complete. Object stores give the same guarantee. On other file systems, an interrupted write may leave a
partial file. Reading a partial file raises an error, because the sha256 of its content differs from its name. The next
write of the same image replaces the partial file, because its size is wrong.

This module never deletes an image, because several items may share one image, even in different collections.

Exceptions of the storage packages are translated to `StorageFailed` errors, which contain no paths or addresses.
"""

import asyncio
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from model.files import sync, write_bytes
from service.errors import NotFound, ServiceError, StorageFailed

THREADS: Final = 4
"""The number of threads, and so the highest number of concurrent calls to the storage. It is small because each call
has an image in memory."""
SCHEME: Final = "original:"
_DIGEST: Final = re.compile("[0-9a-f]{64}")
T = TypeVar("T")


def source_of(digest: str) -> str:
    """Return the text "original:" followed by the digest. This text in the `source` field of an item refers to the
    stored image with this digest."""
    return SCHEME + digest


def digest_of(source: str | None) -> str | None:
    """Return the digest in `source` if it is a text that `source_of` returned. Otherwise return None."""
    digest = (source or "").removeprefix(SCHEME)
    return digest if source is not None and source.startswith(SCHEME) and _DIGEST.fullmatch(digest) else None


class HasPhoto(Protocol):
    """An item or a search result, with the two fields that identify its image."""

    @property
    def source(self) -> str | None: ...

    @property
    def digest(self) -> str | None: ...


def photo_digest(item: HasPhoto) -> str | None:
    """Return the sha256 of an item's image in hex. If the item's source contains a digest, return this digest.
    Otherwise return the item's `digest`, which may be None. The image itself is stored only if the item's collection
    stores images."""
    return digest_of(item.source) or item.digest


class Originals:
    """A store of original images. Several calls may run at the same time, and several processes may use the same
    storage. `place` is a local folder (a Path) or the URL of the storage (a str).

    Raises:
        ValueError: the URL is invalid, or the package that handles such URLs is not installed.
    """

    def __init__(self, place: str | Path) -> None:
        self._fs, self._root = (LocalFileSystem(), str(place.absolute())) if isinstance(place, Path) else _opened(place)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="originals")

    async def put(self, data: bytes) -> str:
        """Store an image and return its sha256 in hex. An image that is already stored is not written again.

        Raises:
            StorageFailed: the image could not be stored, for instance because the disk is full.
        """
        return await self._call(self._put, data)

    async def get(self, digest: str) -> bytes:
        """Return the bytes of the image with this sha256.

        Raises:
            NotFound: the image is not stored.
            StorageFailed: the image cannot be read or is damaged.
        """
        return await self._call(self._get, digest)

    async def size(self, digest: str) -> int | None:
        """Return the size in bytes of the file that stores the image with this sha256, or None if there is no such
        file. The file may be partial.

        Raises:
            StorageFailed: the storage cannot report the size.
        """
        return await self._call(self._size_of, digest)

    async def missing_bytes(self, target: "Originals") -> int:
        """Return the total size of the images that `target` does not have, in bytes. This storage is a local folder."""
        return await self._call(self._missing_bytes, target)

    @property
    def folder(self) -> Path | None:
        """The local folder with the images, or None if they are elsewhere."""
        return Path(self._root) if isinstance(self._fs, LocalFileSystem) else None

    def is_same_place(self, other: "Originals") -> bool:
        """Return True if both objects use the same storage. However, the result may be False if they use different URLs
        for the same storage."""
        return bool(self._fs == other._fs) and self._real_root() == other._real_root()

    def _real_root(self) -> str:
        return os.path.realpath(self._root) if isinstance(self._fs, LocalFileSystem) else self._root

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _call(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    def _put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        with _translated("stored"):
            exists = self._size(path) == len(data)
            if isinstance(self._fs, LocalFileSystem):
                _put_local(Path(path), None if exists else data)
            elif not exists:
                self._pipe(path, data)
        return digest

    def _pipe(self, path: str, data: bytes) -> None:
        try:
            self._fs.pipe_file(path, data)
        except FileNotFoundError:  # the storage needs folders; creating them first could create a mistyped bucket
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, data)

    def _get(self, digest: str) -> bytes:
        path = self._path(digest)
        with _translated("read"):
            try:
                data = self._fs.cat_file(path)
            except FileNotFoundError as error:
                raise NotFound(f"the image {digest} is not stored") from error
        if not isinstance(data, bytes) or hashlib.sha256(data).hexdigest() != digest:
            raise StorageFailed(f"the stored image {digest} is damaged: its sha256 differs")
        return data

    def _missing_bytes(self, target: "Originals") -> int:
        with _translated("looked up"):
            images = ((path, path.stat().st_size) for path in Path(self._root).glob("*/*/*"))
            found = ((path.name, size) for path, size in images if _DIGEST.fullmatch(path.name))
            return sum(size for digest, size in found if target._size(target._path(digest)) != size)

    def _size_of(self, digest: str) -> int | None:
        with _translated("looked up"):
            return self._size(self._path(digest))

    def _size(self, path: str) -> int | None:
        """Return the size of a file in bytes, or None if there is no such file or the storage does not know its
        size."""
        try:
            size = self._fs.info(path)["size"]
        except FileNotFoundError:
            return None
        return size if isinstance(size, int) else None

    def _path(self, digest: str) -> str:
        assert _DIGEST.fullmatch(digest), digest
        return f"{self._root}/{digest[:2]}/{digest[2:4]}/{digest}"


def _opened(url: str) -> tuple[Any, str]:
    """Open the file system of a URL. Return the file system, and the path that the URL names in it. Error messages
    contain only the scheme of the URL, because the rest may contain a secret."""
    scheme = url.partition("://")[0] if "://" in url else "a path"
    try:
        fs, root = url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"originals_url: {scheme} needs a package that is not installed: {error}") from error
    except Exception as error:  # each package raises errors of its own
        raise ValueError(f"originals_url: {scheme} cannot be opened: {type(error).__name__}") from error
    return fs, str(root).rstrip("/")


def _put_local(path: Path, data: bytes | None) -> None:
    """Store an image at `path` so that it survives a power failure: write it to a temporary file, sync the file and
    rename it. `data` is None if the image is already stored. The folders are synced even then, because the process that
    wrote the image may not have synced them yet."""
    root = path.parent.parent.parent
    root_is_new = not root.is_dir()
    path.parent.mkdir(parents=True, exist_ok=True)
    if data is not None:
        write_bytes(path, data)
    else:
        sync(path.parent)
    for folder in (path.parent.parent, root, *([root.parent] if root_is_new else [])):
        sync(folder)


@contextmanager
def _translated(done: str) -> Iterator[None]:
    """Turn any exception of the storage into a `StorageFailed`. The message is "the image cannot be", then `done` (for
    example "stored"), then the operating system's text for the error. If there is no such text, the message ends with
    the name of the exception class. The original exception is the cause of the `StorageFailed`."""
    try:
        yield
    except ServiceError:
        raise
    except Exception as error:  # each package has its own errors
        number = error.errno if isinstance(error, OSError) else None
        why = os.strerror(number) if isinstance(number, int) and number else type(error).__name__
        raise StorageFailed(f"the image cannot be {done}: {why}") from error
