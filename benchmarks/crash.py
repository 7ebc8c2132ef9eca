"""Kill the embedded vector store at random moments and check that no data is lost.

A child process inserts, replaces and deletes items, prunes those that match a filter, and changes their metadata. Some
inserts have an idempotency key, and the store forgets all but the newest of these keys. At the same time, the store
builds and merges segments, and two tasks of the child take snapshots as fast as possible. The child prints a line for
each acknowledged write. The parent process kills the child with SIGKILL, opens the store and checks these conditions:

- The store has every acknowledged write and nothing else. The write in progress is either complete or absent.
- The hits of a search have the correct scores, and an exact search finds the nearest items, with and without a filter.
- The newest idempotency keys are kept and no others. A write that is repeated with its key changes nothing if it was
  acknowledged, and is carried out once if it was in progress.
- Every snapshot contains the collection as it was after one of the writes.

Then the next child continues in the same folder.

    python benchmarks/crash.py [--kills 200] [--seed 0] [--folder DIR]

The script prints a table and, as the last line, the result as JSON. The exit status is 1 if a check failed.
"""

import argparse
import asyncio
import contextlib
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

from service.errors import NotFound
from service.search import building, database, maintenance
from service.search.embedded import EmbeddedStore, open_embedded
from service.search.filters import matches, parse_filter
from service.search.store import CollectionSpec, IndexSpec, Item, SearchParams

TAG, D, IDS = "crash", 16, 400
KEYS = 20  # of the idempotency keys that are kept
SNAPSHOTS_AT_ONCE = 2
WHERE = parse_filter({"key": "group", "in": [1, 2]})
State = dict[str, tuple[np.ndarray, dict[str, int]]]


def operation(seed: int, n: int) -> tuple[str, list[int], np.ndarray]:
    """Return the kind of the n-th write, the numbers of its items, and one vector [D] for each item.

    The write is random, but always the same for one seed.
    """
    rng = np.random.default_rng((seed, n))
    kind = str(rng.choice(["upsert", "upsert", "keyed", "keyed", "delete", "prune", "patch"]))
    which = rng.choice(IDS, size=int(rng.integers(1, 40)), replace=False).tolist()
    vectors = rng.normal(size=(len(which), D)).astype(np.float32)
    return kind, which, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def apply(state: State, seed: int, n: int) -> None:
    """Apply the n-th write to `state`, which has the expected vector and metadata of each item."""
    kind, which, vectors = operation(seed, n)
    if kind in ("upsert", "keyed"):
        for item, vector in zip(which, vectors, strict=True):
            state[f"i{item}"] = (vector, {"n": n, "group": item % 5})
    elif kind == "prune":
        for name in [name for name, (_, metadata) in state.items() if metadata["group"] == which[0] % 5]:
            del state[name]
    elif kind == "delete":
        for item in which:
            state.pop(f"i{item}", None)
    elif f"i{which[0]}" in state:
        vector, metadata = state[f"i{which[0]}"]
        state[f"i{which[0]}"] = (vector, {**metadata, "patched": n})


def signature(state: State) -> int:
    """Return a number that differs between states. The metadata of an item says which writes made it."""
    return hash(frozenset((name, tuple(sorted(metadata.items()))) for name, (_, metadata) in state.items()))


def new_items(n: int, which: list[int], vectors: np.ndarray) -> list[Item]:
    return [Item(f"i{item}", vector, {"n": n, "group": item % 5}) for item, vector in zip(which, vectors, strict=True)]


async def opened(folder: Path) -> EmbeddedStore:
    """Open the store with small size limits, so that a few hundred items pass through every stage of maintenance."""
    for module, name, value in (
        (building, "FLAT_BELOW", 100),
        (maintenance, "MANY", 2),
        (maintenance, "ORPHAN_S", 0.05),
        (database, "MAX_REQUESTS_OF_CLIENT", KEYS),
    ):
        setattr(module, name, value)
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
                with contextlib.suppress(NotFound):  # the other task was faster
                    await store.drop_snapshot("c", old.name)

    tasks = [asyncio.create_task(snapshots()) for _ in range(SNAPSHOTS_AT_ONCE)]
    for n in range(start, 10**9):
        kind, which, vectors = operation(seed, n)
        if kind in ("upsert", "keyed"):
            await store.upsert("c", new_items(n, which, vectors), tag=TAG, request_key=key_of(kind, n))
        elif kind == "delete":
            await store.delete("c", [f"i{item}" for item in which])
        elif kind == "prune":
            await store.delete_where("c", parse_filter({"key": "group", "eq": which[0] % 5}))
        elif (await store.get("c", [f"i{which[0]}"]))[0] is not None:
            await store.patch("c", f"i{which[0]}", {"patched": n})
        print(n, flush=True)
        for task in tasks:
            if task.done():
                task.result()  # raises the error of a snapshot


def key_of(kind: str, n: int) -> str | None:
    return f"key-{n}" if kind == "keyed" else None


async def content(store: EmbeddedStore, collection: str) -> State:
    """Return all items of a collection."""
    found: State = {}
    cursor = None
    while True:
        page = await store.scroll(collection, cursor=cursor, limit=1000)
        found |= {item.id: (item.vector, dict(item.metadata)) for item in page.items}
        cursor = page.cursor
        if cursor is None:
            return found


async def differences(store: EmbeddedStore, state: State, rng: np.random.Generator) -> str:
    """Compare the store with `state`. Return a description of the first difference, or "" if they are equal."""
    found = await content(store, "c")
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


async def check_keys(store: EmbeddedStore, seed: int, n: int, state: State) -> None:
    """Check the idempotency keys of the writes before number `n`, after which the store has this state. Repeat some of
    these writes with their keys, and then carry out write `n` once more if it has a key."""
    keyed: list[str] = []
    m = n - 1
    while m >= 0 and len(keyed) < KEYS:
        if operation(seed, m)[0] == "keyed":
            keyed.insert(0, f"key-{m}")
        m -= 1
    kept = await store._read(lambda db: [key for (key,) in db.execute("SELECT key FROM requests ORDER BY ordinal")])
    acknowledged = [key for key in kept if key != f"key-{n}"]  # the write in progress may have displaced the oldest key
    assert acknowledged[len(acknowledged) - len(keyed) + 1 :] == keyed[1:], "idempotency keys are lost"
    assert len(kept) <= KEYS, f"{len(kept)} idempotency keys are kept, but {KEYS} are allowed"
    for key in (keyed[-1:] + keyed[1:2]) if len(keyed) > 1 else keyed:
        number = int(key.removeprefix("key-"))
        await store.upsert("c", new_items(number, *operation(seed, number)[1:]), tag=TAG, request_key=key)
    assert signature(await content(store, "c")) == signature(state), "a repeated write was carried out again"


async def check(
    folder: Path, seed: int, kill: int, n: int, states: list[State], history: set[int]
) -> tuple[int, float]:
    """Compare the store with the possible states before and after write `n`. Return the index of the state that it
    matches, and the seconds that opening the store took. `history` contains the signatures of all states so far.

    Raises:
        AssertionError: the store matches no state, a snapshot matches none, or an idempotency key is wrong.
    """
    started = time.perf_counter()
    store = await opened(folder)
    seconds = time.perf_counter() - started
    try:
        await store.create("c", CollectionSpec(TAG, D, index=IndexSpec("hnsw"), indexed=("group",)))
        rng = np.random.default_rng(kill)
        wrong = [await differences(store, state, rng) for state in states]
        assert "" in wrong, "; ".join(wrong)
        place = wrong.index("")
        for taken in await store.snapshots("c"):
            await store.restore("again", "c", taken.name)
            assert await store.count("again") == taken.count, f"snapshot {taken.name} is incomplete"
            assert signature(await content(store, "again")) in history, f"snapshot {taken.name} mixes several states"
            await store.drop("again")
        await check_keys(store, seed, n, states[place])
        kind, which, vectors = operation(seed, n)
        if kind == "keyed":  # the client repeats the request that got no answer
            await store.upsert("c", new_items(n, which, vectors), tag=TAG, request_key=key_of(kind, n))
            assert signature(await content(store, "c")) == signature(states[1]), "a repeated write was lost or doubled"
            place = 1
        return place, seconds
    finally:
        await store.close()


def run(folder: Path, kills: int, seed: int) -> dict[str, float | int]:
    """Start and kill a child process `kills` times, and check the store each time. Return the figures of the run."""
    moments = random.Random(seed)
    state: State = {}
    history = {signature(state)}
    n, opening, under_way = 0, [], 0
    for kill in range(kills):
        command = [sys.executable, __file__, "--child", "--folder", str(folder), "--seed", str(seed), "--start", str(n)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(moments.randint(0, 40)):  # the kill then follows at a random time
                if not process.stdout.readline():
                    break
                apply(state, seed, n)
                history.add(signature(state))
                n += 1
            time.sleep(moments.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            for line in process.stdout:
                if line.endswith("\n"):
                    apply(state, seed, n)
                    history.add(signature(state))
                    n += 1
        after = dict(state)
        apply(after, seed, n)
        history.add(signature(after))
        place, seconds = asyncio.run(check(folder, seed, kill, n, [state, after], history))
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
        "kept_or_repeated_though_not_acknowledged": under_way,
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
