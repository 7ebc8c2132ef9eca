"""Tests of service/migration/ and service/live_models.py: a service changes its model."""

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service import live_models
from service.errors import Conflict, StorageFailed, Unavailable
from service.features.patch_store import patch_store_of
from service.generations import Generation
from service.live_models import Opened
from service.migration import planning
from service.migration.rollback import roll_back
from service.migration.run import migrate
from service.migration.work import MigrationOptions, MigrationReport
from service.outcomes import Outcome
from service.retiring import end_window
from service.search.partners import migrations_of
from service.search.store import VectorStore
from tests.fakes import FakeEngine, photo, until
from tests.service.migration.lives import life, make_collection, opened, vector_of


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


async def test_the_new_patch_features_are_stored_before_the_switch(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        images = await make_collection(one)
        patches = patch_store_of(one.run.service.settings)
        one.places = replace(one.places, patches=patches)
        await one.migrate()
        await one.live_is("b")
        digests = [hashlib.sha256(image).hexdigest() for image in images]
        pipelines = [service.pipeline for service in one.run.service.loaded.services.values()]
        kept = {each.artifact.fingerprint: await each.kept_patches(digests) for each in pipelines}
        [new] = [each for each in pipelines if each.artifact.fingerprint == "b" * 64]
        computed = await new.patches([Outcome(0, (digests[0], images[0]))])
        assert set(kept["b" * 64]) == set(digests)
        np.testing.assert_array_equal(kept["b" * 64][digests[0]].rows, computed[0].result().rows)
        assert kept["b" * 64][digests[0]].size == computed[0].result().size
        assert (kept["a" * 64][digests[0]].rows != kept["b" * 64][digests[0]].rows).any()
        await one.put("c", "late", photo(50))  # while the collection has vectors of both models
        late = hashlib.sha256(photo(50)).hexdigest()
        assert [set(await each.kept_patches([late])) for each in pipelines] == [{late}, {late}]
        patches.close()


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
        await end_window(one.places.store, one.generations, one.generations.all()[0])
        await asyncio.sleep(0.1)
        assert (await one.search("c", images[0]))["fingerprint"] == "a" * 64  # still searchable

        report = await one.migrate(lost="drop")
        assert (report.switched, report.lost) == (["c"], {"c": ["ready-made"]})
        found = await one.search("c", images[0], k=9)
        assert (found["fingerprint"], len(found["data"])) == ("b" * 64, 5)
        assert {each.fingerprint[0]: each.state for each in one.generations.all()} == {"a": "retired", "b": "live"}


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
        usage = planning.shutil.disk_usage(tmp_path)._replace(free=100)
        monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(StorageFailed, match="0 MiB are free"):
            await one.migrate()
        assert [each.state for each in one.generations.all()] == ["live"]


class WithoutMigrations:
    """A store that cannot embed its collections again, as Milvus."""

    def __init__(self, store: VectorStore) -> None:
        self.capabilities = store.capabilities - {"migrations"}
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


async def test_a_store_that_cannot_embed_again_is_told_before_the_start(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        await make_collection(one, "shop", count=1)
        await make_collection(one, "toys", count=1)
        places = replace(one.places, store=WithoutMigrations(one.places.store))
        before, stages = one.generations.stamp(), []
        text = "shop, toys. Nothing was changed. For each of them, fill a new collection .* move an alias"
        for options in (MigrationOptions(), MigrationOptions(collections=("shop", "toys"), promote=False)):
            with pytest.raises(Conflict, match=text):
                await migrate(places, Path("artifacts/b"), opened("b"), options, stages.append)
        with pytest.raises(Conflict, match=text):  # a retraining asks before it trains
            await planning.items_without_image(places)
        assert (one.generations.stamp(), stages) == (before, [])
        await migrate(places, Path("artifacts/a"), opened("a"), MigrationOptions())  # nothing to embed again


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
