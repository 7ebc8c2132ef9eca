"""Tests of a service with several workers: real processes on the bundled model, and the times of restarts."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from model.cpus import available_cpus
from service import workers
from service.settings import Settings
from service.siblings import Place
from service.workers import bound_sockets, reserved_port, settings_of_worker
from tests.service.test_server import ROOT, Server


def until(condition: Callable[[], Any], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.1)


def workers_of(parent: int) -> set[int]:
    """Return the ids of the workers that a process has started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent_id = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent_id == parent and b"spawn_main" in (path / "cmdline").read_bytes():
                found.add(int(path.name))
        except (OSError, IndexError):  # it has ended
            continue
    return found


def is_running(pid: int) -> bool:
    """Return whether a process runs. One that has ended may stay listed until its parent asks for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def answering(url: str, requests: int = 40) -> set[str]:
    """Send requests over new connections. Return the workers that answered, by the part of the request id that names a
    process."""
    names = set()
    for _ in range(requests):
        answer = httpx.get(f"{url}/v1/models")
        assert answer.status_code == 200
        names.add(answer.headers["x-request-id"][:20])
    return names


def counted(url: str) -> float:
    metrics = httpx.get(f"{url}/metrics").text
    series = r'^dinov2_requests_total\{method="GET",route="/v1/models",status="200"\} (\S+)'
    return sum(float(value) for value in re.findall(series, metrics, re.M))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"DINOV2_WORKERS": "2", "DINOV2_LOCAL_WORKER": "false"}
    started = Server(tmp_path_factory.mktemp("workers") / "data", **settings)
    yield started
    started.stop()


def test_the_workers_of_a_service_share_its_port_and_its_data(server: Server) -> None:
    assert httpx.get(f"{server.url}/readyz").status_code == 200  # the startup message came when all were ready
    before = counted(server.url)
    assert len(answering(server.url)) == 2
    assert counted(server.url) == before + 40
    vector = [1.0, 2.0, 3.0]
    made = httpx.put(f"{server.url}/v1/collections/c", json={"fingerprint": "other", "dimension": 3})
    assert made.status_code in (200, 201), made.text
    item = {"id": "a", "vector": vector, "fingerprint": "other"}
    httpx.post(f"{server.url}/v1/collections/c/items", json={"items": [item]}).raise_for_status()
    question = {"vector": vector, "fingerprint": "other"}
    found = set()
    for _ in range(30):
        answer = httpx.post(f"{server.url}/v1/collections/c/search", json=question)
        assert [hit["id"] for hit in answer.json()["data"]] == ["a"], answer.text
        found.add(answer.headers["x-request-id"][:20])
    assert len(found) == 2
    metrics = httpx.get(f"{server.url}/metrics").text
    assert all(f'dinov2_engine_up{{worker="{number}"}} 1.0' in metrics for number in range(2))


def test_a_killed_worker_is_started_again_and_its_requests_stay_counted(server: Server) -> None:
    before, names = counted(server.url), answering(server.url)
    total = counted(server.url)
    assert total == before + 40
    killed = min(workers_of(server.process.pid))
    os.kill(killed, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{killed}").exists())  # until then, it may still hold its socket
    assert len(answering(server.url, 5)) == 1  # the other one serves, and /readyz stays green
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    assert counted(server.url) == total + 5
    until(lambda: len(workers_of(server.process.pid)) == 2)
    until(lambda: len(answering(server.url, 20)) == 2)
    assert len(answering(server.url) - names) == 1
    assert re.search(r"worker \d has ended with status 137; it is started again in 0.5 s", server.log.read_text())


def test_sigterm_ends_all_workers(tmp_path: Path) -> None:
    server = Server(tmp_path / "data", DINOV2_WORKERS="2", DINOV2_LOCAL_WORKER="false")
    running = workers_of(server.process.pid)
    assert len(running) == 2
    assert server.stop() == 0
    assert not any(map(is_running, running))
    assert "Traceback" not in server.log.read_text()


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    server = Server(tmp_path / "data", DINOV2_WORKERS="2", DINOV2_LOCAL_WORKER="false")
    running = workers_of(server.process.pid)
    server.process.kill()
    server.process.wait()
    server.close()
    until(lambda: not any(map(is_running, running)), 30)


def test_a_port_in_use_is_told_in_one_line(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DINOV2_")}
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:  # as another service has it
        port = taken.getsockname()[1]
        given = {"DINOV2_PORT": str(port), "DINOV2_DATA_DIR": str(tmp_path / "data"), "DINOV2_WORKERS": "2"}
        command = [sys.executable, "-m", "service"]
        ended = subprocess.run(command, cwd=ROOT, env=clean | given, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert f"error: cannot listen on 127.0.0.1:{port}: " in ended.stderr


def test_a_service_that_cannot_start_ends_with_the_error_of_its_first_worker(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DINOV2_")}
    given = {"DINOV2_PORT": "0", "DINOV2_DATA_DIR": str(tmp_path / "data"), "DINOV2_WORKERS": "2"}
    given |= {"DINOV2_MODEL": str(tmp_path / "no"), "DINOV2_LOCAL_WORKER": "false"}
    command = [sys.executable, "-m", "service"]
    ended = subprocess.run(command, cwd=ROOT, env=clean | given, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.count("error: ") == 1


# without processes


def test_workers_divide_the_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "available_cpus", lambda: 9)
    place = Place(1, 4, tmp_path, 8123)
    given = settings_of_worker(Settings(data_dir=tmp_path, workers=4, port=0), place)
    assert (given.threads, given.decode_workers, given.port, given.local_worker) == (2, 2, 8123, False)
    given = settings_of_worker(Settings(data_dir=tmp_path, workers=4, threads=3, decode_workers=5), place)
    assert (given.threads, given.decode_workers) == (3, 5)
    assert settings_of_worker(Settings(data_dir=tmp_path, workers=40), Place(0, 40, tmp_path, 1)).threads == 1
    assert Settings(data_dir=tmp_path).decode_workers == available_cpus()


def test_a_worker_that_keeps_dying_is_started_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    worker = workers._Worker(Place(0, 2, tmp_path, 1), lambda place: None)
    waits = []
    for lifetime in [1] * 8 + [workers.STEADY_S + 1, 1]:
        worker.process = SimpleNamespace(exitcode=-9)  # type: ignore[assignment]
        worker._started_at = now[0]
        now[0] += lifetime
        assert worker.note_death() == 137
        waits.append(worker._start_at - now[0])
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 0.5, 1]


def test_a_worker_listens_late_only_if_one_was_ready_before(tmp_path: Path) -> None:
    worker = workers._Worker(Place(0, 2, tmp_path, 1), lambda place: None)
    for expected in (False, True):
        worker.process = SimpleNamespace(exitcode=1)  # type: ignore[assignment]
        worker.note_death()
        assert worker.place.is_restart is expected
        worker.place.path("ready").write_text("hello")


def test_a_port_is_reserved_for_the_workers() -> None:
    with reserved_port("127.0.0.1", 0) as port:
        sockets = [bound_sockets("127.0.0.1", port)[0] for _ in range(2)]
        for sock in sockets:
            sock.listen()
        taken = pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: .* DINOV2_PORT")
        with taken, reserved_port("127.0.0.1", port):
            pass
        for sock in sockets:
            sock.close()
