"""Tests of CORS: which pages a browser lets call the service, with raw requests and with a browser."""

import asyncio
import base64
import http.server
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.cors import parse_origins
from service.settings import Settings
from service.starting import Starting
from tests.fakes import photo, running
from tests.service.test_server import Server

EMBED = "/v1/embeddings"
PAGE = "https://app.example"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


def cors_headers(answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control")}


async def test_without_the_setting_there_are_no_cors_headers(tmp_path):
    async with running(tmp_path) as run:
        preflight = await run.client.options(EMBED, headers=PREFLIGHT)
        answer = await run.client.get("/v1/models", headers={"Origin": PAGE})
    assert (preflight.status_code, preflight.headers["Allow"]) == (405, "POST")
    assert cors_headers(preflight) == cors_headers(answer) == {}
    assert "Vary" not in answer.headers


@pytest.mark.parametrize(("setting", "allowed"), [("*", "*"), (f"http://localhost:3000, {PAGE}", PAGE)])
async def test_pages_of_allowed_origins_may_call_every_route(tmp_path, setting, allowed):
    async with running(tmp_path, cors_origins=setting) as run:
        preflight = await run.client.options("/v1/collections/shop/items", headers=PREFLIGHT)
        answer = await run.client.post(EMBED, json={"input": ""}, headers={"Origin": PAGE})
        lost = await run.client.get("/nothing", headers={"Origin": PAGE})
    assert (preflight.status_code, preflight.content) == (204, b"")
    assert preflight.headers["Access-Control-Allow-Headers"] == "authorization,content-type,x-stainless-os"
    methods = preflight.headers["Access-Control-Allow-Methods"].split(", ")
    assert {"GET", "POST", "PUT", "PATCH", "DELETE"} <= set(methods)
    assert preflight.headers["Access-Control-Max-Age"] == "600"
    assert (answer.status_code, lost.status_code) == (422, 404)
    for each in (preflight, answer, lost):
        assert each.headers["Access-Control-Allow-Origin"] == allowed
        assert ("Origin" in each.headers.get("Vary", "").split(", ")) == (allowed != "*")
        assert each.headers["X-Request-ID"]
        assert {"X-Request-ID", "Retry-After"} <= set(each.headers["Access-Control-Expose-Headers"].split(", "))
        assert "Access-Control-Allow-Credentials" not in each.headers


@pytest.mark.parametrize("origin", ["https://evil.example", "https://app.example.evil.example", "null", ""])
async def test_pages_of_other_origins_may_not(tmp_path, origin):
    async with running(tmp_path, cors_origins=PAGE) as run:
        preflight = await run.client.options(EMBED, headers=PREFLIGHT | {"Origin": origin})
        answer = await run.client.get("/v1/models", headers={"Origin": origin})
    assert preflight.status_code == 405
    assert cors_headers(preflight) == cors_headers(answer) == {}
    assert answer.headers["Vary"] == "Origin"  # a cache must not reuse the answer for an allowed page


async def test_a_page_learns_that_the_service_is_starting(tmp_path):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [(b"origin", PAGE.encode())]}
    await Starting(Settings(cors_origins=PAGE))(scope, asyncio.Event().wait, send)
    assert sent[0]["status"] == 503
    assert dict(sent[0]["headers"])[b"access-control-allow-origin"] == PAGE.encode()


async def test_a_page_learns_that_the_service_is_stopping(tmp_path):
    async with running(tmp_path, cors_origins="*") as run:
        run.service.lifecycle.draining = True
        preflight = await run.client.options(EMBED, headers=PREFLIGHT)
        answer = await run.client.post(EMBED, json={"input": ""}, headers={"Origin": PAGE})
    assert (preflight.status_code, answer.status_code) == (204, 503)
    assert answer.headers["Access-Control-Allow-Origin"] == "*"


def test_origins_are_read_from_a_list():
    assert parse_origins("*") == {"*"}
    assert parse_origins(" https://A.example:8443 ,http://[::1]:3000,, null") == {
        "https://a.example:8443",
        "http://[::1]:3000",
        "null",
    }


@pytest.mark.parametrize(
    "value", ["app.example", "https://app.example/", "https://*.example", "https://a b", "a://b@c"]
)
def test_what_is_not_an_origin_is_refused_at_the_start(value):
    with pytest.raises(ValueError, match="is not an origin: write scheme://host"):
        Settings(cors_origins=f"https://good.example,{value}")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))), None)
PAGE_TEXT = """<!doctype html><title>waiting</title><pre id=out></pre><script>
async function call() {
  const image = Uint8Array.from(atob("IMAGE"), c => c.charCodeAt(0));
  try {
    const answer = await fetch("URL/v1/embeddings", {
      method: "POST", body: image, headers: {"Content-Type": "image/png", "Authorization": "Bearer none"}});
    const body = await answer.json();
    const put = await fetch("URL/v1/collections/browser", {method: "PUT"});
    return `status ${answer.status}, ${body.data.length} vector, id ${answer.headers.get("X-Request-ID") !== null}, ` +
      `put ${put.status}`;
  } catch (error) { return `blocked: ${error.name}`; }
}
call().then(text => { document.getElementById("out").textContent = text; });
</script>"""


@contextmanager
def served_page() -> Iterator[tuple[str, Callable[[str], None]]]:
    """Serve one page from a port of its own. Yield the page's origin and a function that sets its text."""
    page = b""

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_args: object) -> None: ...

    def show(text: str) -> None:
        nonlocal page
        page = text.encode()

    pages = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=pages.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{pages.server_port}", show
    finally:
        pages.shutdown()
        pages.server_close()


def page_in_browser(url: str, profile: Path) -> str:
    """Open a page in the browser and return the text in its element `out` after its scripts have run."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([*command, f"--user-data-dir={profile}", url], capture_output=True, text=True, timeout=120)
    shown = re.search(r"<pre id=\"out\">(.*?)</pre>", done.stdout)
    assert shown, done.stdout + done.stderr
    return shown[1]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("allowed", [True, False])
def test_a_page_in_a_browser(tmp_path: Path, allowed: bool) -> None:
    with served_page() as (origin, show):
        settings = {"DINOV2_CORS_ORIGINS": f"https://x.example,{origin}"} if allowed else {}
        server = Server(tmp_path / "data", **settings)
        try:
            show(PAGE_TEXT.replace("URL", server.url).replace("IMAGE", base64.b64encode(photo()).decode()))
            text = page_in_browser(origin, tmp_path / "profile")
        finally:
            assert server.stop() == 0
    assert text == ("status 200, 1 vector, id true, put 201" if allowed else "blocked: TypeError")
