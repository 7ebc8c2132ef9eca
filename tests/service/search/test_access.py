"""Tests of the threads that read the embedded store's database."""

import asyncio
import sqlite3

from service.clients import Sender, current_sender
from service.search.embedded import EmbeddedStore

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
