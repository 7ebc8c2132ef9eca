"""Tests that the examples of docs/clients.md run against a real service, each in its own language."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import photo
from tests.service.test_server import ROOT, Server

PAGE = (ROOT / "docs" / "clients.md").read_text()
NODE_MODULES = os.environ.get("CLIENTS_NODE_MODULES", "")
"""A folder in which `npm install openai` has put its package."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("clients") / "data")
    yield started
    assert started.stop() == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photo.jpg").write_bytes(photo(1, size=(320, 240), kind="JPEG"))
    return tmp_path


def example(language: str, number: int, server: Server) -> str:
    """Return an example of the page, with the address of the test's server."""
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert "127.0.0.1:8000" in blocks[number]
    return blocks[number].replace("http://127.0.0.1:8000", server.url)


def output(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server: Server, folder: Path) -> None:
    script = example("sh", 0, server).replace("curl -s", "curl -s --fail-with-body -w '\\n'")
    embedded, added, found = output(["bash", "-e", "-c", script], folder).strip().splitlines()
    assert '"embedding"' in embedded
    assert '"id"' in added
    assert '"score"' in found


def test_the_openai_client_for_python(server: Server, folder: Path) -> None:
    (folder / "client.py").write_text(example("python", 0, server))
    assert output([sys.executable, "client.py"], folder) == "192 numbers\n"


def test_httpx(server: Server, folder: Path) -> None:
    (folder / "client.py").write_text(example("python", 1, server))
    assert "'score': 1.0" in output([sys.executable, "client.py"], folder)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js 18 or newer: apt install nodejs")
def test_javascript(server: Server, folder: Path) -> None:
    (folder / "client.mjs").write_text(example("js", 0, server))
    assert "score: 1" in output(["node", "client.mjs"], folder)


@pytest.mark.skipif(
    shutil.which("node") is None or not NODE_MODULES,
    reason="needs Node.js, and CLIENTS_NODE_MODULES=FOLDER/node_modules after `npm install --prefix FOLDER openai`",
)
def test_the_openai_client_for_node(server: Server, folder: Path) -> None:
    (folder / "node_modules").symlink_to(Path(NODE_MODULES).resolve())
    (folder / "client.mjs").write_text(example("js", 1, server))
    assert output(["node", "client.mjs"], folder) == "192 numbers\n"


@pytest.mark.skipif(shutil.which("java") is None, reason="needs a JDK 17 or newer: apt install openjdk-17-jdk-headless")
def test_java(server: Server, folder: Path) -> None:
    (folder / "Client.java").write_text(example("java", 0, server))
    embedded, added, found = output(["java", "Client.java"], folder).strip().splitlines()
    assert '"embedding"' in embedded
    assert '"id"' in added
    assert '"score"' in found


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go: apt install golang-go")
def test_go(server: Server, folder: Path) -> None:
    (folder / "client.go").write_text(example("go", 0, server))
    embedded, added, found = output(["go", "run", "client.go"], folder).strip().splitlines()
    assert '"embedding"' in embedded
    assert '"id"' in added
    assert '"score"' in found
