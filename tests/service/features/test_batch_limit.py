"""Tests of the largest batch and the number of threads that are chosen when a model is loaded."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from model.artifact import Artifact
from model.engines.protocol import Choice, Features, FloatArray
from service import first_model
from service.features import batch_limit, pipeline
from service.features.batch_limit import measured_limit, unmeasured_limit, with_split_batches, with_useful_threads
from service.settings import Settings
from tests.fakes import FakeEngine, fake_artifact, running

PATCHES = 4  # of an image of the fake artifact


@dataclass
class TimedEngine(FakeEngine):
    """An engine whose passes take `seconds(batch)`."""

    seconds: Callable[[int], float] = lambda batch: 0.0

    def run(self, pixels: FloatArray) -> Features:
        time.sleep(self.seconds(len(pixels)))
        return super().run(pixels)


def with_input_size(side: int) -> Artifact:
    artifact = fake_artifact()
    return replace(artifact, manifest=artifact.manifest.model_copy(update={"input_size": (side, side)}))


@pytest.mark.parametrize(
    ("seconds", "batch"), [(lambda batch: 0.005, 4), (lambda batch: 0.005 * batch**1.5, 1)], ids=["large", "small"]
)
async def test_the_batch_that_suits_the_engine_is_used(
    tmp_path: Path, seconds: Callable[[int], float], batch: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.features.batch_limit")
    engine, artifact = TimedEngine(seconds=seconds), with_input_size(308)
    async with running(tmp_path, engine=engine, artifact=artifact, batch_max_patches=None) as run:
        assert run.service.pipeline.batcher.batch_max_patches == batch * 22 * 22
    assert f"largest batch: {batch} (images/s by batch: 1: " in caplog.text


async def test_a_setting_replaces_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "measured_limit", lambda *_: pytest.fail("measured"))
    async with running(tmp_path, batch_max_patches=12) as run:
        assert run.service.pipeline.batcher.batch_max_patches == 12


def test_nothing_is_measured_where_the_limit_is_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_limit, "measure_batches", lambda *_: pytest.fail("measured"))
    artifact, cpu, gpu = fake_artifact(), FakeEngine(), FakeEngine(device="cuda")
    assert measured_limit(gpu, artifact, gpu.run) == unmeasured_limit(gpu, artifact) == 64 * PATCHES
    assert unmeasured_limit(cpu, artifact) == 2048
    assert measured_limit(cpu, with_input_size(462), cpu.run) == 2048  # two such images have 2178 patches
    assert measured_limit(cpu, with_input_size(700), cpu.run) == 2048


def test_threads_that_gain_nothing_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.features.batch_limit")
    monkeypatch.setattr(batch_limit, "available_cpus", lambda: 8)
    engine = FakeEngine()

    def half(given: FakeEngine, threads: int, reopen: Callable[[int], FakeEngine], pixels: FloatArray) -> object:
        assert (given, threads, pixels.shape) == (engine, 8, (512, 3, 28, 28))
        return reopen(4), 4

    monkeypatch.setattr(batch_limit, "with_fewer_threads", half)
    chosen, threads = with_useful_threads(engine, fake_artifact(), lambda number: FakeEngine(name=f"{number} threads"))
    assert (chosen.name, threads) == ("4 threads", 4)
    assert "4 threads are as fast as 8" in caplog.text
    monkeypatch.setattr(batch_limit, "with_fewer_threads", lambda *_: pytest.fail("measured"))
    for kept in (FakeEngine(device="cuda"), FakeEngine(name="torch")):
        assert with_useful_threads(kept, fake_artifact(), lambda threads: pytest.fail("opened")) == (kept, 8)


@pytest.mark.parametrize(("faster", "name"), [(True, "split"), (False, "onnxruntime")])
def test_batches_are_split_if_this_is_faster(monkeypatch: pytest.MonkeyPatch, faster: bool, name: str) -> None:
    engine = FakeEngine(name="onnxruntime")

    def measured(given: FakeEngine, threads: int, reopen: Callable[[int], FakeEngine], pixels: FloatArray) -> object:
        assert (given, threads, pixels.shape) == (engine, 4, (4, 3, 28, 28))
        return reopen(1) if faster else given

    monkeypatch.setattr(batch_limit, "split_if_faster", measured)
    assert with_split_batches(engine, fake_artifact(), 4, lambda threads: FakeEngine(name="split")).name == name


def test_batches_are_not_split_where_this_cannot_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_limit, "split_if_faster", lambda *_: pytest.fail("measured"))
    many = 1 + 2048 // PATCHES  # no batch has so many images
    for kept, threads in (("onnxruntime", 1), ("onnxruntime", many), ("openvino", 2), ("onnxruntime-cuda", 2)):
        engine = FakeEngine(name=kept)
        assert with_split_batches(engine, fake_artifact(), threads, lambda number: pytest.fail("opened")) is engine


@pytest.mark.parametrize("threads", [None, 3])
def test_a_setting_for_the_threads_replaces_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int | None
) -> None:
    asked: list[tuple[str, int | None]] = []

    def choose(artifact: Artifact, name: str, *, threads: int | None, photos: object) -> Choice:
        asked.append((name, threads))
        return Choice(FakeEngine(precision="bf16"), ())

    monkeypatch.setattr(first_model, "load_artifact", lambda path, derived_dir: fake_artifact())
    monkeypatch.setattr(first_model, "choose_engine", choose)
    monkeypatch.setattr(first_model, "with_useful_threads", lambda engine, artifact, reopen: (reopen(1), 1))
    first_model.open_model(Settings(data_dir=tmp_path, threads=threads), tmp_path, "auto")
    assert asked == ([("auto", 3)] if threads else [("auto", None), ("fake:bf16", 1)])


def test_the_largest_batch_of_a_gpu_depends_on_the_input_size():
    artifact = fake_artifact()
    wide = replace(artifact, manifest=artifact.manifest.model_copy(update={"input_size": (518, 224)}))
    assert unmeasured_limit(FakeEngine(device="cuda"), wide) == 64 * 37 * 16
