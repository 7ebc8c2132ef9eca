"""Tests of the window after a switch: rollbacks, what they contain, and how the window ends."""

import asyncio
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service import live_models
from service.errors import Conflict
from service.generations import Generation, Generations
from service.live_models import Opened, Record
from service.migration.rollback import roll_back
from service.migration.run import migrate
from service.migration.work import MigrationOptions, Places
from service.search.partners import migrations_of
from tests.fakes import photo, running, until
from tests.service.migration.lives import Life, life, make_collection, meanwhile, opened, vector_of


async def test_a_rollback_takes_less_than_a_second_and_has_every_write(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        images = await make_collection(one)
        await one.migrate()
        await one.live_is("b")
        new = photo(7)
        await one.put("c", "new", new)
        await one.ask("DELETE", "/v1/collections/c/items/i0")
        loop = asyncio.get_running_loop()
        started = loop.time()
        result = await roll_back(one.places)
        await one.live_is("a")
        assert loop.time() - started < 1
        assert (result.generation.number, result.collections, result.lacking) == (1, ["c"], {})
        found = await one.search("c", new, k=9)
        assert found["fingerprint"] == "a" * 64
        assert found["data"][0]["id"] == "new"
        assert {hit["id"] for hit in found["data"]} == {"new", "i1", "i2", "i3", "i4"}
        with pytest.raises(Conflict, match=r"generation 1 is live after a rollback; .* promote generation 2"):
            await roll_back(one.places)  # the same request again
        await one.migrate("b")
        await one.live_is("b")
        assert (await one.search("c", images[1]))["data"][0]["id"] == "i1"


async def test_one_model_is_shown_as_live_while_the_service_takes_over_a_rollback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with life(tmp_path) as one:
        await make_collection(one)
        await one.migrate()
        await one.live_is("b")
        monkeypatch.setattr(live_models, "POLL_S", 60.0)
        await asyncio.sleep(0.5)  # from now on, the service does not look at the record
        await one.ask("POST", "/v1/models/rollback")
        states = {model["fingerprint"][0]: model["state"] for model in (await one.ask("GET", "/v1/models"))["data"]}
        assert (states["a"], states["b"]) == ("candidate", "live")  # b still answers requests
        assert (await one.embed(photo(1)))["fingerprint"] == "b" * 64


async def test_a_rollback_to_a_model_whose_artifact_is_gone_is_refused(tmp_path: Path) -> None:
    """Otherwise the service would work until its next restart, and then not start at all."""
    async with life(tmp_path) as one:
        await make_collection(one)
        await one.migrate()
        shutil.rmtree(tmp_path / "artifacts" / "model_a-aaaaaaaa")
        with pytest.raises(Conflict, match=r"could not load it: .* its artifact is gone"):
            await roll_back(one.places)
        assert (await roll_back(one.places, force=True)).generation.number == 1


async def test_after_a_rollback_the_same_model_can_be_promoted_again(tmp_path: Path) -> None:
    """The vectors that the first migration computed are still there, so nothing is embedded again."""
    async with life(tmp_path) as one:
        images = await make_collection(one)
        await one.migrate("b")
        await roll_back(one.places)
        report = await one.migrate("b")
        assert (report.switched, report.embedded) == (["c"], 0)
        await one.live_is("b")
        assert (await one.search("c", images[0]))["fingerprint"] == "b" * 64
        await roll_back(one.places)
        await one.live_is("a")
        assert (await one.search("c", images[0]))["fingerprint"] == "a" * 64


async def test_a_restarted_process_writes_both_vectors_from_its_first_request(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        await make_collection(one)
        await one.migrate("b")
    generations = Generations(tmp_path)
    live = generations.live()
    assert live is not None
    new = opened("b")

    def slowly(generation: Generation) -> Opened:
        time.sleep(0.3)
        return opened(generation.fingerprint[0])

    record = Record(generations, live, slowly)
    async with running(tmp_path, engine=new.engine, artifact=new.artifact, record=record) as run:
        again = Life(run, generations, Places(run.service.store, generations, run.service.originals, tmp_path))
        await again.put("c", "new", photo(7))
        [pair] = await migrations_of(run.service.store).partnerships()
        assert (pair.role, await migrations_of(run.service.store).lacking("c")) == ("former", 0)


async def test_the_window_ends(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        await make_collection(one)
        await one.migrate(keep_s=0.0)
        await until(lambda: [each.state for each in one.generations.all()] == ["retired", "live"])
        assert await migrations_of(one.run.service.store).partnerships() == []
        with pytest.raises(Conflict, match="window for a rollback has ended"):
            await roll_back(one.places)


async def test_a_vector_needs_its_fingerprint_after_a_switch(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        images = await make_collection(one)
        old = (await one.embed(images[2]))["data"][0]["embedding"]
        found = await one.ask("POST", "/v1/collections/c/search", json={"vector": old})
        assert found["data"][0]["id"] == "i2"
        await one.migrate()
        await one.live_is("b")
        answer = await one.run.client.post("/v1/collections/c/search", json={"vector": old})
        assert answer.status_code == 409
        assert "Send `fingerprint`" in answer.json()["detail"]
        batch = {"queries": [{"vector": old}]}
        answer = await one.run.client.post("/v1/collections/c/search", json=batch)
        assert answer.status_code == 409 or answer.json()["errors"][0]["code"] == "model_mismatch"
        named = {"vector": old, "fingerprint": "a" * 64}
        for body in (named, {**named, "include": ["vector"]}):  # the quick way, and the general one
            found = await one.ask("POST", "/v1/collections/c/search", json=body)
            assert (found["data"][0]["id"], found["fingerprint"]) == ("i2", "a" * 64)
            assert found["data"][0]["score"] == pytest.approx(1.0, abs=1e-5)
        answer = await one.run.client.post("/v1/collections/c/items", json={"items": [{"id": "v", "vector": old}]})
        assert answer.status_code == 409 or answer.json()["errors"]


async def test_a_rollback_brings_dropped_items_back(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        images = await make_collection(one)
        item = {"id": "ready-made", "vector": vector_of("a" * 64, photo(50)).tolist(), "fingerprint": "a" * 64}
        await one.ask("POST", "/v1/collections/c/items", json={"items": [item]})
        await one.migrate(lost="drop")
        await one.live_is("b")
        assert len((await one.search("c", images[0], k=9))["data"]) == 5
        assert (await roll_back(one.places)).lacking == {}
        await one.live_is("a")
        assert len((await one.search("c", images[0], k=9))["data"]) == 6


async def test_a_rollback_tells_what_it_lacks(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        await make_collection(one)
        await one.migrate()
        await one.live_is("b")
        [live, former] = (await one.ask("GET", "/v1/models"))["data"][:2]
        for moment in (live["live_since"], former["live_since"], former["keep_until"]):
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", moment)
        assert live["keep_until"] is None
        item = {"id": "ready-made", "vector": vector_of("b" * 64, photo(50)).tolist(), "fingerprint": "b" * 64}
        await one.ask("POST", "/v1/collections/c/items", json={"items": [item]})
        answer = await one.run.client.post("/v1/models/rollback")
        assert answer.status_code == 409
        assert "lack 1 items" in answer.json()["detail"]
        body = await one.ask("POST", "/v1/models/rollback", json={"force": True})
        assert (body["lacking"], body["collections"], body["generation"]) == ({"c": 1}, ["c"], 1)


async def test_the_window_does_not_end_while_its_model_is_promoted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with life(tmp_path) as one:
        await make_collection(one)
        await one.migrate("b", keep_s=60)
        await one.live_is("b")
        await make_collection(one, "d", count=3)

        async def later() -> None:
            clock = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + 100)
            monkeypatch.setattr(live_models, "time", clock)
            await asyncio.sleep(2)

        report = await meanwhile(one, "embedding", later, "a", replicas_s=1)
        assert sorted(report.switched) == ["c", "d"]
        await one.live_is("a")


async def test_former_vectors_are_deleted_when_a_third_model_becomes_live_at_a_start(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        await make_collection(one)
        await one.migrate("b")
        await one.live_is("b")
        three = one.generations.add("c" * 64, "model_c", Path("artifacts/c"), "fake", "fp32", reason="a start")
        one.generations.promote(three.number, expected=2, keep_s=0)
        migrations = migrations_of(one.places.store)
        for _ in range(100):
            if not await migrations.partnerships():
                break
            await asyncio.sleep(0.02)
        assert await migrations.partnerships() == []


@pytest.mark.parametrize("options", [{}, {"collections": ("c",), "promote": False}], ids=["promote", "reindex"])
async def test_a_third_model_does_not_end_an_open_window_unasked(tmp_path: Path, options: dict[str, Any]) -> None:
    async with life(tmp_path) as one:
        images = await make_collection(one)
        await one.migrate("b")
        await one.live_is("b")
        before, stages = one.generations.stamp(), []
        with pytest.raises(Conflict, match=r"generation 1 \(model_a-aaaaaaaa\) can .* until 20.* --end-window"):
            await migrate(one.places, Path("c"), opened("c"), MigrationOptions(**options), stages.append)
        assert (one.generations.stamp(), stages) == (before, [])  # no replica has even loaded the model
        assert (await roll_back(one.places)).collections == ["c"]
        await one.live_is("a")
        assert (await one.search("c", images[0]))["data"][0]["id"] == "i0"
        with pytest.raises(Conflict, match=r"generation 2 \(model_b-bbbbbbbb\) can become live again"):
            await one.migrate("c", **options)
        report = await one.migrate("c", end_window=True, **options)
        assert report.switched == ["c"]
        assert (await one.search("c", images[0]))["fingerprint"] == "c" * 64
        states = {each.fingerprint[0]: each.state for each in one.generations.all()}
        expected = {"a": "live", "c": "candidate"} if options else {"a": "former", "c": "live"}
        assert states == {**expected, "b": "retired"}


async def test_a_promotion_that_is_refused_does_not_end_the_window(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        await make_collection(one)
        await one.migrate("b")
        await one.live_is("b")
        item = {"id": "ready-made", "vector": vector_of("b" * 64, photo(50)).tolist(), "fingerprint": "b" * 64}
        await one.ask("POST", "/v1/collections/c/items", json={"items": [item]})
        with pytest.raises(Conflict, match="1 items of 1 collections"):
            await one.migrate("c", end_window=True)
        assert (await roll_back(one.places, force=True)).collections == ["c"]


async def test_the_live_model_needs_no_window(tmp_path: Path) -> None:
    """Collections of old models are embedded again with the live model, and a rollback is still possible."""
    async with life(tmp_path) as one:
        await make_collection(one)
        await one.migrate("b")
        await one.live_is("b")
        report = await one.migrate("b", collections=("c",), promote=False)
        assert report.switched == []
        assert (await roll_back(one.places)).collections == ["c"]
