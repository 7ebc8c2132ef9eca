"""Tests of the searches of a graph: the arrays that a thread keeps between its searches do not change the results."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np
import pytest

from service.search import indexes
from service.search.indexes import FEW_QUERIES, FEW_RESULTS, _found


def graph(dimension: int, count: int = 300) -> Any:
    index = faiss.IndexHNSWFlat(dimension, 8, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors(count, dimension))
    return index


def vectors(count: int, dimension: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)


@pytest.mark.parametrize(
    ("count", "k", "keeps"),
    [(1, 10, True), (FEW_QUERIES, 64, True), (FEW_QUERIES + 1, 2, False), (2, FEW_RESULTS // 2 + 1, False)],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_search_returns_what_faiss_returns(monkeypatch, count, k, keeps, order):
    monkeypatch.setattr(indexes, "_of_thread", kept := threading.local())
    index, queries = graph(8), np.array(vectors(count, 8, seed=1), order=order)
    params = faiss.SearchParametersHNSW(efSearch=32)
    scores, positions = index.search(queries, k, params=params)
    found = _found(index, queries, k, params)
    assert np.array_equal(found.scores, scores)
    assert np.array_equal(found.positions, positions)
    assert hasattr(kept, "arrays") == keeps


def test_a_result_stays_the_same_after_other_searches():
    index, other, params = graph(8), graph(5), faiss.SearchParametersHNSW(efSearch=32)
    first, second = (_found(index, vectors(2, 8, seed=seed), 3, params) for seed in (1, 2))
    _found(other, vectors(2, 5), 3, params)
    for seed, found in ((1, first), (2, second)):
        assert np.array_equal(found.positions, index.search(vectors(2, 8, seed=seed), 3, params=params)[1])


def test_threads_do_not_share_arrays():
    index, params = graph(8), faiss.SearchParametersHNSW(efSearch=32)
    expected = [index.search(vectors(1, 8, seed=seed), 5, params=params)[1] for seed in range(200)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: _found(index, vectors(1, 8, seed=seed), 5, params).positions, range(200)))
    assert np.array_equal(found, expected)


def test_vectors_of_another_dimension_are_refused():
    with pytest.raises(AssertionError):
        _found(graph(8), vectors(1, 5), 3, None)
