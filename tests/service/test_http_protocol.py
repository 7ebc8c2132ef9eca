"""Tests of the HTTP protocol: limits on request heads, ignored upgrades, malformed requests, and early answers."""

import asyncio
import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from service.connections import Connections
from service.http_protocol import MAX_HEAD_BYTES, BoundedHttpProtocol, _StagedTransport
from tests.fakes import until

HEAD_S, KEEP_ALIVE_S = 0.3, 0.9
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
BIG = b"a" * (4 * MAX_HEAD_BYTES)
HUGE = 32 * 2**20  # more than the buffers of the operating system hold


class Quick(BoundedHttpProtocol):
    header_timeout_s = HEAD_S
    answer_stall_s = 30.0
    min_bytes_per_s = 4096
    places = Connections(100, 0.5)


class Account:
    """Counts the unread bytes of clients."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}

    def add(self, client: str, size: int) -> None:
        self.held[client] = self.held.get(client, 0) + size


ACCOUNT = Account()


async def app(scope, receive, send):
    """Read the body and answer with its size. For /slow, answer after more time than a request head may take. For
    /early and /kept, answer before the body; only /early closes. Answer a refused request with its error."""
    if "connection" in scope:
        scope["connection"].charge_to(ACCOUNT, scope["path"])
    size, more = 0, scope["path"] not in ("/early", "/kept")
    while more and "refusal" not in scope:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    if scope["path"] == "/slow":
        await asyncio.sleep(2 * HEAD_S)
    error = scope.get("refusal")
    status, body = (200, b"%d" % size) if error is None else (error.status, error.detail.encode())
    body = bytes(HUGE) if scope["path"] == "/huge" else body
    headers = [(b"content-length", b"%d" % len(body))] + [(b"connection", b"close")] * (scope["path"] == "/early")
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def connected(
    http: type[Quick] = Quick,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    config = uvicorn.Config(app, http=http, lifespan="off", log_config=None, timeout_keep_alive=KEEP_ALIVE_S)  # type: ignore[arg-type]
    state, loop = ServerState(), asyncio.get_running_loop()
    config.load()
    server = await loop.create_server(
        lambda: http(config=config, server_state=state, app_state={}, _loop=loop), "127.0.0.1", 0
    )
    try:
        async with more(server.sockets[0].getsockname()) as streams:
            yield streams
    finally:
        server.close()
        await until(lambda: not state.connections)


@asynccontextmanager
async def more(address: tuple[str, int]) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection to the server at `address`."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        yield reader, writer
    finally:
        writer.close()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """Return all bytes until the server closes the connection. A reset counts as a close."""
    answer = bytearray()
    with contextlib.suppress(ConnectionError):
        await everything(reader, answer)
    return bytes(answer)


async def everything(reader: asyncio.StreamReader, answer: bytearray | None = None) -> None:
    """Read until the server closes the connection, and add what was read to `answer`."""
    async with asyncio.timeout(30):
        while chunk := await reader.read(65536):
            if answer is not None:
                answer += chunk


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d{3}) ", answers)]


async def answer_to(request: bytes) -> bytes:
    """Send a request and return everything that the server sends until it closes the connection."""
    async with connected() as (reader, writer):
        writer.write(request)
        return await rest(reader)


ENDLESS = pytest.mark.parametrize(
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


@ENDLESS
async def test_a_head_without_end_is_closed_at_its_limit(start, piece):
    async with connected() as (reader, writer):
        writer.write(start)
        await asyncio.sleep(0.05)
        answer, sent = asyncio.create_task(rest(reader)), 0
        while sent < 50 * 2**20 and not answer.done():
            writer.write(piece)
            sent += len(piece)
            try:
                await writer.drain()
            except ConnectionError:
                break
            await asyncio.sleep(0)
        assert sent < 8 * 2**20  # what the sockets' buffers take comes on top
        await answer


@ENDLESS
async def test_a_head_that_is_too_large_is_told_so(start, piece):
    async with connected() as (reader, writer):
        writer.write(start)
        await asyncio.sleep(0.05)
        writer.write(piece[:500] * (MAX_HEAD_BYTES // min(500, len(piece)) + 2))
        assert statuses(await rest(reader)) == [200] * start.startswith(GET) + [431]


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


async def test_a_head_that_is_too_large_is_told_so_after_the_answer_to_an_earlier_request():
    async with connected() as (reader, writer):
        writer.write(GET.replace(b"/ ", b"/slow "))
        await asyncio.sleep(0.01)
        writer.write(b"GET /" + BIG)
        assert statuses(await rest(reader)) == [200, 431]


async def test_half_a_head_behind_a_request_does_not_cut_off_its_answer():
    async with connected() as (reader, writer):
        writer.write(GET.replace(b"/ ", b"/slow "))
        await asyncio.sleep(0.05)
        writer.write(b"GET")
        assert b"200" in await reader.readuntil(b"\r\n\r\n0")
        assert await rest(reader) == b""


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"  # Java's, curl's
LAST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
CHUNKS = b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"


@pytest.mark.parametrize("upgrade", [H2C, b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"Upgrade: x/1\r\n"])
@pytest.mark.parametrize("body", [b"Content-Length: 5\r\n\r\nabcde", CHUNKS], ids=["length", "chunks"])
@pytest.mark.parametrize("piece", [1, 7, 100_000])
async def test_an_upgrade_is_ignored_and_the_body_is_read(upgrade, body, piece, monkeypatch):
    monkeypatch.setattr(Quick, "header_timeout_s", 60.0)  # single bytes take their time
    async with connected() as (reader, writer):
        request = b"POST /x?q=1 HTTP/1.1\r\nHost: x\r\n" + upgrade + body
        whole = 2 * request + LAST
        for start in range(0, len(whole), piece):
            writer.write(whole[start : start + piece])
            await asyncio.sleep(0 if piece > 1 else 0.0001)
        answers = await rest(reader)
    assert statuses(answers) == [200, 200, 200]
    assert re.findall(rb"\r\n\r\n(\d+)", answers) == [b"5", b"5", b"0"]


async def test_a_connection_that_shall_close_closes_though_it_asks_for_an_upgrade():
    request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n"
    assert statuses(await answer_to(request + GET)) == [200]


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    """Yield the URL of a server with the protocol."""
    config = uvicorn.Config(app, http=Quick, lifespan="off", log_config=None)  # type: ignore[arg-type]
    state, loop = ServerState(), asyncio.get_running_loop()
    config.load()
    server = await loop.create_server(
        lambda: Quick(config=config, server_state=state, app_state={}, _loop=loop), "127.0.0.1", 0
    )
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def output(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return (await asyncio.wait_for(process.communicate(), 60))[0].decode()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_with_http2_sends_its_body():
    async with serving() as url:
        told = await output("curl", "-sS", "--http2", "--data-binary", "12345678", f"{url}/", f"{url}/")
        early = await output("curl", "-sS", "--http2", "-T", shutil.which("curl") or "", f"{url}/early")
    assert (told, early) == ("88", "0")


JAVA = """
import java.net.URI;
import java.net.http.*;
public class Send {
    public static void main(String[] args) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        for (int i = 0; i < 2; i++) {
            HttpRequest request = HttpRequest.newBuilder(URI.create(args[0]))
                .POST(HttpRequest.BodyPublishers.ofString("12345678")).build();
            System.out.print(client.send(request, HttpResponse.BodyHandlers.ofString()).body());
        }
    }
}
"""


@pytest.mark.skipif(shutil.which("javac") is None, reason="no JDK is installed")
async def test_java_with_its_default_settings_sends_its_body(tmp_path):
    (tmp_path / "Send.java").write_text(JAVA)
    async with serving() as url:
        assert await output("java", "-Xmx64m", str(tmp_path / "Send.java"), url) == "88"


MALFORMED = {
    "method": b"\x16\x03\x01\x02\x00\x01\x00",
    "target": b"GET x HTTP/1.1\r\nHost: x\r\n\r\n",
    "version": b"GET / HTTP/x\r\n\r\n",
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "connect": b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "header": b"GET / HTTP/1.1\r\nHost: x\r\nA B: c\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    "chunk": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "upgraded chunk": b"POST / HTTP/1.1\r\nHost: x\r\n" + H2C + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "gzip transfer": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
    "bad host": b"GET / HTTP/1.1\r\nHost: x/y\r\n\r\n",
    "no host, body": b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc",
}


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED.keys())
@pytest.mark.parametrize("earlier", [b"", GET, GET.replace(b"/ ", b"/slow ")], ids=["first", "second", "queued"])
async def test_a_malformed_request_is_refused_by_the_application_and_ends_the_connection(request_bytes, earlier):
    answers = await answer_to(earlier + request_bytes + GET)
    assert statuses(answers) == [200] * bool(earlier) + [400]
    assert b"connection: close" in answers


@pytest.mark.parametrize(
    "host",
    [b"x", b"x:80", b"", b"127.0.0.1:8000", b"[::1]:8000", b"[fe80::1%25eth0]", b"a_b.example", b"%C3%A9.example"],
)
async def test_every_valid_host_is_accepted(host):
    assert statuses(await answer_to(LAST.replace(b"Host: x", b"Host: " + host))) == [200]


async def test_http_1_0_needs_no_host():
    assert statuses(await answer_to(b"GET / HTTP/1.0\r\n\r\n")) == [200]


async def test_an_early_answer_arrives_though_the_client_sends_on():
    async with connected() as (reader, writer):
        writer.write(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 50000000\r\n\r\n")
        for _ in range(50):  # as clients do that read the answer only when all is sent
            writer.write(bytes(1_000_000))
            await writer.drain()
        assert statuses(await rest(reader)) == [200]


async def test_discarding_a_body_has_a_time_limit(monkeypatch):
    monkeypatch.setattr("service.http_protocol.LINGER_S", 0.3)
    async with connected() as (reader, writer):
        writer.write(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 50000000\r\n\r\n")
        assert statuses(await rest(reader)) == [200]  # the server has closed its sending side
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 5:
                writer.write(b"a")
                await writer.drain()
                await asyncio.sleep(0.02)
        assert 0.1 < time.monotonic() - started < 2


async def test_a_kept_connection_goes_on_behind_a_discarded_body_and_does_not_stay_open_forever():
    async with connected() as (reader, writer):
        writer.write(b"POST /kept HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\na")
        await reader.readuntil(b"\r\n\r\n0")
        for byte in (b"b", b"c"):
            await asyncio.sleep(2 * HEAD_S)
            writer.write(byte)
        writer.write(b"POST /kept HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n0")
        started = time.monotonic()
        writer.write(b"a")
        assert await rest(reader) == b""
        assert time.monotonic() - started < KEEP_ALIVE_S + 0.5


async def test_a_body_that_trickles_in_after_its_answer_ends_the_connection(monkeypatch):
    monkeypatch.setattr("service.http_protocol.LINGER_S", 0.3)
    async with connected() as (reader, writer):
        writer.write(b"POST /kept HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n0")
        started = time.monotonic()
        while not reader.at_eof() and time.monotonic() - started < 3:
            writer.write(b"a")
            await asyncio.sleep(0.05)
        assert 0.2 < time.monotonic() - started < 1


async def test_no_request_behind_a_discarded_body_is_run():
    body = b"Content-Length: 200000\r\n\r\n" + bytes(200_000)
    answers = await answer_to(b"POST /early HTTP/1.1\r\nHost: x\r\n" + body + GET)
    assert statuses(answers) == [200]


async def test_a_client_that_reads_nothing_of_a_large_answer_is_dropped(monkeypatch):
    monkeypatch.setattr(Quick, "answer_stall_s", 0.2)
    monkeypatch.setattr(f"{__name__}.KEEP_ALIVE_S", 60)
    async with connected() as (reader, writer):
        writer.write(b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: ACCOUNT.held.get("/huge", 0) > HUGE // 4)  # the reader takes 128 KiB, and then nothing
        await until(lambda: ACCOUNT.held["/huge"] == 0)
        with pytest.raises(ConnectionResetError):  # the operating system keeps nothing of the answer
            await everything(reader)


async def test_a_client_that_trickles_an_answer_is_dropped(monkeypatch):
    """A byte now and then is no reason to keep the rest in memory."""
    monkeypatch.setattr(Quick, "answer_stall_s", 0.2)
    monkeypatch.setattr(Quick, "min_bytes_per_s", 5 * HUGE)
    monkeypatch.setattr(f"{__name__}.KEEP_ALIVE_S", 60)
    answer = 0
    async with connected() as (reader, writer):
        writer.write(b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(2**16):
                answer += len(chunk)
                await asyncio.sleep(0.01)
    assert answer < HUGE


async def test_what_a_client_has_not_read_is_counted_for_the_client_of_the_last_request():
    async with connected() as (reader, writer):
        writer.write(b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: ACCOUNT.held.get("/huge", 0) > 0)
        unread = ACCOUNT.held["/huge"]
        writer.write(b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: ACCOUNT.held.get("/next", 0) > 0)
        assert (ACCOUNT.held["/huge"], ACCOUNT.held["/next"]) == (0, unread)
        await reader.readexactly(HUGE)
        await until(lambda: ACCOUNT.held["/next"] == 0)
    assert set(ACCOUNT.held.values()) == {0}


async def test_a_client_that_reads_slowly_gets_the_whole_answer(monkeypatch):
    monkeypatch.setattr(Quick, "answer_stall_s", 0.2)
    answer = 0
    async with connected() as (reader, writer):
        writer.write(b"GET /huge HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        while chunk := await reader.read(2**20):
            answer += len(chunk)
            await asyncio.sleep(0.002)
    assert answer > HUGE


def staged(method: str = "GET", closing: Sequence[bool] = ()) -> tuple[_StagedTransport, list[Any]]:
    """Return a transport for one request, and a list that will contain what it writes. `closing` says before which
    writes the client has disconnected."""
    events: list[Any] = []
    answers = iter(closing)
    transport = SimpleNamespace(is_closing=lambda: next(answers, False), write=events.append)
    protocol = SimpleNamespace(transport=transport, close_in_steps=lambda: events.append("close"))
    return _StagedTransport(protocol, method), events  # type: ignore[arg-type]


HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def test_nothing_is_written_to_a_connection_that_is_closed():
    """uvloop would raise an error, which would be logged as a fault of the service."""
    transport, written = staged("HEAD", closing=[False, True])
    transport.write(b"first")
    transport.write(b"second")
    assert written == [b"first"]


@pytest.mark.parametrize(
    ("method", "writes", "expected"),
    [
        ("GET", [HEAD, b"12", b"345"], [HEAD + b"12", b"345"]),
        ("GET", [HEAD, b""], [HEAD]),  # for example status 204
        ("POST", [CONTINUE, HEAD, b"12345"], [CONTINUE, HEAD + b"12345"]),
        ("GET", [STREAM, b"5\r\n12345\r\n"], [STREAM, b"5\r\n12345\r\n"]),
        ("HEAD", [HEAD], [HEAD]),
        ("GET", [HEAD, BIG], [HEAD, BIG]),
    ],
    ids=["pieces", "empty", "continue", "stream", "HEAD", "large"],
)
def test_the_head_is_written_with_the_beginning_of_the_body(method, writes, expected):
    transport, written = staged(method)
    for data in writes:
        transport.write(data)
    assert written == expected


def test_a_head_is_sent_even_if_the_application_fails_before_the_body():
    transport, events = staged()
    transport.write(HEAD)
    transport.close()
    assert events == [HEAD, "close"]


async def test_an_answer_is_written_at_once():
    written = []

    class Recording(Quick):
        def connection_made(self, transport):
            class Transport:
                """The transport of the connection. It records what is written."""

                def __getattr__(self, name):
                    return getattr(transport, name)

                def write(self, data):
                    written.append(bytes(data))
                    transport.write(data)

            super().connection_made(Transport())  # type: ignore[arg-type]

    async with connected(Recording) as (reader, writer):
        for method in (b"GET", b"HEAD", b"GET"):
            writer.write(GET.replace(b"GET", method))
            await reader.readuntil(b"\r\n\r\n")
            assert method == b"HEAD" or await reader.readexactly(1) == b"0"
    assert [piece.endswith(b"\r\n\r\n0") for piece in written] == [True, False, True]


SLOW_BODY = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"


@pytest.mark.parametrize("head_start", [0, 500_000])
async def test_a_body_that_stalls_is_told_so_in_time(monkeypatch, head_start):
    """Also if most of it came quickly: it is in memory until the request ends."""
    monkeypatch.setattr("service.http_protocol.BODY_GRACE_S", 0.2)
    async with connected() as (reader, writer):
        started = time.monotonic()
        writer.write(SLOW_BODY + bytes(head_start))
        answer = asyncio.create_task(rest(reader))
        while not answer.done() and time.monotonic() - started < 5:
            writer.write(b"a")
            await asyncio.sleep(0.02)
        assert statuses(await answer) == [408]
        assert b"the minimum rate is 4096 bytes per second" in await answer
        assert 0.15 < time.monotonic() - started < 2


async def test_a_body_at_the_least_rate_is_accepted(monkeypatch):
    monkeypatch.setattr("service.http_protocol.BODY_GRACE_S", 0.2)
    monkeypatch.setattr(Quick, "min_bytes_per_s", 5_000)
    async with connected() as (reader, writer):
        writer.write(SLOW_BODY.replace(b"1000000", b"20000"))
        for _ in range(20):
            writer.write(bytes(1000))
            await asyncio.sleep(0.04)
        assert b"200" in await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(5) == b"20000"


async def test_a_client_is_not_blamed_for_what_the_application_does_not_read(monkeypatch):
    monkeypatch.setattr("service.http_protocol.BODY_GRACE_S", 0.1)
    async with connected() as (reader, writer):
        writer.write(GET.replace(b"/ ", b"/slow ") + SLOW_BODY)  # the second request waits for the first
        writer.write(bytes(1_000_000))
        assert statuses(await reader.readuntil(b"\r\n\r\n0")) == [200]
        assert statuses(await reader.readuntil(b"\r\n\r\n1000000")) == [200]


async def test_connections_beyond_the_limit_are_answered_and_closed_at_once(monkeypatch):
    refused: list[None] = []
    places = Connections(4, 0.5)
    places.on_refused = lambda: refused.append(None)
    monkeypatch.setattr(Quick, "places", places)
    async with connected() as (_, first):
        peer = first.get_extra_info("peername")
        async with more(peer) as (second, writer), more(peer) as (third, _):
            answer = await rest(third)
            assert statuses(answer) == [503]
            assert b'"code":"too_many_connections"' in answer
            writer.write(GET)
            assert statuses(await second.readuntil(b"\r\n\r\n0")) == [200]
            assert len(refused) == 1
            assert places.open == 2
        await until(lambda: places.open == 1)
        async with more(peer) as (again, writer):
            writer.write(GET)
            assert statuses(await again.readuntil(b"\r\n\r\n0")) == [200]
    await until(lambda: places.open == 0)


def test_each_address_has_a_share_of_the_connections_and_a_proxy_has_none():
    places = Connections(100, 0.5)
    assert sum(places.admit("192.0.2.1") is not None for _ in range(100)) == 50
    assert places.admit("192.0.2.2") is not None
    assert places.admit("2001:db8::1") == places.admit("2001:db8::2") == "2001:db8::/64"
    proxied = Connections(100, 0.5, are_of_proxies=True)
    assert sum(proxied.admit("192.0.2.1") is not None for _ in range(200)) == 100
