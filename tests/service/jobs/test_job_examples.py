"""Tests that the examples of the documentation of jobs run against a real service. A thread plays the worker."""

import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.jobs.store import JobStore
from tests.service.test_server import ROOT, Server

[PAGE] = [
    text for path in sorted((ROOT / "docs").rglob("*.md")) if "/v1/jobs/$job/events" in (text := path.read_text())
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path / "data", DINOV2_LOCAL_WORKER="false")
    store, ended = JobStore(tmp_path / "data"), threading.Event()

    def work() -> None:
        while not ended.wait(0.05):
            job = store.claim("worker", ["train"], 60)
            if job is not None:
                time.sleep(0.5)
                store.report(job.lease, 0.5, "half")
                store.succeed(job.lease)

    worker = threading.Thread(target=work)
    worker.start()
    yield started
    ended.set()
    worker.join()
    assert started.stop() == 0


def run(language: str, server: Server, tmp_path: Path, *command: str) -> str:
    """Run the example in a language, and return what it prints."""
    [example] = [text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if "/v1/jobs" in text]
    path = tmp_path / ("example.mjs" if language == "js" else "example")
    path.write_text(example.replace("http://127.0.0.1:8000", server.url))
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server: Server, tmp_path: Path) -> None:
    said = run("sh", server, tmp_path, "bash", "-e")
    assert said.count('"kind":"state"') == 3
    assert '"state":"succeeded"' in said.strip().splitlines()[-1]


def test_httpx(server: Server, tmp_path: Path) -> None:
    said = run("python", server, tmp_path, sys.executable).splitlines()
    assert [line.partition(" ")[0] for line in said] == ["state", "state", "progress", "state"]
    assert "'state': 'succeeded'" in said[-1]


def has_event_source() -> bool:
    if shutil.which("node") is None:
        return False
    script = ["node", "--experimental-eventsource", "-e", "new EventSource('http://127.0.0.1:9').close()"]
    return subprocess.run(script, capture_output=True).returncode == 0


@pytest.mark.skipif(not has_event_source(), reason="needs a Node.js with --experimental-eventsource")
def test_javascript(server: Server, tmp_path: Path) -> None:
    said = run("js", server, tmp_path, "node", "--experimental-eventsource").splitlines()
    assert [line.partition(" ")[0] for line in said] == ["state", "state", "progress", "state"]
