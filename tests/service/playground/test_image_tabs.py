"""Tests of the other tabs of the view "Image": marks, attention, colours, masks, boxes, depth and class."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from model.artifact import bundled_artifact, load_artifact
from model.heads.store import remove_head
from tests.service.playground.scenes import scene
from tests.service.playground.states import BOX, type_box
from tests.service.test_server import Server
from tests.service.vision.head_models import add_linear_depth


async def open_tab(page: Any, tab: str) -> None:
    await page.goto("about:blank")
    await page.goto(f"/#image?collection=shop&item=shelf/01&tab={tab}")
    await page.wait_for_selector(f"#image-{tab} :is(button, output)")


def ask(api: httpx.Client, path: str, **data: Any) -> Any:
    answer = api.post(path, files={"file": ("01.jpg", scene(1), "image/jpeg")}, data={"size": 336} | data)
    return answer.raise_for_status()


async def saved(page: Any, selector: str) -> bytes:
    """Click a download button, and return the content of the file."""
    async with page.expect_download() as waited:
        await page.click(selector)
    return Path(await (await waited.value).path()).read_bytes()


async def drag(page: Any, *points: tuple[float, float]) -> None:
    """Drag over the stage, from point to point in pixels of the image."""
    await page.locator("#stage").scroll_into_view_if_needed()
    box = await page.locator("#stage").bounding_box()
    ends = [(box["x"] + x * box["width"] / 320, box["y"] + y * box["height"] / 240) for x, y in points]
    await page.mouse.move(*ends[0])
    await page.mouse.down()
    for end in ends[1:]:
        await page.mouse.move(*end, steps=4)
    await page.mouse.up()


async def test_rle_is_that_of_pycocotools(page: Any) -> None:
    await page.goto("/")
    rng = np.random.default_rng(1)
    for height, width, share in [(1, 1, 1), (7, 5, 0), (7, 5, 1), (40, 60, 0.5), (200, 150, 0.02)]:
        pixels = (rng.random((height, width)) < share).astype(np.uint8)
        answer = await page.evaluate(
            """async ([pixels, height, width]) => {
                const { decodeMask, encodeMask } = await import("/assets/rle.js");
                const mask = encodeMask(Uint8Array.from(pixels), height, width);
                return [mask, [...decodeMask(mask)]];
            }""",
            [pixels.ravel().tolist(), height, width],
        )
        expected = coco.encode(np.asfortranarray(pixels))
        assert answer[0] == {"size": [height, width], "counts": expected["counts"].decode()}
        assert answer[1] == pixels.ravel().tolist()


async def test_a_box_is_segmented_and_downloaded(page: Any, api: httpx.Client) -> None:
    await open_tab(page, "mark")
    await drag(page, (BOX[0], BOX[1]), (200, 90), (BOX[0] + BOX[2], BOX[1] + BOX[3]))
    drawn = [int(await page.input_value(f"#box-{name}")) for name in ("x", "y", "width", "height")]
    assert drawn == pytest.approx(BOX, abs=3)
    await type_box(page, BOX)
    assert "a box at 153, 22 of 111 × 89 pixels" in await page.inner_text("#mark-summary")
    await page.click("#segment")
    await page.wait_for_selector("#segment-json")
    prompts = json.dumps([{"box": BOX}])
    [expected] = ask(api, "/v1/segment", method="prompt", format="rle", prompts=prompts).json()["regions"]
    [got] = json.loads(await saved(page, "#segment-json"))["annotations"]
    assert got["segmentation"] == expected["segmentation"]
    assert (got["area"], got["bbox"]) == (coco.area(expected["segmentation"]), expected["box"])
    png = np.asarray(Image.open(io.BytesIO(await saved(page, "#segment-png"))).convert("L"))
    assert np.array_equal(png == 255, coco.decode(expected["segmentation"]) == 1)
    assert set(np.unique(png)) <= {0, 255}
    assert str(expected["area"]) in await page.inner_text("#mark-result table")


async def test_a_painted_mask_and_points_are_sent(page: Any) -> None:
    await open_tab(page, "mark")
    await page.select_option("#mark-tool", "brush")
    await drag(page, (180, 60), (230, 60))
    painted = int(await page.get_attribute("#mark-summary", "data-area"))
    assert 50 * 20 < painted < 75 * 24
    await page.select_option("#mark-tool", "erase")
    await drag(page, (180, 60), (200, 60))
    assert int(await page.get_attribute("#mark-summary", "data-area")) < painted
    await page.select_option("#mark-tool", "negative")
    await page.focus("#stage")
    await page.keyboard.press("Shift+ArrowDown")
    await page.keyboard.press("Enter")
    assert "1 point outside" in await page.inner_text("#mark-summary")
    await page.evaluate("addEventListener('api-request', ({ detail }) => { window.sent = detail.form; })")
    await page.click("#segment")
    [prompt] = json.loads(dict(await page.evaluate("window.sent"))["prompts"])
    area = int(await page.get_attribute("#mark-summary", "data-area"))
    assert coco.area(prompt["mask"]) == area
    assert prompt["mask"]["size"] == [240, 320]
    assert [point["positive"] for point in prompt["points"]] == [False]
    await page.wait_for_selector("#mark-result table, #mark-result [role=alert]")
    await page.click("#save-mark")
    mask = json.loads(await saved(page, "#mark-json"))["annotations"][0]["segmentation"]
    assert mask == prompt["mask"]
    await page.click("#clear-marks")
    assert await page.inner_text("#mark-summary") == "Nothing is marked."


async def test_a_region_is_found_everywhere_page_by_page(page: Any, api: httpx.Client) -> None:
    await open_tab(page, "mark")
    await page.wait_for_selector("#find-everywhere")
    await page.click("#find-everywhere")
    assert "Mark a region first" in await page.inner_text("#mark-result")
    await type_box(page, BOX)
    await page.select_option("#mark-collection", "shop")
    await page.fill("#find-limit", "2")
    await page.fill("#find-score", "0.3")
    await page.click("#find-everywhere")
    await page.wait_for_selector("#find-more:not([hidden])")
    await page.click("#find-more")
    await page.locator("#mark-result li").nth(3).wait_for()
    await page.locator("#mark-result li[data-drawn]").nth(1).wait_for()
    reference = {"image": base64.b64encode(scene(1)).decode(), "box": BOX}
    body = {"references": [reference], "min_score": 0.3, "limit": 4}
    expected = api.post("/v1/collections/shop/find-region", json=body).json()
    ids = await page.eval_on_selector_all("#mark-result li", "all => all.map(one => one.dataset.id)")
    assert ids == [hit["id"] for hit in expected["data"]]
    status = await page.inner_text("#find-status")
    assert f"{expected['total']} images contain the region, 4 are shown. 24 images were examined" in status


async def test_attention_has_the_weights_of_the_api(page: Any, api: httpx.Client) -> None:
    maps = np.array(ask(api, "/v1/attention", blocks="all").json()["maps"])
    rollout = np.array(ask(api, "/v1/attention", blocks="all", fuse_blocks="rollout").json()["maps"])

    async def check(expected: np.ndarray, **dataset: str) -> None:
        state = "".join(f"[data-{name}='{value}']" for name, value in dataset.items())
        await page.wait_for_selector(f"#attention-readout{state}")
        shown = await page.eval_on_selector("#attention-readout", "one => ({ ...one.dataset })")
        assert float(shown["low"]) == pytest.approx(expected.min(), rel=1e-4)
        assert float(shown["high"]) == pytest.approx(expected.max(), rel=1e-4)
        assert int(shown["top"]) == expected.argmax()

    await open_tab(page, "attention")
    blocks, heads = maps.shape[:2]
    await check(maps[-1, 0], mode="head", block=str(blocks), head="1")
    assert await page.locator("#attention-grid button").count() == blocks * heads
    await page.fill("#attention-head", "2")
    await check(maps[-1, 1], head="2")
    await page.focus("#stage")
    await page.keyboard.press("ArrowRight")
    await page.keyboard.press("ArrowLeft")
    shown = await page.eval_on_selector("#attention-readout", "one => ({ ...one.dataset })")
    assert float(shown["weight"]) == pytest.approx(maps[-1, 1].ravel()[int(shown["at"])], rel=1e-4)
    await page.get_by_role("button", name="Block 2, head 1", exact=True).click()
    await check(maps[1, 0], mode="head", block="2", head="1")
    await page.keyboard.press("ArrowRight")
    await check(maps[1, 1], mode="head", block="2", head="2")
    await page.select_option("#attention-mode", "mean")
    await check(maps[1].mean(0), mode="mean")
    await page.select_option("#attention-mode", "rollout")
    await check(rollout.reshape(-1, *maps.shape[2:])[-1], mode="rollout")


async def test_colours_are_those_of_the_api(page: Any, api: httpx.Client) -> None:
    colours = np.load(io.BytesIO(ask(api, "/v1/features", format="pca_npy").content))
    colours = colours if colours.dtype == np.uint8 else np.clip(np.rint(colours * 255), 0, 255)
    await open_tab(page, "colours")
    await page.wait_for_selector("#colours-readout[data-grid]")
    await page.focus("#stage")
    for key in ("ArrowDown", "ArrowRight"):
        await page.keyboard.press(key)
    shown = await page.eval_on_selector("#colours-readout", "one => ({ ...one.dataset })")
    assert shown["grid"] == "24x32"
    row, column = int(shown["row"]), int(shown["column"])
    assert (row, column) == (1, 1)
    assert [int(value) for value in shown["colour"].split()] == pytest.approx(colours[row, column].tolist(), abs=1)


@pytest.mark.parametrize(
    ("method", "options"), [("cut", {}), ("multi", {}), ("cluster", {"k": "3"}), ("foreground", {})]
)
async def test_masks_are_those_of_the_api(page: Any, api: httpx.Client, method: str, options: dict[str, str]) -> None:
    await open_tab(page, "masks")
    await page.select_option("#mask-method", method)
    if "k" in options:
        await page.fill("#mask-k", options["k"])
    await page.click("#compute-masks")
    await page.wait_for_selector("#mask-json")
    answer = ask(api, "/v1/segment", method=method, format="rle", **options).json()
    expected = [region["segmentation"] for region in answer.get("regions", [answer])]
    got = json.loads(await saved(page, "#mask-json"))["annotations"]
    assert [one["segmentation"] for one in got] == expected
    assert [one["area"] for one in got] == [int(coco.area(mask)) for mask in expected]
    assert [one["bbox"] for one in got] == [coco.toBbox(mask).tolist() for mask in expected]


async def test_boxes_are_those_of_the_api(page: Any, api: httpx.Client) -> None:
    await open_tab(page, "boxes")
    await page.click("#find-objects")
    await page.wait_for_selector("#box-result table")
    objects = ask(api, "/v1/detect").json()["objects"]
    rows = await page.eval_on_selector_all("#box-result tbody tr", "all => all.map(row => row.innerText)")
    assert len(rows) == len(objects)
    for row, found in zip(rows, objects, strict=True):
        assert ", ".join(str(value) for value in found["box"]) in row
        assert f"{found['score']:.3f}" in row


async def test_without_a_depth_head_the_page_says_how_to_get_one(page: Any) -> None:
    await open_tab(page, "depth")
    await page.click("#estimate-depth")
    await page.wait_for_selector("#depth-help")
    text = await page.inner_text("#depth-help")
    assert "has no head for depth" in text
    assert "dinov2 train-head depth" in text


async def test_depth_is_that_of_the_head(page: Any, api: httpx.Client, server: Server) -> None:
    artifact = load_artifact(bundled_artifact(), derived_dir=server.log.with_suffix("") / "derived")
    add_linear_depth(artifact)
    try:
        await open_tab(page, "depth")
        await page.click("#estimate-depth")
        await page.wait_for_selector("#depth-result p")
        depth = np.load(io.BytesIO(ask(api, "/v1/depth", format="npy").content))
        low, median, high = (
            f"{value:.2f} m" for value in (depth.min(), np.sort(depth, axis=None)[depth.size // 2], depth.max())
        )
        text = await page.inner_text("#depth-result")
        assert low in text
        assert high in text
        assert median in text
        box = await page.locator("#stage").bounding_box()
        await page.locator("#stage").hover(position={"x": 0.25 * box["width"], "y": 0.75 * box["height"]})
        shown = re.fullmatch(r"x (\d+), y (\d+): (.*)", await page.inner_text("#depth-readout"))
        assert shown, await page.inner_text("#depth-readout")
        assert shown[3] == f"{depth[int(shown[2]), int(shown[1])]:.2f} m"
    finally:
        remove_head(artifact, "rooms")


async def test_the_class_is_that_of_the_api(page: Any, api: httpx.Client) -> None:
    await open_tab(page, "class")
    await page.select_option("#class-collection", "shop")
    await page.fill("#class-label", "brand")
    await page.click("#classify")
    await page.wait_for_selector("#class-result table")
    others = json.dumps({"not": {"field": "id", "eq": "shelf/01"}})  # an item does not vote for its own class
    data = {"collection": "shop", "label": "brand", "filter": others}
    answer = api.post("/v1/classify", files={"file": scene(1)}, data=data).json()
    expected = answer["data"][0]
    title = page.locator("#class-result h3").first
    assert await title.get_attribute("data-label") == (expected["label"] or "")
    assert await title.get_attribute("data-unknown") == str(expected["unknown"]).lower()
    text = await page.inner_text("#class-result")
    assert f"p-value {expected['p_value']:.3f}" in text
    assert all(f"{one['score']:.3f}" in text for one in expected["scores"])
    ids = await page.eval_on_selector_all("#class-result li", "all => all.map(one => one.dataset.id)")
    assert ids == [one["id"] for one in expected["neighbours"]]
    assert "shelf/01" not in ids
