"""Tests of the searches of a graph: the arrays that a thread keeps between its searches do not change the results."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from service.search import indexes
from service.search.indexes import FEW_QUERIES, FEW_RESULTS, _found


def graph(dimension: int, count: int = 300) -> Any:
    """Return a segment with a graph of `count` vectors."""
    index = faiss.IndexHNSWFlat(dimension, 8, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors(count, dimension))
    return SimpleNamespace(index=index, dimension=dimension)


def vectors(count: int, dimension: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)


@pytest.mark.parametrize(
    ("count", "k", "keeps"),
    [(1, 10, True), (FEW_QUERIES, FEW_RESULTS, True), (FEW_QUERIES + 1, 2, False), (2, FEW_RESULTS + 1, False)],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_search_returns_what_faiss_returns(monkeypatch, count, k, keeps, order):
    monkeypatch.setattr(indexes, "_kept", kept := indexes._Kept())
    segment, queries = graph(8), np.array(vectors(count, 8, seed=1), order=order)
    params = faiss.SearchParametersHNSW(efSearch=32)
    scores, positions = segment.index.search(queries, k, params=params)
    found = _found(segment, queries, k, params)
    assert np.array_equal(found.scores, scores)
    assert np.array_equal(found.positions, positions)
    assert bool(kept.arrays) == keeps


def test_a_result_stays_the_same_after_other_searches():
    segment, other, params = graph(8), graph(5), faiss.SearchParametersHNSW(efSearch=32)
    first, second = (_found(segment, vectors(2, 8, seed=seed), 3, params) for seed in (1, 2))
    _found(other, vectors(2, 5), 3, params)
    for seed, found in ((1, first), (2, second)):
        assert np.array_equal(found.positions, segment.index.search(vectors(2, 8, seed=seed), 3, params=params)[1])


def test_a_thread_keeps_arrays_for_a_limited_number_of_shapes(monkeypatch):
    monkeypatch.setattr(indexes, "_kept", kept := indexes._Kept())
    monkeypatch.setattr(indexes, "FEW_SHAPES", 3)
    segment = graph(8)
    for k in (1, 2, 3, 4, 3):
        assert _found(segment, vectors(1, 8), k, None).positions.shape == (1, k)
        assert len(kept.arrays) <= 3


def test_threads_do_not_share_arrays():
    segment, params = graph(8), faiss.SearchParametersHNSW(efSearch=32)
    expected = [segment.index.search(vectors(1, 8, seed=seed), 5, params=params)[1] for seed in range(200)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: _found(segment, vectors(1, 8, seed=seed), 5, params).positions, range(200)))
    assert np.array_equal(found, expected)


def test_vectors_of_another_dimension_are_refused():
    with pytest.raises(AssertionError):
        _found(graph(8), vectors(1, 5), 3, None)
