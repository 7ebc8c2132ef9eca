"""Measure how long it takes until another worker goes on with the job of a killed one.

Two workers run. One of them runs a job, and is killed with SIGKILL at a random moment. The time until the other worker
has claimed the job is measured. Then a new worker is started, and so on. Both queues are measured: the job store alone,
and RQ on a Redis server that is started for this purpose.

    python benchmarks/job_takeover.py [--kills 10] [--seed 0]

The last line is the result as JSON. The exit status is 1 if a takeover took 10 seconds or more. Needs the extra `test`.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from service.jobs.records import NewJob  # noqa: E402
from service.jobs.store import JobStore  # noqa: E402
from tests.service.conftest import RedisServer  # noqa: E402

NOTICED_S = 10.0


def start(folder: Path, url: str | None) -> "subprocess.Popen[str]":
    """Start a worker, and wait until it is ready."""
    command = [sys.executable, "-m", "tests.service.jobs.kinds_for_tests", str(folder), *([url] if url else [])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def takeovers(folder: Path, url: str | None, kills: int, moments: random.Random) -> list[float]:
    """Return the times in seconds of `kills` takeovers of one job."""
    store, times = JobStore(folder), []
    workers = [start(folder, url), start(folder, url)]
    job = store.create(NewJob("sleep", {"seconds": 100_000}))
    try:
        while len(times) < kills:
            while (now := store.get(job.id)).state != "running":
                time.sleep(0.01)
            time.sleep(3 + moments.random() * 2)  # its worker has renewed the lease at least once
            pids = {row.id: row.pid for row in store.workers.alive()}
            killed = next(worker for worker in workers if worker.pid == pids[str(now.worker)])
            killed.kill()
            began = time.monotonic()
            while store.get(job.id).token == now.token:
                time.sleep(0.01)
            times.append(time.monotonic() - began)
            store.report(store.get(job.id).lease, len(times) / (kills + 1))  # otherwise the job fails after 10 losses
            killed.wait()
            workers[workers.index(killed)] = start(folder, url)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="number of kills for each queue")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    moments, found = random.Random(given.seed), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "redis").mkdir()
        server = RedisServer(folder / "redis")
        server.start()
        try:
            for name, url in (("store", None), ("rq", server.url)):
                times = takeovers(folder / name, url, given.kills, moments)
                found[name] = {
                    "median_s": round(statistics.median(times), 2),
                    "longest_s": round(max(times), 2),
                    "shortest_s": round(min(times), 2),
                }
                print(f"{name}: {found[name]}", flush=True)
        finally:
            server.kill()
    print(json.dumps({"benchmark": "job_takeover", "kills": given.kills, "seed": given.seed, **found}))
    return 0 if all(figures["longest_s"] < NOTICED_S for figures in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
