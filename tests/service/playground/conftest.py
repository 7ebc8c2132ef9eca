"""A real service with some images, and pages in a real browser that record all requests and faults."""

import json
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.service.playground.scenes import scene
from tests.service.test_server import Server

playwright = pytest.importorskip("playwright.async_api", reason="drives a browser: pip install '.[test]'")

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))), None)
ARGUMENTS = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--no-sandbox",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with the demo model and the collection `shop`: 24 items with stored images, in two brands."""
    folder = tmp_path_factory.mktemp("playground")
    server = Server(folder / "data")
    try:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            client.put("/v1/collections/shop", json={"originals": True}).raise_for_status()
            files = [("file", (f"{number}.jpg", scene(number), "image/jpeg")) for number in range(24)]
            fields = {
                "id": [f"shelf/{number:02}" for number in range(24)],
                "metadata": [
                    json.dumps({"brand": ("Arla", "Oatly")[number % 2], "price": number}) for number in range(24)
                ],
            }
            client.post("/v1/collections/shop/items", files=files, data=fields).raise_for_status()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def api(server: Server) -> Iterator[httpx.Client]:
    """A client of the service."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run all asynchronous tests of this folder in one event loop, because the browser is shared."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Any]:
    if PROGRAM is None:
        pytest.skip("no Chromium is installed: apt install chromium-headless-shell")
    async with playwright.async_playwright() as started:
        browser = await started.chromium.launch(executable_path=PROGRAM, args=ARGUMENTS)
        yield browser
        await browser.close()


@dataclass
class Faults:
    """What a page must not do: requests to other origins, messages of errors, violations of the policy."""

    origin: str
    foreign: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def watch(self, page: Any) -> None:
        page.on("request", lambda request: self._check(request.url))
        page.on("console", lambda message: self._note(message.type, message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))

    def _check(self, url: str) -> None:
        if not url.startswith((self.origin + "/", f"blob:{self.origin}/")):
            self.foreign.append(url)

    def _note(self, kind: str, text: str) -> None:
        # Chromium reports every answer with a status of 400 and above, also those that a test asks for.
        if kind in ("error", "warning") and not text.startswith("Failed to load resource"):
            self.messages.append(text)


@asynccontextmanager
async def watched_page(browser: Any, url: str) -> AsyncIterator[Any]:
    """Open an empty page at the address of a service, 1440 pixels wide. Afterwards, it must have no faults."""
    context = await browser.new_context(
        base_url=url, viewport={"width": 1440, "height": 900}, permissions=["camera", "clipboard-write"]
    )
    faults = Faults(url)
    context.on("page", faults.watch)
    page = await context.new_page()
    page.set_default_timeout(20_000)
    yield page
    await context.close()
    assert faults.foreign == []
    assert faults.messages == []


@pytest_asyncio.fixture(loop_scope="session")
async def page(browser: Any, server: Server) -> AsyncIterator[Any]:
    """An empty page at the address of the shared service."""
    async with watched_page(browser, server.url) as page:
        yield page


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with an image that is in no collection."""
    path = tmp_path_factory.mktemp("files") / "photo.jpg"
    path.write_bytes(scene(100))
    return path
