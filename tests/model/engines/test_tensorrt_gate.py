"""Builds our graphs with a real builder, that of TensorRT for RTX, which needs no GPU.

Each build is a separate process. The tests assert that the graphs can be parsed and built as strongly typed networks
for several GPUs, that a plan has one fused attention kernel per block and profile, and that a clear error is raised if
attention cannot be fused. Weights are random.
"""

import dataclasses
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.tensorrt_build import random_weights
from model.artifact import bundled_artifact, load_artifact
from model.config import CONFIGS, FeedForward
from model.engines.cuda_memory import Cuda, Gpu
from model.engines.parity import sample_photos
from model.engines.tensorrt_build import BuildError, count_fused_attention, find_library
from model.engines.tensorrt_export import BuildOptions, build_plan, check_fusion, run_job
from model.engines.tensorrt_plans import PROFILES, Profile, Toolchain, find_plan, plans_folder
from model.onnx_graph.build import write_onnx
from model.onnx_graph.spec import GraphSpec
from tests.model.engines.fake_tensorrt import FakeCuda

pytestmark = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="needs TensorRT for RTX (95 MB, builds without a GPU): pip install -e '.[tensorrt-rtx]'",
)

S, S_REG, G = "dinov2_vits14", "dinov2_vits14_reg", "dinov2_vitg14"
ONE = (PROFILES[1],)


def build(
    folder: Path,
    model: str,
    precision: str,
    target: str | None,
    *,
    depth: int = 12,
    profiles: tuple[Profile, ...] = ONE,
    attention: str = "standard",
    ffn: FeedForward = "mlp",
    side: int = 224,
    **job,
) -> tuple[dict, bytes]:
    config = dataclasses.replace(CONFIGS[model], depth=depth, img_size=side, ffn=ffn)
    registers = ("registers",) if config.num_register_tokens else ()
    spec = GraphSpec((side, side), precision, outputs=("cls", "patches", *registers), attention=attention)
    weights = random_weights(config)
    largest = {name.removesuffix(".weight"): 4.0 for name, value in weights.items() if value.ndim == 2}
    write_onnx(weights, config, spec, folder / "graph.onnx", activations=largest if precision == "fp8" else None)
    shapes = [[[batch, 3, side, side] for batch in profile] for profile in profiles]
    job = {
        "action": "build",
        "library": "tensorrt_rtx",
        "onnx": str(folder / "graph.onnx"),
        "plan": str(folder / "plan"),
        "input": "pixels",
        "profiles": shapes,
        "targets": [target] if target else [],
    } | job
    events: list = []
    result = run_job(job, folder, time_limit_s=300, progress=events.append)
    assert result["profiles"] == shapes  # as the builder's configuration holds them
    assert any(event["phase"] == "Building engine" for event in events)
    return result, (folder / "plan").read_bytes()


@pytest.mark.parametrize(
    ("model", "precision", "attention", "target", "depth"),
    [
        (S, "bf16", "standard", "SM80", 2),
        (S_REG, "bf16", "standard", "SM120", 2),
        (S, "fp16", "upcast", "SM120", 2),
        (S_REG, "fp16", "upcast", "SM89", 12),
    ],
)
def test_one_fused_attention_a_block(
    tmp_path: Path, model: str, precision: str, attention: str, target: str, depth: int
) -> None:
    """All blocks are alike, so only one case has the depth of the published models."""
    _, plan = build(tmp_path, model, precision, target, depth=depth, attention=attention)
    assert count_fused_attention(plan) == depth


def test_the_profiles_that_serving_uses(tmp_path: Path) -> None:
    result, plan = build(tmp_path, S, "bf16", "SM89", profiles=PROFILES)
    check_fusion(result["library"], count_fused_attention(plan), 12)
    assert count_fused_attention(plan) == 12 * len(PROFILES)


@pytest.mark.parametrize(
    ("model", "side", "precision", "attention", "target"),
    [
        (S, 224, "fp16", "upcast", "SM75"),  # T4
        (S, 518, "fp16", "upcast", "SM75"),
        (S, 518, "bf16", "standard", "SM86"),  # A10
        (G, 224, "bf16", "standard", "SM89"),  # L4
        (S, 224, "bf16", "standard", None),  # what a GPU without a target gets
    ],
)
def test_each_gpu_and_length_fuses_in_every_profile(
    tmp_path: Path, model: str, side: int, precision: str, attention: str, target: str | None
) -> None:
    """The lengths are 257 tokens at 224 pixels and 1370 tokens at 518. One block is enough, because all are alike."""
    _, plan = build(tmp_path, model, precision, target, depth=1, profiles=PROFILES, side=side, attention=attention)
    assert count_fused_attention(plan) == len(PROFILES)


def test_the_largest_models_form_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The giant model has SwiGLU layers and weights in a second file."""
    monkeypatch.setattr("model.onnx_graph.build.EXTERNAL_ABOVE_BYTES", 1000)
    _, plan = build(tmp_path, S_REG, "bf16", "SM89", depth=2, ffn="swiglu")
    assert (tmp_path / "graph.onnx.data").exists()
    assert count_fused_attention(plan) == 2


@pytest.mark.parametrize(("target", "attention"), [("SM89", "standard"), ("SM120", "upcast")])
def test_fp8_fuses_too(tmp_path: Path, target: str, attention: str) -> None:
    _, plan = build(tmp_path, S, "fp8", target, depth=2, attention=attention)
    assert count_fused_attention(plan) == 2
    folder = tmp_path / "bf16"
    folder.mkdir()
    _, half = build(folder, S, "bf16", target, depth=2)
    assert len(plan) < 0.8 * len(half)  # weights of one byte


@pytest.mark.parametrize(
    ("precision", "target", "said"),
    [
        ("fp32", "SM89", "attention cannot be fused on this target: .*float32 never fuses: build bf16 or fp16"),
        ("bf16", "SM75", "the target GPU cannot compute in this number format"),
        ("fp8", "SM80", "the target GPU cannot compute in this number format"),
        ("bf16", "SM90", "this TensorRT cannot build for SM90"),
    ],
)
def test_what_cannot_be_fused_is_refused(tmp_path: Path, precision: str, target: str, said: str) -> None:
    with pytest.raises(BuildError, match=said):
        build(tmp_path, S, precision, target, depth=2)
    assert not (tmp_path / "plan").exists()


def test_float32_slips_through_at_batch_one_and_is_caught_by_the_count(tmp_path: Path) -> None:
    """With a batch fixed to 1, TensorRT-RTX 1.7.1 decomposes attention without an error, although it must not."""
    result, plan = build(tmp_path, S, "fp32", "SM89", depth=2, profiles=PROFILES[:1])
    with pytest.raises(BuildError, match="attention was not fused: the plan has 0 fused attention kernels"):
        check_fusion(result["library"], count_fused_attention(plan), 2)


def test_the_bundled_artifact_becomes_a_plan(tmp_path: Path) -> None:
    """The test runs all of `dinov2 build-engine` without a GPU. ONNX Runtime's CPU engine computes in place of the
    plan.
    """
    from model.engines.onnxruntime_engine import OnnxEngine

    artifact = load_artifact(bundled_artifact(), derived_dir=tmp_path)
    reference = OnnxEngine(artifact.file("model.onnx"), threads=1)
    library = find_library("tensorrt_rtx")
    toolchain = Toolchain(library, Cuda(FakeCuda()), Gpu("NVIDIA RTX 4090", (8, 9), "580.65.06 (CUDA 13.0)"))
    options = BuildOptions(photos=sample_photos(2))
    folder = plans_folder(artifact.derived)
    path, record = build_plan(artifact, toolchain, reference, folder, options, make_engine=lambda *_: reference)
    assert record.fused_attention == artifact.manifest.config.depth * len(PROFILES)
    assert record.build["version"] == library.version
    assert find_plan(artifact, "bf16", toolchain, folder) == (path.read_bytes(), record)


def test_a_graph_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(b"no graph")
    job = {"action": "build", "library": "tensorrt_rtx", "onnx": str(tmp_path / "graph.onnx")}
    with pytest.raises(BuildError, match="TensorRT cannot read the graph"):
        run_job(job | {"plan": str(tmp_path / "plan")}, tmp_path, time_limit_s=60, progress=lambda event: None)
