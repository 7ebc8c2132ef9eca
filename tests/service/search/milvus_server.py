"""A Milvus Lite server in a separate process. The tests of the Milvus store use it, kill it and restart it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


class MilvusServer:
    """A Milvus Lite server that listens for gRPC on its own port. Its data is in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]

    @property
    def url(self) -> str:
        return f"milvus://127.0.0.1:{self.port}"

    @property
    def process_id(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *, timeout_s: float = 60) -> None:
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "milvus_lite", "server", "--data-dir", str(self._folder / "data"), *address],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"no Milvus Lite: {(self._folder / 'server.log').read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop the process with SIGSTOP, and wait until all its threads have stopped. It then answers nothing more."""
        os.kill(self.process_id, signal.SIGSTOP)
        os.waitpid(self.process_id, os.WUNTRACED)

    def kill(self) -> None:
        """Kill the process immediately, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def running_server() -> Iterator[MilvusServer]:
    """Start a server that a test may kill and restart, for the duration of a `with` block."""
    with tempfile.TemporaryDirectory(prefix="milvus-") as folder:
        server = MilvusServer(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.kill()


@contextlib.contextmanager
def milvus_server() -> Iterator[str]:
    """Start a server for the duration of a `with` block, and yield its URL in the format of `Settings.vector_store`."""
    with running_server() as server:
        yield server.url
