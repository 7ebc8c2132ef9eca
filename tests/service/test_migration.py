"""Tests of service/migration.py and service/live_models.py: a service changes its model while it answers requests."""

import asyncio
import random
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from model.artifact import MANIFEST
from service import live_models, migration
from service.errors import Conflict, StorageFailed, Unavailable
from service.generations import Generation, Generations
from service.live_models import Opened, Record, end_window
from service.migration import MigrationOptions, MigrationReport, Places, abandon_all, migrate, roll_back
from service.search.partners import migrations_of
from tests.fakes import FakeEngine, Running, fake_artifact, photo, running, until

MODELS = {digit * 64: (fake_artifact(f"model_{digit}", digit), seed) for seed, digit in enumerate("abc")}
"""Artifacts with the seeds of their engines, by fingerprint."""


def opened(digit: str) -> Opened:
    artifact, seed = MODELS[digit * 64]
    return Opened(artifact, FakeEngine(seed=seed))


def vector_of(fingerprint: str, image: bytes) -> np.ndarray:
    """Compute the vector that a model gives an image, without the service."""
    from model.preprocess import preprocess
    from service.features.images import decode
    from service.ingest.embed import vectors_of

    artifact, seed = MODELS[fingerprint]
    pixels = preprocess(decode(image), artifact.manifest.preprocess)
    return vectors_of(FakeEngine(seed=seed), [pixels], "cls", True)[0]


@dataclass
class Life:
    """A service with generation 1 (model a), and what a migration needs."""

    run: Running
    generations: Generations
    places: Places

    async def migrate(self, digit: str = "b", **options: Any) -> MigrationReport:
        model = opened(digit)
        return await migrate(self.places, Path("artifacts") / digit, model, MigrationOptions(**options))

    async def ask(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        answer = await self.run.client.request(method, path, **content)
        assert answer.status_code < 300, answer.text
        body: dict[str, Any] = answer.json()
        return body

    async def put(self, name: str, item_id: str, image: bytes) -> dict[str, Any]:
        headers = {"Content-Type": "image/png"}
        return await self.ask("PUT", f"/v1/collections/{name}/items/{item_id}", content=image, headers=headers)

    async def search(self, name: str, image: bytes, k: int = 1) -> dict[str, Any]:
        headers = {"Content-Type": "image/png"}
        return await self.ask("POST", f"/v1/collections/{name}/search?k={k}", content=image, headers=headers)

    async def embed(self, image: bytes) -> dict[str, Any]:
        return await self.ask("POST", "/v1/embeddings", content=image, headers={"Content-Type": "image/png"})

    async def live_is(self, digit: str) -> None:
        await until(lambda: self.run.app.state.service.artifact.fingerprint == digit * 64)


@asynccontextmanager
async def life(
    data_dir: Path, load: Callable[[Generation], Opened] | None = None, **settings: Any
) -> AsyncIterator[Life]:
    generations = Generations(data_dir)
    for artifact, _ in MODELS.values():
        folder = data_dir / "artifacts" / artifact.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).write_text(artifact.manifest.model_dump_json())
    first = opened("a")
    made = generations.add("a" * 64, first.artifact.name, Path("artifacts/a"), "fake", "fp32", reason="first")
    made = generations.promote(made.number, expected=None, keep_s=0)
    record = Record(generations, made, load or (lambda generation: opened(generation.fingerprint[0])))
    async with running(data_dir, engine=first.engine, artifact=first.artifact, record=record, **settings) as run:
        yield Life(run, generations, Places(run.service.store, generations, run.service.originals, data_dir))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_models, "POLL_S", 0.01)
    monkeypatch.setattr(live_models, "TIDY_S", 0.05)
    monkeypatch.setattr(migration, "WAIT_S", 0.02)


async def make_collection(one: Life, name: str = "c", count: int = 5) -> list[bytes]:
    await one.ask("PUT", f"/v1/collections/{name}", json={"originals": True})
    images = [photo(100 + n) for n in range(count)]
    for n, image in enumerate(images):
        await one.put(name, f"i{n}", image)
    return images


async def test_everything_is_on_the_new_model_after_a_migration(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        images = await make_collection(one)
        await one.ask("PUT", "/v1/aliases/shop", json={"collection": "c"})
        assert (await one.search("shop", images[3]))["fingerprint"] == "a" * 64
        report = await one.migrate()
        assert (report.switched, report.embedded, report.lost, report.generation) == (["c"], 5, {}, 2)
        await one.live_is("b")
        found = await one.search("shop", images[3])
        assert (found["data"][0]["id"], found["fingerprint"], found["model"]) == ("i3", "b" * 64, "model_b-bbbbbbbb")
        assert found["data"][0]["score"] == pytest.approx(1.0, abs=1e-5)
        embedding = await one.embed(images[0])
        assert embedding["fingerprint"] == "b" * 64
        np.testing.assert_allclose(embedding["data"][0]["embedding"], vector_of("b" * 64, images[0]), atol=1e-5)
        assert (await one.ask("GET", "/v1/collections/c/items/i0?include=vector"))["fingerprint"] == "b" * 64


async def test_a_cached_embedding_of_the_old_model_is_not_used(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        image = photo(1)
        before = await one.embed(image)
        await one.migrate()
        await one.live_is("b")
        after = await one.embed(image)
        assert np.abs(np.subtract(before["data"][0]["embedding"], after["data"][0]["embedding"])).max() > 0.01
        np.testing.assert_allclose(after["data"][0]["embedding"], vector_of("b" * 64, image), atol=1e-5)


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


async def test_lost_images_are_listed_and_decided_about(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        images = await make_collection(one)
        vector = vector_of("a" * 64, photo(50)).tolist()
        item = {"id": "ready-made", "vector": vector, "fingerprint": "a" * 64}
        await one.ask("POST", "/v1/collections/c/items", json={"items": [item]})
        await make_collection(one, "whole", count=2)
        with pytest.raises(Conflict, match=r"1 items of 1 collections .* \(c: ready-made\)"):
            await one.migrate()
        assert [each.state for each in one.generations.all()] == ["live", "retired"]
        assert await migrations_of(one.run.service.store).partnerships() == []

        report = await one.migrate(lost="keep")
        assert (report.kept, report.switched, report.lost) == (["c"], ["whole"], {"c": ["ready-made"]})
        await one.live_is("b")
        assert (await one.search("c", images[0]))["fingerprint"] == "a" * 64
        assert (await one.search("whole", images[0]))["fingerprint"] == "b" * 64

        states = {each.fingerprint[0]: each.state for each in one.generations.all()}
        assert states == {"a": "former", "b": "live"}
        await end_window(one.run.service, one.generations, one.generations.all()[0])
        await asyncio.sleep(0.1)
        assert (await one.search("c", images[0]))["fingerprint"] == "a" * 64  # still searchable

        report = await one.migrate(lost="drop")
        assert (report.switched, report.lost) == (["c"], {"c": ["ready-made"]})
        found = await one.search("c", images[0], k=9)
        assert (found["fingerprint"], len(found["data"])) == ("b" * 64, 5)
        assert {each.fingerprint[0]: each.state for each in one.generations.all()} == {"a": "retired", "b": "live"}


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
        for time in (live["live_since"], former["live_since"], former["keep_until"]):
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", time)
        assert live["keep_until"] is None
        item = {"id": "ready-made", "vector": vector_of("b" * 64, photo(50)).tolist(), "fingerprint": "b" * 64}
        await one.ask("POST", "/v1/collections/c/items", json={"items": [item]})
        answer = await one.run.client.post("/v1/models/rollback")
        assert answer.status_code == 409
        assert "lack 1 items" in answer.json()["detail"]
        body = await one.ask("POST", "/v1/models/rollback", json={"force": True})
        assert (body["lacking"], body["collections"], body["generation"]) == ({"c": 1}, ["c"], 1)


async def test_a_damaged_original_does_not_end_up_as_a_missing_item(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        images = await make_collection(one)
        folder = one.run.service.originals.folder
        assert folder is not None
        [file] = [path for path in folder.glob("*/*/*") if path.read_bytes() == images[2]]
        file.write_bytes(images[2][:-9] + b"different")
        with pytest.raises(Conflict, match="1 items of 'c' cannot be embedded"):
            await one.migrate()
        assert await migrations_of(one.run.service.store).partnerships() == []  # nothing is written twice any more
        assert [each.state for each in one.generations.all()] == ["live", "retired"]
        assert (await one.search("c", images[2]))["fingerprint"] == "a" * 64
        report = await one.migrate(lost="drop")
        assert report.lost == {"c": ["i2"]}


async def test_sources_are_read_only_if_allowed(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        await one.ask("PUT", "/v1/collections/c", json={"originals": False})
        await one.put("c", "x", photo(3))
        with pytest.raises(Conflict, match="1 items of 1 collections"):
            await one.migrate()
        await one.ask("PATCH", "/v1/collections/c/items/x", json={"source": "memory:3"})
        read = {"memory:3": photo(3)}
        one.places = replace(one.places, read_source=lambda source: read[source])
        changed = replace(one.places, read_source=lambda source: photo(4))
        with pytest.raises(Conflict, match="1 items of 'c' cannot be embedded"):
            await migrate(changed, Path("artifacts/b"), opened("b"), MigrationOptions())
        report = await one.migrate()
        assert report.switched == ["c"]


async def test_a_replica_that_cannot_load_the_model_stops_the_switch(tmp_path: Path) -> None:
    def refuse(generation: Generation) -> Opened:
        raise ValueError("no engine")

    async with life(tmp_path, load=refuse) as one:
        images = await make_collection(one)
        with pytest.raises(Unavailable, match="did not load the model within"):
            await one.migrate(replicas_s=0.1)
        assert (await one.search("c", images[0]))["fingerprint"] == "a" * 64


async def test_a_process_that_is_still_loading_the_model_says_so(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        await one.ask("PUT", "/v1/collections/c", json={"fingerprint": "c" * 64, "dimension": 8})
        image = {"content": photo(1), "headers": {"Content-Type": "image/png"}}
        assert (await one.run.client.post("/v1/collections/c/search", **image)).status_code == 409
        one.run.service.loaded.expected |= {("c" * 64, "fp32")}
        for path in ("search", "items"):
            answer = await one.run.client.post(f"/v1/collections/c/{path}", **image)
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1


async def test_an_interrupted_migration_continues(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    async with life(tmp_path) as one:
        images = await make_collection(one)
        stages = []

        def stop_at(number: int) -> Callable[[MigrationReport], None]:
            def on_progress(report: MigrationReport) -> None:
                stages.append(report.stage)
                if len(stages) == number:
                    raise Killed

            return on_progress

        for number in (1, 3, 5, 7):
            stages.clear()
            options = MigrationOptions(batch_size=2)
            try:
                await migrate(one.places, Path("artifacts/b"), opened("b"), options, stop_at(number))
            except Killed:
                continue
        report = await one.migrate()
        await one.live_is("b")
        assert report.generation == 2
        found = await one.search("c", images[4], k=9)
        assert (found["fingerprint"], len(found["data"]), found["data"][0]["id"]) == ("b" * 64, 5, "i4")
        await roll_back(one.places)  # the former vectors are still there


async def test_only_one_migration_runs(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        await make_collection(one, count=2)
        results = await asyncio.gather(one.migrate("b"), one.migrate("c"), return_exceptions=True)
        assert sorted(type(result).__name__ for result in results) == ["Conflict", "MigrationReport"]


async def test_a_full_disk_is_told_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with life(tmp_path) as one:
        await make_collection(one)
        usage = migration.shutil.disk_usage(tmp_path)._replace(free=100)
        monkeypatch.setattr(migration.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(StorageFailed, match="0 MiB are free"):
            await one.migrate()
        assert [each.state for each in one.generations.all()] == ["live", "retired"]


async def test_models_are_closed_when_they_are_retired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_models, "CLOSE_AFTER_S", 0.0)
    engines: dict[str, FakeEngine] = {}

    def load(generation: Generation) -> Opened:
        model = opened(generation.fingerprint[0])
        engines[generation.fingerprint[0]] = model.engine  # type: ignore[assignment]
        return model

    async with life(tmp_path, load=load, request_deadline_s=0.5) as one:
        await one.migrate("b", keep_s=0.0)
        await one.live_is("b")
        await one.migrate("c", keep_s=0.0)
        await one.live_is("c")
        await until(lambda: engines["b"].closed)
        assert set(one.run.service.loaded.services) == {("c" * 64, "fp32")}


# ---- changes in the middle of a migration


async def meanwhile(one: Life, stage: str, action: Callable[[], Any], digit: str = "b", **options: Any) -> Any:
    """Migrate, and do something once when this stage begins. Return the report."""
    done = False

    async def on_progress(report: MigrationReport) -> None:
        nonlocal done
        if report.stage.startswith(stage) and not done:
            done = True
            await action()

    model = opened(digit)
    return await migrate(one.places, Path("artifacts") / digit, model, MigrationOptions(**options), on_progress)


async def models_of(one: Life) -> dict[str, str]:
    """Return the model of each collection."""
    return {info.name: info.tag[0] for info in await one.places.store.collections()}


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
            await meanwhile(one, stage, change, "c")
        assert await models_of(one) == {"c": before}
        assert (await one.search("c", images[0]))["fingerprint"] == before * 64
        report = await one.migrate("c")
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


async def test_a_model_whose_loading_fails_is_not_loaded_again_at_once(tmp_path: Path) -> None:
    calls = []

    def load(generation: Generation) -> Opened:
        calls.append(generation.number)
        raise RuntimeError("an error of the runtime")

    async with life(tmp_path, load=load) as one:
        with pytest.raises(Unavailable):
            await one.migrate(replicas_s=0.3)
        assert calls == [2]


# ---- under load


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
        await one.migrate("c", batch_size=2)
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
