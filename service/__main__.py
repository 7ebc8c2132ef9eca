"""Start the service: load the model, then answer requests until SIGTERM. Both `python -m service` and `dinov2 serve`
run this module.

The settings, the model and the stored data are checked before the port is opened. If the service cannot start, for
instance because the port is in use, the error is printed in one line and the exit status is 2.

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
"""The time limit in seconds for closing the cache and the vector store after the grace period. With the default
settings, Docker Compose kills the container 15 s after the grace period."""


def main(overrides: Mapping[str, Any] | None = None) -> int:
    """Run the service until it stops, then end the process. Only the entry points call this function. `overrides` has
    settings from the command line.

    The function returns only if the service cannot start. It then returns the exit status 2.
    """
    status = serve(overrides)
    if status == START_FAILED:
        return status
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the stream is closed, or its reader is gone
            stream.flush()
    os._exit(status)


def serve(overrides: Mapping[str, Any] | None = None) -> int:
    """Run the service until it receives a signal, and return the exit status. `overrides` has settings from the command
    line, which take precedence over the environment. If the service cannot start, print the error and return 2."""
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
    """Return the message of an error as one line, truncated after 600 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 600 else f"{text[:600]}..."


def make_server(settings: Settings) -> "DrainingServer":
    """Load the model, and return a server that answers requests with it.

    Raises:
        ValueError, OSError: the model cannot be found, verified or loaded. The message names the file and the reason.
        ModuleNotFoundError: the requested runtime is not installed.
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
        lifespan="off",  # DrainingServer runs it; uvicorn would log a traceback and exit with 3
        server_header=False,
        timeout_graceful_shutdown=1,  # on_tick has already waited for running requests
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
        """Start the application, open the port, and print the startup message.

        Raises:
            ServiceError, ValueError, OSError: the application cannot start, or the port cannot be opened.
        """
        asyncio.get_running_loop().set_default_executor(_Unjoined(thread_name_prefix="io"))
        await self._running.enter_async_context(self._lifespan)
        try:
            await super().startup(sockets)
        except SystemExit as stop:  # uvicorn cannot listen; the cause is in the context
            await self._close()
            where = f"{self.config.host}:{self.config.port}"
            raise OSError(f"cannot listen on {where}: {stop.__context__}") from stop
        gc.collect()
        gc.freeze()  # otherwise garbage collections would scan the objects made at startup and delay requests
        print(self._greet(self._url()), flush=True)

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
    """Return the startup message with the address, the model, and two example commands. The second command works
    without an image file."""
    png = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).save(png, "PNG")
    example = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode("ascii")
    return (
        f"\ndinov2-service on {url}  (docs: {url}/docs)\n"
        f"model {artifact.name} from {artifact.path}, "
        f"engine {engine.name} ({engine.precision})\n\n"
        f"  curl -s {url}/v1/embeddings -H 'Content-Type: image/jpeg' --data-binary @photo.jpg\n\n"
        f"or, without an image file:\n\n"
        f"  curl -s {url}/v1/embeddings -H 'Content-Type: application/json' -d '{{\"input\": \"{example}\"}}'\n"
    )


if __name__ == "__main__":
    sys.exit(main())
