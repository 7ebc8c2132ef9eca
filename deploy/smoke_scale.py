"""The checks of deploy/smoke.py on several containers: two that serve behind nginx, a worker, and Prometheus."""

import itertools
import json
import re
import subprocess
import time
import urllib.parse
from collections import Counter
from functools import partial
from typing import Any

from smoke_tools import TRAIN_IMAGE, Api, Load, Project, computed, expect, noise, run, say, wait_until

COLLECTION = "/v1/collections/smoke"
KNOWN = 6
"""Number of images whose vectors are known and compared with each response."""
SENT_S = 1.0
"""Time in seconds after which Redis knows what a request has cost. A container sends it every 0.5 seconds."""
SETTLED_S = 2.0
"""Time in seconds after a recovery during which a failed request still counts as caused by the outage: it began
before."""


def check_scale(port: int, keep: bool) -> None:
    """Check two containers that serve behind nginx: they share the cache and the data, and each may be killed."""
    has_worker = _has_worker()
    profiles = ("scale", "train") if has_worker else ("scale",)
    project = Project("dinov2-smoke-scale", port, {"REPLICAS": "1"}, profiles)
    try:
        seconds = project.up()
        expect("two containers serve behind nginx", True, f"ready after {seconds:.1f} s")
        _check_shared(project)
        _check_kills(project, ["service", "replica", "redis", *(["worker"] if has_worker else [])])
        if not has_worker:
            say(f"     without a worker: the image {TRAIN_IMAGE} has no command `dinov2 worker`")
    finally:
        if not keep:
            project.remove()


def _has_worker() -> bool:
    command = ["docker", "run", "--rm", "--network=none", TRAIN_IMAGE, "dinov2", "worker", "--help"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _request_inside(project: Project, service: str, image: bytes) -> tuple[Any, int]:
    """Embed an image with the container of one Compose service, past the proxy. Return the JSON response, and how many
    pixels are left of the client's rate limit."""
    code = (
        "import json, sys, urllib.request; r = urllib.request.Request('http://127.0.0.1:8000/v1/embeddings', "
        "bytes.fromhex(sys.stdin.read()), {'Content-Type': 'image/jpeg'}); a = urllib.request.urlopen(r, timeout=10); "
        "print(json.dumps([json.load(a), a.headers['RateLimit']]))"
    )
    container = project.container(service)
    command = ["docker", "exec", "-i", container, "python", "-c", code]
    answer = subprocess.run(command, input=image.hex().encode(), capture_output=True, check=True)
    body, limit = json.loads(answer.stdout)
    left = re.search(r";r=(\d+)", limit or "")
    return body, int(left[1]) if left else 0


def _check_shared(project: Project) -> None:
    """Check that a vector that one container computed is a cache hit in the other, and that both see each write."""
    image = noise()
    first, left = _request_inside(project, "service", image)
    time.sleep(SENT_S)
    second, left_then = _request_inside(project, "replica", image)
    same = first["data"][0]["embedding"] == second["data"][0]["embedding"]
    expect(
        "a vector that one container computed is a cache hit in the other",
        computed(first) and not computed(second) and same,
    )
    expect("both containers share the rate limits", 0 < left_then < left, f"{left} pixels left, then {left_then}")
    _put(project.proxy, COLLECTION, {})
    vector = first["data"][0]["embedding"]
    _put(project.service, f"{COLLECTION}/items/first", {"vector": vector})
    counts = [project.proxy.get(COLLECTION)["count"] for _ in range(10)]
    expect("both containers see a write at once", counts == [1] * 10)
    served = [_requests_served(project, name) for name in ("service", "replica")]
    expect("the proxy uses both containers", min(served) > 2, f"requests served: {served[0]} and {served[1]}")


def _put(api: Api, path: str, body: dict[str, Any]) -> Any:
    return api.request("PUT", path, json.dumps(body).encode())


def _requests_served(project: Project, service: str) -> int:
    """Return the number of requests to /v1/ that the container of a Compose service has answered."""
    code = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8000/metrics').read().decode())"
    text = run("docker", "exec", project.container(service), "python", "-c", code).decode()
    lines = [line for line in text.splitlines() if line.startswith("dinov2_requests_total{") and 'route="/v1/' in line]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines))


class _Traffic:
    """Requests through the proxy whose responses are compared with what they must be."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.images = [noise() for _ in range(KNOWN)]
        self.vectors = [api.embed(image)["data"][0]["embedding"] for image in self.images]
        for i, vector in enumerate(self.vectors):
            _put(api, f"{COLLECTION}/items/known-{i}", {"vector": vector})
        self.written: list[str] = []  # ids of acknowledged writes
        self.tried: list[str] = []  # ids that were to be deleted; without an answer, nobody knows whether they are
        self.deleted: list[str] = []  # ids of acknowledged deletions
        self._turns = {name: itertools.count() for name in ("embed", "search", "write")}

    def embed(self) -> str:
        i = next(self._turns["embed"]) % KNOWN
        found = self.api.embed(self.images[i])["data"][0]["embedding"]
        largest = max(abs(a - b) for a, b in zip(found, self.vectors[i], strict=True))
        return "" if largest < 1e-4 else f"the vector of image {i} differs by {largest}"

    def search(self) -> str:
        i = next(self._turns["search"]) % KNOWN
        body = json.dumps({"vector": self.vectors[i], "k": 1}).encode()
        found = self.api.request("POST", f"{COLLECTION}/search", body)["data"]
        return "" if found and found[0]["id"] == f"known-{i}" else f"image {i} finds {found}"

    def write(self) -> str:
        turn = next(self._turns["write"])
        name = f"written-{turn}"
        vector = [float(turn % 7 + 1)] + [1.0] * (len(self.vectors[0]) - 1)
        _put(self.api, f"{COLLECTION}/items/{name}", {"vector": vector})
        self.written.append(name)
        return ""

    def delete(self) -> str | None:
        """Delete every third item that was written."""
        index = 3 * len(self.tried)
        if index >= len(self.written):
            return None
        name = self.written[index]
        self.tried.append(name)
        self.api.request("DELETE", f"{COLLECTION}/items/{name}")
        self.deleted.append(name)
        return ""

    def lost(self, api: Api) -> list[str]:
        """Return the ids whose acknowledged write or deletion has no effect."""
        missing = [name for name in set(self.written) - set(self.tried) if not _exists(api, name)]
        return missing + [f"deleted {name}" for name in self.deleted if _exists(api, name)]


def _exists(api: Api, item: str) -> bool:
    try:
        api.get(f"{COLLECTION}/items/{urllib.parse.quote(item)}")
    except OSError as error:
        if getattr(error, "code", None) != 404:
            raise
        return False
    return True


def _check_kills(project: Project, services: list[str]) -> None:
    """Kill one container after another while requests arrive. No response may be wrong, no acknowledged write may be
    lost, and requests may fail only while the container is down."""
    traffic = _Traffic(project.proxy)
    kinds = {"embed": traffic.embed, "search": traffic.search, "write": traffic.write, "delete": traffic.delete}
    outages: list[tuple[str, float, float]] = []
    with Load().sending(kinds, pause_s=0.02) as load:
        time.sleep(3)
        for service in services:
            began, restarts = time.monotonic(), int(project.inspect(service, "{{.RestartCount}}"))
            project.kill(service)
            wait_until(f"{service} is running again", partial(_is_back, project, service, began), 120)
            ended = time.monotonic()
            outages.append((service, began, ended))
            failed = [one for one in load.failures() if one.ended >= began]
            total = sum(one.ended >= began for one in load.sent)
            say(
                f"     {service} killed: back after {ended - began:.1f} s (restarts before: {restarts}), "
                f"{len(failed)} of {total} requests failed meanwhile"
            )
            time.sleep(3)
    _report(load, traffic, outages)
    lost = traffic.lost(project.proxy)
    expect(
        "no acknowledged write was lost", not lost, f"{len(traffic.written)} writes, {len(traffic.deleted)} deletions"
    )


def _is_back(project: Project, service: str, began: float) -> bool:
    """Return whether the container of a Compose service runs, and is healthy if it has a health check."""
    state = json.loads(project.inspect(service, "{{json .State}}"))
    if not state["Running"] or time.monotonic() - began < 1:
        return False
    return str(state.get("Health", {}).get("Status", "healthy")) == "healthy"


def _report(load: Load, traffic: _Traffic, outages: list[tuple[str, float, float]]) -> None:
    """Print the figures of the load and check them."""
    for kind in ("embed", "search", "write", "delete"):
        mine = [sent for sent in load.sent if sent.kind == kind]
        failed = sum(bool(sent.fault) for sent in mine)
        say(f"     {kind}: {len(mine)} requests, {failed} failed")
    for fault, count in Counter(sent.fault for sent in load.failures()).most_common(5):
        say(f"     {count} times {fault}")
    expect("no response was wrong", not load.wrong, f"{len(load.sent)} responses" if not load.wrong else load.wrong[:3])
    outside = [
        sent
        for sent in load.failures()
        if not any(began <= sent.ended and sent.began <= ended + SETTLED_S for _, began, ended in outages)
    ]
    expect(
        "requests failed only while a container was down",
        not outside,
        f"{len(load.failures())} of {len(load.sent)} failed, the slowest took {load.slowest_ms():.0f} ms"
        if not outside
        else [sent.fault for sent in outside[:3]],
    )


def _is_available(image: str) -> bool:
    """Return whether an image is on this machine, or can be pulled."""
    commands = (["docker", "image", "inspect", image], ["docker", "pull", "-q", image])
    return any(subprocess.run(command, capture_output=True, check=False).returncode == 0 for command in commands)


def check_monitoring(port: int, keep: bool) -> None:
    """Check that Prometheus reads the metrics of the service and has loaded the alerts, and that Grafana starts."""
    project = Project("dinov2-smoke-monitoring", port, profiles=("monitoring",))
    grafana = project.compose("config", "--images", "grafana").decode().split()
    has_grafana = all(_is_available(image) for image in grafana)
    try:
        project.up("service", "prometheus", *(["grafana"] if has_grafana else []))
        prometheus = Api(f"http://127.0.0.1:{port + 2}")

        def is_read() -> bool:
            targets = prometheus.get("/api/v1/targets?state=active")["data"]["activeTargets"]
            return any(target["health"] == "up" and "8000" in target["scrapeUrl"] for target in targets)

        seconds = wait_until("Prometheus reads the metrics of the service", is_read, 90)
        expect("Prometheus reads the metrics of the service", True, f"after {seconds:.1f} s")
        groups = prometheus.get("/api/v1/rules")["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        broken = [rule["name"] for rule in rules if rule["health"] == "err"]
        expect("all rules are loaded", bool(rules) and not broken, broken or f"{len(rules)} rules")
        if has_grafana:
            health = Api(f"http://127.0.0.1:{port + 3}").get("/api/health")
            expect("Grafana has started", health["database"] == "ok")
        else:
            say("     without Grafana: its image is not available")
    finally:
        if not keep:
            project.remove()
