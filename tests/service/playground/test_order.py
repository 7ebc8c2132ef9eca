"""Tests of answers that arrive late: they never take the place of newer ones, and stop when their view is left."""

from typing import Any

import httpx
import pytest

from tests.fakes import until

SLOW = "**/items/shelf%2F01/image"


async def hold(page: Any, pattern: str) -> list[Any]:
    """Hold back all requests that match the pattern. Return the list of their routes."""
    held: list[Any] = []
    await page.route(pattern, lambda route: held.append(route))
    return held


async def test_the_skip_link_stays_in_the_view(page: Any) -> None:
    await page.goto("/#models")
    await page.wait_for_selector("#models article")
    await page.focus("a.skip")
    await page.keyboard.press("Enter")
    assert await page.evaluate("() => [document.activeElement.id, location.hash]") == ["main", "#models"]
    await page.wait_for_selector("#view-models")


async def test_a_chosen_image_is_not_replaced_by_a_slow_item(page: Any, image_file: Any) -> None:
    held = await hold(page, SLOW)
    await page.goto("/#image?collection=shop&item=shelf%2F01")
    await until(lambda: bool(held))
    await page.set_input_files("input[aria-label='Image file']", image_file)
    await page.get_by_text("photo.jpg, 320 × 240 pixels").wait_for()
    await held[0].continue_()
    await page.wait_for_load_state("networkidle")
    assert "photo.jpg" in await page.text_content(".stage-column")


async def test_a_slow_item_does_not_become_the_image_of_the_next_view(page: Any) -> None:
    held = await hold(page, SLOW)
    await page.goto("/#image?collection=shop&item=shelf%2F01")
    await until(lambda: bool(held))
    await page.click("#views a[href='#search']")
    await page.wait_for_selector("#search-summary:not(:empty)")
    await held[0].continue_()
    await page.wait_for_load_state("networkidle")
    current = "async () => (await import('/assets/state.js')).currentImage()"
    assert await page.evaluate(current) is None


async def test_the_address_of_an_image_that_was_looked_at_shows_it_again(page: Any) -> None:
    await page.goto("/#search?collection=shop&id=shelf%2F03")
    await page.locator("#search-results .card").first.get_by_role("button", name="look at it").click()
    await page.wait_for_selector("#stage")
    caption = await page.text_content(".stage-column")
    await page.reload()
    await page.wait_for_selector("#stage")
    assert await page.text_content(".stage-column") == caption


async def test_pictures_stop_loading_when_their_view_is_left(page: Any) -> None:
    held = await hold(page, "**/image")
    failed: list[str] = []
    page.on("requestfailed", lambda request: failed.append(request.failure))
    await page.goto("/#collections?collection=shop")
    await page.wait_for_selector("#items .card")
    await until(lambda: bool(held))
    await page.click("#views a[href='#models']")
    await page.wait_for_selector("#models article")
    await until(lambda: len(failed) >= len(held))
    assert set(failed) == {"net::ERR_ABORTED"}
    for route in held:
        await route.abort()


async def test_texts_are_copied_without_the_clipboard_of_https(page: Any) -> None:
    await page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    await page.goto("/#models")
    await page.wait_for_selector("#models article")
    await page.click("#code summary")
    await page.evaluate("() => document.addEventListener('copy', () => { window.copied = String(getSelection()); })")
    await page.locator("#code figure").first.get_by_role("button", name="Copy").click()
    await page.wait_for_function("() => document.getElementById('announcer').textContent === 'The text is copied'")


async def test_a_hidden_page_has_no_stream(page: Any, api: httpx.Client) -> None:
    streams: list[str] = []
    ended: list[str] = []
    page.on("request", lambda request: streams.append(request.url) if "/jobs/events" in request.url else None)
    page.on("requestfailed", lambda request: ended.append(request.url) if "/jobs/events" in request.url else None)
    await page.goto("/#jobs")
    await page.locator("#jobs-connection", has_text="live").wait_for()
    turn = """(isHidden) => {
      Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    await page.evaluate(turn, True)
    await until(lambda: bool(ended))
    assert len(streams) == 1
    await page.evaluate(turn, False)
    await until(lambda: len(streams) > 1)
    assert await page.text_content("#jobs-connection") == "updated live"


async def test_a_search_in_another_collection_waits_for_the_image(page: Any, api: httpx.Client) -> None:
    api.put("/v1/collections/empty", json={}).raise_for_status()
    held = await hold(page, SLOW)
    await page.goto("/#search?collection=shop&id=shelf%2F01")
    await page.wait_for_selector("#search-results .card")
    await until(lambda: bool(held))
    await page.select_option("#search-collection", "empty")
    await page.wait_for_selector("#search-results[aria-busy]")
    await held[0].continue_()
    await page.locator("#search-summary", has_text="No results").wait_for()
    api.delete("/v1/collections/empty").raise_for_status()


async def test_suggested_keys_are_those_of_the_collection(page: Any, api: httpx.Client) -> None:
    api.put("/v1/collections/empty", json={}).raise_for_status()
    held = await hold(page, "**/shop/items/scroll")
    await page.goto("/#search?collection=shop")
    await until(lambda: bool(held))
    await page.select_option("#search-collection", "empty")
    await held[0].continue_()
    await page.wait_for_load_state("networkidle")
    assert await page.locator("#search-keys option").count() == 0
    api.delete("/v1/collections/empty").raise_for_status()


@pytest.mark.parametrize("address", ["/#jobs", "/#jobs?job=none"])
async def test_jobs_are_read_when_the_service_answers_again(page: Any, address: str) -> None:
    await page.clock.install()
    await page.route("**/v1/jobs?*", lambda route: route.abort())
    await page.goto(address)
    await page.locator("#jobs-connection", has_text="not connected").wait_for()
    await page.unroute("**/v1/jobs?*")
    await page.clock.run_for(3000)
    await page.locator("#jobs-connection", has_text="live").or_(page.get_by_text("there is no job 'none'")).wait_for()


async def test_the_address_of_a_match_stays_while_an_image_is_loaded(page: Any) -> None:
    held = await hold(page, SLOW)
    await page.goto("/#match?collection=shop&a=shelf%2F05&b=shelf%2F01")
    await page.get_by_text("shelf/05 of shop, 320 × 240 pixels").wait_for()
    await until(lambda: bool(held))
    assert await page.evaluate("() => location.hash") == "#match?collection=shop&a=shelf%2F05&b=shelf%2F01"
    await held[0].continue_()
    await page.wait_for_selector("#match-lines line", state="attached")
