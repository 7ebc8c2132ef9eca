"""Translates a filter to an SQL condition on the column `metadata`, which contains JSON text.

The value of a key is read with the expression `json_extract(metadata, '$."key"')`. If the collection's settings declare
a key as indexed, the key's index has exactly the same expression, so SQLite can use this index. `json_extract` returns
numbers and strings as different types, which SQLite never treats as equal. However, it returns true and false as 1 and
0, and objects and lists as text. If a value could be confused in this way, the condition also checks `json_type`. All
other conditions omit this check, because SQLite cannot use an index for it. For a missing key, `json_extract` returns
NULL, which is neither true nor false. Therefore, `coalesce` converts NULL to 0 before an expression is negated.
"""

from service.search.filters import And, Between, Exists, Filter, In, Not, Or, Scalar, holds

_SQL = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


def extract(path: tuple[str, ...]) -> str:
    """Return the SQL expression for the metadata value at `path`. The path needs no escaping, because `parse_path`
    rejects keys with quotes or backslashes."""
    return f"json_extract(metadata, {_json_path(path)})"


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
        return f"NOT coalesce({_sql(condition.part, parameters)}, 0)"
    if isinstance(condition, Exists):
        return f"{extract(condition.path)} IS NOT NULL"
    return _in(condition, parameters) if isinstance(condition, In) else _between(condition, parameters)


def _in(condition: In, parameters: list[Scalar]) -> str:
    value, kind = extract(condition.path), f"json_type(metadata, {_json_path(condition.path)})"
    groups: dict[str, list[Scalar]] = {}  # one list per type check: SQLite limits the depth of OR chains
    for wanted in condition.values:
        groups.setdefault(_kinds(wanted), []).append(wanted)
    parts = []
    for kinds, group in groups.items():
        parameters += [int(wanted) if isinstance(wanted, bool) else wanted for wanted in group]
        one_of = f"{value} IN ({', '.join('?' * len(group))})"
        parts.append(f"({one_of} AND {kind} IN ({kinds}))" if kinds else one_of)
    return "(" + " OR ".join(parts) + ")"


def _between(condition: Between, parameters: list[Scalar]) -> str:
    value, kind = extract(condition.path), f"json_type(metadata, {_json_path(condition.path)})"
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


def _kinds(wanted: Scalar) -> str:
    """Return an SQL list of the JSON types that a value equal to `wanted` may have. If the result of `json_extract` is
    unambiguous for this value, no type check is needed, and an empty string is returned."""
    if isinstance(wanted, bool):
        return "'true'" if wanted else "'false'"
    if isinstance(wanted, str):
        return "'text'" if wanted[:1] in ("{", "[") else ""
    return "'integer', 'real'" if wanted in (0, 1) else ""


def _json_path(path: tuple[str, ...]) -> str:
    return "'$" + "".join(f'."{key}"' for key in path) + "'"
