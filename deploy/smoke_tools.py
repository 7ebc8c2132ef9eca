"""Helpers of deploy/smoke.py: they run Docker Compose, send requests, and print whether a check has passed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMAGE = "dinov2-service"
TRAIN_IMAGE = "dinov2-service:train"
REQUEST_LIMIT_S = 10.0
STARTED = time.monotonic()

# Prints a JPEG image of random noise, which cannot be in the cache yet.
MAKE_IMAGE = """
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


def run(*command: str, env: dict[str, str] | None = None) -> bytes:
    """Run a command with the additional environment variables `env`, and return its output.

    Raises:
        SystemExit: the command failed. Its output has been printed.
    """
    result = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, env={**os.environ, **(env or {})})
    if result.returncode:
        sys.stderr.buffer.write(result.stdout + result.stderr)
        raise SystemExit(f"{' '.join(command)}: exit status {result.returncode}")
    return result.stdout


def noise() -> bytes:
    """Return a JPEG image of random noise, made in a container of the image."""
    return run("docker", "run", "--rm", "--network=none", IMAGE, "python", "-c", MAKE_IMAGE)


@dataclass(frozen=True)
class Api:
    """The service, or the proxy in front of it, at an address."""

    url: str

    def request(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        """Send a request and return the JSON response.

        Raises:
            OSError: no response, or a response with status 400 or above.
            ValueError: the response is not JSON.
        """
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind}, method=method)
        with urllib.request.urlopen(request, timeout=REQUEST_LIMIT_S) as answer:
            return json.load(answer)

    def get(self, path: str) -> Any:
        return self.request("GET", path)

    def embed(self, image: bytes) -> Any:
        """Send the bytes of a JPEG image to /v1/embeddings and return the JSON response."""
        return self.request("POST", "/v1/embeddings", image, "image/jpeg")


def computed(answer: Any) -> bool:
    """Return true if the engine computed the vector of a response, or false if the vector came from the cache."""
    return "infer" in answer["timings"]


@dataclass(frozen=True)
class Project:
    """A Compose project with its own volumes. `ports` are those of this host on which it publishes the service and the
    proxy. `variables` are further variables for docker-compose.yml."""

    name: str
    port: int
    variables: dict[str, str] = field(default_factory=dict)
    profiles: tuple[str, ...] = ()

    @property
    def service(self) -> Api:
        return Api(f"http://127.0.0.1:{self.port}")

    @property
    def proxy(self) -> Api:
        return Api(f"http://127.0.0.1:{self.port + 1}")

    def compose(self, *arguments: str) -> bytes:
        """Run a command of Docker Compose in this project and return its output."""
        files = os.environ.get("COMPOSE_FILE", "docker-compose.yml")
        env = {
            "DINOV2_PUBLISH": f"127.0.0.1:{self.port}",
            "PROXY_PUBLISH": f"127.0.0.1:{self.port + 1}",
            "PROMETHEUS_PUBLISH": f"127.0.0.1:{self.port + 2}",
            "GRAFANA_PUBLISH": f"127.0.0.1:{self.port + 3}",
            "COMPOSE_FILE": f"{files}{os.pathsep}deploy/compose.smoke.yml",
            "COMPOSE_PROFILES": ",".join(self.profiles),
            **self.variables,
        }
        return run("docker", "compose", "-p", self.name, *arguments, env=env)

    def up(self, *services: str) -> float:
        """Start services, by default all of the profiles, wait until they are healthy, and return the seconds."""
        started = time.monotonic()
        self.compose("up", "-d", "--no-build", "--wait", *services)
        return time.monotonic() - started

    def inside(self, service: str, *command: str) -> str:
        """Run a command in the container of a Compose service and return its output."""
        return self.compose("exec", "-T", service, *command).decode().strip()

    def container(self, service: str) -> str:
        """Return the id of the container of a Compose service."""
        return self.compose("ps", "-a", "-q", service).decode().split()[0]

    def inspect(self, service: str, template: str) -> str:
        """Return what `docker inspect` says about the container of a Compose service."""
        return run("docker", "inspect", "-f", template, self.container(service)).decode().strip()

    def kill(self, service: str) -> None:
        """End the process of a container with SIGKILL. Docker then restarts the container as its restart policy says,
        which it would not do after `docker kill`. If this host may not send the signal, start the container again."""
        try:
            os.kill(int(self.inspect(service, "{{.State.Pid}}")), signal.SIGKILL)
        except (PermissionError, ProcessLookupError):
            self.compose("kill", "-s", "KILL", service)
            self.compose("start", service)

    def remove(self) -> None:
        """Remove the containers, networks and volumes of this project."""
        self.compose("--profile", "*", "down", "-v", "--timeout", "10")


def wait_until(what: str, holds: Callable[[], bool], limit_s: float = 60) -> float:
    """Wait until `holds` returns true, and return the seconds that this took. An OSError counts as false.

    Raises:
        SystemExit: the time limit is exceeded.
    """
    started = time.monotonic()
    while True:
        try:
            if holds():
                return time.monotonic() - started
        except OSError:
            pass
        if time.monotonic() - started > limit_s:
            raise SystemExit(f"after {limit_s:.0f} s, it still does not hold: {what}")
        time.sleep(0.1)


@dataclass(frozen=True)
class Sent:
    """A request of `Load`: when it began and ended (`time.monotonic`), its kind, and an error message or ""."""

    began: float
    ended: float
    kind: str
    fault: str


@dataclass
class Load:
    """Requests that threads send until the context of `sending` ends. `wrong` describes each wrong response."""

    sent: list[Sent] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @contextmanager
    def sending(self, kinds: dict[str, Callable[[], str | None]], pause_s: float) -> Iterator["Load"]:
        """Send requests of each kind in a thread of its own, with pauses of `pause_s` seconds.

        Args:
            kinds: for each kind, a function that sends a request. It returns a description of what is wrong with the
                response, or "", or None if there was nothing to send. It raises OSError or ValueError if there is no
                valid response.
            pause_s: seconds between the end of a request and the next one.
        """
        stop = threading.Event()

        def loop(kind: str, send: Callable[[], str | None]) -> None:
            while not stop.wait(pause_s):
                began, fault = time.monotonic(), ""
                try:
                    problem = send()
                    if problem is None:
                        continue
                    if problem:
                        self.wrong.append(f"{kind}: {problem}")
                except (OSError, ValueError) as error:
                    fault = repr(error)
                self.sent.append(Sent(began, time.monotonic(), kind, fault))

        threads = [threading.Thread(target=loop, args=pair) for pair in kinds.items()]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def failures(self) -> list[Sent]:
        return [sent for sent in self.sent if sent.fault]

    def slowest_ms(self) -> float:
        return 1e3 * max(sent.ended - sent.began for sent in self.sent)
