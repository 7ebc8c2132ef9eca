"""Measure the playground in a real browser: from a click to the painted heat map, and the frames of a map.

    pip install '.[test]'; apt install chromium
    python benchmarks/playground.py [--clicks 60] [--frames 600]

The service runs with the demo model on this machine, and Chromium draws without a GPU, 1440 x 900 pixels.

Loading: the page is opened in an empty browser.

Heat map: after the patch features of a photo have arrived, patches are clicked. The time goes from the browser's time
stamp of the event to the moment after the frame with the heat map was painted, so it includes the wait for the frame.
With "6 results", the heat maps of the six most similar images of the collection are drawn as well.

Map: 10,000 vectors of 16 numbers in five clusters are laid out by principal components. It is then zoomed in and out by
the wheel in every frame. `draw_ms` is the time of the script for a frame, and `frame_ms` the time between frames; a
screen with 60 frames a second allows 16.7 ms.

The last line is the result as JSON, which is also written to benchmarks/results/.
"""

import argparse
import asyncio
import datetime
import io
import json
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from playwright.async_api import Page, async_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.services import Service
from model.engines.parity import sample_photos
from training.watch.flops import describe_device

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SIZES = (224, 336, 560)
N_POINTS = 10_000
ARGUMENTS = ["--disable-background-networking", "--disable-component-update", "--disable-gpu", "--no-sandbox"]
WATCH_CLICKS = """() => {
  window.painted = [];
  document.addEventListener("pointerdown", (event) => requestAnimationFrame(() => {
    const { port1, port2 } = new MessageChannel(); // its message arrives after the frame is painted
    port1.onmessage = () => {
      const { row, column } = document.getElementById("patch-readout").dataset;
      window.painted.push([performance.now() - event.timeStamp, Number(row), Number(column)]);
    };
    port2.postMessage(null);
  }), true);
}"""
ZOOM = """(frames) => new Promise((done) => {
  const canvas = document.getElementById("map-canvas");
  const box = canvas.getBoundingClientRect();
  const times = [], draws = [];
  const step = (now) => {
    times.push(now);
    if (times.length > 60) draws.push(Number(canvas.dataset.frameMs)); // the mean of the last 60 frames
    if (times.length > frames + 60) return done([times.slice(60).map((time, i) => time - times[59 + i]), draws.at(-1)]);
    canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: times.length % 40 < 20 ? -20 : 20,
      clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, cancelable: true }));
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
})"""


def summary(times: list[float]) -> dict[str, float]:
    return {
        "median": round(float(np.median(times)), 2),
        "p95": round(float(np.percentile(times, 95)), 2),
        "max": round(max(times), 2),
    }


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def fill(service: Service) -> None:
    """Make the collection `photos` with stored images, and the collection `many` of vectors."""
    service.client.put("/collections/photos", json={"originals": True}).raise_for_status()
    files = [("file", (f"{i}.jpg", jpeg(photo))) for i, photo in enumerate(sample_photos(8))]
    ids = {"id": [str(i) for i in range(8)]}
    service.client.post("/collections/photos/items", files=files, data=ids).raise_for_status()
    service.client.put("/collections/many", json={"fingerprint": "generated", "dimension": 16}).raise_for_status()
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 16))
    service.fill(centres[np.arange(N_POINTS) % 5] + 0.2 * rng.normal(size=(N_POINTS, 16)))


async def click_patches(page: Page, count: int) -> list[float]:
    """Click patches at random places, and return the time of each click in milliseconds."""
    rows, columns = map(int, (await page.locator("#patch-readout").get_attribute("data-grid") or "").split("x"))
    box = await page.locator("#stage").bounding_box()
    assert box is not None
    rng, times = np.random.default_rng(1), []
    for _ in range(count):
        row, column = int(rng.integers(rows)), int(rng.integers(columns))
        before = await page.evaluate("() => window.painted.length")
        x, y = (column + 0.5) * box["width"] / columns, (row + 0.5) * box["height"] / rows
        await page.locator("#stage").click(position={"x": x, "y": y})
        await page.wait_for_function("(before) => window.painted.length > before", arg=before)
        time, *shown = await page.evaluate("() => window.painted.at(-1)")
        assert shown == [row, column], f"the heat map of patch {shown} was painted, not {[row, column]}"
        times.append(time)
    return times


async def measure_loading(page: Page) -> dict[str, Any]:
    await page.goto("/", wait_until="networkidle")
    return await page.evaluate("""() => {
      const all = performance.getEntriesByType("navigation").concat(performance.getEntriesByType("resource"));
      return {
        requests: all.length,
        kilobytes: Math.round(all.reduce((sum, one) => sum + one.transferSize, 0) / 1000),
        first_contentful_paint_ms: Math.round(performance.getEntriesByName("first-contentful-paint")[0].startTime),
        loaded_ms: Math.round(Math.max(...all.map((one) => one.responseEnd))),
      };
    }""")


async def measure_clicks(page: Page, clicks: int) -> dict[str, Any]:
    found = {}
    await page.goto("/#image?collection=photos&item=0&tab=patches")
    await page.evaluate(WATCH_CLICKS)
    for size in SIZES:
        await page.select_option("#input-size", str(size))
        await page.wait_for_selector(f"#patch-readout[data-ready='{size}']")
        grid = await page.locator("#patch-readout").get_attribute("data-grid")
        found[f"{size} px, {grid} patches"] = summary(await click_patches(page, clicks))
    await page.click("#show-similar")
    for number in range(6):  # each is computed when it is in view
        card = page.locator("#patch-results .card").nth(number)
        await card.scroll_into_view_if_needed()
        await card.get_by_text("highest similarity").wait_for()
    found[f"{size} px, {grid} patches, 6 results"] = summary(await click_patches(page, clicks))
    return found


async def measure_map(page: Page, frames: int) -> dict[str, Any]:
    await page.goto("/#map?collection=many&layout=pca")
    await page.get_by_text(f"{N_POINTS} items.").wait_for(timeout=60_000)
    times, draw_ms = await page.evaluate(ZOOM, frames)
    return {"points": N_POINTS, "draw_ms": draw_ms, "frame_ms": summary(times), "late": sum(t > 25 for t in times)}


async def measure(address: str, given: argparse.Namespace) -> dict[str, Any]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    async with async_playwright() as started:
        browser = await started.chromium.launch(executable_path=program, args=ARGUMENTS)
        page = await browser.new_page(base_url=address, viewport={"width": 1440, "height": 900})
        result = {
            "loading": await measure_loading(page),
            "click_to_heat_map_ms": await measure_clicks(page, given.clicks),
            "map": await measure_map(page, given.frames),
            "browser": browser.version,
        }
        await browser.close()
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clicks", type=int, default=60, help="clicks for each size of the input")
    parser.add_argument("--frames", type=int, default=600)
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        service = Service(ROOT, Path(folder), {}, stack)
        fill(service)
        found = asyncio.run(measure(str(service.client.base_url).removesuffix("/v1/"), given))
    date = datetime.date.today().isoformat()
    result = {
        "benchmark": "playground",
        "command": f"python benchmarks/playground.py --clicks {given.clicks} --frames {given.frames}",
        "date": date,
        "machine": describe_device(torch.device("cpu")),
        **found,
    }
    (RESULTS / f"{date}-playground.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
