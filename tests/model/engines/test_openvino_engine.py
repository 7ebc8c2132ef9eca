"""Tests of the OpenVINO engine: its features, its precision, its errors, and the blocked telemetry."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import model.engines.openvino_engine as module
from model.artifact import Artifact, GraphRecord, load_artifact
from model.engines import parity
from model.engines.choice import choose_engine, load_engine
from model.engines.onnxruntime_engine import OnnxEngine
from model.engines.openvino_engine import OpenVinoEngine
from model.engines.protocol import Features
from tests.model.engines.fake_openvino import make_fake_openvino

ROOT = Path(__file__).parents[3]
BUNDLED = next((ROOT / "model/bundled").iterdir())
BF16_CPU = "processor: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n"
NAMES = ("queries.0", "keys.3", "tokens.1")

needs_openvino = pytest.mark.skipif(
    find_spec("openvino") is None, reason="OpenVINO is not installed: pip install '.[openvino]'"
)
needs_bf16 = pytest.mark.skipif(
    not module._cpu_flags() & set(module.BF16_FLAGS), reason="this CPU has no bf16 instructions"
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return load_artifact(BUNDLED, derived_dir=tmp_path_factory.mktemp("derived"))


@pytest.fixture(scope="module")
def pixels(artifact: Artifact) -> np.ndarray:
    manifest = artifact.manifest
    return parity.pixels_at(parity.sample_photos(3, seed=4), manifest.preprocess, manifest.input_size)


@pytest.fixture
def cpu_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(module, "CPU_INFO", path)
    return path


def with_fake(monkeypatch: pytest.MonkeyPatch, **options: object) -> SimpleNamespace:
    fake = make_fake_openvino(**options)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "load_runtime", lambda: fake)
    return fake


@needs_openvino
def test_importing_openvino_reports_to_nobody(tmp_path: Path) -> None:
    """Without the block, the import writes a client id to the home folder and sends an event."""
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}  # not CI: there it is silent by itself
    code = "from model.engines.openvino_engine import load_runtime; print(load_runtime().Core().available_devices)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    assert "CPU" in done.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@needs_openvino
def test_float32_agrees_with_onnx_runtime(artifact: Artifact, pixels: np.ndarray) -> None:
    engine = OpenVinoEngine(artifact.file("model.onnx"), threads=1)
    reference = OnnxEngine(artifact.file("model.onnx"), threads=1, inner="always")
    assert (engine.name, engine.precision, engine.device) == ("openvino", "fp32", "cpu")
    for ours, theirs in zip(engine.run(pixels), reference.run(pixels), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
    ours, theirs = (each.run_outputs(pixels, (*NAMES, "cls")) for each in (engine, reference))
    assert list(ours) == [*NAMES, "cls"]
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-3, err_msg=name)


@needs_openvino
def test_results_are_not_overwritten_by_the_next_pass(artifact: Artifact, pixels: np.ndarray) -> None:
    engine = OpenVinoEngine(artifact.file("model.onnx"), threads=1)
    first = engine.run(pixels[:1])
    kept = first.cls.copy()
    engine.run(pixels[1:2])
    np.testing.assert_array_equal(first.cls, kept)


@needs_openvino
@needs_bf16
def test_bf16_is_compared_and_keeps_its_precision(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    records, check = [], parity.check
    monkeypatch.setattr(parity, "check", lambda record, *rest: records.append(record) or check(record, *rest))
    choice = choose_engine(artifact, "openvino:bf16", threads=1, photos=parity.sample_photos(3, seed=5))
    assert (choice.engine.name, choice.engine.precision) == ("openvino", "bf16")
    (record,) = records
    assert record.precision == "bf16"
    assert record.min_cosine_cls < 1 - 1e-7, "the features are those of float32"


@needs_openvino
def test_shapes_and_outputs_that_the_graph_lacks(artifact: Artifact) -> None:
    engine = OpenVinoEngine(artifact.file("model.onnx"), threads=1)
    assert engine.can_run((224, 224), (*Features._fields, *NAMES))
    assert not engine.can_run((224, 238), ())
    assert not engine.can_run((224, 224), ["keys.4"])  # the model has four blocks
    for shape in ((1, 3, 224, 238), (0, 3, 224, 224), (3, 224, 224)):
        with pytest.raises(ValueError, match=r"this model takes \[B, 3, 224, 224\]"):
            engine.run(np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match=r"no output 'keys\.4'; its outputs are cls, "):
        engine.run_outputs(np.zeros((1, 3, 224, 224), np.float32), ["keys.4"])


@needs_openvino
def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"model\.onnx: OpenVINO cannot read it: "):
        OpenVinoEngine(path, threads=1)


def test_openvino_that_is_not_installed(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModuleNotFoundError, match=r"OpenVINO is not installed .*dinov2-service\[openvino\]"):
        load_engine(artifact, "openvino", threads=1)


@pytest.mark.parametrize(
    ("text", "serves"),
    [
        (BF16_CPU, True),
        (BF16_CPU.replace("avx512_bf16", "amx_bf16"), True),
        (BF16_CPU.replace(" avx512_bf16", ""), False),
        ("Features\t: fp asimd bf16\n", False),  # ARM
        (None, False),  # not Linux
    ],
)
def test_bf16_needs_a_cpu_with_bf16(
    artifact: Artifact, cpu_info: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, serves: bool
) -> None:
    if text is not None:
        cpu_info.write_text(text)
    monkeypatch.setattr(module, "open", lambda request: (_ for _ in ()).throw(ModuleNotFoundError("opened")))
    if serves:
        with pytest.raises(ModuleNotFoundError, match="opened"):
            load_engine(artifact, "openvino:bf16", threads=1)
        return
    with pytest.raises(
        ValueError, match=r"openvino:bf16: this CPU has no bf16 instructions: .* none of avx512_bf16, amx_bf16"
    ):
        load_engine(artifact, "openvino:bf16", threads=1)
    with pytest.raises(ModuleNotFoundError, match="opened"):
        load_engine(artifact, "openvino:fp32", threads=1)


def test_another_precision_than_asked_for_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with_fake(monkeypatch, type_name="f32")
    with pytest.raises(ValueError, match="OpenVINO computes in f32 on this CPU, not in bf16"):
        OpenVinoEngine(Path("model.onnx"), threads=1, precision="bf16")


@pytest.mark.parametrize(("precision", "hint"), [("fp32", "f32"), ("bf16", "bf16")])
def test_the_precision_and_the_threads_are_always_set(
    monkeypatch: pytest.MonkeyPatch, precision: str, hint: str
) -> None:
    fake = with_fake(monkeypatch, type_name=hint, threads=3)
    OpenVinoEngine(Path("model.onnx"), threads=3, precision=precision)
    (options,) = fake.asked
    assert options["INFERENCE_PRECISION_HINT"] == hint
    assert options["INFERENCE_NUM_THREADS"] == 3
    assert options["ENABLE_CPU_PINNING"] is False


def test_fewer_threads_than_asked_for_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_fake(monkeypatch, threads=2)
    OpenVinoEngine(Path("model.onnx"), threads=2, precision="bf16")
    assert caplog.text == ""
    OpenVinoEngine(Path("model.onnx"), threads=8, precision="bf16")
    assert "OpenVINO uses 2 threads instead of 8" in caplog.text


def test_an_error_of_the_compiler_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with_fake(monkeypatch, error="no such operator")
    with pytest.raises(ValueError, match=r"model\.onnx: OpenVINO cannot compile it: no such operator"):
        OpenVinoEngine(Path("model.onnx"), threads=1)


def test_an_artifact_without_graphs_gets_one_of_its_input_size(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_fake(monkeypatch)
    opened: list[Path] = []
    monkeypatch.setattr(module, "OpenVinoEngine", lambda path, **_: opened.append(path))
    weights = {name: path for name, path in artifact.locations.items() if not name.endswith(".onnx")}
    dynamic = GraphRecord(file="model-dynamic-fp32.onnx", size=None, precision="fp32", outputs=(), attention="standard")
    manifest = artifact.manifest.model_copy(update={"graphs": [dynamic]})
    bare = replace(artifact, locations=weights, derived_dir=tmp_path, manifest=manifest)
    module.open(SimpleNamespace(artifact=bare, threads=1, precision="bf16"))  # type: ignore[arg-type]
    assert [path.name for path in opened] == ["model-224-fp32.onnx"]
    assert opened[0].exists()
