"""Tests of the ONNX Runtime engine: shapes, both forms of attention, providers without fallback, and disabled
telemetry.
"""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest

import model.engines.onnxruntime_engine as module
from model.engines.onnxruntime_engine import OnnxEngine
from model.onnx_graph.build import write_onnx
from model.onnx_graph.spec import GraphSpec
from tests.model.tiny import CONFIG, random_weights

ROOT = Path(__file__).parents[3]
ort = module.load_runtime()


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="the tiny weights are torch's")
    folder = tmp_path_factory.mktemp("graphs")
    weights = random_weights()
    write_onnx(weights, CONFIG, GraphSpec(size=(70, 98)), folder / "fixed.onnx")
    write_onnx(weights, CONFIG, GraphSpec(size=None), folder / "dynamic.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.onnx_graph.build.EXTERNAL_ABOVE_BYTES", 1000)
        write_onnx(weights, CONFIG, GraphSpec(size=(70, 98)), folder / "large.onnx")
    return folder


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_onnx_runtime_reports_to_nobody(tmp_path: Path) -> None:
    """ONNX Runtime's telemetry writes a device id to the home folder as soon as the module loads. The folder must stay
    empty.
    """
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}  # not CI: there it is silent by itself
    subprocess.run(
        [sys.executable, "-c", "from model.engines.onnxruntime_engine import load_runtime; load_runtime()"],
        cwd=ROOT,
        env=environment,
        check=True,
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("spinning", "prepack", "entries"), [(False, True, ("0", "0")), (True, False, ("1", "1"))])
def test_threads_do_not_spin_unless_told_to(spinning: bool, prepack: bool, entries: tuple[str, str]) -> None:
    options = module._options(ort.SessionOptions(), 3, spinning, prepack, Path("folder/model.onnx"))
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == entries[0]
    assert options.get_session_config_entry("session.disable_prepacking") == entries[1]


def test_an_engine_does_not_spin_by_default(graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, make = [], module._options

    def noted(*arguments: object) -> object:
        asked.append(arguments[1:4])
        return make(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_options", noted)
    OnnxEngine(graphs / "fixed.onnx", threads=1)
    assert asked == [(1, False, True)]


def test_a_fixed_graph_and_a_dynamic_one_agree(graphs: Path) -> None:
    fixed, dynamic = (OnnxEngine(graphs / f"{name}.onnx", threads=1) for name in ("fixed", "dynamic"))
    assert (fixed.name, fixed.precision, fixed.device) == ("onnxruntime", "fp32", "cpu")
    assert (fixed.tiled, dynamic.tiled) == (False, True)
    batch = pixels(3, 3, 70, 98)
    for ours, theirs in zip(dynamic.run(batch), fixed.run(batch), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert dynamic.run(pixels(1, 3, 14, 42)).patches.shape == (1, 3, 48)


@pytest.mark.parametrize(
    ("graph", "shape", "allowed"),
    [
        ("fixed", (1, 3, 98, 70), r"\(1, 3, 98, 70\): this model takes \[B, 3, 70, 98\]"),
        ("fixed", (0, 3, 70, 98), r"takes \[B, 3, 70, 98\]"),
        ("fixed", (3, 70, 98), r"takes \[B, 3, 70, 98\]"),
        ("dynamic", (1, 3, 70, 99), r"\(1, 3, 70, 99\): this model takes \[B, 3, H, W\], H and W multiples of 14"),
        ("dynamic", (1, 3, 0, 14), "multiples of 14"),
        ("dynamic", (1, 1, 14, 14), r"takes \[B, 3, H, W\]"),
    ],
)
def test_other_shapes_are_refused(graphs: Path, graph: str, shape: tuple[int, ...], allowed: str) -> None:
    with pytest.raises(ValueError, match=allowed):
        OnnxEngine(graphs / f"{graph}.onnx", threads=1).run(pixels(*shape))


@pytest.mark.parametrize("graph", ["fixed", "large"])
def test_many_tokens_are_tiled_and_the_numbers_stay(graphs: Path, graph: str, monkeypatch: pytest.MonkeyPatch) -> None:
    standard = OnnxEngine(graphs / f"{graph}.onnx", threads=1)
    monkeypatch.setattr(module, "TILED_ABOVE_TOKENS", 34)  # the graph has 35 patches
    tiled = OnnxEngine(graphs / f"{graph}.onnx", threads=1, prepack=False)
    assert (standard.tiled, tiled.tiled) == (False, True)
    batch = pixels(2, 3, 70, 98)
    for ours, theirs in zip(tiled.run(batch), standard.run(batch), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_tiled_form_has_one_operator_a_block(graphs: Path) -> None:
    rewritten = onnx.load(graphs / "large.onnx", load_external_data=False)
    module._use_tiled_attention(rewritten)
    kinds = [(node.domain, node.op_type) for node in rewritten.graph.node]
    assert kinds.count(("com.microsoft", "MultiHeadAttention")) == CONFIG.depth
    assert ("", "Attention") not in kinds


def test_files_that_are_no_graph_are_named(tmp_path: Path) -> None:
    (tmp_path / "noise.onnx").write_bytes(b"\x00\xffno graph")
    for name in ("noise.onnx", "absent.onnx"):
        with pytest.raises(ValueError, match=rf"{name}: not an ONNX graph"):
            OnnxEngine(tmp_path / name, threads=1)


def test_a_provider_that_is_not_there_is_no_cpu(graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match="no CUDAExecutionProvider: pip install onnxruntime-gpu"):
        OnnxEngine(graphs / "fixed.onnx", threads=1, provider="cuda")
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: both)  # there, and it does not start
    with (
        pytest.warns(UserWarning, match="is not in available provider names"),
        pytest.raises(ValueError, match="could not start CUDAExecutionProvider; it would use CPU"),
    ):
        OnnxEngine(graphs / "fixed.onnx", threads=1, provider="cuda")


def test_operators_that_a_gpu_leaves_to_the_cpu_are_named(graphs: Path) -> None:
    session = OnnxEngine(graphs / "fixed.onnx", threads=1)._session
    with pytest.raises(ValueError, match=r"cannot run .*Attention.*MatMul.* of this graph"):
        module._check_assignment(session, "cuda")


def test_a_session_never_goes_on_with_another_provider(graphs: Path) -> None:
    assert not OnnxEngine(graphs / "fixed.onnx", threads=1)._session._enable_fallback


def test_libraries_of_a_gpu_are_loaded_for_a_gpu_before_its_provider_is_looked_for(
    graphs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(ort, "preload_dlls", lambda: (asked.append("load"), print("Failed to load libcudart")))
    monkeypatch.setattr(ort, "get_available_providers", lambda: asked.append("look") or ["CPUExecutionProvider"])
    with pytest.raises(ModuleNotFoundError):
        module.need_provider("cuda")
    assert asked == ["load", "look"]
    assert capfd.readouterr().out == ""  # an output that a program reads
    asked.clear()
    OnnxEngine(graphs / "fixed.onnx", threads=1)
    assert "load" not in asked


def test_a_closed_engine_holds_nothing(graphs: Path) -> None:
    engine = OnnxEngine(graphs / "fixed.onnx", threads=1)
    session = weakref.ref(engine._session)
    for _ in range(2):
        engine.close()
    assert session() is None
