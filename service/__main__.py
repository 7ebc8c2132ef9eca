"""`python -m service`, and what `dinov2 serve` calls: load the model, then serve until SIGTERM.

Everything that can be wrong with settings, model and stored data is found before the port is opened. Whatever keeps the
service from starting, a port in use among it, is told in one line, and the exit status is 2.

Shutdown: on SIGTERM the service stops taking work (new requests get 503, /readyz fails) but keeps listening until what
is in flight has been answered, at most `shutdown_grace_s`; then it closes. A second signal ends it at once. In the end
the process does not wait for its threads: Python would join one that is stuck in a decoder for ever.
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
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from types import FrameType
from typing import Any, Final

import uvicorn
from PIL import Image

from model.artifact import Artifact, load_artifact
from model.engines.choice import PHOTOS_AT_LOAD, choose_engine
from model.engines.protocol import Engine
from service.app import create_app
from service.artifact_choice import choose_artifact, read_photos
from service.errors import ServiceError
from service.http_protocol import BoundedHttpProtocol
from service.settings import Settings, load_settings
from service.state import Lifecycle
from service.telemetry import configure_logging

log = logging.getLogger("service")

START_FAILED: Final = 2
CLOSE_LIMIT_S: Final = 10.0
"""How long cache and store may take to close, after the grace; Compose kills 15 s after it."""


def main(overrides: Mapping[str, Any] | None = None) -> int:
    """The life of the process, for its entry points only: `serve`, then the end of the process.

    Returns the exit status when the service did not start.
    """
    status = serve(overrides)
    if status == START_FAILED:
        return status
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(status)


def serve(overrides: Mapping[str, Any] | None = None) -> int:
    """Serve until a signal. `overrides` are settings from the command line. The exit status that this means."""
    try:
        settings = load_settings(overrides)
        configure_logging(settings.log_level)
        make_server(settings).run()
    except KeyboardInterrupt:  # the second Ctrl+C
        return 128 + signal.SIGINT
    except (ServiceError, ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {_line(error)}", file=sys.stderr)
        return START_FAILED
    return 0


def _line(error: Exception) -> str:
    """An error's message in one line that a terminal can show: pydantic's have many."""
    text = " ".join(str(error).split())
    return text if len(text) <= 600 else f"{text[:600]}..."


def make_server(settings: Settings) -> "DrainingServer":
    """Load the model and wire the server.

    Raises:
        ValueError, OSError: the model cannot be found, verified or loaded; the message names the file and why.
        ModuleNotFoundError: the runtime asked for is not installed.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    path = choose_artifact(settings.model, settings.data_dir)
    artifact = load_artifact(path, derived_dir=settings.data_dir / "derived")
    photos = read_photos(settings.engine_photos, PHOTOS_AT_LOAD) if settings.engine_photos else None
    choice = choose_engine(artifact, settings.engine, threads=settings.threads, photos=photos)
    app = create_app(settings, artifact, choice.engine, tried=choice.tried)

    class HttpProtocol(BoundedHttpProtocol):
        header_timeout_s = settings.header_timeout_s

    config = uvicorn.Config(
        app,
        http=HttpProtocol,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        lifespan="off",  # DrainingServer's part: uvicorn would log a traceback and exit with 3
        server_header=False,
        timeout_graceful_shutdown=1,  # what may finish has finished by then: on_tick waits for it
        timeout_keep_alive=30,
    )
    return DrainingServer(
        config,
        app.router.lifespan_context(app),
        app.state.lifecycle,
        grace_s=settings.shutdown_grace_s,
        greet=partial(greeting, artifact, choice.engine),
    )


class _Unjoined(ThreadPoolExecutor):
    """The event loop's threads, which its end does not wait for."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)


class DrainingServer(uvicorn.Server):
    """uvicorn, which on a signal refuses new requests and finishes old ones before it stops listening.

    It starts and closes the application itself, so that what goes wrong at the start is an exception of `run`.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        lifespan: AbstractAsyncContextManager[Any],
        lifecycle: Lifecycle,
        *,
        grace_s: float,
        greet: Callable[[str], str],
    ) -> None:
        super().__init__(config)
        self._lifespan = lifespan
        self._lifecycle = lifecycle
        self._grace_s = grace_s
        self._greet = greet
        self._running = AsyncExitStack()
        self._drain_until: float | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Start the application, then listen.

        Raises:
            ServiceError, ValueError, OSError: why it cannot start.
        """
        asyncio.get_running_loop().set_default_executor(_Unjoined(thread_name_prefix="io"))
        await self._running.enter_async_context(self._lifespan)
        try:
            await super().startup(sockets)
        except SystemExit as stop:  # how uvicorn ends when it cannot listen; the cause is only in the context
            await self._close()
            where = f"{self.config.host}:{self.config.port}"
            raise OSError(f"cannot listen on {where}: {stop.__context__}") from stop
        gc.collect()
        gc.freeze()  # what is there now stays, and looking through it again and again would hold up requests
        print(self._greet(self._url()), flush=True)

    async def shutdown(self, sockets: Any = None) -> None:
        """Stop listening, end what still runs, close the application."""
        await super().shutdown(sockets)
        if not self.force_exit:
            await self._close()

    async def _close(self) -> None:
        """A fault or a hang here loses nothing, since every write was durable when it was answered."""
        closing = asyncio.create_task(self._running.aclose())
        await asyncio.wait([closing], timeout=CLOSE_LIMIT_S)
        if not closing.done():
            log.error("closing took longer than %g s", CLOSE_LIMIT_S)
        elif error := closing.exception():
            log.error("closing failed", exc_info=error)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain_until is not None:
            self.force_exit = True
            super().handle_exit(sig, frame)
            return
        self._lifecycle.draining = True
        self._drain_until = time.monotonic() + self._grace_s
        log.info("shutting down", extra={"fields": {"in_flight": self._lifecycle.in_flight}})

    async def on_tick(self, counter: int) -> bool:
        if self._drain_until is not None and (not self._lifecycle.in_flight or time.monotonic() > self._drain_until):
            return True
        return await super().on_tick(counter)

    def _url(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def greeting(artifact: Artifact, engine: Engine, url: str) -> str:
    """What a user sees: where it is, which model answers, and a line to try that works as it stands."""
    picture = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).save(picture, "PNG")
    example = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode("ascii")
    return (
        f"\ndinov2-service on {url}  (docs: {url}/docs)\n"
        f"model {artifact.name} from {artifact.path}, "
        f"engine {engine.name} ({engine.precision})\n\n"
        f"  curl -s {url}/v1/embeddings -H 'Content-Type: image/jpeg' --data-binary @photo.jpg\n\n"
        f"or without an image at hand:\n\n"
        f"  curl -s {url}/v1/embeddings -H 'Content-Type: application/json' -d '{{\"input\": \"{example}\"}}'\n"
    )


if __name__ == "__main__":
    sys.exit(main())
