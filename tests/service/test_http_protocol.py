"""Tests of the limits on the size and the time of request heads, and that they do not affect other requests."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from uvicorn.server import ServerState

from service.http_protocol import MAX_HEAD_BYTES, BoundedHttpProtocol

HEAD_S, KEEP_ALIVE_S = 0.3, 0.9
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
BIG = b"a" * (4 * MAX_HEAD_BYTES)


class Quick(BoundedHttpProtocol):
    header_timeout_s = HEAD_S


async def app(scope, receive, send):
    """Read the body and answer with its size. For /slow, answer after more time than a request head may take."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    if scope["path"] == "/slow":
        await asyncio.sleep(2 * HEAD_S)
    body = b"%d" % size
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    config = uvicorn.Config(app, http=Quick, lifespan="off", log_config=None, timeout_keep_alive=KEEP_ALIVE_S)  # type: ignore[arg-type]
    state, loop = ServerState(), asyncio.get_running_loop()
    config.load()
    server = await loop.create_server(
        lambda: Quick(config=config, server_state=state, app_state={}, _loop=loop), "127.0.0.1", 0
    )
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    try:
        yield reader, writer
    finally:
        writer.close()
        server.close()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """Return all bytes until the server closes the connection. A reset counts as a close."""
    answer = b""
    try:
        async with asyncio.timeout(5):
            while chunk := await reader.read(65536):
                answer += chunk
    except ConnectionError:
        pass
    return answer


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET /", BIG),
        (b"GET / HTTP/1.1\r\nX: ", BIG),
        (b"GET / HTTP/1.1\r\n", b"X: " + b"a" * 1000 + b"\r\n"),
        (b"", b"\r\n" * 1000),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: ", BIG),
        (GET + b"GET /", BIG),
    ],
    ids=["request line", "one header", "many headers", "blank lines", "trailer", "second head"],
)
async def test_a_head_without_end_is_closed_at_its_limit(start, piece):
    async with connected() as (reader, writer):
        writer.write(start)
        await asyncio.sleep(0.05)
        sent = 0
        while sent < 50 * 2**20 and not reader.at_eof():
            writer.write(piece)
            sent += len(piece)
            try:
                await writer.drain()
            except ConnectionError:
                break
            await asyncio.sleep(0)
        assert sent < 8 * 2**20  # what the sockets' buffers take comes on top


async def test_a_head_that_is_too_large_is_told_so():
    async with connected() as (reader, writer):
        writer.write(b"GET /" + b"a" * MAX_HEAD_BYTES)
        assert (await rest(reader)).startswith(b"HTTP/1.1 431 ")


async def test_a_large_head_within_the_limit_and_a_large_body_are_answered():
    async with connected() as (reader, writer):
        padding = b"X: " + b"a" * (MAX_HEAD_BYTES - 1000) + b"\r\n"
        for _ in range(3):  # the count begins again with each request
            writer.write(
                b"POST / HTTP/1.1\r\nHost: x\r\n" + padding + b"Content-Length: 1000000\r\n\r\n" + b"b" * 1000000
            )
            assert b"200" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(7) == b"1000000"


@pytest.mark.parametrize("start", [b"", b"GET", GET[:-2]])
async def test_a_head_that_does_not_come_is_closed_in_time(start):
    async with connected() as (reader, writer):
        started = time.monotonic()
        writer.write(start)
        assert await rest(reader) == b""
        assert HEAD_S * 0.9 < time.monotonic() - started < KEEP_ALIVE_S


async def test_trickled_headers_gain_no_time():
    async with connected() as (reader, writer):
        started = time.monotonic()
        writer.write(b"GET /")
        while not reader.at_eof() and time.monotonic() - started < 3:
            writer.write(b"a")
            await asyncio.sleep(HEAD_S / 6)
        assert time.monotonic() - started < KEEP_ALIVE_S + 0.5


async def test_a_kept_alive_connection_is_left_to_its_own_timeout_and_its_next_head_is_not():
    async with connected() as (reader, writer):
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n0")
        await asyncio.sleep(2 * HEAD_S)
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n0")
        started = time.monotonic()
        writer.write(GET[:-2])
        assert await rest(reader) == b""
        assert HEAD_S * 0.9 < time.monotonic() - started < KEEP_ALIVE_S


async def test_a_slow_body_is_not_cut_off():
    async with connected() as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\n")
        for _ in range(6):
            await asyncio.sleep(HEAD_S / 2)
            writer.write(b"b")
        assert b"200" in await reader.readuntil(b"\r\n\r\n6")


async def test_a_chunk_that_is_slow_to_come_is_not_cut_off(monkeypatch):
    async with connected() as (reader, writer):
        monkeypatch.setattr(Quick, "header_timeout_s", 0.02)  # of what begins from here on
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1")
        await asyncio.sleep(0.05)
        writer.write(b"\r\nb\r\n0\r\n\r\n")
        assert b"200" in await reader.readuntil(b"\r\n\r\n1")


async def test_a_head_that_is_too_large_is_not_told_within_another_answer():
    async with connected() as (reader, writer):
        writer.write(GET.replace(b"/ ", b"/slow "))
        await asyncio.sleep(0.01)
        writer.write(b"GET /" + BIG)
        assert b"431" not in await rest(reader)


async def test_half_a_head_behind_a_request_does_not_cut_off_its_answer():
    async with connected() as (reader, writer):
        writer.write(GET.replace(b"/ ", b"/slow "))
        await asyncio.sleep(0.05)
        writer.write(b"GET")
        assert b"200" in await reader.readuntil(b"\r\n\r\n0")
        assert await rest(reader) == b""
