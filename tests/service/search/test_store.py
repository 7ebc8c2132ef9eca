"""Tests of the checks that all stores share, at each limit: names, ids, vectors, metadata and sources."""

from typing import Any

import numpy as np
import pytest

from service.errors import Conflict, InvalidRequest, ModelMismatch
from service.search.checks import (
    check_id,
    check_k,
    check_match,
    check_name,
    check_source,
    checked_items,
    merged,
    metadata_text,
    normalised,
    normalised_rows,
)
from service.search.store import (
    MAX_DEPTH,
    MAX_ID_CHARACTERS,
    MAX_METADATA_BYTES,
    MAX_SOURCE_CHARACTERS,
    CollectionInfo,
    CollectionSpec,
    Item,
)


def test_limits_are_inclusive() -> None:
    for name in ("a", "0", "a" * 64, "a-_9"):
        assert check_name(name) == name
    assert check_id("é" * MAX_ID_CHARACTERS) == "é" * MAX_ID_CHARACTERS
    assert [check_k(k) for k in (1, MAX_DEPTH)] == [1, MAX_DEPTH]
    longest = Item("a", np.ones(2), source="s" * MAX_SOURCE_CHARACTERS, digest="0" * 64)
    assert check_source(longest) is longest
    largest = {"x": "é" * ((MAX_METADATA_BYTES - len('{"x":""}')) // 2)}
    assert len(metadata_text(largest).encode()) == MAX_METADATA_BYTES


@pytest.mark.parametrize(
    ("check", "values", "param"),
    [
        (check_name, ["", "a" * 65, "-a", "_a", "A", "a b", "a\n", "é"], "collection"),
        (check_id, ["", "i" * (MAX_ID_CHARACTERS + 1), "a\n", "\x00"], "id"),
        (check_k, [0, -1, MAX_DEPTH + 1], "k"),
        (
            metadata_text,
            [{"x": "x" * (MAX_METADATA_BYTES - len('{"x":""}') + 1)}, {"x": "é" * (MAX_METADATA_BYTES // 2)}],
            "metadata",
        ),
        (metadata_text, [{"x": "\x00"}, {"x": float("nan")}, {"x": b""}], "metadata"),
    ],
)
def test_what_lies_beyond_is_refused_by_its_name(check: Any, values: list[Any], param: str) -> None:
    for value in values:
        with pytest.raises(InvalidRequest) as caught:
            check(value)
        assert caught.value.param == param


def test_a_text_that_looks_like_the_character_zero_is_allowed() -> None:
    assert metadata_text({"x": "\\u0000"}) == '{"x":"\\\\u0000"}'


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"source": ""}, "source"),
        ({"source": "s" * (MAX_SOURCE_CHARACTERS + 1)}, "source"),
        ({"source": "a\tb"}, "source"),
        ({"digest": "0" * 63}, "digest"),
        ({"digest": "0" * 65}, "digest"),
        ({"digest": "A" * 64}, "digest"),
        ({"digest": ""}, "digest"),
    ],
)
def test_a_source_or_digest_that_is_refused(change: dict[str, str], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_source(Item("a", np.ones(2), **change))
    assert caught.value.param == param


def test_a_tag_is_told_before_a_dimension() -> None:
    info = CollectionInfo("c", CollectionSpec("one", 8), 0)
    check_match(info, tag="one", dimension=8)
    for tag, dimension, kind in (("two", 8, ModelMismatch), ("two", 9, ModelMismatch), ("one", 9, Conflict)):
        with pytest.raises(kind):
            check_match(info, tag=tag, dimension=dimension)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-20, 1.0, 1e20, 1e160, 1e300])
@pytest.mark.parametrize("count", [1, 3])
def test_vectors_of_any_scale_get_length_one(scale: float, count: int) -> None:
    rows = scale * np.array([[3.0, 4.0], [-4.0, 3.0], [0.0, 1.0]])[:count]
    expected = np.array([[0.6, 0.8], [-0.8, 0.6], [0.0, 1.0]], np.float32)[:count]
    np.testing.assert_allclose(normalised_rows(rows), expected, atol=1e-7)
    np.testing.assert_allclose([normalised(row) for row in rows], expected, atol=1e-7)
    assert normalised_rows(rows).dtype == normalised(rows[0]).dtype == np.float32


@pytest.mark.parametrize("rows", [[[0.0, 0.0]], [[1.0, np.nan]], [[np.inf, 1.0]], [[]], [], [1.0], [[1.0], [0.0]]])
def test_what_has_no_direction_is_refused(rows: Any) -> None:
    with pytest.raises(InvalidRequest):
        normalised_rows(rows)


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ({}, {"a": {"b": 1}, "c": "d", "e": [1]}),
        ({"a": {"x": 2}}, {"a": {"b": 1, "x": 2}, "c": "d", "e": [1]}),
        ({"a": {"b": None}}, {"a": {}, "c": "d", "e": [1]}),
        ({"a": None, "none": None}, {"c": "d", "e": [1]}),
        ({"c": {"x": None, "y": 1}}, {"a": {"b": 1}, "c": {"y": 1}, "e": [1]}),
        ({"e": {"y": 1}}, {"a": {"b": 1}, "c": "d", "e": {"y": 1}}),
        ({"a": [2]}, {"a": [2], "c": "d", "e": [1]}),
    ],
)
def test_a_patch_is_merged(patch: Any, expected: Any) -> None:
    before = {"a": {"b": 1}, "c": "d", "e": [1]}
    assert merged(before, patch) == expected
    assert before == {"a": {"b": 1}, "c": "d", "e": [1]}


def test_of_equal_ids_the_last_is_written() -> None:
    rows, dimension = checked_items([Item("a", np.ones(2)), Item("b", np.ones(2)), Item("a", -np.ones(2), {"n": 1})])
    assert dimension == 2
    assert [(item.id, vector[0] > 0, text) for item, vector, text in rows] == [
        ("a", False, '{"n":1}'),
        ("b", True, "{}"),
    ]
    for wrong in ([], [Item("a", np.ones(2)), Item("b", np.ones(3))]):
        with pytest.raises(InvalidRequest):
            checked_items(wrong)
