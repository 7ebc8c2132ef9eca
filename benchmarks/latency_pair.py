"""Compare the latency of two versions of the service over HTTP, in turns on the same machine.

    python benchmarks/latency_pair.py OLD_TREE NEW_TREE [--rounds 10] [--requests 300]

Both trees serve the demo model, each in its own process with one thread and its own data folder, and both get the same
collection of random vectors. In each round, one version after the other answers the same requests over one keep-alive
connection: searches by vector, embeddings of an image that is in the cache, and embeddings of new images. The script
prints the median of each round's median latency, and the ratio of the two versions, and writes the result to
benchmarks/results/.
"""

import argparse
import datetime
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

RESULTS = Path(__file__).parent / "results"
RNG = np.random.default_rng(0)


def start(tree: Path, data: Path, stack: ExitStack) -> httpx.Client:
    """Start the service of a tree and return a client of it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DINOV2_", "PYTHONPATH"))}
    environment |= {"DINOV2_PORT": "0", "DINOV2_DATA_DIR": str(data), "DINOV2_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.path.insert(0, '.'); from service.__main__ import main; main()"],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    stack.callback(process.wait)
    stack.callback(process.terminate)
    assert process.stdout is not None
    for line in process.stdout:
        if "dinov2-service on " in line:
            url = line.split()[2]
            return stack.enter_context(httpx.Client(base_url=f"{url}/v1", timeout=60))
    raise SystemExit(f"the service of {tree} did not start")


def image() -> bytes:
    """Return a new JPEG of random blocks, 320 x 240 pixels."""
    pixels = RNG.integers(0, 255, (12, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((320, 240), Image.Resampling.NEAREST).save(file, "JPEG")
    return file.getvalue()


def fill(client: httpx.Client, vectors: np.ndarray) -> None:
    for at in range(0, len(vectors), 500):
        items = [{"id": str(at + i), "vector": row.tolist()} for i, row in enumerate(vectors[at : at + 500])]
        client.post("/collections/pair/items", json={"items": items}).raise_for_status()


def median_ms(send: Callable[[int], httpx.Response], requests: int) -> float:
    times = []
    for i in range(requests):
        began = time.perf_counter()
        send(i).raise_for_status()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="checkout of the old version")
    parser.add_argument("new", type=Path, help="checkout of the new version")
    parser.add_argument("--rounds", type=int, default=10, help="number of rounds")
    parser.add_argument("--requests", type=int, default=300, help="number of requests of each kind in a round")
    arguments = parser.parse_args()
    jpeg = {"Content-Type": "image/jpeg"}
    vectors = RNG.standard_normal((5000, 192)).astype(np.float32)
    cached = image()
    times: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        clients = {name: start(getattr(arguments, name), folder / name, stack) for name in ("old", "new")}
        for client in clients.values():
            fill(client, vectors)
        for _ in range(arguments.rounds):
            queries = [row.tolist() for row in RNG.standard_normal((arguments.requests, 192)).astype(np.float32)]
            images = [image() for _ in range(max(1, arguments.requests // 10))]
            for name, client in clients.items():
                kinds: dict[str, tuple[Callable[[int], httpx.Response], int]] = {
                    "search by vector": (
                        lambda i, c=client, q=queries: c.post(
                            "/collections/pair/search", json={"vector": q[i], "k": 10}
                        ),
                        arguments.requests,
                    ),
                    "embedding, cached": (
                        lambda i, c=client: c.post("/embeddings", content=cached, headers=jpeg),
                        arguments.requests,
                    ),
                    "embedding, new image": (
                        lambda i, c=client, new=images: c.post("/embeddings", content=new[i], headers=jpeg),
                        len(images),
                    ),
                }
                for kind, (send, count) in kinds.items():
                    times.setdefault(kind, {}).setdefault(name, []).append(median_ms(send, count))
    result: dict[str, Any] = {"benchmark": "latency of two versions", "date": datetime.date.today().isoformat()}
    for kind, by_version in times.items():
        old, new = (statistics.median(by_version[name]) for name in ("old", "new"))
        ratios = [n / o for o, n in zip(by_version["old"], by_version["new"], strict=True)]
        row = {"old_ms": round(old, 3), "new_ms": round(new, 3), "median_ratio": round(statistics.median(ratios), 3)}
        result[kind] = row
        print(f"{kind:>22}  {row}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result['date']}-latency-pair.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
