"""Start the service: load the model, then answer requests until SIGTERM. Both `python -m service` and `dinov2 serve`
run this module.

The service checks the settings and opens the port, and then it loads the model and opens the stored data. Meanwhile,
/readyz answers 503 with the current step (see service/starting.py). If the service cannot start, for instance because
the port is in use, the error is printed in one line and the exit status is 2.

On SIGTERM, the service shuts down. It answers new requests to /v1/ with status 503, and /readyz fails. The service
stops listening when the running requests are answered, or after `shutdown_grace_s` seconds. A second signal ends the
process at once. The process does not wait for its threads when it exits, because a thread that hangs in a decoder would
block the exit forever.
"""

import asyncio
import base64
import contextlib
import gc
import io
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Final, NoReturn

import uvicorn
from PIL import Image

from model.artifact import BUNDLED_DIR, Artifact
from model.engines.protocol import Engine
from model.memory import return_large_blocks
from service.app import App, create_app
from service.artifact_choice import Report
from service.blas import use_one_blas_thread
from service.connections import Connections
from service.descriptors import check_descriptors
from service.errors import ServiceError
from service.first_model import load_first
from service.http_protocol import BoundedHttpProtocol
from service.jobs.local import start_local_worker, stop_local_worker
from service.security import check_reachable
from service.settings import Settings, load_settings
from service.siblings import Place, Siblings
from service.starting import Starting
from service.state import Lifecycle
from service.telemetry import Metrics, configure_logging
from service.workers import bound_sockets, settings_of_worker, supervise

log = logging.getLogger("service")

START_FAILED: Final = 2
CLOSE_LIMIT_S: Final = 10.0
"""The time limit in seconds for closing the cache and the vector store after the grace period. With the default
settings, Docker Compose kills the container 15 s after the grace period."""
SAME_STOP_S: Final = 1.0
"""A worker ignores a second signal within this time in seconds after the first one: systemd sends SIGTERM to all
processes of a service, and the parent of the workers passes its own on."""


def main(overrides: Mapping[str, Any] | None = None) -> int:
    """Run the service until it stops, then end the process. Only the entry points call this function. `overrides` has
    settings from the command line.

    The function returns only if the service cannot start. It then returns the exit status 2.
    """
    status = serve(overrides)
    if status != START_FAILED:
        _end(status)
    return status


def _end(status: int) -> NoReturn:
    """End the process without waiting for its threads."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the stream is closed, or its reader is gone
            stream.flush()
    os._exit(status)


def run_worker(place: Place, overrides: Mapping[str, Any] | None = None) -> None:
    """Run one of several workers of a service until it stops, then end the process."""
    _end(serve(overrides, place))


def serve(overrides: Mapping[str, Any] | None = None, place: Place | None = None) -> int:
    """Run the service until it receives a signal, and return the exit status. `overrides` has settings from the command
    line, which take precedence over the environment. If the service cannot start, print the error and return 2.

    If the settings ask for several workers, they answer the requests, and this process starts them. `place` says which
    of these workers this process is.
    """
    try:
        settings = load_settings(overrides)
        configure_logging(settings.log_level, settings.audit_log)
        check_reachable(settings)
        check_descriptors(settings.max_connections)
        if place is not None:
            sockets = bound_sockets(settings.host, place.port)
            make_server(settings_of_worker(settings, place), place=place).run(sockets)
            return 0
        worker = start_local_worker(settings)
        on_exit = worker.ask_to_stop if worker else None
        try:
            if settings.workers > 1:
                return supervise(settings, partial(run_worker, overrides=overrides), on_exit)
            make_server(settings, on_exit=on_exit).run()
        finally:
            stop_local_worker(worker)
    except KeyboardInterrupt:  # the second Ctrl+C
        return 128 + signal.SIGINT
    except (ServiceError, ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {_line(error)}", file=sys.stderr)
        return START_FAILED
    return 0


def _line(error: Exception) -> str:
    """Return the message of an error as one line, truncated after 600 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 600 else f"{text[:600]}..."


@dataclass(frozen=True)
class Loaded:
    """The application, with the model and the engine that it serves."""

    app: App
    artifact: Artifact
    engine: Engine


def load(settings: Settings, report: Report, *, siblings: Siblings | None = None) -> Loaded:
    """Load the model and build the application. A published model is first downloaded and exported if needed.

    `report` is called with the current step. `siblings` are the other workers of the service, if there are any.

    Raises:
        ValueError, OSError: the model cannot be found, verified or loaded. The message names the file and the reason.
        ModuleNotFoundError: the requested runtime is not installed.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    opened, record = load_first(settings, report)
    return_large_blocks()
    use_one_blas_thread()  # after the export, which may use numpy for the whole network
    report("opening the collections")
    app = create_app(settings, opened.artifact, opened.engine, tried=opened.tried, record=record, siblings=siblings)
    return Loaded(app, opened.artifact, opened.engine)


def make_server(
    settings: Settings, on_exit: Callable[[], None] | None = None, place: Place | None = None
) -> "DrainingServer":
    """Return a server that listens, loads the model, and then answers requests with it. `on_exit` is called when it
    begins to shut down. `place` says which of several workers of a service the server is."""

    connections = Connections(
        settings.max_connections, settings.client_share, are_of_proxies=settings.trusted_proxies > 0
    )

    class HttpProtocol(BoundedHttpProtocol):
        header_timeout_s = settings.header_timeout_s
        answer_stall_s = settings.answer_stall_s
        min_bytes_per_s = settings.min_bytes_per_s
        places = connections

    starting, siblings = Starting(settings), None if place is None else Siblings(place)
    config = uvicorn.Config(
        starting,
        http=HttpProtocol,
        ws="none",
        proxy_headers=False,  # uvicorn would believe the X-Forwarded-For of every local client
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        lifespan="off",  # DrainingServer runs it; uvicorn would log a traceback and exit with 3
        server_header=False,
        timeout_graceful_shutdown=1,  # on_tick has already waited for running requests
        timeout_keep_alive=30,
    )
    return DrainingServer(
        config,
        starting,
        partial(load, settings, siblings=siblings),
        connections,
        grace_s=settings.shutdown_grace_s,
        root_path=settings.root_path,
        on_exit=on_exit,
        siblings=siblings,
    )


class _Unjoined(ThreadPoolExecutor):
    """A thread pool for the event loop. Its `shutdown` does not wait for running threads."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)


class DrainingServer(uvicorn.Server):
    """A uvicorn server with a graceful shutdown. After a signal, it refuses new requests, finishes the running
    requests, and then stops listening.

    The server itself starts and closes the application. So `run` raises an error that occurs at startup.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        starting: Starting,
        load: Callable[[Report], Loaded],
        connections: Connections,
        *,
        grace_s: float,
        root_path: str = "",
        on_exit: Callable[[], None] | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        super().__init__(config)
        self._root_path = root_path
        self._starting = starting
        self._load = load
        self._connections = connections
        self._grace_s = grace_s
        self._on_exit = on_exit
        self._siblings = siblings
        self._lifecycle: Lifecycle | None = None  # None until the application is ready
        self._running = AsyncExitStack()
        self._drain_until: float | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Open the port, load the model in a thread, start the application, and print the startup message. A signal
        ends the startup. A worker that replaces another one opens the port last, so that it gets no request before.

        Raises:
            ServiceError, ValueError, OSError, ModuleNotFoundError: the service cannot start.
        """
        loop = asyncio.get_running_loop()
        loop.set_default_executor(_Unjoined(thread_name_prefix="io"))
        listens_late = self._siblings is not None and self._siblings.place.is_restart
        if not listens_late:
            await self._listen(sockets)
        try:
            loading = loop.run_in_executor(None, self._load, self._starting.report)
            while not (loading.done() or self.should_exit):
                await asyncio.wait([loading], timeout=0.1)
            if self.should_exit:  # the loading thread ends with the process
                return
            loaded = loading.result()
            await self._running.enter_async_context(loaded.app.router.lifespan_context(loaded.app))
        except BaseException:
            for server in getattr(self, "servers", ()):  # uvicorn has not set it if nothing listens
                server.close()
            raise
        self._lifecycle = loaded.app.state.lifecycle
        metrics: Metrics = loaded.app.state.service.metrics
        metrics.connections.set_function(lambda: self._connections.open)
        self._connections.on_refused = metrics.refused_connections.inc
        self._starting.app = loaded.app
        gc.collect()
        gc.freeze()  # otherwise garbage collections would scan the objects made at startup and delay requests
        if listens_late:
            await self._listen(sockets)
        needs_key = loaded.app.state.security.requires_keys
        text = greeting(loaded.artifact, loaded.engine, self._url() + self._root_path, needs_key=needs_key)
        if self._siblings is None:
            print(text, flush=True)
        else:
            self._siblings.mark_ready(text)

    async def _listen(self, sockets: Any) -> None:
        """Open the port, or listen on sockets that are bound to it.

        Raises:
            OSError: the port cannot be used.
        """
        try:
            await super().startup(sockets)
        except SystemExit as stop:  # uvicorn cannot listen; the cause is in the context
            where = f"{self.config.host}:{self.config.port}"
            raise OSError(
                f"cannot listen on {where}: {stop.__context__}. Another port is set with DINOV2_PORT or --port"
            ) from stop

    async def shutdown(self, sockets: Any = None) -> None:
        """Stop listening, cancel the requests that are still running, and close the application. After a second signal,
        the application is not closed."""
        await super().shutdown(sockets)
        if not self.force_exit:
            await self._close()

    async def _close(self) -> None:
        """Close the application. Log an error if closing fails or takes longer than CLOSE_LIMIT_S. Even then no data is
        lost, because every write reaches the disk before its request is answered."""
        closing = asyncio.create_task(self._running.aclose())
        await asyncio.wait([closing], timeout=CLOSE_LIMIT_S)
        if not closing.done():
            log.error("closing the application took longer than %g s", CLOSE_LIMIT_S)
        elif error := closing.exception():
            log.error("closing the application failed", exc_info=error)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._on_exit is not None:
            self._on_exit()
        if self._lifecycle is None:  # still starting, so no request is running
            self.should_exit = True
            return
        if self._drain_until is not None:
            is_same_stop = time.monotonic() < self._drain_until - self._grace_s + SAME_STOP_S
            if self._siblings is not None and is_same_stop:
                return
            self.force_exit = True
            super().handle_exit(sig, frame)
            return
        self._lifecycle.draining = True
        self._drain_until = time.monotonic() + self._grace_s
        log.info("shutting down", extra={"fields": {"in_flight": self._lifecycle.in_flight}})

    async def on_tick(self, counter: int) -> bool:
        assert self._lifecycle is not None
        if self._drain_until is not None and (not self._lifecycle.in_flight or time.monotonic() > self._drain_until):
            return True
        return await super().on_tick(counter)

    def _url(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def greeting(artifact: Artifact, engine: Engine, url: str, *, needs_key: bool = False) -> str:
    """Return the startup message with the address, the model, and two example commands. The second command works
    without an image file. With the demo model, the message says how to serve published weights. If requests need an API
    key, the commands read it from the variable KEY."""
    png = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).save(png, "PNG")
    example = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode("ascii")
    key = '-H "Authorization: Bearer $KEY" ' if needs_key else ""
    demo = "the demo model; for DINOv2's published weights: make run MODEL=dinov2_vits14\n"
    return (
        f"\ndinov2-service on {url}  (open it in a browser; REST API: {url}/docs)\n"
        f"model {artifact.name} from {artifact.path}, "
        f"engine {engine.name} ({engine.precision})\n{demo if artifact.path.parent == BUNDLED_DIR else ''}\n"
        f"  curl -s {url}/v1/embeddings {key}-H 'Content-Type: image/jpeg' --data-binary @image.jpg\n\n"
        f"or, without an image file:\n\n"
        f"  curl -s {url}/v1/embeddings {key}-H 'Content-Type: application/json' -d '{{\"input\": \"{example}\"}}'\n"
    )


if __name__ == "__main__":
    from service.__main__ import main as main_by_name  # the workers import `run_worker` by the name of its module

    sys.exit(main_by_name())
