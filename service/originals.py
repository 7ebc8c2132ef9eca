"""Store each original image in a file that is named after the image's sha256, so that identical images are stored only
once.

The storage is a local folder, or any file system that fsspec supports, for instance `s3://bucket/prefix` with the
package s3fs. The files are in two levels of subfolders, which are named after the first characters of the sha256. So
each folder has few entries even with millions of images.

In a local folder, an image is written to a temporary file, which is synced to the disk and then renamed. So a stored
image is always complete. Object stores give the same guarantee. On other file systems, an interrupted write may leave a
partial file. Reading a partial file raises an error, because the sha256 of its content differs from its name. The next
write of the same image replaces the partial file, because its size is wrong.

Several items may share one image, even in different collections. So an image stays when an item is deleted. The module
`service/erasure.py` finds out which images are no longer needed, and erases them with `Originals.erase`. To make this
safe while other requests store images, `put` renews the time stamp of an image that is already stored, and `erase`
spares images with a new time stamp.

If a local folder is removed or replaced while the service runs, nothing more is stored or erased in it. The optional
quota counts the stored images once and then adds what is stored, so several processes together may exceed it until the
next count.

Exceptions of the storage packages are translated to `StorageFailed` errors, which contain no paths or addresses.
"""

import asyncio
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from model.files import sync, write_bytes
from service.disk import InPlace, is_full
from service.errors import InsufficientStorage, NotFound, QuotaExceeded, ServiceError, StorageFailed

THREADS: Final = 4
"""The number of threads, and so the highest number of concurrent calls to the storage. It is small because each call
has an image in memory."""
RENEW_AFTER_S: Final = 60.0
RENEW_REMOTE_AFTER_S: Final = 12 * 3600.0
"""The age of a stored image from which `put` renews its time stamp. In a remote storage, this means to send the image
again, so it is done more rarely."""
SCHEME: Final = "original:"
COUNT_AGAIN_S: Final = 600.0
"""The time after which the stored bytes are counted again, if there is a quota."""
_ERASING: Final = ".erasing"
_TIME_FIELDS: Final = ("LastModified", "last_modified")  # s3fs and adlfs
SHA256: Final = re.compile("[0-9a-f]{64}")
"""The form of a digest: the sha256 of an image in hex."""
T = TypeVar("T")


def source_of(digest: str) -> str:
    """Return the text "original:" followed by the digest. This text in the `source` field of an item refers to the
    stored image with this digest."""
    return SCHEME + digest


def digest_of(source: str | None) -> str | None:
    """Return the digest in `source` if it is a text that `source_of` returned. Otherwise return None."""
    digest = (source or "").removeprefix(SCHEME)
    return digest if source is not None and source.startswith(SCHEME) and SHA256.fullmatch(digest) else None


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
    storage. `place` is a local folder (a Path) or the URL of the storage (a str). `max_bytes` is the quota: the highest
    size of all images together.

    Raises:
        ValueError: the URL is invalid, or the package that handles such URLs is not installed.
    """

    def __init__(self, place: str | Path, *, max_bytes: int | None = None) -> None:
        self._fs, self._root = (LocalFileSystem(), str(place.absolute())) if isinstance(place, Path) else _opened(place)
        is_local = isinstance(self._fs, LocalFileSystem)
        self._places = [InPlace(path) for path in (os.path.dirname(self._root), self._root)] if is_local else []
        self._max_bytes = max_bytes
        self._counting = threading.Lock()
        self._stored_bytes, self._counted_at = 0, -COUNT_AGAIN_S
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="originals")

    async def put(self, data: bytes) -> str:
        """Store an image and return its sha256 in hex. An image that is already stored is not written again.

        Raises:
            StorageFailed: the image could not be stored, for instance because the disk is full.
            QuotaExceeded: all images together would be larger than the quota.
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

    async def renew(self, digest: str) -> bool:
        """Renew the time stamp of a stored image, so that `erase` spares it, and return True. Return False if the image
        is not stored, or if it is in a remote storage and must be sent again for a new time stamp."""
        return await self._call(self._renew_if_old, self._path(digest))

    async def stored_before(self, time_s: float) -> dict[str, int]:
        """Return the digests of the images whose time stamp is older than `time_s` (in seconds since 1970), with their
        sizes in bytes."""
        return await self._call(self._stored_before, time_s)

    async def erase(self, digest: str, *, unless_since: float | None = None) -> int | None:
        """Delete the image with this sha256 and return its size in bytes. If its time stamp is not older than
        `unless_since` (in seconds since 1970), keep it and return None.

        In a local folder, no image that is stored at the same time is lost. In a remote storage, an image is lost if it
        is stored again between the two calls that read its time stamp and delete it.

        Raises:
            NotFound: the image is not stored.
            StorageFailed: the image cannot be deleted.
        """
        return await self._call(self._erase, digest, unless_since)

    async def missing_bytes(self, target: "Originals") -> int:
        """Return the total size of the images that `target` does not have, in bytes. This storage is a local folder."""
        return await self._call(self._missing_bytes, target)

    def is_in_place(self) -> bool:
        """Return whether the local folder is still the one that was opened. A remote storage is always in place."""
        return all(place.holds() for place in self._places)

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
            self._check_in_place()
            info = self._info(path)
            exists = info is not None and info["size"] == len(data) and self._renew_if_old(path, info)
            if not exists:
                self._take_quota(len(data))
            if isinstance(self._fs, LocalFileSystem):
                _put_local(Path(path), None if exists else data)
            elif not exists:
                self._pipe(path, data)
            self._check_in_place()
        return digest

    def _check_in_place(self) -> None:
        for place in self._places:
            place.check()

    def _take_quota(self, size: int) -> None:
        """Count an image that will be stored. Raises QuotaExceeded if it does not fit into the quota."""
        if self._max_bytes is None:
            return
        with self._counting:
            if time.monotonic() - self._counted_at >= COUNT_AGAIN_S:
                self._stored_bytes = sum(info["size"] or 0 for info in self._fs.find(self._root, detail=True).values())
                self._counted_at = time.monotonic()
            if self._stored_bytes + size > self._max_bytes:
                raise QuotaExceeded(
                    f"the stored images have {self._stored_bytes} bytes, and max_originals_bytes={self._max_bytes} has "
                    f"no room for {size} more: erase images that no item needs"
                )
            self._stored_bytes += size

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

    def _renew_if_old(self, path: str, info: Mapping[str, Any] | None = None) -> bool:
        """See `renew`."""
        local = isinstance(self._fs, LocalFileSystem)
        try:
            age = time.time() - self._modified(path, info)
            if local and age > RENEW_AFTER_S:
                os.utime(path)
                os.stat(path)  # `erase` may have renamed the file while `utime` ran, before its time was set
        except FileNotFoundError:  # erased at this moment
            return False
        except NotImplementedError:  # a storage without time stamps; `erase` refuses to work with it
            return True
        return local or age <= RENEW_REMOTE_AFTER_S

    def _modified(self, path: str, info: Mapping[str, Any] | None = None) -> float:
        """Return the time stamp of a file in seconds since 1970. `info` is what the storage says about the file, if it
        was already asked.

        Raises:
            FileNotFoundError: there is no such file.
            NotImplementedError: the storage has no time stamps.
        """
        if isinstance(self._fs, LocalFileSystem):
            return os.stat(path).st_mtime
        listed = [info[name] for name in _TIME_FIELDS if name in info] if info else []
        modified: float = (listed[0] if listed else self._fs.modified(path)).timestamp()
        return modified

    def _stored_before(self, time_s: float) -> dict[str, int]:
        with _translated("listed"):
            self._check_in_place()
            if isinstance(self._fs, LocalFileSystem):
                for aside in Path(self._root).glob(f"*/*/*{_ERASING}"):  # of a process that was killed
                    _put_back(aside, aside.with_name(aside.name.removesuffix(_ERASING)))
            found = {}
            for path, info in self._fs.find(self._root, detail=True).items():
                digest = path.rpartition("/")[2]
                with suppress(FileNotFoundError):  # erased by another process
                    if SHA256.fullmatch(digest) and self._modified(path, info) < time_s:
                        found[digest] = info["size"]
            return found

    def _erase(self, digest: str, unless_since: float | None) -> int | None:
        path = self._path(digest)
        with _translated("erased"):
            self._check_in_place()
            try:
                if isinstance(self._fs, LocalFileSystem):
                    size = _erase_local(Path(path), unless_since)
                elif unless_since is not None and self._modified(path) >= unless_since:
                    return None
                else:
                    size = self._fs.info(path)["size"]
                    self._fs.rm_file(path)
            except FileNotFoundError as error:
                raise NotFound(f"the image {digest} is not stored") from error
        with self._counting:
            self._stored_bytes -= size or 0
        return size

    def _missing_bytes(self, target: "Originals") -> int:
        with _translated("looked up"):
            images = ((path, path.stat().st_size) for path in Path(self._root).glob("*/*/*"))
            found = ((path.name, size) for path, size in images if SHA256.fullmatch(path.name))
            return sum(size for digest, size in found if target._size(target._path(digest)) != size)

    def _size_of(self, digest: str) -> int | None:
        with _translated("looked up"):
            return self._size(self._path(digest))

    def _size(self, path: str) -> int | None:
        """Return the size of a file in bytes, or None if there is no such file or the storage does not know its
        size."""
        info = self._info(path)
        return info["size"] if info is not None and isinstance(info["size"], int) else None

    def _info(self, path: str) -> dict[str, Any] | None:
        """Return what the storage knows about a file, or None if there is no such file."""
        try:
            info: dict[str, Any] = self._fs.info(path)
        except FileNotFoundError:
            return None
        return info

    def _path(self, digest: str) -> str:
        assert SHA256.fullmatch(digest), digest
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


def _erase_local(path: Path, unless_since: float | None) -> int | None:
    """See `Originals.erase`. The file is renamed before its time stamp is read. A request that stores the same image
    has either renewed the time stamp before, or finds no file and writes a new one."""
    aside = path.with_name(path.name + _ERASING)
    path.rename(aside)
    stat = aside.stat()
    if unless_since is not None and stat.st_mtime >= unless_since:
        _put_back(aside, path)
        return None
    aside.unlink()
    sync(path.parent)
    return stat.st_size


def _put_back(aside: Path, path: Path) -> None:
    """Undo the renaming of an image, unless another process has done this or has stored the image again."""
    with suppress(FileNotFoundError, FileExistsError):
        path.hardlink_to(aside)
    aside.unlink(missing_ok=True)


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
        kind = InsufficientStorage if isinstance(error, OSError) and is_full(error) else StorageFailed
        raise kind(f"the image cannot be {done}: {why}") from error
