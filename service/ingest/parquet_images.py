"""Read the images in Parquet files for `dinov2 index`.

One column contains the images (as bytes, or as {bytes, path} in files from Hugging Face) or their addresses. The other
columns become metadata. The image column is read a few rows at a time, and only from row groups that contain an image
to index. `service/ingest/parquet_pages.py` limits what a row group may cost, and decides how many rows are read at
once.
"""

import base64
import datetime
import decimal
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from service.errors import ImageTooLarge
from service.ingest.folders import Content, File, Photo, Problem
from service.ingest.parquet_pages import RowGroup, TooLarge
from service.ingest.unpacking import MAX_MEMBERS, MAX_SIDECAR_BYTES
from service.parquet import need_parquet

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS: Final = (16, 4, 1)
"""The numbers of rows of the image column that may be read in one batch. A reader has up to `_BATCHES_KEPT` batches in
memory."""
_METADATA_ROWS: Final = (256, 64, 16, 4, 1)
_BATCHES_KEPT: Final = 4
_KEPT_BYTES: Final = 128 * 2**20
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
            most = min(MAX_MEMBERS, raw.seek(0, 2))  # an image or an address takes more than a byte
            row = 0
            for group in range(table.num_row_groups):
                pages = RowGroup(table, raw, group, {*names, column})
                images.rows_at_once[group] = pages.rows_at_once([column], _ROWS)
                done = 0
                for fields in _rows(table, group, names, pages.rows_at_once(names, _METADATA_ROWS)):
                    if row == most:
                        raise ValueError(f"it has more than {most:,} rows")
                    place = f"{file.address}#{row}"
                    row, done = row + 1, done + 1
                    if fields is None:
                        yield Problem(place, f"the metadata of the row has more than {MAX_SIDECAR_BYTES} bytes")
                        continue
                    metadata = {name: fields[name] for name in names if name != column and fields[name] is not None}
                    if not is_text:
                        load = partial(_row_content, images, group, done - 1, metadata, max_bytes)
                        yield Photo(f"{file.name}#{row - 1}", place, load, None)
                    elif not fields[column]:
                        yield Problem(place, "the row has no address")
                    else:
                        yield at_uri(fields[column], metadata)
    except TooLarge as error:
        yield Problem(file.address, f"the rest of the Parquet file was not read: {error}")
    except (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError) as error:
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
        return any(part.name == "bytes" and _is_binary(part.type) for part in kind)
    return _is_binary(kind)


def _is_binary(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _metadata_columns(schema: "pa.Schema") -> list[str]:
    return [name for name in schema.names if not _holds_bytes(schema.field(name).type)]


def _rows(table: Any, group: int, names: list[str], at_once: int) -> Iterator[dict[str, Any] | None]:
    """Yield the fields of each row of a row group, or None for a row whose fields are too large for metadata."""
    if not names:
        for _ in range(table.metadata.row_group(group).num_rows):
            yield {}
        return
    for batch in table.iter_batches(at_once, row_groups=[group], columns=names, use_threads=False):
        parts = [batch] if batch.nbytes <= MAX_SIDECAR_BYTES else [batch.slice(row, 1) for row in range(len(batch))]
        for part in parts:
            if part.nbytes > MAX_SIDECAR_BYTES:
                yield None
                continue
            for fields in part.to_pylist():
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
        self.rows_at_once: dict[int, int] = {}  # by row group
        self._kept: deque[tuple[int, int, Any]] = deque(maxlen=_BATCHES_KEPT)  # group, first row, batch

    def get(self, group: int, row: int) -> "pa.Scalar[Any]":
        """Return the value of the image column at row `row` of row group `group`, which may be null.

        Raises:
            OSError: the row group has no such row.
        """
        with self._lock:
            while True:
                for kept_group, first, batch in self._kept:
                    if kept_group == group and first <= row < first + batch.num_rows:
                        return batch.column(0)[row - first]
                if group != self._group or row < self._next:  # another row group, or a row that is no longer cached
                    self._start(group)
                batch = next(self._batches, None)
                if batch is None:
                    self._group = -1
                    raise OSError("the Parquet file is damaged: rows are missing")
                self._kept.append((group, self._next, batch))
                while len(self._kept) > 1 and sum(kept.nbytes for _, _, kept in self._kept) > _KEPT_BYTES:
                    self._kept.popleft()
                self._next += batch.num_rows

    def _start(self, group: int) -> None:
        if self._table is None:
            raw = self._file.open()
            weakref.finalize(self, raw.close)  # closes the file once no image needs this object
            self._table = need_parquet().ParquetFile(raw, pre_buffer=False, buffer_size=2**20)
        rows = self.rows_at_once[group]
        self._batches = self._table.iter_batches(rows, row_groups=[group], columns=[self._column], use_threads=False)
        self._group, self._next = group, 0


def _row_content(images: _Images, group: int, row: int, metadata: dict[str, Any], max_bytes: int) -> Content:
    import pyarrow as pa

    try:
        value: Any = images.get(group, row)
        if value.is_valid and pa.types.is_struct(value.type):
            path = value["path"].as_py() if value.type.get_field_index("path") >= 0 else None
            metadata = {"path": path, **metadata} if isinstance(path, str) else metadata
            value = value["bytes"]
        data = value.as_buffer() if value.is_valid else None
    except pa.ArrowException as error:
        raise OSError(f"the Parquet file is damaged: {error}") from error
    if data is None:
        raise ValueError("the row has no image")
    if data.size > max_bytes:
        raise ImageTooLarge(f"the image has {data.size} bytes; the limit is {max_bytes}")
    return Content(data.to_pybytes(), metadata)
