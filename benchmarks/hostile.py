"""Send hostile images to a service under a memory limit, and measure what they cost and what another client notices.

    python benchmarks/hostile.py dinov2_vits14|ARTIFACT IMAGES [--decode-workers 2 16] [--memory-gib 4]

`tests/hostile_images.py` makes the files with a seed. A service runs in a separate process, once for each number of
decoding threads. Two phases follow each other:

1. One file at a time. The processor time and the additional memory of each request are measured, also of the service's
   decoding processes.
2. Normal images from several connections, so that the service has what it needs for them. Then all files at once from
   as many connections, and forms with 16 images of 64 megapixels each. Meanwhile another client, with another address,
   embeds normal images. Its latency is compared with that before. Every ten seconds, one of the decoding processes is
   killed.

At the end, the memory must return to within 20 % of what it was before the second phase, within a minute.

The memory limit is that of a cgroup if this process may create one. Otherwise the resident memory is measured, and
more than the limit counts as a death. The exit status is 1 if the service died, or answered with a 5xx other than 503
or 504.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.load import run_clients
from benchmarks.serving import free_port, random_artifact, service_process
from model.artifact import load_artifact
from model.config import CONFIGS
from model.preprocess import REFERENCE_224
from tests.hostile_images import BIG, Case, cases, png_of_zeros

RESULTS = Path(__file__).parent / "results"
CGROUPS = Path("/sys/fs/cgroup")
TICKS = os.sysconf("SC_CLK_TCK")
ALL = 10**6  # more than there are files
LATE = (503, 504)  # the service is busy, which is no fault


@dataclass
class Cost:
    """What the files of one format cost."""

    files: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    cpu_s: float = 0.0  # of the worst file
    cpu_us_per_byte: float = 0.0
    memory_mib: float = 0.0
    worst: str = ""

    def add(self, case: Case, status: int, cpu_s: float, memory_mib: float) -> None:
        self.files += 1
        self.statuses[status] += 1
        self.memory_mib = max(self.memory_mib, memory_mib)
        self.cpu_us_per_byte = max(self.cpu_us_per_byte, 1e6 * cpu_s / len(case.data))
        if cpu_s > self.cpu_s:
            self.cpu_s, self.worst = cpu_s, f"{case.kind}, {len(case.data)} bytes"


# ---- the process


def children(pid: int) -> list[int]:
    found = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, tasks.read_text().split())
    return found


def cpu_s(pid: int) -> float:
    """Return the processor time of a process and of its children, running or ended."""
    total = 0
    for one in (pid, *children(pid)):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15] if one == pid else fields[11:13]))
    return total / TICKS


def memory_mib(pid: int, name: str = "VmRSS") -> float:
    """Return the resident memory of a process and of its children. `name` may be VmHWM, the highest of each."""
    total = 0
    for one in (pid, *children(pid)):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    return total / 1024


def forget_peak(pid: int) -> None:
    for one in (pid, *children(pid)):
        with contextlib.suppress(OSError):
            Path(f"/proc/{one}/clear_refs").write_text("5")


@contextlib.contextmanager
def limited(pid: int, limit_bytes: int) -> Iterator[bool]:
    """Put a process into a cgroup with a memory limit. Yield whether this was possible."""
    for root, limit_file in ((CGROUPS, "memory.max"), (CGROUPS / "memory", "memory.limit_in_bytes")):  # version 2, 1
        group = root / f"dinov2-hostile-{pid}"
        try:
            group.mkdir()
            for name, value in ((limit_file, limit_bytes), ("cgroup.procs", pid)):
                with open(group / name, "r+") as file:  # the kernel has made it, if the folder is a cgroup
                    file.write(str(value))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):  # the process may have ended
                for member in (group / "cgroup.procs").read_text().split():
                    (root / "cgroup.procs").write_text(member)
                group.rmdir()
        return
    yield False


# ---- the phases


def send(client: httpx.Client, case: Case) -> int:
    try:
        return client.post("/v1/embeddings", content=case.data, headers={"content-type": "image/png"}).status_code
    except httpx.HTTPError:
        return 0


def measure_costs(base_url: str, pid: int, files: list[Case]) -> dict[str, Cost]:
    """Send one file at a time."""
    costs: dict[str, Cost] = defaultdict(Cost)
    with httpx.Client(base_url=base_url, timeout=120) as client:
        for case in files:
            forget_peak(pid)
            before, memory = cpu_s(pid), memory_mib(pid)
            status = send(client, case)
            costs[case.format].add(case, status, cpu_s(pid) - before, memory_mib(pid, "VmHWM") - memory)
    return costs


class OtherClient:
    """A client that embeds normal images from another address, and notes how long each takes."""

    def __init__(self, base_url: str, images: list[bytes]) -> None:
        transport = httpx.HTTPTransport(local_address="127.0.0.2")
        self._client = httpx.Client(base_url=base_url, timeout=120, transport=transport)
        self._images = images
        self.statuses: Counter[int] = Counter()

    def run(self, until: threading.Event, pause_s: float = 0.1) -> list[float]:
        latencies, index = [], 0
        while not until.is_set():
            started = time.monotonic()
            image = self._images[index % len(self._images)]
            self.statuses[send(self._client, Case("JPEG", "normal", image))] += 1
            latencies.append(time.monotonic() - started)
            index += 1
            until.wait(pause_s)
        return latencies


def p99_ms(latencies: list[float]) -> float:
    return round(1000 * float(np.quantile(latencies, 0.99)), 1)


def attack(base_url: str, pid: int, files: list[Case], connections: int, stop: threading.Event) -> Counter[int]:
    """Send all files from several connections. The first one also sends forms of large images. Kill a decoding process
    every ten seconds."""
    form = [("file", (f"{side}.png", png_of_zeros(side))) for side in range(BIG - 1500, BIG + 1, 100)]
    statuses: Counter[int] = Counter()

    def part(number: int) -> None:
        with httpx.Client(base_url=base_url, timeout=300) as client:
            for index, case in enumerate(files[number::connections]):
                statuses[send(client, case)] += 1
                if number == 0 and index % 50 == 0:
                    with contextlib.suppress(httpx.HTTPError):
                        statuses[client.post("/v1/embeddings", files=form).status_code] += 1

    def kill() -> None:
        while not stop.wait(10):
            for victim in children(pid)[:1]:
                with contextlib.suppress(OSError):
                    os.kill(victim, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with ThreadPoolExecutor(connections) as threads:
        list(threads.map(part, range(connections)))
    return statuses


def measure_load(
    base_url: str, pid: int, files: list[Case], images: list[bytes], connections: int
) -> dict[str, object]:
    other, stop, most = OtherClient(base_url, images), threading.Event(), [0.0]

    def watch() -> None:
        while not stop.wait(0.05):
            most[0] = max(most[0], memory_mib(pid))

    asyncio.run(run_clients(int(base_url.rpartition(":")[2]), images, connections, 10))
    with ThreadPoolExecutor(2) as threads:
        quiet_ends = threading.Event()
        threading.Timer(20, quiet_ends.set).start()
        quiet = other.run(quiet_ends)
        before = memory_mib(pid)
        threads.submit(watch)
        busy = threads.submit(other.run, stop)
        started = time.monotonic()
        statuses = attack(base_url, pid, files, connections, stop)
        took_s = time.monotonic() - started
        stop.set()
        latencies = busy.result()
    until = time.monotonic() + 60
    while (after := memory_mib(pid)) > 1.2 * before and time.monotonic() < until:
        time.sleep(1)
    return {
        "seconds": round(took_s, 1),
        "statuses": dict(statuses),
        "other_client_quiet_p99_ms": p99_ms(quiet),
        "other_client_p99_ms": p99_ms(latencies),
        "other_client_worst_ms": round(1000 * max(latencies), 1),
        "other_client_statuses": dict(other.statuses),
        "memory_mib_before_most_after": [round(value) for value in (before, most[0], after)],
        "memory_returned": after <= 1.2 * before,
    }


def measure(artifact: Path, images: list[bytes], workers: int, arguments: argparse.Namespace) -> dict[str, object]:
    limit = int(arguments.memory_gib * 2**30)
    files = list(cases(arguments.seed, arguments.changed))
    random.Random(arguments.seed).shuffle(files)
    files = files[: arguments.files]
    port = free_port()
    settings = {
        "cache_bytes": "0",
        "local_worker": "false",
        "decode_workers": str(workers),
        "decode_memory_bytes": str(limit * 3 // 8),
    }
    with (
        tempfile.TemporaryDirectory() as data_dir,
        service_process(artifact, Path(data_dir), port, **settings) as process,
        limited(process.pid, limit) as in_cgroup,
    ):
        base_url = f"http://127.0.0.1:{port}"
        costs = measure_costs(base_url, process.pid, files)
        print(f"{workers} decoding threads, memory limited by {'a cgroup' if in_cgroup else 'observation'}", flush=True)
        load = measure_load(base_url, process.pid, files, images, arguments.connections)
        died = process.poll() is not None
    most = load["memory_mib_before_most_after"]
    assert isinstance(most, list)
    for name, cost in sorted(costs.items()):
        print(
            f"{name:>5}: {cost.files:4} files, worst {cost.cpu_s:5.2f} s, {cost.cpu_us_per_byte:8.2f} us/byte, "
            f"+{cost.memory_mib:5.0f} MiB ({cost.worst}); {dict(cost.statuses)}"
        )
    for key, value in load.items():
        print(f"{key:>30}  {value}")
    statuses = Counter(load["statuses"])
    for cost in costs.values():
        statuses += cost.statuses
    return {
        "decode_workers": workers,
        "files": len(files),
        "in_cgroup": in_cgroup,
        "died": died or (not in_cgroup and max(most) * 2**20 > limit),
        "faults": sum(count for status, count in statuses.items() if status >= 500 and status not in LATE),
        "costs": {name: {**vars(cost), "statuses": dict(cost.statuses)} for name, cost in costs.items()},
        **load,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", help="artifact folder, or a model such as dinov2_vits14 with random weights")
    parser.add_argument("images", type=Path, help="folder with .jpg files for the other client")
    parser.add_argument("--decode-workers", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--memory-gib", type=float, default=4)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--changed", type=int, default=200, help="randomly changed files of each format")
    parser.add_argument("--files", type=int, default=ALL, help="highest number of files, for a short run")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    images = [path.read_bytes() for path in sorted(arguments.images.rglob("*.jpg"))[:200]]
    if not images:
        raise SystemExit(f"{arguments.images}: contains no .jpg")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.artifact in CONFIGS:
            config = CONFIGS[arguments.artifact]
            artifact = random_artifact(config, REFERENCE_224, Path(folder), name=arguments.artifact)
        else:
            artifact = load_artifact(Path(arguments.artifact), derived_dir=Path(folder))
        runs = [measure(artifact.path, images, workers, arguments) for workers in arguments.decode_workers]
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    result = {"benchmark": "hostile", "date": date, "memory_gib": arguments.memory_gib, "runs": runs}
    print(json.dumps(result))
    if arguments.files >= ALL:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{date}-hostile.json").write_text(json.dumps(result, indent=2) + "\n")
    return int(any(run["died"] or run["faults"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
