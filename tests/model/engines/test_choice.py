"""Tests of the choice of the serving engine: which engine serves, why others do not, and that every engine is compared
first.
"""

import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.artifact import Artifact, GateRecord, GraphRecord, ParityRecord, load_artifact
from model.engines import choice as engine_choice
from model.engines import onnxruntime_engine, openvino_engine, parity, tensorrt_engine
from model.engines.choice import choose_engine, images_per_s, load_engine
from model.engines.knn_gate import NO_LABELS
from model.engines.onnxruntime_engine import graph_file, graph_of
from model.engines.protocol import BUCKETS, Features, OpenRequest
from model.engines.runtimes import parse_engine
from model.export.artifact import export_artifact
from model.export.options import ExportOptions
from model.onnx_graph.spec import GraphSpec
from tests.model.tiny import backbone

torch = pytest.importorskip("torch", reason="the export checks parity against torch: pip install '.[train]'")

PASSED = GateRecord(status="passed", reason="as the test says")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Return an artifact with an fp16 graph and an int8 graph without a measured gate."""
    folder = tmp_path_factory.mktemp("artifacts")
    graphs = [GraphSpec(size=(70, 70), precision=precision) for precision in ("fp16", "int8")]
    made = export_artifact(backbone(licence="x"), folder, ExportOptions(), graphs)
    return load_artifact(made.path, derived_dir=folder / "derived")


def with_gate(artifact: Artifact, gate: GateRecord | None) -> Artifact:
    """Return the artifact with this gate in the record of its int8 graph."""
    records = [r.model_copy(update={"gate": gate}) if r.precision == "int8" else r for r in artifact.manifest.parity]
    return replace(artifact, manifest=artifact.manifest.model_copy(update={"parity": records}))


def without_graphs(artifact: Artifact) -> Artifact:
    weights = {name: path for name, path in artifact.locations.items() if not name.endswith(".onnx")}
    return replace(artifact, locations=weights, manifest=artifact.manifest.model_copy(update={"graphs": []}))


class Wrong:
    """An engine with features that do not depend on the image."""

    name, precision, device = "wrong", "bf16", "cpu"

    def run(self, pixels: np.ndarray) -> Features:
        noise = np.random.default_rng(0).normal(size=(len(pixels), 28, 48)).astype(np.float32)
        return Features(noise[:, 0], noise[:, 3:], noise[:, 1:3])

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", ("auto", "")),
        ("fastest", ("fastest", "")),
        ("onnxruntime", ("onnxruntime", "fp32")),
        ("onnxruntime:int8", ("onnxruntime", "int8")),
        ("torch", ("torch", "fp32")),
        ("tensorrt", ("tensorrt", "bf16")),
        ("onnxruntime-cuda:fp16", ("onnxruntime-cuda", "fp16")),
    ],
)
def test_names(name: str, expected: tuple[str, str]) -> None:
    assert parse_engine(name) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda9", "unknown engine 'cuda9': one of auto, fastest, onnxruntime, .*, tensorrt"),
        ("", "unknown engine ''"),
        ("auto:fp32", "unknown engine 'auto:fp32'"),
        ("torch:int8", "engine 'torch:int8': torch supports fp32, bf16"),
        ("onnxruntime-tensorrt", "unknown engine 'onnxruntime-tensorrt'"),  # docs/decisions/0048-gpu-serving.md
        ("torch:", "engine 'torch:': torch supports"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_engine(name)


def test_auto_without_a_gpu_takes_the_cpu_and_says_why(
    exported: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_choice, "no_gpu", lambda: "no NVIDIA driver")
    monkeypatch.setattr(parity, "measure", lambda *_, **__: pytest.fail("the recorded engine is not compared again"))
    caplog.set_level(logging.INFO, "model.engines.choice")
    choice = choose_engine(with_gate(exported, PASSED), threads=1)
    assert (choice.engine.name, choice.engine.precision) == ("onnxruntime", "fp32")  # never int8
    assert [(tried.engine, tried.outcome) for tried in choice.tried] == [
        ("tensorrt:bf16", "passed over"),
        ("onnxruntime-cuda:bf16", "passed over"),
        ("torch:bf16", "passed over"),
        ("onnxruntime:fp32", "serves"),
    ]
    assert all("no NVIDIA driver" in tried.reason for tried in choice.tried[:3])
    order = [caplog.text.index(f"engine {tried.engine} {tried.outcome}: ") for tried in choice.tried]
    assert order == sorted(order)


def test_an_engine_that_strays_is_passed_over(exported: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice, "no_gpu", lambda: None)
    given = []
    monkeypatch.setattr(tensorrt_engine, "open", lambda request: given.append(request) or Wrong())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as a torch built for the CPU says on a GPU host
    choice = choose_engine(exported, threads=1)
    assert choice.engine.name == "onnxruntime"
    reasons = {tried.engine: tried.reason for tried in choice.tried}
    assert "wrong bf16 differs too much from the float32 reference on 5 images" in reasons["tensorrt:bf16"]
    assert "(at least 0.999)" in reasons["tensorrt:bf16"]
    assert "has no CUDAExecutionProvider" in reasons["onnxruntime-cuda:bf16"]
    assert "finds no CUDA device" in reasons["torch:bf16"]
    assert not exported.derived.exists()  # no graph is made for a runtime that is not there
    assert given == [OpenRequest(exported, "tensorrt", "bf16", threads=1)]
    with pytest.raises(
        parity.ParityError, match="wrong bf16 differs too much"
    ):  # asked for by name: nothing else serves
        load_engine(exported, "tensorrt", threads=1)


@pytest.mark.parametrize("wrong_at", [None, 1, 16, 64])
def test_a_gpu_engine_is_compared_at_every_batch_it_serves(
    exported: Artifact, monkeypatch: pytest.MonkeyPatch, wrong_at: int | None
) -> None:
    """Each batch size has its own kernels, and any of them may be wrong."""
    right, batches = load_engine(exported, "onnxruntime", threads=1), []

    class Gpu:
        name, precision, device = "gpu", "bf16", "cuda"

        def run(self, pixels: np.ndarray) -> Features:
            batches.append(len(pixels))
            return (Wrong() if len(pixels) == wrong_at else right).run(pixels)

        def close(self) -> None:
            pass

    monkeypatch.setattr(engine_choice, "no_gpu", lambda: None)
    monkeypatch.setattr(tensorrt_engine, "open", lambda request: Gpu())
    if wrong_at is None:
        assert load_engine(exported, "tensorrt", threads=1).name == "gpu"
        assert set(BUCKETS) <= set(batches)
        return
    with pytest.raises(parity.ParityError, match="gpu bf16 differs too much"):
        load_engine(exported, "tensorrt", threads=1)


def test_a_gpu_without_bf16_serves_in_fp16(exported: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 has fast fp16 and no bf16, so it must not leave the work to the CPU."""
    right, opened = load_engine(exported, "onnxruntime", threads=1), []

    class Gpu:
        name, precision, device = "onnxruntime-cuda", "fp16", "cuda"
        run, close = right.run, lambda self: None

    def open_gpu(request: OpenRequest) -> Gpu:
        opened.append((request.runtime, request.precision))
        if request.runtime == "tensorrt":
            raise ValueError("no plan was built")
        return Gpu()

    monkeypatch.setattr(engine_choice, "no_gpu", lambda: None)
    monkeypatch.setattr(engine_choice, "capability_without_bf16", lambda: (7, 5))
    monkeypatch.setattr(tensorrt_engine, "open", open_gpu)
    monkeypatch.setattr(onnxruntime_engine, "open", open_gpu)
    monkeypatch.setattr(engine_choice._Host, "_reference", parity.features(right, pixels_of(exported)))
    choice = choose_engine(exported, threads=1)
    assert (choice.engine.name, choice.engine.precision) == ("onnxruntime-cuda", "fp16")
    assert opened == [("tensorrt", "fp16"), ("onnxruntime-cuda", "fp16")]
    for name in ("tensorrt", "onnxruntime-cuda:bf16"):
        with pytest.raises(
            ValueError, match=r"cannot compute in bf16: its compute capability is 7\.5, and bf16 needs 8"
        ):
            load_engine(exported, name, threads=1)
    assert len(opened) == 2


def pixels_of(artifact: Artifact) -> np.ndarray:
    """Return the pixels on which engines are compared."""
    manifest = artifact.manifest
    return parity.pixels_at(
        parity.sample_photos(engine_choice.PHOTOS_AT_LOAD), manifest.preprocess, manifest.input_size
    )


def test_a_gpu_without_bf16_falls_back_to_the_cpu(exported: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice, "no_gpu", lambda: None)
    monkeypatch.setattr(engine_choice, "capability_without_bf16", lambda: (7, 5))
    monkeypatch.setattr(tensorrt_engine, "open", lambda request: Wrong())
    choice = choose_engine(exported, threads=1)
    assert [(tried.engine, tried.outcome) for tried in choice.tried] == [
        ("tensorrt:fp16", "passed over"),
        ("onnxruntime-cuda:fp16", "passed over"),
        ("onnxruntime:fp32", "serves"),
    ]


def test_tensorrt_that_is_not_installed(exported: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice, "no_gpu", lambda: None)
    for library in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match="TensorRT is not installed"):
        load_engine(exported, "tensorrt:fp16", threads=1)


@pytest.mark.parametrize(
    ("name", "engine", "precision"),
    [
        ("onnxruntime:fp16", "onnxruntime", "fp16"),
        ("torch", "torch", "fp32"),
        ("torch:bf16", "torch", "bf16"),
    ],
)
def test_engines_by_name_are_near_the_reference(exported: Artifact, name: str, engine: str, precision: str) -> None:
    choice = choose_engine(exported, name, threads=1, photos=parity.sample_photos(3, seed=5))
    assert (choice.engine.name, choice.engine.precision) == (engine, precision)
    assert choice.tried == ((name if ":" in name else f"{name}:fp32", "serves", "requested"),)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (GateRecord(status="failed", reason="k-NN fell"), r"gate of model-70-int8\.onnx failed: k-NN fell"),
        (NO_LABELS, r"gate of model-70-int8\.onnx was not measured: the export had no labelled images"),
        (None, r"model-70-int8\.onnx has no gate in the manifest"),
    ],
)
def test_int8_without_a_passed_gate_is_refused(exported: Artifact, gate: GateRecord | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_engine(with_gate(exported, gate), "onnxruntime:int8", threads=1)


def test_int8_that_is_not_in_the_artifact(exported: Artifact) -> None:
    with pytest.raises(ValueError, match=r"onnxruntime:int8: the artifact has no int8 graph .*: `dinov2 export .*`"):
        load_engine(without_graphs(exported), "onnxruntime:int8", threads=1)


def record(**figures: float) -> ParityRecord:
    zero = {"max_abs_error": 0.0, "min_cosine_cls": 1.0, "min_cosine_patches": 1.0, "neighbour_agreement": 1.0}
    return ParityRecord(engine="onnxruntime", precision="int8", images=5, **(zero | figures))


@pytest.mark.parametrize(("cosine", "serves"), [(0.9985, True), (0.9975, False)])
def test_int8_is_compared_again_on_this_host(
    exported: Artifact, monkeypatch: pytest.MonkeyPatch, cosine: float, serves: bool
) -> None:
    monkeypatch.setattr(parity, "measure", lambda *_, **__: record(min_cosine_cls=cosine))
    if serves:
        assert load_engine(with_gate(exported, PASSED), "onnxruntime:int8", threads=1).precision == "int8"
        return
    with pytest.raises(
        parity.ParityError, match=r"int8 differs too much .* class cosine 0\.997500 \(at least 0\.998\)"
    ):
        load_engine(with_gate(exported, PASSED), "onnxruntime:int8", threads=1)


def test_a_graph_that_the_artifact_lacks_is_made_and_kept(exported: Artifact, tmp_path: Path) -> None:
    bare = replace(exported, derived_dir=tmp_path)
    bare = replace(bare, manifest=bare.manifest.model_copy(update={"graphs": []}))
    assert load_engine(bare, "onnxruntime:fp16", threads=1).precision == "fp16"
    made = tmp_path / exported.path.name / "model-70-fp16.onnx"
    assert made.read_bytes() == exported.file("model-70-fp16.onnx").read_bytes()
    stamp = made.stat().st_mtime_ns
    load_engine(bare, "onnxruntime:fp16", threads=1)
    assert made.stat().st_mtime_ns == stamp


def test_a_dynamic_graph_serves_where_there_is_no_fixed_one(exported: Artifact) -> None:
    graph = GraphRecord(file="model-dynamic-fp16.onnx", size=None, precision="fp16", outputs=(), attention="standard")
    manifest = exported.manifest.model_copy(update={"graphs": [graph]})
    assert graph_of(replace(exported, manifest=manifest), "fp16") == graph
    both = manifest.model_copy(update={"graphs": [graph, *exported.manifest.graphs]})
    found = graph_of(replace(exported, manifest=both), "fp16")
    assert found is not None
    assert found.file == "model-70-fp16.onnx"


def test_weights_alone_are_served_by_torch(exported: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice, "no_gpu", lambda: "no NVIDIA driver")
    bare = without_graphs(exported)
    choice = choose_engine(bare, threads=1)
    assert (choice.engine.name, choice.engine.precision) == ("torch", "fp32")
    assert choice.tried[-2].reason == "the artifact has no model.onnx"
    assert load_engine(bare, "torch:bf16", threads=1).precision == "bf16"  # compared with torch fp32
    with pytest.raises(ValueError, match=r"the artifact has no model\.onnx"):
        load_engine(bare, "onnxruntime", threads=1)


@pytest.mark.parametrize(("int8", "expected"), [(50.0, "fp32"), (108.0, "fp32"), (112.0, "int8")])
def test_the_fastest_that_is_right(
    exported: Artifact, monkeypatch: pytest.MonkeyPatch, int8: float, expected: str
) -> None:
    monkeypatch.setattr(engine_choice, "images_per_s", lambda engines, pixels: [100.0, int8])
    monkeypatch.setattr(parity, "measure", lambda *_, **__: record())
    monkeypatch.setitem(sys.modules, "openvino", None)
    choice = choose_engine(with_gate(exported, PASSED), "fastest", threads=1)
    assert choice.engine.precision == expected
    assert {tried.engine: tried.reason for tried in choice.tried if tried.reason.endswith("images/s")} == {
        "onnxruntime:fp32": "100.0 images/s",
        "onnxruntime:int8": f"{int8:.1f} images/s",
    }
    assert [tried.engine for tried in choice.tried if tried.outcome == "serves"] == [f"onnxruntime:{expected}"]


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected"),
    [(99.0, 109.0, "onnxruntime:fp32"), (101.0, 111.0, "openvino:fp32"), (101.0, 112.0, "openvino:bf16")],
)
def test_the_fastest_of_two_runtimes(
    exported: Artifact, monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float, expected: str
) -> None:
    opened = []

    class Other(Wrong):
        def __init__(self, request: OpenRequest) -> None:
            self.name, self.precision = request.runtime, request.precision
            opened.append(self)

    monkeypatch.setattr(openvino_engine, "fault", lambda request: None)
    monkeypatch.setattr(openvino_engine, "open", Other)
    monkeypatch.setattr(engine_choice, "images_per_s", lambda engines, pixels: [100.0, fp32, bf16])
    monkeypatch.setattr(parity, "measure", lambda *_, **__: record())
    choice = choose_engine(exported, "fastest", threads=1)
    assert f"{choice.engine.name}:{choice.engine.precision}" == expected
    assert [(each.name, each.precision) for each in opened] == [("openvino", "fp32"), ("openvino", "bf16")]


def test_fastest_without_a_gate_measures_nothing(exported: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice, "images_per_s", lambda *_: pytest.fail("nothing to choose from"))
    monkeypatch.setattr(openvino_engine, "fault", lambda request: None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    choice = choose_engine(exported, "fastest", threads=1)
    assert choice.engine.precision == "fp32"
    assert [(tried.engine, tried.outcome) for tried in choice.tried] == [
        ("openvino:fp32", "passed over"),
        ("openvino:bf16", "passed over"),
        ("onnxruntime:int8", "passed over"),
        ("onnxruntime:fp32", "serves"),
    ]
    assert "OpenVINO is not installed" in choice.tried[0].reason


def test_the_benchmark_takes_turns_and_ends() -> None:
    now, order = [0.0], []

    class Timed:
        precision, device = "fp32", "cpu"

        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.seconds = name, seconds

        def run(self, pixels: np.ndarray) -> Features:
            order.append(self.name)
            now[0] += self.seconds
            return Features(*[np.zeros(0, np.float32)] * 3)

        def close(self) -> None:
            pass

    engines = [Timed("a", 0.1), Timed("b", 0.3)]
    speeds = images_per_s(engines, np.zeros((2, 3, 14, 14), np.float32), seconds=2.0, clock=lambda: now[0])
    assert speeds == pytest.approx([20, 2 / 0.3])
    assert "".join(order) == "ab" * 5  # a warm-up, and rounds until two seconds are over
    slow = Timed("c", 60.0)
    assert images_per_s([slow], np.zeros((1, 3, 14, 14), np.float32), clock=lambda: now[0]) == pytest.approx([1 / 60])
    assert order.count("c") == 2


def test_one_slow_pass_does_not_decide_the_benchmark() -> None:
    now, seconds = [0.0], iter([9.0, 0.1, 0.1, 5.0, 0.1, 0.1])  # the warm-up, and one pass, are slow

    class Timed:
        name, precision = "a", "fp32"

        def run(self, pixels: np.ndarray) -> Features:
            now[0] += next(seconds)
            return Features(*[np.zeros(0, np.float32)] * 3)

    (speed,) = images_per_s([Timed()], np.zeros((1, 3, 14, 14), np.float32), seconds=14.35, clock=lambda: now[0])
    assert speed == pytest.approx(10)
    assert next(seconds, None) is None


def test_each_gate_of_an_int8_graph_must_have_passed(exported: Artifact) -> None:
    """A graph for any size has one record for each size at which it was compared."""
    passed = with_gate(exported, PASSED).manifest
    failed = [r.model_copy(update={"gate": GateRecord(status="failed", reason="k-NN fell")}) for r in passed.parity]
    failed = [r for r in failed if r.precision == "int8"]
    for records in ([*passed.parity, *failed], [*failed, *passed.parity]):
        artifact = replace(exported, manifest=passed.model_copy(update={"parity": records}))
        with pytest.raises(ValueError, match=r"gate of model-70-int8\.onnx failed: k-NN fell"):
            load_engine(artifact, "onnxruntime:int8", threads=1)


class Failing:
    """A runtime that raises an unexpected error in its first pass."""

    name, precision, device = "failing", "bf16", "cpu"

    def __init__(self, error: Exception) -> None:
        self.error, self.closed = error, False

    def run(self, pixels: np.ndarray) -> Features:
        raise self.error

    def close(self) -> None:
        self.closed = True


def failing_tensorrt(monkeypatch: pytest.MonkeyPatch, error: Exception) -> Failing:
    engine = Failing(error)
    monkeypatch.setattr(tensorrt_engine, "open", lambda request: engine)
    monkeypatch.setattr(engine_choice, "no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return engine


def test_no_fault_of_a_gpu_keeps_auto_from_serving(exported: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = failing_tensorrt(monkeypatch, AttributeError("no set_device_memory"))
    choice = choose_engine(exported, threads=1)
    assert choice.engine.name == "onnxruntime"
    assert choice.tried[0] == ("tensorrt:bf16", "passed over", "no set_device_memory")
    assert engine.closed


def test_a_gpu_that_was_asked_for_and_fails_is_told_in_one_line(
    exported: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = failing_tensorrt(monkeypatch, RuntimeError("CUDA: out\nof memory"))
    with pytest.raises(ValueError, match=r"engine tensorrt:bf16: CUDA: out of memory$"):
        choose_engine(exported, "tensorrt", threads=1)
    assert engine.closed


def test_graphs_made_here_belong_to_the_weights_and_not_to_the_folder(exported: Artifact, tmp_path: Path) -> None:
    renamed = replace(exported, path=tmp_path / "mine", derived_dir=tmp_path / "derived")
    other = replace(renamed, manifest=renamed.manifest.model_copy(update={"fingerprint": "b" * 64}))
    assert renamed.derived != other.derived


def test_a_gpu_is_given_a_graph_of_one_size(exported: Artifact, tmp_path: Path) -> None:
    graph = GraphRecord(file="model-dynamic-fp16.onnx", size=None, precision="fp16", outputs=(), attention="standard")
    manifest = exported.manifest.model_copy(update={"graphs": [graph]})
    artifact = replace(exported, manifest=manifest, derived_dir=tmp_path)
    assert graph_file(artifact, "fp16", any_size=False) == tmp_path / exported.name / "model-70-fp16.onnx"
