"""Translates a filter to an SQL condition on the columns `id` and `metadata`. The metadata is JSON text.

The value of a key is read with the expression `json_extract(metadata, '$."key"')`. If the collection's settings declare
a key as indexed, the key's index has exactly the same expression, so SQLite can use this index. `json_extract` returns
numbers and strings as different types, which SQLite never treats as equal. However, it returns true and false as 1 and
0, and objects and lists as text. If a value could be confused in this way, the condition also checks `json_type`. All
other conditions omit this check, because SQLite cannot use an index for it. For a missing key, `json_extract` returns
NULL, which is neither true nor false. Therefore, an expression is negated with CASE, which treats NULL like false.
Unlike NOT, CASE also stops at the first operand of an AND or OR that decides the result.

A condition on a key is an OR of two parts: the first compares the value itself, and the second the elements of a list.
The text of a list begins with `[`, so the second part begins with a comparison that excludes most other values. SQLite
uses the index on the key for both parts. For the second part, it reads the metadata only of items whose value begins
with `[`.
"""

import sqlite3
from typing import Final

from service.search.filters import ITEM_ID, And, Between, Exists, Filter, In, Not, Or, Path, Scalar, Text, holds
from service.search.text import texts_with_prefix

HAS_TEXT: Final = "has_text"
"""The name of an SQL function that says whether a string contains another one."""
SHORT_TEXT: Final = 32
"""Texts up to this length are looked for with SQLite's own `instr`. Its time is that of the length of the string times
the length of the text: 4,000 characters in 65,000 take 7 ms. `HAS_TEXT` is linear, but calls Python."""
_SQL: Final = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


def add_functions(db: sqlite3.Connection) -> None:
    """Define the functions that conditions use, for a connection."""
    db.create_function(HAS_TEXT, 2, _has_text, deterministic=True)


def _has_text(value: object, text: str) -> bool:
    return isinstance(value, str) and text in value


def extract(path: Path) -> str:
    """Return the SQL expression for the metadata value at `path`. The path needs no escaping, because `parse_path`
    rejects keys with quotes or backslashes."""
    return f"json_extract(metadata, {json_path(path)})"


def to_sql(condition: Filter) -> tuple[str, list[Scalar]]:
    """Translate a filter to an SQL condition for a WHERE clause. Return the condition, which has a `?` for each value,
    and the list of the values."""
    parameters: list[Scalar] = []
    return _sql(condition, parameters), parameters


def _sql(condition: Filter, parameters: list[Scalar]) -> str:
    if isinstance(condition, And):
        return "(" + " AND ".join(_sql(part, parameters) for part in condition.parts) + ")"
    if isinstance(condition, Or):
        return "(" + " OR ".join(_sql(part, parameters) for part in condition.parts) + ")"
    if isinstance(condition, Not):
        return f"CASE WHEN {_sql(condition.part, parameters)} THEN 0 ELSE 1 END"
    if isinstance(condition, Exists):
        return f"{extract(condition.path)} IS NOT NULL"
    if condition.path == ITEM_ID:
        return _compared(condition, "id", "'text'", parameters)
    path, value = json_path(condition.path), extract(condition.path)
    itself = _compared(condition, value, f"json_type(metadata, {path})", parameters)
    element = _compared(condition, "atom", "type", parameters)
    # json_each reads the elements of a list; `atom` is NULL for lists and objects within the list.
    return (
        f"({itself} OR ({value} >= '[' AND {value} < '\\' AND json_type(metadata, {path}) = 'array' "
        f"AND EXISTS (SELECT 1 FROM json_each(metadata, {path}) WHERE {element})))"
    )


def _compared(condition: In | Between | Text, value: str, kind: str, parameters: list[Scalar]) -> str:
    """Return the SQL for a condition on one value. `value` and `kind` are SQL expressions for the value and for its
    JSON type."""
    if isinstance(condition, In):
        return _in(condition, value, kind, parameters)
    if isinstance(condition, Text):
        return _text(condition, value, kind, parameters)
    return _between(condition, value, kind, parameters)


def _in(condition: In, value: str, kind: str, parameters: list[Scalar]) -> str:
    groups: dict[str, list[Scalar]] = {}  # one list per type check: SQLite limits the depth of OR chains
    for wanted in condition.values:
        groups.setdefault(_kinds(wanted), []).append(wanted)
    parts = []
    for kinds, group in groups.items():
        parameters += [int(wanted) if isinstance(wanted, bool) else wanted for wanted in group]
        one_of = f"{value} IN ({', '.join('?' * len(group))})"
        parts.append(f"({one_of} AND {kind} IN ({kinds}))" if kinds else one_of)
    return "(" + " OR ".join(parts) + ")"


def _between(condition: Between, value: str, kind: str, parameters: list[Scalar]) -> str:
    if len({isinstance(bound, str) for _, bound in condition.bounds}) > 1:
        return "0"  # no value is both a number and a string
    parts = []
    for op, bound in condition.bounds:
        parameters.append(bound)
        parts.append(f"{value} {_SQL[op]} ?")
    if isinstance(condition.bounds[0][1], str):
        parts.append(f"{kind} = 'text'")
    elif all(op in ("gt", "gte") for op, _ in condition.bounds) or any(
        all(holds(number, op, bound) for op, bound in condition.bounds) for number in (0, 1)
    ):  # in SQLite strings are greater than numbers, and true and false are 1 and 0
        parts.append(f"{kind} IN ('integer', 'real')")
    return "(" + " AND ".join(parts) + ")"


def _text(condition: Text, value: str, kind: str, parameters: list[Scalar]) -> str:
    parts = [f"{kind} = 'text'"]
    if condition.op == "contains":
        parameters.append(condition.text)
        search = "instr({}, ?) > 0" if len(condition.text) <= SHORT_TEXT else f"{HAS_TEXT}({{}}, ?)"
        parts.append(search.format(value))
    else:
        for op, bound in texts_with_prefix(condition.text):
            parameters.append(bound)
            parts.append(f"{value} {op} ?")
    return "(" + " AND ".join(parts) + ")"


def _kinds(wanted: Scalar) -> str:
    """Return an SQL list of the JSON types that a value equal to `wanted` may have. If the result of `json_extract` is
    unambiguous for this value, no type check is needed, and an empty string is returned."""
    if isinstance(wanted, bool):
        return "'true'" if wanted else "'false'"
    if isinstance(wanted, str):
        return "'text'" if wanted[:1] in ("{", "[") else ""
    return "'integer', 'real'" if wanted in (0, 1) else ""


def json_path(path: Path) -> str:
    """Return `path` as an SQL string literal, in the syntax of SQLite's JSON functions."""
    return "'$" + "".join(f'."{key}"' for key in path) + "'"
