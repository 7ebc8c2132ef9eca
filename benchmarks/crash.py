"""Kill the embedded vector store at random moments and check that no data is lost.

A child process inserts, replaces and deletes items and changes their metadata. At the same time, the store
builds and merges segments, and the child takes snapshots as fast as possible. The child prints a line for each
acknowledged write. The parent process kills the child with SIGKILL, opens the store and checks these conditions:

- The store has every acknowledged write and nothing else. The write in progress is either complete or absent.
- The hits of a search have the correct scores, and an exact search finds the nearest items, with and without a filter.
- Every snapshot is complete.

Then the next child continues in the same folder.

    python benchmarks/crash.py [--kills 200] [--seed 0] [--folder DIR]

The script prints a table and, as the last line, the result as JSON. The exit status is 1 if a check failed.
"""

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from service.search import building, maintenance
from service.search.embedded import EmbeddedStore, open_embedded
from service.search.filters import matches, parse_filter
from service.search.store import CollectionSpec, IndexSpec, Item, SearchParams

TAG, D, IDS = "crash", 16, 400
WHERE = parse_filter({"key": "group", "in": [1, 2]})
State = dict[str, tuple[np.ndarray, dict[str, int]]]


def operation(seed: int, n: int) -> tuple[str, list[int], np.ndarray]:
    """Return the kind of the n-th write, the numbers of its items, and one vector [D] for each item.

    The write is random, but always the same for one seed.
    """
    rng = np.random.default_rng((seed, n))
    kind = str(rng.choice(["upsert", "upsert", "upsert", "delete", "patch"]))
    which = rng.choice(IDS, size=int(rng.integers(1, 40)), replace=False).tolist()
    vectors = rng.normal(size=(len(which), D)).astype(np.float32)
    return kind, which, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def apply(state: State, seed: int, n: int) -> None:
    """Apply the n-th write to `state`, which has the expected vector and metadata of each item."""
    kind, which, vectors = operation(seed, n)
    if kind == "upsert":
        for item, vector in zip(which, vectors, strict=True):
            state[f"i{item}"] = (vector, {"n": n, "group": item % 5})
    elif kind == "delete":
        for item in which:
            state.pop(f"i{item}", None)
    elif f"i{which[0]}" in state:
        vector, metadata = state[f"i{which[0]}"]
        state[f"i{which[0]}"] = (vector, {**metadata, "patched": n})


async def opened(folder: Path) -> EmbeddedStore:
    """Open the store with small size limits, so that a few hundred items pass through every stage of maintenance."""
    building.FLAT_BELOW, maintenance.MANY, maintenance.ORPHAN_S = 100, 2, 0.05
    store = await open_embedded(folder, threads=1, interval_s=0.005, seal_rows=48)
    assert isinstance(store, EmbeddedStore)
    return store


async def child(folder: Path, seed: int, start: int) -> None:
    """Write items and take snapshots until the process is killed. Print `n` when the n-th write is acknowledged."""
    store = await opened(folder)
    await store.create("c", CollectionSpec(TAG, D, index=IndexSpec("hnsw"), indexed=("group",)))

    async def snapshots() -> None:
        while True:
            await store.snapshot("c")
            for old in (await store.snapshots("c"))[:-2]:
                await store.drop_snapshot("c", old.name)

    task = asyncio.create_task(snapshots())
    for n in range(start, 10**9):
        kind, which, vectors = operation(seed, n)
        if kind == "upsert":
            new = [
                Item(f"i{item}", vector, {"n": n, "group": item % 5})
                for item, vector in zip(which, vectors, strict=True)
            ]
            await store.upsert("c", new, tag=TAG)
        elif kind == "delete":
            await store.delete("c", [f"i{item}" for item in which])
        elif (await store.get("c", [f"i{which[0]}"]))[0] is not None:
            await store.patch("c", f"i{which[0]}", {"patched": n})
        print(n, flush=True)
    task.cancel()


async def differences(store: EmbeddedStore, state: State, rng: np.random.Generator) -> str:
    """Compare the store with `state`. Return a description of the first difference, or "" if they are equal."""
    found: State = {}
    cursor = None
    while True:
        page = await store.scroll("c", cursor=cursor, limit=1000)
        found |= {item.id: (item.vector, dict(item.metadata)) for item in page.items}
        cursor = page.cursor
        if cursor is None:
            break
    if set(found) != set(state) or await store.count("c") != len(state):
        return f"{len(set(state) - set(found))} items lost, {len(set(found) - set(state))} too many"
    for name, (vector, metadata) in state.items():
        if found[name][1] != metadata or not np.allclose(found[name][0], vector, atol=1e-6):
            return f"item {name} is {found[name][1]}, should be {metadata}"
    for where in (None, WHERE):
        passing = sorted(name for name in state if where is None or matches(where, state[name][1], name))
        for exact in (True, False):
            query = rng.normal(size=D)
            [hits] = await store.search("c", [query], 10, tag=TAG, where=where, params=SearchParams(exact=exact))
            scores = {name: float(state[name][0] @ query / np.linalg.norm(query)) for name in passing}
            best = sorted(scores.values(), reverse=True)[:10]
            if any(abs(hit.score - scores.get(hit.id, 9)) > 1e-5 for hit in hits) or len(hits) != len(best):
                return f"a search returns wrong or too few items (exact={exact}, filter={where is not None})"
            if exact and not np.allclose([hit.score for hit in hits], best, atol=2e-6):
                return "an exact search misses a neighbour"
    return ""


async def check(folder: Path, seed: int, states: list[State]) -> tuple[int, float]:
    """Compare the store with the possible states. Return the index of the state that it matches, and the seconds that
    opening the store took.

    Raises:
        AssertionError: the store matches no state, or a snapshot is incomplete.
    """
    started = time.perf_counter()
    store = await opened(folder)
    seconds = time.perf_counter() - started
    try:
        await store.create("c", CollectionSpec(TAG, D, index=IndexSpec("hnsw"), indexed=("group",)))
        rng = np.random.default_rng(seed)
        wrong = [await differences(store, state, rng) for state in states]
        assert "" in wrong, "; ".join(wrong)
        for taken in await store.snapshots("c"):
            await store.restore("again", "c", taken.name)
            assert await store.count("again") == taken.count, f"snapshot {taken.name} is incomplete"
            await store.drop("again")
        return wrong.index(""), seconds
    finally:
        await store.close()


def run(folder: Path, kills: int, seed: int) -> dict[str, float | int]:
    """Start and kill a child process `kills` times, and check the store each time. Return the figures of the run."""
    moments = random.Random(seed)
    state: State = {}
    n, opening, under_way = 0, [], 0
    for kill in range(kills):
        command = [sys.executable, __file__, "--child", "--folder", str(folder), "--seed", str(seed), "--start", str(n)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(moments.randint(0, 40)):  # the kill then follows at a random time
                if not process.stdout.readline():
                    break
                apply(state, seed, n)
                n += 1
            time.sleep(moments.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            for line in process.stdout:
                if line.endswith("\n"):
                    apply(state, seed, n)
                    n += 1
        after = dict(state)
        apply(after, seed, n)
        place, seconds = asyncio.run(check(folder, kill, [state, after]))
        opening.append(seconds)
        if place:
            state = after
            n += 1
            under_way += 1
        if kill % 20 == 19:
            print(f"{kill + 1:>5} kills  {n:>7} writes  {len(state):>4} items", flush=True)
    return {
        "kills": kills,
        "writes": n,
        "kept_though_not_acknowledged": under_way,
        "opening_s_median": round(float(np.median(opening)), 3),
        "opening_s_max": round(max(opening), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        asyncio.run(child(given.folder, given.seed, given.start))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        try:
            figures = run(given.folder or Path(temporary), given.kills, given.seed)
        except AssertionError as error:
            print(f"LOST: {error}")
            return 1
    print(json.dumps({"benchmark": "crash", "seed": given.seed, **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
