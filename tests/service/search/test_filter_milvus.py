"""Tests that the filters sent to Milvus let every match pass, by the rules of the known versions of Milvus.

Milvus Lite differs from Milvus. If a path is missing or has another type than the compared value, a comparison is false
in Milvus up to 2.6.18. From then on it is neither true nor false, so its `not` does not hold either
(milvus-io/milvus#50699, #50702, #50976). `exists` is true for null in 2.4. In later versions it is false for null and
for values that contain only empty lists and objects (`isObjectEmpty`). The tests have no Milvus cluster, so this module
implements these rules and evaluates expressions by them.
"""

import operator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from milvus_lite.search.filter import ast, parse_expr

from service.search.checks import metadata_text
from service.search.filter_milvus import filterable, translate
from service.search.filters import matches, parse_filter
from service.search.store import MAX_METADATA_BYTES
from tests.service.search.strategies import filter_bodies

VERSIONS = ["2.4", "2.5", "2.6.19"]
_SIGNS = {
    "==": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_MISSING = object()
ID = "aé"


def evaluate(node: Any, row: Any, version: str) -> bool | None:
    """Return whether an expression is true or false, or None if it is neither."""
    if isinstance(node, ast.And | ast.Or):
        decides = isinstance(node, ast.Or)
        parts = [evaluate(part, row, version) for part in node.operands]
        return decides if decides in parts else None if None in parts else not decides
    if isinstance(node, ast.Not):
        inside = evaluate(node.operand, row, version)
        return None if inside is None else not inside
    if isinstance(node, ast.IsNullOp):
        assert node.from_exists
        value = _at(node.field, row)
        if version == "2.4":
            return value is not _MISSING
        return value is not _MISSING and not _is_hollow(value)
    assert isinstance(node, ast.CmpOp)
    holds = _compared(_at(node.left, row), node.op, node.right.value)
    return False if holds is None and version != "2.6.19" else holds


def _at(node: Any, row: Any) -> Any:
    """Return the value at a path as simdjson's JSON pointer finds it. A path can also enter lists."""
    if isinstance(node, ast.FieldRef):
        assert node.name == "id"
        return ID
    assert isinstance(node, ast.PathAccess)
    for key in node.path:
        if isinstance(row, dict) and key in row:
            row = row[key]
        elif isinstance(row, list) and str(key).isdigit() and int(key) < len(row):
            row = row[int(key)]
        else:
            return _MISSING
    return row


def _is_hollow(value: Any) -> bool:
    """Return whether a value is null or contains only empty lists and objects, at any depth."""
    if isinstance(value, dict):
        return all(map(_is_hollow, value.values()))
    return all(map(_is_hollow, value)) if isinstance(value, list) else value is None


def _compared(value: Any, op: str, constant: Any) -> bool | None:
    """Return the result of a comparison, or None if the types do not allow it. Two integers are compared as int64,
    other numbers as double.
    """
    if isinstance(constant, bool) or isinstance(value, bool):
        same = isinstance(constant, bool) and isinstance(value, bool)
    else:
        same = isinstance(value, str) if isinstance(constant, str) else isinstance(value, int | float)
    if not same:
        return None
    if isinstance(constant, str):
        return bool(_SIGNS[op](value.encode(), constant.encode()))
    if isinstance(constant, int) and isinstance(value, int) and value < 2**63:
        return bool(_SIGNS[op](value, constant))
    return bool(_SIGNS[op](float(value), float(constant)))


def test_the_rules_are_those_of_the_reports() -> None:
    other_type, missing = {"a": 5}, {}
    for row, known in ((other_type, False), (missing, False)):
        negated = parse_expr('not (metadata["a"] == "x")')
        assert evaluate(negated, row, "2.5") is not known
        assert evaluate(negated, row, "2.6.19") is None
    for row in ({"a": []}, {"a": {"b": [{}]}}, {"a": None}):
        assert [evaluate(parse_expr('exists metadata["a"]'), row, v) for v in VERSIONS] == [True, False, False]


# ---- any filter over any metadata

_NUMBERS = [0, 1, -1, 5, 1.0, 0.5, -0.0, 1e300, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 5.5]
_STRINGS = ["", "a", "b", "aa", "1", "true", '"', "\\", "é", "🐈", "\uffff", "a\nb"]
_scalars = st.sampled_from([*_NUMBERS, *_STRINGS, True, False])
_keys = st.sampled_from(["a", "b", "ключ", "0", "x/y"])
_values = st.recursive(
    st.one_of(_scalars, _scalars, st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(_keys, inner, max_size=3)),
    max_leaves=4,
)
_metadata = st.dictionaries(_keys, _values, max_size=5)
_paths = st.lists(_keys, min_size=1, max_size=2).map(".".join)
_filters = filter_bodies(_paths, _scalars, st.sampled_from([*_NUMBERS, *_STRINGS]))


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=100, deadline=None, database=None)
@given(body=_filters, rows=st.lists(_metadata, min_size=8, max_size=8))
def test_no_match_is_lost_and_what_is_exact_is(version: str, body: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    where = parse_filter(body)
    sent = translate(where)
    for metadata in rows:
        passes = sent.text
        if isinstance(passes, str):
            passes = evaluate(parse_expr(passes), filterable(metadata), version) is True
        if matches(where, metadata, ID) or sent.is_exact:
            assert passes == matches(where, metadata, ID), (sent.text, metadata)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("body", "metadata"),
    [
        ({"not": {"key": "a", "eq": "x"}}, {"a": 5}),
        ({"not": {"key": "a", "eq": "x"}}, {"a": ["y"]}),
        ({"not": {"key": "a", "in": ["x", 7]}}, {"a": True}),
        ({"not": {"key": "a", "in": ["x", 7]}}, {}),
        ({"not": {"key": "a", "gt": 3}}, {"a": "x"}),
        ({"key": "a", "in": [1, True]}, {"a": True}),
        ({"key": "a", "in": [False, 0.0]}, {"a": 0}),
        ({"key": "a", "exists": True}, {"a": [[]]}),
        ({"key": "a", "exists": True}, {"a": [None]}),
        ({"key": "a", "exists": True}, {"a": {"b": [{}]}}),
        ({"key": "a.b", "exists": True}, {"a": {"b": [{}]}}),
        ({"key": "a", "exists": False}, {"a": None}),
        ({"key": "a", "eq": "x"}, {"a": [1, "x"]}),
        ({"key": "a", "gt": 3}, {"a": ["x", 7]}),
        ({"key": "a", "prefix": "x"}, {"a": ["xy"]}),
        ({"key": "a", "contains": "y"}, {"a": "xyz"}),
        ({"key": "a\\.b", "eq": 7}, {"a.b": 7}),
        ({"not": {"field": "id", "prefix": "b"}}, {}),
        ({"field": "id", "contains": "é"}, {}),
    ],
)
def test_these_match(version: str, body: dict[str, Any], metadata: dict[str, Any]) -> None:
    where = parse_filter(body)
    assert matches(where, metadata, ID)
    text = translate(where).text
    assert text is True or evaluate(parse_expr(str(text)), filterable(metadata), version) is True


def test_what_filters_see_is_no_longer_than_the_metadata() -> None:
    """Milvus refuses more than 64 KiB of JSON, and metadata may be that long."""
    assert filterable({"a": [], "b": {}, "c": {"d": None}, "e": None, "f": [{}]}) == {"a": 0, "b": 0, "c": 0, "f": 0}
    for metadata in ({f"{n:04}": [] for n in range(6550)}, {f"{n:04}": {"": None} for n in range(3800)}):
        assert len(metadata_text(filterable(metadata))) <= len(metadata_text(metadata)) <= MAX_METADATA_BYTES
