"""Tests of the kinds `reindex` and `retrain`. Their child processes are faked, except in the last test."""

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.artifact import bundled_artifact, load_artifact
from model.export.artifact import export_artifact
from model.export.options import Backbone, ExportOptions
from service.errors import InvalidRequest
from service.generations import Generations
from service.jobs.context import ChildFailed, ChildKilled, Context
from service.jobs.kinds import KINDS, accepted_params, checked_params
from service.jobs.records import Job, NewJob
from service.jobs.store import JobStore
from service.jobs.worker import Times, Worker
from service.originals import Originals, source_of
from service.search.embedded import open_embedded
from service.search.store import CollectionSpec, Item
from service.settings import Settings
from service.tags import make_tag
from tests.cli.test_models import put_artifact
from tests.fakes import photo


class Commands:
    """The child processes of a job. `answers` maps the first words of a command to what it does instead."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.calls: list[list[str]] = []
        self.answers: dict[str, Callable[[list[str]], str]] = {
            "train": lambda arguments: "",
            "export": lambda arguments: f"{data_dir}/artifacts/model_b-bbbbbbbb\nfingerprint {'b' * 64}\n",
            "models compare": self.verdict(True),
            "models promote": self.promoted,
        }

    def names(self) -> list[str]:
        return [self._name(call) for call in self.calls]

    def _name(self, arguments: Sequence[str]) -> str:
        return " ".join(arguments[:2]) if arguments[0] == "models" else arguments[0]

    def __call__(
        self, context: Context[Any], arguments: Sequence[str], watch: Callable[[], object] = lambda: None
    ) -> str:
        self.calls.append(list(arguments))
        answer = self.answers[self._name(arguments)](list(arguments))
        watch()
        return answer

    def verdict(self, passed: bool) -> Callable[[list[str]], str]:
        def write(arguments: list[str]) -> str:
            [out] = [Path(each.removeprefix("--out=")) for each in arguments if each.startswith("--out=")]
            out.write_text(json.dumps({"passed": passed, "reasons": [] if passed else ["3 points worse"]}))
            if not passed:
                raise ChildFailed(3, "refused")
            return ""

        return write

    def promoted(self, arguments: list[str]) -> str:
        generations = Generations(self.data_dir)
        path = self.data_dir / "artifacts" / "model_b-bbbbbbbb"
        new = generations.add("b" * 64, "model_b-bbbbbbbb", path, "fake", "fp32", reason="test")
        live = generations.live()
        generations.promote(new.number, expected=live and live.number, keep_s=60)
        [file] = [Path(each.removeprefix("--progress=")) for each in arguments if each.startswith("--progress=")]
        file.write_text(
            json.dumps({"generation": new.number, "embedded": 5, "switched": ["shop"], "lost": {"shop": ["x"]}})
        )
        return ""


def fill_folder(folder: Path) -> None:
    folder.mkdir(parents=True)
    for n in range(3):
        (folder / f"{n}.png").write_bytes(photo(n))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A data folder with images, model a (live) and model b."""
    data_dir = tmp_path / "data"
    fill_folder(data_dir / "datasets" / "shop")
    for digit in "ab":
        put_artifact(data_dir, digit)
    generations = Generations(data_dir)
    path = data_dir / "artifacts" / "model_a-aaaaaaaa"
    first = generations.add("a" * 64, "model_a-aaaaaaaa", path, "fake", "fp32", reason="test")
    generations.promote(first.number, expected=None, keep_s=0)
    return Settings(data_dir=data_dir)


@pytest.fixture
def commands(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands(settings.data_dir)
    monkeypatch.setattr(Context, "run_command", lambda context, *arguments: made(context, *arguments))
    return made


def started(settings: Settings, kind: str, **params: Any) -> tuple[JobStore, str]:
    """Store a job, with its parameters checked as the service does."""
    store = JobStore(settings.data_dir)
    checked = checked_params(kind, params, settings)
    return store, store.create(NewJob(kind, checked.model_dump(mode="json"))).id


def run(store: JobStore, job_id: str, settings: Settings) -> Job:
    with Worker(store, settings, only=tuple(KINDS), times=Times(retry_s=0.0)) as worker:
        worker.run_next(job_id)
    return store.get(job_id)


def test_a_better_model_becomes_live(settings: Settings, commands: Commands) -> None:
    store, job_id = started(settings, "retrain", data=["shop"], hours=2, gate_rules={"margin": 0.02})
    job = run(store, job_id, settings)
    assert (job.state, job.error) == ("succeeded", None)
    assert job.text == "generation 2 is live: model_b-bbbbbbbb"
    assert commands.names() == ["train", "export", "models compare", "models promote"]
    train, _, compare, promote = commands.calls
    old, new = (str(settings.data_dir / "artifacts" / f"model_{digit}-{digit * 8}") for digit in "ab")
    assert f'init="{old}"' in train
    assert "--recipe=continue" in train
    assert "--hours=2.0" in train
    assert compare[2:4] == [old, new]
    assert "--rule=margin=0.02" in compare
    assert promote[2] == new
    assert job.results["migrate"]["lost"] == {"shop": 1}
    expected = {"gate": {"passed": True, "reasons": []}, "gate_held_out": False}
    assert Generations(settings.data_dir).all()[1].metrics == expected


def test_a_worse_model_is_refused_and_the_reasons_are_told(settings: Settings, commands: Commands) -> None:
    commands.answers["models compare"] = commands.verdict(False)
    store, job_id = started(settings, "retrain", data=["shop"])
    job = run(store, job_id, settings)
    assert job.state == "failed"
    assert job.error == "the gate refused the new model, and the live model stays: 3 points worse"
    assert commands.names()[-1] == "models compare"
    live = Generations(settings.data_dir).live()
    assert live is not None
    assert live.number == 1


def test_the_training_does_not_see_the_images_of_the_gate(settings: Settings, commands: Commands) -> None:
    shop = settings.data_dir / "datasets" / "shop"
    for n in range(3, 12):
        (shop / f"{n}.png").write_bytes(photo(n))
    store, job_id = started(settings, "retrain", data=["shop"], gate_rules={"min_queries": 4})
    job = run(store, job_id, settings)
    assert job.state == "succeeded", job.error
    train, _, compare, _ = commands.calls
    [exclude] = [Path(each.removeprefix('exclude="')[:-1]) for each in train if each.startswith("exclude=")]
    excluded = exclude.read_text().split("\n")
    [file] = [Path(each.removeprefix("--set=")) for each in compare if each.startswith("--set=")]
    assert sorted(excluded) == sorted(str(shop / image["path"]) for image in json.loads(file.read_text())["images"])
    assert len(excluded) == 4
    assert (job.metrics["gate_images"], job.metrics["gate_held_out"]) == (4, True)
    assert "the training leaves out 4 files" in store.read_log(job_id)[0].decode()
    assert Generations(settings.data_dir).all()[1].metrics["gate_held_out"] is True


def test_a_job_tells_that_its_images_are_too_few_to_hold_some_out(settings: Settings, commands: Commands) -> None:
    store, job_id = started(settings, "retrain", data=["shop"])
    job = run(store, job_id, settings)
    assert not any(each.startswith("exclude=") for each in commands.calls[0])
    assert job.metrics["gate_held_out"] is False
    assert "too few to hold out 300 (min_queries)" in store.read_log(job_id)[0].decode()


async def store_ready_made(data_dir: Path) -> None:
    """Create the collection `shop` with an item that has a vector of the live model and no image."""
    store = await open_embedded(data_dir)
    tag = make_tag("a" * 64, "cls", (28, 28), "fp32")
    await store.upsert("shop", [Item("ready-made", np.eye(8, dtype=np.float32)[0])], tag=tag)
    await store.close()


def test_a_dry_run_only_reports(settings: Settings, commands: Commands) -> None:
    asyncio.run(store_ready_made(settings.data_dir))
    commands.answers["train"] = lambda arguments: "08:03:57  3 images to train on\n08:03:58  estimated time: 5 s\n"
    store, job_id = started(settings, "retrain", data=["shop"], dry_run=True)
    job = run(store, job_id, settings)
    assert (job.state, job.text) == ("succeeded", "this was a dry run: nothing has changed")
    plan = job.results["plan"]
    assert plan["champion"]["generation"] == 1
    assert (plan["gate"]["images"], plan["gate"]["held_out"]) == (3, False)
    assert (plan["collections"], plan["lost"]) == ({"shop": 1}, {"shop": 1})
    assert plan["training"] == ["3 images to train on", "estimated time: 5 s"]
    assert commands.names() == ["train"]
    assert "--dry-run" in commands.calls[0]
    assert not (settings.data_dir / "gate").exists()


def test_a_missing_image_of_the_gate_ends_the_job_before_the_training(settings: Settings, commands: Commands) -> None:
    store, job_id = started(settings, "retrain", data=["shop"])
    run(store, job_id, settings)
    (settings.data_dir / "datasets" / "shop" / "1.png").unlink()
    commands.calls.clear()
    store, job_id = started(settings, "retrain", data=["shop"])
    job = run(store, job_id, settings)
    assert job.state == "failed"
    assert "1.png" in str(job.error)
    assert commands.calls == []


def test_items_without_an_image_are_told_before_the_training(settings: Settings, commands: Commands) -> None:
    asyncio.run(store_ready_made(settings.data_dir))
    store, job_id = started(settings, "retrain", data=["shop"])
    job = run(store, job_id, settings)
    assert (job.state, commands.calls) == ("failed", [])
    assert "(shop: ready-made)" in str(job.error)
    store, job_id = started(settings, "retrain", data=["shop"], lost="drop")
    assert run(store, job_id, settings).state == "succeeded"


def test_a_person_can_decide_before_the_switch(settings: Settings, commands: Commands) -> None:
    store, job_id = started(settings, "retrain", data=["shop"], approve=True)
    assert run(store, job_id, settings).state == "waiting"
    assert "models promote" not in commands.names()
    store.approve(job_id, by="someone")
    assert run(store, job_id, settings).state == "succeeded"
    assert commands.names() == ["train", "export", "models compare", "models promote"]  # no step runs twice


def test_a_killed_step_is_repeated_and_finished_steps_are_not(settings: Settings, commands: Commands) -> None:
    def killed(arguments: list[str]) -> str:
        raise ChildKilled("killed")

    passes, commands.answers["models compare"] = commands.answers["models compare"], killed
    store, job_id = started(settings, "retrain", data=["shop"])
    assert run(store, job_id, settings).state == "queued"
    commands.answers["models compare"] = passes
    assert run(store, job_id, settings).state == "succeeded"
    assert commands.names() == ["train", "export", "models compare", "models compare", "models promote"]


def test_another_model_that_became_live_meanwhile_stops_the_switch(settings: Settings, commands: Commands) -> None:
    def another(arguments: list[str]) -> str:
        generations = Generations(settings.data_dir)
        third = generations.add("c" * 64, "model_c", Path("c"), "fake", "fp32", reason="test")
        generations.promote(third.number, expected=1, keep_s=60)
        return ""

    commands.answers["train"] = another
    store, job_id = started(settings, "retrain", data=["shop"])
    job = run(store, job_id, settings)
    assert job.state == "failed"
    assert "compared with generation 1: retrain again" in str(job.error)
    assert "models promote" not in commands.names()


def test_a_service_that_never_started_has_no_live_model(tmp_path: Path, commands: Commands) -> None:
    fill_folder(tmp_path / "new" / "datasets" / "shop")
    fresh = Settings(data_dir=tmp_path / "new")
    store, job_id = started(fresh, "retrain", data=["shop"])
    assert "no model is live" in str(run(store, job_id, fresh).error)


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("retrain", {"data": ["/etc"]}, "is not below"),
        ("retrain", {"data": ["shop"], "gate_data": "nothing"}, "does not exist or is not a folder"),
        ("retrain", {"data": ["shop"], "share": 0}, "share"),
        ("retrain", {"data": ["shop"], "overrides": ["mlflow=x"]}, "mlflow"),
        ("retrain", {"data": ["shop"], "overrides": ["exclude=/etc/passwd"]}, "exclude"),
        ("reindex", {}, "either collections or promote=true"),
        ("reindex", {"collections": ["shop"], "promote": True}, "either collections or promote=true"),
        ("reindex", {"promote": True, "model": "unknown"}, "unknown"),
        ("reindex", {"collections": ["Not A Name"]}, "collections"),
    ],
)
def test_wrong_parameters_are_refused(settings: Settings, kind: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        checked_params(kind, params, settings)


def test_a_retraining_that_could_not_start_is_refused_at_once(settings: Settings) -> None:
    with pytest.raises(InvalidRequest, match=r"lr=-1: must be more than 0"):
        accepted_params("retrain", {"data": ["shop"], "overrides": ["lr=-1"]}, settings)
    accepted_params("retrain", {"data": ["shop"], "overrides": ["lr=0.001"]}, settings)  # starts from the live model


def test_reindex_runs_the_command_of_its_parameters(settings: Settings, commands: Commands) -> None:
    commands.answers["reindex"] = lambda arguments: ""
    store, job_id = started(settings, "reindex", collections=["shop"], model="model_b", lost="drop", share=0.5)
    assert run(store, job_id, settings).state == "succeeded"
    [call] = commands.calls
    assert call[:2] == ["reindex", "--model=model_b-bbbbbbbb"]
    assert {"--lost=drop", "--share=0.5"} < set(call)
    assert call[-2:] == ["--", "shop"]


# ---- with a real child process


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with other weights."""
    artifact = load_artifact(bundled_artifact())
    rng = np.random.default_rng(0)
    weights = {
        key: value if value.ndim < 2 else value + 0.2 * value.std() * rng.standard_normal(value.shape, np.float32)
        for key, value in artifact.weights.items()
    }
    manifest = artifact.manifest
    backbone = Backbone("other", weights, manifest.config, manifest.preprocess, {}, manifest.licence)
    return export_artifact(backbone, tmp_path_factory.mktemp("other"), ExportOptions()).path


def test_a_real_migration(tmp_path: Path, other_model: Path) -> None:
    data_dir = tmp_path / "data"
    (data_dir / "artifacts").mkdir(parents=True)
    shutil.copytree(other_model, data_dir / "artifacts" / other_model.name)
    manifest = load_artifact(bundled_artifact()).manifest
    generations = Generations(data_dir)
    first = generations.add(manifest.fingerprint, "bundled", bundled_artifact(), "onnxruntime", "fp32", reason="test")
    generations.promote(first.number, expected=None, keep_s=0)

    async def fill() -> None:
        store, originals = await open_embedded(data_dir), Originals(data_dir / "originals")
        tag = make_tag(manifest.fingerprint, "cls", manifest.input_size, "fp32")
        await store.create("shop", CollectionSpec(tag, manifest.config.embed_dim, originals=True))
        for n in range(3):
            digest = await originals.put(photo(n, size=(90, 70)))
            vector = np.eye(manifest.config.embed_dim, dtype=np.float32)[n]
            await store.upsert("shop", [Item(f"i{n}", vector, source=source_of(digest), digest=digest)], tag=tag)
        await store.close()
        await originals.close()

    async def tags() -> list[str]:
        store = await open_embedded(data_dir)
        found = [info.tag for info in await store.collections()]
        await store.close()
        return found

    asyncio.run(fill())
    settings = Settings(data_dir=data_dir, threads=1)
    store, job_id = started(settings, "reindex", model="other", promote=True)
    job = run(store, job_id, settings)
    assert (job.state, job.error) == ("succeeded", None)
    assert job.results["migrate"] == {"generation": 2, "embedded": 3, "switched": ["shop"], "kept": [], "lost": {}}
    live = generations.live()
    assert live is not None
    assert live.number == 2
    [tag] = asyncio.run(tags())
    assert tag.startswith(live.fingerprint)
