"""Read and write one store with two processes at the same time, and check every search result.

Each of the two processes opens the store in the same folder and runs four writers and four readers. The size limits are
small, so that all stages of maintenance run again and again. The checks are:

- Every hit was written. Neither its deletion nor its replacement was acknowledged before the search began.
- The score of a hit equals the cosine within 1e-5.
- An exact search finds an item that existed the whole time.

    python benchmarks/soak.py [--seconds 60] [--folder DIR]

The script prints operations/s and, as the last line, the result as JSON. The exit status is 1 if a result was wrong or
a process failed.
"""

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.crash import WHERE, opened
from service.search.embedded import EmbeddedStore
from service.search.store import CollectionSpec, IndexSpec, Item, SearchParams

TAG, D, K = "soak", 32, 10
PROCESSES, EACH, SLOTS = 2, 4, 250
"""The number of processes, of writers and of readers in each process, and of items that belong to each writer."""
BEGUN, DONE, LEAVING, GONE = range(4)
"""Rows of the shared state. For each item, they have the last version that a writer began to write, has written, began
to remove, and has removed.
"""


def vector_of(slot: int, version: int) -> np.ndarray:
    vector = np.random.default_rng((slot, version)).normal(size=D)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


async def write(store: EmbeddedStore, state: np.ndarray, writer: int, until: float, counts: Counter[str]) -> None:
    """Insert, replace and delete random items of this writer until the time `until`. Record each version in `state`."""
    rng = np.random.default_rng(writer)
    while time.time() < until:
        slots = writer * SLOTS + rng.choice(SLOTS, size=int(rng.integers(1, 20)), replace=False)
        before = state[DONE, slots].copy()
        state[LEAVING, slots] = before
        if rng.random() < 0.7:
            state[BEGUN, slots] = before + 1
            new = [
                Item(str(slot), vector_of(slot, version), {"version": version, "group": slot % 5})
                for slot, version in zip(slots.tolist(), (before + 1).tolist(), strict=True)
            ]
            await store.upsert("c", new, tag=TAG)
            state[DONE, slots] = before + 1
            counts["items written"] += len(slots)
        else:
            await store.delete("c", [str(slot) for slot in slots])
            counts["items deleted"] += len(slots)
        state[GONE, slots] = before
        counts["writes"] += 1


async def read(store: EmbeddedStore, state: np.ndarray, reader: int, until: float, counts: Counter[str]) -> None:
    rng = np.random.default_rng(1000 + reader)
    while time.time() < until:
        slot = int(rng.integers(state.shape[1]))
        version = int(state[DONE, slot])
        there = state[LEAVING, slot] < version  # checked again after the search
        exact, where = bool(rng.random() < 0.3), WHERE if rng.random() < 0.3 else None
        gone = state[GONE].copy()
        query = vector_of(slot, version)
        [hits] = await store.search("c", [query], K, tag=TAG, where=where, params=SearchParams(exact=exact))
        begun = state[BEGUN].copy()
        for hit in hits:
            which, seen = int(hit.id), hit.metadata["version"]
            assert seen <= begun[which], f"item {which}: version {seen} was never written"
            assert seen > gone[which], (
                f"item {which}: version {seen} was found, but version {gone[which]} was already removed"
            )
            assert abs(hit.score - vector_of(which, seen) @ query) < 1e-5, f"item {which}: score {hit.score} is wrong"
            assert where is None or which % 5 in (1, 2), f"item {which} does not pass the filter"
        scores = [hit.score for hit in hits]
        assert scores == sorted(scores, reverse=True), f"the hits are not in order: {scores}"
        if exact and where is None and there and state[LEAVING, slot] < version:
            assert [hit.id for hit in hits[:1]] == [str(slot)], f"item {slot} exists and was not found"
            counts["searches for an existing item"] += 1
        counts["searches"] += 1
        counts["hits"] += len(hits)


async def work(folder: Path, memory: SharedMemory, number: int, until: float) -> Counter[str]:
    state: np.ndarray = np.ndarray((4, PROCESSES * EACH * SLOTS), np.int64, memory.buf)
    store, counts = await opened(folder), Counter[str]()
    await store.create("c", CollectionSpec(TAG, D, index=IndexSpec("hnsw"), indexed=("group",)))
    mine = range(number * EACH, (number + 1) * EACH)
    async with asyncio.TaskGroup() as group:
        for n in mine:
            group.create_task(write(store, state, n, until, counts))
            group.create_task(read(store, state, n, until, counts))
    await store.close()
    return counts


def process(folder: Path, name: str, number: int, until: float, results: Any) -> None:
    memory = SharedMemory(name)
    counts = uvloop.run(work(folder, memory, number, until))
    results.put(dict(counts))


def soak(folder: Path, seconds: float) -> dict[str, float] | None:
    """Run all processes. Return the operations/s by name, or None if a process failed, which has printed the reason."""
    spawn = multiprocessing.get_context("spawn")
    memory = SharedMemory(create=True, size=4 * PROCESSES * EACH * SLOTS * 8)  # zeros: no item has a version yet
    results, until = spawn.Queue(), time.time() + seconds + 3  # time for the processes to start
    started = [
        spawn.Process(target=process, args=(folder, memory.name, number, until, results)) for number in range(PROCESSES)
    ]
    for one in started:
        one.start()
    for one in started:
        one.join(seconds + 120)
        if one.is_alive():
            one.terminate()
            one.join()
    memory.close()
    memory.unlink()
    if any(one.exitcode for one in started):
        return None
    counts = sum((Counter(results.get()) for _ in started), Counter[str]())
    return {key: round(value / seconds, 1) for key, value in counts.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rates = soak(given.folder or Path(temporary), given.seconds)
    if rates is None:
        print("FAILED: see the traceback above")
        return 1
    for name, rate in rates.items():
        print(f"{name + '/s':>30}  {rate:>10}")
    print(json.dumps({"benchmark": "soak", "seconds": given.seconds, "per_s": rates}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
