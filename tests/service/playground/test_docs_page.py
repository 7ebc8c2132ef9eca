"""Tests of the page /docs: it lists every route, works offline, and its examples run."""

from typing import Any

import httpx


async def test_every_route_is_listed_and_described(page: Any, api: httpx.Client) -> None:
    document = api.get("/openapi.json").json()
    await page.goto("/docs")
    await page.wait_for_selector("details.operation")
    shown = await page.eval_on_selector_all("details.operation", "all => all.map(one => one.id)")
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert sorted(shown) == sorted(operation["operationId"] for operation in operations)
    for operation in operations:
        await page.eval_on_selector(f"#{operation['operationId']}", "one => { one.open = true; }")
        await page.wait_for_selector(f"#{operation['operationId']} form.try", state="attached")
        text = await page.text_content(f"#{operation['operationId']}")
        assert operation["summary"] in text
        assert all(parameter["name"] in text for parameter in operation.get("parameters", []))


async def test_search_narrows_the_list(page: Any) -> None:
    await page.goto("/docs")
    await page.wait_for_selector("details.operation")
    await page.fill("#wanted", "post embeddings")
    shown = await page.eval_on_selector_all("details.operation:not([hidden])", "all => all.map(one => one.id)")
    assert shown == ["create_embeddings"]


async def send(page: Any, operation: str, **values: str) -> str:
    """Send the example of an operation, and return what the page shows."""
    form = page.locator(f"#{operation} form.try")
    await page.eval_on_selector(f"#{operation}", "one => { one.open = true; }")
    for name, value in values.items():
        await form.get_by_label(name).fill(value)
    await form.get_by_role("button", name="Send").click()
    await form.locator(".answer strong").wait_for()
    return await form.locator(".answer").inner_text()


async def test_the_examples_run(page: Any, api: httpx.Client) -> None:
    await page.goto("/docs")
    await page.wait_for_selector("details.operation")
    assert "201" in await send(page, "put_collection")
    assert "created" in await send(page, "put_item")
    assert api.get("/v1/collections/demo").json()["count"] == 1
    found = await send(page, "search")
    assert '"example"' in found
    assert "curl -s" in found
    for operation in ("create_embeddings", "segment", "attention", "features", "match", "detect", "find_region"):
        text = await send(page, operation)
        assert "200" in text.split("Python", 1)[1], text
    assert "picture" in await page.inner_html("#segment .answer")
    assert "204" in await send(page, "delete_collection") or api.get("/v1/collections/demo").status_code == 404


async def test_an_error_is_shown_as_text(page: Any) -> None:
    await page.goto("/docs#get_collection")
    await page.wait_for_selector("#get_collection form.try")
    form = page.locator("#get_collection form.try")
    await form.get_by_label("name *").fill("<img src=x onerror=alert(1)>")
    await form.get_by_role("button", name="Send").click()
    alert = form.get_by_role("alert")
    assert "<img src=x" in await alert.inner_text()
    assert await form.locator("img").count() == 0
