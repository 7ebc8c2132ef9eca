"""Defines filters on metadata and ids, and parses them from requests.

A filter is a tree. Each leaf is a condition on one key of the metadata, or on the item's id:

    {"key": "brand", "eq": "Arla"}                     equal to a number, string or boolean; 1 and true differ
    {"key": "brand", "ne": "Arla"}                     present and not equal
    {"key": "brand", "in": ["Arla", "Oatly"]}          equal to one of the values
    {"key": "price", "gte": 5, "lt": 10}               within a range; strings are compared by code points
    {"key": "name", "contains": "milk"}                a string that contains this text
    {"key": "name", "prefix": "Oat"}                   a string that begins with this text
    {"key": "shelf.row", "exists": true}               present and not null; dots separate nested keys
    {"field": "id", "prefix": "shelf-3/"}              the same operators, except `exists`, on the item's id
    {"and": [...]}, {"or": [...]}, {"not": {...}}

If the value of a key is a list, a condition is true if it is true for an element of the list. The exception is `ne`: it
is true if no element is equal. Conditions do not look into lists or objects within a list.

A condition is true or false, never unknown. If an item does not have the key, `exists: false` is true, and every
other condition on the key is false. The negation (`not`) of a false condition is true. The function `matches` defines
the meaning of a filter. Stores translate the tree into their own query language, and tests compare the results of the
stores with the results of `matches`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from service.errors import InvalidRequest
from service.search.text import is_allowed

Scalar = str | int | float | bool
Range = Literal["gt", "gte", "lt", "lte"]
Path = tuple[str, ...]
"""The path of a value in the metadata: the key of an object, then the key of an object within it, and so on. The empty
path (`ITEM_ID`) stands for the item's id."""

ITEM_ID: Final[Path] = ()
MAX_DEPTH: Final = 16
MAX_CONDITIONS: Final = 256
MAX_VALUES: Final = 10_000
MAX_KEY_CHARACTERS: Final = 256
MAX_TEXT_CHARACTERS: Final = 4096
_RANGES: Final[tuple[Range, ...]] = ("gt", "gte", "lt", "lte")
_TEXTS: Final[tuple[Literal["contains", "prefix"], ...]] = ("contains", "prefix")
_OPERATORS: Final = ("eq", "ne", "in", *_TEXTS, "exists", *_RANGES)
_DOT: Final = re.compile(r"(?<!\\)\.")


@dataclass(frozen=True)
class In:
    """A condition that is true if the value at `path`, or an element of the list at `path`, equals one of `values`. An
    `eq` condition is parsed as an `In` with one value."""

    path: Path
    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Between:
    """A condition that is true if the value at `path`, or an element of the list at `path`, has the same type as the
    bounds and satisfies all bounds."""

    path: Path
    bounds: tuple[tuple[Range, str | int | float], ...]


@dataclass(frozen=True)
class Text:
    """A condition that is true if the value at `path`, or an element of the list at `path`, is a string that contains
    `text` or begins with it. Upper and lower case differ."""

    path: Path
    op: Literal["contains", "prefix"]
    text: str


@dataclass(frozen=True)
class Exists:
    """A condition that is true if the metadata has a value at `path` and the value is not null."""

    path: Path


@dataclass(frozen=True)
class And:
    parts: tuple["Filter", ...]


@dataclass(frozen=True)
class Or:
    parts: tuple["Filter", ...]


@dataclass(frozen=True)
class Not:
    part: "Filter"


Filter = In | Between | Text | Exists | And | Or | Not


def matches(condition: Filter, metadata: Mapping[str, Any], item_id: str) -> bool:
    """Return whether an item with this metadata and id passes the filter `condition`."""
    if isinstance(condition, And):
        return all(matches(part, metadata, item_id) for part in condition.parts)
    if isinstance(condition, Or):
        return any(matches(part, metadata, item_id) for part in condition.parts)
    if isinstance(condition, Not):
        return not matches(condition.part, metadata, item_id)
    value = item_id if condition.path == ITEM_ID else value_at(metadata, condition.path)
    if isinstance(condition, Exists):
        return value is not None
    return any(_is_match(condition, part) for part in elements_of(value))


def _is_match(condition: In | Between | Text, value: Any) -> bool:
    kind, plain = _kind(value), plain_number(value)
    if isinstance(condition, In):
        return any(plain == wanted and kind == _kind(wanted) for wanted in condition.values)
    if isinstance(condition, Text):
        return isinstance(value, str) and (
            value.startswith(condition.text) if condition.op == "prefix" else condition.text in value
        )
    return all(kind == _kind(bound) and holds(plain, op, bound) for op, bound in condition.bounds)


def elements_of(value: Any) -> Sequence[Any]:
    """Return the elements of a list. For any other value, return a sequence that contains only this value."""
    return value if isinstance(value, list | tuple) else (value,)


def value_at(metadata: Mapping[str, Any], path: Path) -> Any:
    """Return the value at `path` in the metadata, or None if there is none."""
    value: Any = metadata
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def scalar_at(metadata: Mapping[str, Any], path: Path) -> Scalar | None:
    """Return the string, number or boolean at `path`, or None if there is none."""
    value = value_at(metadata, path)
    return value if isinstance(value, str | int | float) else None


def _kind(value: Any) -> str:
    """Return the JSON type of a value: "boolean", "number", "string" or "other". Integers and floats are both
    numbers."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return "string" if isinstance(value, str) else "other"


def plain_number(value: Any) -> Any:
    """Return the value as stores represent it: an integer outside the range of signed 64-bit integers becomes a
    float."""
    return float(value) if isinstance(value, int) and not -(2**63) <= value < 2**63 else value


def holds(value: Any, op: Range, bound: Any) -> bool:
    """Return whether `value` satisfies the comparison `op` with `bound`. For example, "gt" means `value > bound`."""
    if op == "gt":
        return bool(value > bound)
    if op == "gte":
        return bool(value >= bound)
    return bool(value < bound) if op == "lt" else bool(value <= bound)


def parse_filter(body: Any) -> Filter:
    """Parse a filter from the JSON value in a request.

    Raises:
        InvalidRequest: the value is not a filter. The message quotes the invalid part and says what is allowed.
    """
    return _Parser().parse(body, 1)


def parse_path(key: Any, where: str = "filter") -> Path:
    """Split a key such as `shelf.row` at its dots and return the parts. A dot after a backslash does not separate, but
    is part of a key: `a\\.b` is the key "a.b". `where` is the name of the request field, for the error message.

    Raises:
        InvalidRequest: the key is not allowed, for example because it contains control characters, quotes or
            a backslash that is not followed by a dot.
    """
    if not isinstance(key, str) or not 1 <= len(key) <= MAX_KEY_CHARACTERS:
        raise _wrong(f"a key must be a string of 1 to {MAX_KEY_CHARACTERS} characters, not {_quoted(key)}", where)
    path = tuple(part.replace("\\.", ".") for part in _DOT.split(key))
    if not all(path) or not is_allowed(key) or set("".join(path)) & set("\"'\\"):
        raise _wrong(
            f"key {_quoted(key)} is not allowed: no control characters, quotes or backslashes, except a backslash "
            "before a dot that is part of a key, and no leading, trailing or double dots",
            where,
        )
    return path


class _Parser:
    """A parser for one filter. It counts the conditions and values of the filter to enforce the limits."""

    def __init__(self) -> None:
        self._conditions = 0
        self._values = 0

    def parse(self, body: Any, depth: int) -> Filter:
        if depth > MAX_DEPTH:
            raise _wrong(f"nested more than {MAX_DEPTH} levels deep")
        self._conditions += 1
        if self._conditions > MAX_CONDITIONS:
            raise _wrong(f"more than {MAX_CONDITIONS} conditions")
        if not isinstance(body, dict):
            raise _wrong(f"a condition must be an object, not {_quoted(body)}")
        if None in body.values():
            body = _without_nulls(body)
        if "key" in body or "field" in body:
            return self._condition(body)
        if len(body) == 1:
            ((name, inside),) = body.items()
            if name == "not":
                return Not(self.parse(inside, depth + 1))
            if name in ("and", "or"):
                if not isinstance(inside, list) or not inside:
                    raise _wrong(f"{name} takes a list of conditions, not {_quoted(inside)}")
                parts = tuple(self.parse(part, depth + 1) for part in inside)
                return And(parts) if name == "and" else Or(parts)
        raise _wrong(
            f"{_quoted(body)} is not a condition: it needs a key and one of {', '.join(_OPERATORS)}, or it is "
            "one of and, or, not"
        )

    def _condition(self, body: dict[str, Any]) -> Filter:
        on_id = "field" in body
        if on_id and body["field"] != "id":
            raise _wrong(f"field must be 'id', not {_quoted(body['field'])}; use key for a metadata key")
        path = ITEM_ID if on_id else parse_path(body["key"])
        operators = [name for name in body if name != ("field" if on_id else "key")]
        unknown = [name for name in operators if name not in _OPERATORS]
        if unknown or not operators:
            raise _wrong(
                f"{_quoted(unknown[0] if unknown else body)} is not an operator; operators are {', '.join(_OPERATORS)}"
            )
        if len(operators) > 1 and not set(operators) <= set(_RANGES):
            raise _wrong(f"{' and '.join(operators)} in one condition: only gt, gte, lt and lte can be combined")
        operator, operand = operators[0], body[operators[0]]
        if operator == "exists":
            return self._exists(path, operand)
        if operator == "eq":
            return In(path, (self._scalar(path, operand),))
        if operator == "ne":
            differs = Not(In(path, (self._scalar(path, operand),)))
            return differs if on_id else And((Exists(path), differs))
        if operator == "in":
            if not isinstance(operand, list) or not operand:
                raise _wrong(f"in takes a list of values, not {_quoted(operand)}")
            return In(path, tuple(self._scalar(path, value) for value in operand))
        for op in _TEXTS:
            if op == operator:
                text = self._scalar(path, operand)
                if not isinstance(text, str) or not text:
                    raise _wrong(f"{op} takes a string that is not empty, not {_quoted(text)}")
                return Text(path, op, text)
        return self._between(path, body)

    def _exists(self, path: Path, operand: Any) -> Filter:
        if path == ITEM_ID:
            raise _wrong("exists is not possible with field: every item has an id")
        if not isinstance(operand, bool):
            raise _wrong(f"exists must be true or false, not {_quoted(operand)}")
        return Exists(path) if operand else Not(Exists(path))

    def _between(self, path: Path, body: dict[str, Any]) -> Filter:
        bounds = []
        for op in _RANGES:
            if op in body:
                bound = self._scalar(path, body[op])
                if isinstance(bound, bool):
                    raise _wrong(f"{op} takes a number or a string, not {_quoted(bound)}")
                bounds.append((op, bound))
        return Between(path, tuple(bounds))

    def _scalar(self, path: Path, value: Any) -> Scalar:
        self._values += 1
        if self._values > MAX_VALUES:
            raise _wrong(f"more than {MAX_VALUES:,} values")
        if path == ITEM_ID and not isinstance(value, str):
            raise _wrong(f"an id is compared with strings, not with {_quoted(value)}")
        if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
            raise _wrong(f"a value must be a string, number or boolean, not {_quoted(value)}; use exists for null")
        if isinstance(value, str) and (len(value) > MAX_TEXT_CHARACTERS or not _encodes(value)):
            raise _wrong(
                f"a string has at most {MAX_TEXT_CHARACTERS} characters of valid Unicode, not {_quoted(value)}"
            )
        try:
            return plain_number(value) if isinstance(value, int) and not isinstance(value, bool) else value
        except OverflowError:
            raise _wrong(f"a number must fit in a double, not {_quoted(value)}") from None


def _without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    """Return a condition without the fields that are null, which count as not set. If the rest has no operator or no
    key, return the condition unchanged, so that the error message quotes what the client sent."""
    rest = {name: value for name, value in body.items() if value is not None}
    complete = len(rest) > 1 if rest.keys() & {"key", "field"} else rest.keys() & {"and", "or", "not"}
    return rest if complete else body


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _wrong(why: str, where: str = "filter") -> InvalidRequest:
    return InvalidRequest(f"{where}: {why}", param=where)


def _quoted(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number with thousands of digits
        return f"that {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."
