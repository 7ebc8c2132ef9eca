"""Tests of the record of generations, and of the model with which a process starts."""

import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import pytest

from model.artifact import MANIFEST, ArtifactError, bundled_artifact, read_manifest
from service import first_model
from service import generations as generations_module
from service.artifact_choice import artifact_of, choose_artifact
from service.errors import Conflict, StorageFailed
from service.first_model import load_first
from service.generations import REPLICA_LOST_S, Applied, Generation, Generations
from service.live_models import Opened
from service.settings import Settings
from tests.fakes import FakeEngine, fake_artifact


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def generations(tmp_path: Path, clock: Clock) -> Generations:
    return Generations(tmp_path, now=clock)


def add(generations: Generations, letter: str, precision: str = "fp32") -> Generation:
    return generations.add(letter * 64, f"model-{letter}", Path(f"/gone/{letter}"), "fake", precision, reason="test")


# ---- the record


def test_at_most_one_generation_is_live(generations: Generations, clock: Clock) -> None:
    first, second, third = (add(generations, letter) for letter in "abc")
    assert {each.state for each in generations.all()} == {"candidate"}
    assert generations.promote(first.number, expected=None, keep_s=60).live_since == clock.now
    clock.now += 10
    generations.promote(second.number, expected=first.number, keep_s=60, reason="better")
    states = {each.number: (each.state, each.keep_until, each.reason) for each in generations.all()}
    assert states == {
        first.number: ("former", 1070.0, "test"),
        second.number: ("live", None, "better"),
        third.number: ("candidate", None, "test"),
    }
    generations.promote(third.number, expected=second.number, keep_s=60)
    assert [each.state for each in generations.all()] == ["retired", "former", "live"]
    live = generations.live()
    assert live is not None
    assert live.number == third.number


def test_of_two_switches_the_slower_fails(generations: Generations) -> None:
    first, second, third = (add(generations, letter) for letter in "abc")
    generations.promote(first.number, expected=None, keep_s=0)
    generations.promote(second.number, expected=first.number, keep_s=0)
    with pytest.raises(Conflict, match="generation 2 is live, not 1"):
        generations.promote(third.number, expected=first.number, keep_s=0)
    generations.promote(second.number, expected=first.number, keep_s=0)  # repeated after a crash: it is live already
    with pytest.raises(Conflict, match="no generation 99"):
        generations.promote(99, expected=second.number, keep_s=0)
    assert [each.state for each in generations.all()] == ["former", "live", "candidate"]


def test_fingerprint_and_precision_identify_a_generation(generations: Generations) -> None:
    assert add(generations, "a").number == add(generations, "a").number
    assert add(generations, "a", "bf16").number != add(generations, "a").number


def test_a_retired_generation_becomes_a_candidate_again(generations: Generations) -> None:
    first = add(generations, "a")
    generations.retire(first.number)
    assert generations.all()[0].state == "retired"
    assert add(generations, "a").state == "candidate"
    generations.retire(first.number)
    generations.forget(first.number)
    assert generations.all() == []


def test_the_live_generation_cannot_be_retired_or_forgotten(generations: Generations) -> None:
    first = add(generations, "a")
    generations.promote(first.number, expected=None, keep_s=0)
    generations.retire(first.number)
    generations.forget(first.number)
    assert generations.live() is not None


def test_a_value_of_a_setting_is_applied_once(generations: Generations, clock: Clock) -> None:
    first, second = add(generations, "a"), add(generations, "b")
    assert generations.applied("model", "a") is None
    generations.promote(first.number, expected=None, keep_s=0, settings={"model": "a"})
    clock.now += 10
    generations.promote(first.number, expected=first.number, keep_s=0, settings={"engine": "a"})  # it is live already
    assert generations.applied("model", "a") == Applied(first.number, 1000.0)
    assert generations.applied("engine", "a") == Applied(first.number, 1010.0)
    with pytest.raises(Conflict, match="another process has applied model=a"):
        generations.promote(second.number, expected=first.number, keep_s=0, settings={"engine": "b", "model": "a"})
    assert generations.applied("engine", "b") is None  # all or nothing
    live = generations.live()
    assert live is not None
    assert live.number == first.number


def test_a_record_of_version_1_keeps_the_applied_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = generations_module._SCHEMA
    with monkeypatch.context() as old:
        old.setattr(generations_module, "_SCHEMA", replace(schema, scripts=schema.scripts[:1]))
        before = Generations(tmp_path)
        for letter in "ab":
            reason = "model=old at a start" if letter == "a" else "test"
            before.add(letter * 64, letter, tmp_path, "fake", "fp32", reason=reason)
    with closing(sqlite3.connect(tmp_path / "models.sqlite3")) as db, db:
        db.execute("UPDATE generations SET state = 'live', live_since = 5 WHERE number = 2")
        db.execute("INSERT INTO requested VALUES (1, 'old')")
    assert Generations(tmp_path).applied("model", "old") == Applied(1, 5.0)
    assert [each.state for each in Generations(tmp_path).all()] == ["candidate", "live"]


def test_the_window_is_open_until_its_time_is_over(generations: Generations, clock: Clock) -> None:
    first, second = add(generations, "a"), add(generations, "b")
    generations.promote(first.number, expected=None, keep_s=60)
    assert generations.window() is None
    generations.promote(second.number, expected=first.number, keep_s=60)
    former = generations.window()
    assert former is not None
    assert former.number == first.number
    clock.now += 60
    assert generations.window() is None


def test_another_process_sees_a_change(generations: Generations, tmp_path: Path) -> None:
    other = Generations(tmp_path)
    before = other.stamp()
    generations.beat("replica", [1])
    assert other.stamp() == before  # a heartbeat is no change
    add(generations, "a")
    assert other.stamp() != before
    assert [each.name for each in other.all()] == ["model-a"]


def test_replicas_are_forgotten_when_they_leave_or_are_lost(generations: Generations, clock: Clock) -> None:
    generations.beat("x", [2, 1])
    clock.now += REPLICA_LOST_S
    generations.beat("y", [1])
    assert [(each.id, each.loaded) for each in generations.replicas()] == [("x", {1, 2}), ("y", {1})]
    clock.now += 1
    assert [each.id for each in generations.replicas()] == ["y"]
    generations.leave("y")
    assert generations.replicas() == []


def test_a_damaged_record_is_told(tmp_path: Path) -> None:
    (tmp_path / "models.sqlite3").write_bytes(b"no database" * 1000)
    with pytest.raises(StorageFailed, match=r"record of models .*models\.sqlite3 is damaged"):
        Generations(tmp_path)


# ---- the model with which a process starts


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with two artifacts, `old` and `new`, whose loading is faked."""
    for name, digit in (("old", "a"), ("new", "b")):
        manifest = read_manifest(bundled_artifact()).model_copy(
            update={
                "name": name,
                "fingerprint": digit * 64,
                "created": f"2026-01-0{1 if name == 'old' else 2}T00:00:00Z",
            }
        )
        (tmp_path / "artifacts" / name).mkdir(parents=True)
        (tmp_path / "artifacts" / name / MANIFEST).write_text(manifest.model_dump_json())

    def opened(settings: Settings, path: Path, engine: str) -> Opened:
        precision = engine.rpartition(":")[2] if ":" in engine else "fp32"
        manifest = read_manifest(path)
        return Opened(fake_artifact(manifest.name, manifest.fingerprint[0]), FakeEngine(precision=precision))

    monkeypatch.setattr(first_model, "open_model", opened)
    return tmp_path


def started(data_dir: Path, model: str = "auto", **more: Any) -> tuple[str, int]:
    """Start a process. Return the name of its model and the number of its generation."""
    opened, record = load_first(Settings(data_dir=data_dir, model=model, **more), lambda step: None)
    return opened.artifact.manifest.name, record.first.number


def test_a_new_artifact_does_not_go_live_by_itself(data_dir: Path) -> None:
    shutil.move(data_dir / "artifacts" / "new", data_dir / "new")
    assert started(data_dir) == ("old", 1)
    shutil.move(data_dir / "new", data_dir / "artifacts" / "new")
    assert started(data_dir) == ("old", 1)
    assert choose_artifact("auto", data_dir).name == "old"


def test_a_restart_with_the_same_setting_keeps_what_was_promoted(data_dir: Path) -> None:
    assert started(data_dir, "old") == ("old", 1)
    generations = Generations(data_dir)
    new = generations.add("b" * 64, "new", data_dir / "artifacts" / "new", "fake", "fp32", reason="test")
    generations.promote(new.number, expected=1, keep_s=60)
    assert started(data_dir, "old") == ("new", 2)
    assert started(data_dir, "auto") == ("new", 2)


def test_another_model_in_the_settings_is_a_decision(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert started(data_dir, "old") == ("old", 1)
    assert started(data_dir, "new") == ("new", 2)
    assert "generation 2 (new-bbbbbbbb, fp32) replaces 1" in caplog.text
    assert "dinov2 models promote new-bbbbbbbb" in caplog.text


def test_processes_with_different_models_do_not_take_turns(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert [started(data_dir, model) for model in ("old", "new", "old", "new", "old")] == [
        ("old", 1),
        *[("new", 2)] * 4,
    ]
    told = [record.message for record in caplog.records if "has become live since" in record.message]
    assert len(told) == 2  # each start with the model that was replaced
    assert told[0].startswith("model=old made generation 1 live at 20")
    assert "generation 2 (new-bbbbbbbb)" in told[0]
    assert "dinov2 models promote old" in told[0]


def test_another_name_of_a_model_that_was_replaced_decides_nothing(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert [started(data_dir, model) for model in ("old", "new")] == [("old", 1), ("new", 2)]
    assert started(data_dir, str(data_dir / "artifacts" / "old")) == ("new", 2)
    assert "is another name of a model that a setting has made live before" in caplog.text
    assert started(data_dir, str(data_dir / "artifacts" / "new")) == ("new", 2)
    assert caplog.text.count("is another name of a model") == 1


def test_processes_with_different_engines_do_not_take_turns(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    engines = ("onnxruntime:fp32", "onnxruntime:int8", "onnxruntime:fp32", "auto", "onnxruntime:int8")
    assert [started(data_dir, "old", engine=engine)[1] for engine in engines] == [1, 2, 2, 2, 2]
    told = [record.message for record in caplog.records if "call dinov2 models promote" in record.message]
    assert len(told) == 2
    assert "engine=onnxruntime:fp32 computes fp32 here, but generation 2 has fake:int8" in told[0]
    assert "dinov2 models promote old-aaaaaaaa --engine onnxruntime:fp32" in told[0]
    assert "engine=auto" in told[1]


def test_an_engine_with_the_same_precision_changes_nothing(data_dir: Path) -> None:
    assert started(data_dir, "old") == ("old", 1)
    assert started(data_dir, "old", engine="onnxruntime-cuda:fp32") == ("old", 1)
    applied = Generations(data_dir).applied("engine", "onnxruntime-cuda:fp32")
    assert applied is not None
    assert applied.generation == 1
    assert len(Generations(data_dir).all()) == 1


def test_the_precision_of_a_benchmark_decides_only_once(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fastest` may choose another precision at each start."""
    winners = iter(["int8", "fp32", "fp32"])
    open_model = first_model.open_model
    loaded = []

    def opened(settings: Settings, path: Path, engine: str) -> Opened:
        loaded.append(open_model(settings, path, f"x:{next(winners)}" if engine == "fastest" else engine))
        return loaded[-1]

    monkeypatch.setattr(first_model, "open_model", opened)
    assert [started(data_dir, "old", engine="fastest") for _ in range(3)] == [("old", 1)] * 3
    assert [each.engine.precision for each in loaded] == ["int8", "fp32", "int8", "fp32", "int8"]
    assert [each.engine.closed for each in loaded] == [False, True, False, True, False]


def test_a_process_that_cannot_load_the_live_precision_says_what_to_do(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert started(data_dir, "old", engine="onnxruntime:int8") == ("old", 1)
    open_model = first_model.open_model

    def opened(settings: Settings, path: Path, engine: str) -> Opened:
        if engine.endswith("int8"):
            raise ValueError("no int8 on this host")
        return open_model(settings, path, engine)

    monkeypatch.setattr(first_model, "open_model", opened)
    with pytest.raises(ValueError, match=r"generation 1 has fake:int8, .* no int8 on this host\. Start it where"):
        started(data_dir, "old")
    live = Generations(data_dir).live()
    assert live is not None
    assert live.number == 1


def test_two_processes_that_start_at_once_agree(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both load their model before either has recorded one. Each setting is applied once, in any order."""
    barrier, open_model = Barrier(2), first_model.open_model

    def opened(settings: Settings, path: Path, engine: str) -> Opened:
        with suppress(BrokenBarrierError):
            barrier.wait(timeout=5)
        barrier.abort()  # a process that loads again does not wait
        return open_model(settings, path, engine)

    monkeypatch.setattr(first_model, "open_model", opened)
    with ThreadPoolExecutor(2) as threads:
        first = list(threads.map(lambda model: started(data_dir, model), ["old", "new"], timeout=20))
        again = list(threads.map(lambda model: started(data_dir, model), ["old", "new"] * 2, timeout=20))
    generations = Generations(data_dir)
    live = generations.live()
    assert live is not None
    assert ("old" if live.name.startswith("old") else "new", live.number) in first
    assert {number for _, number in again} == {live.number}
    assert generations.applied("model", "old")
    assert generations.applied("model", "new")


def test_a_slow_start_does_not_undo_a_rollback(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes start with the same new model. One makes it live, an operator goes back, and the other must not
    make it live again."""
    assert started(data_dir, "old") == ("old", 1)
    generations, open_model = Generations(data_dir), first_model.open_model

    def opened_slowly(settings: Settings, path: Path, engine: str) -> Opened:
        monkeypatch.setattr(first_model, "open_model", open_model)
        assert started(data_dir, "new") == ("new", 2)
        generations.promote(1, expected=2, keep_s=60, reason="rolled back")
        return open_model(settings, path, engine)

    monkeypatch.setattr(first_model, "open_model", opened_slowly)
    assert started(data_dir, "new") == ("old", 1)


def test_a_setting_that_ends_a_window_says_so(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert started(data_dir, "old") == ("old", 1)
    generations = Generations(data_dir)
    new = generations.add("b" * 64, "new", data_dir / "artifacts" / "new", "fake", "fp32", reason="test")
    generations.promote(new.number, expected=1, keep_s=60)
    assert started(data_dir, engine="onnxruntime:int8") == ("new", 3)
    assert "this ends the window of generation 1" in caplog.text


def test_a_start_that_failed_does_not_count_as_a_decision(data_dir: Path) -> None:
    """Otherwise the process that is started again after a failed download would serve the old model without a word."""
    assert started(data_dir, "old") == ("old", 1)
    shutil.move(data_dir / "artifacts" / "new", data_dir / "away")
    for _ in range(2):
        with pytest.raises(ValueError, match="new"):
            started(data_dir, "new")
    shutil.move(data_dir / "away", data_dir / "artifacts" / "new")
    assert started(data_dir, "new") == ("new", 2)


@pytest.mark.parametrize("keep_s", [60, 0])
def test_a_process_that_starts_during_a_switch_serves_the_new_model(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, keep_s: float
) -> None:
    assert started(data_dir, "old") == ("old", 1)
    generations, open_model, opened = Generations(data_dir), first_model.open_model, []
    new = generations.add("b" * 64, "new", data_dir / "artifacts" / "new", "fake", "fp32", reason="test")

    def open_slowly(settings: Settings, path: Path, engine: str) -> Opened:
        opened.append(open_model(settings, path, engine))
        if len(opened) == 1:
            generations.promote(new.number, expected=1, keep_s=60)
            if not keep_s:
                generations.retire(1)
        return opened[-1]

    monkeypatch.setattr(first_model, "open_model", open_slowly)
    assert started(data_dir, "old") == ("new", 2)
    assert [each.state for each in generations.all()] == ["former" if keep_s else "retired", "live"]
    assert opened[0].engine.closed


def test_a_moved_artifact_is_found_by_its_fingerprint(data_dir: Path) -> None:
    assert started(data_dir, "old") == ("old", 1)
    (data_dir / "artifacts" / "old").rename(data_dir / "artifacts" / "renamed")
    assert started(data_dir, "auto") == ("old", 1)


def test_a_missing_artifact_of_the_live_generation_is_an_error(data_dir: Path) -> None:
    assert started(data_dir, "old") == ("old", 1)
    shutil.rmtree(data_dir / "artifacts" / "old")
    with pytest.raises(ArtifactError, match=r"generation 1 \(old-aaaaaaaa\) is live, but its artifact is gone"):
        started(data_dir, "auto")
    with pytest.raises(ArtifactError, match="its artifact is gone"):
        choose_artifact("auto", data_dir)
    live = Generations(data_dir).live()
    assert live is not None
    with pytest.raises(ArtifactError, match="restore it"):
        artifact_of(live, data_dir)


def test_another_precision_is_another_generation(data_dir: Path) -> None:
    assert started(data_dir, "old") == ("old", 1)
    assert started(data_dir, "old", engine="onnxruntime:int8") == ("old", 2)
    assert started(data_dir, "old", engine="onnxruntime:int8") == ("old", 2)
