"""Tests of the view "map": positions, selections and duplicates, compared with the API's answers and with numpy."""

import csv
import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from tests.service.playground.scenes import scene

expect = pytest.importorskip("playwright.async_api").expect
Floats = npt.NDArray[np.float64]
FRAMES = 120


@pytest.fixture(scope="module")
def many(api: httpx.Client) -> Iterator[str]:
    """A collection of 10,000 generated vectors of 16 numbers, in five clusters."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 16))
    api.put("/v1/collections/many", json={"fingerprint": "generated", "dimension": 16}).raise_for_status()
    for start in range(0, 10_000, 1000):
        vectors = centres[np.arange(1000) % 5] + 0.2 * rng.normal(size=(1000, 16))
        items = [
            {
                "id": f"n{start + row}",
                "vector": vector.tolist(),
                "metadata": {"cluster": row % 5},
            }
            for row, vector in enumerate(vectors)
        ]
        api.post("/v1/collections/many/items", json={"items": items}).raise_for_status()
    yield "many"
    api.delete("/v1/collections/many").raise_for_status()


@pytest.fixture
def doubles(api: httpx.Client) -> Iterator[str]:
    """A collection of 6 items, in which a1 to a3 and b1 to b2 have equal images."""
    api.put("/v1/collections/doubles", json={"originals": True}).raise_for_status()
    ids = {"a1": 30, "a2": 30, "a3": 30, "b1": 31, "b2": 31, "c1": 32}
    files = [("file", (f"{name}.jpg", scene(number), "image/jpeg")) for name, number in ids.items()]
    api.post("/v1/collections/doubles/items", files=files, data={"id": list(ids)}).raise_for_status()
    yield "doubles"
    api.delete("/v1/collections/doubles").raise_for_status()


async def open_map(page: Any, collection: str, count: int, layout: str = "pca") -> None:
    await page.goto(f"/#map?collection={collection}&layout={layout}")
    await expect(page.locator("#map-status")).to_have_text(f"{count} items.", timeout=60_000)
    assert await page.locator("#map-progress").is_hidden()


async def saved_positions(page: Any) -> tuple[list[str], Floats]:
    """Return the ids and the positions [n, 2] of the file that the view saves."""
    async with page.expect_download() as download:
        await page.get_by_role("button", name="Save the positions (CSV)").click()
    text = (await (await download.value).path()).read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    return [row["id"] for row in rows], np.array([[float(row["x"]), float(row["y"])] for row in rows])


async def on_screen(page: Any, positions: Floats) -> Floats:
    """Return the places of positions in the window, in CSS pixels."""
    box = await page.locator("#map-canvas").bounding_box()
    scale, x, y = map(float, (await page.get_attribute("#map-canvas", "data-view")).split())
    centre = [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2]
    return (positions - [x, y]) * scale + centre


async def search_filter(page: Any) -> Any:
    await page.get_by_role("button", name="Search only in these").click()
    await page.wait_for_selector("#view-search")
    return await page.evaluate("import('/assets/state.js').then(state => state.currentFilter())")


def vectors_of(api: httpx.Client, collection: str) -> tuple[list[str], Floats]:
    body = {"include": ["vector"], "limit": 1000}
    data = api.post(f"/v1/collections/{collection}/items/scroll", json=body).json()["data"]
    return [item["id"] for item in data], np.array([item["vector"] for item in data], dtype=float)


async def test_positions_are_the_principal_components(page: Any, api: httpx.Client) -> None:
    await open_map(page, "shop", 24)
    ids, positions = await saved_positions(page)
    wanted_ids, vectors = vectors_of(api, "shop")
    assert ids == wanted_ids
    centred = vectors - vectors.mean(0)
    wanted = centred @ np.linalg.svd(centred)[2][:2].T
    wanted -= (wanted.min(0) + wanted.max(0)) / 2
    wanted *= 10 / np.abs(wanted).max()
    signs = np.sign((positions * wanted).sum(0))
    np.testing.assert_allclose(positions, wanted * signs, atol=0.05)


async def test_the_layout_by_neighbours_is_reproducible_and_keeps_clusters(page: Any, api: httpx.Client) -> None:
    await open_map(page, "shop", 24, "neighbours")
    ids, positions = await saved_positions(page)
    await page.reload()
    await expect(page.locator("#map-status")).to_have_text("24 items.")
    np.testing.assert_array_equal((await saved_positions(page))[1], positions)
    vectors = dict(zip(*vectors_of(api, "shop"), strict=True))
    cosines = np.array([[vectors[a] @ vectors[b] for b in ids] for a in ids]) - 2 * np.eye(24)
    distances = np.linalg.norm(positions[:, None] - positions, axis=2)
    rank = np.argsort(np.argsort(distances, axis=1), axis=1)[np.arange(24), cosines.argmax(1)]
    assert np.median(rank) <= 3, rank  # rank 0 is the item itself


async def test_lasso_becomes_a_filter(page: Any) -> None:
    await open_map(page, "shop", 24)
    ids, positions = await saved_positions(page)
    places = await on_screen(page, positions)
    box = await page.locator("#map-canvas").bounding_box()
    x, y, width, height = box["x"], box["y"], box["width"], box["height"]
    corners = np.round([[x + 5, y + 5], [x + 0.7 * width, y + 8], [x + 0.45 * width, y + height - 6]])
    await page.click("#map-lasso")
    assert await page.get_attribute("#map-lasso", "aria-pressed") == "true"
    await page.mouse.move(*corners[0])
    await page.mouse.down()
    for corner in corners[1:]:
        await page.mouse.move(*corner)
    await page.mouse.up()
    sides = np.roll(corners, -1, axis=0) - corners
    offsets = places[:, None] - corners
    crosses = sides[:, 0] * offsets[..., 1] - sides[:, 1] * offsets[..., 0]  # > 0: right of the side, y grows downwards
    wanted = [name for name, inside in zip(ids, (crosses > 0).all(1), strict=True) if inside]
    assert 0 < len(wanted) < 24
    assert f"{len(wanted)} item" in await page.text_content("#map-selected")
    assert await page.locator("[aria-label=Selection] .card").count() == min(len(wanted), 12)
    chosen = await search_filter(page)
    assert (chosen["field"], sorted(chosen["in"])) == ("id", sorted(wanted))


async def test_rectangle_and_legend_select_the_same_as_the_api(page: Any, api: httpx.Client) -> None:
    await open_map(page, "shop", 24)
    _, positions = await saved_positions(page)
    await page.click("#map-rectangle summary")
    for name, value in {"left": -4, "right": 8, "top": -10, "bottom": 3}.items():
        await page.fill(f"#map-{name}", str(value))
    await page.get_by_role("button", name="Select the rectangle").click()
    x, y = positions.T
    inside = (x > -4) & (x < 8) & (y < 3)
    assert 0 < inside.sum() < 24
    assert (await page.text_content("#map-selected")).startswith(f"{inside.sum()} item")
    for name, value in {"left": -10, "right": 10, "top": -10, "bottom": 10}.items():
        await page.fill(f"#map-{name}", str(value))
    await page.get_by_role("button", name="Select the rectangle").click()
    assert (await page.text_content("#map-selected")).startswith("24 items")  # also those on its border
    await page.select_option("#map-key", "brand")
    facets = api.post("/v1/collections/shop/items/facets", json={"key": "brand"}).json()["data"]
    legend = await page.locator("ul.legend button").all_inner_texts()
    assert sorted(text.strip() for text in legend) == sorted(f"{one['value']} ({one['count']})" for one in facets)
    await page.locator("ul.legend button", has_text="Oatly").click()
    brand = {"key": "brand", "eq": "Oatly"}
    found = api.post("/v1/collections/shop/items/scroll", json={"filter": brand}).json()["data"]
    chosen = await search_filter(page)
    assert sorted(chosen["in"]) == sorted(item["id"] for item in found)
    # The prices are numbers, so they are divided into ranges.
    await page.goto("/#map?collection=shop&layout=pca")
    await page.select_option("#map-key", "price")
    assert await page.locator("ul.legend button").count() == 5
    await page.locator("ul.legend button").first.click()
    assert (await page.text_content("#map-selected")).startswith("5 items")


async def test_the_filter_narrows_the_map(page: Any, api: httpx.Client) -> None:
    await open_map(page, "shop", 24)
    await page.click("#map-filter summary")
    await page.get_by_role("button", name="add a condition").click()
    await page.fill(".filter-key", "brand")
    await page.fill(".filter-value", "Oatly")
    await expect(page.locator("#map-status")).to_have_text("12 items.")
    brand = {"key": "brand", "eq": "Oatly"}
    found = api.post("/v1/collections/shop/items/scroll", json={"filter": brand}).json()["data"]
    assert (await saved_positions(page))[0] == [item["id"] for item in found]
    await page.fill(".filter-value", "nothing")
    await expect(page.locator("#map-status")).to_have_text("shop has no items that match the filter.")
    await page.fill(".filter-value", "")
    await expect(page.locator("#map-status")).to_have_text("24 items.")


async def test_two_fingers_move_and_zoom_the_map(page: Any) -> None:
    await open_map(page, "shop", 24)
    box = await page.locator("#map-canvas").bounding_box()
    middle = np.array([box["x"] + box["width"] / 2, box["y"] + box["height"] / 2])
    scale, x, y = map(float, (await page.get_attribute("#map-canvas", "data-view")).split())
    session = await page.context.new_cdp_session(page)

    async def touch(kind: str, *points: Floats) -> None:
        touches = [{"x": point[0], "y": point[1], "id": number} for number, point in enumerate(points)]
        await session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})

    shift, right = np.array([40.0, -20.0]), np.array([1.0, 0.0])
    await touch("touchStart", middle - 50 * right, middle + 50 * right)
    await touch("touchMove", middle - 75 * right + shift / 2, middle + 75 * right + shift / 2)
    await touch("touchMove", middle - 100 * right + shift, middle + 100 * right + shift)
    await touch("touchEnd")
    await expect(page.locator("#map-canvas")).not_to_have_attribute("data-view", f"{scale} {x} {y}")
    after = np.array(list(map(float, (await page.get_attribute("#map-canvas", "data-view")).split())))
    # What was in the middle is where the middle of the fingers is now, and everything is twice as large.
    wanted = np.array([2 * scale, x - shift[0] / (2 * scale), y - shift[1] / (2 * scale)])
    assert after[0] == pytest.approx(wanted[0], rel=1e-3)
    assert np.abs(after - wanted)[1:].max() * after[0] <= 1.5  # pixels; the browser rounds the places of fingers


async def test_pointer_and_keys_show_an_item(page: Any) -> None:
    await open_map(page, "shop", 24)
    ids, positions = await saved_positions(page)
    places = await on_screen(page, positions)
    distances = np.linalg.norm(places[:, None] - places, axis=2) + 1e6 * np.eye(24)
    alone = int(distances.min(1).argmax())
    await page.mouse.move(*places[alone])
    await expect(page.locator("#map-hovered strong")).to_have_text(ids[alone])
    await page.wait_for_selector("#map-hovered img[src^=blob]", state="attached")
    await page.focus("#map-canvas")
    await page.keyboard.press("ArrowRight")
    offsets = positions - positions[alone]
    right = (offsets[:, 0] > 0) & (np.abs(offsets[:, 1]) <= offsets[:, 0])
    wanted = ids[np.where(right, np.linalg.norm(offsets, axis=1), np.inf).argmin()] if right.any() else ids[alone]
    await expect(page.locator("#map-hovered strong")).to_have_text(wanted)
    await page.keyboard.press("Enter")
    assert (await page.text_content("#map-selected")).startswith("1 item is")
    assert await page.locator("[aria-label=Selection] .card").inner_text() == wanted
    await page.keyboard.press("Escape")
    assert "Nothing is selected" in await page.text_content("#map-selected")
    before = await page.get_attribute("#map-canvas", "data-view")
    for key in ("+", "Shift+ArrowLeft"):
        await page.keyboard.press(key)
        await expect(page.locator("#map-canvas")).not_to_have_attribute("data-view", before)
        before = await page.get_attribute("#map-canvas", "data-view")


async def test_ten_thousand_points_at_sixty_frames_a_second(page: Any, many: str) -> None:
    await open_map(page, many, 10_000)
    box = await page.locator("#map-canvas").bounding_box()
    await page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    interval = await page.evaluate(
        """frames => new Promise(done => {
          const canvas = document.getElementById("map-canvas");
          const box = canvas.getBoundingClientRect();
          let count = 0, begin = 0;
          const step = now => {
            begin ||= now;
            if (count++ === frames) return done((now - begin) / frames);
            const deltaY = count % 40 < 20 ? -20 : 20;
            canvas.dispatchEvent(new WheelEvent("wheel", {
              deltaY, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, cancelable: true,
            }));
            requestAnimationFrame(step);
          };
          requestAnimationFrame(step);
        })""",
        FRAMES,
    )
    drawing = float(await page.get_attribute("#map-canvas", "data-frame-ms"))
    print(f"10,000 points: {drawing:.2f} ms to draw, {interval:.2f} ms from frame to frame")
    assert drawing < 12
    assert interval < 50


async def test_duplicates_are_the_groups_of_the_api(page: Any, api: httpx.Client, doubles: str) -> None:
    await open_map(page, doubles, 6)
    await page.select_option("#duplicates-by", "content")
    await page.click("#duplicates-find")
    await expect(page.locator(".duplicate-group")).to_have_count(2)
    groups = api.post(f"/v1/collections/{doubles}/duplicates", json={}).json()["groups"]
    shown = await page.eval_on_selector_all(
        ".duplicate-group", "all => all.map(one => [...one.querySelectorAll('input')].map(input => input.value))"
    )
    assert shown == [[item["id"] for item in group["items"]] for group in groups]
    await page.select_option("#duplicates-by", "similarity")
    await page.locator("#duplicates-threshold").fill("0.99")
    await page.click("#duplicates-find")
    body = {"by": "similarity", "threshold": 0.99}
    groups = api.post(f"/v1/collections/{doubles}/duplicates", json=body).json()["groups"]
    await expect(page.locator("#duplicates-note")).to_have_text(f"{len(groups)} groups among 6 items.")
    # Keep a2 of the first group.
    first = page.locator(".duplicate-group").first
    await first.get_by_label("keep a2").check()
    await first.get_by_role("button", name="Show on the map").click()
    assert (await page.text_content("#map-selected")).startswith("3 items")
    await first.get_by_role("button", name="Delete the others").click()
    await first.get_by_text("Delete 2 items of doubles?").wait_for()
    await first.get_by_role("button", name="Yes", exact=True).click()
    await expect(page.locator("#map-status")).to_have_text("4 items.")
    left = api.post(f"/v1/collections/{doubles}/items/scroll", json={}).json()["data"]
    assert sorted(item["id"] for item in left) == ["a2", "b1", "b2", "c1"]


async def test_selected_items_are_deleted_after_a_question(page: Any, api: httpx.Client, doubles: str) -> None:
    await open_map(page, doubles, 6)
    await page.locator("ul.legend button").first.click()
    selection = page.get_by_role("region", name="Selection")
    await selection.get_by_role("button", name="Delete", exact=True).click()
    await selection.get_by_role("button", name="No", exact=True).click()
    assert api.get(f"/v1/collections/{doubles}").json()["count"] == 6
    await selection.get_by_role("button", name="Delete", exact=True).click()
    await selection.get_by_role("button", name="Yes", exact=True).click()
    await expect(page.locator("#map-selected")).to_contain_text("Nothing is selected")
    assert api.get(f"/v1/collections/{doubles}").json()["count"] == 0


async def test_markup_is_shown_as_text(page: Any, api: httpx.Client) -> None:
    mark = "<img src=x onerror=alert(1)>"
    api.put("/v1/collections/marks", json={"fingerprint": "generated", "dimension": 4}).raise_for_status()
    items = [{"id": f"{mark}{n}", "vector": [1, n, n * n, 1], "metadata": {mark: mark}} for n in range(5)]
    api.post("/v1/collections/marks/items", json={"items": items}).raise_for_status()
    await open_map(page, "marks", 5)
    await page.select_option("#map-key", mark)
    assert mark in await page.text_content("ul.legend")
    await page.locator("ul.legend button").first.click()
    assert mark in await page.text_content("[aria-label=Selection]")
    assert await page.locator("img[src=x]").count() == 0
    api.delete("/v1/collections/marks").raise_for_status()


async def test_the_reading_can_be_stopped(page: Any, api: httpx.Client, many: str) -> None:
    async def slow(route: Any) -> None:
        if '"cursor"' not in route.request.post_data:
            await route.continue_()  # further pages never arrive

    await page.route("**/items/scroll", slow)
    await page.goto(f"/#map?collection={many}")
    await page.get_by_text("1000 of 10000 vectors").wait_for()
    await page.get_by_role("button", name="Stop").click()
    await expect(page.locator("#map-status")).to_have_text("Stopped.")
    assert await page.locator("#map-progress").is_hidden()
    await page.set_viewport_size({"width": 360, "height": 740})
    assert await page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
