"""Tests of the search for neighbours above a threshold."""

import numpy as np
import pytest

from tests.training.curate.vectors import around_centres, unit
from training.curate import neighbours as module
from training.curate.kmeans import Floats
from training.curate.neighbours import Pairs, neighbours_above


def plain_neighbours(
    queries: Floats, vectors: Floats, threshold: float, k: int, leave_one_out: bool = False
) -> list[tuple[int, int]]:
    """All pairs by their definition, in float64."""
    pairs = []
    for query, products in enumerate(queries.astype(np.float64) @ vectors.astype(np.float64).T):
        above = [(-score, index) for index, score in enumerate(products) if score >= threshold]
        kept = [(query, index) for _, index in sorted(above) if not (leave_one_out and index == query)]
        pairs += kept[:k]
    return pairs


def listed(pairs: Pairs) -> list[tuple[int, int]]:
    return list(zip(pairs.query.tolist(), pairs.vector.tolist(), strict=True))


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"QUERIES": 70, "ROWS": 16, "COLUMNS": 37, "SCORED": 11}.items():
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize(("threshold", "k"), [(0.9, 1000), (0.9, 3), (-1, 5), (1, 4)])
def test_all_pairs_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch, threshold: float, k: int) -> None:
    small_blocks(monkeypatch)
    queries, vectors = around_centres(150), around_centres(230, seed=1)
    vectors[7] = queries[3]
    found = neighbours_above(queries, vectors, threshold, k, exact=True)
    assert listed(found) == plain_neighbours(queries, vectors, threshold, k)
    scores = np.einsum("ij,ij->i", queries[found.query], vectors[found.vector])
    np.testing.assert_allclose(found.score, scores, atol=1e-6)


def test_no_vector_is_its_own_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    vectors = around_centres(200)
    for exact in (True, False):
        found = neighbours_above(vectors, vectors, 0.9, 4, leave_one_out=True, exact=exact)
        assert len(found.query)
        assert (found.query != found.vector).all()
    found = neighbours_above(vectors, vectors, 0.9, 4, leave_one_out=True, exact=True)
    assert listed(found) == plain_neighbours(vectors, vectors, 0.9, 4, leave_one_out=True)


def test_lists_find_almost_all_near_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBES", 8)
    vectors = around_centres(3000, centres=200, dimensions=32, spread=0.15)
    lists, all_pairs = (
        set(listed(neighbours_above(vectors, vectors, 0.9, 50, leave_one_out=True, exact=exact)))
        for exact in (False, True)
    )
    assert len(all_pairs) > 10_000
    assert lists <= all_pairs
    assert len(lists) / len(all_pairs) > 0.99


def test_lists_compare_few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBES", 2)
    vectors = around_centres(3000)
    tiles = module._Lists(vectors, None).tiles(vectors, None)
    assert sum(len(rows) * len(columns) for rows, columns in tiles) < len(vectors) ** 2 / 20


def test_the_number_of_threads_does_not_change_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    vectors = around_centres(500, dimensions=48)
    one, three = (
        neighbours_above(vectors, vectors, 0.8, 6, leave_one_out=True, exact=False, threads=threads)
        for threads in (1, 3)
    )
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, three, strict=True))


def test_the_size_of_the_task_decides_whether_all_pairs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = around_centres(100)
    made = []
    lists = module._Lists
    monkeypatch.setattr(module, "_Lists", lambda *arguments: made.append(1) or lists(*arguments))
    monkeypatch.setattr(module, "EXACT_PAIRS", 100 * 100)
    neighbours_above(vectors, vectors, 0.9, 5)
    assert not made
    monkeypatch.setattr(module, "EXACT_PAIRS", 100 * 100 - 1)
    neighbours_above(vectors, vectors, 0.9, 5)
    assert made


def test_many_copies_of_one_vector_are_limited_to_k() -> None:
    vectors = unit(np.ones((400, 8)) + 1e-3 * np.random.default_rng(0).normal(size=(400, 8)))
    found = neighbours_above(vectors, vectors, 0.9, 7, leave_one_out=True)
    assert np.bincount(found.query).tolist() == [7] * 400


def test_nothing_to_compare() -> None:
    nothing, vectors = np.empty((0, 16), np.float32), around_centres(5)
    for queries, others in ((nothing, vectors), (vectors, nothing)):
        assert listed(neighbours_above(queries, others, 0.5, 3)) == []


@pytest.mark.parametrize(
    ("threshold", "k", "message"), [(1.1, 3, "the threshold is 1.1"), (0.5, 0, "k is 0; it must be at least 1")]
)
def test_bad_numbers(threshold: float, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neighbours_above(around_centres(5), around_centres(5), threshold, k)


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match="with the same D"):
        neighbours_above(around_centres(5), around_centres(5, dimensions=7), 0.5, 3)
    with pytest.raises(ValueError, match="5 queries cannot be the 6 vectors"):
        neighbours_above(around_centres(5), around_centres(6), 0.5, 3, leave_one_out=True)
