"""The application while the model is being loaded.

The service listens before it loads the model, because downloading and exporting a published model can take minutes.
Meanwhile `Starting` answers: /livez with 200, /readyz with 503 and the current step, and every other route with 503. As
soon as the real application is ready, `Starting` passes every request on to it.
"""

from typing import Any

import orjson

from service.errors import Unavailable
from service.middleware import ASGIApp, Border, Receive, Scope, Send
from service.settings import Settings
from service.state import Lifecycle
from service.telemetry import Metrics

RETRY_AFTER_S = 5


class Starting:
    """An ASGI application that passes requests on to `app`, and answers them itself as long as `app` is None."""

    def __init__(self, settings: Settings) -> None:
        self.app: ASGIApp | None = None
        self._step = "loading the model"
        # The counts of these metrics are lost when the application is ready and shows its own.
        self._border = Border(self._answer, settings, Metrics(), Lifecycle.of(settings))

    def report(self, step: str) -> None:
        """Set the step of the start that /readyz shows. Any thread may call this."""
        self._step = step

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.app or self._border)(scope, receive, send)

    async def _answer(self, scope: Scope, _receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/")
        if path == "/livez":
            await _send_json(send, 200, {"status": "alive"})
        elif path == "/readyz":
            await _send_json(send, 503, {"status": "unready", "reasons": {"start": self._step}})
        else:
            raise Unavailable(f"the service is starting: {self._step}", retry_after_s=RETRY_AFTER_S)


async def _send_json(send: Send, status: int, body: dict[str, Any]) -> None:
    content = orjson.dumps(body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    headers.append((b"cache-control", b"no-store"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
