"""Tests of the entry point of retrieval, called without HTTP."""

import base64
import subprocess
import sys

import numpy as np
import pytest

from service.errors import CollectionNotFound, InvalidItems, InvalidRequest, ItemNotFound, ModelNotFound
from service.outcomes import Outcome, indexed
from service.retrieval.reading import read_image_search, read_search
from service.retrieval.search import search
from service.search.store import Item
from tests.dict_store import DictStore
from tests.fakes import DIMS, photo, running


def text_of(image: bytes) -> str:
    return base64.b64encode(image).decode()


async def filled(run) -> None:
    items = [Item(f"v{i}", row, {"shelf": i % 2}) for i, row in enumerate(np.eye(DIMS, dtype=np.float32) + 0.1)]
    await run.service.store.upsert("shop", items, tag=run.service.tag())


async def ask(run, fields: dict):
    return await search(run.service, "shop", await read_search(fields, run.service.settings, run.service.web_images))


async def test_one_vector_takes_one_call_of_the_store(tmp_path):
    store = DictStore()
    async with running(tmp_path, store=store) as run:
        await filled(run)
        calls: list[str] = []
        store.info = lambda name: calls.append(name)  # the quick way knows nothing of the collection beforehand
        results = await ask(run, {"vector": [0.0, 1.0, *[0.0] * (DIMS - 2)], "k": 2})
        tag = run.service.tag()
    assert calls == []
    assert (results.tag, list(results.timings)) == (tag, ["search"])
    [(index, first)] = indexed(results.queries)
    assert (index, first.hits[0].id, len(first.hits)) == (0, "v1", 2)
    assert (first.groups, first.vectors, first.comparisons) == (None, {}, {})


async def test_queries_of_a_batch_fail_on_their_own(tmp_path):
    async with running(tmp_path, store=DictStore()) as run:
        await filled(run)
        asked = [
            {"id": "v1", "k": 1, "include": ["vector"]},
            {"id": "gone"},
            {"vector": "no vector"},
            {"image": "http://no"},
            {"vector": [1.0] * DIMS, "k": 2, "group_by": "shelf"},
        ]
        results = await ask(run, {"queries": asked, "on_error": "partial"})
    assert [outcome.index for outcome in results.queries] == [0, 1, 2, 3, 4]
    kinds = [type(outcome.error) for outcome in results.queries]
    assert kinds == [type(None), ItemNotFound, InvalidRequest, InvalidItems, type(None)]
    by_id, grouped = results.queries[0].result(), results.queries[4].result()
    assert "v1" not in by_id.ids()
    assert list(by_id.vectors) == by_id.ids()
    assert {group.value for group in grouped.groups} == {0, 1}
    assert grouped.vectors == {}


async def test_an_image_of_a_form_has_its_options_as_text(tmp_path):
    async with running(tmp_path, store=DictStore()) as run:
        await filled(run)
        fields = {"k": "2", "filter": '{"key": "shelf", "eq": 1}'}
        request = read_image_search(Outcome(0, photo()), fields, run.service.settings)
        results = await search(run.service, "shop", request)
    assert {hit.metadata["shelf"] for hit in results.queries[0].result().hits} == {1}


async def test_what_is_wrong_with_the_whole_request_is_raised(tmp_path):
    async with running(tmp_path, store=DictStore()) as run:
        with pytest.raises(CollectionNotFound):
            await ask(run, {"image": text_of(photo())})
        with pytest.raises(ModelNotFound):
            await ask(run, {"image": text_of(photo()), "model": "another"})


def test_retrieval_and_adding_load_without_the_web_framework():
    modules = "service.retrieval.search, service.retrieval.reading, service.ingest.items"
    code = f"import sys, {modules}; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'service.retrieval.search'" in loaded
    assert "'fastapi'" not in loaded
    assert "'starlette'" not in loaded
