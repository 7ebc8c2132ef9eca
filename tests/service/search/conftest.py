"""Fixtures for the vector stores on which the conformance tests run.

A store is empty when a test starts, and it is emptied when the test ends.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from service.errors import StorageFailed
from service.search.embedded import open_embedded
from service.search.store import VectorStore
from tests.dict_store import DictStore


async def _open_dict(_: pytest.FixtureRequest) -> VectorStore:
    return DictStore()


async def _open_embedded(request: pytest.FixtureRequest) -> VectorStore:
    folder: Path = request.getfixturevalue("tmp_path")
    return await open_embedded(folder, threads=2)


async def _open_milvus(request: pytest.FixtureRequest) -> VectorStore:
    from service.search.milvus import open_milvus  # needs an extra that the tests of other stores do not need

    return await open_milvus(request.getfixturevalue("milvus_url"))


STORES: Final[dict[str, Callable[[pytest.FixtureRequest], Awaitable[VectorStore]]]] = {
    "dict": _open_dict,
    "embedded": _open_embedded,
    "milvus": _open_milvus,
}


@pytest.fixture(scope="session")
def milvus_url() -> Iterator[str]:
    """Start one server for all tests, because starting it takes seconds, and return its URL."""
    from tests.service.search.milvus_server import milvus_server

    with milvus_server() as url:
        yield url


@pytest.fixture(params=list(STORES))
def store_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def is_slow(store_name: str) -> bool:
    """Return whether a call to this store takes at least a tenth of a second. Tests then use smaller sizes."""
    return store_name == "milvus"


@pytest.fixture
async def store(store_name: str, request: pytest.FixtureRequest) -> AsyncIterator[VectorStore]:
    made = await STORES[store_name](request)
    try:
        yield made
        with contextlib.suppress(StorageFailed):  # raised if the test has closed the store
            for alias in await made.aliases():
                await made.drop_alias(alias)
            for info in await made.collections():
                await made.drop(info.name)
    finally:
        await made.close()
