"""Tests of migrations with requests and other changes at the same time."""

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.files import lock_file
from service import live_models
from service.errors import Conflict, InsufficientStorage, Unavailable
from service.generations import Generation, Generations
from service.live_models import Opened
from service.migration import lock
from service.migration.giving_up import abandon_all
from service.migration.rollback import roll_back
from service.search.partners import migrations_of
from tests.fakes import photo, until
from tests.service.migration.lives import MODELS, Life, life, make_collection, meanwhile, models_of, vector_of


@pytest.mark.parametrize("stage", ["listing", "embedding"])
async def test_collections_are_not_switched_if_the_live_model_has_changed(tmp_path: Path, stage: str) -> None:
    async with life(tmp_path) as one:
        images = await make_collection(one)
        await one.migrate("b")
        await one.live_is("b")
        three = one.generations.add("c" * 64, "model_c", Path("artifacts/c"), "fake", "fp32", reason="a start")

        async def change() -> None:
            if stage == "listing":
                await roll_back(one.places)
            else:
                one.generations.promote(1, expected=2, keep_s=0)

        before = {"listing": "a", "embedding": "b"}[stage]
        with pytest.raises(Conflict, match="generation 1 is live, not 2"):
            await meanwhile(one, stage, change, "c", end_window=True)
        assert await models_of(one) == {"c": before}
        assert (await one.search("c", images[0]))["fingerprint"] == before * 64
        report = await one.migrate("c", end_window=True)
        assert (report.switched, report.generation) == (["c"], three.number)


async def test_a_collection_without_images_that_is_created_meanwhile_stays(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        await make_collection(one)

        async def create() -> None:
            await one.ask("PUT", "/v1/collections/late", json={"originals": False})
            await one.put("late", "x", photo(77))

        report = await meanwhile(one, "embedding", create)
        assert (report.stage, report.switched, report.kept, report.lost) == ("done", ["c"], ["late"], {"late": ["x"]})
        await one.live_is("b")
        assert await models_of(one) == {"c": "b", "late": "a"}
        assert (await one.search("late", photo(77)))["data"][0]["id"] == "x"


async def test_a_damaged_original_keeps_its_collection_on_the_old_model(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        images = await make_collection(one)
        await make_collection(one, "whole", count=2)
        folder = one.run.service.originals.folder
        assert folder is not None
        [file] = [path for path in folder.glob("*/*/*") if path.read_bytes() == images[3]]
        file.write_bytes(images[3][:-9] + b"different")
        report = await one.migrate(lost="keep")
        assert (report.switched, report.kept, report.lost) == (["whole"], ["c"], {"c": ["i3"]})
        assert await models_of(one) == {"c": "a", "whole": "b"}
        pairs = await migrations_of(one.places.store).partnerships()
        assert [pair.collection.name for pair in pairs] == ["whole"]


@pytest.mark.parametrize("stage", ["listing", "embedding", "switched"])
async def test_a_collection_may_be_deleted_and_created_again_meanwhile(tmp_path: Path, stage: str) -> None:
    async with life(tmp_path) as one:
        await make_collection(one)
        await make_collection(one, "other", count=2)
        images = [photo(300 + n) for n in range(3)]

        async def replace_it() -> None:
            await one.ask("DELETE", "/v1/collections/c")
            await one.ask("DELETE", "/v1/collections/other")
            await one.ask("PUT", "/v1/collections/c", json={"originals": True})
            for n, image in enumerate(images):
                await one.put("c", f"i{n}", image)

        report = await meanwhile(one, stage, replace_it, batch_size=2)
        assert report.stage == "done"
        await one.live_is("b")
        assert await models_of(one) == {"c": "b"}
        for n, image in enumerate(images):
            found = await one.search("c", image, k=9)
            assert (len(found["data"]), found["data"][0]["id"]) == (3, f"i{n}")
            assert found["data"][0]["score"] == pytest.approx(1.0, abs=1e-5)


async def test_a_migration_that_was_killed_in_the_switch_can_be_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def killed(*args: Any, **more: Any) -> None:
        raise Killed

    async with life(tmp_path) as one:
        images = await make_collection(one)
        monkeypatch.setattr(Generations, "promote", killed)
        with pytest.raises(Killed):
            await one.migrate()
        assert await models_of(one) == {"c": "b"}
        await one.put("c", "new", photo(7))
        await abandon_all(one.places)
        assert await models_of(one) == {"c": "a"}
        assert [each.state for each in one.generations.all()] == ["live", "retired"]
        assert await migrations_of(one.places.store).partnerships() == []
        assert (await one.search("c", photo(7)))["data"][0]["id"] == "new"
        assert (await one.search("c", images[0]))["fingerprint"] == "a" * 64


async def test_a_model_whose_loading_fails_is_not_loaded_again_at_once(tmp_path: Path) -> None:
    calls = []

    def load(generation: Generation) -> Opened:
        calls.append(generation.number)
        raise RuntimeError("an error of the runtime")

    async with life(tmp_path, load=load) as one:
        with pytest.raises(Unavailable):
            await one.migrate(replicas_s=0.3)
        assert calls == [2]


async def test_no_request_fails_and_no_vector_is_mixed_under_load(tmp_path: Path) -> None:
    """Clients write, delete, embed and search all the time, while the model goes from a to b, back, and to c. Each
    answer is compared with the vectors that its own fingerprint names."""
    async with life(tmp_path) as one:
        images = {f"i{n}": photo(100 + n) for n in range(12)}
        vectors = {(f, item): vector_of(f, image) for f in MODELS for item, image in images.items()}
        await make_collection(one, count=12)
        await one.ask("PUT", "/v1/collections/other", json={"originals": True})
        answers: dict[str, int] = {}
        ended = asyncio.Event()

        async def client(seed: int) -> None:
            rng = random.Random(seed)
            while not ended.is_set():
                item = rng.choice(list(images))
                kind = rng.choice(["embed", "search", "search", "vector", "put", "delete"])
                fingerprint = await action(one, kind, item, images[item], vectors)
                answers[fingerprint] = answers.get(fingerprint, 0) + 1
                await asyncio.sleep(0)

        clients = [asyncio.create_task(client(seed)) for seed in range(4)]
        await one.migrate("b", batch_size=2)
        await one.live_is("b")
        await asyncio.sleep(0.2)
        await roll_back(one.places)
        await one.live_is("a")
        await asyncio.sleep(0.2)
        await one.migrate("c", batch_size=2, end_window=True)
        await one.live_is("c")
        await asyncio.sleep(0.2)
        ended.set()
        await asyncio.gather(*clients)
        assert set(answers) == set(MODELS)
        assert all(info.tag.startswith("c" * 64) for info in await one.run.service.store.collections())


async def action(one: Life, kind: str, item: str, image: bytes, vectors: dict[tuple[str, str], np.ndarray]) -> str:
    """Send a request of one kind, check that its answer is of one model, and return the fingerprint of that model."""
    if kind == "put":
        return str((await one.put("other", item, image))["fingerprint"])
    if kind == "delete":
        answer = await one.run.client.delete(f"/v1/collections/other/items/{item}")
        assert answer.status_code in (200, 404), answer.text
        return str(one.run.app.state.service.artifact.fingerprint)
    if kind == "embed":
        body = await one.embed(image)
        np.testing.assert_allclose(body["data"][0]["embedding"], vectors[body["fingerprint"], item], atol=1e-5)
        return str(body["fingerprint"])
    if kind == "vector":
        made = await one.embed(image)
        query = {"vector": made["data"][0]["embedding"], "fingerprint": made["fingerprint"], "k": 12}
        body = await one.ask("POST", "/v1/collections/c/search", json=query)
        assert body["fingerprint"] == made["fingerprint"]
    else:
        body = await one.search("c", image, k=12)
    query_vector = vectors[body["fingerprint"], item]
    for hit in body["data"]:
        score = float(query_vector @ vectors[body["fingerprint"], hit["id"]])
        assert hit["score"] == pytest.approx(score, abs=1e-4), "a vector of another model"
    assert len(body["data"]) == 12
    return str(body["fingerprint"])


async def test_a_record_that_cannot_be_written_is_logged_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beats = 0

    def fails(self: Generations, replica: str, loaded: list[int]) -> None:
        nonlocal beats
        beats += 1
        raise InsufficientStorage("the record of models: the disk is full")

    monkeypatch.setattr(live_models, "POLL_S", 0.01)
    monkeypatch.setattr(live_models, "BEAT_S", 0.01)
    async with life(tmp_path):
        monkeypatch.setattr(Generations, "beat", fails)
        await until(lambda: beats > 3)
        monkeypatch.undo()
    told = [record.message for record in caplog.records if record.name == "service.live_models"]
    assert told == ["the record of models: the disk is full"]


async def test_a_migration_waits_while_the_service_ends_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "WAIT_S", 0.3)
    async with life(tmp_path) as one:
        await make_collection(one, count=1)
        held = lock_file(tmp_path / "migration.lock")
        assert held is not None
        with pytest.raises(Conflict, match="a migration is running: wait for its end, or cancel it"):
            await one.migrate("b")
        monkeypatch.setattr(lock, "WAIT_S", 30.0)
        asyncio.get_running_loop().call_later(0.2, held.close)
        assert (await one.migrate("b")).switched == ["c"]
