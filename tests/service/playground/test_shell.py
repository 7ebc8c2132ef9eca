"""Tests of the frame of the playground: files, headers, the views, the API key, the theme and the code panel."""

from typing import Any

import httpx

from tests.fakes import running

VIEWS = ["search", "image", "match", "map", "collections", "models", "jobs"]


async def test_every_view_opens(page: Any) -> None:
    await page.goto("/")
    for view in VIEWS:
        await page.click(f"#views a[href='#{view}']")
        await page.wait_for_selector(f"#view-{view} h2")
        assert await page.get_attribute(f"#views a[href='#{view}']", "aria-current") == "page"


async def test_a_view_that_was_left_before_it_was_ready_stops(page: Any) -> None:
    held: list[Any] = []

    async def hold(route: Any) -> None:
        if held:
            await route.continue_()
        held.append(route)

    await page.route("**/v1/collections", hold)
    await page.goto("/#map")
    await page.wait_for_selector("#view-map")
    await page.click("#views a[href='#match']")
    await page.wait_for_selector("#view-match h2")
    asked = []
    page.on("requestfinished", lambda request: asked.append(request.url))
    await held[0].continue_()
    await page.wait_for_load_state("networkidle")
    assert [url for url in asked if url.endswith("/count")] == []  # the map was not read


async def test_the_frame_names_the_live_model(page: Any, api: httpx.Client) -> None:
    await page.goto("/")
    await page.wait_for_function("() => document.getElementById('model').textContent !== ''")
    assert await page.text_content("#model") == api.get("/v1/models").json()["data"][0]["id"]


async def test_the_keyboard_goes_on_in_the_view_that_a_link_has_opened(page: Any) -> None:
    await page.goto("/#collections?collection=shop")
    await page.wait_for_selector("#items .card")
    assert await page.evaluate("() => document.activeElement === document.body")  # the first Tab reaches the header
    await page.get_by_role("link", name="Search in it").press("Enter")
    await page.wait_for_selector("#view-search h2")
    assert await page.evaluate("() => document.activeElement.id") == "main"


async def test_the_documentation_leads_to_the_playground(page: Any) -> None:
    await page.goto("/docs")
    await page.click("header a:has-text('Playground')")
    await page.wait_for_selector("#view-search h2")


async def test_pages_have_a_strict_policy_and_are_sent_once(tmp_path) -> None:
    async with running(tmp_path) as run:
        for path in ("/", "/docs", "/docs/", "/assets/app.js"):
            answer = await run.client.get(path)
            assert answer.status_code == 200, path
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            policy = answer.headers["Content-Security-Policy"]
            assert "script-src 'self';" in policy
            assert "unsafe" not in policy
            again = await run.client.get(path, headers={"If-None-Match": answer.headers["ETag"]})
            assert (again.status_code, again.content) == (304, b"")
        assert (await run.client.get("/assets/../settings.py")).status_code == 404
        assert (await run.client.get("/assets/%2e%2e/files.py")).status_code == 404


async def test_the_setting_turns_the_playground_off_but_not_the_documentation(tmp_path) -> None:
    async with running(tmp_path, playground=False) as run:
        assert (await run.client.get("/")).status_code == 404
        documentation = await run.client.get("/docs")
        assert documentation.status_code == 200
        assert "Playground" not in documentation.text


async def test_links_have_the_prefix(tmp_path) -> None:
    async with running(tmp_path, root_path="/images") as run:
        for path in ("/images/", "/"):
            text = (await run.client.get(path)).text
            assert 'src="/images/assets/app.js"' in text
            assert 'data-root="/images"' in text
