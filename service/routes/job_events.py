"""Send the events of jobs as server-sent events: `GET /v1/jobs/events` and `GET /v1/jobs/{job_id}/events`.

The `id` of each event is its number, so a browser that reconnects sends the number of the last event that it received
in the header `Last-Event-ID`, and goes on after it. The field `event` is the kind of the event. Browsers pass events
with this field to listeners of the kind only, so `named=false` leaves it out for code that uses `onmessage`.

A stream has no thread. It compares the stamp of the job store, which is a number in memory, every `POLL_S` seconds, and
reads the store only if the stamp has changed. A stream ends when its job has ended, when the client disconnects, and
when the service shuts down.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from service.errors import InvalidRequest, JobNotFound, StorageFailed, Unavailable
from service.jobs.answers import event_answer
from service.jobs.opened import OpenedJobs
from service.jobs.records import FINISHED, Event
from service.jobs.store import JobStore
from service.options import parse_options
from service.routes.bodies import query_fields
from service.routes.describe import Operation, describe
from service.routes.direct import DirectRoute
from service.routes.job_schemas import AllEventQuery, JobEventQuery
from service.state import Lifecycle

POLL_S: Final = 0.25
HEARTBEAT_S: Final = 15.0
"""A stream sends a comment after this time without events, because proxies close silent connections, often after 60 s.
The stream also reads the store then, in case a process died between its commit and the change of the stamp."""
RETRY_MS: Final = 3000
"""The time after which browsers reconnect. A service that shuts down has usually stopped listening by then."""
MAX_STREAMS: Final = 100
"""The highest number of open streams of a process. Each one keeps a connection, and reads the store after each change:
100 streams read for about 20 ms per change."""
PAGE: Final = 100
HEADER: Final = "Last-Event-ID"
EVENT_STREAM: Final = "text/event-stream"
_UNSEEN: Final = -1  # a stamp is never negative

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=DirectRoute)


class OpenStreams:
    """Counts the open streams of a process."""

    def __init__(self, limit: int = MAX_STREAMS) -> None:
        self.count = 0
        self.limit = limit

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Count a stream while the `with` block runs.

        Raises:
            Unavailable: too many streams are open.
        """
        if self.count >= self.limit:
            raise Unavailable(f"{self.limit} event streams are open, which is the limit; try again", retry_after_s=5)
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1


class Page(NamedTuple):
    """Events that were read from the store. `ended` is True if no event is left and the job has ended."""

    events: list[Event]
    ended: bool


@dataclass
class Source:
    """The events of one job, or of all jobs if `job_id` is None, after the event with the number `after`."""

    jobs: OpenedJobs
    job_id: str | None
    follow: str
    named: bool = True
    after: int = 0

    def read(self) -> Page:
        """Return the next events. This blocks.

        Raises:
            StorageFailed: the store cannot be used.
        """
        store = self.jobs.existing()
        if store is None:
            return Page([], self.follow == "none")
        ended = self.follow == "none" or (self.follow == "end" and self._has_ended(store))  # before reading the events
        events = store.events(self.after, self.job_id, PAGE)
        if events:
            self.after = events[-1].number
        return Page(events, ended and not events)

    def begin(self, last_event_id: int | None) -> None:
        """Set where the stream begins. This blocks.

        If the client has not received events, a stream of all jobs begins with the next event, and a stream of one job
        with the first event of the job. The same is true if the client has received an event that the store does not
        have, because an older store was restored from a backup.

        Raises:
            JobNotFound: the job does not exist, and the stream would have no event that tells when it was removed.
            StorageFailed: the store cannot be used.
        """
        store = self.jobs.existing() if self.job_id is None else self.jobs.with_job(self.job_id)
        newest = 0 if store is None else store.last_event()
        if last_event_id is not None and last_event_id <= newest:
            self.after = last_event_id
        else:
            self.after = newest if self.job_id is None and self.follow == "all" else 0
        if store is None or self.job_id is None:
            return
        if last_event_id is None or not store.events(self.after, self.job_id, 1):
            store.get(self.job_id)

    def stamp(self) -> int | None:
        """Return a number that changes when there may be new events, or None if there is no store."""
        store = self.jobs.opened
        return None if store is None else store.stamp.read()

    def _has_ended(self, store: JobStore) -> bool:
        assert self.job_id is not None
        try:
            return store.get(self.job_id).state in FINISHED
        except JobNotFound:
            return True


class EventStream(StreamingResponse):
    """A response that sends the events of a source until they end, the client disconnects or the service shuts down."""

    def __init__(self, source: Source, streams: OpenStreams, lifecycle: Lifecycle) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would collect the events
        super().__init__((), headers=headers, media_type=EVENT_STREAM)
        self._source, self._streams, self._lifecycle = source, streams, lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._streams.one_more():
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if scope["method"] != "HEAD":
                await self._send_pieces(receive, send)
            else:
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_pieces(self, receive: Receive, send: Send) -> None:
        """Send the pieces of the stream in a task, and end the task when the client has disconnected. The task ends by
        itself when the service shuts down, unless it waits for a client that does not read."""

        async def pump() -> None:
            async with aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        sending, gone = asyncio.create_task(pump()), asyncio.create_task(_disconnected(receive))
        try:
            draining_for = 0
            while draining_for < 3 and not gone.done():
                done, _ = await asyncio.wait({sending, gone}, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
                if sending in done:
                    await sending  # raises the error that ended the stream, if there was one
                    return
                draining_for += self._lifecycle.draining
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _pieces(self) -> AsyncGenerator[bytes]:
        """Yield the bytes of the stream."""
        loop, source = asyncio.get_running_loop(), self._source
        # An id without data tells a browser where to go on, even if it receives no event before the connection breaks.
        yield f"retry: {RETRY_MS}\nid: {source.after}\n\n".encode()
        seen: int | None = _UNSEEN
        sent_at = read_at = loop.time()
        while not self._lifecycle.draining:
            stamp = source.stamp()
            if stamp != seen or loop.time() - read_at >= HEARTBEAT_S or stamp is None:
                seen, read_at = stamp, loop.time()
                page = await asyncio.to_thread(source.read)
                if page.ended:
                    return
                if page.events:
                    yield b"".join(encoded(event, named=source.named) for event in page.events)
                    sent_at, seen = loop.time(), _UNSEEN  # there may be more events
                    continue
            if loop.time() - sent_at >= HEARTBEAT_S:
                yield b":\n\n"
                sent_at = loop.time()
            await asyncio.sleep(POLL_S)


def encoded(event: Event, *, named: bool = True) -> bytes:
    """Return the bytes of a server-sent event. If `named` is True, it has the field `event`. JSON text has no line
    breaks."""
    answer: Any = event_answer(event)
    try:
        data = orjson.dumps(answer)
    except TypeError:  # a lone surrogate, or an integer of more than 64 bits
        data = json.dumps(answer).encode()
    name = b"event: %b\n" % event.kind.encode() if named else b""
    return b"id: %d\n%bdata: %b\n\n" % (event.number, name, data)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@router.get("/events", summary="Follow all jobs")
@describe(
    Operation(
        errors=(InvalidRequest, StorageFailed), query=AllEventQuery, headers=(HEADER,), media_types=(EVENT_STREAM,)
    )
)
async def follow_jobs(request: Request) -> Response:
    """Send the events of all jobs as server-sent events, for as long as the client is connected. Without
    `Last-Event-ID`, the stream begins with the next event, or with the first stored one if `follow` is `none`. The data
    of each event is a JSON object with `number`, `job`, `kind`, `time` and `data`. The field `event` is the kind."""
    query = parse_options(AllEventQuery, query_fields(request))
    source = Source(request.app.state.jobs, None, query.follow, query.named)
    await asyncio.to_thread(source.begin, _last_event_id(request, query.last_event_id))
    return _stream(request, source)


@router.get("/{job_id}/events", summary="Follow a job")
@describe(
    Operation(
        errors=(JobNotFound, InvalidRequest, StorageFailed),
        query=JobEventQuery,
        headers=(HEADER,),
        media_types=(EVENT_STREAM,),
        statuses=(200, 204),
    )
)
async def follow_job(request: Request, job_id: str) -> Response:
    """Send the events of a job as server-sent events, until the job has ended. The stream begins with the first event
    of the job. With `Last-Event-ID`, it begins after this event. If the job has ended and there are no more events, the
    status is 204, which makes browsers stop reconnecting. Of the events `progress` and `log`, only the newest one is
    stored. The text of the log is not part of the events. The field `event` is the kind of the event."""
    query = parse_options(JobEventQuery, query_fields(request))
    source = Source(request.app.state.jobs, job_id, query.follow, query.named)
    last_event_id = _last_event_id(request, query.last_event_id)
    await asyncio.to_thread(source.begin, last_event_id)
    if last_event_id is not None and query.follow == "end" and await asyncio.to_thread(_is_complete, source):
        return Response(status_code=204)
    return _stream(request, source)


def _is_complete(source: Source) -> bool:
    """Return whether the job has ended and there are no events after the beginning of the stream."""
    after = source.after
    page = source.read()
    source.after = after
    return page.ended


def _stream(request: Request, source: Source) -> EventStream:
    state = request.app.state
    return EventStream(source, state.streams, state.lifecycle)


def _last_event_id(request: Request, from_query: int | None) -> int | None:
    """Return the number of the last event that the client received, or None.

    Raises:
        InvalidRequest: the header is not a number.
    """
    text = request.headers.get(HEADER)
    if not text:
        return from_query
    if not (text.isascii() and text.isdigit() and len(text) <= 16):
        raise InvalidRequest(f"{HEADER}: {text[:80]!r} is not the number of an event", param=HEADER)
    return int(text)
