"""Read lists of images for `dinov2 index`: .txt, .jsonl, .csv and .tsv files.

    .txt            one path or address per line
    .jsonl          one object per line; one of its fields is the path or address of the image
    .csv, .tsv      the first row names the columns; one of them contains paths or addresses

The other fields and columns are metadata. A list may be in UTF-8, with or without a byte order mark, or in UTF-16 with
one. Files with a byte order mark are common on Windows.
"""

import codecs
import csv
import io
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from model.folder import suffix_of
from service.ingest.archives import json_object
from service.ingest.folders import File, Problem
from service.ingest.parquet_images import ADDRESS_COLUMNS

LIST_SUFFIXES: Final = (".txt", ".jsonl", ".ndjson", ".csv", ".tsv")
_ADDRESS_KEYS: Final = (
    "image",
    "uri",
    "url",
    "path",
    "file_name",
    "source",
    "filename",
    "file",
    "image_path",
    "image_url",
)
"""The fields of a JSON line that may contain the address. Lines of Hugging Face's `metadata.jsonl` use `file_name`."""
_MAX_LINE_CHARACTERS: Final = 2**20


class Line(NamedTuple):
    """An image in a list. `where` is the position of its line. If `id` is None, `address` is also the image's id."""

    where: str
    address: str
    metadata: dict[str, Any]
    id: str | None = None


def read_list(file: File, image_column: str | None) -> Iterator[Line | Problem]:
    """Yield the lines of a list. Yield a `Problem` for each line that cannot be used, and one if the list cannot be
    read.

    Args:
        file: the list.
        image_column: the column of a .csv or .tsv file that contains paths or addresses. If it is None, the column is
            detected.
    """
    suffix = suffix_of(file.name)
    try:
        with file.open() as raw, _as_text(raw) as text:
            if suffix in (".csv", ".tsv"):
                yield from _rows(file, text, "\t" if suffix == ".tsv" else None, image_column)
            else:
                yield from _lines(file, text, is_json=suffix != ".txt")
    except (OSError, ValueError, csv.Error) as error:
        yield Problem(file.address, f"the list cannot be read: {error}")


def _as_text(raw: Any) -> io.TextIOWrapper:
    """Decode a list. A byte order mark decides between UTF-16 and UTF-8. Undecodable bytes become surrogates, so that
    only their line is refused."""
    is_utf16 = raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    raw.seek(0)
    return io.TextIOWrapper(raw, "utf-16" if is_utf16 else "utf-8-sig", errors="surrogateescape", newline="")


def _check_text(text: str) -> str:
    """Return a line without spaces and byte order marks at its ends.

    Raises:
        ValueError: the line contained bytes that are not UTF-8.
    """
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the line is not UTF-8")
    return text.strip("\ufeff \t\r\n")


def _lines(file: File, text: io.TextIOWrapper, *, is_json: bool) -> Iterator[Line | Problem]:
    number = 0
    while line := text.readline(_MAX_LINE_CHARACTERS + 1):
        number += 1
        where = f"{file.address}:{number}"
        if len(line) > _MAX_LINE_CHARACTERS:
            yield Problem(
                where, f"the line has more than {_MAX_LINE_CHARACTERS} characters; the rest of the file was not read"
            )
            return
        try:
            if stripped := _check_text(line):
                yield _json_line(where, stripped) if is_json else Line(where, stripped, {})
        except ValueError as error:
            yield Problem(where, str(error))


def _json_line(where: str, text: str) -> Line:
    fields = json_object(text, "the line")
    key = next((key for key in _ADDRESS_KEYS if isinstance(fields.get(key), str) and fields[key]), None)
    if key is None:
        raise ValueError(f"the line has no address of an image: add one of {', '.join(_ADDRESS_KEYS)}")
    address, item_id = fields.pop(key), fields.pop("id", None)
    if isinstance(item_id, int) and not isinstance(item_id, bool):
        item_id = str(item_id)
    if item_id is not None and not isinstance(item_id, str):
        raise ValueError(f"the id {item_id!r} is not a string or an integer")
    inner = fields.pop("metadata", {})
    if not isinstance(inner, dict):
        raise ValueError("the metadata is not a JSON object")
    return Line(where, address, {**fields, **inner}, item_id)


class _ShortLines:
    """The lines of a table, as an iterator. A row may have several lines, because a quoted cell may contain line ends.

    Raises:
        ValueError: a row has more than `_MAX_LINE_CHARACTERS` characters.
    """

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self._size = 0

    def begin_row(self) -> None:
        self._size = 0

    def __iter__(self) -> "_ShortLines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(_MAX_LINE_CHARACTERS + 1)
        self._size += len(line)
        if self._size > _MAX_LINE_CHARACTERS:
            raise ValueError(f"a row has more than {_MAX_LINE_CHARACTERS} characters; the rest was not read")
        if not line:
            raise StopIteration
        return line


def _rows(
    file: File, text: io.TextIOWrapper, delimiter: str | None, image_column: str | None
) -> Iterator[Line | Problem]:
    """Yield the rows of a table. All values are strings, and empty cells are left out.

    Raises:
        ValueError: the table has no column of addresses.
    """
    header = text.readline(_MAX_LINE_CHARACTERS)
    if delimiter is None:  # spreadsheets write semicolons where the comma separates decimals
        delimiter = ";" if ";" in header and "," not in header else ","
    names = [name.strip() for name in next(csv.reader([_check_text(header)], delimiter=delimiter), [])]
    wanted = ADDRESS_COLUMNS if image_column is None else (image_column,)
    column = next((name for name in wanted if name in names), None)
    if column is None:
        advice = "its first row must name the columns; choose the column of paths or addresses with --image-column"
        raise ValueError(f"no image column among {', '.join(names)[:200] or 'no columns'}; {advice}")
    lines = _ShortLines(text)
    rows = csv.reader(lines, delimiter=delimiter)
    for row in rows:
        lines.begin_row()
        where = f"{file.address}:{rows.line_num + 1}"
        fields = {name: value for name, value in zip(names, row, strict=False) if name and value}
        try:
            for value in row:
                _check_text(value)
        except ValueError as error:
            yield Problem(where, str(error))
            continue
        if column in fields:
            yield Line(where, fields.pop(column), fields, fields.pop("id", None))
        elif fields:
            yield Problem(where, f"the row has no {column}")
