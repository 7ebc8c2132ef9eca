"""Tests of the playground with hostile data, and of its code panel, whose lines must do what the page does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.playground.conftest import playwright
from tests.service.playground.scenes import scene

IDS = ["<img src=x onerror=alert(1)>", "=1+1", 'it\'s $(id) `id` !1 \\ "x"', "invoice.hta", "..", "__proto__"]
LARGE = 1234567890123456789
METADATA = {"ean": LARGE, "__proto__": {"polluted": True}, "note": "a;type=text/html"}


@pytest.fixture(scope="module")
def hostile(api: httpx.Client) -> Any:
    """A collection with hostile ids and metadata. Return a function that reads an item."""
    name = "hostile"
    api.put(f"/v1/collections/{name}", json={"originals": True}).raise_for_status()
    files = [("file", (f"{number}.jpg", scene(number), "image/jpeg")) for number in range(len(IDS))]
    fields = {"id": IDS, "metadata": [json.dumps(METADATA)] * len(IDS)}
    api.post(f"/v1/collections/{name}/items", files=files, data=fields).raise_for_status()
    yield name
    api.delete(f"/v1/collections/{name}").raise_for_status()


async def module(page: Any, name: str, script: str, argument: Any = None) -> Any:
    """Run `script`, an arrow function of a module of the page and an argument."""
    await page.goto("/docs")
    return await page.evaluate(f"async (argument) => ({script})(await import('/assets/{name}'), argument)", argument)


async def test_large_integers_and_any_key_survive_an_edit(page: Any, api: httpx.Client, hostile: str) -> None:
    await page.goto(f"/#collections?collection={hostile}")
    card = page.locator("#items .card[data-id='__proto__']")
    assert str(LARGE) in await card.locator(".metadata").text_content()
    await card.get_by_role("button", name="edit").click()
    wanted = {"ean": [LARGE + 2], "__proto__": {"x": 1}, "constructor": {"y": 2}, "note": "n"}
    assert json.loads(await page.input_value("#edit-metadata"))["ean"] == LARGE
    await page.fill("#edit-metadata", json.dumps(wanted))
    await page.click("dialog button.primary")
    await page.wait_for_selector("dialog", state="detached")
    assert api.get(f"/v1/collections/{hostile}/items/__proto__").json()["metadata"] == wanted
    assert await page.evaluate("() => ({}).x") is None


async def test_a_card_shows_a_part_of_much_metadata(page: Any) -> None:
    count = """({ metadataList }, metadata) => {
      const place = document.createElement("div");
      place.append(...metadataList(metadata, null).filter((part) => part));
      const values = [...place.querySelectorAll("dd")];
      return [values.length, values[0].textContent.length, place.lastChild.textContent];
    }"""
    metadata = {f"key {number}": "x" * 60_000 for number in range(30)}
    assert await module(page, "views/search-results.js", count, metadata) == [20, 301, "and 10 more keys"]


async def test_an_id_of_dots_does_not_change_the_path(page: Any, hostile: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    delete = "(api, path) => api.request({ method: 'DELETE', path }).then(() => 'sent', (error) => error.message)"
    for part in ("..", ".", "%2e%2E"):
        answer = await module(page, "api.js", delete, f"/v1/collections/{hostile}/items/{part}")
        assert "cannot be a part of an address" in answer
    assert [url for url in asked if hostile in url] == []


CALLS = """(api, collection) => {
  const file = new File([], `it's "a" \\\\ photo.jpg`, { type: "image/jpeg" });
  const form = [["file", file], ["id", "new"], ["metadata", '{"note": "a;type=text/html", "x": "@y"}']];
  const at = (...parts) => api.collectionPath(collection, ...parts);
  const filter = { field: "id", in: ["=1+1", `it's $(id) \\`id\\` !1 \\\\ "x"`] };
  return [
    { path: at("items", `it's $(id) \\`id\\` !1 \\\\ "x"`) },
    { method: "POST", path: at("items", "scroll"), json: { filter, limit: 5 } },
    { method: "POST", path: at("items"), form },
    { method: "POST", path: "/v1/embeddings", image: file },
  ];
}"""
WRITTEN = f"async (code, collection) => ({CALLS})(await import('/assets/api.js'), collection).map(code.%s)"


@pytest.mark.parametrize("language", ["curl", "python"])
async def test_the_lines_of_the_code_panel_run(
    page: Any, api: httpx.Client, hostile: str, tmp_path: Path, language: str
) -> None:
    (tmp_path / 'it\'s "a" \\ photo.jpg').write_bytes(scene(50))
    lines = await module(page, "code.js", WRITTEN % language, hostile)
    answers = []
    for text in lines:
        command = ["bash", "-c", text] if language == "curl" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, text=True)
        answers.append(done.stdout)
    assert all("$(id) `id` !1" in answer for answer in answers[:2])
    assert "=1+1" in answers[1]
    assert api.get(f"/v1/collections/{hostile}/items/new").json()["metadata"]["note"] == "a;type=text/html"
    api.delete(f"/v1/collections/{hostile}/items/new").raise_for_status()
    assert "embedding" in answers[3]


async def test_lines_that_are_cut_do_not_run(page: Any) -> None:
    calls = [{"ids": [str(number) for number in range(60)]}, {"items": [{"id": "i" * 500}]}]
    write = """(code, bodies) => bodies.map((json) => {
      const call = { method: "POST", path: "/", json };
      return [code.curl(call), code.python(call)];
    })"""
    for curl, python in await module(page, "code.js", write, calls):
        body = curl.split("-d '")[1].split("'")[0]
        with pytest.raises(json.JSONDecodeError):
            json.loads(body)
        with pytest.raises((SyntaxError, TypeError)):
            json.dumps(eval(python.split("json=")[1].split(", timeout")[0]))


async def test_the_documentation_shows_the_file_that_it_sends(page: Any) -> None:
    await page.goto("/docs#create_embeddings")
    form = page.locator("#create_embeddings form.try")
    await form.get_by_label("Body").first.select_option("multipart/form-data")
    await form.get_by_role("button", name="Send").click()
    assert "-F 'file=@\"example.png\"'" in await form.locator(".answer pre").first.text_content()


async def test_the_documentation_sends_no_address_with_an_empty_part(page: Any) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.method))
    await page.goto("/docs#delete_collection")
    form = page.locator("#delete_collection form.try")
    await form.get_by_label("name *").fill("")
    await form.get_by_role("button", name="Send").click()
    assert await form.evaluate("(form) => form.checkValidity()") is False
    assert "DELETE" not in asked


async def test_downloads_are_no_programs_and_no_formulas(page: Any, hostile: str) -> None:
    await page.goto(f"/#collections?collection={hostile}")
    card = page.locator("#items .card[data-id='invoice.hta']")
    await card.get_by_role("button", name="show the image").click()
    async with page.expect_download() as image:
        await page.locator("dialog").get_by_role("button", name="Download").click()
    assert (await image.value).suggested_filename == "invoice.hta.jpg"
    await page.goto(f"/#map?collection={hostile}")
    await page.get_by_text(f"{len(IDS)} items.").wait_for()
    async with page.expect_download() as positions:
        await page.click("text=Save the positions")
    text = Path(await (await positions.value).path()).read_text()
    assert '"\'=1+1",' in text
    assert '"it\'s $(id) `id` !1 \\ ""x""",' in text


async def test_an_upload_ends_if_the_answer_is_not_json(page: Any) -> None:
    await page.route("**/v1/nothing", lambda route: route.fulfill(status=200, body="<html>proxy</html>"))
    send = "(api) => api.upload({ method: 'POST', path: '/v1/nothing', image: new Blob(['x']) }, () => {})"
    with pytest.raises(playwright.Error, match="JSON"):
        await module(page, "api.js", send)


async def test_a_key_has_only_letters_that_a_header_can_have(page: Any) -> None:
    await page.goto("/#models")
    await page.click("#key")
    await page.fill("#key-input", "dv2_kéy…")
    await page.click("#key-form button")
    assert await page.evaluate("() => document.getElementById('key-input').validity.patternMismatch")
    assert await page.evaluate("() => sessionStorage.length") == 0
    await page.fill("#key-input", " dv2_a-b_c ")
    await page.click("#key-form button")
    assert await page.evaluate("() => sessionStorage.getItem('dinov2-api-key')") == "dv2_a-b_c"


async def test_the_page_works_without_the_storage_of_the_browser(page: Any) -> None:
    refuse = "Object.defineProperty(window, '%s', { get() { throw new DOMException('denied', 'SecurityError'); } });"
    await page.add_init_script("".join(refuse % name for name in ("localStorage", "sessionStorage")))
    await page.goto("/#models")
    await page.wait_for_selector("#models article")
    await page.click("#key")
    await page.fill("#key-input", "dv2_a")
    await page.click("#key-form button")
    kept = "async () => (await import('/assets/api.js')).apiKey.get()"
    assert await page.evaluate(kept) == "dv2_a"
