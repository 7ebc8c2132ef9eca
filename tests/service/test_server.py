"""Tests of a real server process on the bundled artifact: OpenAI's client, hostile sockets and SIGTERM."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from model.artifact import bundled_artifact, read_manifest
from tests.fakes import photo

ROOT = Path(__file__).parents[2]


class Server:
    """A separate process of `python -m service`, on a free port, without this process's settings.

    Tests that replace a part of the service pass `code`, which then runs instead.
    """

    def __init__(self, data_dir: Path, *, code: str | None = None, **settings: str) -> None:
        command = [sys.executable, *(["-m", "service"] if code is None else ["-c", code])]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DINOV2_")}
        fixed = {"DINOV2_PORT": "0", "DINOV2_THREADS": "1", "DINOV2_BATCH_MAX_PATCHES": "2048"}
        given = fixed | {"DINOV2_DATA_DIR": str(data_dir)} | settings
        self.log = data_dir.with_suffix(".log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=clean | given, stdout=subprocess.PIPE, stderr=log)
        self.greeting = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.greeting += line.decode()
            if '{"input"' in self.greeting:
                break
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.greeting)
        assert found, f"not started: {self.log.read_text()}"
        self.url, self.port = found[0], int(found[1])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()  # what a failed test would leave behind; nothing to a process that has ended
            self.close()

    def close(self) -> None:
        """Close the output pipe of a process that has ended."""
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server") / "data")
    yield started
    assert started.stop() == 0


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def as_base64(image: bytes) -> str:
    return base64.b64encode(image).decode()


@pytest.mark.parametrize("encoding", ["float", "base64", openai.NOT_GIVEN])
def test_openais_client_embeds(client, encoding):
    images = [as_base64(photo(1)), "data:image/png;base64," + as_base64(photo(2))]
    answer = client.embeddings.create(model="auto", input=images, encoding_format=encoding)
    found = [row.embedding for row in answer.data]
    if encoding == "base64":
        found = [np.frombuffer(base64.b64decode(text), "<f4") if isinstance(text, str) else text for text in found]
    vectors = np.array(found, np.float32)
    dims = read_manifest(bundled_artifact()).config.embed_dim
    assert vectors.shape == (2, dims)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert answer.usage.total_tokens > 2
    assert [row.index for row in answer.data] == [0, 1]


def test_openais_client_lists_models(client):
    assert [model.id for model in client.models.list()] == [bundled_artifact().name]
    assert client.models.retrieve(bundled_artifact().name).owned_by == "dinov2-service"


def test_openais_client_parses_errors(client):
    with pytest.raises(openai.UnprocessableEntityError) as broken:
        client.embeddings.create(model="auto", input=["%%%"])
    assert (broken.value.code, broken.value.param) == ("broken_image", "input")
    with pytest.raises(openai.NotFoundError) as other:
        client.embeddings.create(model="text-embedding-3-small", input=[as_base64(photo())])
    assert other.value.code == "model_not_found"
    assert bundled_artifact().name in other.value.message


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_line_in_the_greeting_works(server):
    line = next(line for line in server.greeting.splitlines() if '{"input"' in line)
    answer = subprocess.run(line.strip(), shell=True, capture_output=True, check=True, timeout=20)
    assert len(json.loads(answer.stdout)["data"][0]["embedding"]) > 8
    assert bundled_artifact().name in server.greeting
    assert "the demo model; for DINOv2's published weights: make run MODEL=dinov2_vits14" in server.greeting


def talk(port: int, request: bytes) -> bytes:
    """Send bytes and return the answer: everything until the server closes the connection, or what has arrived with the
    headers if the server keeps the connection open.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
            if b"\r\n\r\n" in answer and b"connection: close" not in answer.lower():
                break
    return answer


def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_sent(server):
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99999999999\r\n\r\n"
    answer = talk(server.port, head)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()
    assert b"payload_too_large" in answer


def test_a_request_line_without_end_is_refused(server):
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        sent = 0
        try:
            connection.sendall(b"GET /")
            for _ in range(50):
                connection.sendall(b"a" * 2**20)
                sent += 1
            answer = connection.recv(65536)
        except ConnectionError:
            pass
    assert sent < 20  # MiB, most of it in the sockets' buffers
    assert b"200" not in answer
    assert httpx.get(f"{server.url}/livez").elapsed.total_seconds() < 2


def log_line(server: Server, request_id: str) -> dict:
    """Return the line of the access log with this request id."""
    for _ in range(100):
        for line in server.log.read_text().splitlines():
            if request_id in line and '"service.access"' in line:
                return json.loads(line)
        time.sleep(0.02)
    raise AssertionError(f"no line has the request id {request_id}")


@pytest.mark.parametrize(
    ("request_bytes", "status", "code", "method", "path"),
    [
        (b"\x16\x03\x01\x02\x00", 400, "bad_request", "other", ""),
        (b"GET /v1/models HTTP/1.1\r\n\r\n", 400, "bad_request", "GET", "/v1/models"),
        (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "bad_request", "GET", "/v1/models"),
        (b"GET /v1/models?q=1 HTTP/1.1\r\nHost: x\r\nA B: c\r\n\r\n", 400, "bad_request", "other", "/v1/models"),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 70_000, 431, "head_too_large", "other", "/livez"),
        (
            b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            400,
            "bad_request",
            "POST",
            "/v1/embeddings",
        ),
    ],
    ids=["not http", "no host", "two hosts", "header", "large head", "chunk"],
)
def test_a_malformed_request_is_answered_logged_and_counted(server, request_bytes, status, code, method, path):
    answer = talk(server.port, request_bytes)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close" in head
    [request_id] = re.findall(rb"x-request-id: (\w+)", head)
    problem = json.loads(body)
    if path == "/v1/embeddings":
        assert problem["error"]["code"] == code
    else:
        assert b"application/problem+json" in head
        assert (problem["code"], problem["status"], problem["instance"]) == (code, status, path)
        assert problem["request_id"] == request_id.decode()
    line = log_line(server, request_id.decode())
    assert (line["status"], line["code"], line["method"], line["path"]) == (status, code, method, path)
    assert line["client"] == "127.0.0.1"
    assert line["detail"]
    counted = f'dinov2_requests_total{{method="{method}",route="unmatched",status="{status}"}}'
    assert counted in httpx.get(f"{server.url}/metrics").text


@pytest.mark.parametrize("told", [True, False], ids=["content-length", "chunked"])
def test_a_body_above_the_limit_is_refused_by_an_answer_and_not_by_a_reset(tmp_path_factory, told):
    server = Server(
        tmp_path_factory.mktemp("small") / "data", DINOV2_MAX_BODY_BYTES="1000000", DINOV2_MAX_IMAGE_BYTES="9"
    )
    piece = bytes(1_000_000)
    try:
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
                head += b"Content-Length: 30000000\r\n\r\n" if told else b"Transfer-Encoding: chunked\r\n\r\n"
                connection.sendall(head)
                for _ in range(30):  # all of it, before the answer is read
                    connection.sendall(piece if told else b"f4240\r\n" + piece + b"\r\n")
                answer = b""
                while chunk := connection.recv(65536):
                    answer += chunk
            assert answer.startswith(b"HTTP/1.1 413 ")
            assert b"payload_too_large" in answer
    finally:
        assert server.stop() == 0


def test_a_body_without_room_in_memory_is_refused_by_an_answer_and_not_by_a_reset(tmp_path):
    limits = {"DINOV2_MAX_BODY_BYTES": "9000000", "DINOV2_MAX_BUFFERED_BYTES": "9000000", "DINOV2_MAX_IMAGE_BYTES": "9"}
    server = Server(tmp_path / "data", **limits, DINOV2_CLIENT_SHARE="1")
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 8000000\r\n\r\n"
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as first:
            first.sendall(head + bytes(7_000_000))
            time.sleep(0.3)
            for _ in range(5):
                with socket.create_connection(("127.0.0.1", server.port), timeout=10) as second:
                    second.sendall(head + bytes(8_000_000))
                    answer = second.recv(65536)
                assert answer.startswith(b"HTTP/1.1 503 ")
                assert b"retry-after: 1" in answer
    finally:
        assert server.stop() == 0


def test_slow_large_bodies_of_one_client_leave_room_for_its_other_requests(tmp_path):
    """The largest legal bodies, sent except for the last byte, occupy only the share of their client."""
    limits = {
        "DINOV2_MAX_BODY_BYTES": "4000000",
        "DINOV2_MAX_BUFFERED_BYTES": "32000000",
        "DINOV2_MAX_IMAGE_BYTES": "9",
    }
    server = Server(tmp_path / "data", **limits)
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 4000000\r\n\r\n"
    try:
        with contextlib.ExitStack() as stack:
            slow = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10)) for _ in range(8)]
            for connection in slow:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(head + bytes(3_999_999))
            refused = b""
            for connection in slow:
                connection.settimeout(0.5)
                with contextlib.suppress(TimeoutError, ConnectionError):
                    refused += connection.recv(65536)
            assert refused.count(b"HTTP/1.1 429 ") == 4  # four of them are a half
            assert b"share_used" in refused
            metrics = httpx.get(f"{server.url}/metrics").text
            assert 15e6 < float(re.search(r"^dinov2_buffered_bytes (\S+)", metrics, re.MULTILINE)[1]) <= 16e6
            assert httpx.get(f"{server.url}/readyz").status_code == 200
    finally:
        assert server.stop() == 0


def test_connections_beyond_the_limit_are_refused_and_counted(tmp_path):
    server = Server(tmp_path / "data", DINOV2_MAX_CONNECTIONS="8")
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10))
            with httpx.Client() as client:
                assert client.get(f"{server.url}/livez").status_code == 200
                assert talk(server.port, b"").startswith(b"HTTP/1.1 503 ")  # half of 8 are open
                metrics = client.get(f"{server.url}/metrics").text
        assert "dinov2_connections 4.0" in metrics
        assert "dinov2_refused_connections_total 1.0" in metrics
        assert httpx.get(f"{server.url}/livez").status_code == 200
    finally:
        assert server.stop() == 0


def test_an_upgrade_loses_no_body_and_no_settings(server):
    upgrade = (
        b"Host: x\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"
    )
    image, settings = photo(), b'{"dtype": "float16"}'
    head = b"POST /v1/embeddings HTTP/1.1\r\n" + upgrade + b"Content-Type: image/png\r\nContent-Length: %d\r\n\r\n"
    assert b'"object":"embedding"' in talk(server.port, head % len(image) + image)
    head = b"PUT /v1/collections/upgraded HTTP/1.1\r\n" + upgrade + b"Content-Type: application/json\r\n"
    answer = talk(server.port, head + b"Content-Length: %d\r\n\r\n" % len(settings) + settings)
    assert answer.startswith(b"HTTP/1.1 201")
    assert b'"dtype":"float16"' in answer


def test_forwarded_addresses_are_believed_only_if_a_proxy_is_trusted(server):
    httpx.get(f"{server.url}/livez", headers={"X-Forwarded-For": "6.6.6.6", "X-Request-ID": "forwarded-once"})
    assert log_line(server, "forwarded-once")["client"] == "127.0.0.1"


def test_a_connection_without_headers_is_closed(tmp_path):
    server = Server(tmp_path / "data", DINOV2_HEADER_TIMEOUT_S="0.5")
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHo")
        assert connection.recv(100) == b""
    assert server.stop() == 0


def test_headers_cannot_be_injected(server):
    request = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-ID: a\tSet-Cookie: b=c\r\n\r\n"
    answer = talk(server.port, request)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"set-cookie" not in answer.lower()


def test_the_log_has_one_line_a_request_and_no_image(server):
    secret = as_base64(photo(77))
    httpx.post(f"{server.url}/v1/embeddings", json={"input": secret}, headers={"X-Request-ID": "seen-once"})
    lines = []
    for _ in range(100):
        lines = [line for line in server.log.read_text().splitlines() if "seen-once" in line]
        if lines:
            break
        time.sleep(0.02)
    assert len(lines) == 1
    line = json.loads(lines[0])
    assert (line["route"], line["status"]) == ("/v1/embeddings", 200)
    assert line["ms"] > 0
    assert secret[:60] not in server.log.read_text()


def test_sigterm_finishes_what_is_in_flight_and_refuses_the_rest(tmp_path):
    server = Server(tmp_path / "data", DINOV2_SHUTDOWN_GRACE_S="20")
    image = photo(5)
    head = (
        "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nConnection: close\r\n"
        f"Content-Length: {len(image)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as slow:
        slow.sendall(head + image[:100])  # in flight: the rest comes after SIGTERM
        for _ in range(200):
            if "dinov2_requests_in_flight 1.0" in httpx.get(f"{server.url}/metrics").text:
                break
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        refused = None
        for _ in range(200):
            refused = httpx.post(f"{server.url}/v1/embeddings", content=image, headers={"Content-Type": "image/png"})
            if refused.status_code == 503:
                break
            time.sleep(0.02)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert "Retry-After" in refused.headers
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        assert server.process.poll() is None
        slow.sendall(image[100:])
        answer = b""
        while chunk := slow.recv(65536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 200")
    assert server.process.wait(20) == 0
    server.close()


HALF_SENT = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 50\r\n\r\nhalf"


def seconds_to_stop(server, signals):
    """Return how long the server takes to stop while a request that never ends is running."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as stuck:
        stuck.sendall(HALF_SENT)
        time.sleep(0.3)
        started = time.monotonic()
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        server.process.wait(30)
        seconds = time.monotonic() - started
        server.close()
        return seconds


def test_shutdown_waits_for_its_limit_and_not_beyond(tmp_path):
    assert 3 <= seconds_to_stop(Server(tmp_path / "data", DINOV2_SHUTDOWN_GRACE_S="3"), signals=1) < 6


def test_a_second_signal_ends_it_at_once(tmp_path):
    assert seconds_to_stop(Server(tmp_path / "data", DINOV2_SHUTDOWN_GRACE_S="20"), signals=2) < 8


STUCK = """
import sys, time, service.features.pipeline
service.features.pipeline.{name} = lambda *_, **options: print("stuck", file=sys.stderr, flush=True) or time.sleep(600)
from service.__main__ import main
sys.exit(main())
"""


def test_a_decode_that_never_ends_does_not_keep_the_process(tmp_path):
    server = Server(tmp_path / "data", code=STUCK.format(name="decode"), DINOV2_SHUTDOWN_GRACE_S="1")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/embeddings", content=photo(), headers={"Content-Type": "image/png"}, timeout=1)
    assert "stuck" in server.log.read_text()
    assert server.stop() == 0
    assert "Finished server process" in server.log.read_text()


def test_a_thread_of_the_event_loop_that_never_ends_does_not_keep_the_process(tmp_path):
    code = STUCK.replace("service.features.pipeline", "service.routes.vision").format(name="_see")
    server = Server(tmp_path / "data", code=code, DINOV2_SHUTDOWN_GRACE_S="1")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/segment", content=photo(), headers={"Content-Type": "image/png"}, timeout=2)
    assert "stuck" in server.log.read_text()
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("DINOV2_QUEUE_MAX_IMAGE", "5", "did you mean DINOV2_QUEUE_MAX_IMAGES"),
        ("DINOV2_MODEL", "/nowhere", "not an artifact folder"),
        ("DINOV2_MODEL", "dinov2_vits41", "dinov2_vits14"),
    ],
)
def test_what_is_wrong_is_told_in_a_line_before_it_starts(tmp_path, setting, value, message):
    assert message in why_not_started(tmp_path, **{setting: value})


def why_not_started(data_dir, **settings):
    """Return the one line that a failed start prints."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("DINOV2_")}
    environment |= {"DINOV2_DATA_DIR": str(data_dir), "DINOV2_PORT": "0"} | settings
    done = subprocess.run(
        [sys.executable, "-m", "service"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert len(line) < 700
    assert done.stderr.count("error: ") == 1
    return line


def test_a_store_that_is_not_ours_is_told_in_a_line(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "search.sqlite3")) as foreign:
        foreign.execute("CREATE TABLE theirs (a)")
    assert f"{tmp_path / 'search.sqlite3'} is not a vector store" in why_not_started(tmp_path)


def test_a_damaged_store_is_told_in_a_line(tmp_path):
    (tmp_path / "search.sqlite3").write_bytes(b"\x07" * 9000)
    assert "damaged or not a database" in why_not_started(tmp_path)


def test_a_broken_manifest_is_told_in_a_line(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": 1')
    assert "not a manifest of format 1" in why_not_started(tmp_path, DINOV2_MODEL=str(tmp_path))


def test_a_bad_redis_url_is_told_in_a_line(tmp_path):
    line = why_not_started(tmp_path, DINOV2_REDIS_URL="redis://:s3cret@host:abc")
    assert "redis_url: not a valid URL" in line
    assert "s3cret" not in line


def test_a_port_in_use_is_told_in_a_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}: " in why_not_started(tmp_path, DINOV2_PORT=str(port))
