"""The application while the model is being loaded.

The service listens before it loads the model, because downloading and exporting a published model can take minutes.
Meanwhile `Starting` answers: /livez with 200, /readyz with 503 and the current step, and every other route with 503. As
soon as the real application is ready, `Starting` passes every request on to it.
"""

import logging
from typing import Any

import orjson

from service.errors import ServiceError, Unavailable
from service.middleware import ASGIApp, Receive, Scope, Send, error_body, request_id

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5


class Starting:
    """An ASGI application that passes requests on to `app`, and answers them itself as long as `app` is None."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None
        self._step = "loading the model"

    def report(self, step: str) -> None:
        """Set the step of the start that /readyz shows. Any thread may call this."""
        self._step = step

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, send)

    async def _answer(self, scope: Scope, send: Send) -> None:
        identifier = request_id(scope["headers"])
        headers = [(b"x-request-id", identifier.encode()), (b"cache-control", b"no-store")]
        kind, status = b"application/json", 503
        if scope["path"] == "/livez":
            status, body = 200, orjson.dumps({"status": "alive"})
        elif scope["path"] == "/readyz":
            reasons: dict[str, Any] = {"start": self._step}
            body = orjson.dumps({"status": "unready", "reasons": reasons})
        else:
            error: ServiceError = Unavailable(f"the service is starting: {self._step}", retry_after_s=RETRY_AFTER_S)
            headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
            kind, body = error_body(error, scope["path"], identifier)
        if scope["method"] not in ("GET", "HEAD"):
            headers.append((b"connection", b"close"))  # the body of the request is not read
        headers += [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
