"""An HTTP protocol for uvicorn that limits the size of a request's head (the request line and the headers) and the time
for receiving it.

uvicorn parses requests with httptools, which does not limit the size of a head and joins the pieces of a head in
quadratic time. A request line of 50 MB blocks the event loop for minutes, and a connection that never completes its
head stays open forever. uvicorn's other parser, h11, has a size limit, but it is slower and has no time limit. So the
class in this module counts the bytes that are not part of a body, and limits the time for each head.
"""

from asyncio import TimerHandle, Transport
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 * 1024
_TOO_LARGE: Final = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class BoundedHttpProtocol(HttpToolsProtocol):
    """A protocol that closes a connection if the head of a request (the request line and the headers) is larger than
    `MAX_HEAD_BYTES` or is not complete after `header_timeout_s` seconds.

    The size is checked after each read from the socket, so a larger head is accepted if it arrives in a single read. An
    idle keep-alive connection is closed by uvicorn's own timeout. The time for a body is limited by the request's
    deadline.
    """

    header_timeout_s: float
    """The time limit for a head, in seconds. Subclasses must set this attribute, because uvicorn passes no additional
    arguments to the constructor."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending_bytes = 0  # bytes since the last complete head, body piece or message; includes trailers
        self._in_head = True
        self._head_timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # uvicorn's signature
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
            if self.cycle is None or self.cycle.response_complete:  # never write into another answer
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
        else:  # an earlier request is still being answered: do not cut it off
            self._start_timer()
