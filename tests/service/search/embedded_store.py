"""Helpers for tests of the embedded store: a store in a folder, items for it, and one step of maintenance."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from model.files import lock_file
from service.search.embedded import EmbeddedStore, open_embedded
from service.search.filters import parse_filter
from service.search.store import Item, SearchParams
from tests.dict_store import DictStore

TAG = "f" * 64 + "/cls/l2/224x224/fp32"
D = 8


async def opened(folder: Path, **options: Any) -> EmbeddedStore:
    store = await open_embedded(folder, threads=2, **options)
    assert isinstance(store, EmbeddedStore)
    return store


@asynccontextmanager
async def maintained_by_the_test(folder: Path) -> AsyncIterator[EmbeddedStore]:
    """Open a store that only the test maintains.

    The test holds the maintenance lock, so the store behaves as if another process did the maintenance.
    """
    held = lock_file(folder / "maintenance.lock")
    assert held is not None
    with held:
        store = await opened(folder, interval_s=60.0)
        yield store
        await store.close()


def clustered(count: int, dimension: int = D, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(2, count // 50), dimension))
    return (centres[rng.integers(0, len(centres), count)] + 0.5 * rng.normal(size=(count, dimension))).astype(
        np.float32
    )


def items(count: int, dimension: int = D, seed: int = 0, prefix: str = "i") -> list[Item]:
    vectors = clustered(count, dimension, seed)
    return [Item(f"{prefix}{n}", vector, {"n": n, "even": n % 2 == 0}) for n, vector in enumerate(vectors)]


async def same(store: EmbeddedStore, plain: DictStore, seed: int, k: int = 5, *, exact: bool = True) -> None:
    """Assert that both stores return the same results for a few queries, with and without filters."""
    assert await store.count("c") == await plain.count("c")
    queries = np.random.default_rng(seed).normal(size=(3, D))
    for where in (None, parse_filter({"key": "even", "eq": True}), parse_filter({"key": "n", "lt": 4})):
        ours = await store.search("c", queries, k, tag=TAG, where=where, params=SearchParams(exact=exact))
        theirs = await plain.search("c", queries, k, tag=TAG, where=where)
        for a, b in zip(ours, theirs, strict=True):
            assert [hit.id for hit in a] == [hit.id for hit in b]
            np.testing.assert_allclose([hit.score for hit in a], [hit.score for hit in b], atol=2e-6)
            assert [hit.metadata for hit in a] == [hit.metadata for hit in b]


def build_one(store: EmbeddedStore, *, seal_rows: int) -> None:
    """Run one step of maintenance of the collection "c" in the calling thread."""
    db = store._connect()
    store._maintenance._seal_rows = seal_rows
    with store._maintenance._working:
        store._maintenance._step(db, "c")
