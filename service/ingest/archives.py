"""Read the images in tar and Parquet files for `dinov2 index`. Nothing is unpacked to disk.

Tar files follow the WebDataset convention: adjacent members with the same path up to the first dot of the file name
form a sample, and the member `x.json` contains the metadata of the sample's images, such as `x.jpg` and `x.left.jpg`.
An uncompressed tar on the local disk is read with seeks, so at most the first bytes of ignored members are read, and
several threads can read images at once. A compressed or remote tar is read once, from start to end.

In a Parquet file, one column contains the images (as bytes, or as {bytes, path} in files from Hugging Face) or their
addresses. The other columns become metadata. The image column is read a few rows at a time, and only from row groups
that contain an image to index.
"""

import base64
import datetime
import decimal
import json
import lzma
import math
import posixpath
import tarfile
import threading
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from model.folder import HEAD_BYTES, HIDDEN, OTHER_SUFFIXES, Account, ignored_as, sample_names, suffix_of
from service.errors import ImageTooLarge
from service.ingest.folders import Content, File, Photo, Problem, iso_time
from service.parquet import need_parquet

if TYPE_CHECKING:
    import pyarrow as pa

MAX_SIDECAR_BYTES: Final = 2**20
_ROWS: Final = 16
"""The number of rows of a Parquet file's image column that are read in one batch. A reader has up to `_BATCHES_KEPT`
batches in memory."""
_BATCHES_KEPT: Final = 4
ADDRESS_COLUMNS: Final = (
    "image",
    "photo",
    "path",
    "uri",
    "url",
    "file",
    "file_name",
    "filename",
    "image_path",
    "image_url",
)
_MAX_SAMPLE: Final = 64
"""A sample with this number of images ends before the next member with another name. This limits the memory, because
all images of a sample in a compressed tar are in memory at the same time."""
_DAMAGED: Final = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)

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


# ---- tar


@dataclass
class _Group:
    """Adjacent members of a tar that form a sample: images, and JSON files with their metadata. `key` is the path that
    the members share, up to the first dot of the file name."""

    key: str = ""
    stem: str = ""  # the name of the last member, without its suffix
    photos: list[tuple[tarfile.TarInfo, str, Read, int]] = field(default_factory=list)  # (member, name, reader, bytes)
    sidecars: dict[str, tuple[str, Read]] = field(default_factory=dict)  # (name, reader) for each name without suffix


def tar_photos(file: File, prefix: str, max_bytes: int, account: Account) -> Iterator[Photo | Problem]:
    """Yield the images in a tar. Yield a `Problem` for each rejected member, and one if the tar is damaged. The id of
    an image is `prefix` followed by the member's name. Members that are not images are counted in `account`."""
    by_position = file.place.is_local and suffix_of(file.name) == ".tar"
    try:
        with file.open() as raw, tarfile.open(fileobj=raw, mode="r:" if by_position else "r|*") as tar:
            yield from _TarReader(file, prefix, max_bytes, tar, by_position, account).photos()
            if by_position and not _has_end_mark(raw, tar.offset):
                yield Problem(file.address, "the tar has no end mark: it may be truncated, or damaged at this point")
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

    def __init__(
        self, file: File, prefix: str, max_bytes: int, tar: tarfile.TarFile, by_position: bool, account: Account
    ) -> None:
        self._file = file
        self._prefix = prefix
        self._max_bytes = max_bytes
        self._tar = tar
        self._by_position = by_position
        self._account = account

    def photos(self) -> Iterator[Photo | Problem]:
        group = _Group()
        try:
            while (member := self._tar.next()) is not None:
                self._tar.members.clear()  # type: ignore[attr-defined]  # tarfile's list would grow with every member
                name = posixpath.normpath(member.name)
                if member.isdir():
                    continue
                is_json = suffix_of(name) == ".json"
                if any(part[:1] == "." and part != ".." for part in name.split("/")):
                    self._account.ignored[HIDDEN] += 1
                    continue
                if suffix_of(name) in OTHER_SUFFIXES and not is_json:
                    self._account.ignored[suffix_of(name)] += 1
                    continue
                reason = self._refused(member, name)
                if reason is not None:
                    yield Problem(self._address(name), reason)
                    continue
                stem, key = sample_names(name)[0], sample_names(name)[-1]
                if key != group.key or (len(group.photos) >= _MAX_SAMPLE and stem != group.stem):
                    yield from self._of(group)
                    group = _Group(key)
                group.stem = stem
                read, held = self._reader(member)
                if is_json:
                    group.sidecars[stem] = (name, read)
                elif (kind := self._ignored_as(member, name, read)) is not None:
                    self._account.ignored[kind] += 1
                else:
                    group.photos.append((member, name, read, held))
        except _DAMAGED:
            yield from self._of(group)
            raise
        yield from self._of(group)

    def _refused(self, member: tarfile.TarInfo, name: str) -> str | None:
        if name.startswith("/") or ".." in name.split("/"):
            return "the name points outside the archive"
        if not member.isreg() or member.issparse():
            return "not a plain file"
        limit = MAX_SIDECAR_BYTES if suffix_of(name) == ".json" else self._max_bytes
        return f"has {member.size} bytes; the limit is {limit}" if member.size > limit else None

    def _ignored_as(self, member: tarfile.TarInfo, name: str, read: Read) -> str | None:
        head = partial(_read_at, self._file, member.offset_data, min(member.size, HEAD_BYTES))
        return ignored_as(posixpath.basename(name), head if self._by_position else read)

    def _reader(self, member: tarfile.TarInfo) -> tuple[Read, int]:
        """Return two values: a function that returns the member's bytes, and the number of bytes that this function
        keeps in memory. The number is 0 if the function reads the bytes from the file when it is called."""
        if self._by_position:
            return partial(_read_at, self._file, member.offset_data, member.size), 0
        stream = self._tar.extractfile(member)
        data = stream.read() if stream is not None else b""
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
        """Return the address of a member as a chained URL, `tar://member::archive`, which fsspec can open."""
        return f"tar://{name}::{self._file.address}"


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


# ---- Parquet


def parquet_photos(
    file: File, wanted: str | None, max_bytes: int, at_uri: Callable[[str, dict[str, Any]], Photo | Problem]
) -> Iterator[Photo | Problem]:
    """Yield the images of a Parquet file. If the file cannot be read, yield a `Problem`.

    If the image column contains bytes, the id of an image is `NAME#ROW`: the name of the file and the row number,
    counted from 0. If the column contains addresses, call `at_uri` with each address and the metadata of its row, and
    yield the result. For a row without an address, yield a `Problem`.

    Args:
        wanted: the name of the image column. If it is None, the column is detected.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
    """
    pq = need_parquet()
    import pyarrow as pa

    try:
        with file.open() as raw, pq.ParquetFile(raw) as table:
            column = image_column(table.schema_arrow, wanted)
            is_text = _is_text(table.schema_arrow.field(column).type)
            images = _Images(file, column)
            names = [name for name in _metadata_columns(table.schema_arrow) if is_text or name != column]
            row = 0
            for group in range(table.num_row_groups):
                done = 0
                for fields in _rows(table, group, names):
                    metadata = {name: fields[name] for name in names if name != column and fields[name] is not None}
                    if not is_text:
                        load = partial(_row_content, images, group, done, metadata, max_bytes)
                        yield Photo(f"{file.name}#{row}", f"{file.address}#{row}", load, None)
                    elif not fields[column]:
                        yield Problem(f"{file.address}#{row}", "the row has no address")
                    else:
                        yield at_uri(fields[column], metadata)
                    row, done = row + 1, done + 1
    except (pa.ArrowException, OSError, ValueError) as error:
        yield Problem(file.address, f"the Parquet file cannot be read: {error}")


def image_column(schema: "pa.Schema", wanted: str | None) -> str:
    """Return the name of the column that contains the images or their addresses.

    If `wanted` is not None, return it. Otherwise, return the only column that contains bytes, or the column `image` if
    several columns contain bytes. If no column contains bytes, return a text column with a common name such as `path`
    or `url`.

    Raises:
        ValueError: the column `wanted` does not exist or has an unsuitable type, or no column could be detected.
    """
    listed = ", ".join(schema.names)
    if wanted is not None:
        if wanted not in schema.names:
            raise ValueError(f"no column {wanted!r}; the columns are {listed}")
        if not _holds_bytes(schema.field(wanted).type) and not _is_text(schema.field(wanted).type):
            raise ValueError(f"column {wanted!r} is {schema.field(wanted).type}, which is neither images nor addresses")
        return wanted
    candidates = [name for name in schema.names if _holds_bytes(schema.field(name).type)]
    if len(candidates) > 1 and "image" in candidates:
        return "image"
    if len(candidates) > 1:
        raise ValueError(f"several columns may contain images: {', '.join(candidates)}; choose one with --image-column")
    if candidates:
        return str(candidates[0])
    for name in ADDRESS_COLUMNS:
        if name in schema.names and _is_text(schema.field(name).type):
            return name
    raise ValueError(f"no image column among {listed}; choose one with --image-column")


def _holds_bytes(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(part.name == "bytes" and _holds_bytes(part.type) for part in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _metadata_columns(schema: "pa.Schema") -> list[str]:
    return [name for name in schema.names if not _holds_bytes(schema.field(name).type)]


def _rows(table: Any, group: int, names: list[str]) -> Iterator[dict[str, Any]]:
    if not names:
        for _ in range(table.metadata.row_group(group).num_rows):
            yield {}
        return
    for batch in table.iter_batches(256, row_groups=[group], columns=names, use_threads=False):
        for fields in batch.to_pylist():
            yield {name: plain(value) for name, value in fields.items()}


def plain(value: Any) -> Any:
    """Convert a value from a table to one that JSON can represent, including the values in lists and dicts.

    Dates and times become ISO 8601 strings, bytes become base64 strings, and decimals become floats. A float or decimal
    that is not finite becomes None. Any other value that JSON does not support becomes the string `str(value)`.
    """
    if isinstance(value, dict):
        return {str(key): plain(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [plain(below) for below in value]
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, decimal.Decimal):
        return float(value) if value.is_finite() else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


class _Images:
    """A reader of the image column of a Parquet file. Several threads request images in roughly ascending order, so the
    reader caches only the last few batches of rows."""

    def __init__(self, file: File, column: str) -> None:
        self._file = file
        self._column = column
        self._lock = threading.Lock()
        self._table: Any = None
        self._group = -1
        self._next = 0  # first row of the next batch
        self._batches: Iterator[Any] = iter(())
        self._kept: deque[tuple[int, int, Any]] = deque(maxlen=_BATCHES_KEPT)  # group, first row, batch

    def get(self, group: int, row: int) -> Any:
        """Return the value of the image column at row `row` of row group `group`, or None if the value is null.

        Raises:
            OSError: the row group has no such row.
        """
        with self._lock:
            while True:
                for kept_group, first, batch in self._kept:
                    if kept_group == group and first <= row < first + batch.num_rows:
                        return batch.column(0)[row - first].as_py()
                if group != self._group or row < self._next:  # another row group, or a row that is no longer cached
                    self._start(group)
                batch = next(self._batches, None)
                if batch is None:
                    self._group = -1
                    raise OSError("the Parquet file is damaged: rows are missing")
                self._kept.append((group, self._next, batch))
                self._next += batch.num_rows

    def _start(self, group: int) -> None:
        if self._table is None:
            raw = self._file.open()
            weakref.finalize(self, raw.close)  # closes the file once no image needs this object
            self._table = need_parquet().ParquetFile(raw, pre_buffer=False, buffer_size=2**20)
        self._batches = self._table.iter_batches(_ROWS, row_groups=[group], columns=[self._column], use_threads=False)
        self._group, self._next = group, 0


def _row_content(images: _Images, group: int, row: int, metadata: dict[str, Any], max_bytes: int) -> Content:
    import pyarrow as pa

    try:
        value = images.get(group, row)
    except pa.ArrowException as error:
        raise OSError(f"the Parquet file is damaged: {error}") from error
    if isinstance(value, dict):
        if isinstance(value.get("path"), str):
            metadata = {"path": value["path"], **metadata}
        value = value.get("bytes")
    if value is None:
        raise ValueError("the row has no image")
    if len(value) > max_bytes:
        raise ImageTooLarge(f"the image has {len(value)} bytes; the limit is {max_bytes}")
    return Content(value, metadata)
