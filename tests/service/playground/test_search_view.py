"""Tests of the search view: the query, the options, the filter, the pages, and the results as the API answers them."""

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest

from tests.service.playground.conftest import playwright
from tests.service.playground.scenes import scene
from tests.service.playground.states import wait_for_ids

SEARCH = "/v1/collections/shop/search"
MARKUP = "<img src=x onerror=\"window.attacked='yes'\"><script>window.attacked='yes'</script>"
CARDS = "#search-results .card"


@pytest.fixture(scope="module")
def parcels(api: httpx.Client) -> Iterator[str]:
    """A collection without stored images, whose items contain markup."""
    api.put("/v1/collections/parcels", json={}).raise_for_status()
    items = [
        {
            "id": f"{number}{MARKUP}",
            "image": base64.b64encode(scene(number)).decode(),
            "source": MARKUP,
            "metadata": {MARKUP: MARKUP, "list": [MARKUP], "n": number},
        }
        for number in range(3)
    ]
    api.post("/v1/collections/parcels/items", json={"items": items}).raise_for_status()
    yield "parcels"
    api.delete("/v1/collections/parcels").raise_for_status()


async def shown_ids(page: Any) -> list[str]:
    return list(await page.eval_on_selector_all(CARDS, "cards => cards.map((card) => card.dataset.id)"))


def by_image(api: httpx.Client, image: bytes, **options: Any) -> list[dict[str, Any]]:
    fields = {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}
    answer = api.post(SEARCH, files={"file": image}, data={"k": "12"} | fields).raise_for_status().json()
    return list(answer["data"])


def by_json(api: httpx.Client, **body: Any) -> dict[str, Any]:
    return dict(api.post(SEARCH, json={"k": 12} | body).raise_for_status().json())


def ids_of(rows: list[dict[str, Any]]) -> list[str]:
    return [row["id"] for row in rows]


async def opened(page: Any, address: str = "/#search?collection=shop") -> None:
    await page.goto(address)
    await page.wait_for_selector("#search-summary:not(:empty)")


async def test_a_file_finds_similar_images_page_by_page(page: Any, api: httpx.Client, image_file: Path) -> None:
    await opened(page, "/")
    await page.select_option("#search-collection", "shop")
    await page.set_input_files("input[aria-label='Image file']", image_file)
    rows = by_image(api, image_file.read_bytes())
    await wait_for_ids(page, CARDS, ids_of(rows))
    card = page.locator(CARDS).first
    assert await card.locator(".score").text_content() == f"score {rows[0]['score']:.3f}"
    expected = "".join(f"{key}{value}" for key, value in rows[0]["metadata"].items())
    assert await card.locator(".metadata").text_content() == expected
    await page.wait_for_function("() => document.querySelector('#search-results img').naturalWidth === 320")
    assert "Results 1 to 12 of collection shop" in await page.text_content("#search-summary")

    await page.click("#search-next")
    await wait_for_ids(page, CARDS, ids_of(by_image(api, image_file.read_bytes(), offset=12)))
    announced = await page.text_content("#announcer")
    assert announced.startswith("Results 13 to 24 of collection shop")
    await page.click("#search-previous")
    await wait_for_ids(page, CARDS, ids_of(rows))
    assert await page.is_disabled("#search-previous")
    assert "curl -s -F 'file=@\"photo.jpg\"' --form-string 'k=12'" in await page.text_content("#code-panes")


async def test_options_change_the_results(page: Any, api: httpx.Client) -> None:
    await opened(page, "/#search?collection=shop&id=shelf%2F03")
    rows = by_json(api, id="shelf/03")["data"]
    await wait_for_ids(page, CARDS, ids_of(rows))
    assert "item shelf/03 of shop" in await page.text_content("#search-query")
    await page.fill("#search-k", "5")
    await wait_for_ids(page, CARDS, ids_of(rows[:5]))
    limit = round((rows[2]["score"] + rows[3]["score"]) / 2, 6)
    await page.fill("#search-threshold", str(limit))
    await wait_for_ids(page, CARDS, ids_of(by_json(api, id="shelf/03", k=5, score_threshold=limit)["data"]))
    assert await page.is_disabled("#search-next")
    await page.fill("#search-threshold", "3")
    await page.wait_for_function(
        "() => document.getElementById('search-summary').textContent.startsWith('Lowest score')"
    )
    await page.fill("#search-threshold", "")

    await page.check("#search-rerank")
    reranked = by_json(api, id="shelf/03", k=5, rerank="patches")["data"]
    await wait_for_ids(page, CARDS, ids_of(reranked))
    expected = f"score {reranked[0]['score']:.3f}, by patches {reranked[0]['rerank_score']:.3f}"
    assert await page.locator(f"{CARDS} .score").first.text_content() == expected
    await page.uncheck("#search-rerank")

    await page.fill("#search-group-size", "2")
    await page.fill("#search-group-by", "brand")
    groups = by_json(api, id="shelf/03", k=5, group_by="brand", group_size=2)["groups"]
    await wait_for_ids(page, CARDS, [row["id"] for group in groups for row in group["data"]])
    titles = await page.eval_on_selector_all("#search-results h3", "all => all.map((one) => one.textContent)")
    assert titles == [group["value"] for group in groups]


async def test_the_filter_form_makes_the_filter_of_the_api(page: Any, api: httpx.Client) -> None:
    await opened(page, "/#search?collection=shop&id=shelf%2F03")
    await wait_for_ids(page, CARDS, ids_of(by_json(api, id="shelf/03")["data"]))
    keys = await page.eval_on_selector_all("#search-keys option", "all => all.map((one) => one.value).sort()")
    assert keys == ["brand", "filename", "price"]
    await page.click(".filter-add")
    await page.fill(".filter-key", "brand")
    await page.fill(".filter-value", "Arla")
    brand = {"key": "brand", "eq": "Arla"}
    await wait_for_ids(page, CARDS, ids_of(by_json(api, id="shelf/03", filter=brand)["data"]))
    await page.click(".filter-add")
    await page.locator(".filter-key").nth(1).fill("price")
    await page.locator(".filter-operator").nth(1).select_option("gte")
    await page.locator(".filter-value").nth(1).fill("15")
    price = {"key": "price", "gte": 15}
    await wait_for_ids(page, CARDS, ids_of(by_json(api, id="shelf/03", filter={"and": [brand, price]})["data"]))
    await page.select_option(".filter-join", "or")
    both = {"or": [brand, price]}
    await wait_for_ids(page, CARDS, ids_of(by_json(api, id="shelf/03", filter=both, k=12)["data"]))
    await page.click(".filter-mode")
    area = page.get_by_label("Filter as JSON")
    assert json.loads(await area.input_value()) == both
    negated = {"not": {"key": "price", "lt": 20}}
    await area.fill(json.dumps(negated))
    await wait_for_ids(page, CARDS, ids_of(by_json(api, id="shelf/03", filter=negated)["data"]))
    await area.fill("{")
    await page.wait_for_function("() => document.querySelector('.invalid').textContent.includes('not used')")
    await area.fill('{"field": "id", "in": ["shelf/05"]}')
    await wait_for_ids(page, CARDS, ["shelf/05"])
    assert await page.is_hidden("#search-next")  # there is one page
    # The filter is named above the results, because the form may be closed.
    assert 'Filter: id is one of ["shelf/05"].' in await page.inner_text("#search-summary")
    assert await page.inner_text("#search-options > summary") == "Options and filter (a filter is set)"
    await page.click(".filter-mode")
    assert await page.input_value(".filter-of") == "id"
    await page.click("[aria-label='Remove condition 1']")
    await wait_for_ids(page, CARDS, ids_of(by_json(api, id="shelf/03")["data"]))
    assert "Filter" not in await page.inner_text("#search-summary")


async def test_values_and_filters_of_the_form(page: Any) -> None:
    await page.goto("/")
    filters = "import('/assets/filters.js')"
    types = {"5": 5, "-1.5e3": -1500, "true": True, '"5"': "5", " a ": "a", "05": "05", "1.2.3": "1.2.3", '"a': '"a'}
    read = f"async (texts) => {{ const m = await {filters}; return texts.map(m.typedValue); }}"
    assert await page.evaluate(read, [*types]) == [*types.values()]
    with pytest.raises(playwright.Error, match="too large"):
        await page.evaluate(read, ["1e400"])
    row = "{ of: 'key', key: 'n', operator: 'in', value: '9007199254740993' }"
    exact = f"async () => JSON.stringify((await {filters}).conditionOf({row}))"
    assert await page.evaluate(exact) == '{"key":"n","in":[9007199254740993]}'
    rows = [
        ({"of": "key", "key": "a.b", "operator": "in", "value": "1, x"}, {"key": "a.b", "in": [1, "x"]}),
        ({"of": "key", "key": "n", "operator": "contains", "value": "5"}, {"key": "n", "contains": "5"}),
        ({"of": "key", "key": "n", "operator": "missing", "value": ""}, {"key": "n", "exists": False}),
        ({"of": "id", "key": "", "operator": "lt", "value": "5"}, {"field": "id", "lt": "5"}),
        ({"of": "key", "key": "n", "operator": "eq", "value": '"5"'}, {"key": "n", "eq": "5"}),
    ]
    made = f"async (rows) => {{ const m = await {filters}; return rows.map(m.conditionOf); }}"
    assert await page.evaluate(made, [row for row, _ in rows]) == [condition for _, condition in rows]
    back = f"async (given) => {{ const m = await {filters}; return given.map((one) => m.rowsOf(one)?.rows); }}"
    assert await page.evaluate(back, [condition for _, condition in rows]) == [[row] for row, _ in rows]
    nested = [{"not": {"key": "n", "eq": 1}}, {"key": "n", "gt": 1, "lt": 2}, {"and": [{"or": []}]}]
    assert await page.evaluate(back, nested) == [None] * 3
    keys = f"async (metadata) => (await {filters}).keysOf(metadata)"
    metadata = {"shelf": {"row": 1}, "file.name": "a", 'quo"te': 1, "tags": ["a"]}
    assert await page.evaluate(keys, metadata) == ["shelf.row", "file\\.name", "tags"]


async def test_the_filter_of_the_map_is_a_chip_that_can_be_removed(page: Any, api: httpx.Client) -> None:
    await page.goto("/#collections")
    chosen = {"field": "id", "in": [f"shelf/{number:02}" for number in range(6)]}
    script = "async (filter) => (await import('/assets/state.js')).setFilter(filter)"
    await page.evaluate(script, chosen)
    await page.evaluate("location.hash = 'search?collection=shop&id=shelf%2F03'")
    await wait_for_ids(page, CARDS, ids_of(by_json(api, id="shelf/03", filter=chosen)["data"]))
    assert "id is one of 6 values" in await page.text_content("#search-chip")
    await page.click("#search-chip button")
    await wait_for_ids(page, CARDS, ids_of(by_json(api, id="shelf/03")["data"]))
    assert await page.is_hidden("#search-chip")


async def test_results_become_queries_examples_and_counter_examples(
    page: Any, api: httpx.Client, image_file: Path
) -> None:
    await opened(page)
    await page.set_input_files("input[aria-label='Image file']", image_file)
    rows = by_image(api, image_file.read_bytes())
    await wait_for_ids(page, CARDS, ids_of(rows))
    await page.locator(CARDS).nth(2).get_by_role("button", name="less like this").click()
    image = base64.b64encode(image_file.read_bytes()).decode()
    parts = [{"image": image, "weight": 1}, {"id": rows[2]["id"], "weight": -0.5}]
    await wait_for_ids(page, CARDS, ids_of(by_json(api, combine=parts)["data"]))
    assert await page.is_disabled("#search-rerank")
    like = (await shown_ids(page))[4]
    await page.locator(CARDS).nth(4).get_by_role("button", name="more like this").click()
    parts.append({"id": like, "weight": 1})
    await wait_for_ids(page, CARDS, ids_of(by_json(api, combine=parts)["data"]))
    await page.get_by_label(f"weight of {like}").fill("2.5")
    await page.keyboard.press("Enter")
    parts[2]["weight"] = 2.5
    await wait_for_ids(page, CARDS, ids_of(by_json(api, combine=parts)["data"]))
    await page.get_by_role("button", name=f"remove {rows[2]['id']}").click()
    await wait_for_ids(page, CARDS, ids_of(by_json(api, combine=[parts[0], parts[2]])["data"]))
    await page.get_by_role("button", name=f"remove {like}").click()
    await wait_for_ids(page, CARDS, ids_of(rows))

    await page.locator(CARDS).nth(1).get_by_role("button", name="search by this").click()
    await wait_for_ids(page, CARDS, ids_of(by_json(api, id=rows[1]["id"])["data"]))
    assert parse_qs((await page.evaluate("location.hash")).partition("?")[2])["id"] == [rows[1]["id"]]
    await page.wait_for_selector(".query-picture")
    other = (await shown_ids(page))[0]
    await page.locator(CARDS).first.get_by_role("button", name="compare with query").click()
    await page.wait_for_selector("#view-match")
    await page.wait_for_function("() => location.hash.includes('b=')")  # the view writes what it shows
    pair = {"collection": ["shop"], "a": [rows[1]["id"]], "b": [other]}
    assert parse_qs((await page.evaluate("location.hash")).partition("?")[2]) == pair
    await page.click("#views a[href='#search']")
    await wait_for_ids(page, CARDS, ids_of(by_json(api, id=rows[1]["id"])["data"]))
    await page.locator(CARDS).first.get_by_role("button", name="look at it").click()
    await page.wait_for_selector("#view-image")
    current = "async () => (await import('/assets/state.js')).currentImage().item"
    assert await page.evaluate(current) == {"collection": "shop", "id": other}
    await page.reload()  # the address names the image
    await page.wait_for_selector("#stage")
    assert await page.evaluate(current) == {"collection": "shop", "id": other}


async def test_an_item_of_the_collection_can_be_chosen(page: Any, api: httpx.Client) -> None:
    await opened(page)
    await page.click(".chooser summary")
    await page.wait_for_selector(".choices li:nth-child(24)")
    await page.fill(".chooser input", "shelf/1")
    await page.keyboard.press("Enter")
    await page.wait_for_function("() => document.querySelectorAll('.choices li').length === 10")
    await page.get_by_role("button", name="shelf/17").click()
    await wait_for_ids(page, CARDS, ids_of(by_json(api, id="shelf/17")["data"]))


async def test_an_image_is_pasted_dropped_and_taken_with_the_camera(page: Any, api: httpx.Client) -> None:
    await opened(page)
    transfer = """([name, bytes]) => {
      const data = new DataTransfer();
      data.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name, { type: 'image/jpeg' }));
      const pasted = new ClipboardEvent('paste', { clipboardData: data, bubbles: true });
      if (name === 'pasted.jpg') document.dispatchEvent(pasted);
      else document.querySelector('.drop').dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true }));
    }"""
    for name, number in (("pasted.jpg", 101), ("dropped.jpg", 102)):
        await page.evaluate(transfer, [name, base64.b64encode(scene(number)).decode()])
        await wait_for_ids(page, CARDS, ids_of(by_image(api, scene(number))))
        assert name in await page.text_content("#search-query")
    await page.get_by_role("button", name="use the camera").click()
    await page.wait_for_function("() => document.querySelector('video').videoWidth > 0")
    async with page.expect_response(lambda answer: answer.url.endswith("/search")) as answered:
        await page.get_by_role("button", name="Take the picture").click()
    answer = await (await answered.value).json()
    await wait_for_ids(page, CARDS, ids_of(answer["data"]))
    assert "camera.jpg" in await page.text_content("#search-query")
    assert await page.is_hidden("video")


async def test_only_the_newest_of_several_searches_is_shown(page: Any, api: httpx.Client) -> None:
    await opened(page, "/#search?collection=shop&id=shelf%2F03")
    rows = by_json(api, id="shelf/03")["data"]
    await wait_for_ids(page, CARDS, ids_of(rows))
    released = asyncio.Event()

    async def held(route: Any) -> None:
        if '"k":3' in (route.request.post_data or ""):
            await released.wait()
        await route.continue_()

    await page.route("**/search", held)
    async with page.expect_event("requestfailed") as aborted:
        async with page.expect_request(lambda request: '"k":3' in (request.post_data or "")):
            await page.fill("#search-k", "3")
        await page.fill("#search-k", "4")
    assert "search" in (await aborted.value).url
    await wait_for_ids(page, CARDS, ids_of(rows[:4]))
    released.set()
    await page.unroute_all(behavior="ignoreErrors")


async def test_markup_in_data_is_shown_as_text(page: Any, api: httpx.Client, parcels: str, tmp_path: Path) -> None:
    name = "<b>a&amp;.jpg"
    (tmp_path / name).write_bytes(scene(7))
    await opened(page, f"/#search?collection={parcels}")
    await page.set_input_files("input[aria-label='Image file']", tmp_path / name)
    answer = api.post(f"/v1/collections/{parcels}/search", files={"file": scene(7)}, data={"k": "12"}).json()
    await wait_for_ids(page, CARDS, ids_of(answer["data"]))
    assert name in await page.text_content("#search-query")
    await page.wait_for_selector(f"{CARDS} .no-image")
    card = page.locator(CARDS).first
    assert await card.locator(".id").text_content() == answer["data"][0]["id"]
    assert MARKUP in await card.locator(".metadata").text_content()
    assert await page.is_disabled("#search-rerank")
    await card.get_by_role("button", name="look at it").click()
    await card.locator(".error").wait_for()
    await card.get_by_role("button", name="search by this").click()
    await page.wait_for_function("() => document.getElementById('search-query').textContent.includes('onerror')")
    await page.fill("#search-group-by", f'{MARKUP}"')
    await page.wait_for_selector("#search-results .error")
    assert await page.locator("#search-results .error").get_by_text("<script>").count() > 0
    assert await page.evaluate("window.attacked") is None


async def test_the_keyboard_alone_can_search(page: Any, api: httpx.Client) -> None:
    await opened(page)

    async def tab_to(selector: str) -> None:
        for _ in range(80):
            await page.keyboard.press("Tab")
            if await page.evaluate("(one) => document.activeElement.matches(one)", selector):
                return
        raise AssertionError(f"{selector} is not reached with the tab key")

    await tab_to(".chooser summary")
    await page.keyboard.press("Enter")
    await page.wait_for_selector(".choices button")
    await tab_to(".choices button")
    await page.keyboard.press("Enter")
    first = await page.text_content(".choices button")
    rows = by_json(api, id=first)["data"]
    await wait_for_ids(page, CARDS, ids_of(rows))
    await tab_to("#search-k")
    await page.keyboard.press("Control+a")
    await page.keyboard.type("8")
    await wait_for_ids(page, CARDS, ids_of(rows[:8]))
    await tab_to("#search-next")
    await page.keyboard.press("Enter")
    await wait_for_ids(page, CARDS, ids_of(by_json(api, id=first, k=8, offset=8)["data"]))
    assert await page.evaluate("document.activeElement.id") == "search-next"
    await page.keyboard.press("Enter")
    await wait_for_ids(page, CARDS, ids_of(by_json(api, id=first, k=8, offset=16)["data"]))
    assert await page.evaluate("document.activeElement.id") == "search-summary"


@pytest.mark.parametrize("width", [360, 1440])
async def test_the_view_fits_the_width(page: Any, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 900})
    await opened(page, "/#search?collection=shop&id=shelf%2F03")
    await page.wait_for_selector(CARDS)
    await page.eval_on_selector_all("details", "all => all.forEach((one) => { one.open = true; })")
    await page.click(".filter-add")
    await page.locator(CARDS).first.get_by_role("button", name="more like this").click()
    await page.wait_for_selector("#search-examples li")
    assert await page.evaluate("document.documentElement.scrollWidth") <= width
