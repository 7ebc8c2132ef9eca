"""Tests of the build process with a recording fake, for what the real builder cannot do without a GPU.

These are refitting, the timing cache, and the behaviour in which the full library differs from TensorRT for RTX.
"""

import io
import json
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.engines.tensorrt_build import BuildError, _Events, build, find_library, refit


class Flag(IntEnum):
    REFIT = 0
    REQUIRE_USER_ALLOCATION = 1


class Recorder:
    """A fake module `tensorrt` that lists all calls. `wrong` names the steps that fail."""

    def __init__(self, *wrong: str, typed_flag: bool = True) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.wrong = wrong
        self.BuilderFlag = Flag
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
        self.SerializationFlag = SimpleNamespace(INCLUDE_REFIT="include refit")
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1) if typed_flag else SimpleNamespace()
        self.ComputeCapability = SimpleNamespace(SM89=89)
        self.LayerInformationFormat = SimpleNamespace(JSON="json")
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
        recorder = self

        class ILogger:
            Severity = SimpleNamespace(INFO=3)

        class IProgressMonitor:
            pass

        self.ILogger, self.IProgressMonitor = ILogger, IProgressMonitor
        self.Builder = lambda logger: Builder(recorder, logger)
        self.OnnxParser = lambda network, logger: Parser(recorder)
        self.OnnxParserRefitter = lambda refitter, logger: Parser(recorder)
        self.Refitter = lambda engine, logger: Refitter(recorder)
        self.Runtime = lambda logger: Runtime(recorder)

    def did(self, *call: Any) -> bool:
        self.calls.append(call)
        return call[0] not in self.wrong

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class Parser:
    num_errors = 1

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def parse_from_file(self, path: str) -> bool:
        return self.recorder.did("parse", path)

    def refit_from_file(self, path: str) -> bool:
        return self.recorder.did("refit_from_file", path)

    def get_error(self, index: int) -> str:
        return "node 3: names differ"


class Profile:
    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes = shapes

    def get_shape(self, name: str) -> tuple[tuple[int, ...], ...]:
        return self.shapes


class Builder:
    def __init__(self, recorder: Recorder, logger: Any) -> None:
        self.recorder, self.logger = recorder, logger

    def create_network(self, flags: int) -> object:
        self.recorder.did("create_network", flags)
        return object()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def create_builder_config(self) -> "Config":
        return Config(self.recorder)

    def build_serialized_network(self, network: object, config: "Config") -> bytes | None:
        self.recorder.did("build", config.progress_monitor.step_complete("Building engine", 1))
        if "build" in self.recorder.wrong:
            self.logger.log(SEVERE, "Attention operation was not supported by a dedicated kernel.")
            return None
        return b"the plan"


class Severe:
    name = "ERROR"

    def __le__(self, other: int) -> bool:
        return True


SEVERE = Severe()


class Config:
    progress_monitor: Any = None
    profiling_verbosity: Any = None
    num_compute_capabilities = 0

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.count = 0

    def add_optimization_profile(self, profile: Profile) -> int:
        if not self.recorder.did("profile"):
            return -1
        self.count += 1
        return self.count - 1

    def set_flag(self, flag: Flag) -> None:
        self.recorder.did("flag", flag.name)

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.recorder.did("limit", pool, size)

    def set_compute_capability(self, capability: int, index: int) -> bool:
        return self.recorder.did("target", capability, index)

    def create_timing_cache(self, data: bytes) -> bytes:
        self.recorder.did("create_timing_cache", data)
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        return self.recorder.did("set_timing_cache", cache, ignore_mismatch) or cache == b""

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"new timings")


LAYERS = [
    {"Name": "_gemm_mha_v2_myl0_3", "LayerType": "kgen", "TacticName": "_gemm_mha_v2_0x1"},
    {"Name": "__myl_Fc_myl0_4", "TacticName": "fmha_v2_flash_attention_bf16_64_sm90_kernel"},
    {"Name": "__mye_softmax", "TacticName": "gemm", "Metadata": "[ONNX Layer: blocks.0.attn.mha]"},
    {"Name": "mhash"},
    "_gemm_mha_v2_myl1_3 [profile 1]",
]
"""Layers as the engine inspector describes them. Three are fused attention kernels."""


class Runtime:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def deserialize_cuda_engine(self, plan: bytes) -> "Engine | None":
        return Engine(self.recorder) if self.recorder.did("deserialize", plan) else None


class Engine:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.refittable = "refittable" not in recorder.wrong

    def create_engine_inspector(self) -> Any:
        def information(kind: str) -> str:
            assert kind == "json"
            return json.dumps({"Layers": LAYERS, "Bindings": ["pixels", "cls"]})

        return SimpleNamespace(get_engine_information=information)

    def create_serialization_config(self) -> Any:
        return SimpleNamespace(set_flag=lambda flag: self.recorder.did("serialization flag", flag))

    def serialize_with_config(self, config: Any) -> bytes:
        self.recorder.did("serialize")
        return b"the refitted plan"


class Refitter:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def get_missing_weights(self) -> list[str]:
        return ["blocks.0.attn.qkv.bias"] if "missing" in self.recorder.wrong else []

    def refit_cuda_engine(self) -> bool:
        return self.recorder.did("refit_cuda_engine")


def events() -> _Events:
    return _Events(io.StringIO())


def build_job(folder: Path, **changes: Any) -> dict[str, Any]:
    shapes = [[[batch, 3, 28, 28] for batch in profile] for profile in ((1, 1, 1), (2, 8, 16))]
    job = {"library": "tensorrt", "onnx": "g.onnx", "plan": str(folder / "plan"), "input": "pixels", "profiles": shapes}
    return job | changes


def test_a_build_with_the_full_library(tmp_path: Path) -> None:
    recorder, told = Recorder(), events()
    result = build(recorder, build_job(tmp_path), told)
    built = [("create_network", 2), ("parse", "g.onnx"), ("profile",), ("profile",), ("build", True)]
    assert recorder.calls == [*built, ("deserialize", b"the plan")]
    assert result["fused_attention"] == 3
    assert (tmp_path / "plan").read_bytes() == b"the plan"
    assert result["profiles"] == build_job(tmp_path)["profiles"]
    assert json.loads(told.out.getvalue()) == {"phase": "Building engine", "step": 1}  # type: ignore[attr-defined]


def test_a_library_without_the_flag_is_strongly_typed_anyway(tmp_path: Path) -> None:
    recorder = Recorder(typed_flag=False)
    build(recorder, build_job(tmp_path), events())
    assert recorder.calls[0] == ("create_network", 0)


def test_the_builder_leaves_memory_to_a_service(tmp_path: Path) -> None:
    recorder = Recorder()
    build(recorder, build_job(tmp_path, workspace_bytes=3 * 2**30), events())
    assert ("limit", "workspace", 3 * 2**30) in recorder.calls


def test_a_plan_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="TensorRT cannot load the plan that it has built"):
        build(Recorder("deserialize"), build_job(tmp_path), events())


def test_flags_and_targets(tmp_path: Path) -> None:
    recorder = Recorder()
    build(recorder, build_job(tmp_path, library="tensorrt_rtx", refit=True, targets=["SM89"]), events())
    assert ("flag", "REFIT") in recorder.calls
    assert "deserialize" not in recorder.names()  # this library would need a GPU
    assert ("flag", "REQUIRE_USER_ALLOCATION") in recorder.calls
    assert ("target", 89, 0) in recorder.calls
    with pytest.raises(BuildError, match="cannot build for SM90"):
        build(Recorder(), build_job(tmp_path, targets=["SM90"]), events())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("parse", "TensorRT cannot read the graph: node 3: names differ"),
        ("profile", "TensorRT refuses the profile"),
        ("build", "attention cannot be fused on this target"),
    ],
)
def test_a_build_that_fails_leaves_no_plan(tmp_path: Path, wrong: str, said: str) -> None:
    with pytest.raises(BuildError, match=said):
        build(Recorder(wrong), build_job(tmp_path), events())
    assert not list(tmp_path.iterdir())


def test_timings_are_kept_and_those_of_another_gpu_begun_anew(tmp_path: Path) -> None:
    cache = tmp_path / "timings"
    job = build_job(tmp_path, timing_cache=str(cache), new_timings=str(cache))
    first = Recorder()
    build(first, job, events())
    assert ("create_timing_cache", b"") in first.calls
    assert cache.read_bytes() == b"new timings"
    second = Recorder("set_timing_cache")
    build(second, job, events())
    assert [call for call in second.calls if call[0] == "set_timing_cache"] == [
        ("set_timing_cache", b"new timings", False),
        ("set_timing_cache", b"", False),
    ]


def test_timings_that_cannot_be_read_are_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Config.create_timing_cache
    monkeypatch.setattr(Config, "create_timing_cache", lambda self, data: made(self, data) if not data else None)
    (tmp_path / "timings").write_bytes(b"noise")
    recorder = Recorder()
    build(recorder, build_job(tmp_path, timing_cache=str(tmp_path / "timings")), events())
    assert [call for call in recorder.calls if call[0] == "set_timing_cache"] == [("set_timing_cache", b"", False)]


def test_a_wheel_that_does_not_load_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if name == "tensorrt":
            raise OSError("libnvinfer.so.10: cannot open shared object file")
        return SimpleNamespace(__version__="1.7.1.116")

    monkeypatch.setattr("model.engines.tensorrt_build.importlib.import_module", load)
    assert find_library().name == "tensorrt_rtx"
    with pytest.raises(ModuleNotFoundError, match=r"libnvinfer\.so\.10"):
        find_library("tensorrt")


def refit_job(folder: Path) -> dict[str, Any]:
    (folder / "old.plan").write_bytes(b"the old plan")
    return {"library": "tensorrt", "onnx": "new.onnx", "plan": str(folder / "plan"), "from": str(folder / "old.plan")}


def test_a_refit_replaces_the_weights_and_stays_refittable(tmp_path: Path) -> None:
    recorder = Recorder()
    assert "refit_s" in refit(recorder, refit_job(tmp_path), events())
    assert recorder.calls == [
        ("deserialize", b"the old plan"),
        ("refit_from_file", "new.onnx"),
        ("refit_cuda_engine",),
        ("serialization flag", "include refit"),
        ("serialize",),
    ]
    assert (tmp_path / "plan").read_bytes() == b"the refitted plan"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("deserialize", "TensorRT cannot load it"),
        ("refittable", "built without --refit, so its weights cannot be replaced"),
        ("refit_from_file", "the plan was built from a different graph: node 3: names differ"),
        ("missing", r"leaves 1 weights of the plan without values: \['blocks\.0\.attn\.qkv\.bias'\]"),
        ("refit_cuda_engine", "the weights cannot be replaced"),
    ],
)
def test_a_refit_that_fails_leaves_no_plan(tmp_path: Path, wrong: str, said: str) -> None:
    with pytest.raises(BuildError, match=said):
        refit(Recorder(wrong), refit_job(tmp_path), events())
    assert not (tmp_path / "plan").exists()
