"""Read the bytes of a tar from start to end with bounded memory, whether it is compressed or not.

A few kilobytes of a compressed tar can stand for gigabytes. Python's `tarfile` reads a header of any size into memory
at once, follows negative sizes backwards, and lets an .xz file choose the size of the dictionary. So `tarfile` reads
through a `TarStream`, which limits what one header may take, refuses to go backwards, and ends an archive whose content
is out of proportion to its size.
"""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, Final, cast

MAX_MEMBERS: Final = 10_000_000
"""The highest number of images or rows in one archive."""
MAX_SIDECAR_BYTES: Final = 2**20
"""The highest number of bytes in the metadata of an image."""
MAX_HEADER_BYTES: Final = 2**20
"""The highest number of bytes in the headers of one member. Long names and attributes take a few kilobytes."""
MAX_RATIO: Final = 100
FREE_BYTES: Final = 256 * 2**20
"""A compressed tar may contain FREE_BYTES, plus MAX_RATIO times as many bytes as were read of it. Images that are
compressed already hardly get smaller, and uncompressed ones by a factor of 2 to 50. Zeros are packed 1,000 times by
gzip, and far better by xz and bzip2."""
MAX_DICTIONARY_BYTES: Final = 256 * 2**20
"""The memory limit of the decompressor of .xz files. `xz -9` needs 65 MiB."""
_CHUNK: Final = 2**18


class Unpackable(OSError):
    """The error raised when an archive exceeds a limit. The message says which."""


class _Counted:
    """A file that counts the bytes that were read from it."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.size = 0

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(size)
        self.size += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        raise io.UnsupportedOperation("an archive is read only once")


class _Xz:
    """The content of an .xz or .lzma file, which may consist of several streams. LZMAFile sets no memory limit."""

    def __init__(self, raw: _Counted) -> None:
        self._raw = raw
        self._input = b""
        self._stream = self._new_stream()

    def _new_stream(self) -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=MAX_DICTIONARY_BYTES)

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, or b"" at the end.

        Raises:
            EOFError, lzma.LZMAError: the file is truncated or damaged, or needs too much memory.
        """
        while True:
            if self._stream.eof:
                self._input = (self._stream.unused_data or self._raw.read(_CHUNK)).lstrip(b"\0")  # padding
                if not self._input:
                    return b""
                self._stream = self._new_stream()
            elif self._stream.needs_input and not self._input:
                self._input = self._raw.read(_CHUNK)
                if not self._input:
                    raise EOFError("the compressed file ended before the end of its stream")
            data = self._stream.decompress(self._input, size)
            self._input = b""
            if data:
                return data


class TarStream:
    """The unpacked bytes of a tar, as a file that `tarfile` can read in the mode "r:".

    `allow` sets how many bytes may be read before the next call of `allow`.
    """

    def __init__(self, raw: BinaryIO) -> None:
        counted = _Counted(raw)
        head = raw.read(6)
        raw.seek(0)
        self._packed: _Counted | None = counted  # None if the tar is not compressed
        self._read: Callable[[int], bytes]
        self._skip: Callable[[int], object] | None = None
        if head[:2] == b"\x1f\x8b":
            self._read = gzip.GzipFile(fileobj=cast(Any, counted), mode="rb").read
        elif head[:3] == b"BZh":
            self._read = bz2.BZ2File(cast(Any, counted)).read
        elif head == b"\xfd7zXZ\0" or head[:4] == b"\x5d\0\0\x80":
            self._read = _Xz(counted).read
        else:
            self._packed = None
            self._read = raw.read
            with suppress(AttributeError, OSError):
                if raw.seekable():
                    self._skip = lambda size: raw.seek(size, io.SEEK_CUR)
        self._position = 0
        self._allowed = MAX_HEADER_BYTES

    @property
    def is_compressed(self) -> bool:
        return self._packed is not None

    def allow(self, size: int) -> None:
        """Allow to read `size` bytes from now on."""
        self._allowed = size

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        """Return `size` bytes, or fewer at the end.

        Raises:
            Unpackable: more bytes than allowed, or the content is out of proportion to the size of the archive.
        """
        if not 0 <= size <= self._allowed:
            raise Unpackable(f"a header has more than {MAX_HEADER_BYTES} bytes")
        self._allowed -= size
        parts = []
        while size and (part := self._next(min(size, _CHUNK))):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def seek(self, position: int) -> int:
        """Go forward to a position.

        Raises:
            Unpackable: the position is before the current one, or see `read`.
        """
        if position < self._position:
            raise Unpackable("a member begins before the end of the one before it")
        if self._skip is not None:
            self._skip(position - self._position)
            self._position = position
        while self._position < position and self._next(min(position - self._position, _CHUNK)):
            pass
        return self._position

    def _next(self, size: int) -> bytes:
        data = self._read(size)
        self._position += len(data)
        if self._packed is not None and self._position > FREE_BYTES + MAX_RATIO * self._packed.size:
            raise Unpackable(f"it unpacks to more than {MAX_RATIO} times its size")
        return data
