"""Items of the embedded store as they are read from the database: whole, by filter, page by page."""

import sqlite3
from collections.abc import Sequence
from typing import Any, Final

import orjson

from service.errors import InvalidRequest, StorageFailed
from service.search import database
from service.search.database import Row
from service.search.filter_sql import to_sql
from service.search.filters import Filter
from service.search.store import Item

_PAGE: Final = 1000
"""Items that one transaction deletes by filter: others may write in between."""
ITEM: Final = "i.number, i.id, i.metadata, i.source, i.digest"
"""The columns that `items_of` takes."""


def number_after(cursor: str | None) -> int:
    """The number that a cursor continues behind."""
    if cursor is None:
        return 0
    digits = cursor.removeprefix("n")
    if digits == cursor or not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        raise InvalidRequest(f"cursor {cursor[:80]!r} is none of this store's", param="cursor")
    return int(digits)


def items_of(db: sqlite3.Connection, row: Row, rows: Sequence[tuple[Any, ...]]) -> list[Item]:
    """Items of rows (number, id, metadata, source, digest), with their vectors."""
    query = f"SELECT number, vector, crc FROM vectors_{row.key} WHERE number = ?"
    vectors = [db.execute(query, (columns[0],)).fetchone() for columns in rows]
    if None in vectors:
        raise StorageFailed("the vector store is damaged: an item has no vector")
    matrix = database.vectors_of(row, vectors)[1]
    return [
        Item(item_id, vector, metadata_of(item_id, text), source, digest)
        for (_, item_id, text, source, digest), vector in zip(rows, matrix, strict=True)
    ]


def metadata_of(item_id: str, text: Any) -> dict[str, Any]:
    """What `metadata_text` has made, unless the file was damaged since."""
    try:
        metadata = orjson.loads(text)
        if not isinstance(metadata, dict):
            raise ValueError(f"a JSON object was stored, and it is {type(metadata).__name__}")
    except (TypeError, ValueError) as error:
        raise StorageFailed(f"the vector store is damaged: the metadata of item {item_id!r} is broken") from error
    return metadata


def condition_of(where: Filter | None) -> tuple[str, list[Any]]:
    return ("1", []) if where is None else to_sql(where)


def delete_some(db: sqlite3.Connection, row: Row, where: Filter, after: int, to: int) -> tuple[int, int]:
    """Delete the next of what passes; how many, and up to which number it has looked."""
    database.check_exists(db, row)
    condition, parameters = to_sql(where)
    query = f"SELECT number FROM items_{row.key} WHERE number > ? AND number <= ? AND {condition} ORDER BY 1 LIMIT ?"
    numbers = [number for (number,) in db.execute(query, (after, to, *parameters, _PAGE))]
    return database.remove(db, row.key, numbers), numbers[-1] if len(numbers) == _PAGE else to
