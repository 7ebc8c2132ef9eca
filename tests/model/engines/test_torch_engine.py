"""Tests of the torch engine: bf16, torch.compile, and the padding of batches on a GPU, with fake CUDA graphs."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from model.engines import parity
from model.engines import torch_engine as module
from model.engines.protocol import BUCKETS
from tests.model.tiny import CONFIG, random_weights

torch = pytest.importorskip("torch", reason="the torch engine needs torch: pip install '.[train]'")
TorchEngine = module.TorchEngine


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.numpy import save_file

    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file({key: array.astype(np.float16) for key, array in random_weights().items()}, path)
    return path


def open_engine(weights: Path, **changes) -> TorchEngine:
    return TorchEngine(weights, CONFIG, **({"threads": 1, "device": "cpu"} | changes))


def pixels(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, 3, 70, 70)).astype(np.float32)


def test_bf16_is_near_fp32_and_not_the_same(weights: Path) -> None:
    half, full = open_engine(weights, precision="bf16"), open_engine(weights)
    assert (half.precision, full.precision) == ("bf16", "fp32")
    ours, theirs = half.run(pixels(3)), full.run(pixels(3))
    error, cls, patches, _ = parity.compare(theirs, ours)
    assert error > 1e-4
    assert cls > 0.999
    assert patches > 0.998
    assert all(array.dtype == np.float32 for array in ours)


def test_bf16_keeps_residual_stream_and_norms_in_fp32(weights: Path) -> None:
    engine = open_engine(weights, precision="bf16")
    kinds = {name: parameter.dtype for name, parameter in engine._model.named_parameters()}
    assert kinds["blocks.0.attn.qkv.weight"] == kinds["patch_embed.proj.bias"] == torch.bfloat16
    assert {kinds[name] for name in ("pos_embed", "norm.weight", "blocks.1.norm2.bias", "blocks.0.ls1.gamma")} == {
        torch.float32
    }
    seen = []
    engine._model.blocks[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    engine.run(pixels(1))
    assert seen == [torch.float32]


def test_an_engine_that_is_let_go_is_gone(weights: Path) -> None:
    """Memory must be released without the garbage collector, because the export of a large model depends on it."""
    engine = open_engine(weights)
    engine.run(pixels(1))
    gone = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert gone() is None
    finally:
        gc.enable()


def test_a_closed_engine_holds_nothing(weights: Path) -> None:
    engine = open_engine(weights)
    engine._graphs = {1: object()}
    model = weakref.ref(engine._model)
    for _ in range(2):
        engine.close()
    assert model() is None
    assert not engine._graphs


def test_other_precisions_are_refused(weights: Path) -> None:
    with pytest.raises(ValueError, match="supports fp32 and bf16, not 'fp16'"):
        open_engine(weights, precision="fp16")


@pytest.mark.parametrize("side", [70, 42])  # at 42 the positions are resized
def test_compiled_gives_the_same(weights: Path, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces the pass as one graph. Its code generator is not used, because it would take most of a
    minute.
    """
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: compile_(forward, backend="eager", fullgraph=True))
    torch._dynamo.reset()  # it remembers sizes across engines
    compiled, eager = open_engine(weights, compiled=True), open_engine(weights)
    for batch in (2, 5):
        images = np.ascontiguousarray(pixels(batch)[:, :, :side, :side])
        for ours, theirs in zip(compiled.run(images), eager.run(images), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_no_image_is_an_error(weights: Path) -> None:
    with pytest.raises(ValueError, match="at least one image"):
        open_engine(weights).run(pixels(0))


class StandIn:
    """A fake captured graph: fixed buffers of one batch size, in which rows remain until they are overwritten."""

    def __init__(self, forward, batch: int, shape: tuple[int, ...], device: str, pool: object) -> None:
        self.pixels, self.forward, self.calls, self.pool = torch.full((batch, *shape), torch.nan), forward, 0, pool

    def __call__(self, x):
        self.calls += 1
        self.pixels[: len(x)].copy_(x)
        return self.forward(self.pixels)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an engine on the CPU capture fake graphs."""
    monkeypatch.setattr(module, "_Replayed", StandIn)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)


@pytest.mark.usefixtures("captured")
def test_all_graphs_share_one_pool_of_memory(weights: Path) -> None:
    engine = open_engine(weights)
    engine._capture((3, 70, 70))
    assert list(engine._graphs) == list(reversed(BUCKETS))  # the largest first, so that the others need nothing more
    assert len({id(graph.pool) for graph in engine._graphs.values()}) == 1


@pytest.mark.usefixtures("captured")
def test_batches_are_padded_to_buckets_and_cut(weights: Path) -> None:
    engine, eager = open_engine(weights, input_size=(70, 70)), open_engine(weights)
    engine._capture((3, 70, 70))
    assert sorted(engine._graphs) == list(BUCKETS)
    for batch in (1, 3, 70):
        ours, theirs = engine.run(pixels(batch)), eager.run(pixels(batch))
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    assert {size: graph.calls for size, graph in engine._graphs.items() if graph.calls} == {1: 1, 4: 1, 64: 1, 8: 1}
    other_size = np.zeros((1, 3, 84, 84), np.float32)  # not captured: runs as it is
    np.testing.assert_allclose(engine.run(other_size).cls, eager.run(other_size).cls, atol=1e-5)


@pytest.mark.usefixtures("captured")
def test_what_cannot_be_compiled_is_captured_eagerly(
    weights: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_arguments):
        raise RuntimeError("Failed to find C compiler\nand a page of advice")

    engine = open_engine(weights)
    engine._compiled = no_compiler
    monkeypatch.setattr(StandIn, "__init__", _calls_forward(StandIn.__init__))
    engine._capture((3, 70, 70))
    assert "torch.compile failed, so the engine runs without it: Failed to find C compiler" in caplog.text
    assert "advice" not in caplog.text
    assert engine._compiled is None


def _calls_forward(plain):
    def init(self, forward, batch, shape, device, pool):
        plain(self, forward, batch, shape, device, pool)
        forward(torch.zeros(1, *shape))

    return init


def test_outputs_that_there_are_not(weights: Path) -> None:
    engine = open_engine(weights)
    with pytest.raises(ValueError, match=r"layer\.2: the model has 2 blocks, 0 to 1"):
        engine.run_outputs(pixels(1), ["layer.2"])
    with pytest.raises(ValueError, match="no output 'tokens'"):
        engine.run_outputs(pixels(1), ["tokens"])
