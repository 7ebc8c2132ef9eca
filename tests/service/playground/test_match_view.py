"""Tests of the view "match": its lines, table and fields, compared with the answers of `POST /v1/match`."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.playground.scenes import scene

expect = pytest.importorskip("playwright.async_api").expect
PAIR = "/#match?collection=shop&a=shelf%2F01&b=shelf%2F05"


def matches_of(api: httpx.Client, first: int, second: int, **options: str) -> dict[str, Any]:
    files = [("file", (f"{number}.jpg", scene(number), "image/jpeg")) for number in (first, second)]
    answer: dict[str, Any] = api.post("/v1/match", files=files, data=options).raise_for_status().json()
    return answer


async def scores_of_table(page: Any) -> list[str]:
    scores: list[str] = await page.eval_on_selector_all(
        "#match-table tbody tr", "rows => rows.map(row => row.children[1].textContent)"
    )
    return scores


async def test_lines_and_table_are_the_matches_of_the_api(page: Any, api: httpx.Client) -> None:
    await page.goto(PAIR)
    await page.wait_for_selector("#match-lines line", state="attached")
    expected = matches_of(api, 1, 5)
    assert len(expected["matches"]) > 5
    assert await page.locator("#match-lines [role=option]").count() == len(expected["matches"])
    assert await scores_of_table(page) == [f"{match['score']:.3f}" for match in expected["matches"]]
    boxes = expected["matches"][0]["boxes"]
    row = await page.eval_on_selector("#match-table tbody tr", "row => row.textContent")
    for x, y, width, height in boxes:
        assert f"x {round(x)}, y {round(y)}, {round(width)} × {round(height)}" in row
    # The first line leads from the first patch to the second: both images have 320 x 240 pixels.
    ends = await page.eval_on_selector(
        "#match-0", "line => ['x1', 'y1', 'x2', 'y2'].map(name => Number(line.getAttribute(name)))"
    )
    width = await page.eval_on_selector("#match-lines", "svg => svg.viewBox.baseVal.width")
    height = await page.eval_on_selector("#match-lines", "svg => svg.viewBox.baseVal.height")
    scale, (first, second) = height / 240, expected["matches"][0]["points"]
    left = (width - 16 - 2 * 320 * scale) / 2
    wanted = [left + first[0] * scale, first[1] * scale, left + (320 + second[0]) * scale + 16, second[1] * scale]
    assert ends == pytest.approx(wanted, abs=0.1)


async def test_threshold_and_limit(page: Any, api: httpx.Client) -> None:
    await page.goto(PAIR)
    await page.wait_for_selector("#match-lines line", state="attached")
    expected = matches_of(api, 1, 5)["matches"]
    middle = round(expected[len(expected) // 2]["score"], 2)
    await page.locator("#match-threshold").fill(str(middle))
    wanted = [f"{match['score']:.3f}" for match in expected if match["score"] >= middle]
    assert 0 < len(wanted) < len(expected)
    assert await scores_of_table(page) == wanted
    await page.locator("#match-threshold").fill("0")
    await page.fill("#match-limit", "3")
    await page.locator("#match-limit").blur()
    await expect(page.locator("#match-lines [role=option]")).to_have_count(3)
    assert await scores_of_table(page) == [f"{match['score']:.3f}" for match in expected[:3]]


async def test_arrow_keys_and_pointer_choose_a_match(page: Any, api: httpx.Client) -> None:
    await page.goto(PAIR)
    await page.wait_for_selector("#match-lines line", state="attached")
    expected = matches_of(api, 1, 5)["matches"]
    await page.focus("#match-lines")
    await page.keyboard.press("ArrowRight")
    await page.keyboard.press("ArrowDown")
    status = await page.text_content("#match-status")
    assert f"Match 3 of {len(expected)}: score {expected[2]['score']:.3f}" in status
    assert await page.get_attribute("#match-lines", "aria-activedescendant") == "match-2"
    assert await page.get_attribute("#match-2", "aria-selected") == "true"
    assert await page.locator("#match-lines rect.match-patch").count() == 2
    await page.keyboard.press("End")
    assert f"Match {len(expected)} of" in await page.text_content("#match-status")
    # The end of a line is in no other line, unless two lines end at the same patch, and patches match only once.
    box = await page.locator("#match-lines").bounding_box()
    x, y = await page.eval_on_selector("#match-1", "line => [line.x1.baseVal.value, line.y1.baseVal.value]")
    await page.mouse.move(box["x"] + x, box["y"] + y)
    await expect(page.locator("#match-1")).to_have_attribute("aria-selected", "true")
    assert "Match 2 of" in await page.text_content("#match-status")


async def test_images_from_a_file_and_from_a_collection(page: Any, api: httpx.Client, image_file: Path) -> None:
    await page.goto("/#match")
    first, second = page.get_by_role("region", name="First image"), page.get_by_role("region", name="Second image")
    await first.locator("input[type=file]").set_input_files(image_file)
    await first.get_by_text("photo.jpg, 320 × 240 pixels").wait_for()
    assert await first.get_by_role("button", name="choose a file").is_hidden()
    await second.get_by_label("Collection").select_option("shop")
    await second.get_by_label("Item").fill("shelf/08")
    await second.get_by_role("button", name="Use the item").click()
    await page.wait_for_selector("#match-lines line", state="attached")
    expected = matches_of(api, 100, 8)
    assert await scores_of_table(page) == [f"{match['score']:.3f}" for match in expected["matches"]]
    assert f"of {expected['total']} matches" in await page.text_content("#match-total")
    assert "/v1/match" in await page.text_content("#code-panes")


async def test_an_older_answer_is_not_shown_after_a_newer_one(page: Any, api: httpx.Client) -> None:
    held: list[Any] = []

    async def hold(route: Any) -> None:
        if held:
            await route.continue_()
        else:
            held.append(route)

    await page.route("**/v1/match", hold)
    await page.goto(PAIR)
    while not held:
        await page.wait_for_timeout(20)
    await page.fill("#match-limit", "2")
    await page.locator("#match-limit").blur()
    await page.wait_for_selector("#match-lines line", state="attached")
    answer = {"matches": [], "total": 0, "score": 0, "crop_boxes": []}
    await held[0].fulfill(body=json.dumps(answer))
    assert len(await scores_of_table(page)) == 2


async def test_a_narrow_page_shows_one_image_above_the_other(page: Any) -> None:
    await page.set_viewport_size({"width": 360, "height": 740})
    await page.goto(PAIR)
    await page.wait_for_selector("#match-lines line", state="attached")
    width, height = await page.eval_on_selector(
        "#match-lines", "svg => [svg.viewBox.baseVal.width, svg.viewBox.baseVal.height]"
    )
    assert height > width
    assert await page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


async def test_an_unknown_item_is_an_error_in_text(page: Any) -> None:
    await page.goto("/#match?collection=shop&a=%3Cimg%20src%3Dx%3E&b=shelf%2F05")
    alert = page.get_by_role("region", name="First image").get_by_role("alert")
    await alert.wait_for()
    assert "<img src=x>" in await alert.inner_text()
    assert await alert.locator("img").count() == 0
