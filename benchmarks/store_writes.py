"""Compare the writes per second of the embedded store in two checkouts.

    python benchmarks/store_writes.py --before DIR [--seconds 2] [--rounds 8] [--folder DIR]

Each round writes with both checkouts in turn, so a change of the machine's speed affects both. The ratios are medians
over the rounds. A ratio of 1 means equal speed. The last line is the result as JSON.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LOADS = {
    "one": {"items": 1, "writers": 1},
    "one_with_key": {"items": 1, "writers": 1, "keys": True},
    "one_with_key_of_many": {"items": 1, "writers": 1, "keys": True, "older_keys": 300_000},
    "hundred": {"items": 100, "writers": 1},
    "sixteen_writers": {"items": 1, "writers": 16},
    "deletions": {"items": 1, "writers": 1, "deletes": True},
}
D = 384


async def measure(folder: Path, seconds: float, load: dict[str, Any]) -> float:
    """Return the writes per second of the store in the current folder."""
    import numpy as np

    from service.search.embedded import open_embedded
    from service.search.store import Item

    store = await open_embedded(folder, threads=1, interval_s=60.0)
    vectors = np.random.default_rng(0).normal(size=(256, D)).astype(np.float32)
    await store.upsert("c", [Item("first", vectors[0])], tag="t")
    if count := load.get("older_keys"):
        insert = "INSERT INTO requests (collection, key, digest, created) VALUES (1, ?, x'00', ?)"
        older = [(f"older-{n}", time.time()) for n in range(count)]
        await store._write(lambda db: db.executemany(insert, older))
    done, until = 0, time.perf_counter() + seconds

    async def write(writer: int) -> None:
        nonlocal done
        n = 0
        while time.perf_counter() < until:
            new = [Item(f"{writer}-{n}-{k}", vectors[(n + k) % 256], {"n": n}) for k in range(load["items"])]
            key = f"{writer}-{n}" if load.get("keys") else None
            await store.upsert("c", new, tag="t", request_key=key)
            if load.get("deletes"):
                await store.delete("c", [item.id for item in new])
            n, done = n + 1, done + 1

    started = time.perf_counter()
    await asyncio.gather(*(write(writer) for writer in range(load["writers"])))
    rate = done / (time.perf_counter() - started)
    await store.close()
    return rate


def measured(checkout: Path, folder: Path, seconds: float, load: str) -> float:
    """Run `measure` in a process with the modules of a checkout."""
    with tempfile.TemporaryDirectory(dir=folder) as data:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", load, "--data", data]
        output = subprocess.run(
            [*command, "--seconds", str(seconds)],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": "."},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        ).stdout
    return float(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", choices=LOADS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(asyncio.run(measure(given.data, given.seconds, LOADS[given.child])))
        return
    here, figures = Path(__file__).resolve().parents[1], {}
    for load in LOADS:
        pairs = []
        for number in range(given.rounds):
            both = [(given.before, 0), (here, 1)][:: 1 if number % 2 else -1]
            rates = {which: measured(checkout, given.folder, given.seconds, load) for checkout, which in both}
            pairs.append((rates[0], rates[1]))
        ratio = statistics.median(after / before for before, after in pairs)
        before, after = (statistics.median(side) for side in zip(*pairs, strict=True))
        print(f"{load:>20}  before {before:8.1f}/s  after {after:8.1f}/s  ratio {ratio:.3f}", flush=True)
        figures[load] = {"before": round(before, 1), "after": round(after, 1), "ratio": round(ratio, 3)}
    print(json.dumps({"benchmark": "store_writes", "rounds": given.rounds, **figures}))


if __name__ == "__main__":
    main()
