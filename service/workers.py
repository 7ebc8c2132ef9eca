"""Serve with several processes (`dinov2 serve --workers N`): a parent starts the workers, and restarts those that die.

Each worker is a whole service with its own model, and all of them use one data folder, as replicas do. They listen on
the same port with SO_REUSEPORT, so the kernel distributes new connections among them. docs/decisions/0053-workers.md
has the reasons. The parent answers no requests. It has the only local worker of jobs.

The first worker starts alone, so that a model is downloaded and exported once and an error is printed once. Until it
has loaded the model, it answers /livez and /readyz. The other workers start when it is ready, and /readyz fails until
all of them are. A worker that replaces a dead one only listens when it is ready, so that no client meets it before.
"""

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, Final

from model.cpus import available_cpus
from service.settings import Settings
from service.siblings import Place, bury

log = logging.getLogger("service")

FIRST_DELAY_S: Final = 0.5
LONGEST_DELAY_S: Final = 30.0
"""A worker that dies is started again after FIRST_DELAY_S. The delay doubles up to LONGEST_DELAY_S each time it dies
again."""
STEADY_S: Final = 60.0
"""A worker that has run for this time in seconds is started again after FIRST_DELAY_S."""
STOP_SLACK_S: Final = 15.0
"""The time in seconds after the grace period in which a worker may close its application, before it is killed."""
_LOOK_S: Final = 0.2
_CONTEXT: Final = multiprocessing.get_context("spawn")

Run = Callable[[Place], None]
"""Serve as the worker with this place, and end the process. It must be possible to pickle it."""


def settings_of_worker(settings: Settings, place: Place) -> Settings:
    """Return the settings of a worker: it has its share of the threads that are set to the number of CPUs, and no local
    worker."""
    share = max(1, available_cpus() // place.count)
    changes: dict[str, Any] = {"port": place.port, "local_worker": False, "threads": settings.threads or share}
    if "decode_workers" not in settings.model_fields_set:
        changes["decode_workers"] = share
    return settings.model_copy(update=changes)


def bound_sockets(host: str, port: int, *, shared: bool = True) -> list[socket.socket]:
    """Return a socket for each address of a host. None of the sockets listens. If they are `shared`, other processes of
    this service can bind the same port.

    Raises:
        OSError: an address cannot be used.
    """
    sockets: list[socket.socket] = []
    with contextlib.ExitStack() as undo:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(addresses):
            sock = undo.enter_context(socket.socket(family, kind, protocol))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], port, *address[2:]))
            port = sock.getsockname()[1]  # if any free port was asked for, the same one for all addresses
            sockets.append(sock)
        undo.pop_all()
    return sockets


@contextlib.contextmanager
def reserved_port(host: str, port: int) -> Iterator[int]:
    """Yield the port, or a free one if it is 0, and keep it reserved.

    Raises:
        OSError: the port is in use, also by another service with several workers.
    """
    try:
        if port:  # SO_REUSEPORT alone would not notice that another service listens on the port
            for sock in bound_sockets(host, port, shared=False):
                sock.close()
        sockets = bound_sockets(host, port)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port}: {error}. Another port is set with DINOV2_PORT or --port"
        ) from error
    try:
        yield sockets[0].getsockname()[1]
    finally:
        for sock in sockets:
            sock.close()


class _Worker:
    """A worker and what is known about its starts."""

    def __init__(self, place: Place, run: Run) -> None:
        self.place = place
        self._run = run
        self._delay_s = FIRST_DELAY_S
        self._started_at = 0.0
        self._start_at = 0.0  # when to start it again
        self.process: BaseProcess | None = None

    def start(self) -> None:
        self.process = _CONTEXT.Process(target=_run_as_child, args=(self._run, self.place))
        self.process.start()
        self._started_at = time.monotonic()

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    @property
    def is_ready(self) -> bool:
        return self.place.path("ready").exists()

    def note_death(self) -> int:
        """Plan the next start of a worker that has ended, and return its exit status."""
        assert self.process is not None
        status, now = _status(self.process), time.monotonic()
        if now - self._started_at > STEADY_S:
            self._delay_s = FIRST_DELAY_S
        self._start_at = now + self._delay_s
        message = "worker %d has ended with status %d; it is started again in %g s"
        log.error(message, self.place.number, status, self._delay_s)
        self._delay_s = min(2 * self._delay_s, LONGEST_DELAY_S)
        bury(self.place)
        self.place = replace(self.place, is_restart=self.is_ready)
        self.process = None
        return status

    def start_if_due(self) -> None:
        if self.process is None and time.monotonic() >= self._start_at:
            self.start()

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.is_alive() and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


def supervise(settings: Settings, run: Run, on_exit: Callable[[], None] | None = None) -> int:
    """Run the workers until a signal, and return the exit status. `run` is called in each worker. `on_exit` is called
    at the first signal.

    Raises:
        OSError: the port cannot be used, or there is no folder for temporary files.
    """
    with reserved_port(settings.host, settings.port) as port, _private_folder() as folder:
        workers = [_Worker(Place(n, settings.workers, folder, port), run) for n in range(settings.workers)]
        return _Supervisor(workers, settings.shutdown_grace_s + STOP_SLACK_S, on_exit).run()


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="dinov2-"))  # only this user may open it
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Supervisor:
    """The parent of the workers."""

    def __init__(self, workers: list[_Worker], stop_s: float, on_exit: Callable[[], None] | None) -> None:
        self._workers = workers
        self._stop_s = stop_s
        self._on_exit = on_exit
        self._signals = 0
        self._greeted = False

    def run(self) -> int:
        """Start the workers, start those that end again, and return the exit status after a signal. If the first worker
        cannot start at all, return its exit status."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        first = self._workers[0]
        try:
            first.start()
            while not self._signals:
                self._wait()
                if not first.is_alive and not first.is_ready and first.process is not None:
                    return _status(first.process)  # it has printed the reason
                if first.is_ready:
                    self._tend()
            return 0
        finally:
            self._stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tend(self) -> None:
        """Start the workers that do not run, and print the startup message when all have started."""
        for worker in self._workers:
            if worker.process is not None and not worker.is_alive:
                worker.note_death()
            worker.start_if_due()
        if not self._greeted and all(worker.is_ready for worker in self._workers):
            self._greeted = True
            print(self._workers[0].place.path("ready").read_text(), flush=True)

    def _wait(self) -> None:
        """Wait for a short time, or until a worker ends."""
        running = [worker.process.sentinel for worker in self._workers if worker.process is not None]
        multiprocessing.connection.wait(running, _LOOK_S)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        if self._on_exit is not None:
            self._on_exit()

    def _stop(self) -> None:
        """Ask all workers to stop, and wait for them. Pass further signals on. Kill the workers that take too long."""
        sent, deadline = 0, time.monotonic() + self._stop_s
        self._signals = max(1, self._signals)
        while any(worker.is_alive for worker in self._workers):
            if sent < self._signals:
                sent += 1
                for worker in self._workers:
                    worker.signal(signal.SIGTERM)
            if time.monotonic() > deadline:
                log.error("a worker did not stop in %g s", self._stop_s)
                for worker in self._workers:
                    worker.signal(signal.SIGKILL)
            time.sleep(0.02)


def _run_as_child(run: Run, place: Place) -> None:
    """Serve as a worker. The worker ends when its parent has ended, and does not get the terminal's Ctrl+C, which the
    parent passes on."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    run(place)


def _status(process: BaseProcess) -> int:
    """Return the exit status of a process that has ended, as a shell shows it."""
    code = process.exitcode or 0
    return code if code >= 0 else 128 - code
