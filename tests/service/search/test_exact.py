"""The store: answers equal a numpy scan, acknowledged writes survive a kill, and models never mix."""

import asyncio
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from service.errors import CollectionNotFound, Conflict, InvalidRequest, ModelMismatch, StorageFailed
from service.search.exact import open_store
from service.search.store import CollectionInfo, Item, VectorStore

ROOT = Path(__file__).parents[2]
TAG = "f" * 64 + ":cls:l2:224:fp32"
RNG = np.random.default_rng(3)


def items(count: int, dimension: int = 8, prefix: str = "i") -> list[Item]:
    vectors = RNG.normal(size=(count, dimension)).astype(np.float32)
    return [Item(f"{prefix}{n}", vector, {"n": n}) for n, vector in enumerate(vectors)]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[VectorStore]:
    opened = await open_store(tmp_path)
    yield opened
    await opened.close()


async def test_search_is_a_scan_by_cosine(store: VectorStore) -> None:
    kept = items(300)
    info = await store.upsert("photos", [Item(i.id, i.vector * 7, i.metadata) for i in kept], tag=TAG)
    assert info == CollectionInfo("photos", TAG, 8, 300)
    matrix = np.stack([i.vector / np.linalg.norm(i.vector) for i in kept])
    for query in RNG.normal(size=(20, 8)).astype(np.float32):
        scores = matrix @ query / np.linalg.norm(query)
        best = np.argsort(-scores)[:10]
        hits = await store.search("photos", query * 1e-20, 10, tag=TAG)
        assert [hit.id for hit in hits] == [f"i{n}" for n in best]
        np.testing.assert_allclose([hit.score for hit in hits], scores[best], atol=1e-6)
        assert hits[0].metadata == {"n": best[0]}
    assert len(await store.search("photos", query, 1000, tag=TAG)) == 300
    [itself] = await store.search("photos", kept[5].vector, 1, tag=TAG)
    assert itself.id == "i5"
    assert itself.score == pytest.approx(1)
    assert itself.score <= 1


async def test_random_operations_equal_a_dictionary(tmp_path: Path) -> None:
    """Upsert, delete, get, search and reopen in any order, against a dict and a scan."""
    rng = np.random.default_rng(11)
    truth: dict[str, np.ndarray] = {}
    store = await open_store(tmp_path)
    await store.upsert("c", [Item("x", np.ones(4), {})], tag=TAG)
    await store.delete("c", ["x"])
    for _ in range(150):
        action = rng.integers(5)
        ids = [f"k{n}" for n in rng.integers(0, 30, rng.integers(1, 6))]
        if action <= 1:
            batch = [Item(i, rng.normal(size=4).astype(np.float32), {"id": i}) for i in ids]
            await store.upsert("c", batch, tag=TAG)
            truth |= {i.id: i.vector / np.linalg.norm(i.vector) for i in batch}
        elif action == 2:
            assert await store.delete("c", ids) == len(set(ids) & truth.keys())
            for i in ids:
                truth.pop(i, None)
        elif action == 3 and rng.random() < 0.3:
            await store.close()
            store = await open_store(tmp_path)
        assert await store.count("c") == len(truth)
        for i, found in zip(ids, await store.get("c", ids), strict=True):
            assert (found is None) == (i not in truth)
            if found is not None:
                np.testing.assert_allclose(found.vector, truth[i], atol=1e-6)
                assert found.metadata == {"id": i}
        query = rng.normal(size=4)
        expected = sorted(truth, key=lambda i: -float(truth[i] @ query))[:5]
        assert [hit.id for hit in await store.search("c", query, 5, tag=TAG)] == expected
    await store.close()


async def test_collections_are_apart(store: VectorStore) -> None:
    await store.upsert("b", items(3), tag=TAG)
    await store.upsert("a", items(2, 5), tag="other")
    assert [(i.name, i.dimension, i.count) for i in await store.collections()] == [("a", 5, 2), ("b", 8, 3)]
    await store.drop("b")
    assert [i.name for i in await store.collections()] == ["a"]
    for call in (store.info("b"), store.get("b", ["i0"]), store.delete("b", ["i0"]), store.drop("b")):
        with pytest.raises(CollectionNotFound, match="'b'"):
            await call
    with pytest.raises(CollectionNotFound):
        await store.search("b", np.ones(8), 1, tag=TAG)
    await store.upsert("b", items(1, 3), tag="new model")  # the name is free again, for any model
    assert len(await store.search("b", np.ones(3), 9, tag="new model")) == 1


async def test_models_never_mix(store: VectorStore) -> None:
    await store.upsert("c", items(2), tag=TAG)
    for call in (store.upsert("c", items(1), tag="other"), store.search("c", np.ones(8), 1, tag="other")):
        with pytest.raises(ModelMismatch, match=f"{TAG}.*other") as caught:
            await call
        assert caught.value.status == 409
    for call in (store.upsert("c", items(1, 9), tag=TAG), store.search("c", np.ones(9), 1, tag=TAG)):
        with pytest.raises(Conflict, match="dimension 8; this one has 9"):
            await call


@pytest.mark.parametrize("name", ["", "A", "-a", "_a", "a" * 65, "a/b", "../a", "ä", "a\n", "a b"])
async def test_names_are_checked(store: VectorStore, name: str) -> None:
    for call in (store.upsert(name, items(1), tag=TAG), store.info(name), store.search(name, np.ones(8), 1, tag=TAG)):
        with pytest.raises(InvalidRequest, match="collection name"):
            await call


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (Item("a", np.zeros(8)), "zeros"),
        (Item("a", np.full(8, np.nan)), "finite"),
        (Item("a", np.array([np.inf] + [0] * 7)), "finite"),
        (Item("a", np.ones((2, 4))), "shape"),
        (Item("a", np.zeros(0)), "non-empty"),
        (Item("a", np.ones(9)), "same dimension"),
        (Item("", np.ones(8)), "id ''"),
        (Item("a" * 257, np.ones(8)), "256"),
        (Item("a\0", np.ones(8)), "printable"),
        (Item("\ud800", np.ones(8)), "printable"),
        (Item("a", np.ones(8), {"x": float("nan")}), "JSON"),
        (Item("a", np.ones(8), {"x": object()}), "JSON"),
        (Item("a", np.ones(8), {"x": "y" * 70_000}), "65,536"),
    ],
)
async def test_wrong_items_are_refused_and_nothing_is_written(store: VectorStore, item: Item, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        await store.upsert("c", [*items(1), item], tag=TAG)
    assert await store.collections() == []


async def test_k_and_empty_collections(store: VectorStore) -> None:
    await store.upsert("c", items(1), tag=TAG)
    for k in (0, -1, 1001):
        with pytest.raises(InvalidRequest, match=f"k={k}"):
            await store.search("c", np.ones(8), k, tag=TAG)
    with pytest.raises(InvalidRequest, match="no items"):
        await store.upsert("c", [], tag=TAG)
    assert await store.delete("c", ["i0", "i0", "none"]) == 1
    assert await store.search("c", np.ones(8), 5, tag=TAG) == []


async def test_of_equal_ids_in_one_call_the_last_wins(store: VectorStore) -> None:
    await store.upsert("c", [Item("a", np.array([1.0, 0])), Item("a", np.array([0, 1.0]), {"last": True})], tag=TAG)
    [hit] = await store.search("c", np.array([0, 1.0]), 5, tag=TAG)
    assert (hit.score, hit.metadata) == (1.0, {"last": True})


async def test_equal_scores_come_by_id_and_unicode_ids_survive(store: VectorStore) -> None:
    names = ["ü", "b", "a", "日本", "a b"]
    await store.upsert("c", [Item(n, np.ones(3), {"n": n}) for n in names], tag=TAG)
    hits = await store.search("c", np.ones(3), 5, tag=TAG)
    assert [hit.id for hit in hits] == sorted(names)
    assert all(hit.metadata == {"n": hit.id} for hit in hits)


async def test_writers_and_readers_at_once(store: VectorStore) -> None:
    """The event loop keeps running, every answer names an item that was written, nothing is lost."""
    await store.upsert("c", items(50, prefix="base"), tag=TAG)

    async def write(n: int) -> None:
        for step in range(10):
            await store.upsert("c", items(5, prefix=f"w{n}-{step}-"), tag=TAG)
            await store.delete("c", [f"w{n}-{step}-0"])

    async def read() -> None:
        for query in RNG.normal(size=(30, 8)):
            hits = await store.search("c", query, 10, tag=TAG)
            assert len({hit.id for hit in hits}) == 10

    await asyncio.gather(*(write(n) for n in range(6)), *(read() for _ in range(6)))
    assert await store.count("c") == 50 + 6 * 10 * 4


# ---- durability

WRITER = """
import asyncio, sys
import numpy as np
from pathlib import Path
from service.search.exact import open_store
from service.search.store import Item
async def main():
    store = await open_store(Path(sys.argv[1]))
    rng = np.random.default_rng(0)
    for n in range(100_000):
        await store.upsert("c", [Item(f"{n}-{i}", rng.normal(size=16), {"n": n}) for i in range(3)], tag="t")
        print(n, flush=True)  # acknowledged
asyncio.run(main())
"""


@pytest.mark.parametrize("writes", [1, 17, 60])
async def test_acknowledged_writes_survive_kill_9(tmp_path: Path, writes: int) -> None:
    with subprocess.Popen(  # noqa: ASYNC220 - nothing else runs on this loop
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as writer:
        assert writer.stdout is not None
        acknowledged = [int(writer.stdout.readline()) for _ in range(writes)]
        with pytest.raises(StorageFailed, match=r"search\.sqlite3.*another process"):
            await open_store(tmp_path)
        writer.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
    store = await open_store(tmp_path)
    ids = [f"{n}-{i}" for n in acknowledged for i in range(3)]
    assert None not in await store.get("c", ids)
    assert await store.count("c") in (len(ids), len(ids) + 3)  # one more: committed, not yet acknowledged
    rng = np.random.default_rng(0)
    for n in acknowledged:
        for i in range(3):
            [hit] = await store.search("c", rng.normal(size=16), 1, tag="t")
            assert hit.id == f"{n}-{i}"
    await store.close()


async def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    await store.upsert("c", items(500, 64), tag=TAG)
    await store.close()
    path = tmp_path / "search.sqlite3"
    whole = path.read_bytes()
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(StorageFailed, match=r"search\.sqlite3 is damaged or not a database"):
        await open_store(tmp_path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageFailed, match=r"search\.sqlite3"):
        await open_store(tmp_path)
    path.write_bytes(whole[:8192] + b"\xff" * 8192 + whole[16384:])
    with pytest.raises(StorageFailed, match=r"search\.sqlite3"):
        await open_store(tmp_path)
    path.write_bytes(whole)
    store = await open_store(tmp_path)
    assert await store.count("c") == 500
    await store.close()


async def test_a_broken_vector_is_found_not_served(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    await store.upsert("c", items(3, 2), tag=TAG)
    await store.close()
    for blob in (np.array([9, 9], "<f4").tobytes(), np.array([np.nan, 1], "<f4").tobytes(), b"short"):
        with sqlite3.connect(tmp_path / "search.sqlite3") as db:
            db.execute("UPDATE items SET vector = ? WHERE id = 'i1'", (blob,))
        db.close()
        with pytest.raises(StorageFailed, match=r"search\.sqlite3 is damaged"):
            await open_store(tmp_path)


@pytest.mark.parametrize("text", ['{"n": ', "[1]", b"{}\xff", 7, "[" * 100_000])
async def test_broken_metadata_is_named(store: VectorStore, text: str | bytes | int) -> None:
    [item] = items(1)
    await store.upsert("c", [item], tag=TAG)
    update = "UPDATE items SET metadata = ?"
    await store._call(lambda: store._tables._db.execute(update, (text,)))  # type: ignore[attr-defined]
    with pytest.raises(StorageFailed, match=r"^the vector store is damaged: the metadata of item 'i0' is broken$"):
        await store.get("c", ["i0"])
    with pytest.raises(StorageFailed, match="metadata of item 'i0'"):
        await store.search("c", item.vector, 1, tag=TAG)


async def test_a_foreign_database_and_folder_are_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "search.sqlite3") as db:
        db.execute("CREATE TABLE bills (id)")
    db.close()
    with pytest.raises(StorageFailed, match="not a vector store of this version"):
        await open_store(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match=r"file/search\.sqlite3"):
        await open_store(tmp_path / "file")


async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    await store.close()
    await store.close()
    with pytest.raises(StorageFailed, match="closed"):
        await store.collections()


async def test_disk_full_is_an_error_and_nothing_is_half_written(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    await store.upsert("c", items(3), tag=TAG)
    tables = store._tables  # type: ignore[attr-defined]
    await store._call(lambda: tables._db.execute("PRAGMA max_page_count = 1"))  # type: ignore[attr-defined]  # SQLite's own "full"
    with pytest.raises(StorageFailed, match=r"^the vector store: database or disk is full$"):  # clients see no path
        await store.upsert("c", items(2000, prefix="more"), tag=TAG)
    assert await store.count("c") == 3
    assert len(await store.search("c", np.ones(8), 10, tag=TAG)) == 3
    await store.close()
