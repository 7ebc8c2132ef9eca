"""Tests of the view "Image": the heat map of a patch here and in similar images, and the search by a region."""

import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.playground.scenes import scene


def units(api: httpx.Client, image: bytes, size: int = 336) -> np.ndarray:
    """Return the patch features [h, w, D] of an image, scaled to length 1."""
    answer = api.post("/v1/features", files={"file": ("a.jpg", image)}, data={"format": "npy", "size": size})
    features = np.load(io.BytesIO(answer.raise_for_status().content))
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


async def open_image(page: Any, item: str = "shelf/01", tab: str = "patches") -> None:
    await page.goto("about:blank")
    await page.goto(f"/#image?collection=shop&item={item}&tab={tab}")
    await page.wait_for_selector("#stage")


async def at_patch(page: Any, row: int, column: int, grid: tuple[int, ...]) -> dict[str, float]:
    """The position of the centre of a patch on the canvas."""
    box = await page.locator("#stage").bounding_box()
    return {"x": (column + 0.5) * box["width"] / grid[1], "y": (row + 0.5) * box["height"] / grid[0]}


async def readout(page: Any) -> dict[str, str]:
    return await page.eval_on_selector("#patch-readout", "one => ({ ...one.dataset })")


async def test_the_heat_map_shows_the_similarity_of_the_features(page: Any, api: httpx.Client) -> None:
    features = units(api, scene(1))
    grid = features.shape[:2]
    await open_image(page)
    await page.wait_for_selector("#patch-readout[data-ready]")
    times = []
    for row, column in [(5, 7), (0, 0), (grid[0] - 1, grid[1] - 1), (12, 20)]:
        await page.locator("#stage").click(position=await at_patch(page, row, column, grid))
        expected = features @ features[row, column]
        for other in [(row, column), (3, 4), (11, 25)]:
            await page.locator("#stage").hover(position=await at_patch(page, *other, grid))
            shown = await readout(page)
            assert (int(shown["row"]), int(shown["column"])) == (row, column)
            assert (int(shown["atRow"]), int(shown["atColumn"])) == other
            assert float(shown["similarity"]) == pytest.approx(float(expected[other]), abs=1e-4)
        assert float(shown["low"]) == pytest.approx(float(expected.min()), abs=1e-4)
        assert float(shown["high"]) == pytest.approx(1, abs=1e-4)
        times.append(float(shown["ms"]))
    print(f"click to heat map in ms: {times}")
    assert min(times) < 1000


async def test_an_image_that_is_decoded_slowly_does_not_replace_a_newer_one(page: Any, image_file: Path) -> None:
    await page.goto("/#image")
    await page.wait_for_selector("#view-image input[type='file']", state="attached")
    await page.evaluate(
        """() => {
          const decode = window.createImageBitmap.bind(window);
          window.finished = [];
          window.createImageBitmap = async (blob, options) => {
            if (blob.name === "slow.jpg") await new Promise((done) => { window.goOn = done; });
            const bitmap = await decode(blob, options);
            window.finished.push(blob.name);
            return bitmap;
          };
        }"""
    )
    await page.set_input_files(
        "#view-image input[type='file']", {"name": "slow.jpg", "mimeType": "image/jpeg", "buffer": scene(1, 640, 480)}
    )
    await page.wait_for_function("() => window.goOn")
    await page.set_input_files("#view-image input[type='file']", image_file)
    await page.wait_for_selector("#patch-readout[data-ready]")
    await page.evaluate("window.goOn()")
    await page.wait_for_function("() => window.finished.includes('slow.jpg')")
    assert "photo.jpg, 320 × 240 pixels" in await page.inner_text(".stage-column p")


async def test_arrow_keys_choose_a_patch(page: Any, api: httpx.Client) -> None:
    features = units(api, scene(1))
    await open_image(page)
    await page.wait_for_selector("#patch-readout[data-ready]")
    before = await readout(page)
    await page.focus("#stage")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        await page.keyboard.press(key)
    await page.keyboard.press("Shift+ArrowLeft")
    shown = await readout(page)
    row, column = int(before["row"]) + 1, int(before["column"]) + 2
    assert (int(shown["row"]), int(shown["column"])) == (row, column)
    expected = float(features[row, column - 1] @ features[row, column])
    assert float(shown["similarity"]) == pytest.approx(expected, abs=1e-4)
    assert f"{expected:.3f}" in await page.inner_text("#patch-readout")
    assert f"{expected:.3f}" in await page.get_attribute("#stage", "aria-label")


async def test_the_colours_follow_the_similarity(page: Any, api: httpx.Client) -> None:
    features = units(api, scene(1))
    grid = features.shape[:2]
    await open_image(page)
    await page.wait_for_selector("#patch-readout[data-ready]")
    await page.get_by_label("Opacity").fill("1")
    await page.locator("#stage").click(position=await at_patch(page, 5, 7, grid))
    await page.locator("#stage").hover(position=await at_patch(page, 0, 0, grid))
    await page.mouse.move(1, 1)
    similarity = features @ features[5, 7]
    low = np.unravel_index(similarity.argmin(), grid)
    read = """async ([places, rows, columns]) => {
        await new Promise(requestAnimationFrame);
        const stage = document.getElementById("stage");
        const { data } = stage.getContext("2d").getImageData(0, 0, stage.width, stage.height);
        return places.map(([row, column]) => {
            const x = Math.floor((column + 0.5) * stage.width / columns);
            const y = Math.floor((row + 0.5) * stage.height / rows);
            return [...data.slice(4 * (y * stage.width + x)).slice(0, 3)];
        });
    }"""
    dark, bright = await page.evaluate(read, [[[int(low[0]), int(low[1])], [5, 7]], *grid])
    assert sum(dark) < sum(bright)
    assert bright[0] > 150  # yellow
    assert dark[1] < 90  # dark blue


async def test_the_patch_is_shown_in_similar_images(page: Any, api: httpx.Client) -> None:
    grid = units(api, scene(1)).shape[:2]
    await open_image(page)
    await page.wait_for_selector("#patch-readout[data-ready]")
    await page.locator("#stage").click(position=await at_patch(page, 5, 7, grid))
    await page.select_option("#patch-collection", "shop")
    await page.fill("#similar-count", "3")
    await page.click("#show-similar")
    await page.locator("#patch-results [data-highest]").nth(2).wait_for()
    found = api.post("/v1/collections/shop/search", files={"file": scene(1)}, data={"k": 3}).json()["data"]
    ids = await page.eval_on_selector_all("#patch-results li", "all => all.map(one => one.dataset.id)")
    assert ids == [hit["id"] for hit in found]
    for patch in [(5, 7), (12, 20)]:
        await page.locator("#stage").click(position=await at_patch(page, *patch, grid))
        vector = units(api, scene(1))[patch]
        shown = await page.eval_on_selector_all(
            "#patch-results li", "all => all.map(one => Number(one.dataset.highest))"
        )
        expected = [float((units(api, scene(int(item[-2:]))) @ vector).max()) for item in ids]
        assert shown == pytest.approx(expected, abs=1e-4)


async def test_a_region_is_searched_if_the_pooling_is_mean(page: Any, api: httpx.Client) -> None:
    api.put("/v1/collections/parts", json={"pooling": "mean", "originals": True}).raise_for_status()
    try:
        files = [("file", (f"{number}.jpg", scene(number))) for number in range(3)]
        api.post("/v1/collections/parts/items", files=files, data={"id": ["a", "b", "c"]}).raise_for_status()
        await open_image(page)
        await page.wait_for_selector("#patch-readout[data-ready]")
        await page.select_option("#patch-collection", "shop")
        assert await page.is_disabled("#search-region")
        assert "pooling cls" in await page.inner_text("#region-note")
        await page.select_option("#patch-collection", "parts")
        async with page.expect_response("**/parts/search") as waited:
            await page.click("#search-region")
        answer = await (await waited.value).json()
        await page.wait_for_selector("#patch-results li")
        ids = await page.eval_on_selector_all("#patch-results li", "all => all.map(one => one.dataset.id)")
        assert ids == [hit["id"] for hit in answer["data"]]
        assert len(ids) == 3
    finally:
        api.delete("/v1/collections/parts")


async def test_a_new_image_replaces_the_one_before(page: Any, image_file: Path) -> None:
    await open_image(page)
    await page.wait_for_selector("#patch-readout[data-ready]")
    await page.set_input_files("#view-image input[type=file]", image_file)
    await page.wait_for_selector("text=photo.jpg")
    await page.wait_for_selector("#patch-readout[data-ready]")
    broken = {"name": "<b>broken</b>.jpg", "mimeType": "image/jpeg", "buffer": b"no image"}
    await page.set_input_files("#view-image input[type=file]", files=[broken])
    assert "<b>broken</b>.jpg" in await page.inner_text("#image-body [role=alert]")
