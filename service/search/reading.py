"""Reads items from the embedded store's database page by page, counts the values of a metadata key, and deletes items
that pass a filter, one page at a time."""

import sqlite3
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import orjson

from service.errors import InvalidRequest, StorageDamaged
from service.search import database, partners
from service.search.database import Row
from service.search.filter_sql import json_path, to_sql
from service.search.filters import Filter
from service.search.filters import Path as MetadataPath
from service.search.store import Facet, Facets, Item, Page

_PAGE: Final = 1000
"""The highest number of items that `choose_some` chooses and `delete_chosen` deletes. Other writes can run between two
transactions."""
ITEM: Final = "i.number, i.id, i.metadata, i.source, i.digest"
"""The columns that `items_of` expects."""


def key_in(cursor: str | None) -> tuple[int | None, str | None]:
    """Return the key of the collection that a cursor contains, and the rest of the cursor. The key of a cursor without
    one is None."""
    key, dot, rest = (cursor or "").partition(".")
    if not dot or not key.isascii() or not key.isdigit() or len(key) > 18:
        return None, cursor
    return int(key), rest


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
        raise StorageDamaged("the vector store is damaged: an item has no vector")
    matrix = database.vectors_of(row, vectors)[1]
    return [
        Item(item_id, vector, metadata_of(item_id, text), source, digest)
        for (_, item_id, text, source, digest), vector in zip(rows, matrix, strict=True)
    ]


def metadata_of(item_id: str, text: Any) -> dict[str, Any]:
    """Parse the stored metadata of an item. Raises StorageDamaged if the text is damaged."""
    try:
        metadata = orjson.loads(text)
        if not isinstance(metadata, dict):
            raise ValueError(f"the stored metadata must be a JSON object, not {type(metadata).__name__}")
    except (TypeError, ValueError) as error:
        raise StorageDamaged(f"the vector store is damaged: the metadata of item {item_id!r} is broken") from error
    return metadata


def condition_of(where: Filter | None) -> tuple[str, list[Any]]:
    return ("1", []) if where is None else to_sql(where)


def fitting(rows: Sequence[tuple[Any, ...]], limit: int, max_bytes: int | None) -> int:
    """Return how many of the rows that `items_of` expects fit on a page: at least one, at most `limit`, and no more
    than have `max_bytes` bytes of metadata."""
    if max_bytes is None:
        return limit
    left = max_bytes
    for count, columns in enumerate(rows[:limit]):
        left -= len(columns[2])
        if left < 0:
            return max(1, count)
    return limit


def page_by_number(
    db: sqlite3.Connection, row: Row, where: Filter | None, after: int, limit: int, max_bytes: int | None = None
) -> Page:
    """Return the page of up to `limit` items with the lowest numbers above `after`. Their metadata has at most
    `max_bytes` bytes, unless that of the first item has more."""
    condition, parameters = condition_of(where)
    query = f"SELECT {ITEM} FROM items_{row.key} i WHERE number > ? AND {condition} ORDER BY number LIMIT ?"
    rows = db.execute(query, (after, *parameters, limit + 1)).fetchall()
    limit = fitting(rows, limit, max_bytes)
    return Page(items_of(db, row, rows[:limit]), f"n{rows[limit - 1][0]}" if len(rows) > limit else None)


def sampled(db: sqlite3.Connection, row: Row, where: Filter | None, size: int) -> list[Item]:
    """Return `size` random items that pass a filter, or all of them if there are fewer, in the order of their numbers.
    The same items are chosen each time, unless the numbers of the items that pass have changed."""
    condition, parameters = condition_of(where)
    query = f"SELECT number FROM items_{row.key} i WHERE {condition} ORDER BY number"
    numbers = [number for (number,) in db.execute(query, parameters)]
    if len(numbers) > size:
        chosen = np.sort(np.random.default_rng(0).choice(len(numbers), size, replace=False))
        numbers = [numbers[position] for position in chosen]
    query = f"SELECT {ITEM} FROM items_{row.key} i WHERE number = ?"
    return items_of(db, row, [db.execute(query, (number,)).fetchone() for number in numbers])


def value_counts(db: sqlite3.Connection, row: Row, path: MetadataPath, where: Filter | None, limit: int) -> Facets:
    """Count the values of a metadata key. Return the `limit` most frequent values and the number of all distinct
    values. `service/search/facets.py` defines what counts as a value."""
    condition, parameters = condition_of(where)
    at = json_path(path)
    query = f"""WITH found AS (
            SELECT DISTINCT number, atom, type IN ('true', 'false') AS is_bool
            FROM (SELECT number, metadata FROM items_{row.key}
                  WHERE {condition} AND json_type(metadata, {at}) != 'object') i, json_each(i.metadata, {at})
            WHERE type IN ('text', 'integer', 'real', 'true', 'false'))
        SELECT atom, is_bool, count(*) AS times, count(*) OVER () FROM found
        GROUP BY is_bool, atom ORDER BY times DESC, is_bool, atom LIMIT ?"""
    rows = db.execute(query, (*parameters, limit)).fetchall()
    facets = [Facet(bool(value) if is_bool else value, count) for value, is_bool, count, _ in rows]
    return Facets(facets, rows[0][3] if rows else 0)


class Chosen(NamedTuple):
    """A page of the items that pass a filter: their numbers, the last number that was checked, and how often metadata
    of the collection had been edited."""

    numbers: list[int]
    through: int
    edits: int


def choose_some(db: sqlite3.Connection, row: Row, where: Filter, after: int, to: int) -> Chosen:
    """Return a page of the items that pass a filter: those with the lowest numbers above `after` and up to `to`."""
    row = database.by_key(db, row.key)
    condition, parameters = to_sql(where)
    query = f"SELECT number FROM items_{row.key} WHERE number > ? AND number <= ? AND {condition} ORDER BY 1 LIMIT ?"
    numbers = [number for (number,) in db.execute(query, (after, to, *parameters, _PAGE))]
    return Chosen(numbers, numbers[-1] if len(numbers) == _PAGE else to, row.edits)


def delete_chosen(db: sqlite3.Connection, row: Row, chosen: Chosen, where: Filter | None) -> int | None:
    """Delete chosen items that still exist, and return their number. If metadata was edited since they were chosen,
    check the filter `where` again. If it is None, delete nothing then, and return None."""
    row, numbers = database.by_key(db, row.key), chosen.numbers
    if row.edits != chosen.edits:
        if where is None:
            return None
        condition, parameters = to_sql(where)
        query = f"SELECT number FROM items_{row.key} WHERE number = ? AND {condition}"
        numbers = [number for number in numbers if db.execute(query, (number, *parameters)).fetchone()]
    if row.partner is not None:
        found = (db.execute(f"SELECT id FROM items_{row.key} WHERE number = ?", (n,)).fetchone() for n in numbers)
        partners.remove_ids(db, row.partner, [each[0] for each in found if each])
    return database.remove(db, row.key, numbers)
