"""An HTTP protocol for uvicorn that limits connections, the heads of requests and the patience with slow clients,
ignores upgrades, and lets the application answer malformed requests.

The head of a request consists of the request line and the headers. uvicorn parses requests with httptools. The class in
this module changes eight things:

- **Connections.** Their number is limited, and one address may only open a share of what the others leave. A connection
  beyond this is answered with 503 and closed, before anything is read from it.
- **Heads.** httptools does not limit the size of a head, and joins the pieces of a head in quadratic time. A request
  line of 50 MB blocks the event loop for minutes, and a connection that never completes its head stays open forever.
  uvicorn's other parser, h11, has a size limit, but it is slower and has no time limit. So the class counts the bytes
  that are not part of a body, and limits the time for each head.
- **Upgrades.** Java's HttpClient and `curl --http2` ask for an upgrade to HTTP/2 in the first request of each
  connection. httptools then drops the body of this request. RFC 9110 (7.8) allows a server to ignore an upgrade, and
  the class does so.
- **Malformed requests.** uvicorn answers them itself, in plain text. The class passes them on to the application, with
  the error in `scope["refusal"]`. The application answers, logs and counts them like all others.
- **Early answers.** If a request is answered before its body has been read, uvicorn closes the connection immediately.
  The operating system then sends a reset, and the client may lose the answer. The class first closes only the sending
  side.
- **Slow bodies.** A client that sends a body more slowly than `min_bytes_per_s` gets status 408.
- **One write.** uvicorn writes the head of an answer and its body separately, which takes two system calls and may wake
  the client twice. The class writes the head together with the beginning of the body.
- **Unread answers.** The part of an answer that the client has not read counts as memory of the client. If the client
  reads it more slowly than `min_bytes_per_s`, the connection is closed.
"""

import asyncio
import fcntl
import re
import socket
import struct
import termios
from asyncio import TimerHandle, Transport
from contextlib import suppress
from typing import Any, Final, Protocol

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.connections import TURNED_AWAY, Connections
from service.errors import BadRequest, BodyTooSlow, HeadTooLarge, ServiceError

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_DISCARDED_HEAD_BYTES: Final = 16 * MAX_HEAD_BYTES
LINGER_S: Final = 10.0
"""The time limit in seconds for discarding the rest of a body after an early answer."""
BODY_GRACE_S: Final = 10.0
"""The time in seconds after which the rate of a body is measured, and then measured again."""
_HOST: Final = re.compile(rb"([A-Za-z0-9._~%!$&'()*+,;=-]*|\[[0-9A-Za-z.:_~%!$&'()*+,;=-]+\])(:[0-9]*)?")
_CONTINUE: Final = b"HTTP/1.1 100 "
_STREAM_FOLLOWS: Final = b"transfer-encoding: chunked\r\n\r\n"
_LARGE: Final = 64 * 1024
_NO_LINGER: Final = struct.pack("ii", 1, 0)
_UPGRADE_HEADERS: Final = frozenset({b"upgrade", b"http2-settings"})


class Account(Protocol):
    """Counts the bytes that a client occupies in memory."""

    def add(self, client: str, size: int) -> None: ...


class BoundedHttpProtocol(HttpToolsProtocol):
    """A protocol that refuses malformed requests, and requests whose head is larger than `MAX_HEAD_BYTES`. To refuse a
    request means that the application answers it with an error, and that the connection is then closed. A connection is
    closed without an answer if a head is not complete after `header_timeout_s` seconds.

    The size is checked after each read from the socket, so a larger head is accepted if it arrives in a single read. An
    idle keep-alive connection is closed by uvicorn's own timeout. The time for a body is limited by the request's
    deadline.

    Subclasses must set these attributes, because uvicorn passes no additional arguments to the constructor.
    """

    header_timeout_s: float
    """The time limit for a head, in seconds."""
    answer_stall_s: float
    """The time in seconds after which the rate at which a client reads an answer is measured, and then measured
    again."""
    min_bytes_per_s: int
    """The minimum rate at which a client must send a body and read an answer."""
    places: Connections
    """Counts the connections of all instances."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ws_protocol_class = None  # no route is a WebSocket, so every upgrade is ignored
        self._pending_bytes = 0  # bytes since the last complete head, body piece or message; includes trailers
        self._in_head = True
        self._head_timer: TimerHandle | None = None
        self._linger_timer: TimerHandle | None = None  # runs after the sending side was closed
        self._discard_timer: TimerHandle | None = (
            None  # runs while the rest of a body is discarded before the next head
        )
        self._stall_timer: TimerHandle | None = None  # runs while the client reads more slowly than the answer comes
        self._body_timer: TimerHandle | None = None  # runs while a body is being received
        self._body_bytes = 0  # received since the body timer was started
        self._was_paused = False  # whether nothing was read from the connection when it was started
        self._place: str | None = None  # the name under which the connection is counted; None if it was refused
        self._unread_bytes = 0  # as they are counted in the account
        self._account: tuple[Account, str] | None = None  # and the client
        self._refused = False

    # Connections

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # uvicorn's signature
        super().connection_made(transport)
        self._place = self.places.admit(self.client[0] if self.client else "")
        if self._place is None:
            self._refused = True
            transport.write(TURNED_AWAY)
            transport.close()
        else:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._place is not None:
            self.places.forget(self._place)
        self._stop_timer()
        self._stop_watching()
        for timer in (self._linger_timer, self._discard_timer, self._body_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # Unread answers

    def charge_to(self, account: Account, client: str) -> None:
        """Count the unread bytes of this connection in an account, as memory of a client."""
        if self._account != (account, client):
            unread = self._unread_bytes
            self._count_unread(0)
            self._account = account, client
            self._count_unread(unread)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    def _watch_writing(self) -> None:
        """Count what the client has not read, and check after `answer_stall_s` seconds how much it has read."""
        self._count_unread(self.transport.get_write_buffer_size())
        self._stall_timer = self.loop.call_later(self.answer_stall_s, self._check_writing, self._unacknowledged())

    def _check_writing(self, before: int) -> None:
        """Drop the connection if the client reads too slowly. `before` is the number of bytes that it had not received
        when the measurement began."""
        if before - self._unacknowledged() < max(1, self.min_bytes_per_s * self.answer_stall_s):
            with suppress(OSError):  # the operating system forgets the rest of the answer at once
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            self.transport.abort()
        else:
            self._watch_writing()

    def _unacknowledged(self) -> int:
        """Return the number of bytes that the client has not received yet. They include the send buffer of the
        operating system, which takes up megabytes at once and would hide the rate of a client for minutes."""
        unsent = 0
        with suppress(OSError):
            unsent = struct.unpack(
                "i", fcntl.ioctl(self.transport.get_extra_info("socket"), termios.TIOCOUTQ, b"0000")
            )[0]
        return self.transport.get_write_buffer_size() + unsent

    def _stop_watching(self) -> None:
        self._count_unread(0)
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _count_unread(self, unread: int) -> None:
        if self._account is not None:
            account, client = self._account
            account.add(client, unread - self._unread_bytes)
            self._unread_bytes = unread

    def close_in_steps(self) -> None:
        """Close the connection after an answer.

        If the client is still sending the request, close only the sending side at first, and discard received bytes.
        This gives the client time to read the answer. The connection is closed after `LINGER_S` seconds, or when a
        refused head has grown to `MAX_DISCARDED_HEAD_BYTES`.
        """
        if self.transport.is_closing() or self._linger_timer is not None:
            return
        if self.cycle.more_body and not self.pipeline and self.transport.can_write_eof():
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)
            self.transport.write_eof()
        else:
            self.transport.close()

    # Received bytes

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._pending_bytes += len(data)
        if self._refused or self._linger_timer is not None:  # the rest of a request that is already answered
            if self._in_head and self._pending_bytes > MAX_DISCARDED_HEAD_BYTES:
                self.transport.close()
            return
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            self._refuse(BadRequest(f"the request is not valid HTTP/1.1: {_reason(error)}"))
            return
        if self.transport.is_closing():
            return
        if not self._in_head and self._body_timer is None:
            self._watch_body()
        if not self._pending_bytes:
            return
        if self._pending_bytes > MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge(f"the request line and the headers are larger than {MAX_HEAD_BYTES} bytes"))
        elif self._in_head and self._head_timer is None:
            self._start_timer()

    def _feed(self, data: bytes) -> None:
        """Parse received bytes. A head that asks for an upgrade is parsed a second time, without the headers that ask
        for the upgrade."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:  # the head is complete, and the parser has stopped
                if self.parser.get_method() == b"CONNECT":
                    raise httptools.HttpParserError("the method CONNECT is for proxies") from upgrade
                data = data[upgrade.args[0] :]
                head = self._head_without_upgrade()
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
                self.parser.feed_data(head)

    def _head_without_upgrade(self) -> bytes:
        """Return the current head without the headers that ask for an upgrade."""
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        for name, value in self.headers:
            if name == b"connection":
                tokens = (token.strip() for token in value.split(b","))
                value = b", ".join(token for token in tokens if token.lower() not in _UPGRADE_HEADERS)
            if name not in _UPGRADE_HEADERS:
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    # Parsed requests

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():  # the same head follows without the upgrade
            return
        super().on_headers_complete()
        self._pending_bytes, self._in_head = 0, False
        self._stop_timer()
        self.cycle.transport = _StagedTransport(self, self.scope["method"])  # type: ignore[assignment]
        self.scope["connection"] = self  # type: ignore[typeddict-unknown-key]  # for `charge_to`
        fault = _head_fault(self.headers, self.parser.get_http_version())
        if fault is not None:
            self._refuse_current(BadRequest(fault))

    def on_body(self, body: bytes) -> None:
        self._pending_bytes = 0
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._pending_bytes, self._in_head = 0, True
        super().on_message_complete()
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        if self._discard_timer is not None:
            self._discard_timer.cancel()
            self._discard_timer = None
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.more_body and self.cycle.response_complete and self._linger_timer is None:
            self._discard_timer = self.loop.call_later(LINGER_S, self.transport.close)

    def _watch_body(self) -> None:
        self._body_bytes, self._was_paused = 0, self.flow.read_paused
        self._body_timer = self.loop.call_later(BODY_GRACE_S, self._check_body)

    def _check_body(self) -> None:
        """Refuse a request whose body arrives too slowly. If the application has not read what has arrived, the client
        is not to blame."""
        self._body_timer = None
        if self.cycle.response_complete:  # the rest of the body is discarded
            return
        is_slow = self._body_bytes < self.min_bytes_per_s * BODY_GRACE_S
        if is_slow and not (self._was_paused or self.flow.read_paused):
            self._refuse(
                BodyTooSlow(
                    f"only {self._body_bytes} bytes of the request body have arrived in {BODY_GRACE_S:g} s; the "
                    f"minimum rate is {self.min_bytes_per_s} bytes per second"
                )
            )
        else:
            self._watch_body()

    # Refused requests

    def _refuse(self, error: ServiceError) -> None:
        """Refuse the request that is being received, and parse nothing more from this connection."""
        self._refused = True
        self._stop_timer()
        if self._in_head:
            self._start_refused(error)
        elif self.cycle.response_complete:
            self.transport.close()
        else:
            self._refuse_current(error)
            self.cycle.message_event.set()  # the application may be waiting for the body

    def _refuse_current(self, error: ServiceError) -> None:
        """Refuse the request that was started last."""
        self.cycle.keep_alive = False
        self.cycle.scope["refusal"] = error  # type: ignore[typeddict-unknown-key]

    def _start_refused(self, error: ServiceError) -> None:
        """Start a request whose head is malformed or too large, and refuse it. If an earlier request is still being
        answered, the refused request starts after that answer."""
        previous = self.cycle
        if self.scope is None or (previous is not None and previous.scope is self.scope):
            self.on_message_begin()  # the head failed at its first byte
        path = self.url.partition(b"?")[0][:200]
        self.scope.update({"method": self.scope.get("method", ""), "path": path.decode("latin-1")})
        self.scope.update({"raw_path": path, "query_string": b""})
        self.cycle = RequestResponseCycle(
            scope=self.scope,
            transport=_StagedTransport(self, self.scope["method"]),  # type: ignore[arg-type]
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=False,
            on_response=self.on_response_complete,
        )
        self._refuse_current(error)
        if previous is None or previous.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    # Time limit of a head

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.header_timeout_s, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:  # an earlier request is still being answered: do not cut it off
            self._start_timer()


class _StagedTransport:
    """The transport that uvicorn uses to answer one request. Its `close` calls the protocol's `close_in_steps`. What is
    written after the client has disconnected is dropped. uvicorn does not notice this for a request that other requests
    of the same connection follow, and uvloop raises RuntimeError.

    The head of an answer with a Content-Length is written together with the beginning of the body. The head of a stream
    is written at once, because its body may begin much later.
    """

    def __init__(self, protocol: BoundedHttpProtocol, method: str) -> None:
        self._transport = protocol.transport
        self._close = protocol.close_in_steps
        self._awaits_head = method != "HEAD"  # an answer to HEAD has no body
        self._head = b""  # the head, as long as it is not written
        self.is_closing = protocol.transport.is_closing

    def write(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        if self._head:
            head, self._head = self._head, b""
            if len(data) < _LARGE:
                data = head + data
            else:  # copying would take longer than a second write
                self._transport.write(head)
        elif self._awaits_head and not data.startswith(_CONTINUE):
            self._awaits_head = False
            if not data.endswith(_STREAM_FOLLOWS):
                self._head = data
                return
        self._transport.write(data)

    def close(self) -> None:
        if self._head:  # the application failed before the body
            self.write(b"")
        self._close()


def _head_fault(headers: list[tuple[bytes, bytes]], version: str) -> str | None:
    """Return an error message if a request does not have exactly one valid `Host` header, as HTTP/1.1 requires, or if
    its body has a transfer encoding other than `chunked`. Otherwise return None. In HTTP/1.0, `Host` may be missing."""
    hosts = []
    for name, value in headers:
        if name == b"host":
            hosts.append(value)
        elif name == b"transfer-encoding" and value.strip().lower() != b"chunked":
            return f"transfer encoding {_shown(value)} is not accepted: send chunked"
    if not hosts and version == "1.0":
        return None
    if len(hosts) != 1:
        return f"the request has {len(hosts)} Host headers: send exactly one"
    return None if _HOST.fullmatch(hosts[0]) else f"Host: {_shown(hosts[0])} is not valid: send HOST or HOST:PORT"


def _shown(value: bytes) -> str:
    return repr(value[:80].decode("latin-1"))


def _reason(error: httptools.HttpParserError) -> str:
    """Return why a request cannot be parsed."""
    if isinstance(error, httptools.HttpParserCallbackError):  # `on_headers_complete` could not parse the target
        return "the request target is not a path"
    return str(error)
