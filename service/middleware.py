"""The middleware that handles every request: request ids, size and rate limits, compression, deadlines, disconnects,
errors, CORS, metrics, traces and the access log.

The class `Border` is this middleware. `Border` answers every request exactly once, unless the client has disconnected.
Every answer has a request id. Every request is counted once in the metrics and logged in one line. `Border` is a plain
ASGI application, because Starlette's BaseHTTPMiddleware copies streams and hides disconnects.

- The bytes of the body are counted as they arrive, because Content-Length may be missing or wrong. Reading stops at the
  limit. A compressed body is decoded as it arrives, and its decoded bytes are counted too.
- The memory for bodies and for answers that clients have not read is shared out among clients (service/buffer.py).
- If a request is not answered within `_WATCH_AFTER_S` seconds after its body is complete, a task starts that waits for
  the client to disconnect. If this happens, the task cancels the request, and the pipeline drops those images of the
  request that are still queued.
- A `ServiceError` becomes an answer with the status of the error. Any other exception becomes an answer with status 500
  that reveals only the request id. Errors with status 500 are logged with their traceback.
"""

import asyncio
import itertools
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from functools import cached_property
from typing import Any
from urllib.parse import unquote_to_bytes

import orjson

from service.access_log import UNMATCHED, request_fields, span_attributes
from service.clients import ITSELF, Sender, client_of, current_sender
from service.cors import Cors, parse_origins
from service.costs import current_cost
from service.encodings import BodyDecoder, accepts_gzip, body_decoder, gzipped
from service.errors import (
    OPENAI_PATHS,
    BadRequest,
    ClientGone,
    DeadlineExceeded,
    InvalidItems,
    PayloadTooLarge,
    ServiceError,
    ShuttingDown,
    openai_body,
    problem_body,
)
from service.limits import Admission, Limits
from service.off_loop import off_loop
from service.security import Security, audit, is_audited
from service.settings import Settings
from service.state import Lifecycle
from service.telemetry import Metrics, access_log, client_address, log_request
from service.tracing import RequestTrace, Tracing

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_PROCESS = uuid.uuid4().hex[:20]
_requests = itertools.count(1)
_numbers = itertools.count(1)  # cheaper than a random id, which costs a system call
_NO_FAULTS = frozenset({503, 504, 507})  # load, shutdown, a full disk: too frequent to log a traceback for each
_LARGE_ANSWER_BYTES = 64 * 1024  # smaller answers fit into the buffers of the connection
_WATCH_AFTER_S = 0.02  # seconds; starting and cancelling a task for every request costs more than a search
_COMPRESSIBLE = frozenset(
    {b"application/json", b"application/problem+json", b"text/plain", b"text/html", b"text/javascript", b"text/css"}
)
_HIGH_BYTE = re.compile(rb"%[89A-Fa-f][0-9A-Fa-f]|[\x80-\xff]")  # not ASCII
_SANE_ID = re.compile(rb"[A-Za-z0-9._:+/=@-]{1,128}")
log = logging.getLogger(__name__)


class Border:
    """The ASGI middleware around the application. It handles request ids, size limits, compression, deadlines,
    disconnects, errors, CORS, metrics, traces and the access log. If `tracing` is None, no request is traced.
    `find_route` stores the route of a request in its scope."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Metrics,
        lifecycle: Lifecycle,
        limits: Limits | None = None,
        tracing: Tracing | None = None,
        security: Security | None = None,
        find_route: Callable[[Scope], None] = lambda scope: None,
    ) -> None:
        self.app = app
        self.security = security  # None while the service starts and every request gets the same answer
        self.settings = settings
        self.metrics = metrics
        self.lifecycle = lifecycle
        self.limits = limits
        self.tracing = tracing
        self.find_route = find_route
        self.cors = Cors(parse_origins(settings.cors_origins)) if settings.cors_origins else None
        metrics.requests_in_flight.set_function(lambda: lifecycle.in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await _Exchange(self, scope, receive, send).run()


class _Exchange:
    """One request and its answer."""

    def __init__(self, border: Border, scope: Scope, receive: Receive, send: Send) -> None:
        self._app, self._scope, self._receive, self._send = border.app, scope, receive, send
        self._settings, self._metrics, self._lifecycle = border.settings, border.metrics, border.lifecycle
        self._cors, self._limits, self._tracing = border.cors, border.limits, border.tracing
        self._security, self._find_route = border.security, border.find_route
        self._admission: Admission | None = None
        prefix = self._settings.root_path
        if prefix and f"{scope['path']}/".startswith(f"{prefix}/"):  # the proxy has not removed it
            scope["path"] = scope["path"][len(prefix) :] or "/"
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = request_id(self._headers)
        scope.setdefault("state", {}).update(request_id=self.request_id, hold=self._hold)
        self._status = 0
        self._error: ServiceError | None = None
        self._body_bytes = 0  # in memory, so decoded, and with what is made from them
        self._received_bytes = 0
        self._body_ended = False
        self._decoder: BodyDecoder | None = None
        self._decoding_ends = False  # all bytes are received, and some may not be decoded yet
        self._sender = ITSELF
        self._held: Message | None = None  # the start of an answer that is large or whose body will be compressed
        self._compresses = False
        self._gone = asyncio.Event()
        self._watch_soon: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._trace: RequestTrace | None = None

    async def run(self) -> None:
        lifecycle, started = self._lifecycle, time.perf_counter()
        counted = self._scope["path"].startswith("/v1/")
        lifecycle.in_flight += counted
        if self._tracing is not None and counted:  # health checks and scrapes would outnumber other requests
            self._trace = self._tracing.start(self._headers)
            if self._trace is not None:
                self._trace.enter()
        try:
            await self._answer(counted)
        finally:
            if self._watch_soon is not None:
                self._watch_soon.cancel()
            if self._watcher is not None:
                self._watcher.cancel()
            if self._admission is not None and self._limits is not None:
                self._limits.settle(self._admission)
            lifecycle.in_flight -= counted
            lifecycle.buffer.add(self._sender.client, -self._body_bytes)
            current_sender.set(ITSELF)
            self._account(time.perf_counter() - started)
            # The traceback of an error leads back to this object. In this cycle, the body and all that was made from it
            # would stay in memory until the garbage collector runs.
            self._error = None
            for name in ("error", "hold"):
                self._scope["state"].pop(name, None)

    async def _answer(self, counted: bool) -> None:
        try:
            if "refusal" in self._scope:
                raise self._scope["refusal"]
            if self._cors is not None and await self._answer_preflight(self._cors):
                return
            if self._security is not None:
                self._security.admit(self._scope, self._headers)
            if counted and self._lifecycle.draining:
                raise ShuttingDown("the service is shutting down", retry_after_s=1)
            _check_target(self._scope)
            self._check_length()
            if counted:
                self._identify()
            if counted and self._limits is not None:
                self._admission = await self._limits.admit(self._scope["state"].get("principal"), self._client)
                current_cost.set(self._admission.cost)
            async with asyncio.timeout(self._settings.request_deadline_s) as deadline:
                self._scope["state"]["deadline"] = deadline

                async def send(message: Message) -> None:
                    if message["type"] == "http.response.start" and not deadline.expired():
                        deadline.reschedule(None)  # sending the answer has no deadline, because a file may be large
                    await self._send_tagged(message)

                await self._app(self._scope, self._receive_limited, send)
        except ServiceError as error:
            if error.status >= 500 and error.status not in _NO_FAULTS:
                log.error("%s: %s", error.code, error.detail, exc_info=_origin(error), extra=self._log_fields)
            await self._send_error(error)
        except TimeoutError:
            if not deadline.expired():
                await self._unhandled()
                return
            seconds = self._settings.request_deadline_s
            await self._send_error(DeadlineExceeded(f"the request took longer than {seconds:g} s"))
        except asyncio.CancelledError:
            if not self._gone.is_set():
                raise
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            self._set_gone()
        except Exception:  # noqa: BLE001  no exception may reach uvicorn
            await self._unhandled()

    def _identify(self) -> None:
        """Find out which client sends the request. Its work and its memory are counted from here on."""
        client = client_of(self._scope["state"].get("principal"), self._client)
        self._sender = Sender(client, next(_requests))
        current_sender.set(self._sender)
        connection = self._scope.get("connection")  # of the server; tests have none
        if connection is not None:
            connection.charge_to(self._lifecycle.buffer, client)

    async def _unhandled(self) -> None:
        if self._gone.is_set():  # the client disconnected while it was sending the body
            self._set_gone()
            return
        log.exception("unhandled", extra=self._log_fields)
        await self._send_error(ServiceError("internal error; the log has the details under this request id"))

    def _set_gone(self) -> None:
        self._error = ClientGone("the client disconnected")
        self._status = self._error.status

    @property
    def _log_fields(self) -> dict[str, Any]:
        trace = {} if self._trace is None else {"trace_id": self._trace.trace_id}
        return {"fields": {"request_id": self.request_id, **trace}}

    async def _answer_preflight(self, cors: Cors) -> bool:
        """Answer the request if it is a preflight (service/cors.py) from an allowed origin. Return whether it was
        answered."""
        headers = cors.preflight(self._headers) if self._scope["method"] == "OPTIONS" else None
        if headers is None:
            return False
        await self._send_tagged({"type": "http.response.start", "status": 204, "headers": headers})
        await self._send({"type": "http.response.body", "body": b""})
        return True

    # From the client to the application

    def _check_length(self) -> None:
        """Raise PayloadTooLarge if the request's Content-Length exceeds the limit, before the body is read."""
        length = self._headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._settings.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> PayloadTooLarge:
        limit = self._settings.max_body_bytes
        return PayloadTooLarge(f"the request body is larger than {limit} bytes", headers={"Connection": "close"})

    async def _receive_limited(self) -> Message:
        if self._body_ended:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        compressed = b"content-encoding" in self._headers
        message = await (self._receive_decoded() if compressed else self._receive_checked())
        if message["type"] == "http.disconnect":
            return message
        self._count(len(message.get("body", b"")))
        if not message.get("more_body", False):
            self._body_ended = True
            loop = asyncio.get_running_loop()
            self._watch_soon = loop.call_later(_WATCH_AFTER_S, self._start_watching, asyncio.current_task())
        return message

    async def _receive_checked(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._gone.set()
        elif "refusal" in self._scope:  # the body is malformed
            raise self._scope["refusal"]
        else:
            self._received_bytes += len(message.get("body", b""))
        return message

    async def _receive_decoded(self) -> Message:
        """Return a message with the next piece of a compressed body, decoded."""
        if self._decoder is None:
            self._decoder = body_decoder(_joined(self._scope["headers"], b"content-encoding").decode("latin-1"))
            if self._decoder is None:  # the encoding "identity"
                del self._headers[b"content-encoding"]
                return await self._receive_checked()
        while not (piece := self._decoder.decode()):
            if self._decoding_ends:
                self._decoder.finish()
                return {"type": "http.request", "body": b"", "more_body": False}
            message = await self._receive_checked()
            if message["type"] == "http.disconnect":
                return message
            if self._received_bytes > self._settings.max_body_bytes:  # the decoded bytes may be few
                raise self._too_large()
            self._decoder.feed(message.get("body", b""))
            self._decoding_ends = not message.get("more_body", False)
        await asyncio.sleep(0)  # decoding all pieces of a body at once would delay other requests
        return {"type": "http.request", "body": piece, "more_body": True}

    def _count(self, size: int) -> None:
        if self._body_bytes + size > self._settings.max_body_bytes:
            raise self._too_large()
        self._hold(size)

    def _hold(self, size: int) -> None:
        """Count memory of the request until its end."""
        self._lifecycle.buffer.take(self._sender.client, size, self._body_bytes)
        self._body_bytes += size

    def _start_watching(self, task: "asyncio.Task[None] | None") -> None:
        self._watcher = asyncio.create_task(self._watch(task))

    async def _watch(self, task: "asyncio.Task[None] | None") -> None:
        """Wait until the client disconnects. Then cancel `task`, which handles the request, unless the answer has
        already begun."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()
        if not self._status and task is not None:
            task.cancel()

    # From the application to the client

    async def _send_tagged(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = [(name, value) for name, value in message.get("headers", []) if name != b"x-request-id"]
            headers.append((b"x-request-id", self.request_id.encode()))
            if self._cors is not None:
                headers += self._cors.headers(self._headers)
            if self._admission is not None:
                headers += self._admission.headers()
            message = {**message, "headers": headers}
            self._compresses = b"accept-encoding" in self._headers and self._is_compressible(headers)
            if self._compresses or (self._sender.client and _length(headers) >= _LARGE_ANSWER_BYTES):
                self._held = message
                return
        elif self._held is not None:
            await self._send_held(message)
            return
        await self._send(message)

    async def _send_held(self, message: Message) -> None:
        """Send the start of an answer that was held back, and its body or the first piece of it. The bytes count as
        memory of the client until they have been passed on to the connection, which then counts what is not read.

        Raises:
            ShareUsed, Unavailable: there is no room for the answer. Nothing was sent.
        """
        buffer, client, size = self._lifecycle.buffer, self._sender.client, len(message.get("body", b""))
        if client:  # monitoring is never refused
            buffer.take(client, size, self._body_bytes)
        try:
            start, self._held = self._held, None
            assert start is not None
            if self._compresses and not message.get("more_body", False):
                start, message = await _compressed(start, message)
            await self._send(start)
            await self._send(message)
        finally:
            if client:
                buffer.add(client, -size)

    def _is_compressible(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Return whether an answer with these headers should be compressed."""
        smallest, names = self._settings.gzip_min_bytes, dict(headers)
        length = names.get(b"content-length", b"")
        return (
            smallest > 0
            and length.isdigit()
            and int(length) >= smallest
            and names.get(b"content-type", b"").partition(b";")[0] in _COMPRESSIBLE
            and b"content-encoding" not in names
            and accepts_gzip(_joined(self._scope["headers"], b"accept-encoding"))
        )

    async def _send_error(self, error: ServiceError) -> None:
        if self._held is not None:  # nothing of the answer has been sent yet
            self._held, self._status = None, 0
        if self._status:  # an answer has begun
            return
        if self._gone.is_set():
            self._set_gone()
            return
        self._error = error
        content_type, body = error_body(error, self._scope["path"], self.request_id, self._settings.root_path)
        headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
        headers += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in error.headers.items()]
        if not self._body_ended and self._scope["method"] in ("POST", "PUT", "PATCH"):
            headers = [h for h in headers if h[0] != b"connection"] + [(b"connection", b"close")]  # body not read
        await self._send_tagged({"type": "http.response.start", "status": error.status, "headers": headers})
        await self._send_tagged({"type": "http.response.body", "body": body})

    def _account(self, seconds: float) -> None:
        if self._error is not None and not {"route", "refusal"} & self._scope.keys():  # refused before the routing
            self._find_route(self._scope)
        route = getattr(self._scope.get("route"), "path", UNMATCHED)
        method = self._scope["method"] if self._scope["method"] in _METHODS else "other"
        error, trace = self._error or self._scope["state"].get("error"), self._trace
        code = None if error is None else error.code
        self._metrics.count_request(
            method, route, self._status, seconds, self._received_bytes, code, None if trace is None else trace.trace_id
        )
        logged = access_log.isEnabledFor(logging.INFO)
        audited = is_audited(self._scope, error)
        if not logged and not audited and trace is None:
            return
        fields = request_fields(self._scope, route, error, self._received_bytes, self._client, trace)
        if audited:
            audit(self._scope, self._status, error, self.request_id, fields.get("client"))
        if logged:
            log_request(method, route, self._status, seconds, self.request_id, **fields)
        if trace is not None:
            attributes = span_attributes(self._scope, method, route, self._status, self.request_id, fields)
            name = method if route == UNMATCHED else f"{method} {route}"
            trace.end(name, attributes, str(fields.get("detail", "")) if self._status >= 500 else None)

    @cached_property
    def _client(self) -> str:
        """The address of the client, or an empty text if it is unknown."""
        proxies = self._settings.trusted_proxies
        forwarded = _joined(self._scope["headers"], b"x-forwarded-for") if proxies else b""
        return client_address((self._scope.get("client") or ("",))[0], forwarded, proxies)


async def _compressed(start: Message, body: Message) -> tuple[Message, Message]:
    """Compress the body of an answer. Return its start and its body as new messages."""
    plain = body.get("body", b"")
    content = await off_loop(len(plain), lambda: gzipped(plain))
    headers = [(name, value) for name, value in start["headers"] if name != b"content-length"]
    headers += [(b"content-length", str(len(content)).encode()), (b"content-encoding", b"gzip")]
    headers.append((b"vary", b"Accept-Encoding"))
    return {**start, "headers": headers}, {**body, "body": content}


def _joined(headers: list[tuple[bytes, bytes]], name: bytes) -> bytes:
    """Join the values of all headers with this name, as RFC 9110 (5.3) allows."""
    return b", ".join(value for other, value in headers if other == name)


def _length(headers: list[tuple[bytes, bytes]]) -> int:
    """Return the value of the header Content-Length, or 0 if there is no such header."""
    for name, value in headers:
        if name == b"content-length":
            return int(value)
    return 0


def _check_target(scope: Scope) -> None:
    """Check the percent-encoded characters in the path and the query of a request. The server replaces invalid UTF-8,
    so two different ids could become the same one.

    Raises:
        BadRequest: the path or the query is not UTF-8.
    """
    for part, encoded in (("path", scope.get("raw_path") or b""), ("query", scope.get("query_string") or b"")):
        if b"%" in encoded and _HIGH_BYTE.search(encoded):
            try:
                unquote_to_bytes(encoded).decode()
            except UnicodeDecodeError as error:
                raise BadRequest(
                    f"the {part} is not valid UTF-8: percent-encode each character as UTF-8 ({error.reason})"
                ) from error


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _origin(error: ServiceError) -> ServiceError:
    """Return the error that is logged with its traceback. `InvalidItems` contains several errors: return the first one
    with status 500 or above, or the first of all if no status is that high."""
    if isinstance(error, InvalidItems):
        return max((item.error for item in error.items), key=lambda item: item.status >= 500)
    return error


def error_body(error: ServiceError, path: str, request_id: str, root_path: str = "") -> tuple[bytes, bytes]:
    """Return the content type and the body of the response for an error. If `path` is in OPENAI_PATHS, the body has
    OpenAI's format. Otherwise it has the format of RFC 9457. `root_path` is the prefix that clients see."""
    if path.removesuffix("/") in OPENAI_PATHS:
        return b"application/json", _json(openai_body(error, request_id=request_id))
    return b"application/problem+json", _json(problem_body(error, instance=root_path + path, request_id=request_id))


def _json(body: dict[str, Any]) -> bytes:
    """Serialise a body to JSON and return the bytes. The body may quote a client's text, which may contain a lone
    surrogate. orjson raises TypeError for such text, so the json module serialises it instead."""
    try:
        return orjson.dumps(body)
    except TypeError:
        return json.dumps(body).encode()


def request_id(headers: Mapping[bytes, bytes]) -> str:
    """Return the client's X-Request-ID if it has 1 to 128 of the characters that `_SANE_ID` allows. Otherwise return a
    new id."""
    value = headers.get(b"x-request-id")
    if value is not None and _SANE_ID.fullmatch(value):
        return value.decode("ascii")
    return f"{_PROCESS}{next(_numbers):012x}"
