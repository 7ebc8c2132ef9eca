"""Tests of requests that may exceed the deadline: taking and restoring a snapshot, and sending an answer."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from service.search.embedded import open_embedded
from service.search.store import Item
from tests.fakes import DIMS, photo, running


class Slow:
    """A store that needs some time for snapshots."""

    def __init__(self, store: Any, seconds: float) -> None:
        self._store, self._seconds = store, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def snapshot(self, collection: str) -> Any:
        await asyncio.sleep(self._seconds)
        return await self._store.snapshot(collection)

    async def restore(self, collection: str, source: str, name: str) -> Any:
        await asyncio.sleep(self._seconds)
        return await self._store.restore(collection, source, name)

    async def info(self, collection: str) -> Any:
        if collection == "slow":
            await asyncio.sleep(self._seconds)
        return await self._store.info(collection)


async def test_snapshots_have_no_deadline(tmp_path: Path) -> None:
    store = Slow(await open_embedded(tmp_path), 0.5)
    async with running(tmp_path, store=store, request_deadline_s=0.3) as run:
        await store.upsert("c", [Item("a", np.ones(DIMS))], tag=run.service.tag())
        taken = await run.client.post("/v1/collections/c/snapshots")
        assert taken.status_code == 201, taken.text
        restored = await run.client.post(
            "/v1/collections/d/restore", json={"snapshot": taken.json()["name"], "from": "c"}
        )
        assert restored.status_code < 300, restored.text
        assert (await run.client.get("/v1/collections/d")).json()["count"] == 1
        assert (await run.client.get("/v1/collections/slow")).status_code == 504  # everything else has


async def test_the_deadline_is_on_the_work_not_on_sending(tmp_path: Path) -> None:
    async with running(tmp_path, request_deadline_s=0.3) as run:
        await run.client.post("/v1/collections/c/items", files={"file": ("a.png", photo())})
        name = (await run.client.post("/v1/collections/c/snapshots")).json()["name"]
        sent: list[dict[str, Any]] = []

        async def slowly(message: Any) -> None:
            await asyncio.sleep(0.4)
            sent.append(message)

        async def receive() -> dict[str, Any]:
            if not asked:
                asked.append(True)
                return {"type": "http.request", "body": b"", "more_body": False}
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        asked: list[bool] = []
        path = f"/v1/collections/c/snapshots/{name}"
        scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "headers": []}
        scope |= {"query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1"}
        await run.app(scope, receive, slowly)
    assert sent[0]["status"] == 200
    size = int(dict(sent[0]["headers"])[b"content-length"])
    assert sum(len(message.get("body", b"")) for message in sent[1:]) == size > 0
