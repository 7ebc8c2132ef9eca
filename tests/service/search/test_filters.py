"""Tests of filters: parsing a request, the errors, the items that pass, and the same filters as SQL."""

import json
import sqlite3
from collections.abc import Iterator
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from service.errors import InvalidRequest
from service.search.filter_sql import extract, to_sql
from service.search.filters import (
    MAX_CONDITIONS,
    MAX_DEPTH,
    MAX_KEY_CHARACTERS,
    MAX_TEXT_CHARACTERS,
    MAX_VALUES,
    And,
    Between,
    Exists,
    Filter,
    In,
    Not,
    Or,
    Text,
    matches,
    parse_filter,
    parse_path,
)
from tests.service.search.strategies import filter_bodies

# ---- reading


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"key": "a", "eq": "x"}, In(("a",), ("x",))),
        ({"key": "a", "eq": True}, In(("a",), (True,))),
        ({"eq": 1.5, "key": "a.b.c"}, In(("a", "b", "c"), (1.5,))),
        ({"key": "a", "in": [1, "1", False]}, In(("a",), (1, "1", False))),
        ({"key": "a", "exists": True}, Exists(("a",))),
        ({"key": "a", "exists": False}, Not(Exists(("a",)))),
        ({"key": "a", "gte": 5, "lt": 10}, Between(("a",), (("gte", 5), ("lt", 10)))),
        ({"key": "a", "lte": "z", "gt": "b"}, Between(("a",), (("gt", "b"), ("lte", "z")))),
        ({"and": [{"key": "a", "eq": 1}]}, And((In(("a",), (1,)),))),
        ({"key": "a", "eq": 1, "in": None, "gt": None, "and": None}, In(("a",), (1,))),  # null: not set
        ({"key": None, "eq": None, "not": {"key": "a", "eq": 1, "or": None}}, Not(In(("a",), (1,)))),
        ({"or": [{"key": "a", "eq": 1}, {"key": "b", "eq": 2}]}, Or((In(("a",), (1,)), In(("b",), (2,))))),
        ({"not": {"not": {"key": "a", "eq": 1}}}, Not(Not(In(("a",), (1,))))),
        ({"key": "not", "eq": 1}, In(("not",), (1,))),
        ({"key": "日 本-x_$[0]", "eq": ""}, In(("日 本-x_$[0]",), ("",))),
        ({"key": "a", "eq": 2**63 - 1}, In(("a",), (2**63 - 1,))),
        ({"key": "a", "eq": "\n\x01🍎"}, In(("a",), ("\n\x01🍎",))),
        ({"key": "a\\.b.c", "eq": 1}, In(("a.b", "c"), (1,))),
        ({"key": "\\..\\.", "eq": 1}, In((".", "."), (1,))),
        ({"key": "a\u202fb\u200d", "eq": 1}, In(("a\u202fb\u200d",), (1,))),
        ({"key": "a", "ne": 1}, And((Exists(("a",)), Not(In(("a",), (1,)))))),
        ({"key": "a", "contains": "x"}, Text(("a",), "contains", "x")),
        ({"key": "a", "prefix": "x"}, Text(("a",), "prefix", "x")),
        ({"field": "id", "ne": "x"}, Not(In((), ("x",)))),
        ({"field": "id", "gt": "x"}, Between((), (("gt", "x"),))),
    ],
)
def test_what_is_read(body: dict[str, Any], expected: Filter) -> None:
    assert parse_filter(body) == expected


def test_integers_beyond_64_bits_are_read_as_floats() -> None:
    for number in (2**63, -(2**63) - 1, 2**64, 10**300):
        condition = parse_filter({"key": "a", "gte": number})
        assert isinstance(condition, Between)
        [(_, bound)] = condition.bounds
        assert isinstance(bound, float)
        assert bound == float(number)
    exact = parse_filter({"key": "a", "eq": -(2**63)})
    assert isinstance(exact, In)
    assert isinstance(exact.values[0], int)


def deep(levels: int, kind: str = "not") -> Any:
    """Return a filter that is nested to this depth."""
    body: Any = {"key": "a", "eq": 1}
    for _ in range(levels - 1):
        body = {"not": body} if kind == "not" else {kind: [body]}
    return body


NEST: Any = []
for _ in range(100_000):
    NEST = [NEST]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (None, ["a condition must be an object", "None"]),
        ([], ["a condition must be an object", "[]"]),
        ("brand = 'x'", ["a condition must be an object", "brand = 'x'"]),
        (7, ["a condition must be an object", "7"]),
        ({}, ["{} is not a condition", "and, or, not"]),
        (
            {"brand": "Arla"},
            ["{'brand': 'Arla'} is not a condition", "eq, ne, in, contains, prefix, exists, gt, gte, lt, lte"],
        ),
        ({"and": [{"key": "a", "eq": 1}], "or": []}, ["is not a condition"]),
        ({"key": "a"}, ["{'key': 'a'} is not an operator"]),
        ({"key": "a", "like": "x%"}, ["'like' is not an operator"]),
        ({"key": "a", "eq": 1, "or": []}, ["'or' is not an operator"]),
        ({"key": "a", "eq": 1, "gt": 1}, ["eq and gt in one condition", "only gt, gte, lt and lte can be combined"]),
        ({"key": "a", "exists": True, "in": [1]}, ["exists and in in one condition"]),
        ({"and": []}, ["and takes a list of conditions", "[]"]),
        ({"or": {"key": "a", "eq": 1}}, ["or takes a list of conditions", "{'key': 'a', 'eq': 1}"]),
        ({"and": [{"key": "a", "eq": 1}, 7]}, ["a condition must be an object, not 7"]),
        ({"not": [{"key": "a", "eq": 1}]}, ["a condition must be an object"]),
        ({"key": "a", "exists": 1}, ["exists must be true or false, not 1"]),
        ({"key": "a", "exists": None}, ["exists must be true or false, not None"]),
        ({"key": "a", "eq": None}, ["a value must be a string, number or boolean, not None", "exists"]),
        ({"key": "a", "eq": [1]}, ["a value must be a string, number or boolean, not [1]"]),
        ({"key": "a", "eq": {"b": 1}}, ["a value must be", "{'b': 1}"]),
        ({"key": "a", "eq": float("nan")}, ["a value must be", "nan"]),
        ({"key": "a", "gt": float("inf")}, ["a value must be", "inf"]),
        ({"key": "a", "eq": 10**400}, ["a number must fit in a double, not 1000"]),
        ({"key": "a", "eq": 10**5000}, ["a number must fit in a double"]),
        ({"key": "a", "in": [1, -(10**400)]}, ["a number must fit in a double, not -1000"]),
        ({"key": "a", "in": []}, ["in takes a list of values, not []"]),
        ({"key": "a", "in": "abc"}, ["in takes a list of values, not 'abc'"]),
        ({"key": "a", "in": [1, None]}, ["a value must be", "None"]),
        ({"key": "a", "in": [[1]]}, ["a value must be", "[1]"]),
        ({"key": "a", "gte": True}, ["gte takes a number or a string, not True"]),
        ({"key": "a", "eq": "x" * (MAX_TEXT_CHARACTERS + 1)}, [f"at most {MAX_TEXT_CHARACTERS} characters", "xxx..."]),
        ({"key": "a", "eq": "\ud800"}, ["valid Unicode", "'\\ud800'"]),
        ({"key": 7, "eq": 1}, ["a key must be a string", "7"]),
        ({"key": None, "eq": 1}, ["a key must be a string", "None"]),
        ({"key": "", "eq": 1}, ["a key must be a string of 1 to", "''"]),
        ({"key": "x" * (MAX_KEY_CHARACTERS + 1), "eq": 1}, [f"a string of 1 to {MAX_KEY_CHARACTERS} characters"]),
        ({"key": ".", "eq": 1}, ["key '.' is not allowed"]),
        ({"key": "a..b", "eq": 1}, ["key 'a..b' is not allowed", "double dots"]),
        ({"key": ".a", "eq": 1}, ["key '.a' is not allowed"]),
        ({"key": "a.", "eq": 1}, ["key 'a.' is not allowed"]),
        ({"key": "a'b", "eq": 1}, ["is not allowed", "quotes"]),
        ({"key": 'a"b', "eq": 1}, ["""key 'a"b' is not allowed"""]),
        ({"key": "a\\b", "eq": 1}, ["is not allowed", "backslashes"]),
        ({"key": "a\\\\.b", "eq": 1}, ["is not allowed", "a backslash before a dot"]),
        ({"key": "a.\\", "eq": 1}, ["is not allowed", "a backslash before a dot"]),
        ({"key": "a\nb", "eq": 1}, ["key 'a\\nb' is not allowed", "no control characters"]),
        ({"key": "a", "field": "id", "eq": "x"}, ["'key' is not an operator"]),
        ({"field": "source", "eq": "x"}, ["field must be 'id', not 'source'", "use key"]),
        ({"field": "id"}, ["is not an operator"]),
        ({"field": "id", "eq": 7}, ["an id is compared with strings, not with 7"]),
        ({"field": "id", "in": ["x", True]}, ["an id is compared with strings, not with True"]),
        ({"field": "id", "exists": True}, ["every item has an id"]),
        ({"key": "a", "contains": ""}, ["contains takes a string that is not empty, not ''"]),
        ({"key": "a", "contains": 5}, ["contains takes a string that is not empty, not 5"]),
        ({"key": "a", "prefix": ["x"]}, ["a value must be a string", "['x']"]),
        ({"key": "a", "prefix": "x", "contains": "y"}, ["prefix and contains in one condition"]),
        ({"key": "a", "ne": None}, ["a value must be", "None"]),
        ({"key": "a\x00", "eq": 1}, ["key 'a\\x00' is not allowed"]),
        ({"key": "\ud800", "eq": 1}, ["key '\\ud800' is not allowed"]),
        (deep(MAX_DEPTH + 1), [f"nested more than {MAX_DEPTH} levels deep"]),
        (deep(MAX_DEPTH + 1, "and"), [f"nested more than {MAX_DEPTH} levels deep"]),
        (deep(100_000, "or"), [f"nested more than {MAX_DEPTH} levels deep"]),
        ({"or": [{"key": "a", "eq": 1}] * MAX_CONDITIONS}, [f"more than {MAX_CONDITIONS} conditions"]),
        ({"key": "a", "in": [1] * (MAX_VALUES + 1)}, [f"more than {MAX_VALUES:,} values"]),
        ({"and": [{"key": "a", "in": [1] * 6000}] * 2}, [f"more than {MAX_VALUES:,} values"]),
        ({"key": "a", "eq": NEST}, ["a value must be", "that list"]),
        ({"key": "a", "like": NEST}, ["'like' is not an operator"]),
        ({"surprise": NEST}, ["that dict is not a condition"]),
        (NEST, ["a condition must be an object, not that list"]),
    ],
)
def test_what_is_refused(body: Any, words: list[str]) -> None:
    """The message names the invalid part and is short, however long the input is."""
    with pytest.raises(InvalidRequest) as caught:
        parse_filter(body)
    message = str(caught.value)
    assert message.startswith("filter: ")
    assert len(message) < 400
    for word in words:
        assert word in message
    assert caught.value.param == "filter"


def test_limits_are_inclusive() -> None:
    for kind in ("not", "and", "or"):
        parse_filter(deep(MAX_DEPTH, kind))
    parse_filter({"or": [{"key": "a", "eq": 1}] * (MAX_CONDITIONS - 1)})
    parse_filter({"key": "a", "in": list(range(MAX_VALUES))})
    parse_filter({"key": "a" * MAX_KEY_CHARACTERS, "eq": "🍎" * MAX_TEXT_CHARACTERS})
    assert len(parse_path(".".join("a" * 128))) == 128


# ---- meaning

ID: Final = "shelf-3/a.jpg"
META: Final = {
    "s": "b",
    "n": 5,
    "f": 0.5,
    "whole": 5.0,
    "t": True,
    "no": False,
    "zero": 0,
    "null": None,
    "empty": "",
    "list": ["b", 1],
    "o": {"p": {"q": 1}, "null": None, "s": "b"},
    "o.p": "a dot",
    "größe": "日本",
    "large": 2**53 + 1,
    "huge": 2**63,
    "text": "5",
    "tags": ["red", "Dark blue", 7, True, None, ["nested"], {"in": "object"}],
    "ones": [1, 0.0],
    "yes": [True],
    "none": [],
    "brackets": ["[", "{}"],
    "braced": "{x",
    "end": "a\U0010ffffz",
    "o.p.q": "dots",
}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"key": "s", "eq": "b"}, True),
        ({"key": "s", "eq": "B"}, False),
        ({"key": "s", "eq": "b "}, False),
        ({"key": "empty", "eq": ""}, True),
        ({"key": "null", "eq": ""}, False),
        ({"key": "n", "eq": 5}, True),
        ({"key": "n", "eq": 5.0}, True),
        ({"key": "whole", "eq": 5}, True),
        ({"key": "n", "eq": "5"}, False),
        ({"key": "text", "eq": 5}, False),
        ({"key": "t", "eq": True}, True),
        ({"key": "t", "eq": 1}, False),
        ({"key": "t", "eq": "true"}, False),
        ({"key": "no", "eq": 0}, False),
        ({"key": "no", "eq": False}, True),
        ({"key": "zero", "eq": False}, False),
        ({"key": "zero", "eq": -0.0}, True),
        ({"key": "missing", "eq": False}, False),
        ({"key": "list", "eq": "b"}, True),
        ({"key": "list", "eq": '["b",1]'}, False),
        ({"key": "list", "in": ["b", 2]}, True),
        ({"key": "list", "in": ["c", 2]}, False),
        ({"key": "list", "ne": "b"}, False),
        ({"key": "list", "ne": "c"}, True),
        ({"key": "tags", "eq": "red"}, True),
        ({"key": "tags", "eq": "Red"}, False),
        ({"key": "tags", "eq": 7}, True),
        ({"key": "tags", "eq": 1}, False),
        ({"key": "tags", "eq": True}, True),
        ({"key": "tags", "eq": False}, False),
        ({"key": "tags", "eq": "nested"}, False),
        ({"key": "tags", "eq": '["nested"]'}, False),
        ({"key": "tags", "eq": "object"}, False),
        ({"key": "tags.in", "eq": "object"}, False),
        ({"key": "ones", "eq": True}, False),
        ({"key": "ones", "in": [False, 0]}, True),
        ({"key": "ones", "lte": 0}, True),
        ({"key": "yes", "eq": 1}, False),
        ({"key": "yes", "gte": 1}, False),
        ({"key": "none", "eq": ""}, False),
        ({"key": "none", "ne": ""}, True),
        ({"key": "none", "exists": True}, True),
        ({"key": "brackets", "eq": "["}, True),
        ({"key": "brackets", "contains": "}"}, True),
        ({"key": "tags", "gte": 7, "lt": 8}, True),
        ({"key": "ones", "gt": 0, "lt": 1}, False),  # one element must be within all bounds
        ({"key": "tags", "gte": "re", "lt": "rf"}, True),
        ({"key": "tags", "gt": "red"}, False),
        ({"key": "s", "ne": "b"}, False),
        ({"key": "s", "ne": "c"}, True),
        ({"key": "n", "ne": "5"}, True),
        ({"key": "t", "ne": 1}, True),
        ({"key": "o", "ne": "b"}, True),
        ({"key": "missing", "ne": "b"}, False),
        ({"key": "null", "ne": "b"}, False),
        ({"key": "größe", "contains": "本"}, True),
        ({"key": "s", "contains": "B"}, False),
        ({"key": "tags", "contains": "blue"}, True),
        ({"key": "tags", "contains": "nested"}, False),
        ({"key": "o", "contains": "q"}, False),
        ({"key": "n", "contains": "5"}, False),
        ({"key": "text", "contains": "5"}, True),
        ({"key": "missing", "contains": "5"}, False),
        ({"key": "list", "prefix": "b"}, True),
        ({"key": "list", "prefix": "["}, False),
        ({"key": "o", "prefix": "{"}, False),
        ({"key": "braced", "prefix": "{"}, True),
        ({"key": "tags", "prefix": "Dark"}, True),
        ({"key": "tags", "prefix": "blue"}, False),
        ({"key": "n", "prefix": "5"}, False),
        ({"key": "t", "prefix": "1"}, False),
        ({"key": "end", "prefix": "a\U0010ffff"}, True),
        ({"key": "end", "prefix": "\U0010ffff"}, False),
        ({"field": "id", "eq": ID}, True),
        ({"field": "id", "ne": ID}, False),
        ({"field": "id", "ne": "x"}, True),
        ({"field": "id", "in": ["x", ID]}, True),
        ({"field": "id", "in": ["x", "[1]"]}, False),
        ({"field": "id", "prefix": "shelf-3/"}, True),
        ({"field": "id", "prefix": "shelf-4/"}, False),
        ({"field": "id", "contains": "/a."}, True),
        ({"field": "id", "gte": "shelf-3", "lt": "shelf-4"}, True),
        ({"key": "id", "exists": True}, False),
        ({"key": "o", "eq": "b"}, False),
        ({"key": "s", "in": ["a", "b"]}, True),
        ({"key": "s", "in": ["a", "c"]}, False),
        ({"key": "t", "in": [1, "1", False]}, False),
        ({"key": "t", "in": [1, True]}, True),
        ({"key": "o.p.q", "eq": 1}, True),
        ({"key": "o.s", "eq": "b"}, True),
        ({"key": "o.p", "eq": "a dot"}, False),  # a dot goes into an object
        ({"key": "o\\.p", "eq": "a dot"}, True),  # an escaped dot is part of the key
        ({"key": "o\\.p\\.q", "eq": "dots"}, True),
        ({"key": "o\\.p.q", "exists": True}, False),
        ({"key": "s.b", "exists": True}, False),
        ({"key": "list.0", "exists": True}, False),
        ({"key": "größe", "eq": "日本"}, True),
        ({"key": "s", "exists": True}, True),
        ({"key": "no", "exists": True}, True),
        ({"key": "list", "exists": True}, True),
        ({"key": "o.p", "exists": True}, True),
        ({"key": "null", "exists": True}, False),
        ({"key": "null", "exists": False}, True),
        ({"key": "o.null", "exists": False}, True),
        ({"key": "missing", "exists": False}, True),
        ({"key": "missing.deeper", "exists": False}, True),
        ({"key": "n", "gt": 5}, False),
        ({"key": "n", "gte": 5}, True),
        ({"key": "n", "lt": 5.1}, True),
        ({"key": "n", "gte": 4, "lt": 5}, False),
        ({"key": "n", "gt": 4, "gte": 5, "lt": 6, "lte": 5}, True),
        ({"key": "n", "gt": ""}, False),
        ({"key": "n", "lt": "9"}, False),
        ({"key": "text", "lt": 9}, False),
        ({"key": "t", "gte": 1}, False),
        ({"key": "t", "lte": 1}, False),
        ({"key": "no", "lt": 1}, False),
        ({"key": "missing", "lt": 1}, False),
        ({"key": "null", "lte": ""}, False),
        ({"key": "list", "gte": ""}, True),
        ({"key": "s", "gt": "a"}, True),
        ({"key": "s", "gt": "b"}, False),
        ({"key": "s", "gt": "Z"}, True),
        ({"key": "größe", "gt": "z"}, True),
        ({"key": "größe", "lt": "🍎"}, True),  # by code points, not by UTF-16
        ({"key": "n", "gte": 1, "lt": "x"}, False),  # nothing is both
        ({"key": "large", "eq": 2**53}, False),
        ({"key": "large", "gt": 2**53}, True),
        ({"key": "large", "gt": float(2**53)}, True),
        ({"key": "huge", "eq": 2**63}, True),
        ({"key": "huge", "eq": 2**63 + 1}, True),  # beyond 64 bits numbers are floats
        ({"key": "huge", "gt": 2**63 - 1}, True),
        ({"not": {"key": "missing", "eq": 1}}, True),
        ({"not": {"key": "missing", "gt": 1}}, True),
        ({"not": {"key": "n", "gt": "a"}}, True),
        ({"not": {"key": "n", "eq": 5}}, False),
        ({"and": [{"key": "n", "eq": 5}, {"key": "s", "eq": "b"}]}, True),
        ({"and": [{"key": "n", "eq": 5}, {"key": "missing", "eq": "b"}]}, False),
        ({"or": [{"key": "missing", "eq": 5}, {"key": "s", "eq": "b"}]}, True),
        ({"or": [{"key": "missing", "eq": 5}, {"key": "null", "eq": "b"}]}, False),
    ],
)
def test_what_passes(body: dict[str, Any], expected: bool) -> None:
    where = parse_filter(body)
    assert matches(where, META, ID) is expected
    assert matches(Not(where), META, ID) is not expected
    with sqlite3.connect(":memory:") as db:
        assert in_sql(db, where, META) is expected
        assert in_sql(db, Not(where), META) is not expected
    db.close()


# ---- as SQL


def in_sql(db: sqlite3.Connection, where: Filter, metadata: dict[str, Any]) -> bool:
    """Return whether an item with this metadata passes the filter in SQLite. The embedded store writes the metadata's
    text in the same way.
    """
    condition, parameters = to_sql(where)
    text = json.dumps(metadata, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    query = f"SELECT count(*) FROM (SELECT ? AS metadata, ? AS id) WHERE {condition}"
    return bool(db.execute(query, [text, ID, *parameters]).fetchone()[0])


KEYS: Final = ["a", "b", "a.b", "a.b.c", "日本", "with space", "$", "a[0]", "#-1", "%s", "?1", ":a", "-- x", "/*"]
_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
_numbers = st.one_of(
    st.integers(-2, 2),
    *(
        st.integers(centre - 3, centre + 3)
        for centre in (2**53, -(2**53), 2**63 - 4, -(2**63) + 3, 2**31, 2**63 + 2048, 2**64 - 5)
    ),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([-0.0, 0.0, 1.0, float(2**53), float(2**63), -float(2**63), 9.007199254740994e15, 0.1, 5e-324]),
)
_texts = st.one_of(
    _text,
    st.sampled_from(["", "a", "b", "{}", "[]", '{"a":1}', "[1]", "1", "0", "1.0", "true", "null", "'", '"', "\\", "é"]),
)
_scalars = st.one_of(_numbers, _texts, st.booleans())
_metadata_numbers = _numbers.filter(lambda number: isinstance(number, float) or -(2**63) <= number < 2**64)
_values = st.recursive(
    st.one_of(_metadata_numbers, _texts, st.booleans(), st.none()),
    lambda inside: st.lists(inside, max_size=2) | st.dictionaries(st.sampled_from("abc"), inside, max_size=3),
    max_leaves=5,
)
_metadata = st.dictionaries(
    st.sampled_from([*KEYS, "c", "a'b", 'a"b', "a\\", "\n", ""]), _values, max_size=4
) | st.builds(lambda value: {"a": value}, _values)
_key = st.sampled_from(KEYS) | st.just("a")


def _values_of(body: Any) -> Iterator[Any]:
    if "key" in body:
        yield from (v for name, given in body.items() if name != "key" for v in (given if name == "in" else [given]))
    for inside in body.values():
        for part in inside if isinstance(inside, list) else [inside]:
            if isinstance(part, dict):
                yield from _values_of(part)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=filter_bodies(_key, _scalars, st.one_of(_numbers, _texts)), metadata=_metadata)
@example(body={"key": "a", "in": [1, True, "[1]"]}, metadata={"a": [1]})
@example(body={"key": "a", "eq": 2**63}, metadata={"a": 2**63 - 1})
@example(body={"key": "a", "lte": 2**53}, metadata={"a": 2**53 + 1})
@example(body={"key": "a", "gte": float(2**63)}, metadata={"a": 2**64 - 1})
@example(body={"key": "a.b", "eq": 1}, metadata={"a.b": 1})
@example(body={"key": "a.b", "eq": 1}, metadata={"a": {"b": 1}})
def test_sql_agrees_with_matches(body: dict[str, Any], metadata: dict[str, Any]) -> None:
    """The test uses the drawn metadata, and metadata that holds each of the filter's own values."""
    where = parse_filter(body)
    with sqlite3.connect(":memory:") as db:
        assert in_sql(db, where, metadata) is matches(where, metadata, ID)
        for value in _values_of(body):
            if isinstance(value, int) and not -(2**63) <= value < 2**64:
                continue  # no store takes it
            for near in ({"a": value}, {"a": {"b": value}}, {"a": str(value)}, {"a": [value]}, {"a": [[value], value]}):
                assert in_sql(db, where, near) is matches(where, near, ID), near
    db.close()


@settings(max_examples=150, deadline=None)
@given(value=_scalars | st.floats(allow_nan=False, allow_infinity=False, width=64))
def test_every_scalar_equals_itself_in_sql(value: Any) -> None:
    """Floats matter most: SQLite must read the text that Python wrote without losing a bit."""
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return
    with sqlite3.connect(":memory:") as db:
        assert in_sql(db, parse_filter({"key": "a", "eq": value}), {"a": value})
        if not isinstance(value, bool):
            assert in_sql(db, parse_filter({"key": "a", "gte": value, "lte": value}), {"a": value})
            assert not in_sql(db, parse_filter({"key": "a", "gt": value}), {"a": value})
            assert not in_sql(db, parse_filter({"key": "a", "lt": value}), {"a": value})
    db.close()


@pytest.mark.parametrize(
    "body",
    [
        {"key": "a", "in": [*range(MAX_VALUES - 1), 77_777]},
        {"key": "a", "in": [*(f"[{n}" for n in range(MAX_VALUES - 1)), "[77777"]},
        {"key": "a", "in": [*[True, False] * (MAX_VALUES // 2 - 1), 77_777]},
        {"or": [{"key": "a", "eq": n} for n in [*range(MAX_CONDITIONS - 2), 77_777]]},
        {"or": [{"not": {"key": "a", "gt": n, "gte": 0, "lt": n + 5, "lte": n}} for n in range(127)]},
        {"and": [{"not": {"key": "a", "in": [n, f"[{n}", True]}} for n in range(127)]},
        {"not": deep(MAX_DEPTH - 1)},
    ],
)
def test_the_largest_filters_are_not_too_large_for_sqlite(body: dict[str, Any]) -> None:
    where = parse_filter(body)
    with sqlite3.connect(":memory:") as db:
        for metadata in ({"a": 77_777}, {"a": "[77777"}, {"a": True}, {"a": 5}, {}):
            assert in_sql(db, where, metadata) is matches(where, metadata, ID)
    db.close()


def test_values_are_parameters_and_keys_are_quoted() -> None:
    condition, parameters = to_sql(parse_filter({"key": "x) OR (1", "in": ["' OR 1=1 --", "[']"]}))
    assert "1=1" not in condition
    assert parameters == ["' OR 1=1 --", "[']"] * 2
    assert condition.count("?") == 4  # for the value itself, and for the elements of a list
    assert extract(("x) OR (1", "b")) == """json_extract(metadata, '$."x) OR (1"."b"')"""


def test_a_declared_index_answers() -> None:
    """The expression must equal that of the index word for word."""
    with sqlite3.connect(":memory:") as db:
        db.execute("CREATE TABLE items (number INTEGER PRIMARY KEY, metadata TEXT)")
        db.execute(f"CREATE INDEX brand ON items ({extract(parse_path('shelf.brand'))})")
        for body in (
            {"key": "shelf.brand", "eq": "x"},
            {"key": "shelf.brand", "eq": True},
            {"key": "shelf.brand", "eq": 1},
            {"key": "shelf.brand", "eq": "[x"},
            {"key": "shelf.brand", "in": ["x", "y", 3]},
            {"key": "shelf.brand", "in": ["x", 0, False]},
            {"key": "shelf.brand", "gte": 3, "lt": 5},
            {"key": "shelf.brand", "prefix": "x"},
        ):
            condition, parameters = to_sql(parse_filter(body))
            plan = db.execute(f"EXPLAIN QUERY PLAN SELECT number FROM items WHERE {condition}", parameters).fetchall()
            assert any("USING INDEX brand" in row[3] for row in plan), body
            assert not any(row[3].startswith("SCAN items") for row in plan), body
    db.close()
