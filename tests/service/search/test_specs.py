"""Tests of the settings of a collection: every limit is allowed, and values beyond it are refused."""

from dataclasses import replace
from typing import Any

import pytest

from service.errors import InvalidRequest
from service.search.specs import check_spec
from service.search.store import CollectionSpec, IndexSpec

SPEC = CollectionSpec("tag", 8)


def with_setting(name: str, value: Any) -> CollectionSpec:
    if name.startswith("index."):
        return replace(SPEC, index=replace(SPEC.index, **{name.removeprefix("index."): value}))
    return replace(SPEC, **{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tag", ["t", "t" * 256]),
        ("dimension", [1, 8192]),
        ("dtype", ["float32", "float16"]),
        ("index.kind", ["auto", "flat", "hnsw", "ivf_pq", "rabitq"]),
        ("index.m", [None, 2, 256]),
        ("index.ef_construction", [None, 4, 4096]),
        ("index.n_lists", [None, 1, 2**20]),
        ("index.target_recall", [0.5, 1, 1.0]),
        ("indexed", [(), tuple("abcdefghijklmnop")]),
        ("originals", [True, False]),
    ],
)
def test_limits_are_inclusive(name: str, values: list[Any]) -> None:
    for value in values:
        spec = with_setting(name, value)
        assert check_spec(spec) is spec


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tag", ["", "t" * 257, "a\nb", 7, None]),
        ("dimension", [0, -1, 8193, 8.0, "8", True, None]),
        ("dtype", ["float64", "", None, ["float32"]]),
        ("index", [None, {}, "hnsw"]),
        ("index.kind", ["nonsense", "", None]),
        ("index.m", [1, 257, 2.0, True]),
        ("index.ef_construction", [3, 4097, True]),
        ("index.n_lists", [0, 2**20 + 1, True]),
        ("index.target_recall", [0.49, 1.01, float("nan"), True, "0.9", None]),
        ("indexed", [["a"], tuple("abcdefghijklmnopq"), ("a..b",), (7,)]),
        ("originals", [1, 0, None, "true"]),
    ],
)
def test_what_lies_beyond_is_refused_by_its_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest) as caught:
            check_spec(with_setting(name, value) if name != "index" else replace(SPEC, index=value))
        assert caught.value.param == name.partition(".")[0]
        assert caught.value.detail.startswith(name)


def test_the_defaults_are_allowed() -> None:
    assert check_spec(CollectionSpec("tag", 1, index=IndexSpec())).index.target_recall == 0.98
