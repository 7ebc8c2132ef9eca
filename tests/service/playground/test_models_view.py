"""Tests of the view of models: what it shows, both models side by side, promotion, rollback and deletion."""

import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from safetensors.numpy import load_file

from model.artifact import bundled_artifact, read_manifest
from model.engines.parity import sample_photos
from model.export.artifact import export_artifact
from model.export.options import Backbone, ExportOptions
from service.jobs.collapse import neighbours_kept
from tests.service.playground.conftest import watched_page
from tests.service.playground.scenes import scene
from tests.service.test_server import Server

MARKUP = "<img src=x onerror=alert(1)>"
ITEMS = 12
K = 5


@dataclass
class Place:
    """A service with the bundled model, and the artifact of another model in its data folder."""

    server: Server
    api: httpx.Client
    live: str
    other: str

    def model(self, name: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.api.get(f"/v1/models/{name}").raise_for_status().json()
        return answer

    def vectors(self, name: str, numbers: list[int]) -> Any:
        """Return the vectors that a model gives scenes, as the API computes them."""
        files = [("file", (f"{number}.jpg", scene(number), "image/jpeg")) for number in numbers]
        answer = self.api.post("/v1/embeddings", files=files, data={"model": name}).raise_for_status().json()
        return np.array([one["embedding"] for one in answer["data"]], np.float32)


def write_other_model(folder: Path) -> str:
    """Write an artifact with the bundled weights and noise, and return its name."""
    bundled, rng = read_manifest(bundled_artifact()), np.random.default_rng(0)
    weights = {
        name: array + (0.6 * array.std() * rng.standard_normal(array.shape)).astype(array.dtype)
        for name, array in load_file(bundled_artifact() / "weights.safetensors").items()
    }
    provenance = {
        "recipe": f"continue {MARKUP}",
        "init": {"name": bundled_artifact().name, "sha256": "1" * 64},
        "data_sha256": "d" * 64,
        "revision": "abc1234",
        "knn": {"cls": {"20": 0.4375}},
    }
    backbone = Backbone("other", weights, bundled.config, bundled.preprocess, provenance, bundled.licence)
    return export_artifact(backbone, folder, ExportOptions(images=sample_photos(2))).path.name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    data_dir = tmp_path_factory.mktemp("models") / "data"
    server = Server(data_dir)
    try:
        other = write_other_model(data_dir / "artifacts")
        with httpx.Client(base_url=server.url, timeout=60) as api:
            api.put("/v1/collections/shop", json={"originals": True}).raise_for_status()
            files = [("file", (f"{number}.jpg", scene(number), "image/jpeg")) for number in range(ITEMS)]
            ids = [f"{number:02} {MARKUP}" for number in range(ITEMS)]
            api.post("/v1/collections/shop/items", files=files, data={"id": ids}).raise_for_status()
            yield Place(server, api, api.get("/v1/models").json()["data"][0]["id"], other)
    finally:
        server.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def view(browser: Any, place: Place) -> AsyncIterator[Any]:
    """The view of models of this service."""
    async with watched_page(browser, place.server.url) as page:
        await page.goto("/#models")
        await page.wait_for_selector("#models article")
        yield page


async def test_models_are_shown_with_their_lineage(view: Any, place: Place) -> None:
    answers = place.api.get("/v1/models").json()["data"]
    shown = await view.eval_on_selector_all("#models article", "all => all.map(one => one.dataset.model)")
    assert shown == [answer["id"] for answer in answers]
    for answer in answers:
        text = await view.inner_text(f"article[data-model='{answer['id']}']")
        assert answer["state"] in text
        assert answer["fingerprint"] in text
        if answer["precision"]:
            assert answer["precision"] in text
            assert answer["engine"] in text
    other = await view.text_content(f"article[data-model='{place.other}']")
    for part in (f"continue {MARKUP}", "d" * 64, "abc1234", f"{place.live} (live here)", "0.4375"):
        assert part in other
    assert await view.locator("#models img").count() == 0


async def test_both_models_are_compared_side_by_side(view: Any, place: Place, image_file: Path) -> None:
    await view.locator(f"article[data-model='{place.other}']").get_by_role("button", name="Compare").click()
    await view.set_input_files("#compare input[type='file']", image_file)
    await view.fill("#compare-k", str(K))
    await view.click("#compare-go")
    await view.wait_for_selector("#compare-result .ranks li")
    assert place.model(place.other)["state"] == "candidate"
    assert place.model(place.other)["loaded"]
    assert await view.inner_text("#compared-1 .quiet") == "candidate"
    nearest, vectors = [], {}
    for side, name in enumerate((place.live, place.other)):
        rows = place.vectors(name, [*range(ITEMS), 100])
        vectors[name] = rows[:ITEMS]
        order = np.argsort(-(rows[:ITEMS] @ rows[ITEMS]), kind="stable")
        nearest.append([f"{number:02} {MARKUP}" for number in order])
        column = f"section[aria-labelledby='compared-{side}'] .ranks li"
        shown = await view.eval_on_selector_all(column, "all => all.map(one => [one.dataset.id, one.innerText])")
        assert [one for one, _ in shown] == nearest[side][:K]
        assert f"score {np.sort(-(rows[:ITEMS] @ rows[ITEMS]))[0] * -1:.3f}" in shown[0][1]
    moved = await view.eval_on_selector_all(
        "section[aria-labelledby='compared-1'] .ranks li", "all => all.map(one => one.classList.contains('moved'))"
    )
    assert moved == [nearest[0].index(one) != rank for rank, one in enumerate(nearest[1][:K])]
    assert any(moved)
    kept = len(set(nearest[0][:K]) & set(nearest[1][:K]))
    status = await view.inner_text("#compare-status")
    assert f"{kept} of the {K} nearest images are the same" in status
    share = neighbours_kept(vectors[place.live], vectors[place.other], K)
    assert share is not None
    assert f"{round(share * 100)} % of the neighbours are kept" in status
    await view.locator("#compare-result .ranks li").last.scroll_into_view_if_needed()
    await view.wait_for_function(
        "() => [...document.querySelectorAll('.ranks img')].every(one => one.naturalWidth > 0)"
    )
    assert await view.locator("#compare-result .ranks li").count() == 2 * K


async def test_both_rankings_say_where_the_other_model_ranks_an_image(view: Any) -> None:
    script = """(rankings) => import("/assets/views/models-ranks.js").then(({ compared }) =>
      [1, 2, 3, 4].map((k) => compared(rankings, k)))"""
    orders = ["abcd", "cadb"]
    rankings = [[{"id": name, "score": 1 - rank / 4} for rank, name in enumerate(order)] for order in orders]
    for k, found in enumerate(await view.evaluate(script, rankings), 1):
        assert found["kept"] == len(set(orders[0][:k]) & set(orders[1][:k]))
        for side, entries in enumerate(found["lists"]):
            assert [(one["id"], one["there"]) for one in entries] == [
                (name, orders[1 - side].index(name) + 1) for name in orders[side][:k]
            ]
            assert all(one["mark"].startswith("only here") == (one["there"] > k) for one in entries)


async def test_a_part_of_the_collection_is_compared(view: Any, place: Place, image_file: Path) -> None:
    await view.select_option("#compare-model", place.other)
    await view.set_input_files("#compare input[type='file']", image_file)
    await view.fill("#compare-count", "5")
    await view.click("#compare-go")
    await view.wait_for_selector("#compare-result .ranks li")
    shown = await view.eval_on_selector_all(".ranks li", "all => all.map(one => one.dataset.id)")
    assert sorted(set(shown)) == [f"{number * ITEMS // 5:02} {MARKUP}" for number in range(5)]


async def test_an_item_of_the_collection_is_the_query(view: Any, place: Place) -> None:
    await view.select_option("#compare-model", place.other)
    await view.click("#compare .chooser summary")
    await view.locator("#compare .choices button").first.click()
    await view.wait_for_selector("#compare-query img")
    chosen = await view.inner_text("#compare-query p")
    await view.click("#compare-go")
    await view.wait_for_selector("#compare-result .ranks li")
    shown = await view.eval_on_selector_all(".ranks li", "all => all.map(one => one.dataset.id)")
    assert len(shown) == 20
    assert chosen not in shown  # the query itself is left out


async def test_a_model_on_trial_is_unloaded(view: Any, place: Place) -> None:
    place.api.post("/v1/models/load", json={"model": place.other}).raise_for_status()
    await view.reload()
    card = view.locator(f"article[data-model='{place.other}']")
    await card.get_by_role("button", name="Unload").click()
    await card.locator(".state.available").wait_for()
    assert place.model(place.other)["state"] == "available"


async def test_a_model_is_promoted_rolled_back_and_the_errors_are_text(view: Any, place: Place) -> None:
    card = view.locator(f"article[data-model='{place.other}']")
    await card.get_by_role("button", name="Promote").click()
    await view.keyboard.press("Escape")
    assert place.api.get("/v1/jobs").json()["data"] == []  # nothing happens without the confirmation
    await card.get_by_role("button", name="Promote").click()
    await view.fill("#promote-hours", "2")
    await view.get_by_role("dialog").get_by_role("button", name="Promote").click()
    await view.wait_for_url("**/#jobs?job=*")
    job = place.api.get(f"/v1/jobs/{view.url.partition('job=')[2]}").json()
    assert job["params"] == {"model": place.other, "promote": True, "lost": "refuse", "keep_hours": 2}
    await view.locator("#job .state.succeeded").wait_for(timeout=50_000)
    assert place.model("auto")["id"] == place.other
    await view.wait_for_function("(name) => document.getElementById('model').textContent === name", arg=place.other)

    await view.goto("/#models")
    card = view.locator(f"article[data-model='{place.live}']")
    await card.locator(".state.former").wait_for()
    assert "2 hours left" in await card.inner_text() or "120 minutes left" in await card.inner_text()
    await card.get_by_role("button", name="Roll back to it").click()
    await view.get_by_role("dialog").get_by_role("button", name="Roll back").click()
    await card.locator(".state.live").wait_for()
    assert place.model("auto")["id"] == place.live
    await view.wait_for_function("(name) => document.getElementById('model').textContent === name", arg=place.live)
    assert await view.locator("#models .state.live").count() == 1


async def test_a_model_is_deleted_after_a_confirmation(view: Any, place: Place) -> None:
    folder = Path(place.server.log).with_suffix("") / "artifacts"
    manifest = json.loads((bundled_artifact() / "manifest.json").read_text())
    unused = folder / "unused-ffffffff"
    unused.mkdir()
    (unused / "manifest.json").write_text(json.dumps(manifest | {"name": "unused", "fingerprint": "f" * 64}))
    await view.reload()
    card = view.locator("article[data-model='unused-ffffffff']")
    await card.get_by_role("button", name="Delete").click()
    await view.get_by_role("dialog").get_by_role("button", name="Delete").click()
    await card.wait_for(state="detached")
    assert not unused.exists()
    assert place.api.get("/v1/models/unused-ffffffff").status_code == 404


async def test_a_model_that_cannot_be_loaded_says_why(view: Any, place: Place) -> None:
    manifest = json.loads((bundled_artifact() / "manifest.json").read_text())
    broken = Path(place.server.log).with_suffix("") / "artifacts" / "broken-eeeeeeee"
    broken.mkdir()
    (broken / "manifest.json").write_text(json.dumps(manifest | {"name": "broken", "fingerprint": "e" * 64}))
    await view.reload()
    await view.select_option("#compare-model", "broken-eeeeeeee")
    photo = {"name": f"{MARKUP}.jpg", "mimeType": "image/jpeg", "buffer": scene(3)}
    await view.set_input_files("#compare input[type='file']", photo)
    await view.click("#compare-go")
    alert = view.locator("#compare-result [role='alert']")
    await alert.wait_for()
    assert "broken-eeeeeeee cannot be loaded" in await alert.inner_text()
    assert await view.locator("#compare-query img[src='x']").count() == 0
    deadline = time.monotonic() + 10
    while place.model("broken-eeeeeeee")["load_error"] is None:
        assert time.monotonic() < deadline
