"""Tests of the view of collections: create, delete, upload, and the items with their metadata and images."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.playground.conftest import Faults
from tests.service.playground.scenes import scene
from tests.service.playground.states import wait_for_ids
from tests.service.test_server import Server

MARKUP = "<img src=x onerror=\"window.attacked='yes'\">"
FILE_NAME = "<b onclick=alert(1)>&amp;.jpg"
ITEMS = "#items .card"


@pytest.fixture
def shelf(api: httpx.Client) -> Iterator[str]:
    """A collection with eight items and stored images."""
    api.put("/v1/collections/shelf", json={"originals": True, "indexed": ["n"]}).raise_for_status()
    items = [
        {
            "id": f"row/{number}",
            "image": base64.b64encode(scene(number)).decode(),
            "metadata": {"n": number, "half": "even" if number % 2 == 0 else "odd", "tags": {"deep": number}},
        }
        for number in range(8)
    ]
    api.post("/v1/collections/shelf/items", json={"items": items}).raise_for_status()
    yield "shelf"
    api.delete("/v1/collections/shelf")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with 20 images in two folders, a file that is not an image, and one that only seems to be one."""
    folder = tmp_path / "pictures"
    for number in range(20):
        path = folder / ("red", "green")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(scene(number))
    (folder / "red" / "broken.jpg").write_bytes(b"not an image")
    (folder / "red" / "notes.txt").write_text("nothing")
    return folder


def count(api: httpx.Client, name: str) -> int:
    return int(api.get(f"/v1/collections/{name}").raise_for_status().json()["count"])


def scrolled(api: httpx.Client, name: str, **body: Any) -> list[dict[str, Any]]:
    return list(api.post(f"/v1/collections/{name}/items/scroll", json=body).raise_for_status().json()["data"])


async def test_the_list_and_a_new_collection(page: Any, api: httpx.Client) -> None:
    await page.goto("/#collections")
    row = page.locator("#collection-list tr[data-name='shop']")
    await row.wait_for()
    cells = await row.locator("td").all_text_contents()
    shop, model = api.get("/v1/collections/shop").json(), api.get("/v1/models").json()["data"][0]["id"]
    assert cells[:2] == [str(shop["count"]), f"{model} (live)"]
    assert cells[2] == f"{shop['pooling']}, {shop['dimension']} × {shop['dtype']}"
    assert cells[3] == f"{shop['count'] * shop['dimension'] * 4 / 1000:.1f} KB"

    await page.click("#create summary")
    await page.fill("#create-name", "Not allowed")
    await page.click("#create-form button[type=submit]")
    assert await page.evaluate("document.getElementById('create-name').validity.patternMismatch")
    await page.fill("#create-name", "fresh")
    await page.select_option("#create-pooling", "mean")
    await page.select_option("#create-dtype", "float16")
    await page.select_option("#create-index", "flat")
    await page.fill("#create-indexed", "brand, shelf.row")
    await page.uncheck("#create-originals")
    await page.click("#create-form button[type=submit]")
    await page.wait_for_selector("#fact-count")
    fresh = api.get("/v1/collections/fresh").json()
    assert (fresh["pooling"], fresh["dtype"], fresh["index"]["kind"]) == ("mean", "float16", "flat")
    assert (fresh["indexed"], fresh["originals"]) == (["brand", "shelf.row"], False)

    await page.get_by_role("button", name="Delete the collection").click()
    confirm = page.locator("dialog button[type=submit]")
    assert await confirm.is_disabled()
    await page.fill("#confirm-name", "fres")
    assert await confirm.is_disabled()
    await page.keyboard.press("Escape")
    await page.locator("dialog").wait_for(state="detached")
    assert api.get("/v1/collections/fresh").status_code == 200
    await page.get_by_role("button", name="Delete the collection").click()
    await page.fill("#confirm-name", "fresh")
    await confirm.click()
    await page.locator("#collection-list tr[data-name='shop']").wait_for()
    assert api.get("/v1/collections/fresh").status_code == 404


async def test_without_collections_the_first_one_is_made_with_images(
    browser: Any, tmp_path: Path, pictures: Path
) -> None:
    server = Server(tmp_path / "data")
    context = await browser.new_context(base_url=server.url)
    faults = Faults(server.url)
    context.on("page", faults.watch)
    try:
        page = await context.new_page()
        await page.goto("/#search")
        await page.get_by_role("link", name="Create one").click()
        async with page.expect_file_chooser() as chooser:
            await page.click("#first-collection")
        await (await chooser.value).set_files([pictures / "red" / "0.jpg", pictures / "green" / "1.jpg"])
        await wait_for_ids(page, ITEMS, ["0.jpg", "1.jpg"])
        with httpx.Client(base_url=server.url) as client:
            demo = client.get("/v1/collections/demo").json()
        assert (demo["count"], demo["originals"]) == (2, True)
    finally:
        await context.close()
        server.stop()
    assert (faults.foreign, faults.messages) == ([], [])


async def test_a_folder_is_uploaded_with_progress_and_reasons_of_failures(
    page: Any, api: httpx.Client, shelf: str, pictures: Path
) -> None:
    await page.goto(f"/#collections?collection={shelf}")
    await page.wait_for_selector(ITEMS)
    await page.click("#upload > summary")
    # The options come before the buttons that start the upload.
    order = (
        "() => [...document.querySelectorAll('#upload :is(input:not([type=file]), .drop)')].map((one) => one.className)"
    )
    assert await page.evaluate(order) == ["", "drop"]
    await page.fill("#upload-metadata", "[1]")
    await page.set_input_files("#upload-folder", pictures)
    await page.wait_for_selector("#upload-result .error")
    assert count(api, shelf) == 8
    await page.fill("#upload-metadata", '{"brand": "Arla"}')
    await page.fill("#upload-folder-key", "colour")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url) if request.url.endswith("/items") else None)
    await page.evaluate(
        """() => {
          window.seen = [];
          new MutationObserver(() => window.seen.push(document.getElementById('upload-words').textContent))
            .observe(document.getElementById('upload-words'), { childList: true });
        }"""
    )
    await page.set_input_files("#upload-folder", pictures)
    await page.wait_for_selector("#upload-result .failed")
    result = await page.text_content("#upload-result")
    assert result.startswith("20 files are stored. 1 failed. 1 left out, because it is not an image.")
    failed = await page.text_content("#upload-result .failed li")
    assert failed.startswith("pictures/red/broken.jpg: ")
    assert "image" in failed.removeprefix("pictures/red/broken.jpg: ")
    assert len(requests) == 2
    seen = await page.evaluate("window.seen")
    assert any("16 of 21 files processed" in words for words in seen)
    assert "100 % sent" in seen[-1]
    assert count(api, shelf) == 28
    item = api.get(f"/v1/collections/{shelf}/items/pictures/green/7.jpg").json()
    assert item["metadata"] == {"brand": "Arla", "colour": "green", "filename": "7.jpg"}
    await page.wait_for_function("() => document.getElementById('fact-count').textContent === '28 items'")


@pytest.mark.parametrize("status", [429, 503])
async def test_an_upload_waits_for_a_busy_service(
    page: Any, api: httpx.Client, shelf: str, pictures: Path, status: int
) -> None:
    answers: list[int] = []

    async def refuse_once(route: Any) -> None:
        answers.append(status if not answers else 200)
        if answers[-1] == status:
            await route.fulfill(status=status, headers={"Retry-After": "1"}, json={"detail": "busy"})
        else:
            await route.continue_()

    await page.goto(f"/#collections?collection={shelf}")
    await page.wait_for_selector(ITEMS)
    await page.click("#upload > summary")
    await page.route("**/items", refuse_once)
    await page.set_input_files("#upload-files", pictures / "red" / "0.jpg")
    await page.get_by_text("1 file is stored.").first.wait_for()
    assert answers == [status, 200]
    assert count(api, shelf) == 9


async def test_an_upload_can_be_cancelled(page: Any, api: httpx.Client, shelf: str, pictures: Path) -> None:
    await page.goto(f"/#collections?collection={shelf}")
    await page.wait_for_selector(ITEMS)
    await page.click("#upload > summary")
    await page.route("**/items", lambda route: None)
    await page.set_input_files("#upload-folder", pictures)
    await page.click("#upload-cancel")
    await page.wait_for_function("() => document.getElementById('upload-result').textContent.includes('Cancelled: 21')")
    assert count(api, shelf) == 8
    await page.unroute_all(behavior="ignoreErrors")
    await page.get_by_role("button", name="Upload these 21 again").click()
    await page.wait_for_selector("#upload-result .failed")
    assert count(api, shelf) == 28


async def test_items_are_filtered_ordered_and_paged(page: Any, api: httpx.Client) -> None:
    await page.goto("/#collections?collection=shop")
    await wait_for_ids(page, ITEMS, [item["id"] for item in scrolled(api, "shop", limit=24)])
    assert await page.is_disabled("#items-next")
    await page.click("#facets > summary")
    await page.fill("#facet-key", "brand")
    await page.keyboard.press("Enter")
    await page.wait_for_selector("#facet-values tbody tr")
    rows = await page.eval_on_selector_all(
        "#facet-values tbody tr",
        "rows => rows.map((row) => [row.cells[0].textContent, Number(row.cells[1].textContent)])",
    )
    answer = api.post("/v1/collections/shop/items/facets", json={"key": "brand"}).json()
    assert rows == [[one["value"], one["count"]] for one in answer["data"]]
    await page.get_by_role("button", name="show these items: Oatly").click()
    oatly = {"key": "brand", "eq": "Oatly"}
    await wait_for_ids(page, ITEMS, [item["id"] for item in scrolled(api, "shop", filter=oatly)])
    assert await page.input_value(".filter-value") == "Oatly"
    await page.fill("#items-order", "price")
    await page.select_option("#items-direction", "desc")
    order = {"key": "price", "direction": "desc"}
    await wait_for_ids(page, ITEMS, [item["id"] for item in scrolled(api, "shop", filter=oatly, order_by=order)])


async def test_the_cursor_leads_to_the_next_page_and_back(page: Any, api: httpx.Client) -> None:
    dimension = api.get("/v1/collections/shop").json()["dimension"]
    vectors = [{"id": f"{number:03}", "vector": [1.0] * dimension} for number in range(30)]
    api.post("/v1/collections/plain/items", json={"items": vectors}).raise_for_status()
    try:
        await page.goto("/#collections?collection=plain")
        first = api.post("/v1/collections/plain/items/scroll", json={"limit": 24}).json()
        await wait_for_ids(page, ITEMS, [item["id"] for item in first["data"]])
        await page.click("#items-next")
        second = scrolled(api, "plain", limit=24, cursor=first["cursor"])
        await wait_for_ids(page, ITEMS, [item["id"] for item in second])
        assert await page.evaluate("document.activeElement.id") == "items-summary"
        assert (await page.text_content("#announcer")).startswith("Page 2: 6 items")
        await page.click("#items-previous")
        await wait_for_ids(page, ITEMS, [item["id"] for item in first["data"]])
    finally:
        api.delete("/v1/collections/plain")


async def test_metadata_and_source_are_edited(page: Any, api: httpx.Client, shelf: str) -> None:
    await page.goto(f"/#collections?collection={shelf}")
    card = page.locator(ITEMS).nth(2)
    await card.get_by_role("button", name="edit").click()
    await page.fill("#edit-metadata", "{")
    assert await page.locator("dialog button[type=submit]").is_disabled()
    assert await page.text_content("#edit-invalid") != ""
    await page.fill("#edit-metadata", json.dumps({"n": 2, "tags": {"other": [1]}, "name": MARKUP}))
    await page.fill("#edit-source", "s3://bucket/2.jpg")
    async with page.expect_request(lambda request: request.method == "PATCH") as sent:
        await page.locator("dialog button[type=submit]").click()
    body = (await sent.value).post_data_json
    assert body["metadata"] == {"half": None, "tags": {"deep": None, "other": [1]}, "name": MARKUP}
    await page.locator("dialog").wait_for(state="detached")
    item = api.get(f"/v1/collections/{shelf}/items/row/2").json()
    assert item["metadata"] == {"n": 2, "tags": {"other": [1]}, "name": MARKUP}
    assert item["source"] == "s3://bucket/2.jpg"
    assert MARKUP in await card.locator(".metadata").text_content()
    assert "edit" in await page.evaluate("document.activeElement.textContent")
    assert await page.evaluate("window.attacked") is None


async def test_an_image_is_shown_and_items_are_deleted(page: Any, api: httpx.Client, shelf: str) -> None:
    await page.goto(f"/#collections?collection={shelf}")
    ids = [item["id"] for item in scrolled(api, shelf)]
    await wait_for_ids(page, ITEMS, ids)
    await page.locator(ITEMS).first.get_by_role("button", name="show the image").click()
    await page.wait_for_function("() => document.querySelector('dialog img')?.naturalWidth === 320")
    assert "320 × 240 pixels" in await page.text_content("dialog")
    await page.keyboard.press("Escape")
    await page.locator(ITEMS).nth(1).get_by_role("button", name="delete").click()
    await page.click("dialog .confirm")
    await wait_for_ids(page, ITEMS, [ids[0], *ids[2:]])
    for number in (0, 3):
        await page.locator(ITEMS).nth(number).get_by_role("checkbox").check()
    assert await page.text_content("#items-delete") == "Delete the 2 selected"
    await page.click("#items-delete")
    await page.click("dialog .confirm")
    await wait_for_ids(page, ITEMS, [ids[2], ids[3], *ids[5:]])
    assert [item["id"] for item in scrolled(api, shelf)] == [ids[2], ids[3], *ids[5:]]
    await page.click("#items-all")
    await page.click("#items-delete")
    await page.click("dialog .confirm")
    await page.wait_for_function("() => document.getElementById('items-summary').textContent.includes('no items')")
    assert count(api, shelf) == 0


async def test_markup_in_ids_metadata_and_file_names_is_text(
    page: Any, api: httpx.Client, shelf: str, tmp_path: Path
) -> None:
    (tmp_path / FILE_NAME).write_bytes(scene(50))
    (tmp_path / f"broken{FILE_NAME}").write_bytes(b"nothing")
    await page.goto(f"/#collections?collection={shelf}")
    await page.wait_for_selector(ITEMS)
    await page.click("#upload > summary")
    await page.fill("#upload-metadata", json.dumps({MARKUP: MARKUP}))
    await page.set_input_files("#upload-files", [tmp_path / FILE_NAME, tmp_path / f"broken{FILE_NAME}"])
    await page.wait_for_selector("#upload-result .failed")
    assert f"broken{FILE_NAME}: " in await page.text_content("#upload-result .failed")
    metadata = api.get(f"/v1/collections/{shelf}/items/{FILE_NAME.replace('&', '%26')}").json()["metadata"]
    assert metadata == {MARKUP: MARKUP, "filename": FILE_NAME}
    await page.wait_for_function("() => document.querySelectorAll('#items .card').length === 9")
    card = page.locator(ITEMS).filter(has=page.get_by_text(FILE_NAME, exact=True)).first
    assert MARKUP in await card.locator(".metadata").text_content()
    await card.get_by_role("button", name="delete").click()
    assert FILE_NAME in await page.text_content("dialog")
    await page.click("dialog .confirm")
    await page.wait_for_function("() => document.querySelectorAll('#items .card').length === 8")
    assert count(api, shelf) == 8
    assert await page.evaluate("window.attacked") is None


@pytest.mark.parametrize("address", ["/#collections", "/#collections?collection=shop"])
async def test_the_view_fits_a_narrow_screen(page: Any, address: str) -> None:
    await page.set_viewport_size({"width": 360, "height": 800})
    await page.goto(address)
    await page.wait_for_selector(ITEMS if "=" in address else "#create")
    await page.eval_on_selector_all("details", "all => all.forEach((one) => { one.open = true; })")
    assert await page.evaluate("document.documentElement.scrollWidth") <= 360
