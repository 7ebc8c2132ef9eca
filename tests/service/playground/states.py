"""The views of the playground with results: how each of them is reached in a browser."""

from collections.abc import Awaitable, Callable
from typing import Any

BOX = [153, 22, 111, 89]  # of the object of scene 1
LOAD_IMAGES = """async () => {
  for (const image of document.images) {
    if (!image.offsetParent) continue;
    image.scrollIntoView();
    while (image.isConnected && !image.naturalWidth) await new Promise(requestAnimationFrame);
  }
  window.scrollTo(0, 0);
}"""
State = Callable[[Any], Awaitable[None]]


async def type_box(page: Any, box: list[int]) -> None:
    for name, value in zip(("x", "y", "width", "height"), box, strict=True):
        await page.fill(f"#box-{name}", str(value))
    await page.press("#box-height", "Tab")


async def wait_for_ids(page: Any, cards: str, ids: list[str]) -> None:
    """Wait until the cards that match the selector `cards` are those of the items `ids`, in this order."""
    shown = "all => all.map((one) => one.dataset.id)"
    script = """([cards, ids]) =>
      JSON.stringify([...document.querySelectorAll(cards)].map((one) => one.dataset.id)) === JSON.stringify(ids)"""
    try:
        await page.wait_for_function(script, arg=[cards, ids], timeout=15_000)
    except Exception:
        assert await page.eval_on_selector_all(cards, shown) == ids
        raise


async def _search(page: Any) -> None:
    await page.goto("/#search?collection=shop&id=shelf%2F03")
    await page.wait_for_selector("#search-results .card")


async def _patches(page: Any) -> None:
    await page.goto("/#image?collection=shop&item=shelf%2F01&tab=patches")
    await page.wait_for_selector("#patch-readout[data-ready]")
    box = await page.locator("#stage").bounding_box()
    await page.locator("#stage").click(position={"x": 0.65 * box["width"], "y": 0.28 * box["height"]})
    await page.click("#show-similar")
    await page.wait_for_selector("#patch-results .card")


async def _mark(page: Any) -> None:
    await page.goto("/#image?collection=shop&item=shelf%2F01&tab=mark")
    await page.wait_for_selector("#box-x")
    await type_box(page, BOX)
    await page.click("#segment")
    await page.wait_for_selector("#segment-json")


def _tab(name: str, button: str | None, result: str) -> State:
    async def reach(page: Any) -> None:
        await page.goto(f"/#image?collection=shop&item=shelf%2F01&tab={name}")
        if button:
            await page.click(button)
        await page.wait_for_selector(result)

    return reach


async def _match(page: Any) -> None:
    await page.goto("/#match?collection=shop&a=shelf%2F01&b=shelf%2F05")
    await page.wait_for_selector("#match-lines line", state="attached")
    await page.click("#match-table summary")


async def _map(page: Any) -> None:
    await page.goto("/#map?collection=shop")
    await page.get_by_text("24 items.").wait_for()
    await page.locator("ul.legend button").first.click()
    await page.fill("#duplicates-threshold", "0.9")
    await page.select_option("#duplicates-by", "similarity")
    await page.click("#duplicates-find")
    await page.get_by_text("among 24 items").wait_for()


async def _collections(page: Any) -> None:
    await page.goto("/#collections?collection=shop")
    await page.wait_for_selector("#items .card")


async def _models(page: Any) -> None:
    await page.goto("/#models")
    await page.wait_for_selector("#models article")


async def _jobs(page: Any) -> None:
    await page.goto("/#jobs")
    await page.get_by_text("Start a job or retrain from here").click()
    await page.wait_for_selector("#job-form .field")


async def _docs(page: Any) -> None:
    await page.goto("/docs#list_collections")
    await page.locator("#list_collections form.try").get_by_role("button", name="Send").click()
    await page.wait_for_selector("#list_collections .answer strong")


STATES: dict[str, State] = {
    "search": _search,
    "patches": _patches,
    "mark": _mark,
    "attention": _tab("attention", None, "#attention-readout"),
    "colours": _tab("colours", None, "#colours-readout"),
    "masks": _tab("masks", "#compute-masks", "#mask-result h3"),
    "boxes": _tab("boxes", "#find-objects", "#box-result h3"),
    "depth": _tab("depth", "#estimate-depth", "#depth-help"),
    "class": _tab("class", "#classify", "#class-result h3"),
    "match": _match,
    "map": _map,
    "collections": _collections,
    "models": _models,
    "jobs": _jobs,
    "docs": _docs,
}


async def reach(page: Any, name: str) -> None:
    """Open a view with results, and wait until nothing is on the way any more."""
    await page.goto("about:blank")
    await STATES[name](page)
    await page.wait_for_function("() => !document.querySelector('[aria-busy]')")
    await page.evaluate(LOAD_IMAGES)
