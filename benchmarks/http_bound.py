"""Measure embedding over HTTP with many clients, as a share of what the CPU allows, for several arrangements in turns.

    python benchmarks/http_bound.py ARTIFACT IMAGES --variants before=.,DINOV2_BATCH_MAX_PATCHES=2048 now=.

A variant is a name, the checkout whose service runs, and environment variables of this service. Each variant has a
process of its own, without a cache. In each round, this process first measures the engine alone and decoding alone, and
then the variants take turns, each round in a new order:

- `--clients` clients with one connection each send JPEG files from the folder IMAGES. The table shows the images/s,
  their shares of the bound and of the engine alone, and the median latency. With a fixed number of clients the mean
  latency is their number divided by the throughput, so it cannot change without the throughput.
- Then one client sends single images, beside connections that keep the service busy with requests of `BULK_IMAGES`
  images. The table shows the median latency of the single images and the images/s of all requests.

The bound is reached if no core is ever idle and nothing but decoding and the engine takes time:
1 / (engine's seconds per image + decoding's seconds per image), each measured with all cores. It is the throughput of
the engine alone, divided by 1 + decoding time / engine time.
"""

import argparse
import asyncio
import base64
import datetime
import json
import random
import re
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks.decode_beside import decode_all, pass_s
from benchmarks.load import read_photos, run_clients
from benchmarks.services import Service
from model.artifact import Artifact, load_artifact
from model.cpus import available_cpus
from model.decode import decode
from model.engines.choice import load_engine
from model.engines.pace import measure_batches
from model.preprocess import preprocess
from training.watch.flops import describe_device

RESULTS = Path(__file__).parent / "results"
BULK_IMAGES, BULK_CONNECTIONS = 16, 4
LARGEST_BATCH = 8

Figures = dict[str, list[float]]


class Bound:
    """Measures the engine alone and decoding alone. `batch` is the batch with which the engine alone is fastest."""

    def __init__(self, artifact: Artifact, engine: str, images: list[bytes]) -> None:
        self._spec, self._images, self._cores = artifact.manifest.preprocess, images, available_cpus()
        self._engine = load_engine(artifact, engine, threads=self._cores)
        pixels = preprocess(decode(images[0]), self._spec)
        speeds = measure_batches(self._engine.run, pixels, LARGEST_BATCH)
        self.batch = max(speeds, key=lambda size: speeds[size])
        self._pixels = np.repeat(pixels[None], self.batch, axis=0)

    def measure(self, seconds: float) -> dict[str, float]:
        """Return the images/s of the engine and of decoding, each alone, and the bound."""
        engine_s = pass_s(self._engine, self._pixels, seconds / 2)
        decoding_s, until = [], time.perf_counter() + seconds / 2
        while not decoding_s or time.perf_counter() < until:
            decoding_s.append(decode_all(random.sample(self._images, len(self._images)), self._spec, self._cores))
        decode_s = statistics.fmean(decoding_s)
        return {"engine": 1 / engine_s, "decoding": 1 / decode_s, "bound": 1 / (engine_s + decode_s)}


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: str, body: bytes) -> None:
    """Send a request for embeddings over a connection, and read the answer."""
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}\r\n".encode() + body)
    await writer.drain()
    answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    length = re.search(r"(?i)content-length: (\d+)", answer)
    assert length, answer
    await reader.readexactly(int(length[1]))
    if answer.split(" ", 2)[1] != "200":
        raise SystemExit(f"a request failed: {answer}")


async def beside_bulk(port: int, images: list[bytes], seconds: float) -> tuple[float, float]:
    """Send single images beside requests of many images. Return the median latency of the single images in
    milliseconds, and the images/s of all requests."""
    until, done, latency = time.monotonic() + seconds, 0, []
    source = cycle(images)

    async def bulk() -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < until:
            texts = [base64.b64encode(next(source)).decode() for _ in range(BULK_IMAGES)]
            await post(reader, writer, "application/json", json.dumps({"input": texts}).encode())
            done += BULK_IMAGES
        writer.close()

    async def single() -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < until:
            start = time.monotonic()
            await post(reader, writer, "image/jpeg", next(source))
            latency.append(time.monotonic() - start)
            done += 1
        writer.close()

    start = time.monotonic()
    await asyncio.gather(single(), *(bulk() for _ in range(BULK_CONNECTIONS)))
    return 1e3 * statistics.median(latency), done / (time.monotonic() - start)


async def many_clients(port: int, images: list[bytes], clients: int, seconds: float) -> tuple[float, float]:
    """Return the images/s and the median latency in milliseconds of clients that send one image after another."""
    start = time.monotonic()
    tally = await run_clients(port, images, clients, seconds)
    if set(tally.status) != {200}:
        raise SystemExit(f"not all requests were answered with 200: {dict(tally.status)}")
    return tally.status[200] / (time.monotonic() - start), 1e3 * statistics.median(tally.latency_s)


def start_all(arguments: argparse.Namespace, stack: ExitStack) -> dict[str, Service]:
    """Start the service of each variant, and return them by name."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    services = {}
    for text in arguments.variants:
        name, _, rest = text.partition("=")
        tree, *pairs = rest.split(",")
        settings = {"DINOV2_MODEL": str(arguments.artifact.resolve()), "DINOV2_ENGINE": arguments.engine}
        settings |= {"DINOV2_CACHE_BYTES": "0", "DINOV2_THREADS": str(available_cpus())}
        settings |= dict(pair.split("=", 1) for pair in pairs)
        services[name] = Service(Path(tree).resolve(), folder / name, settings, stack)
    return services


def measure(arguments: argparse.Namespace, bound: Bound, services: dict[str, Service]) -> dict[str, Figures]:
    """Return the figures of all rounds, for the bound and for each variant. The first round is not counted."""
    images = read_photos(arguments.images, 200)
    figures: dict[str, Figures] = {name: {} for name in ("alone", *services)}
    for number in range(-1, arguments.rounds):
        row = {"alone": bound.measure(arguments.seconds)}
        for name in random.sample(list(services), len(services)):
            port = services[name].client.base_url.port
            assert port is not None
            speed, latency = asyncio.run(many_clients(port, images, arguments.clients, arguments.seconds))
            single, busy = asyncio.run(beside_bulk(port, images, arguments.seconds / 2))
            row[name] = {"images_per_s": speed, "share_of_bound": speed / row["alone"]["bound"]}
            row[name] |= {"share_of_engine": speed / row["alone"]["engine"], "p50_ms": latency}
            row[name] |= {"single_p50_ms": single, "images_per_s_beside_bulk": busy}
        shown = {name: {key: round(value, 3) for key, value in values.items()} for name, values in row.items()}
        print(f"round {number + 1}: {shown}", file=sys.stderr)
        for name, values in row.items() if number >= 0 else ():
            for key, value in values.items():
                figures[name].setdefault(key, []).append(value)
    return figures


def summary(figures: dict[str, Figures]) -> dict[str, dict[str, float]]:
    """Return the median of each figure. The figures of a variant include the medians of the ratios to the first variant
    of the same round."""
    names = [name for name in figures if name != "alone"]
    medians: dict[str, dict[str, float]] = {}
    for name, values in figures.items():
        medians[name] = {key: round(statistics.median(each), 3) for key, each in values.items()}
        for key, each in values.items() if name in names[1:] else ():
            ratios = [value / first for value, first in zip(each, figures[names[0]][key], strict=True)]
            medians[name][f"ratio of {key}"] = round(statistics.median(ratios), 3)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder of an exported model")
    parser.add_argument("images", type=Path, help="folder with .jpg files")
    parser.add_argument("--variants", nargs="+", default=["now=."], help="NAME=CHECKOUT[,VARIABLE=VALUE ...]")
    parser.add_argument("--engine", default="onnxruntime:fp32")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0, help="time for each variant in a round; half for bulk")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, help="file for the result; default: a dated file in benchmarks/results")
    arguments = parser.parse_args()
    bound = Bound(load_artifact(arguments.artifact), arguments.engine, read_photos(arguments.images, 200))
    with ExitStack() as stack:
        figures = measure(arguments, bound, start_all(arguments, stack))
    medians = summary(figures)
    for name, values in medians.items():
        print(f"{name}: {values}")
    result: dict[str, Any] = {
        "benchmark": "embedding over HTTP and its bound",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": arguments.artifact.name,
        "engine": arguments.engine,
        "clients": arguments.clients,
        "batch_of_the_engine_alone": bound.batch,
        "variants": [text.partition("=")[0] for text in arguments.variants],
        "machine": describe_device(torch.device("cpu")),
        "medians": medians,
        "rounds": {name: {k: [round(v, 2) for v in each] for k, each in f.items()} for name, f in figures.items()},
    }
    out = arguments.out or RESULTS / f"{result['date']}-http-bound.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
