"""Reads items from the embedded store's database page by page, in the order of the values of a metadata key.

The items with a number, string or boolean at this key come first, in the order in which SQLite compares the values. If
the key has an index, SQLite reads these items in the index's order. All other items follow, sorted by id.

A cursor contains the key, the direction, and the value and id of the last item of its page. The next page begins after
this position, whether or not the item still exists. So an item that does not change is on exactly one page.
"""

import base64
import sqlite3
from typing import Any, Final, NamedTuple

import orjson

from service.errors import InvalidRequest
from service.search.database import Row
from service.search.filter_sql import extract, json_path
from service.search.filters import Filter, plain_number
from service.search.reading import ITEM, condition_of, fitting, items_of
from service.search.store import Order, Page

_SCALARS: Final = "'text', 'integer', 'real', 'true', 'false'"


class Position(NamedTuple):
    """The position of an item in an ordered list. The value is None if the item has no value to order by."""

    value: str | int | float | None
    item_id: str


def position_in(order: Order, cursor: str | None) -> Position | None:
    """Return the position that a cursor contains, or None if the cursor is None.

    Raises:
        InvalidRequest: the cursor is not from a page in this order.
    """
    if cursor is None:
        return None
    why: Exception | None = None
    try:
        content = orjson.loads(base64.b64decode(cursor.removeprefix("o"), altchars=b"-_", validate=True))
        path, descending, value, item_id = content
        is_ours = isinstance(item_id, str) and isinstance(value, str | int | float | None)
        position = Position(plain_number(value), item_id)
        if is_ours and _cursor(order, position) == cursor and [path, descending] == [[*order.path], order.descending]:
            return position
    except (ValueError, TypeError) as error:
        why = error
    raise InvalidRequest(f"cursor {cursor[:80]!r} is not from a page with this order_by", param="cursor") from why


def page_in_order(
    db: sqlite3.Connection,
    row: Row,
    where: Filter | None,
    order: Order,
    after: Position | None,
    limit: int,
    max_bytes: int | None = None,
) -> Page:
    """Return the page of up to `limit` items that follow the position `after`. If `after` is None, return the first
    page. Its metadata has at most `max_bytes` bytes, unless that of the first item has more."""
    rows: list[tuple[Any, ...]] = []
    if after is None or after.value is not None:
        rows = _with_value(db, row, where, order, after, limit + 1)
        after = None
    if len(rows) <= limit:
        rows += _without_value(db, row, where, order, after, limit + 1 - len(rows))
    limit = fitting(rows, limit, max_bytes)
    items = items_of(db, row, [columns[:-1] for columns in rows[:limit]])
    if len(rows) <= limit:
        return Page(items, None)
    return Page(items, _cursor(order, Position(rows[limit - 1][-1], items[-1].id)))


def _with_value(
    db: sqlite3.Connection, row: Row, where: Filter | None, order: Order, after: Position | None, limit: int
) -> list[tuple[Any, ...]]:
    condition, parameters = condition_of(where)
    value = extract(order.path)
    follows, direction = ("<", "DESC") if order.descending else (">", "ASC")
    if after is not None:
        condition += f" AND {value} {follows}= ? AND ({value} {follows} ? OR id > ?)"
        parameters += [after.value, after.value, after.item_id]
    query = f"""SELECT {ITEM}, {value} FROM items_{row.key} i
        WHERE {condition} AND {value} IS NOT NULL AND json_type(metadata, {json_path(order.path)}) IN ({_SCALARS})
        ORDER BY {value} {direction}, id LIMIT ?"""
    return db.execute(query, (*parameters, limit)).fetchall()


def _without_value(
    db: sqlite3.Connection, row: Row, where: Filter | None, order: Order, after: Position | None, limit: int
) -> list[tuple[Any, ...]]:
    condition, parameters = condition_of(where)
    query = f"""SELECT {ITEM}, NULL FROM items_{row.key} i
        WHERE {condition} AND coalesce(json_type(metadata, {json_path(order.path)}), 'null') NOT IN ({_SCALARS})
        AND id > ? ORDER BY id LIMIT ?"""
    return db.execute(query, (*parameters, "" if after is None else after.item_id, limit)).fetchall()


def _cursor(order: Order, position: Position) -> str:
    return "o" + base64.urlsafe_b64encode(orjson.dumps([order.path, order.descending, *position])).decode()
