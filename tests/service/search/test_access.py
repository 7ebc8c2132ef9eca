"""Tests of the threads that read the embedded store's database."""

import asyncio
import sqlite3

import numpy as np
import pytest

from service.clients import Sender, current_sender
from service.search.embedded import EmbeddedStore
from service.search.filter_sql import SHORT_TEXT
from service.search.filters import parse_filter
from service.search.reading import Chosen
from service.search.store import Item
from tests.service.search.embedded_store import TAG, D, items, opened

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


def endless(db: sqlite3.Connection) -> None:
    db.execute(ENDLESS).fetchall()


async def test_long_reads_of_one_client_delay_no_other_and_end_when_it_leaves(tmp_path):
    store = EmbeddedStore(tmp_path, threads=1)
    reads = []
    try:
        for number in range(8):
            current_sender.set(Sender("slow", number))
            reads.append(asyncio.create_task(store._access.read(endless)))
        await asyncio.sleep(0.2)
        current_sender.set(Sender("other", 99))
        assert await asyncio.wait_for(store.collections(), 5) == []
    finally:
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
    current_sender.set(Sender("slow", 100))
    assert await asyncio.wait_for(store.collections(), 5) == []
    await asyncio.wait_for(store.close(), 10)


@pytest.mark.parametrize("edits", [1, 1000])
async def test_a_deletion_by_filter_spares_what_is_edited_meanwhile(tmp_path, monkeypatch, edits):
    """The filter is evaluated before the items are deleted, because it may take long. With many edits in between, it is
    evaluated once more when the items are deleted."""
    store, left = await opened(tmp_path), edits
    await store.upsert("c", items(6), tag=TAG)
    inner = store._read

    async def read(work, **options):
        nonlocal left
        result = await inner(work, **options)
        if isinstance(result, Chosen) and left:
            left -= 1
            await store.patch("c", "i0", {"even": False, "left": left})
        return result

    monkeypatch.setattr(store, "_read", read)
    assert await store.delete_where("c", parse_filter({"key": "even", "eq": True})) == 2
    assert {item.id for item in await store.get("c", [f"i{n}" for n in range(6)]) if item} == {"i0", "i1", "i3", "i5"}
    await store.close()


@pytest.mark.parametrize("length", [4, SHORT_TEXT, SHORT_TEXT + 1, 2000])
async def test_a_text_of_any_length_is_found(tmp_path, length):
    store, text = await opened(tmp_path), "ab" * length
    for name, value in {"all": text, "inside": f"x{text}y", "listed": [1, text], "short": text[:-1], "none": 1}.items():
        await store.upsert("c", [Item(name, np.ones(D, np.float32), {"a": value})], tag=TAG)
    where = parse_filter({"key": "a", "contains": text[:length]})
    longer = parse_filter({"key": "a", "contains": text})
    [hits] = await store.search("c", np.ones((1, D)), 9, tag=TAG, where=longer)
    assert {hit.id for hit in hits} == {"all", "inside", "listed"}
    assert await store.count("c", where) == 4
    await store.close()
