"""Tests of every view with results: it is drawn, it fits the window, and axe-core finds no serious fault.

    PLAYGROUND_SCREENSHOTS=docs/playground python -m pytest tests/service/playground/test_views.py

also writes the pictures of docs/playground.md.
"""

import io
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.service.playground.states import STATES, reach

AXE = Path(os.environ.get("CLIENTS_NODE_MODULES", "node_modules")) / "axe-core" / "axe.min.js"
SERIOUS_FAULTS = """async () => (await axe.run(document, { resultTypes: ["violations"] })).violations
    .filter((one) => ["serious", "critical"].includes(one.impact))
    .map((one) => `${one.id}: ${one.nodes.map((node) => node.html).join(" ").slice(0, 300)}`)"""
IS_TOO_WIDE = "() => document.documentElement.scrollWidth > window.innerWidth"
TINY_TARGETS = """() => [...document.querySelectorAll("button, summary, select, input:not([type=range], .hidden-text)")]
    .map((one) => [one.outerHTML.slice(0, 200), one.getBoundingClientRect()])
    .filter(([, box]) => box.width && Math.min(box.width, box.height) < 13)
    .map(([html]) => html)"""
SCREENSHOTS = os.environ.get("PLAYGROUND_SCREENSHOTS")
IN_THE_DOCUMENTATION = ("search", "patches", "match", "map")


async def show(page: Any, scheme: str, width: int, font_percent: int = 100) -> None:
    await page.emulate_media(color_scheme=scheme)
    await page.set_viewport_size({"width": width, "height": 900})
    await page.evaluate(f"() => {{ document.documentElement.style.fontSize = '{font_percent}%'; }}")


async def drawn(page: Any) -> Image.Image:
    """Return the picture of the window. It has many colours if the view is drawn."""
    picture = Image.open(io.BytesIO(await page.screenshot())).convert("RGB")
    assert len(picture.getcolors(picture.width * picture.height) or []) > 200
    return picture


def ground(picture: Image.Image) -> float:
    """Return the brightness of the most frequent colour, 0 to 255."""
    return sum(max(picture.getcolors(picture.width * picture.height) or [])[1]) / 3


@pytest.mark.parametrize("name", STATES)
async def test_a_view_is_drawn_and_fits_every_window(page: Any, name: str) -> None:
    await reach(page, name)
    await show(page, "light", 1440)
    picture = await drawn(page)
    assert ground(picture) > 200
    if SCREENSHOTS and name in IN_THE_DOCUMENTATION:
        picture.quantize(128).save(Path(SCREENSHOTS) / f"{name}.png", optimize=True)
    # A window of 1440 pixels has 720 CSS pixels at a zoom of 200 %. The last one has text of twice the size only.
    for width, font_percent in ((360, 100), (720, 100), (1440, 200)):
        await show(page, "dark", width, font_percent)
        assert not await page.evaluate(IS_TOO_WIDE), f"{width} pixels, text of {font_percent} %"
        assert await page.evaluate(TINY_TARGETS) == []
    await show(page, "dark", 360)
    assert ground(await drawn(page)) < 60


@pytest.mark.skipif(
    not AXE.exists(), reason="needs axe-core: npm install axe-core, and CLIENTS_NODE_MODULES=.../node_modules"
)
@pytest.mark.parametrize("name", STATES)
async def test_a_view_has_no_serious_fault_of_accessibility(page: Any, name: str) -> None:
    await reach(page, name)
    await page.evaluate(AXE.read_text())
    for scheme, width in (("light", 1440), ("dark", 360)):
        await show(page, scheme, width)
        assert await page.evaluate(SERIOUS_FAULTS) == []
