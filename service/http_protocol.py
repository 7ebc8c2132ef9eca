"""uvicorn's HTTP protocol with limits on what comes before a body.

uvicorn reads with httptools, which has no limit for request line and headers and joins their pieces quadratically: a
request line of 50 MB holds up the event loop for minutes, and a connection that never sends a whole head stays open
for ever. h11 has a limit but is slower, and no time limit either. So this counts, in front of the parser, bytes that
are not of a body, and gives each head a time to be complete.
"""

from asyncio import TimerHandle, Transport
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 1024
_TOO_LARGE: Final = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes a connection whose head is larger than `MAX_HEAD_BYTES` or not complete within `header_timeout_s`.

    The size is looked at after each read from the socket, so a head that comes whole within one read may be larger.
    A kept-alive connection that sends nothing is left to uvicorn's timeout, and a body to the request's deadline.
    """

    header_timeout_s: float
    """Set by a subclass, because uvicorn makes the instances."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending_bytes = 0  # since the last head, piece of a body or message was complete; trailers count too
        self._in_head = True
        self._head_timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._pending_bytes += len(data)
        super().data_received(data)  # calls the methods below
        if self.transport.is_closing() or not self._pending_bytes:
            return
        if self._pending_bytes > MAX_HEAD_BYTES:
            if self.cycle is None or self.cycle.response_complete:  # else it would stand within another answer
                self.transport.write(_TOO_LARGE)
            self.transport.close()
        elif self._in_head and self._head_timer is None:
            self._start_timer()

    def on_headers_complete(self) -> None:
        self._pending_bytes, self._in_head = 0, False
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._pending_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._pending_bytes, self._in_head = 0, True
        super().on_message_complete()

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.header_timeout_s, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:  # the head came before the answer to an earlier request: that one is not cut off
            self._start_timer()
