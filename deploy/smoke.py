"""Does the deployment keep its promises? Builds the image, starts docker-compose.yml, and tries them on the real thing.

    python3 deploy/smoke.py [--no-build] [--build-option=--network=host] [--keep]

Needs Docker with Compose and nothing else (standard library only). It is a Compose project of its own on port 18000,
so a deployment on the same machine is not touched; its volumes are removed at the end. COMPOSE_FILE adds override
files, as Compose reads it. Prints each step with the seconds since the start; exits 1 at the first broken promise.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMAGE = "dinov2-service"
PORT = 18000
URL = f"http://127.0.0.1:{PORT}"
REQUEST_LIMIT_S = 10.0
STARTED = time.monotonic()

# A photo that no run has sent before: noise, as JPEG.
MAKE_PHOTO = """
import os, sys
from PIL import Image
Image.frombytes("RGB", (40, 30), os.urandom(3600)).resize((640, 480)).save(sys.stdout.buffer, "JPEG", quality=90)
"""


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


def expect(promise: str, holds: bool, seen: object = "") -> None:
    """Print the promise as kept, or end the run."""
    say(f"{'ok  ' if holds else 'FAIL'} {promise}{f': {seen}' if seen != '' else ''}")
    if not holds:
        raise SystemExit(1)


def run(*command: str) -> bytes:
    """Output of a command that must succeed; what it says on stderr is shown when it does not."""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, env=environment())
    if result.returncode:
        sys.stderr.buffer.write(result.stdout + result.stderr)
        raise SystemExit(f"{' '.join(command)}: exit status {result.returncode}")
    return result.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "DINOV2_PUBLISH": f"127.0.0.1:{PORT}", "REDIS_PASSWORD": "smoke-test-password"}


def compose(*arguments: str) -> bytes:
    return run("docker", "compose", "-p", "dinov2-smoke", *arguments)


def inside(service: str, *command: str) -> str:
    return compose("exec", "-T", service, *command).decode().strip()


def get(path: str) -> Any:
    with urllib.request.urlopen(URL + path, timeout=REQUEST_LIMIT_S) as answer:
        return json.load(answer)


def embed(photo: bytes) -> Any:
    """What `curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg'` gets from /v1/embeddings."""
    request = urllib.request.Request(f"{URL}/v1/embeddings", photo, {"Content-Type": "image/jpeg"})
    with urllib.request.urlopen(request, timeout=REQUEST_LIMIT_S) as answer:
        return json.load(answer)


def computed(answer: Any) -> bool:
    """Whether the vector came from the engine and not from the cache."""
    return "infer" in answer["timings"]


def wait_for(cache: str, limit_s: float = 60) -> float:
    """Seconds until /readyz calls the cache `cache` ("ok" or "degraded")."""
    started = time.monotonic()
    while not get("/readyz")["cache"]["status"].startswith(cache):
        if time.monotonic() - started > limit_s:
            raise SystemExit(f"after {limit_s:.0f} s /readyz says {get('/readyz')}, not cache {cache}")
        time.sleep(0.2)
    return time.monotonic() - started


@contextmanager
def steady_requests(photo: bytes) -> Iterator[list[tuple[float, str]]]:
    """Five requests a second in the background; yields the list of (seconds, what went wrong or "")."""
    seen: list[tuple[float, str]] = []
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(0.2):
            started = time.monotonic()
            try:
                embed(photo)
                seen.append((time.monotonic() - started, ""))
            except (OSError, ValueError) as error:
                seen.append((time.monotonic() - started, repr(error)))

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def check_container() -> None:
    status = inside("service", "python", "-c", "print(open('/proc/self/status').read())")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    expect("the service is not root", fields["Uid"].split()[0] == "10001", f"uid {fields['Uid'].split()[0]}")
    expect("it has no capabilities", int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0)
    expect("it can gain none", fields["NoNewPrivs"] == "1")
    probe = "import sys\ntry: open('/opt/venv/x', 'w')\nexcept OSError as e: sys.exit(print(e.strerror))"
    expect("its root file system is read-only", "Read-only" in inside("service", "python", "-c", probe))
    sizes = run("docker", "image", "inspect", "-f", "{{.Size}}", IMAGE)
    say(f"     image of {int(sizes) / 1e6:.0f} MB")


def check_redis_outage(photo: bytes) -> None:
    """Redis dies hard, stays away, comes back; requests go on."""
    with steady_requests(photo) as seen:
        compose("kill", "-s", "KILL", "redis")
        expect("a killed Redis is degraded, not unready", True, f"noticed after {wait_for('degraded'):.1f} s")
        time.sleep(5)
        during = len(seen)
        compose("start", "redis")
        expect("it is used again by itself", True, f"{wait_for('ok'):.1f} s after its start")
        time.sleep(2)
    failures = [fault for _, fault in seen if fault]
    slowest = max(seconds for seconds, _ in seen)
    expect("no request failed meanwhile", not failures, f"{len(seen)} sent, {during} of them before it was back")
    expect("none took long", slowest < 3, f"slowest {slowest * 1e3:.0f} ms")
    expect("the service was not restarted", restarts("service") == 0)


def restarts(service: str) -> int:
    container = compose("ps", "-q", service).decode().strip()
    return int(run("docker", "inspect", "-f", "{{.RestartCount}}", container))


def check(build: bool, build_options: list[str]) -> None:
    if build:
        run("docker", "build", "-q", "-t", IMAGE, *build_options, ".")
        say("image built")
    compose("up", "-d", "--no-build", "--wait")
    ready = get("/readyz")
    expect("up and ready", ready["status"] == "ready", f"model {ready['model']}, cache {ready['cache']}")
    check_container()

    photos = [run("docker", "run", "--rm", "--network=none", IMAGE, "python", "-c", MAKE_PHOTO) for _ in range(2)]
    first = embed(photos[0])
    vector = first["data"][0]["embedding"]
    expect("a photo is embedded through the published port", computed(first), f"{len(vector)} numbers")
    expect("the second time from Redis", not computed(embed(photos[0])))
    expect("Redis wants its password", "NOAUTH" in inside("redis", "env", "-u", "REDISCLI_AUTH", "redis-cli", "ping"))

    check_redis_outage(photos[1])
    expect("what it held outlived the kill", not computed(embed(photos[0])))

    compose("restart", "redis", "service")
    compose("up", "-d", "--no-build", "--wait")
    again = embed(photos[0])
    expect("the cache outlives a restart of both", not computed(again) and again["data"][0]["embedding"] == vector)

    started = time.monotonic()
    container = compose("ps", "-q", "service").decode().strip()
    compose("stop", "service")
    status = run("docker", "inspect", "-f", "{{.State.ExitCode}}", container).decode().strip()
    expect("SIGTERM ends it cleanly", status == "0", f"{time.monotonic() - started:.1f} s, exit status {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-build", action="store_true", help=f"use the image {IMAGE} that is there")
    parser.add_argument("--build-option", action="append", default=[], help="passed to docker build")
    parser.add_argument("--keep", action="store_true", help="leave the containers and volumes")
    options = parser.parse_args()
    try:
        check(not options.no_build, options.build_option)
        say("all promises kept")
    finally:
        if not options.keep:
            compose("down", "-v", "--timeout", "10")


if __name__ == "__main__":
    main()
