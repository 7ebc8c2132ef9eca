"""Build the image, start docker-compose.yml, and check that the deployment works as documented.

    python3 deploy/smoke.py [--no-build] [--build-option=--network=host] [--keep]

The script needs only Docker with Compose and Python's standard library. It runs a separate Compose project on port
18000, so it does not affect other deployments on the same machine, and it removes the volumes of this project at the
end. To add override files, set the environment variable COMPOSE_FILE, which Compose reads. The script prints each step
with the seconds since the start. The exit status is 1 if a check fails.
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

# Prints a JPEG image of random noise, which cannot be in the cache yet.
MAKE_PHOTO = """
import os, sys
from PIL import Image
Image.frombytes("RGB", (40, 30), os.urandom(3600)).resize((640, 480)).save(sys.stdout.buffer, "JPEG", quality=90)
"""


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


def expect(promise: str, holds: bool, seen: object = "") -> None:
    """Print whether a check has passed.

    Raises:
        SystemExit: the check has failed.
    """
    say(f"{'ok  ' if holds else 'FAIL'} {promise}{f': {seen}' if seen != '' else ''}")
    if not holds:
        raise SystemExit(1)


def run(*command: str) -> bytes:
    """Run a command and return its output.

    Raises:
        SystemExit: the command failed. Its output has been printed.
    """
    result = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, env=environment())
    if result.returncode:
        sys.stderr.buffer.write(result.stdout + result.stderr)
        raise SystemExit(f"{' '.join(command)}: exit status {result.returncode}")
    return result.stdout


def environment() -> dict[str, str]:
    """Return the environment variables for Docker."""
    return {**os.environ, "DINOV2_PUBLISH": f"127.0.0.1:{PORT}", "REDIS_PASSWORD": "smoke-test-password"}


def compose(*arguments: str) -> bytes:
    """Run a command of Docker Compose in the project of this script and return its output."""
    return run("docker", "compose", "-p", "dinov2-smoke", *arguments)


def inside(service: str, *command: str) -> str:
    """Run a command in the container of a Compose service and return its output."""
    return compose("exec", "-T", service, *command).decode().strip()


def get(path: str) -> Any:
    """Return the JSON response to a GET request."""
    with urllib.request.urlopen(URL + path, timeout=REQUEST_LIMIT_S) as answer:
        return json.load(answer)


def embed(photo: bytes) -> Any:
    """Send the bytes of a JPEG image to /v1/embeddings and return the JSON response."""
    request = urllib.request.Request(f"{URL}/v1/embeddings", photo, {"Content-Type": "image/jpeg"})
    with urllib.request.urlopen(request, timeout=REQUEST_LIMIT_S) as answer:
        return json.load(answer)


def computed(answer: Any) -> bool:
    """Return true if the engine computed the vector of a response, or false if the vector came from the cache."""
    return "infer" in answer["timings"]


def wait_for(cache: str, limit_s: float = 60) -> float:
    """Wait until /readyz reports the cache status `cache`, and return the seconds that this took.

    Args:
        cache: "ok" or "degraded".
        limit_s: time limit in seconds.

    Raises:
        SystemExit: the time limit is exceeded.
    """
    started = time.monotonic()
    while not get("/readyz")["cache"]["status"].startswith(cache):
        if time.monotonic() - started > limit_s:
            raise SystemExit(f"after {limit_s:.0f} s, the cache is not {cache}: /readyz responds {get('/readyz')}")
        time.sleep(0.2)
    return time.monotonic() - started


@contextmanager
def steady_requests(photo: bytes) -> Iterator[list[tuple[float, str]]]:
    """Send about five requests per second in the background until the context ends.

    Yields:
        A list that gets an entry for each request: the duration in seconds, and an error message or "".
    """
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
    """Check that the container of the service is restricted as docker-compose.yml says."""
    status = inside("service", "python", "-c", "print(open('/proc/self/status').read())")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    expect("the service does not run as root", fields["Uid"].split()[0] == "10001", f"uid {fields['Uid'].split()[0]}")
    expect("the service has no capabilities", int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0)
    expect("the service cannot gain privileges", fields["NoNewPrivs"] == "1")
    probe = "import sys\ntry: open('/opt/venv/x', 'w')\nexcept OSError as e: sys.exit(print(e.strerror))"
    expect("the root file system of the service is read-only", "Read-only" in inside("service", "python", "-c", probe))
    sizes = run("docker", "image", "inspect", "-f", "{{.Size}}", IMAGE)
    say(f"     the image has {int(sizes) / 1e6:.0f} MB")


def check_redis_outage(photo: bytes) -> None:
    """Kill Redis, start it again after five seconds, and check that requests succeed the whole time."""
    with steady_requests(photo) as seen:
        compose("kill", "-s", "KILL", "redis")
        expect(
            "without Redis, the cache is degraded and the service stays ready",
            True,
            f"reported after {wait_for('degraded'):.1f} s",
        )
        time.sleep(5)
        during = len(seen)
        compose("start", "redis")
        expect("the service uses Redis again", True, f"{wait_for('ok'):.1f} s after the start of Redis")
        time.sleep(2)
    failures = [fault for _, fault in seen if fault]
    slowest = max(seconds for seconds, _ in seen)
    expect("no request failed during the outage", not failures, f"{len(seen)} sent, {during} while Redis was down")
    expect("every request took less than 3 s", slowest < 3, f"the slowest took {slowest * 1e3:.0f} ms")
    expect("the service was not restarted", restarts("service") == 0)


def restarts(service: str) -> int:
    """Return how often Docker has restarted the container of a Compose service."""
    container = compose("ps", "-q", service).decode().strip()
    return int(run("docker", "inspect", "-f", "{{.RestartCount}}", container))


def check(build: bool, build_options: list[str]) -> None:
    """Build the image if `build` is true, start the deployment, and run all checks."""
    if build:
        run("docker", "build", "-q", "-t", IMAGE, *build_options, ".")
        say("the image is built")
    compose("up", "-d", "--no-build", "--wait")
    ready = get("/readyz")
    expect("the service is ready", ready["status"] == "ready", f"model {ready['model']}, cache {ready['cache']}")
    check_container()

    photos = [run("docker", "run", "--rm", "--network=none", IMAGE, "python", "-c", MAKE_PHOTO) for _ in range(2)]
    first = embed(photos[0])
    vector = first["data"][0]["embedding"]
    expect("the service embeds an image on the published port", computed(first), f"{len(vector)} numbers")
    expect("the second response for the same image comes from the cache", not computed(embed(photos[0])))
    expect("Redis requires a password", "NOAUTH" in inside("redis", "env", "-u", "REDISCLI_AUTH", "redis-cli", "ping"))

    check_redis_outage(photos[1])
    expect("the cached vector is available after Redis was killed", not computed(embed(photos[0])))

    compose("restart", "redis", "service")
    compose("up", "-d", "--no-build", "--wait")
    again = embed(photos[0])
    expect(
        "the cached vector is available after a restart of Redis and the service",
        not computed(again) and again["data"][0]["embedding"] == vector,
    )

    started = time.monotonic()
    container = compose("ps", "-q", "service").decode().strip()
    compose("stop", "service")
    status = run("docker", "inspect", "-f", "{{.State.ExitCode}}", container).decode().strip()
    expect(
        "the service exits cleanly after SIGTERM",
        status == "0",
        f"{time.monotonic() - started:.1f} s, exit status {status}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-build", action="store_true", help=f"use the existing image {IMAGE}")
    parser.add_argument("--build-option", action="append", default=[], help="option for docker build; repeatable")
    parser.add_argument("--keep", action="store_true", help="do not remove the containers and volumes at the end")
    options = parser.parse_args()
    try:
        check(not options.no_build, options.build_option)
        say("all checks passed")
    finally:
        if not options.keep:
            compose("down", "-v", "--timeout", "10")


if __name__ == "__main__":
    main()
