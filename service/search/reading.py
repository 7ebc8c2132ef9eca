"""Reads items from the embedded store's database, and deletes items that pass a filter, one page at a time."""

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
"""The highest number of items that `delete_some` deletes in one transaction. Other writes can run between two
transactions."""
ITEM: Final = "i.number, i.id, i.metadata, i.source, i.digest"
"""The columns that `items_of` expects."""


def number_after(cursor: str | None) -> int:
    """Return the item number that a cursor contains. The page for this cursor begins after this number. If the cursor
    is None, return 0. Raises InvalidRequest if the cursor is not from this store."""
    if cursor is None:
        return 0
    digits = cursor.removeprefix("n")
    if digits == cursor or not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        raise InvalidRequest(f"cursor {cursor[:80]!r} is not from this store", param="cursor")
    return int(digits)


def items_of(db: sqlite3.Connection, row: Row, rows: Sequence[tuple[Any, ...]]) -> list[Item]:
    """Convert rows (number, id, metadata, source, digest) to items. The vectors are read from the database."""
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
    """Parse the stored metadata of an item. Raises StorageFailed if the text is damaged."""
    try:
        metadata = orjson.loads(text)
        if not isinstance(metadata, dict):
            raise ValueError(f"the stored metadata must be a JSON object, not {type(metadata).__name__}")
    except (TypeError, ValueError) as error:
        raise StorageFailed(f"the vector store is damaged: the metadata of item {item_id!r} is broken") from error
    return metadata


def condition_of(where: Filter | None) -> tuple[str, list[Any]]:
    return ("1", []) if where is None else to_sql(where)


def delete_some(db: sqlite3.Connection, row: Row, where: Filter, after: int, to: int) -> tuple[int, int]:
    """Delete one page of the items that pass a filter: those with the lowest numbers above `after` and up to `to`.

    Returns:
        The number of items that were deleted, and the last item number that was checked.
    """
    database.check_exists(db, row)
    condition, parameters = to_sql(where)
    query = f"SELECT number FROM items_{row.key} WHERE number > ? AND number <= ? AND {condition} ORDER BY 1 LIMIT ?"
    numbers = [number for (number,) in db.execute(query, (after, to, *parameters, _PAGE))]
    return database.remove(db, row.key, numbers), numbers[-1] if len(numbers) == _PAGE else to
