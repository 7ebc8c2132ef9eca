"""Translates filters to the expression language of Milvus.

Milvus and Milvus Lite treat JSON differently. Lite treats true as 1, evaluates a comparison of text with a number as
unknown, and does not support `in` on a JSON path. Milvus compares large integers as floats. Therefore, an expression
either matches exactly the same items as the filter on both servers, or it may match more. If it may match more, the
store checks the results with `filters.matches`.

The only negated conditions that are sent to the server are a negated `exists` and negated conditions on the id. A
comparison with a value of another type is false in Milvus up to 2.6.18, but unknown in later versions
(milvus-io/milvus#50699, #50702). If the comparison is unknown, its negation is unknown too, and a search would miss
items. Therefore, every other negated condition, and every condition on a key with unusual characters, is translated to
an expression that matches all items.

An `in` condition becomes a balanced tree of `==` comparisons, because servers limit how deeply expressions are nested.

A condition on a key also matches the elements of a list. The JSON field contains 0 in place of a list, so every
comparison with a key is joined with `== 0` and may match more than the filter. Conditions on the id are exact.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from service.search.filters import ITEM_ID, And, Between, Exists, Filter, In, Not, Or, Scalar, Text
from service.search.text import texts_with_prefix

FIELD: Final = "metadata"
_EXACT_INTEGERS: Final = 2**53
_PLAIN_KEY: Final = re.compile(r"(?![0-9]+$)[^\[\]\"'\\/~\x00-\x1f]+")
"""A pattern that matches the keys that Milvus reads as plain keys, not as array indices or as parts of a JSON
pointer."""
_SIGNS: Final = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


class Expression(NamedTuple):
    """A Milvus filter expression. `text` is True if the expression matches all items, and False if it matches none.

    If `is_exact` is true, the expression matches exactly the items that pass the original filter.
    """

    text: str | bool
    is_exact: bool


def translate(where: Filter) -> Expression:
    """Translate a filter to a Milvus expression. The expression matches every item that passes the filter, and it may
    match others."""
    return _translate(where, wide=True)


def quoted(text: str) -> str:
    """Return `text` as a string literal in Milvus' expression language. Backslashes, double quotes, line breaks and
    tabs are escaped."""
    for char, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(char, escape)
    return f'"{text}"'


def filterable(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return metadata in the form in which the JSON field in Milvus stores it. Only filters use this field.

    The result must not be longer than the metadata, because the metadata may already be as long as the field allows.
    Versions of Milvus disagree on whether `exists` matches null and empty objects. Therefore, null is omitted and an
    empty object becomes 0. A list also becomes 0, because the servers' functions for lists differ. A comparison that
    may match 0 is never treated as exact.
    """
    filled: dict[str, Any] = {}
    for key, value in metadata.items():
        if isinstance(value, dict):
            filled[key] = filterable(value) or 0
        elif value is not None:
            filled[key] = 0 if isinstance(value, list | tuple) else value
    return filled


def _translate(where: Filter, *, wide: bool) -> Expression:
    """Translate a filter to a Milvus expression. If `wide` is true, the expression matches every item that passes the
    filter, and it may match others. Otherwise, it matches only items that pass the filter, and it may miss some."""
    if isinstance(where, Not):
        inside = _translate(where.part, wide=not wide)
        text = not inside.text if isinstance(inside.text, bool) else f"not ({inside.text})"
        return Expression(text, inside.is_exact)
    if isinstance(where, And | Or):
        parts = [_translate(part, wide=wide) for part in where.parts]
        return Expression(
            _joined([part.text for part in parts], "and" if isinstance(where, And) else "or"),
            all(part.is_exact for part in parts),
        )
    if not isinstance(where, Exists) and where.path == ITEM_ID:
        return _on_id(where, wide=wide)
    path = FIELD + "".join(f"[{quoted(key)}]" for key in where.path)
    if not all(_PLAIN_KEY.fullmatch(key) for key in where.path):
        return Expression(wide, False)
    if isinstance(where, Exists):
        return Expression(f"exists {path}", True)
    if isinstance(where, Between) and len({isinstance(bound, str) for _, bound in where.bounds}) > 1:
        return Expression(False, True)  # no value is both text and a number
    if not wide:
        return Expression(False, False)
    if isinstance(where, Between):
        texts = [_between(path, where)]
    elif isinstance(where, Text):
        texts = [_text(path, where)]
    else:
        values = dict.fromkeys((type(value), value) for value in where.values)
        texts = [_equal(path, value) for _, value in values]
    return Expression(_joined([*texts, f"{path} == 0"], "or"), False)  # 0 stands for a list


def _on_id(where: In | Between | Text, *, wide: bool) -> Expression:
    """Translate a condition on the id. Every item has an id, so these expressions can be negated."""
    if isinstance(where, In):
        return Expression(_joined([f"id == {quoted(str(value))}" for value in dict.fromkeys(where.values)], "or"), True)
    if isinstance(where, Between):
        return Expression(_joined([f"id {_SIGNS[op]} {quoted(str(bound))}" for op, bound in where.bounds], "and"), True)
    if where.op == "prefix":
        parts = [f"id {sign} {quoted(bound)}" for sign, bound in texts_with_prefix(where.text)]
        return Expression(_joined(parts, "and"), True)
    return Expression(wide, False)


def _joined(texts: Sequence[str | bool], word: str) -> str | bool:
    """Join expressions with the operator `word` ("and" or "or"), as a balanced tree. An expression may be True (it
    matches all items) or False (it matches none). If these bools alone decide the result, return a bool."""
    decides = word == "or"  # True decides the result of "or", False that of "and"
    if any(text is decides for text in texts):
        return decides
    level = [text for text in texts if isinstance(text, str)]
    if not level:
        return not decides
    while len(level) > 1:
        pairs = [level[start : start + 2] for start in range(0, len(level), 2)]
        level = [f"({pair[0]}) {word} ({pair[1]})" if len(pair) == 2 else pair[0] for pair in pairs]
    return level[0]


def _equal(path: str, value: Scalar) -> str | bool:
    if isinstance(value, str):
        return f"{path} == {quoted(value)}"
    if isinstance(value, bool):
        return f"{path} == {str(value).lower()}"
    if abs(value) < _EXACT_INTEGERS:
        return f"{path} == {_number(value)}"
    return _within(path, [("gte", value), ("lte", value)])


def _between(path: str, where: Between) -> str | bool:
    if isinstance(where.bounds[0][1], str):
        return _joined([f"{path} {_SIGNS[op]} {quoted(str(bound))}" for op, bound in where.bounds], "and")
    return _within(path, [(op, bound) for op, bound in where.bounds if not isinstance(bound, str)])


def _text(path: str, where: Text) -> str | bool:
    if where.op == "contains":
        return f"exists {path}"
    return _joined([f"{path} {sign} {quoted(bound)}" for sign, bound in texts_with_prefix(where.text)], "and")


def _within(path: str, bounds: Sequence[tuple[str, int | float]]) -> str | bool:
    """Return an expression that matches if the value at `path` is a number within the bounds. Bounds beyond 2**53 are
    widened slightly, because Milvus compares such integers as floats."""
    parts: list[str | bool] = []
    for op, bound in bounds:
        if abs(bound) < _EXACT_INTEGERS:
            parts.append(f"{path} {_SIGNS[op]} {_number(bound)}")
            continue
        edge = math.nextafter(float(bound), -math.inf if op in ("gt", "gte") else math.inf)
        if math.isfinite(edge):
            parts.append(f"{path} {_SIGNS[op][0]}= {edge!r}")
    if not parts:  # the bounds are at the limits of float64, so any number passes
        return f"exists {path}"
    return _joined(parts, "and")


def _number(value: int | float) -> str:
    return repr(int(value)) if value == int(value) else repr(float(value))
