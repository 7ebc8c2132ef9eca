"""Tests of accessibility with axe-core: every view, light and dark, on narrow and wide screens."""

import os
from pathlib import Path
from typing import Any

import pytest

AXE = Path(os.environ.get("CLIENTS_NODE_MODULES", "node_modules")) / "axe-core" / "axe.min.js"
PAGES = ["/#search", "/#image", "/#match", "/#map", "/#collections", "/#models", "/#jobs", "/docs"]
RUN = """async () => (await axe.run(document, { resultTypes: ["violations"] })).violations
    .filter((one) => ["serious", "critical"].includes(one.impact))
    .map((one) => `${one.id}: ${one.nodes.map((node) => node.html).join(" ").slice(0, 300)}`)"""

pytestmark = pytest.mark.skipif(
    not AXE.exists(), reason="needs axe-core: npm install axe-core, and CLIENTS_NODE_MODULES=.../node_modules"
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
async def test_no_view_has_a_serious_fault(page: Any, scheme: str, width: int) -> None:
    await page.emulate_media(color_scheme=scheme)
    await page.set_viewport_size({"width": width, "height": 800})
    found = {}
    for address in PAGES:
        await page.goto("about:blank")
        await page.goto(address)
        await page.wait_for_selector("main h2")
        await page.wait_for_function("() => !document.querySelector('[aria-busy]')")
        await page.evaluate(AXE.read_text())
        if faults := await page.evaluate(RUN):
            found[address] = faults
        assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), address
    assert found == {}
