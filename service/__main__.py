"""`python -m service`, and what `dinov2 serve` calls: load the model, then serve until SIGTERM.

Everything that can be wrong with settings and model is found before the port is opened and told in one line.

Shutdown: on SIGTERM the service stops taking work (new requests get 503, /readyz fails) but keeps listening until what
is in flight has been answered, at most `shutdown_grace_s`; then it closes. A second signal ends it at once.
"""

import base64
import io
import logging
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import uvicorn
from PIL import Image

from model.artifact import load_artifact
from model.engine import load_engine
from service.app import create_app
from service.http_protocol import BoundedHttpProtocol
from service.models import choose_artifact
from service.settings import Settings, load_settings
from service.state import Service
from service.telemetry import configure_logging

log = logging.getLogger("service")


def main(overrides: Mapping[str, Any] | None = None) -> int:
    """Serve. `overrides` are settings from the command line. The process's exit status."""
    try:
        settings = load_settings(overrides)
        configure_logging(settings.log_level)
        server = make_server(settings)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    server.run()
    return 0 if server.started else 1


def make_server(settings: Settings) -> "DrainingServer":
    """Load the model and wire the server.

    Raises:
        ValueError, OSError: the model cannot be found, verified or loaded; the message names the file and why.
        ModuleNotFoundError: the runtime asked for is not installed.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    path = choose_artifact(settings.model, settings.data_dir)
    artifact = load_artifact(path, derived_dir=settings.data_dir / "derived")
    engine = load_engine(artifact, settings.engine, threads=settings.threads)
    app = create_app(settings, artifact, engine)

    class HttpProtocol(BoundedHttpProtocol):
        header_timeout_s = settings.header_timeout_s

    config = uvicorn.Config(
        app,
        http=HttpProtocol,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,  # what may finish has finished by then: on_tick waits for it
        timeout_keep_alive=30,
    )
    return DrainingServer(config, app.state.service)


class DrainingServer(uvicorn.Server):
    """uvicorn, which on a signal refuses new requests and finishes old ones before it stops listening."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drain_until: float | None = None

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(greeting(self._service, self._url()), flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain_until is not None:
            self.force_exit = True
            super().handle_exit(sig, frame)
            return
        self._service.draining = True
        self._drain_until = time.monotonic() + self._service.settings.shutdown_grace_s
        log.info("shutting down", extra={"fields": {"in_flight": self._service.in_flight}})

    async def on_tick(self, counter: int) -> bool:
        if self._drain_until is not None and (not self._service.in_flight or time.monotonic() > self._drain_until):
            return True
        return await super().on_tick(counter)

    def _url(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def greeting(service: Service, url: str) -> str:
    """What a user sees: where it is, which model answers, and a line to try that works as it stands."""
    picture = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).save(picture, "PNG")
    example = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode("ascii")
    return (
        f"\ndinov2-service on {url}  (docs: {url}/docs)\n"
        f"model {service.artifact.name} from {service.artifact.path}, engine {service.engine.name}\n\n"
        f"  curl -s {url}/v1/embeddings -H 'Content-Type: image/jpeg' --data-binary @photo.jpg\n\n"
        f"or without a photo at hand:\n\n"
        f"  curl -s {url}/v1/embeddings -H 'Content-Type: application/json' -d '{{\"input\": \"{example}\"}}'\n"
    )


if __name__ == "__main__":
    sys.exit(main())
