"""The worker that the service starts as its own child process, so that jobs run without further setup.

The process is started when the first job has been created. The worker ends with the service: `stop_local_worker` sends
SIGTERM, and if the service is killed, Linux does (see service/jobs/process.py). It then stops its job, which is put
back into the queue. A worker that ends by itself, for example because memory is short, is started again.
"""

import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

from service.jobs.process import launch_command
from service.jobs.store import JobStore
from service.settings import Settings

log = logging.getLogger(__name__)

RESTART_S: Final = 5.0
LOOK_S: Final = 1.0
CODE: Final = Path(__file__).parents[2]


class LocalWorker:
    """The local worker of a service, and the thread that watches it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stopping = threading.Event()
        self._started = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._watch, name="local-worker", daemon=True)

    @property
    def pid(self) -> int | None:
        """The id of the process, or None if it does not run."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def start(self) -> None:
        """Start the worker. The thread that starts the process lives as long as the service, because the process ends
        with this thread.

        Raises:
            OSError: the process cannot be started.
        """
        self._thread.start()
        if self._has_jobs():
            self._started.wait()

    def ask_to_stop(self) -> None:
        """Ask the worker to stop, without waiting for it. `stop` waits."""
        self._stopping.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def _has_jobs(self) -> bool:
        return JobStore.exists(self._settings.data_dir)

    def stop(self, timeout_s: float | None = None) -> None:
        """Stop the worker. Its job is put back into the queue. If it has not ended after `timeout_s` seconds (None: the
        time that a job may take to save its state, plus 5 seconds), kill it."""
        self._stopping.set()
        process = self._process
        if process is not None:
            process.terminate()
            try:
                process.wait(self._settings.job_stop_grace_s + 5 if timeout_s is None else timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._thread.join()

    def _watch(self) -> None:
        """Start the worker when there are jobs, and start it again when it ends."""
        while not self._has_jobs() and not self._stopping.wait(LOOK_S):
            pass
        while not self._stopping.is_set():
            try:
                self._process = process = self._start()
            except OSError as error:
                log.error("the local worker cannot be started: %s", error)
            else:
                self._started.set()
                status = process.wait()
                if not self._stopping.is_set():
                    log.error("the local worker has ended with status %d", status)
            self._started.set()
            self._stopping.wait(RESTART_S)

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "cli", "worker", f"--data-dir={self._settings.data_dir.absolute()}"]
        return subprocess.Popen(launch_command(command), cwd=CODE, stdin=subprocess.DEVNULL)  # noqa: S603 - our own command


def start_local_worker(settings: Settings) -> LocalWorker | None:
    """Start the worker of a service, and return it. Return None if the setting `local_worker` is off."""
    if not settings.local_worker:
        return None
    worker = LocalWorker(settings)
    worker.start()
    return worker


def stop_local_worker(worker: LocalWorker | None, timeout_s: float | None = None) -> None:
    """Stop the worker that `start_local_worker` has started."""
    if worker is not None:
        worker.stop(timeout_s)
