"""Tests of `dinov2 models` and `dinov2 reindex`, with a service that runs beside them."""

import hashlib
import json
import shutil
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import cli
from model.artifact import Artifact, bundled_artifact
from service import first_model
from service.artifact_choice import readable_artifacts
from service.features.patch_cache import patches_key
from service.features.patch_store import patch_store_of
from service.generations import Generations
from service.live_models import Opened
from service.settings import Settings
from tests.fakes import FakeEngine, fake_artifact, photo

runner = CliRunner()


def put_artifact(data_dir: Path, digit: str) -> Artifact:
    """Write an artifact folder that has only a manifest, and return the artifact."""
    artifact = fake_artifact(f"model_{digit}", digit)
    folder = data_dir / "artifacts" / artifact.name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(artifact.manifest.model_dump_json())
    return artifact


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with the artifacts a (live) and b, whose engines are faked."""
    names = {}
    for digit in "ab":
        artifact = put_artifact(tmp_path, digit)
        names[artifact.name] = Opened(artifact, FakeEngine(seed=ord(digit)))
    monkeypatch.setattr(first_model, "open_model", lambda settings, path, engine: names[path.name])
    generations = Generations(tmp_path)
    path = tmp_path / "artifacts" / "model_a-aaaaaaaa"
    first = generations.add("a" * 64, "model_a-aaaaaaaa", path, "fake", "fp32", reason="test")
    generations.promote(first.number, expected=None, keep_s=0)
    return tmp_path


def run(data_dir: Path, *words: str, status: int = 0) -> str:
    result = runner.invoke(cli.app, [*words, "--data-dir", str(data_dir)])
    assert result.exit_code == status, result.output
    return result.output


async def fill(data_dir: Path, name: str = "shop") -> None:
    """Make a collection with three stored images, with vectors of model a."""
    from service.originals import Originals, source_of
    from service.search.embedded import open_embedded
    from service.search.store import CollectionSpec, Item
    from service.tags import make_tag

    store, originals = await open_embedded(data_dir), Originals(data_dir / "originals")
    tag = make_tag("a" * 64, "cls", (28, 28), "fp32")
    await store.create(name, CollectionSpec(tag, 8, originals=True))
    for n in range(3):
        digest = await originals.put(photo(n))
        vector = np.eye(8, dtype=np.float32)[n]
        await store.upsert(name, [Item(f"i{n}", vector, source=source_of(digest), digest=digest)], tag=tag)
    await store.close()
    await originals.close()


def states(data_dir: Path) -> dict[str, str]:
    listed = json.loads(run(data_dir, "models", "list", "--json"))["artifacts"]
    return {row["name"]: row["state"] for row in listed}


async def test_promote_and_roll_back(data_dir: Path) -> None:
    await fill(data_dir)
    assert states(data_dir)["model_b"] == "available"
    # In a thread, because the command runs an event loop of its own.
    out = await _in_thread(run, data_dir, "models", "promote", "model_b")
    assert "generation 2: 3 items embedded; switched shop" in out
    keys = {patches_key(hashlib.sha256(photo(n)).hexdigest(), "b" * 64, "fp32") for n in range(3)}
    with closing(patch_store_of(Settings(data_dir=data_dir))) as patches:
        assert patches.stored(list(keys)) == keys
    assert {name: state for name, state in states(data_dir).items() if name.startswith("model_")} == {
        "model_b": "live",
        "model_a": "former",
    }
    shown = json.loads(await _in_thread(run, data_dir, "collections", "list", "--json"))
    assert shown[0]["tag"].startswith("b" * 64)
    assert "generation 1 is live again" in await _in_thread(run, data_dir, "models", "rollback")
    assert "generation 1 is live" not in await _in_thread(run, data_dir, "models", "list")
    assert states(data_dir)["model_a"] == "live"


async def test_reindex_changes_only_the_collection(data_dir: Path) -> None:
    await fill(data_dir)
    out = await _in_thread(run, data_dir, "reindex", "shop", "--model", "model_b", "--json")
    report = json.loads(out[out.index("{") :])
    assert (report["switched"], report["embedded"]) == (["shop"], 3)
    assert {name: state for name, state in states(data_dir).items() if name.startswith("model_")} == {
        "model_a": "live",
        "model_b": "candidate",
    }
    out = await _in_thread(run, data_dir, "reindex", "shop")
    assert "switched shop" in out
    assert states(data_dir)["model_b"] == "retired"


async def test_what_cannot_be_done_is_told(data_dir: Path) -> None:
    await fill(data_dir)
    assert "no former generation" in await _in_thread(run, data_dir, "models", "rollback", status=2)
    assert "there is no collection 'x'" in await _in_thread(run, data_dir, "reindex", "x", status=2)
    assert "is not an artifact folder" in await _in_thread(run, data_dir, "models", "promote", "./x", status=2)
    assert "is live" in await _in_thread(run, data_dir, "models", "remove", "model_a", status=2)
    assert "part of the installation" in await _in_thread(
        run, data_dir, "models", "remove", bundled_artifact().name, status=2
    )
    shutil.rmtree(data_dir / "originals")
    assert "3 items of 1 collections" in await _in_thread(run, data_dir, "models", "promote", "model_b", status=2)


async def test_the_options_of_promote_and_reindex_are_used(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(data_dir)
    await _in_thread(run, data_dir, "models", "promote", "model_b", "--keep-hours", "2")
    former = Generations(data_dir).window()
    assert former is not None
    assert former.keep_until is not None
    assert 0 <= 2 * 3600 - (former.keep_until - time.time()) < 60
    model = Opened(put_artifact(data_dir, "c"), FakeEngine(seed=9))
    monkeypatch.setattr(first_model, "open_model", lambda settings, path, engine: model)
    for words in (["models", "promote", "model_c"], ["reindex", "shop", "--model", "model_c"]):
        assert "generation 1 (model_a-aaaaaaaa) can become live" in await _in_thread(run, data_dir, *words, status=2)
    shutil.rmtree(data_dir / "originals")
    progress = data_dir / "progress.json"
    words = ["--end-window", "--lost", "drop", "--share", "0.5", "--progress", str(progress), "--json"]
    out = await _in_thread(run, data_dir, "reindex", "shop", "--model", "model_c", *words)
    report = json.loads(out[out.index("{") :])
    assert (report["switched"], report["lost"]) == (["shop"], {"shop": ["i0", "i1", "i2"]})
    assert json.loads(progress.read_text())["stage"] == "done"


@pytest.mark.parametrize(
    ("words", "engines"),
    [
        (["promote", "2"], ["fake:int8"]),  # a number is a generation, with its precision
        (["promote", "model_a"], ["auto"]),  # the live model keeps its precision
        (["promote", "model_a", "--engine", "onnxruntime:bf16"], ["onnxruntime:bf16"]),
        (["promote", "model_b"], ["auto"]),
    ],
)
def test_which_engine_opens_a_model(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], engines: list[str]
) -> None:
    path = data_dir / "artifacts" / "model_a-aaaaaaaa"
    Generations(data_dir).add("a" * 64, "model_a-aaaaaaaa", path, "fake", "int8", reason="test")
    monkeypatch.setattr("service.first_model.known_precision", lambda name: "fp32")
    opened = []

    def open_model(settings: Settings, path: Path, engine: str) -> Opened:
        opened.append(engine)
        return Opened(fake_artifact("x", path.name[-1]), FakeEngine(precision=engine.partition(":")[2] or "fp32"))

    monkeypatch.setattr(first_model, "open_model", open_model)
    run(data_dir, "models", *words)
    assert opened == engines


@pytest.mark.parametrize("name", ["1", "a" * 8, "model_a", "model_a-aaaaaaaa", "auto", "artifacts/model_a-aaaaaaaa"])
def test_compare_accepts_the_names_of_the_other_commands(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    compared = []

    def fake(champion: Path, challenger: Path, *rest: object) -> None:
        compared.extend([champion.name, challenger.name])
        raise ValueError("compared")

    monkeypatch.setattr("service.jobs.compare.compare", fake)
    name = str(data_dir / name) if "/" in name else name
    out = run(data_dir, "models", "compare", name, "b" * 10, "--data", str(data_dir), status=2)
    assert "error: compared" in out
    assert compared == ["model_a-aaaaaaaa", "model_b-bbbbbbbb"]
    unknown = run(data_dir, "models", "compare", name, "77", "--data", str(data_dir), status=2)
    assert "77" in unknown


async def test_a_model_with_collections_is_removed_only_by_force(data_dir: Path) -> None:
    await fill(data_dir)
    await _in_thread(run, data_dir, "models", "promote", "model_b", "--lost", "drop", "--keep-hours", "0")
    generations = Generations(data_dir)
    generations.retire(1)
    await fill(data_dir, "old")
    assert "old have vectors" in await _in_thread(run, data_dir, "models", "remove", "model_a", status=2)
    assert "removed model_a" in await _in_thread(run, data_dir, "models", "remove", "1", "--force")
    assert "model_a" not in [manifest.name for _, manifest in readable_artifacts(data_dir)]
    assert [each.number for each in generations.all()] == [2]


async def test_the_artifact_of_the_live_model_is_not_removed_with_another_precision(data_dir: Path) -> None:
    generations = Generations(data_dir)
    path = data_dir / "artifacts" / "model_a-aaaaaaaa"
    other = generations.add("a" * 64, "model_a-aaaaaaaa", path, "fake", "int8", reason="test")
    generations.retire(other.number)
    assert "removed model_a" in await _in_thread(run, data_dir, "models", "remove", str(other.number))
    assert [each.number for each in generations.all()] == [1]
    assert (path / "manifest.json").is_file()


async def test_a_folder_outside_of_the_data_folder_is_never_deleted(data_dir: Path) -> None:
    outside = data_dir.parent / f"{data_dir.name}-mine" / "model_b"
    shutil.copytree(data_dir / "artifacts" / "model_b-bbbbbbbb", outside)
    shutil.rmtree(data_dir / "artifacts" / "model_b-bbbbbbbb")
    generations = Generations(data_dir)
    other = generations.add("b" * 64, "model_b-bbbbbbbb", outside, "fake", "fp32", reason="a start with a path")
    generations.retire(other.number)
    assert "removed model_b" in await _in_thread(run, data_dir, "models", "remove", "model_b")
    assert (outside / "manifest.json").is_file()
    assert [each.number for each in generations.all()] == [1]


def test_a_damaged_record_is_told_by_the_list(data_dir: Path) -> None:
    (data_dir / "models.sqlite3").write_bytes(b"no database" * 1000)
    assert "error: record of models" in run(data_dir, "models", "list", status=2)


async def test_a_link_to_an_artifact_is_removed_without_its_target(data_dir: Path) -> None:
    link, outside = data_dir / "artifacts" / "model_b-bbbbbbbb", data_dir / "elsewhere"
    link.rename(outside)
    link.symlink_to(outside)
    await _in_thread(run, data_dir, "models", "remove", "model_b")
    assert not link.is_symlink()
    assert (outside / "manifest.json").is_file()


async def _in_thread(work, *args, **options) -> str:
    import asyncio

    return await asyncio.to_thread(work, *args, **options)


def test_settings_of_the_fixture(data_dir: Path) -> None:
    """The fake models are those that a service would load."""
    opened, record = first_model.load_first(Settings(data_dir=data_dir), lambda step: None)
    assert (opened.artifact.name, record.first.number) == ("model_a-aaaaaaaa", 1)
