"""Photos as they were sent, kept under their sha256: the same image is stored once, whatever it is called.

Over fsspec, so they may lie in a local folder or wherever an fsspec package reaches (`s3://bucket/prefix` with s3fs).
A digest `abcd...` lies at `ab/cd/abcd...`; a folder then holds few entries even with millions of images. In a local
folder an image is written aside, synced and renamed: it is there whole or not at all. An object store does the same by
itself. Elsewhere an interrupted write may leave a part; the next one of the same image replaces it, since the sizes
differ, and no read hands it out, since every read checks the sha256.

Nothing is ever deleted here: two items, of two collections even, may have the same image.

What the storage raises (each package has errors of its own) becomes `StorageFailed`, without its paths and addresses.
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
"""Calls to the storage at one time: each holds an image, and a slow storage must not take the threads of others."""
SCHEME: Final = "original:"
_DIGEST: Final = re.compile("[0-9a-f]{64}")
T = TypeVar("T")


def source_of(digest: str) -> str:
    """What an item says of where its image is."""
    return SCHEME + digest


def digest_of(source: str | None) -> str | None:
    """The digest that a source names; None when it is none of ours."""
    digest = (source or "").removeprefix(SCHEME)
    return digest if source is not None and source.startswith(SCHEME) and _DIGEST.fullmatch(digest) else None


class HasPhoto(Protocol):
    """What an item of a collection says of its photo."""

    @property
    def source(self) -> str | None: ...

    @property
    def digest(self) -> str | None: ...


def photo_digest(item: HasPhoto) -> str | None:
    """The digest of an item's stored image, if its collection keeps them: what its source names, else its own."""
    return digest_of(item.source) or item.digest


class Originals:
    """One place with images. Calls may overlap, and several processes may use the same place.

    Raises, when made: ValueError for an address that is none, or whose package is not installed.
    """

    def __init__(self, place: str | Path) -> None:
        self._fs, self._root = (LocalFileSystem(), str(place.absolute())) if isinstance(place, Path) else _opened(place)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="originals")

    async def put(self, data: bytes) -> str:
        """Store an image; its sha256 in hex. What is there already is not written again.

        Raises:
            StorageFailed: it could not be stored, as when the disk is full.
        """
        return await self._call(self._put, data)

    async def get(self, digest: str) -> bytes:
        """The image with this sha256.

        Raises:
            NotFound: it is not stored here.
            StorageFailed: it cannot be read, or is damaged.
        """
        return await self._call(self._get, digest)

    async def size(self, digest: str) -> int | None:
        """Bytes of the image with this sha256, as far as it is stored; None when there is nothing.

        Raises:
            StorageFailed: the storage does not tell.
        """
        return await self._call(self._size_of, digest)

    def is_same_place(self, other: "Originals") -> bool:
        """Whether what one of them stores is in the other too; addresses that differ in spelling may go unnoticed."""
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
            there = self._size(path) == len(data)
            if isinstance(self._fs, LocalFileSystem):
                _put_local(Path(path), None if there else data)
            elif not there:
                self._pipe(path, data)
        return digest

    def _pipe(self, path: str, data: bytes) -> None:
        try:
            self._fs.pipe_file(path, data)
        except FileNotFoundError:  # storage with real folders; making them first would make a bucket of a misspelt name
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, data)

    def _get(self, digest: str) -> bytes:
        path = self._path(digest)
        with _translated("read"):
            try:
                data = self._fs.cat_file(path)
            except FileNotFoundError as error:
                raise NotFound(f"the image {digest} is not stored here") from error
        if not isinstance(data, bytes) or hashlib.sha256(data).hexdigest() != digest:
            raise StorageFailed(f"the stored image {digest} is damaged: its sha256 is another one")
        return data

    def _size_of(self, digest: str) -> int | None:
        with _translated("looked for"):
            return self._size(self._path(digest))

    def _size(self, path: str) -> int | None:
        """In bytes; None when there is nothing."""
        try:
            size = self._fs.info(path)["size"]
        except FileNotFoundError:
            return None
        return size if isinstance(size, int) else None

    def _path(self, digest: str) -> str:
        assert _DIGEST.fullmatch(digest), digest
        return f"{self._root}/{digest[:2]}/{digest[2:4]}/{digest}"


def _opened(url: str) -> tuple[Any, str]:
    """The file system that a URL names, and the path in it. Messages quote the scheme only: a URL may hold a secret."""
    scheme = url.partition("://")[0] if "://" in url else "a path"
    try:
        fs, root = url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"originals_url: {scheme} needs a package that is not installed: {error}") from error
    except Exception as error:  # whatever the package of a scheme raises
        raise ValueError(f"originals_url: {scheme} cannot be opened: {type(error).__name__}") from error
    return fs, str(root).rstrip("/")


def _put_local(path: Path, data: bytes | None) -> None:
    """Aside, synced, renamed; None when it is there already. The folders are synced in either case: whoever made them
    may not have come that far, and a power cut must not lose what was told to be stored."""
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
    """The border to the storage. The client gets the system's own words for the fault; the log has the cause."""
    try:
        yield
    except ServiceError:
        raise
    except Exception as error:  # each package has errors of its own
        number = error.errno if isinstance(error, OSError) else None
        why = os.strerror(number) if isinstance(number, int) and number else type(error).__name__
        raise StorageFailed(f"the image cannot be {done}: {why}") from error
