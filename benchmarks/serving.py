"""Start the service in a separate process and write artifacts with random weights, for several benchmarks."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch

from model.artifact import Artifact
from model.config import ViTConfig
from model.export.artifact import export_artifact
from model.export.options import Backbone, ExportOptions
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer


@contextmanager
def service_process(artifact: Path, data_dir: Path, port: int, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start the service, yield its process when it is ready, and end it with SIGTERM.

    `settings` are DINOV2_* variables without the prefix, in lower case.
    """
    environment = os.environ | {
        "DINOV2_MODEL": str(artifact),
        "DINOV2_PORT": str(port),
        "DINOV2_DATA_DIR": str(data_dir),
        "DINOV2_LOG_LEVEL": "warning",
        **{f"DINOV2_{name.upper()}": value for name, value in settings.items()},
    }
    process = subprocess.Popen([sys.executable, "-m", "service"], env=environment, stdout=subprocess.DEVNULL)
    try:
        _wait_until_ready(process, port)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@contextmanager
def running_service(artifact: Path, data_dir: Path, **settings: str) -> Iterator[str]:
    """Start a service with `artifact` on a free port, and yield its base URL."""
    port = free_port()
    with service_process(artifact, data_dir, port, **settings):
        yield f"http://127.0.0.1:{port}"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    process.kill()
    raise SystemExit("the service did not become ready; see its log above")


def random_artifact(config: ViTConfig, preprocess: PreprocessSpec, out: Path, *, name: str, seed: int = 0) -> Artifact:
    """Write an artifact with random weights and return it. It is as fast as an artifact with trained weights."""
    torch.manual_seed(seed)
    weights = {key: value.numpy() for key, value in DinoVisionTransformer(config).state_dict().items()}
    backbone = Backbone(name, weights, config, preprocess, {"seed": seed}, "Apache-2.0")
    return export_artifact(backbone, out, ExportOptions())
