"""Tests of the packages that the cheap commands do not import, because importing them takes most of their time."""

import subprocess
import sys
from pathlib import Path

import pytest

import cli

MODEL_PACKAGES = {"onnx", "onnxruntime", "ml_dtypes", "google.protobuf", "openvino", "tensorrt", "torch"}
SERVER_PACKAGES = {"fastapi", "starlette", "uvicorn", "redis", "prometheus_client", "opentelemetry"}
FILE_PACKAGES = {"fsspec", "pyarrow"}
IMAGE_PACKAGES = {"pi_heif", "model.decode"}
DOWNLOAD_PACKAGES = {"httpx", "rich"}
NEVER = MODEL_PACKAGES | SERVER_PACKAGES | FILE_PACKAGES | IMAGE_PACKAGES | DOWNLOAD_PACKAGES
STORE = {"faiss", "pydantic_settings", "asyncio", "service.search.store"}
ARRAY_PACKAGES = {"numpy", "PIL", "safetensors"}

SCRIPT = """
import sys
names = set(sys.argv.pop(1).split(","))
import cli
try:
    cli.main()
except SystemExit as ended:
    status = ended.code or 0
sys.stderr.write(f"status {status}, imported {sorted(names & set(sys.modules))}")
"""


def imported(names: set[str], *command: str) -> str:
    """Run a command in its own process, and return its status and which of these modules it imported."""
    root = Path(cli.__file__).parents[1]
    run = [sys.executable, "-c", SCRIPT, ",".join(names), *command]
    return subprocess.run(run, capture_output=True, text=True, cwd=root, timeout=120).stderr


@pytest.mark.parametrize("command", [["--help"], ["collections", "--help"], ["models", "--help"]])
def test_help_imports_no_heavy_package(command: list[str]) -> None:
    light = NEVER | STORE | ARRAY_PACKAGES | {"sqlite3"}
    assert imported(light, *command) == "status 0, imported []"


def test_models_reads_only_manifests(tmp_path: Path) -> None:
    light = NEVER | STORE | ARRAY_PACKAGES
    assert imported(light, "models", "--data-dir", str(tmp_path)) == "status 0, imported []"


def test_collections_are_created_and_listed_without_a_model(tmp_path: Path) -> None:
    light = NEVER | {"PIL", "safetensors", "numpy.ma"}
    data = ["--data-dir", str(tmp_path)]
    assert imported(light, "collections", "create", "shop", "--originals", *data) == "status 0, imported []"
    assert imported(light, "collections", "list", *data) == "status 0, imported []"
