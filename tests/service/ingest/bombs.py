"""Archives that are small and stand for gigabytes, and archives that no program writes."""

import bz2
import functools
import gzip
import lzma
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

MIB = 2**20


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return the header of a member with any size and kind."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def zeros(size: int) -> Iterator[bytes]:
    block = bytes(MIB)
    return (block for _ in range(size // MIB))


def many_images() -> Iterator[bytes]:
    """A hundred images of a MiB."""
    for index in range(100):
        yield header(f"{index}.jpg", MIB)
        yield from zeros(MIB)


def one_sample() -> Iterator[bytes]:
    """The same, but all images have the same name."""
    for _ in range(100):
        yield header("a.jpg", MIB)
        yield from zeros(MIB)


def ignored_member() -> Iterator[bytes]:
    yield header("a.npy", 100 * MIB)
    yield from zeros(100 * MIB)


def long_name() -> Iterator[bytes]:
    """A member with a name of 64 MiB."""
    yield header("x", 64 * MIB, tarfile.GNUTYPE_LONGNAME)
    yield from zeros(64 * MIB)
    yield header("a.jpg", 0)


def long_attributes() -> Iterator[bytes]:
    yield header("x", 64 * MIB, tarfile.XHDTYPE)
    yield from zeros(64 * MIB)
    yield header("a.jpg", 0)


def backwards() -> Iterator[bytes]:
    """A member of negative size, after which tarfile reads the same header again, for ever."""
    yield header("a.jpg", 0)
    yield header("b.jpg", -512)
    yield bytes(1024)


def nested_headers() -> Iterator[bytes]:
    """1,100 long names for one member. tarfile calls itself for each."""
    for _ in range(1100):
        yield header("x", 1, tarfile.GNUTYPE_LONGNAME) + b"y" + bytes(511)
    yield header("a.jpg", 0) + bytes(1024)


def write(path: Path, parts: Iterator[bytes]) -> Path:
    """Write a tar. The suffix of the path says how it is compressed. All these formats allow several streams in a file,
    so equal parts are compressed once."""
    packers: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    if path.suffix == ".tar":
        return _sparse(path, parts)
    packed = functools.lru_cache(packers[path.suffix])
    with path.open("wb") as file:
        for part in parts:
            file.write(packed(part))
    return path


def _sparse(path: Path, parts: Iterator[bytes]) -> Path:
    """Write a file in which zeros take no space."""
    with path.open("wb") as file:
        for part in parts:
            if any(part[:512]):
                file.write(part)
            else:
                file.seek(len(part), 1)
        file.truncate(file.tell())
    return path


def huge_dictionary(path: Path) -> Path:
    """Write an .xz file whose header asks for a dictionary of 4 GiB. Its content is a tar with one image."""
    data = bytearray(lzma.compress(header("a.jpg", 0) + bytes(1024)))
    end = 12 + 4 * data[12]  # of the header of the first block, which its checksum follows
    data[data.index(b"\x21\x01", 12) + 2] = 40
    data[end : end + 4] = struct.pack("<I", zlib.crc32(data[12:end]))
    path.write_bytes(data)
    return path
