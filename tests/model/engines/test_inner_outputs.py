"""Tests of the engines' inner outputs (queries, keys and tokens of each block) and of the engine for other sizes."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from model.engines import general
from model.engines import onnxruntime_engine as module
from model.engines.onnxruntime_engine import OnnxEngine
from model.engines.parity import ParityError
from model.engines.protocol import Features, FloatArray
from model.export.artifact import export_artifact
from model.export.options import ExportOptions
from model.onnx_graph.build import write_onnx
from model.onnx_graph.spec import GraphSpec
from tests.model.tiny import CONFIG, backbone, random_weights

torch = pytest.importorskip("torch", reason="the tiny weights are torch's: pip install '.[train]'")

NAMES = tuple(f"{kind}.{block}" for block in range(CONFIG.depth) for kind in ("queries", "keys", "tokens"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("inner")
    weights = random_weights()
    save_file(weights, folder / "weights.safetensors")
    write_onnx(weights, CONFIG, GraphSpec(size=(70, 98)), folder / "fixed.onnx")
    write_onnx(weights, CONFIG, GraphSpec(size=None), folder / "dynamic.onnx")
    write_onnx(weights, CONFIG, GraphSpec(size=(70, 98), precision="fp16"), folder / "half.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.onnx_graph.build.EXTERNAL_ABOVE_BYTES", 1000)
        write_onnx(weights, CONFIG, GraphSpec(size=(70, 98)), folder / "large.onnx")
    return folder


def pixels(batch: int = 2) -> FloatArray:
    return np.random.default_rng(0).normal(size=(batch, 3, 70, 98)).astype(np.float32)


def expected(batch: FloatArray) -> dict[str, FloatArray]:
    """Return the inner outputs, computed with the parts of the network in torch."""
    from model.vit import DinoVisionTransformer

    network = DinoVisionTransformer(CONFIG).eval()
    network.load_state_dict({key: torch.from_numpy(array) for key, array in random_weights().items()})
    outputs = {}
    with torch.inference_mode():
        x = network.prepare_tokens_with_masks(torch.from_numpy(batch))
        for index, block in enumerate(network.blocks):
            queries, keys, _ = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
            x = block(x)
            outputs |= {f"queries.{index}": queries, f"keys.{index}": keys, f"tokens.{index}": x}
    return {name: tensor.numpy() for name, tensor in outputs.items()}


@pytest.mark.parametrize("graph", ["fixed", "dynamic", "large"])
def test_inner_outputs_of_a_graph_equal_torch(folder: Path, graph: str) -> None:
    engine = OnnxEngine(folder / f"{graph}.onnx", threads=1, inner="always")
    assert engine.can_run((70, 98), (*Features._fields, *NAMES))
    batch = pixels()
    ours, theirs = engine.run_outputs(batch, (*NAMES, "cls")), expected(batch)
    assert list(ours) == [*NAMES, "cls"]
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-4, err_msg=name)


def test_inner_outputs_of_the_torch_engine(folder: Path) -> None:
    from model.engines.torch_engine import TorchEngine

    engine = TorchEngine(folder / "weights.safetensors", CONFIG, threads=1, device="cpu")
    batch = pixels()
    ours, theirs = engine.run_outputs(batch, (*NAMES, *Features._fields)), expected(batch)
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-5, err_msg=name)
    for name, array in engine.run(batch)._asdict().items():
        np.testing.assert_array_equal(ours[name], array)
    assert engine.can_run((28, 42), NAMES)
    assert not engine.can_run((28, 41), NAMES)
    assert not engine.can_run((28, 42), ["queries.2"])
    assert not any(module._forward_hooks for module in engine._model.modules()), "hooks are left"


def test_half_precision_graphs_return_float32(folder: Path) -> None:
    engine = OnnxEngine(folder / "half.onnx", threads=1, precision="fp16", inner="always")
    batch = pixels()
    ours, theirs = engine.run_outputs(batch, NAMES), expected(batch)
    for name, array in theirs.items():
        assert ours[name].dtype == np.float32
        np.testing.assert_allclose(ours[name], array, atol=0.05, err_msg=name)


@pytest.mark.parametrize("graph", ["fixed", "dynamic"])
def test_inner_outputs_do_not_change_the_features(folder: Path, graph: str) -> None:
    plain, inner = (OnnxEngine(folder / f"{graph}.onnx", threads=1, inner=inner) for inner in ("no", "always"))
    batch = pixels()
    together = inner.run_outputs(batch, (*Features._fields, *NAMES))
    for name, array in inner.run(batch)._asdict().items():
        np.testing.assert_array_equal(
            together[name], array
        )  # to the last bit, so cached vectors do not depend on tasks
    for ours, theirs in zip(inner.run(batch), plain.run(batch), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_second_session_opens_on_demand_and_agrees_with_the_first(folder: Path) -> None:
    engine = OnnxEngine(folder / "fixed.onnx", threads=1, inner="on demand")
    plain = OnnxEngine(folder / "fixed.onnx", threads=1)
    batch = pixels()
    assert engine.can_run((70, 98), NAMES)
    before = engine.run(batch)
    assert engine._inner_session is None
    together = engine.run_outputs(batch, (*Features._fields, *NAMES))
    opened = engine._inner_session
    engine.run_outputs(batch, ["keys.0"])
    assert opened is engine._inner_session is not None
    for name, array in expected(batch).items():
        np.testing.assert_allclose(together[name], array, atol=1e-4, err_msg=name)
    for name, array in before._asdict().items():
        np.testing.assert_allclose(together[name], array, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(array, plain.run(batch)._asdict()[name])  # the first session has no marks
        np.testing.assert_array_equal(array, engine.run(batch)._asdict()[name])
    engine.close()
    assert engine._session is engine._inner_session is None


def test_an_engine_says_what_it_can_run(folder: Path) -> None:
    fixed, dynamic = (OnnxEngine(folder / f"{name}.onnx", threads=1, inner="always") for name in ("fixed", "dynamic"))
    without = OnnxEngine(folder / "fixed.onnx", threads=1)
    assert fixed.can_run((70, 98), NAMES)
    assert not fixed.can_run((98, 70), ())
    assert not fixed.can_run((70, 98), ["keys.2"])
    assert dynamic.can_run((98, 14), NAMES)
    assert not dynamic.can_run((98, 15), NAMES)
    assert without.can_run((70, 98), Features._fields)
    assert not without.can_run((70, 98), ["keys.1"])
    with pytest.raises(ValueError, match=r"no output 'keys.2'"):
        fixed.run_outputs(pixels(), ["keys.2"])


def test_the_general_engine_accepts_any_size_and_is_built_once(tmp_path: Path) -> None:
    artifact = export_artifact(backbone(), tmp_path, ExportOptions())
    serving = OnnxEngine(artifact.file("model.onnx"), threads=1)
    engine = general.open_general(artifact, serving, threads=1)
    assert engine.can_run((28, 140), NAMES)
    assert engine.name == "onnxruntime"
    graph = artifact.derived / "model-dynamic-fp32.onnx"
    written = graph.stat().st_mtime_ns
    general.open_general(artifact, serving, threads=1)
    assert graph.stat().st_mtime_ns == written


def test_a_general_engine_that_differs_is_refused(tmp_path: Path) -> None:
    artifact = export_artifact(backbone(), tmp_path, ExportOptions())
    wrong = SimpleNamespace(
        name="onnxruntime",
        precision="fp32",
        run=lambda batch: Features(
            *(np.ones((len(batch), *shape), np.float32) for shape in ((48,), (25, 48), (2, 48)))
        ),
    )
    with pytest.raises(ParityError, match="the general engine"):
        general.open_general(artifact, wrong, threads=1)


def test_an_engine_for_a_few_passes_has_no_inner_outputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[object] = []
    monkeypatch.setattr(module, "OnnxEngine", lambda path, **options: asked.append(options["inner"]))
    monkeypatch.setattr(module, "need_provider", lambda provider: None)
    monkeypatch.setattr(module, "graph_file", lambda artifact, precision, **_: tmp_path)
    for runtime, few in (("onnxruntime", False), ("onnxruntime", True), ("onnxruntime-cuda", False)):
        module.open(SimpleNamespace(artifact=None, runtime=runtime, precision="fp32", threads=1, few_passes=few))
    assert asked == ["on demand", "no", "on demand"]
