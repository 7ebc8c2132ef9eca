"""Tests of building plans with a fake TensorRT: keys, parity, refits, damaged files and builds that die."""

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from model.artifact import Artifact, Manifest
from model.config import ViTConfig
from model.engines import tensorrt_build, tensorrt_engine
from model.engines import tensorrt_export as export_tensorrt
from model.engines.cuda_memory import CudaError, Gpu
from model.engines.parity import ParityError, sample_photos
from model.engines.protocol import BUCKETS, Features, OpenRequest
from model.engines.tensorrt_build import BuildError, count_fused_attention, find_library, plain_reason
from model.engines.tensorrt_engine import TensorRTEngine
from model.engines.tensorrt_export import BuildOptions, build_plan, make_job, run_job, targets_of
from model.engines.tensorrt_plans import PROFILES, PlanMissing, find_plan, graph_spec, plans_folder
from model.preprocess import PreprocessSpec
from tests.model.engines.fake_tensorrt import DIM, GPU, SIDE, FakeCuda, fake_plan, fake_toolchain, features_of

CONFIG = ViTConfig(embed_dim=DIM, depth=2, num_heads=2, img_size=SIDE, num_register_tokens=2)
PHOTOS = sample_photos(5)
RESULT = {"profiles": 3, "parse_s": 0.1, "build_s": 1.5, "library": "tensorrt", "version": "11.4.0"}


class Reference:
    name, precision, device = "torch", "fp32", "cpu"

    def run(self, pixels: np.ndarray) -> Features:
        return Features(**features_of(pixels))

    def close(self) -> None:
        pass


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return make_artifact(tmp_path, 1.0)


def make_artifact(folder: Path, value: float, digit: str = "a", config: ViTConfig = CONFIG) -> Artifact:
    path = folder / f"weights-{digit}.safetensors"
    save_file({"cls_token": np.full((1, 1, DIM), value, np.float32)}, path)
    manifest = Manifest(
        name="tiny",
        fingerprint=digit * 64,
        config=config,
        preprocess=PreprocessSpec(resize=32, crop=SIDE),
        input_size=(SIDE, SIDE),
        parity=[],
        provenance={},
        licence="Apache-2.0",
        created="2026-01-01T00:00:00+00:00",
        files={},
    )
    return Artifact(path=folder / f"tiny-{digit * 8}", manifest=manifest, locations={"weights.safetensors": path})


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> list:
    """Replace graphs by a few bytes made from the weights and the spec, and list the requested ones."""
    asked: list = []

    def write(weights, config, spec, path, *, activations=None):
        asked.append((spec, activations))
        path.write_bytes(f"{float(weights['cls_token'].sum())} {spec}".encode())
        return [path.name]

    monkeypatch.setattr(export_tensorrt, "write_onnx", write)
    return asked


class Builder:
    """A replacement for `run_job` that writes the plan it was created with."""

    def __init__(self, plan: bytes | None = None) -> None:
        self.plan = fake_plan() if plan is None else plan
        self.jobs: list[dict] = []

    def __call__(self, job, folder, *, time_limit_s, progress) -> dict:
        self.jobs.append(job)
        progress({"phase": "Building engine", "parent": None, "steps": 1})
        Path(job["plan"]).write_bytes(self.plan)
        if "new_timings" in job:
            Path(job["new_timings"]).write_bytes(b"timings")
        return RESULT


def build(artifact: Artifact, folder: Path, plan: bytes | None = None, toolchain=None, **options):
    builder = Builder(plan)
    options = BuildOptions(photos=PHOTOS, **({"rebuild": True} | options))
    toolchain = toolchain or fake_toolchain(FakeCuda())
    return build_plan(artifact, toolchain, Reference(), folder, options, run=builder)


def test_a_plan_that_passes_is_kept_and_served(artifact: Artifact, tmp_path: Path) -> None:
    folder = plans_folder(tmp_path / "derived")
    toolchain = fake_toolchain(FakeCuda())
    path, record = build(artifact, folder, toolchain=toolchain)
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".json", ".plan"]
    assert path.stem == record.key.digest
    assert record.passed
    assert record.reference == "torch fp32"
    assert record.build == RESULT
    assert [parity.images for parity in record.parity] == [len(PHOTOS)] * len(BUCKETS)
    plan, found = find_plan(artifact, "bf16", toolchain, folder)
    assert found == record
    pixels = np.random.default_rng(0).standard_normal((3, 3, SIDE, SIDE), dtype=np.float32)
    served = TensorRTEngine(plan, toolchain, "bf16").run(pixels)
    np.testing.assert_allclose(served.cls, features_of(pixels)["cls"], atol=1e-6)


def test_what_is_there_is_not_built_again(artifact: Artifact, tmp_path: Path) -> None:
    """A container can therefore request its plan at every start."""
    first = build(artifact, tmp_path)
    builder = Builder()
    options = BuildOptions(photos=PHOTOS)
    toolchain = fake_toolchain(FakeCuda())
    assert build_plan(artifact, toolchain, Reference(), tmp_path, options, run=builder) == first
    assert builder.jobs == []
    first[0].write_bytes(b"torn")
    build_plan(artifact, toolchain, Reference(), tmp_path, options, run=builder)
    assert len(builder.jobs) == 1
    assert find_plan(artifact, "bf16", toolchain, tmp_path)[1].passed


def test_loading_finds_library_gpu_and_plan(artifact: Artifact, tmp_path: Path, monkeypatch) -> None:
    toolchain = fake_toolchain(FakeCuda(), rtx=True)
    build(artifact, plans_folder(artifact.derived), fake_plan(fused=6), toolchain=toolchain)
    monkeypatch.setattr("model.engines.tensorrt_engine.find_toolchain", lambda: toolchain)
    request = OpenRequest(artifact, "tensorrt", "bf16", threads=1)
    engine = tensorrt_engine.open(request)
    assert (engine.name, engine.precision, engine.device) == ("tensorrt_rtx", "bf16", "cuda")
    assert len(list(plans_folder(artifact.derived).glob("*.jit"))) == 1
    with pytest.raises(
        PlanMissing, match="no plan was built for this model on this host: `dinov2 build-engine` builds one"
    ):
        tensorrt_engine.open(dataclasses.replace(request, precision="fp16"))
    toolchain.cuda.runtime.fail["cudaMalloc"] = (0, 2)
    with pytest.raises(ValueError, match=r"the TensorRT plan cannot be loaded: .*out of memory"):
        tensorrt_engine.open(request)


@pytest.mark.parametrize("batch", BUCKETS)
def test_a_plan_that_strays_at_one_batch_is_dropped(artifact: Artifact, tmp_path: Path, batch: int) -> None:
    toolchain = fake_toolchain(FakeCuda())
    message = r"differs too much from torch fp32 and was not stored: class cosine .*at least 0\.999"
    with pytest.raises(ParityError, match=message):
        build(artifact, tmp_path, fake_plan(wrong_batches=[batch]), toolchain)
    assert not list(tmp_path.glob("*.plan"))
    assert not list(tmp_path.glob(".building-*"))
    with pytest.raises(PlanMissing, match="the bf16 plan failed parity: class cosine"):
        find_plan(artifact, "bf16", toolchain, tmp_path)
    build(artifact, tmp_path, toolchain=toolchain)  # a later build that passes takes its place
    assert find_plan(artifact, "bf16", toolchain, tmp_path)[1].passed


def test_nan_never_passes(artifact: Artifact, tmp_path: Path) -> None:
    toolchain = fake_toolchain(FakeCuda())
    with pytest.raises(ParityError, match="class cosine nan"):
        build(artifact, tmp_path, fake_plan(scale=float("nan")), toolchain)
    with pytest.raises(PlanMissing, match="failed parity"):
        find_plan(artifact, "bf16", toolchain, tmp_path)


def test_a_failed_build_takes_an_older_plan_along(artifact: Artifact, tmp_path: Path) -> None:
    """If the new plan fails parity, the older plan under the same key is deleted too."""
    build(artifact, tmp_path)
    with pytest.raises(ParityError):
        build(artifact, tmp_path, fake_plan(wrong_batches=[1]))
    assert not list(tmp_path.glob("*.plan"))


@pytest.mark.parametrize(
    "gpu",
    [
        dataclasses.replace(GPU, name="NVIDIA Fake 5090"),
        dataclasses.replace(GPU, capability=(12, 0)),
        dataclasses.replace(GPU, driver="999.20 (CUDA 13.0)"),
    ],
)
def test_another_gpu_or_driver_needs_its_own_plan(artifact: Artifact, tmp_path: Path, gpu: Gpu) -> None:
    build(artifact, tmp_path)
    with pytest.raises(PlanMissing, match=rf"no bf16 plan for tensorrt 11\.4\.0 on {gpu.name} with driver"):
        find_plan(artifact, "bf16", fake_toolchain(FakeCuda(), gpu=gpu), tmp_path)


def test_another_version_library_or_graph_needs_its_own_plan(artifact: Artifact, tmp_path: Path) -> None:
    build(artifact, tmp_path)
    for other in (fake_toolchain(FakeCuda(), version="11.5.0"), fake_toolchain(FakeCuda(), rtx=True)):
        with pytest.raises(PlanMissing, match="no bf16 plan for"):
            find_plan(artifact, "bf16", other, tmp_path)
    other_weights = make_artifact(tmp_path, 2.0, "b")
    with pytest.raises(PlanMissing, match="no plan was built for this model on this host"):
        find_plan(other_weights, "bf16", fake_toolchain(FakeCuda()), tmp_path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda plan: plan.write_bytes(plan.read_bytes()[:-1]), r"\.plan: changed or truncated: build it again"),
        (lambda plan: plan.unlink(), r"\.plan: No such file or directory: build it again"),
        (lambda plan: plan.with_suffix(".json").write_text("{"), r"\.json: damaged \(.*: build it again"),
        (
            lambda plan: plan.with_suffix(".json").write_text(
                plan.with_suffix(".json").read_text().replace("11.4.0", "11.3.9")
            ),
            "record of another plan: build it again",
        ),
    ],
    ids=["truncated", "missing", "record damaged", "record of another"],
)
def test_a_damaged_plan_is_not_loaded(artifact: Artifact, tmp_path: Path, damage, said: str) -> None:
    path, _ = build(artifact, tmp_path)
    damage(path)
    with pytest.raises(PlanMissing, match=said):
        find_plan(artifact, "bf16", fake_toolchain(FakeCuda()), tmp_path)
    build(artifact, tmp_path)
    find_plan(artifact, "bf16", fake_toolchain(FakeCuda()), tmp_path)


def test_the_job_of_a_build(tmp_path: Path) -> None:
    options = BuildOptions(photos=PHOTOS, refit=True, timing_cache=tmp_path / "timings")
    job = make_job("tensorrt", tmp_path / "g.onnx", tmp_path / "p", (224, 448), options)
    assert job["profiles"] == [[[batch, 3, 224, 448] for batch in profile] for profile in PROFILES]
    assert PROFILES == ((1, 1, 1), (2, 8, 16), (17, 32, 64))
    assert (job["action"], job["refit"], job["timing_cache"]) == ("build", True, str(tmp_path / "timings"))
    assert job["new_timings"] == str(tmp_path / "timings")
    rtx = make_job("tensorrt_rtx", tmp_path / "g", tmp_path / "p", (224, 224), options)
    assert not {"timing_cache", "new_timings"} & rtx.keys()


def test_timings_are_stored_for_the_next_build(artifact: Artifact, tmp_path: Path) -> None:
    build(artifact, tmp_path / "plans", timing_cache=tmp_path / "timings")
    assert (tmp_path / "timings").read_bytes() == b"timings"


def test_timings_that_cannot_be_stored_cost_no_plan(
    artifact: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = build(artifact, tmp_path / "plans", timing_cache=tmp_path / "absent" / "timings")
    assert path.exists()
    assert "cannot store kernel measurements" in caplog.text


def test_the_gpu_that_a_plan_is_built_for(artifact: Artifact, tmp_path: Path) -> None:
    cuda = FakeCuda()
    assert targets_of(fake_toolchain(cuda, rtx=True)) == ["SM89"]
    hopper = dataclasses.replace(GPU, capability=(9, 0))
    assert targets_of(fake_toolchain(cuda, rtx=True, gpu=hopper)) == []  # it has no name for it
    assert targets_of(fake_toolchain(cuda)) == []  # the full library builds for the one that is there
    builder = Builder(fake_plan(fused=6))
    toolchain = fake_toolchain(cuda, rtx=True)
    build_plan(artifact, toolchain, Reference(), tmp_path, BuildOptions(photos=PHOTOS), run=builder)
    assert builder.jobs[0]["targets"] == ["SM89"]


def test_parity_gives_the_gpus_memory_back(artifact: Artifact, tmp_path: Path) -> None:
    for plan in (fake_plan(), fake_plan(fails=[8])):
        cuda = FakeCuda()
        with suppress(CudaError):
            build(artifact, tmp_path, plan, fake_toolchain(cuda))
        assert "cudaMalloc" in cuda.names()
        assert not cuda.live


def test_the_graph_that_a_plan_is_built_from(artifact: Artifact, tmp_path: Path, graphs: list) -> None:
    cuda = FakeCuda()
    build(artifact, tmp_path, precision="fp8", activations={"blocks.0.attn.qkv": 3.0})
    (spec, activations) = graphs[0]
    assert (spec.size, spec.precision, spec.attention) == ((SIDE, SIDE), "fp8", "standard")
    assert spec.outputs == ("cls", "patches", "registers")
    assert activations == {"blocks.0.attn.qkv": 3.0}
    plain = make_artifact(tmp_path, 1.0, "c", dataclasses.replace(CONFIG, num_register_tokens=0))
    assert graph_spec(plain, "bf16", fake_toolchain(cuda).library).outputs == ("cls", "patches")
    # fp16 with its softmax in float32, where that form has a kernel.
    forms = {
        version: graph_spec(artifact, "fp16", fake_toolchain(cuda, version=version).library).attention
        for version in ("10.14.1.48", "11.2.0", "11.3.0", "12.0")
    }
    assert forms == {"10.14.1.48": "standard", "11.2.0": "standard", "11.3.0": "upcast", "12.0": "upcast"}
    assert graph_spec(artifact, "fp16", fake_toolchain(cuda, rtx=True).library).attention == "upcast"


def test_a_refit_takes_new_weights_into_an_old_plan(artifact: Artifact, tmp_path: Path) -> None:
    toolchain = fake_toolchain(FakeCuda())
    old, record = build(artifact, tmp_path, toolchain=toolchain, refit=True)
    assert record.key.refit
    retrained = make_artifact(tmp_path, 2.0, "b")
    builder = Builder()
    options = BuildOptions(photos=PHOTOS, refit_from=old)
    new, refitted = build_plan(retrained, toolchain, Reference(), tmp_path, options, run=builder)
    (job,) = builder.jobs
    assert (job["action"], job["from"]) == ("refit", str(old))
    assert "profiles" not in job
    assert new != old
    assert refitted.passed
    assert find_plan(retrained, "bf16", toolchain, tmp_path)[1] == refitted
    with pytest.raises(ParityError):
        build(retrained, tmp_path, fake_plan(wrong_batches=[64]), toolchain, refit_from=old)
    assert old.exists()
    assert not new.exists()


def test_attention_that_was_not_fused_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    rtx = fake_toolchain(FakeCuda(), rtx=True)
    build(artifact, tmp_path, fake_plan(fused=6), rtx)  # two blocks, three profiles
    with pytest.raises(BuildError, match="the plan has 5 fused attention kernels, and 2 blocks with 3 profiles need 6"):
        build(artifact, tmp_path, fake_plan(fused=5), rtx)
    assert count_fused_attention(b"\0_gemm_mha_v2\0x_gemm_mha_v2\0_gemm_mha_v2_params_t\0") == 1


def test_the_full_library_is_only_warned_about(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A plan with slow attention still gives right features, and the names of the kernels are not certain."""
    monkeypatch.setitem(RESULT, "fused_attention", 6)
    assert build(artifact, tmp_path)[1].fused_attention == 6
    assert "fused" not in caplog.text
    monkeypatch.setitem(RESULT, "fused_attention", 4)
    assert build(artifact, tmp_path)[1].fused_attention == 4
    assert "attention may not be fused, which makes the plan slow: the plan has 4 fused" in caplog.text


def test_a_build_may_use_half_of_the_free_memory(artifact: Artifact, tmp_path: Path) -> None:
    builder, options = Builder(fake_plan(fused=6)), BuildOptions(photos=PHOTOS)
    for rtx, expected in ((False, 3 * 2**30), (True, None)):
        toolchain = fake_toolchain(FakeCuda(), rtx=rtx)
        build_plan(artifact, toolchain, Reference(), tmp_path, options, run=builder)
        assert builder.jobs[-1]["workspace_bytes"] == expected


def test_kernels_compiled_for_the_comparison_are_kept_for_the_first_start(artifact: Artifact, tmp_path: Path) -> None:
    rtx = fake_toolchain(FakeCuda(), rtx=True)
    path, _ = build(artifact, tmp_path, fake_plan(fused=6), rtx)
    assert path.with_suffix(".jit").read_bytes() == b"compiled kernels"
    with pytest.raises(ParityError):
        build(artifact, tmp_path, fake_plan(fused=6, wrong_batches=[1]), rtx)
    assert not path.with_suffix(".jit").exists()


def test_parity_needs_two_photos(artifact: Artifact, tmp_path: Path) -> None:
    options = BuildOptions(photos=PHOTOS[:1])
    with pytest.raises(ValueError, match="at least two images, not 1"):
        build_plan(artifact, fake_toolchain(FakeCuda()), Reference(), tmp_path, options, run=Builder())


# ---- the process that builds


def program(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """Replace the build program by another program."""
    file = folder / "program.py"
    file.write_text(f"import json, os, signal, sys, time\n{body}\n")
    monkeypatch.setattr(tensorrt_build, "__file__", str(file))


def run(folder: Path, time_limit_s: float = 60, progress=lambda event: None) -> dict:
    return run_job({"library": "x"}, folder, time_limit_s=time_limit_s, progress=progress)


def test_events_and_result_come_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(
        monkeypatch,
        tmp_path,
        "print(json.dumps({'phase': 'one', 'steps': 2}), flush=True)\n"
        "print('chatter', file=sys.stderr)\n"
        "print(json.dumps({'result': json.load(open(sys.argv[1]))}))",
    )
    events: list = []
    assert run(tmp_path, progress=events.append) == {"library": "x"}
    assert events == [{"phase": "one", "steps": 2}]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "print('node 7 is odd', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
            r"killed by SIGSEGV: TensorRT crashed on this graph, or memory ran out\. Its log ends: node 7 is odd",
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"killed by SIGKILL.*Its log is empty"),
        ("print(json.dumps({'error': 'no kernel'})); sys.exit(1)", "^no kernel$"),
        ("print('lost', file=sys.stderr); sys.exit(3)", "ended with status 3 and no result. Its log ends: lost"),
        ("pass", "ended with status 0 and no result"),
    ],
)
def test_a_build_that_dies_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str) -> None:
    program(monkeypatch, tmp_path, body)
    with pytest.raises(BuildError, match=said):
        run(tmp_path)


def test_a_build_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, tmp_path, "time.sleep(600)")
    with pytest.raises(BuildError, match=r"took longer than 0\.3 s and was stopped"):
        run(tmp_path, time_limit_s=0.3)


def test_an_interrupt_takes_the_build_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, tmp_path, "print(json.dumps({'phase': 'p', 'pid': os.getpid()}), flush=True); time.sleep(600)")
    pids: list[int] = []

    def interrupted(event) -> None:
        pids.append(event["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=interrupted)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


# ---- which library


def modules(monkeypatch: pytest.MonkeyPatch, **found: object) -> None:
    """Set what importing each library gives: a module with a version, or the error."""

    def load(name: str):
        version = found.get(name, f"No module named {name!r}")
        if isinstance(version, str) and version[0].isdigit():
            return SimpleNamespace(__version__=version)
        raise ImportError(version)

    monkeypatch.setattr(tensorrt_build.importlib, "import_module", load)


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ({"tensorrt": "10.14.1.48", "tensorrt_rtx": "1.7.1"}, "tensorrt"),
        ({"tensorrt": "11.4.0"}, "tensorrt"),
        ({"tensorrt_rtx": "1.7.1"}, "tensorrt_rtx"),
        (
            {"tensorrt": "libnvonnxparser.so.11: cannot open shared object file", "tensorrt_rtx": "1.7.1"},
            "tensorrt_rtx",
        ),
        ({"tensorrt": "10.13.3", "tensorrt_rtx": "1.7.1"}, "tensorrt_rtx"),
    ],
)
def test_the_full_library_comes_first(monkeypatch: pytest.MonkeyPatch, found: dict, chosen: str) -> None:
    modules(monkeypatch, **found)
    library = find_library()
    assert (library.name, library.version) == (chosen, found[chosen])


def test_why_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    modules(monkeypatch)
    with pytest.raises(ModuleNotFoundError, match=r"tensorrt: No module.*tensorrt_rtx: No module.*pip install -e"):
        find_library()
    modules(monkeypatch, tensorrt="10.13.3")
    with pytest.raises(ValueError, match=r"tensorrt 10\.13\.3: no fused attention operator; 10\.14"):
        find_library("tensorrt")
    with pytest.raises(ValueError, match="unknown library 'trt': one of tensorrt, tensorrt_rtx"):
        find_library("trt")


@pytest.mark.parametrize(
    ("error", "plain"),
    [
        ("Attention operation was not supported by a dedicated kernel.", "attention cannot be fused on this target"),
        ("the model contains HW-specific datatypes: b16.", "cannot compute in this number format"),
        ("graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed.", "needs a GPU, and CUDA can use none"),
        ("Requested amount of GPU memory: Out of memory", "the GPU's memory was too small"),
        ("something new", "TensorRT cannot build this graph. It says: something new"),
    ],
)
def test_reasons_in_plain_words(error: str, plain: str) -> None:
    assert plain in plain_reason([error])
    assert error in plain_reason(["earlier", error])


def test_the_builder_reports_errors_as_its_last_line(tmp_path: Path) -> None:
    """The test runs the real program with the name of a library that does not exist."""
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"library": "trt", "action": "build"}))
    command = [sys.executable, "-P", tensorrt_build.__file__, job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "unknown library 'trt'" in json.loads(done.stdout)["error"]
