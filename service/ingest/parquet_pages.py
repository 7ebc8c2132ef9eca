"""Find out how much memory a row group of a Parquet file can need before it is read.

A row group says how large its columns are, but a file from elsewhere can be wrong about that, and a value in a
dictionary counts once even if a million rows repeat it. So the headers of the pages are read, which say how large each
page really becomes, and how long the values in its dictionary are. They are structs of Thrift's compact protocol.

Source: https://github.com/apache/parquet-format (README.md, src/main/thrift/parquet.thrift, Encodings.md)
"""

import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, NamedTuple

MAX_OPEN_BYTES: Final = 2**30
"""The highest size of the pages that are in memory at the same time: one of each column, and its dictionary."""
FREE_PAGE_BYTES: Final = 64 * 2**20
MAX_PAGE_RATIO: Final = 20
"""A page may have FREE_PAGE_BYTES, plus MAX_PAGE_RATIO times as many bytes as it takes in the file."""
MAX_LIST_BYTES: Final = 256 * 2**20
"""The highest size of all lists of a column in a row group. A single row can contain all of them."""
BATCH_BYTES: Final = 128 * 2**20
_MAX_HEADER: Final = 2**16
_MAX_DEPTH: Final = 16
_DICTIONARY_PAGE, _DELTA_BYTE_ARRAY = 2, 7
_WIDTH: Final = 16  # of a number in memory, at most
_CODECS: Final = {"LZ4": "lz4_raw"}  # Parquet's names that differ from those of pyarrow

Fields = dict[int, Any]


class TooLarge(ValueError):
    """The error raised when a row group can need too much memory. The message says why."""


@dataclass
class Column:
    """The pages of one column in a row group. Sizes are in bytes, after decompression."""

    path: str
    is_nested: bool
    total: int = 0
    largest: int = 0  # page, without the dictionary
    dictionary: int = 0
    longest: int = 0  # value that a row can repeat without taking space in a page
    values: int = 0

    def needs(self, rows: int) -> int:
        """Return the memory that `rows` rows can need at most."""
        if self.is_nested:
            return self.total + self.values * (self.longest + 8)
        return rows * self.longest + min(self.total, (rows + 1) * self.largest)


class RowGroup:
    """The pages of the columns with these names in a row group.

    Args:
        table: a `pyarrow.parquet.ParquetFile`.
        file: the same file, opened a second time.

    Raises:
        TooLarge: a page or a list can need too much memory.
        ValueError: the headers of the pages are damaged.
    """

    def __init__(self, table: Any, file: BinaryIO, group: int, names: Collection[str]) -> None:
        size = file.seek(0, 2)
        chunks = table.metadata.row_group(group)
        self.columns: dict[str, list[Column]] = {name: [] for name in names}
        for index in range(chunks.num_columns):
            chunk, description = chunks.column(index), table.schema.column(index)
            for name in names:
                if chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}."):
                    self.columns[name].append(_read_column(file, size, chunk, description))
        open_bytes = sum(c.largest + c.dictionary for c in self._of(names))
        if open_bytes > MAX_OPEN_BYTES:
            raise TooLarge(f"its pages have {open_bytes:,} bytes in row group {group}; the limit is {MAX_OPEN_BYTES:,}")
        for column in self._of(names):
            if column.is_nested and column.needs(1) > MAX_LIST_BYTES:
                raise TooLarge(
                    f"the lists in column {column.path} can need {column.needs(1):,} bytes in row group {group}; the "
                    f"limit is {MAX_LIST_BYTES:,}: write the file with smaller row groups"
                )

    def _of(self, names: Collection[str]) -> list[Column]:
        return [column for name in names for column in self.columns[name]]

    def rows_at_once(self, names: Collection[str], choices: Sequence[int]) -> int:
        """Return the first number of rows in `choices` for which a batch of these columns fits into memory, or else the
        last."""
        columns = self._of(names)
        fitting = (rows for rows in choices if sum(c.needs(rows) for c in columns) <= BATCH_BYTES)
        return next(fitting, choices[-1])


def _read_column(file: BinaryIO, size: int, chunk: Any, description: Any) -> Column:
    """Read the headers of the pages of a column."""
    column = Column(chunk.path_in_schema, description.max_repetition_level > 0)
    is_text = description.physical_type == "BYTE_ARRAY"
    width = description.length if description.physical_type == "FIXED_LEN_BYTE_ARRAY" else _WIDTH
    for page in _pages(file, size, chunk):
        unpacked = page.unpacked
        if unpacked > FREE_PAGE_BYTES + MAX_PAGE_RATIO * page.packed:
            raise TooLarge(
                f"a page of column {column.path} unpacks from {page.packed:,} to {unpacked:,} bytes, which is more "
                f"than {MAX_PAGE_RATIO} times its size"
            )
        if page.kind == _DICTIONARY_PAGE:
            column.dictionary = max(column.dictionary, unpacked)
            file.seek(page.position)
            values = _unpacked(file.read(page.packed), unpacked, chunk.compression) if is_text else b""
            column.longest = max(column.longest, _longest(values) if is_text else min(width, unpacked))
            continue
        column.total += unpacked
        column.largest = max(column.largest, unpacked)
        column.values += page.values
        if page.encoding == _DELTA_BYTE_ARRAY:
            column.longest = max(column.longest, unpacked)  # a value can repeat the whole value before it
    return column


class Page(NamedTuple):
    """What the header of a page says. `unpacked` and `packed` are sizes in bytes, and `position` is that of the data in
    the file. `values` counts nulls too."""

    kind: int
    unpacked: int
    packed: int
    position: int
    values: int
    encoding: int


def _pages(file: BinaryIO, size: int, chunk: Any) -> Iterator[Page]:
    """Yield the pages of a column.

    Raises:
        ValueError: a header is damaged, or a page is truncated.
    """
    position, seen = chunk.data_page_offset, 0
    if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < position:
        position = chunk.dictionary_page_offset
    while seen < chunk.num_values and position < size:
        file.seek(position)
        header, length = _parse(file.read(_MAX_HEADER))
        version_1, version_2 = (header.get(number, {}) for number in (5, 8))
        try:
            page = Page(
                kind=header[1],
                unpacked=header[2],
                packed=header[3],
                position=position + length,
                values=version_1.get(1, 0) + version_2.get(1, 0),
                encoding=version_1.get(2, version_2.get(4, 0)),
            )
            is_whole = min(page.unpacked, page.packed, page.values) >= 0 and page.position + page.packed <= size
        except (AttributeError, KeyError, TypeError) as error:  # a field is missing, or has another type
            raise ValueError("the header of a page is damaged") from error
        if not is_whole:
            raise ValueError(f"a page of column {chunk.path_in_schema} is truncated")
        yield page
        position = page.position + page.packed
        seen += page.values


def _unpacked(data: bytes, size: int, codec: str) -> bytes:
    import pyarrow as pa

    if codec == "UNCOMPRESSED":
        return data
    return bytes(pa.decompress(data, size, _CODECS.get(codec, codec.lower()), asbytes=True))


def _longest(values: bytes) -> int:
    """Return the length of the longest value in a dictionary of byte arrays: each is its length and its bytes."""
    position, longest = 0, 0
    while position + 4 <= len(values):
        (length,) = struct.unpack_from("<I", values, position)
        longest = max(longest, length)
        position += 4 + length
    return min(longest, len(values))


# ---- Thrift's compact protocol


def _parse(data: bytes) -> tuple[Fields, int]:
    """Parse a struct, and return its fields by number and its length. Values that are not integers or structs are
    skipped.

    Raises:
        ValueError: the data is not such a struct.
    """
    try:
        return _Parser(data).parsed()
    except (IndexError, RecursionError) as error:
        raise ValueError("the header of a page is damaged") from error


class _Parser:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def parsed(self) -> tuple[Fields, int]:
        fields = self._struct(0)
        return fields, self._position

    def _byte(self) -> int:
        self._position += 1
        return self._data[self._position - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise IndexError

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _struct(self, depth: int) -> Fields:
        fields: Fields = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 0x0F, depth + 1)
        return fields

    def _value(self, kind: int, depth: int, *, in_list: bool = False) -> Any:
        if depth > _MAX_DEPTH:
            raise RecursionError
        if kind in (1, 2):  # a field's type is its value, but an element of a list has a byte
            return self._byte() == 1 if in_list else kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind in (7, 8):
            length = 8 if kind == 7 else self._varint()
            self._position += length
            if self._position > len(self._data):
                raise IndexError
        elif kind in (9, 10):
            head = self._byte()
            for _ in range(head >> 4 if head >> 4 < 15 else self._varint()):
                self._value(head & 0x0F, depth + 1, in_list=True)
        elif kind == 11:
            if count := self._varint():
                kinds = self._byte()
                for _ in range(count):
                    self._value(kinds >> 4, depth + 1, in_list=True)
                    self._value(kinds & 0x0F, depth + 1, in_list=True)
        elif kind == 12:
            return self._struct(depth)
        else:
            raise IndexError
        return None
