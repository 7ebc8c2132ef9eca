"""Tests of the answers before the model is loaded, and of a start that downloads a published model."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from model.config import CONFIGS
from model.convert import backbone_shapes
from service.settings import Settings
from service.starting import Starting
from tests.fakes import photo
from tests.model.torch_files import torch_file
from tests.model.weights_server import Server as WeightsServer
from tests.model.weights_server import weights_server
from tests.service.test_server import ROOT, Server

NAME = "dinov2_vits14_reg"
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from service.__main__ import main; sys.exit(main())"


@pytest.fixture
def client() -> tuple[Starting, httpx.AsyncClient]:
    starting = Starting(Settings())
    return starting, httpx.AsyncClient(transport=httpx.ASGITransport(starting), base_url="http://x")


async def test_the_step_is_shown_and_nothing_else_is_answered(client: tuple[Starting, httpx.AsyncClient]) -> None:
    starting, http = client
    starting.report("downloading x: 3 of 5 MB")
    live, ready = await http.get("/livez"), await http.get("/readyz")
    assert (live.status_code, live.json()) == (200, {"status": "alive"})
    assert ready.status_code == 503
    assert ready.json() == {"status": "unready", "reasons": {"start": "downloading x: 3 of 5 MB"}}
    other = await http.get("/v1/models", headers={"X-Request-ID": "mine"})
    assert other.status_code == 503
    assert other.headers["content-type"] == "application/problem+json"
    assert other.headers["retry-after"] == "5"
    assert other.headers["x-request-id"] == "mine"
    assert other.json()["code"] == "unavailable"
    assert other.json()["detail"] == "the service is starting: downloading x: 3 of 5 MB"
    openai = await http.post("/v1/embeddings", json={"input": "x"})
    assert openai.status_code == 503
    assert openai.json()["error"]["code"] == "unavailable"
    assert openai.headers["connection"] == "close"
    assert openai.headers["x-request-id"]
    slash = await http.get("/readyz/")
    assert slash.json() == ready.json()
    head = await http.head("/readyz")
    assert (head.status_code, head.content) == (503, b"")


async def test_requests_are_passed_on_once_the_application_is_ready(
    client: tuple[Starting, httpx.AsyncClient],
) -> None:
    async def application(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    starting, http = client
    starting.app = application
    assert (await http.get("/readyz")).status_code == 204


@pytest.fixture(scope="module")
def published() -> Iterator[WeightsServer]:
    """A server of random weights for a real ViT-S with registers."""
    rng = np.random.default_rng(0)
    shapes = backbone_shapes(CONFIGS[NAME])
    with weights_server(
        torch_file({name: 0.05 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()})
    ) as running:
        yield running


def test_a_published_model_is_served_without_torch_over_a_bad_line(published: WeightsServer, tmp_path: Path) -> None:
    published.sent_per_connection = [30_000_000, 20_000_000]
    published.wrong_answers = 1
    published.pause_s = 0.005
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"DINOV2_MODEL": NAME, "DINOV2_META_URL": published.url, "DINOV2_PORT": str(port)}
    watcher = Watcher(port)
    server = Server(tmp_path / "data", code=WITHOUT_TORCH, **settings)
    try:
        assert any(step.startswith(f"downloading {NAME}: ") for step in watcher.stop())
        log = server.log.read_text()
        assert "downloading it again from the start" in log
        assert "model.onnx agrees with numpy float64: the largest error is " in log
        body = {"model": NAME, "input": [f"data:image/png;base64,{photo_base64()}"]}
        answer = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60).json()
        assert len(answer["data"][0]["embedding"]) == 384
    finally:
        assert server.stop() == 0


def photo_base64() -> str:
    import base64

    return base64.b64encode(photo()).decode()


class Watcher:
    """A process that asks /readyz again and again and collects the steps that it shows."""

    CODE = """
import json, sys, time, urllib.error, urllib.request
seen = []
while True:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/readyz", timeout=5)
        break
    except urllib.error.HTTPError as error:
        step = json.load(error)["reasons"]["start"]
        if not seen or seen[-1] != step:
            seen.append(step)
    except OSError:
        pass
    time.sleep(0.05)
print(json.dumps(seen))
"""

    def __init__(self, port: int) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", self.CODE, str(port)], stdout=subprocess.PIPE)

    def stop(self) -> list[str]:
        out, _ = self.process.communicate(timeout=30)
        steps: list[str] = json.loads(out)
        return steps


def test_sigterm_ends_a_start_at_once(published: WeightsServer, tmp_path: Path) -> None:
    published.sent_per_connection, published.wrong_answers, published.pause_s = [], 0, 0.5
    environment = {
        "PATH": "/usr/bin:/bin",
        "DINOV2_DATA_DIR": str(tmp_path),
        "DINOV2_MODEL": NAME,
        "DINOV2_META_URL": published.url,
        "DINOV2_PORT": "0",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "service"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    part = tmp_path / "downloads" / "dinov2_vits14_reg4_pretrain.pth.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert time.monotonic() - started < 5
    assert part.stat().st_size > 0  # the next start resumes
    assert out == b""


def test_a_busy_port_is_reported_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment = {"PATH": "/usr/bin:/bin", "DINOV2_DATA_DIR": str(tmp_path), "DINOV2_PORT": str(port)}
        done = subprocess.run(
            [sys.executable, "-m", "service"],
            cwd=ROOT,
            env=environment | {"DINOV2_MODEL": "dinov2_vitb14"},  # loading would try to download it
            capture_output=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert f"error: cannot listen on 127.0.0.1:{port}: " in done.stderr.decode()
    assert "download" not in done.stderr.decode()
