"""Measure the service under load over loopback, compared with the engine alone in the same run.

    python benchmarks/load.py dinov2_vits14|ARTIFACT PHOTOS [--clients 64] [--seconds 60]

The engine alone and the service take turns, so that other load affects both. The service runs in a separate process
without a cache. Each client has one keep-alive connection and sends one JPEG per request as a raw body. The engine
alone runs the same artifact on decoded images. At the end, more clients than the queue can hold send requests. The
result counts their responses by status, and the responses with status 503 that have Retry-After. The memory is the
resident memory of the service.
"""

import argparse
import asyncio
import datetime
import io
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.serving import free_port, random_artifact, service_process
from model.artifact import Artifact, load_artifact
from model.config import CONFIGS
from model.engines.choice import load_engine
from model.engines.protocol import Engine
from model.preprocess import REFERENCE_224, preprocess

RESULTS = Path(__file__).parent / "results"


class Tally:
    """The responses that the clients of one phase received."""

    def __init__(self) -> None:
        self.status: Counter[int] = Counter()
        self.retry_after = 0
        self.stage_ms: dict[str, list[float]] = {}
        self.latency_s: list[float] = []


async def client(port: int, photos: list[bytes], offset: int, until: float, tally: Tally) -> None:
    """Send one image after another over one keep-alive connection until the time `until`. Record the responses."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    index = offset
    while time.monotonic() < until:
        body = photos[index % len(photos)]
        index += 1
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/jpeg\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        start = time.monotonic()
        writer.write(head.encode() + body)
        await writer.drain()
        answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = re.search(r"(?i)content-length: (\d+)", answer)
        assert length, answer
        await reader.readexactly(int(length[1]))
        tally.latency_s.append(time.monotonic() - start)
        status = int(answer.split(" ", 2)[1])
        tally.status[status] += 1
        if status == 503:
            tally.retry_after += "retry-after:" in answer.lower()
            await asyncio.sleep(0.05)
        timing = re.search(r"(?i)server-timing: (.*)\r", answer)
        for stage, duration in re.findall(r"([\w-]+);dur=([\d.]+)", timing[1] if timing else ""):
            tally.stage_ms.setdefault(stage, []).append(float(duration))
    writer.close()


async def run_clients(port: int, photos: list[bytes], clients: int, seconds: float) -> Tally:
    tally = Tally()
    until = time.monotonic() + seconds
    await asyncio.gather(*(client(port, photos, i * 7, until, tally) for i in range(clients)))
    return tally


def run_engine(engine: Engine, pixels: np.ndarray, seconds: float) -> float:
    """Run the engine alone for some seconds, and return the images/s."""
    start, images = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        engine.run(pixels)
        images += len(pixels)
    return images / (time.monotonic() - start)


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def read_photos(folder: Path, count: int) -> list[bytes]:
    """Return the bytes of up to `count` JPEG files below a folder."""
    photos = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[:count]]
    if not photos:
        raise SystemExit(f"{folder}: contains no .jpg")
    return photos


def measure(artifact: Artifact, photos: list[bytes], arguments: argparse.Namespace) -> dict[str, object]:
    spec = artifact.manifest.preprocess
    arrays = [np.asarray(Image.open(io.BytesIO(photo)).convert("RGB")) for photo in photos[: arguments.batch]]
    pixels = np.stack([preprocess(array, spec) for array in arrays])
    engine = load_engine(artifact)
    engine.run(pixels)
    port = free_port()
    bare, http, memory, statuses = [], [], [], Counter[int]()
    stages: dict[str, list[float]] = {}
    latency: list[float] = []
    settings = {"cache_bytes": "0", "queue_max_images": str(arguments.clients), "client_share": "1"}
    with (
        tempfile.TemporaryDirectory() as data_dir,
        service_process(artifact.path, Path(data_dir), port, **settings) as process,
    ):
        asyncio.run(run_clients(port, photos, arguments.clients, 5))  # warms up
        slice_s = arguments.seconds / arguments.rounds
        for _ in range(arguments.rounds):
            bare.append(run_engine(engine, pixels, slice_s / 2))
            start = time.monotonic()
            tally = asyncio.run(run_clients(port, photos, arguments.clients, slice_s))
            http.append(tally.status[200] / (time.monotonic() - start))
            statuses += tally.status
            latency += tally.latency_s
            memory.append(resident_mib(process.pid))
            for stage, values in tally.stage_ms.items():
                stages.setdefault(stage, []).extend(values)
        flood = asyncio.run(run_clients(port, photos, arguments.clients * 8, 10))
        memory.append(resident_mib(process.pid))
    ratios = [over / engine_rate for over, engine_rate in zip(http, bare, strict=True)]
    return {
        "benchmark": "load",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": artifact.name,
        "clients": arguments.clients,
        "seconds": arguments.seconds,
        "engine_images_per_s": [round(rate, 2) for rate in bare],
        "http_images_per_s": [round(rate, 2) for rate in http],
        "http_to_engine_median": round(statistics.median(ratios), 3),
        "latency_ms_p50_p99": [round(float(q) * 1e3, 1) for q in np.quantile(latency, [0.5, 0.99])],
        "stage_ms_median": {stage: round(statistics.median(values), 3) for stage, values in stages.items()},
        "stage_ms_mean": {stage: round(statistics.fmean(values), 3) for stage, values in stages.items()},
        "statuses": dict(statuses),
        "flood_clients": arguments.clients * 8,
        "flood_statuses": dict(flood.status),
        "flood_503_with_retry_after": flood.retry_after,
        "resident_mib": [round(value, 1) for value in memory],
        "exit_code": process.returncode,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", help="artifact folder, or a model such as dinov2_vits14 with random weights")
    parser.add_argument("photos", type=Path, help="folder with .jpg files")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.artifact in CONFIGS:
            config = CONFIGS[arguments.artifact]
            artifact = random_artifact(config, REFERENCE_224, Path(folder), name=arguments.artifact)
        else:
            artifact = load_artifact(Path(arguments.artifact), derived_dir=Path(folder))
        result = measure(artifact, read_photos(arguments.photos, 200), arguments)
    for key, value in result.items():
        print(f"{key:>28}  {value}")
    name = f"{result['date']}-load-{artifact.manifest.name}.json"
    print(json.dumps(result))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
