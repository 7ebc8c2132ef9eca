"""Services in processes of their own and requests to them, for benchmarks that compare services over HTTP."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

PROGRAM = "import sys; sys.path.insert(0, '.'); from service.__main__ import main; main()"
KINDS = ("search by vector", "embedding, cached", "embedding, new image")
SETTLE_S = 0.002
"""The time in seconds after which a service has ended the work that follows its last answer, such as its log line."""
RNG = np.random.default_rng(0)
Send = Callable[[httpx.Client], httpx.Response]


class Service:
    """A service of the demo model with one thread, and a client of it. It runs until `stack` is closed.

    Args:
        tree: the checkout whose code runs.
        data: the data folder.
        settings: environment variables of the service.
        stack: ends the process and closes the client.
        program: Python code that runs the service.
    """

    def __init__(
        self, tree: Path, data: Path, settings: dict[str, str], stack: ExitStack, program: str = PROGRAM
    ) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("DINOV2_", "PYTHONPATH"))
        }
        environment |= {"DINOV2_PORT": "0", "DINOV2_DATA_DIR": str(data), "DINOV2_THREADS": "1", **settings}
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=tree,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        assert process.stdout is not None
        line = next((line for line in process.stdout if "dinov2-service on " in line), None)
        if line is None:
            raise SystemExit(f"the service of {tree} did not start")
        self.client = stack.enter_context(httpx.Client(base_url=f"{line.split()[2]}/v1", timeout=60))
        self.pid = process.pid
        self._clock = ~process.pid << 3 | 2  # Linux: the clock of the processor time of a process

    def cpu_s(self) -> float:
        """Return the processor time of the process so far, in seconds."""
        return time.clock_gettime(self._clock)

    def fill(self, vectors: np.ndarray) -> None:
        """Make the collection `many` of these vectors [N, D]."""
        for at in range(0, len(vectors), 500):
            items = [{"id": str(at + i), "vector": row.tolist()} for i, row in enumerate(vectors[at : at + 500])]
            self.client.post("/collections/many/items", json={"items": items}).raise_for_status()

    def measure(self, sends: list[Send]) -> tuple[list[float], float]:
        """Send requests, one after another. Return the latency of each in milliseconds, and the processor time of the
        service for each, on average, in microseconds."""
        times = []
        cpu = self.cpu_s()
        for send in sends:
            began = time.perf_counter()
            send(self.client).raise_for_status()
            times.append(1e3 * (time.perf_counter() - began))
        time.sleep(SETTLE_S)
        return times, 1e6 * (self.cpu_s() - cpu) / len(sends)


def image() -> bytes:
    """Return a new JPEG of random blocks, 320 x 240 pixels."""
    pixels = RNG.integers(0, 255, (12, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((320, 240), Image.Resampling.NEAREST).save(file, "JPEG")
    return file.getvalue()


def requests(kind: str, count: int, cached: bytes) -> Iterator[Send]:
    """Yield functions that send one request each. The image `cached` is that of all embeddings from the cache."""
    jpeg = {"Content-Type": "image/jpeg"}
    for _ in range(count):
        if kind == "search by vector":
            query = {"vector": RNG.standard_normal(192).astype(np.float32).tolist(), "k": 10}
            yield partial(httpx.Client.post, url="/collections/many/search", json=query)
        else:
            body = cached if kind == "embedding, cached" else image()
            yield partial(httpx.Client.post, url="/embeddings", content=body, headers=jpeg)
