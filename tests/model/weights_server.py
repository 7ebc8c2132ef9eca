"""A local server of published weights that can misbehave in many ways."""

import http.server
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Server(http.server.ThreadingHTTPServer):
    """A server that returns `content` under any path. Its fields select how it misbehaves. `requests` contains the
    path, the Range and the If-Range header of each request.
    """

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.etag: str | None = '"v1"'
        self.ranges = True
        self.sent_per_connection: list[int] = []  # bytes after which the next connections drop, one after another
        self.statuses: list[int] = []  # what the next requests are answered, one after another
        self.wrong_answers = 0  # how many of the next answers have a changed byte
        self.pause_s = 0.0  # the pause after each 64th of an answer
        self.redirect_etag: str | None = None  # as Hugging Face: redirect with this X-Linked-ETag
        self.requests: list[tuple[str, str | None, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/mirror"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked, if_range = self.server, self.headers.get("Range"), self.headers.get("If-Range")
        server.requests.append((self.path, asked, if_range))
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        if server.redirect_etag and "/cdn" not in self.path:
            self.send_response(302)
            self.send_header("Location", f"{server.url}/cdn")
            self.send_header("X-Linked-ETag", server.redirect_etag)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = 0
        if asked and server.ranges and (if_range is None or if_range == server.etag):
            match = re.fullmatch(r"bytes=(\d+)-", asked)
            assert match is not None
            start = int(match.group(1))
            if start >= len(server.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        else:
            self.send_response(200)
        body = server.content[start:]
        if server.wrong_answers:
            server.wrong_answers -= 1
            body = body[:20_000] + bytes([body[20_000] ^ 1]) + body[20_001:]
        self.send_header("Content-Length", str(len(body)))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        if server.sent_per_connection:
            body = body[: server.sent_per_connection.pop(0)]
        step = len(body) if not server.pause_s else -(-len(body) // 64)
        for at in range(0, len(body), max(1, step)):
            self.wfile.write(body[at : at + step])  # a body shorter than announced: the connection drops midway
            if server.pause_s:
                time.sleep(server.pause_s)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@contextmanager
def weights_server(content: bytes) -> Iterator[Server]:
    """Run a server in a thread."""
    with Server(content) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()
