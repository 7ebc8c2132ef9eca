"""Measure what one client can do to the others.

    python benchmarks/fairness.py [--model MODEL] [--seconds 60] [--loads quiet,forms,bodies,unread,connections]

Ten clients send one new image a second each, as a raw body over a keep-alive connection. Meanwhile one more client
sends the worst load that the limits allow:

- `forms`: 8 connections, each of which sends one form after another with 64 different images of 64 megapixels
  (`--side` changes their size).
- `bodies`: 32 connections with bodies of the highest size, which send all but the last byte and then one byte a second.
- `unread`: 64 connections, each of which asks for answers of several megabytes and reads nothing.
- `connections`: as many idle connections as the service accepts, opened again as soon as they are closed.

Each client has its own address in 127.0.0.0/8, so the script needs Linux. `/readyz` is asked five times a second, from
an address of its own. The script prints the latency of the ten clients for each load beside the quiet state, as JSON,
and writes it to benchmarks/results/.
"""

import argparse
import asyncio
import contextlib
import datetime
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
OTHERS = 10
ATTACKER = "127.0.9.9"
JPEG = b"Content-Type: image/jpeg\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Seen:
    """What the clients saw during one load. `side` is the side in pixels of the attacker's images."""

    side: int
    latency_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    attacker: Counter[str] = field(default_factory=Counter)
    unready: int = 0
    asked: int = 0
    peak_mib: float = 0.0


class Service:
    """The service in its own process. `settings` are DINOV2_* variables without the prefix, in lower case."""

    def __init__(self, data: Path, model: str, **settings: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DINOV2_")}
        settings = {"port": "0", "data_dir": str(data), "model": model, "log_level": "error", **settings}
        environment |= {f"DINOV2_{name.upper()}": value for name, value in settings.items()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if "dinov2-service on " in line), None)
        if line is None:
            raise SystemExit("the service did not start")
        self.url = line.split()[2]
        self.port = int(self.url.rpartition(":")[2])

    def resident_mib(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def images(seed: int) -> Iterator[bytes]:
    """Yield new JPEG images of 320 x 240 pixels."""
    generator = np.random.default_rng(seed)
    while True:
        file = io.BytesIO()
        pixels = generator.integers(0, 255, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).resize((320, 240), Image.Resampling.NEAREST).save(file, "JPEG")
        yield file.getvalue()


def large_png(number: int, side: int) -> bytes:
    """Return a PNG of `side` x `side` pixels in a few kilobytes. Each number gives another image."""
    file = io.BytesIO()
    image = Image.new("1", (side, side))
    image.paste(1, (0, 0, number + 1, 1))
    image.save(file, "PNG")
    return file.getvalue()


def request(path: str, headers: bytes, body: bytes, length: int | None = None) -> bytes:
    """Return a request. `length` is what the header Content-Length says."""
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n".encode()
    return head + headers + b"\r\n" + body


async def connect(port: int, address: str) -> Streams:
    return await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))


async def answer(reader: asyncio.StreamReader) -> int:
    """Read an answer and return its status."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    await reader.readexactly(int(length[1]) if length else 0)
    return int(head.split(b" ", 2)[1])


async def other(port: int, number: int, until: float, seen: Seen) -> None:
    """Send one image a second until the time `until`."""
    address, new = f"127.0.1.{number + 1}", images(1000 * number + int(until))
    streams: Streams | None = None
    due = time.monotonic() + number / OTHERS
    while due < until:
        await asyncio.sleep(due - time.monotonic())
        began = time.monotonic()
        try:
            streams = streams or await connect(port, address)
            reader, writer = streams
            writer.write(request("/v1/embeddings", JPEG, next(new)))
            seen.statuses[await answer(reader)] += 1
        except (OSError, asyncio.IncompleteReadError):
            seen.statuses[0] += 1
            streams = None
        seen.latency_s.append(time.monotonic() - began)
        due = max(due + 1, time.monotonic())
    if streams is not None:
        streams[1].close()


async def watch(service: Service, until: float, seen: Seen) -> None:
    """Ask /readyz, and note the memory of the service."""
    transport = httpx.AsyncHTTPTransport(local_address="127.0.2.1")
    async with httpx.AsyncClient(transport=transport, base_url=service.url, timeout=30) as client:
        while time.monotonic() < until:
            seen.asked += 1
            try:
                seen.unready += (await client.get("/readyz")).status_code != 200
            except httpx.HTTPError:
                seen.unready += 1
            seen.peak_mib = max(seen.peak_mib, service.resident_mib())
            await asyncio.sleep(0.2)


# The loads. Each function works on one connection of the attacker until it is cancelled or the connection is closed.


@cache
def form(number: int, side: int) -> bytes:
    """Return a form with 64 large images. Making it takes seconds."""
    parts = []
    for i in range(64):
        head = f'--b\r\nContent-Disposition: form-data; name="file"; filename="{i}"\r\nContent-Type: image/png\r\n\r\n'
        parts.append(head.encode() + large_png(64 * number + i, side) + b"\r\n")
    return b"".join(parts) + b"--b--\r\n"


async def send_forms(port: int, number: int, seen: Seen) -> None:
    body, kind = form(number, seen.side), b"Content-Type: multipart/form-data; boundary=b\r\n"
    reader, writer = await connect(port, ATTACKER)
    while True:
        writer.write(request("/v1/embeddings", kind, body))
        status = await answer(reader)
        seen.attacker[str(status)] += 1
        if status in (429, 503):
            await asyncio.sleep(0.2)


async def send_bodies(port: int, number: int, seen: Seen) -> None:
    size = 64 * 2**20
    reader, writer = await connect(port, ATTACKER)
    head = request("/v1/embeddings", JPEG, b"", size)
    writer.write(head)
    reading = asyncio.create_task(answer(reader))
    for _ in range(size // 2**20 - 1):
        writer.write(bytes(2**20))
        await writer.drain()
        if reading.done():
            break
    while not reading.done():
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(1)
    seen.attacker[str(reading.result())] += 1
    writer.close()
    await asyncio.sleep(0.2)


async def leave_unread(port: int, number: int, seen: Seen) -> None:
    _, writer = await connect(port, ATTACKER)
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport that reads
    body = json.dumps({"limit": 1000}).encode()
    ask = request("/v1/collections/many/items/scroll", b"Content-Type: application/json\r\n", body)
    for _ in range(8):
        writer.write(ask)
        await writer.drain()
    seen.attacker["opened"] += 1
    while not writer.is_closing():
        await asyncio.sleep(0.5)
        writer.write(b"\r\n")
        await writer.drain()


async def stay_idle(port: int, number: int, seen: Seen) -> None:
    reader, writer = await connect(port, ATTACKER)
    seen.attacker["opened"] += 1
    try:
        await reader.read(1)
        seen.attacker["closed"] += 1
    finally:
        writer.close()
    await asyncio.sleep(0.1)


LOADS: dict[str, tuple[int, Callable[[int, int, Seen], Awaitable[None]]]] = {
    "quiet": (0, stay_idle),
    "forms": (8, send_forms),
    "bodies": (32, send_bodies),
    "unread": (64, leave_unread),
    "connections": (1500, stay_idle),
}


async def attack(port: int, name: str, seen: Seen) -> None:
    connections, load = LOADS[name]

    async def again(number: int) -> None:
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await load(port, number, seen)
            await asyncio.sleep(0.05)

    await asyncio.gather(*(again(number) for number in range(connections)))


async def measure(service: Service, name: str, seconds: float, side: int) -> Seen:
    if name == "forms":
        for number in range(LOADS[name][0]):
            form(number, side)
    seen, until = Seen(side), time.monotonic() + seconds
    attacking = asyncio.create_task(attack(service.port, name, seen))
    await asyncio.sleep(min(2.0, seconds / 4))
    await asyncio.gather(
        *(other(service.port, number, until, seen) for number in range(OTHERS)), watch(service, until, seen)
    )
    attacking.cancel()
    await asyncio.gather(attacking, return_exceptions=True)
    return seen


def fill(url: str) -> None:
    """Store items whose metadata makes answers of several megabytes."""
    text = "x" * 8000
    vector = [1.0] * 8
    with httpx.Client(base_url=url, timeout=60) as client:
        client.put("/v1/collections/many", json={"fingerprint": "f" * 64, "dimension": 8}).raise_for_status()
        for start in range(0, 1000, 64):
            items = [
                {"id": str(i), "vector": vector, "fingerprint": "f" * 64, "metadata": {"text": text}}
                for i in range(start, min(1000, start + 64))
            ]
            client.post("/v1/collections/many/items", json={"items": items}).raise_for_status()


def figures(seen: Seen) -> dict[str, Any]:
    p50, p99 = np.quantile(seen.latency_s, [0.5, 0.99]) * 1e3
    return {
        "requests": len(seen.latency_s),
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
        "max_ms": round(1e3 * max(seen.latency_s), 1),
        "mean_ms": round(1e3 * statistics.fmean(seen.latency_s), 1),
        "statuses": {str(status): count for status, count in sorted(seen.statuses.items())},
        "unready": f"{seen.unready} of {seen.asked}",
        "attacker": dict(sorted(seen.attacker.items())),
        "peak_mib": round(seen.peak_mib),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="auto", help="as DINOV2_MODEL; default: the demo model")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--loads", default=",".join(LOADS), help=f"comma-separated: {', '.join(LOADS)}")
    parser.add_argument("--side", type=int, default=8000, help="side in pixels of the images in the load `forms`")
    parser.add_argument("--out", type=Path, help="file for the result; default: in benchmarks/results/")
    given = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "fairness",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": given.model,
        "cpus": os.cpu_count(),
        "seconds": given.seconds,
        "side": given.side,
    }
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder), given.model, cache_bytes="0")
        try:
            fill(service.url)
            for name in given.loads.split(","):
                result[name] = figures(asyncio.run(measure(service, name, given.seconds, given.side)))
                print(f"{name:>12}  {json.dumps(result[name])}", flush=True)
                time.sleep(5)
        finally:
            service.stop()
    print(json.dumps(result))
    out = given.out or RESULTS / f"{result['date']}-fairness.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
