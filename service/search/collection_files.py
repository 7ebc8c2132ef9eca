"""Readers and writers of the files that `dinov2 collections export` writes and `dinov2 collections import` reads.

Every exported file contains the settings (`spec`) of its collection, and the collection's tag, which identifies the
model that made the vectors. An import checks the tag, so vectors from different models are never mixed. The formats
are:

    .parquet   columns id, vector (float32, fixed size), metadata (JSON), source, digest; the schema's metadata contains
               tag and spec
    .npz       ids, vectors [n, D], fields (one JSON object per line, UTF-8), tag, spec; the reader also accepts the
               files that `dinov2 embed` writes
    .jsonl     a first line with tag and spec, then one item per line

All three formats preserve every vector bit for bit. JSON numbers are read as float64, which represents every float32
exactly. No reader unpickles data.

A reader first yields a `Head` and then lists of items. If the file is invalid, the reader raises a ValueError. If a
particular line or row is invalid, the error message contains its number.
"""

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
import orjson

from service.errors import InvalidRequest
from service.parquet import need_parquet
from service.search.checks import loads_exactly, may_have_lost_digits
from service.search.specs import check_spec
from service.search.store import CollectionInfo, CollectionSpec, Floats, IndexSpec, Item

BATCH: Final = 1000
_ROW_GROUP: Final = 8000
_MAX_LINE_BYTES: Final = 8 * 2**20


@dataclass(frozen=True)
class Head:
    """The tag and the settings of the collection in a file. Every reader yields a `Head` before the lists of items. A
    field is None if the file does not contain it."""

    tag: str | None
    spec: CollectionSpec | None


Read = Iterator[Head | list[Item]]


def spec_text(spec: CollectionSpec) -> str:
    return json.dumps(asdict(spec))


def spec_from(text: str) -> CollectionSpec:
    """Parse the settings of a collection from the text that `spec_text` returns.

    Raises:
        ValueError: the text cannot be parsed, or a setting is not allowed.
    """
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the collection's settings cannot be read: {error}") from error
    return _spec_of(settings)


def _spec_of(settings: Any) -> CollectionSpec:
    index = settings.get("index") if isinstance(settings, dict) else None
    if not isinstance(index, dict) or "tag" not in settings or "dimension" not in settings:
        raise ValueError("the collection's settings cannot be read: an object with tag, dimension and index is needed")
    unknown = [*(settings.keys() - _names_of(CollectionSpec)), *(index.keys() - _names_of(IndexSpec))]
    if unknown:
        raise ValueError(f"the collection's settings cannot be read: {reprlib.repr(min(unknown))} is not a setting")
    indexed = settings.get("indexed", [])
    indexed = tuple(indexed) if isinstance(indexed, list) else indexed
    try:
        return check_spec(CollectionSpec(**{**settings, "index": IndexSpec(**index), "indexed": indexed}))
    except InvalidRequest as error:
        raise ValueError(f"the collection's settings: {error.detail}") from error


def _names_of(kind: type[CollectionSpec] | type[IndexSpec]) -> set[str]:
    return {field.name for field in fields(kind)}


def _head(tag: Any, spec: CollectionSpec | None) -> Head:
    if spec is not None and str(tag) != spec.tag:
        raise ValueError(f"the tag {str(tag)!r} differs from the tag in the settings, {spec.tag!r}")
    return Head(str(tag) if tag is not None else None, spec)


# ---- Parquet


class ParquetWriter:
    def __init__(self, file: BinaryIO, info: CollectionInfo) -> None:
        self._pq = need_parquet()
        import pyarrow as pa

        self._pa = pa
        metadata = {"dinov2.tag": info.tag, "dinov2.spec": spec_text(info.spec), "dinov2.collection": info.name}
        self._schema = pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("vector", pa.list_(pa.float32(), info.dimension), nullable=False),
                pa.field("metadata", pa.string(), nullable=False),
                pa.field("source", pa.string()),
                pa.field("digest", pa.string()),
            ],
            metadata=metadata,
        )
        self._writer = self._pq.ParquetWriter(file, self._schema, compression="zstd")
        self._items: list[Item] = []

    def write(self, items: Sequence[Item]) -> None:
        self._items += items
        if len(self._items) >= _ROW_GROUP:
            self._flush()

    def abandon(self) -> None:
        """Close the writer after an error. The caller removes the file."""
        self._writer.close()

    def close(self) -> None:
        if self._items:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        pa, items = self._pa, self._items
        flat = np.concatenate([item.vector for item in items]).astype(np.float32, copy=False)
        columns = [
            pa.array([item.id for item in items], pa.string()),
            pa.FixedSizeListArray.from_arrays(pa.array(flat), type=self._schema.field("vector").type),
            pa.array([_json(dict(item.metadata)).decode() for item in items], pa.string()),
            pa.array([item.source for item in items], pa.string()),
            pa.array([item.digest for item in items], pa.string()),
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._items = []


def read_parquet(path: Path) -> Read:
    pq = need_parquet()
    import pyarrow as pa

    try:
        with pq.ParquetFile(path) as table:
            said = table.schema_arrow.metadata or {}
            tag, spec = (said[key].decode() if key in said else None for key in (b"dinov2.tag", b"dinov2.spec"))
            names = table.schema_arrow.names
            if missing := [name for name in ("id", "vector") if name not in names]:
                raise ValueError(f"there is no column {' or '.join(missing)}; the columns are {', '.join(names)}")
            kind = table.schema_arrow.field("vector").type
            if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
                raise ValueError(f"the vectors are of type {kind}, not lists of floats")
            yield _head(tag, spec_from(spec) if spec is not None else None)
            columns = [name for name in ("id", "vector", "metadata", "source", "digest") if name in names]
            row = 0
            for batch in table.iter_batches(BATCH, columns=columns):
                yield _parquet_items(batch, row)
                row += batch.num_rows
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _parquet_items(batch: Any, first_row: int) -> list[Item]:
    """Return the items of a batch of rows. Raises a ValueError if a row is invalid. The message contains the number of
    the row in the file, counted from 0."""
    n = batch.num_rows
    vectors = batch.column("vector")
    if batch.column("id").null_count or vectors.null_count:
        row = next(row for row in range(n) if not (batch.column("id")[row].is_valid and vectors[row].is_valid))
        raise ValueError(f"row {first_row + row} has no id or no vector")
    flat = vectors.flatten()
    dimension = len(flat) // n if n else 0
    lengths = vectors.value_lengths().to_numpy(zero_copy_only=False)
    if not (lengths == dimension).all() or not dimension:
        row = int(np.flatnonzero(lengths != dimension)[0]) if dimension else 0
        raise ValueError(
            f"row {first_row + row}: its vector has {lengths[row]} numbers, but other rows have another number"
        )
    if flat.null_count:
        raise ValueError(f"row {first_row + flat.is_null().index(True).as_py() // dimension}: its vector has a null")
    matrix = _floats(flat.to_numpy(zero_copy_only=False)).reshape(n, dimension)
    empty = [None] * n
    optional = {
        name: batch.column(name).to_pylist() if name in batch.schema.names else empty
        for name in ("metadata", "source", "digest")
    }
    ids = batch.column("id").to_pylist()
    return [
        _item(f"row {first_row + row}", ids[row], matrix[row], *(optional[name][row] for name in optional))
        for row in range(n)
    ]


# ---- npz


class NpzWriter:
    """A writer for .npz files. It collects all items in memory and writes them when it is closed, because a numpy
    archive cannot be extended."""

    def __init__(self, file: BinaryIO, info: CollectionInfo) -> None:
        self._file = file
        self._info = info
        self._ids: list[str] = []
        self._vectors: list[Floats] = []
        self._lines: list[bytes] = []

    def write(self, items: Sequence[Item]) -> None:
        for item in items:
            self._ids.append(item.id)
            self._vectors.append(item.vector)
            self._lines.append(
                _json({"metadata": dict(item.metadata), "source": item.source, "digest": item.digest}) + b"\n"
            )

    def abandon(self) -> None:
        return

    def close(self) -> None:
        vectors = np.stack(self._vectors) if self._vectors else np.zeros((0, self._info.dimension), np.float32)
        np.savez(
            self._file,
            allow_pickle=False,
            ids=np.array(self._ids, dtype=np.str_),
            vectors=vectors.astype(np.float32, copy=False),
            fields=np.frombuffer(b"".join(self._lines), np.uint8),
            tag=np.array(self._info.tag),
            spec=np.array(spec_text(self._info.spec)),
        )


def read_npz(path: Path) -> Read:
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise ValueError("the file is a single array, not an .npz")
        with opened as arrays:
            ids, vectors = _array(arrays, "ids", "paths"), _array(arrays, "vectors")
            tag, spec = (str(arrays[key]) if key in arrays.files else None for key in ("tag", "spec"))
            lines = arrays["fields"].tobytes().splitlines() if "fields" in arrays.files else None
        if (
            ids.ndim != 1
            or ids.dtype.kind != "U"
            or vectors.ndim != 2
            or len(ids) != len(vectors)
            or not vectors.shape[1]
        ):
            raise ValueError(f"ids {ids.dtype} {list(ids.shape)} and vectors {list(vectors.shape)} do not match")
        if lines is not None and len(lines) != len(ids):
            raise ValueError(f"there are {len(lines)} lines of fields but {len(ids)} ids")
        yield _head(tag, spec_from(spec) if spec is not None else None)
        floats = _floats(vectors)
        for start in range(0, len(ids), BATCH):
            items = []
            for row in range(start, min(start + BATCH, len(ids))):
                extras = _object(lines[row], f"fields of row {row}") if lines is not None else {}
                extra = (extras.get("metadata"), extras.get("source"), extras.get("digest"))
                items.append(_item(f"row {row}", str(ids[row]), floats[row], *extra))
            yield items
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    except Exception as error:  # damaged files raise errors of zipfile, zlib and numpy; some are SyntaxErrors
        raise ValueError(f"{path}: {error}") from error


def _array(arrays: Mapping[str, npt.NDArray[Any]], *names: str) -> npt.NDArray[Any]:
    for name in names:
        if name in arrays:
            return arrays[name]
    raise ValueError(f"there is no array {' or '.join(names)}")


# ---- JSON lines


class JsonlWriter:
    def __init__(self, file: BinaryIO, info: CollectionInfo) -> None:
        self._file = file
        head = {"collection": info.name, "tag": info.tag, "spec": asdict(info.spec)}
        self._file.write(_json(head) + b"\n")

    def write(self, items: Sequence[Item]) -> None:
        for item in items:
            body = {
                "id": item.id,
                "vector": item.vector.astype(np.float64),  # float64 represents every float32 exactly
                "metadata": dict(item.metadata),
                "source": item.source,
                "digest": item.digest,
            }
            self._file.write(_json(body) + b"\n")

    def abandon(self) -> None:
        return

    def close(self) -> None:
        return


def read_jsonl(path: Path) -> Read:
    with path.open("rb") as file:
        lines = _lines(file, path)
        first = next(lines, None)
        if first is None:
            raise ValueError(f"{path}: the file is empty")
        is_head = "id" not in first[1] and "spec" in first[1]
        try:
            head = _head(first[1].get("tag"), _spec_of(first[1]["spec"])) if is_head else Head(None, None)
        except ValueError as error:
            raise ValueError(f"{first[0]}: {error}") from error
        yield head
        items = [] if is_head else [_jsonl_item(*first)]
        try:
            for where, body in lines:
                items.append(_jsonl_item(where, body))
                if len(items) == BATCH:
                    yield items
                    items = []
        except ValueError:
            if items:  # the items before the invalid line
                yield items
            raise
        if items:
            yield items


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each line that is not blank, yield its location (the path and line number, for error messages) and its JSON
    object."""
    number = 0
    while line := file.readline(_MAX_LINE_BYTES + 1):
        number += 1
        where = f"{path}: line {number}"
        if len(line) > _MAX_LINE_BYTES:
            raise ValueError(f"{where}: longer than {_MAX_LINE_BYTES} bytes")
        if line.strip():
            yield where, _object(line, where)


def _jsonl_item(where: str, body: dict[str, Any]) -> Item:
    try:
        vector = _floats(np.asarray(body.get("vector"), np.float64))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: its vector is not a list of numbers") from error
    if vector.ndim != 1:
        raise ValueError(f"{where}: its vector is not a list of numbers")
    return _item(where, body.get("id"), vector, body.get("metadata"), body.get("source"), body.get("digest"))


# ---- items


def _json(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _object(line: bytes | str, where: str) -> dict[str, Any]:
    try:
        value = orjson.loads(line)
        fields = value.items() if isinstance(value, dict) else ()
        if may_have_lost_digits([part for name, part in fields if name != "vector"]):
            value = loads_exactly(line)
    except ValueError:
        try:
            value = loads_exactly(line)  # accepts NaN, so a later error can name the field
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object")
    return value


def _floats(values: npt.NDArray[Any]) -> Floats:
    if values.dtype.kind != "f":
        raise ValueError(f"vectors are {values.dtype}, not floats")
    return values.astype(np.float32, copy=False)


def _item(where: str, item_id: Any, vector: Floats, metadata: Any, source: Any, digest: Any) -> Item:
    """Build an item from values that were read from a file. Raises a ValueError if a value has the wrong type. The
    error message begins with `where`.

    `metadata` is a dictionary, the text of a JSON object, or None.
    """
    if isinstance(metadata, str):
        metadata = _object(metadata, f"{where}: metadata")
    if not isinstance(item_id, str):
        raise ValueError(f"{where}: its id is not a string")
    if (
        not isinstance(metadata, dict | None)
        or not isinstance(source, str | None)
        or not isinstance(digest, str | None)
    ):
        raise ValueError(f"{where}: metadata must be an object; source and digest must be strings")
    return Item(item_id, vector, metadata or {}, source, digest)
