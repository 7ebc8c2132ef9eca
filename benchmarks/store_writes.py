"""Compare the cost of writes to the embedded store in two checkouts.

    python benchmarks/store_writes.py --before DIR [--writes 300] [--rounds 8] [--folder DIR]

Each round writes with both checkouts in turn, each in its own process, so a change of the machine's speed affects both.
For each kind of write, the script prints the writes per second, the processor time of a write, and the ratios of the
medians over the rounds. On a busy machine, only the processor time says something. The last line is the result as JSON.
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


async def measure(folder: Path, count: int, load: dict[str, Any]) -> tuple[float, float]:
    """Return the writes per second, and the processor time of a write in milliseconds, of the store in the current
    folder."""
    import numpy as np

    from service.search.embedded import open_embedded
    from service.search.store import Item

    store = await open_embedded(folder, threads=1, interval_s=600.0)
    vectors = np.random.default_rng(0).normal(size=(256, D)).astype(np.float32)
    await store.upsert("c", [Item("first", vectors[0])], tag="t")
    if older := load.get("older_keys"):
        insert = "INSERT INTO requests (collection, key, digest, created) VALUES (1, ?, x'00', ?)"
        rows = [(f"older-{n}", time.time()) for n in range(older)]
        await store._write(lambda db: db.executemany(insert, rows))

    async def write(writer: int) -> None:
        for n in range(count // load["writers"]):
            new = [Item(f"{writer}-{n}-{k}", vectors[(n + k) % 256], {"n": n}) for k in range(load["items"])]
            key = f"{writer}-{n}" if load.get("keys") else None
            await store.upsert("c", new, tag="t", request_key=key)
            if load.get("deletes"):
                await store.delete("c", [item.id for item in new])

    await write(10**6)  # warms up
    started, used = time.perf_counter(), time.process_time()
    await asyncio.gather(*(write(writer) for writer in range(load["writers"])))
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    await store.close()
    return count / seconds, 1e3 * cpu / count


def measured(checkout: Path, folder: Path, count: int, load: str) -> list[float]:
    """Run `measure` in a process with the modules of a checkout."""
    with tempfile.TemporaryDirectory(dir=folder) as data:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", load, "--data", data]
        output = subprocess.run(
            [*command, "--writes", str(count)],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": "."},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        ).stdout
    return [float(figure) for figure in output.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--writes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", choices=LOADS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(*asyncio.run(measure(given.data, given.writes, LOADS[given.child])))
        return
    here, result = Path(__file__).resolve().parents[1], {}
    for load in LOADS:
        figures: dict[Path, list[list[float]]] = {given.before: [], here: []}
        for number in range(given.rounds):
            for checkout in list(figures)[:: 1 if number % 2 else -1]:
                figures[checkout].append(measured(checkout, given.folder, given.writes, load))
        (rate, cpu), (new_rate, new_cpu) = (
            map(statistics.median, zip(*rows, strict=True)) for rows in figures.values()
        )
        print(
            f"{load:>20}  {rate:7.1f} -> {new_rate:7.1f} writes/s ({new_rate / rate:.3f})  "
            f"{cpu:6.3f} -> {new_cpu:6.3f} ms CPU ({new_cpu / cpu:.3f})",
            flush=True,
        )
        result[load] = {"writes_per_s": [rate, new_rate], "cpu_ms": [cpu, new_cpu]}
    print(json.dumps({"benchmark": "store_writes", "rounds": given.rounds, "writes": given.writes, **result}))


if __name__ == "__main__":
    main()
