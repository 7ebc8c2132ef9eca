"""Tests of models on trial: they are loaded beside the live one, and nothing else changes."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.generations import Generation
from service.live_models import Opened
from service.migration.lock import migration_lock
from service.migration.trial import load_on_trial
from service.migration.work import Places
from service.model_list import KnownModel
from tests.fakes import until
from tests.service.migration.lives import Life, life, make_collection, opened, vector_of

PNG = {"Content-Type": "image/png"}


async def loaded(one: Life, digit: str) -> None:
    models = one.run.app.state.service.loaded
    await until(lambda: (digit * 64, "fp32") in models.services)


async def states(one: Life) -> dict[str, str]:
    """Return the states of the models a, b and c. The bundled model is listed too."""
    listed = (await one.ask("GET", "/v1/models"))["data"]
    return {model["fingerprint"][0]: model["state"] for model in listed if model["id"].startswith("model_")}


async def post(one: Life, action: str, model: str) -> tuple[int, dict[str, Any]]:
    answer = await one.run.client.post(f"/v1/models/{action}", json={"model": model})
    return answer.status_code, answer.json()


async def test_requests_choose_a_model_on_trial_and_nothing_else_changes(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        images = await make_collection(one)
        status, answer = await post(one, "load", "model_b-bbbbbbbb")
        assert (status, answer["state"], answer["load_error"]) == (202, "candidate", None)
        await loaded(one, "b")
        assert (await one.ask("GET", "/v1/models/model_b"))["loaded"] is True
        other = await one.ask("POST", "/v1/embeddings?model=model_b", content=images[0], headers=PNG)
        assert other["fingerprint"] == "b" * 64
        np.testing.assert_allclose(other["data"][0]["embedding"], vector_of("b" * 64, images[0]), atol=1e-5)
        assert (await one.embed(images[0]))["fingerprint"] == "a" * 64
        found = await one.search("c", images[1])
        assert (found["data"][0]["id"], found["fingerprint"]) == ("i1", "a" * 64)

        assert (await post(one, "unload", "model_b"))[1]["state"] == "available"
        assert await states(one) == {"a": "live", "b": "available", "c": "available"}
        await until(lambda: ("b" * 64, "fp32") not in one.run.app.state.service.loaded.services)


async def test_one_model_at_a_time_is_on_trial(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        await post(one, "load", "model_b")
        await post(one, "load", "model_c")
        await loaded(one, "c")
        assert await states(one) == {"a": "live", "b": "available", "c": "candidate"}
        assert (await post(one, "load", "model_c"))[1]["state"] == "candidate"  # once more
        assert (await post(one, "load", "model_a"))[1]["state"] == "live"


async def test_requests_at_the_same_time_load_a_model_once(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        answers = await asyncio.gather(*(post(one, "load", "model_b") for _ in range(20)))
        assert len({(status, answer["state"], answer["generation"]) for status, answer in answers}) == 1
        await loaded(one, "b")
        answers = await asyncio.gather(*(post(one, "unload", "model_b") for _ in range(20)))
        assert {(status, answer["state"]) for status, answer in answers} == {(200, "available")}
        assert await states(one) == {"a": "live", "b": "available", "c": "available"}


async def test_a_model_that_is_removed_while_it_is_loaded_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def removed_meanwhile(places: Places, known: KnownModel, **options: str) -> Generation:
        generation = await load_on_trial(places, known, **options)
        shutil.rmtree(known.path)
        return generation

    monkeypatch.setattr("service.routes.models.load_on_trial", removed_meanwhile)
    async with life(tmp_path) as one:
        assert (await post(one, "load", "model_b"))[0] == 404


async def test_a_model_on_trial_can_be_promoted_and_rolled_back(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        await make_collection(one)
        await post(one, "load", "model_b")
        await loaded(one, "b")
        assert (await one.migrate("b")).switched == ["c"]
        await one.live_is("b")
        assert await states(one) == {"b": "live", "a": "former", "c": "available"}
        await post(one, "load", "model_c")
        await one.ask("POST", "/v1/models/rollback")
        await one.live_is("a")


async def test_only_a_model_on_trial_is_unloaded(tmp_path: Path) -> None:
    async with life(tmp_path) as one:
        await make_collection(one)
        status, problem = await post(one, "unload", "model_a")
        assert (status, problem["detail"]) == (
            409,
            "model_a-aaaaaaaa is live: only a model on trial can be unloaded",
        )
        assert (await post(one, "unload", "model_b"))[0] == 200  # it is not loaded
        assert (await post(one, "load", "nothing"))[0] == 404
        await one.migrate("b", collections=("c",), promote=False)
        status, problem = await post(one, "unload", "model_b")
        assert status == 409
        assert "collections have vectors of model_b-bbbbbbbb" in problem["detail"]
        assert (await one.ask("GET", "/v1/models/model_b"))["state"] == "candidate"


async def test_nothing_is_loaded_while_a_migration_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.migration.lock.WAIT_S", 0.1)
    async with life(tmp_path) as one:
        with await migration_lock(tmp_path):
            assert (await post(one, "load", "model_b"))[0] == 409
        assert await states(one) == {"a": "live", "b": "available", "c": "available"}


async def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    def load(generation: Generation) -> Opened:
        if generation.fingerprint[0] == "b":
            raise OSError("/secret/folder/weights is damaged")
        return opened(generation.fingerprint[0])

    async with life(tmp_path, load=load) as one:
        await post(one, "load", "model_b")
        await until(lambda: bool(one.run.app.state.service.loaded.failures))
        model = await one.ask("GET", "/v1/models/model_b")
        assert (model["loaded"], model["load_error"]) == (False, "weights is damaged")
        await post(one, "unload", "model_b")
        await until(lambda: not one.run.app.state.service.loaded.failures)
