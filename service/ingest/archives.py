"""Read the images in tar files for `dinov2 index`. Nothing is unpacked to disk.

Tar files follow the WebDataset convention: adjacent members with the same path up to the first dot of the file name
form a sample, and the member `x.json` contains the metadata of the sample's images, such as `x.jpg` and `x.left.jpg`.
An uncompressed tar on the local disk is read with seeks, so at most the first bytes of ignored members are read, and
several threads can read images at once. A compressed or remote tar is read once, from start to end. Archives within a
tar are ignored like all files that are not images. `service/ingest/unpacking.py` limits what a tar may cost.
"""

import json
import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, Final, cast

from model.folder import HEAD_BYTES, HIDDEN, OTHER_SUFFIXES, Account, ignored_as, sample_names, suffix_of
from service.ingest.folders import Content, File, Photo, Problem, iso_time
from service.ingest.unpacking import MAX_HEADER_BYTES, MAX_MEMBERS, MAX_SIDECAR_BYTES, TarStream, Unpackable

_MAX_SAMPLE: Final = 64
_MAX_SAMPLE_BYTES: Final = 64 * 2**20
"""A sample with this number of members, or with this number of bytes in memory, ends before the next member with
another name, and with twice as many before any member. All images of a sample in a compressed tar are in memory at the
same time."""
_MAX_NAME: Final = 4096
_MAX_KINDS: Final = 1000
"""The number of suffixes of ignored members that are counted separately."""
_OTHER_KINDS: Final = "of other kinds"
_DAMAGED: Final = (
    *(tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError),
    *(ValueError, LookupError, ArithmeticError, RecursionError),  # tarfile on headers that no program writes
)

Read = Callable[[], bytes]


def json_object(data: bytes | str, what: str) -> dict[str, Any]:
    """Parse JSON and return the object that it contains.

    Raises:
        ValueError: the data is not JSON, or not a JSON object. The message begins with `what`.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what}: not a JSON object")
    return value


@dataclass
class _Group:
    """Adjacent members of a tar that form a sample: images, and JSON files with their metadata. `key` is the path that
    the members share, up to the first dot of the file name."""

    key: str = ""
    stem: str = ""  # the name of the last member, without its suffix
    photos: list[tuple[tarfile.TarInfo, str, Read, int]] = field(default_factory=list)  # (member, name, reader, bytes)
    sidecars: dict[str, tuple[str, Read]] = field(default_factory=dict)  # (name, reader) for each name without suffix
    held_bytes: int = 0

    def ends_before(self, key: str, stem: str) -> bool:
        """Return whether a member with this key, and with this name without suffix, belongs to another group."""
        fill = max((len(self.photos) + len(self.sidecars)) / _MAX_SAMPLE, self.held_bytes / _MAX_SAMPLE_BYTES)
        return key != self.key or fill >= 2 or (fill >= 1 and stem != self.stem)


def tar_photos(file: File, prefix: str, max_bytes: int, account: Account) -> Iterator[Photo | Problem]:
    """Yield the images in a tar. Yield a `Problem` for each rejected member, and one if the tar is damaged. The id of
    an image is `prefix` followed by the member's name. Members that are not images are counted in `account`."""
    try:
        with file.open() as raw:
            reader = _TarReader(file, prefix, max_bytes, TarStream(raw), account)
            yield from reader.photos()
            if reader.by_position and not _has_end_mark(raw, reader.offset):
                yield Problem(file.address, "the tar has no end mark: it may be truncated, or damaged at this point")
    except Unpackable as error:
        yield Problem(file.address, f"the rest of the tar was not read: {error}")
    except _DAMAGED as error:
        yield Problem(file.address, f"the tar is damaged or truncated: {error}; the images before this point were read")


def _has_end_mark(raw: BinaryIO, offset: int) -> bool:
    """Return whether the block at `offset` contains only zeros. Such a block marks the end of a tar. This check is
    needed because tarfile reports no error when a header is damaged or missing."""
    raw.seek(offset)
    block = raw.read(tarfile.BLOCKSIZE)
    return len(block) == tarfile.BLOCKSIZE and not any(block)


class _TarReader:
    """A reader that goes through the members of a tar once and groups them into images with metadata."""

    def __init__(self, file: File, prefix: str, max_bytes: int, stream: TarStream, account: Account) -> None:
        self._file = file
        self._prefix = prefix
        self._max_bytes = max_bytes
        self._stream = stream
        self._account = account
        self.by_position = file.place.is_local and not stream.is_compressed
        self.offset = 0
        """The position of the next header."""

    def _members(self) -> Iterator[tarfile.TarInfo]:
        """Yield the members of the tar.

        Raises:
            Unpackable: there are too many of them, or see `TarStream`.
        """
        with tarfile.open(fileobj=cast(BinaryIO, self._stream), mode="r:") as tar:
            for _ in range(MAX_MEMBERS):
                self._stream.allow(MAX_HEADER_BYTES)
                member = tar.next()
                self.offset = tar.offset
                if member is None:
                    return
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile's list would grow with every member
                tar.pax_headers = {}  # and so would the attributes that apply to all members
                yield member
        raise Unpackable(f"it has more than {MAX_MEMBERS:,} members")

    def photos(self) -> Iterator[Photo | Problem]:
        group = _Group()
        try:
            for member in self._members():
                name = posixpath.normpath(member.name)
                if member.isdir():
                    continue
                is_json = suffix_of(name) == ".json"
                if any(part[:1] == "." and part != ".." for part in name.split("/")):
                    self._ignore(HIDDEN)
                    continue
                if suffix_of(name) in OTHER_SUFFIXES and not is_json:
                    self._ignore(suffix_of(name))
                    continue
                reason = self._refused(member, name)
                if reason is not None:
                    yield Problem(self._address(name), reason)
                    continue
                stem, key = sample_names(name)[0], sample_names(name)[-1]
                if group.ends_before(key, stem):
                    yield from self._of(group)
                    group = _Group(key)
                group.stem = stem
                read, held = self._reader(member)
                group.held_bytes += held
                if is_json:
                    group.sidecars[stem] = (name, read)
                elif (kind := self._ignored_as(member, name, read)) is not None:
                    self._ignore(kind)
                else:
                    group.photos.append((member, name, read, held))
        except _DAMAGED:
            yield from self._of(group)
            raise
        yield from self._of(group)

    def _ignore(self, kind: str) -> None:
        ignored = self._account.ignored
        ignored[kind if kind in ignored or len(ignored) < _MAX_KINDS else _OTHER_KINDS] += 1

    def _refused(self, member: tarfile.TarInfo, name: str) -> str | None:
        if len(name) > _MAX_NAME:
            return f"the name has {len(name)} characters; the limit is {_MAX_NAME}"
        if name.startswith("/") or ".." in name.split("/"):
            return "the name points outside the archive"
        if not member.isreg() or member.issparse() or member.size < 0:
            return "not a plain file"
        limit = MAX_SIDECAR_BYTES if suffix_of(name) == ".json" else self._max_bytes
        return f"has {member.size} bytes; the limit is {limit}" if member.size > limit else None

    def _ignored_as(self, member: tarfile.TarInfo, name: str, read: Read) -> str | None:
        head = partial(_read_at, self._file, member.offset_data, min(member.size, HEAD_BYTES))
        return ignored_as(posixpath.basename(name), head if self.by_position else read)

    def _reader(self, member: tarfile.TarInfo) -> tuple[Read, int]:
        """Return two values: a function that returns the member's bytes, and the number of bytes that this function
        keeps in memory. The number is 0 if the function reads the bytes from the file when it is called."""
        if self.by_position:
            return partial(_read_at, self._file, member.offset_data, member.size), 0
        self._stream.allow(member.size)
        self._stream.seek(member.offset_data)
        data = self._stream.read(member.size)
        if len(data) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        return (lambda: data), len(data)

    def _of(self, group: _Group) -> Iterator[Photo | Problem]:
        found = [(photo, _sidecar_of(photo[1], group.sidecars)) for photo in group.photos]
        used = {sidecar[0] for _, sidecar in found if sidecar is not None}
        self._account.ignored.update({".json": len(used)} if used else {})
        for name, _ in group.sidecars.values():
            if name not in used:
                reason = "metadata without an image: x.jpg and x.json must be adjacent in the tar (tar --sort=name)"
                yield Problem(self._address(name), reason)
        for (member, name, read, held), sidecar in found:
            yield Photo(
                id=f"{self._prefix}{name}",
                source=self._address(name),
                load=partial(_content, read, sidecar),
                stamp={"bytes": member.size, "modified": iso_time(member.mtime)},
                held_bytes=held,
            )

    def _address(self, name: str) -> str:
        """Return the address of a member as a chained URL, `tar://member::archive`, which fsspec can open. A name that
        is refused because of its length is cut."""
        return f"tar://{name[:_MAX_NAME]}::{self._file.address}"


def _sidecar_of(name: str, sidecars: Mapping[str, tuple[str, Read]]) -> tuple[str, Read] | None:
    """Return the JSON file that contains the metadata of the image `name`, or None. If there are several, such as
    `x.left.json` and `x.json` for `x.left.jpg`, return the one with the longest name."""
    return next((sidecars[other] for other in sample_names(name) if other in sidecars), None)


def _content(read: Read, sidecar: tuple[str, Read] | None) -> Content:
    metadata = json_object(sidecar[1](), sidecar[0]) if sidecar is not None else {}
    return Content(read(), metadata)


def _read_at(file: File, offset: int, size: int) -> bytes:
    with file.open() as raw:
        raw.seek(offset)
        data = raw.read(size)
    if len(data) < size:
        raise OSError(f"the tar is truncated: it contains only {len(data)} of the member's {size} bytes")
    return data
