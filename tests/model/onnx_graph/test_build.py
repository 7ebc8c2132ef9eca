"""Compares the graph with torch for every kind of block. LayerScale's gains are far from one, so a lost gain is
detected.
"""

import tracemalloc
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from model.config import ViTConfig
from model.onnx_graph.build import build_onnx, write_onnx
from model.onnx_graph.spec import GraphSpec
from tests.model.random_models import (
    BASE,
    VARIANTS,
    arrays,
    built,
    random_model,
    random_pixels,
    run,
    session,
    torch_features,
)

torch = pytest.importorskip("torch", reason="torch is the reference: pip install '.[train]'")

ALL_OUTPUTS = ("cls", "patches", "registers", "attention", "layer.0", "layer.2")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("baked", [True, False])
@pytest.mark.parametrize("attention", ["standard", "tiled", "upcast"])
def test_equals_torch(variant: str, baked: bool, attention: str) -> None:
    model = random_model(VARIANTS[variant])
    for size in ((98, 98), (70, 126)):
        graph = built(model, GraphSpec(size if baked else None, attention=attention))
        onnx.checker.check_model(graph, full_check=True)
        for batch in (1, 3):
            pixels = random_pixels(batch, size)
            found, expected = run(graph, pixels), torch_features(model, pixels)
            assert np.abs(found.cls).max() > 0.1
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(70, 126), None])
def test_attention_and_layers_equal_torch(variant: str, size: tuple[int, int] | None) -> None:
    model, pixels = random_model(VARIANTS[variant]), random_pixels(2, (70, 126))
    graph = built(model, GraphSpec(size, outputs=("layer.2", "attention", "layer.0")))
    assert [output.name for output in graph.graph.output] == ["layer.2", "attention", "layer.0"]
    last, attention, first = session(graph).run(None, {"pixels": pixels})
    with torch.no_grad():
        expected = model.get_attention(torch.from_numpy(pixels))[:, :, 0].numpy()
        layers = model.get_intermediate_layers(torch.from_numpy(pixels), [0, 2], return_class_token=True)
    np.testing.assert_allclose(attention, expected, atol=1e-6)
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-5)
    prefix = 1 + model.num_register_tokens
    for ours, (patches, cls) in zip((first, last), layers, strict=True):
        np.testing.assert_allclose(ours[:, 0], cls, atol=2e-5)
        np.testing.assert_allclose(ours[:, prefix:], patches, atol=2e-5)


@pytest.mark.parametrize("attention", ["standard", "tiled", "upcast"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("size", [(98, 98), None])
def test_one_fused_attention_a_block_and_nothing_that_breaks_fusion(attention, precision, size) -> None:
    model = random_model(BASE)
    for outputs in (("cls", "patches", "registers"), ALL_OUTPUTS):
        graph = built(model, GraphSpec(size, precision, outputs, attention)).graph
        census = Counter(node.op_type for node in graph.node)
        operator = "MultiHeadAttention" if attention == "tiled" else "Attention"
        assert census[operator] == BASE.depth
        assert census["Attention"] + census["MultiHeadAttention"] == BASE.depth
        assert census["Softmax"] == ("attention" in outputs)
        asked_layers = sum(output.startswith("layer.") for output in outputs)
        assert census["LayerNormalization"] == 2 * BASE.depth + 1 + asked_layers
        assert not census.keys() & {"IsNaN", "Resize", "Erf", "Einsum"}
        if precision != "bf16":
            assert not any("gamma" in initializer.name for initializer in graph.initializer)
        names = [node.name for node in graph.node]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("spec", [GraphSpec((98, 98)), GraphSpec(None, "int8", ALL_OUTPUTS, "tiled")])
def test_same_weights_same_bytes(tmp_path: Path, spec: GraphSpec) -> None:
    weights = arrays(random_model(BASE))
    write_onnx(weights, BASE, spec, tmp_path / "a.onnx")
    write_onnx(dict(reversed(weights.items())), BASE, spec, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert build_onnx(weights, BASE, spec) == onnx.load(tmp_path / "a.onnx")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_large_weights_go_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr("model.onnx_graph.build.EXTERNAL_ABOVE_BYTES", 1000)
    model, spec, pixels = random_model(BASE), GraphSpec((98, 98), precision), random_pixels(1, (98, 98))
    names = write_onnx(arrays(model), BASE, spec, tmp_path / "model.onnx")
    assert names == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / names[0]).stat().st_size < 60_000
    for ours, theirs in zip(run(tmp_path / names[0], pixels), run(built(model, spec), pixels), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    (tmp_path / "again").mkdir()
    write_onnx(dict(reversed(arrays(model).items())), BASE, spec, tmp_path / "again" / "model.onnx")
    for name in names:
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


class MadeWhenRead(Mapping[str, np.ndarray]):
    """Weights that are created on access and exist only while they are referenced, like those of a safetensors file."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def __getitem__(self, key: str) -> np.ndarray:
        return np.full(self.shapes[key], 0.01, np.float16)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def test_a_large_graph_is_written_with_few_weights_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from model.vit import DinoVisionTransformer

    monkeypatch.setattr("model.onnx_graph.build.EXTERNAL_ABOVE_BYTES", 1000)
    config = ViTConfig(embed_dim=192, depth=12, num_heads=3, img_size=98)
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in DinoVisionTransformer(config).state_dict().items()}
    largest = 4 * max(int(np.prod(shape)) for shape in shapes.values())
    tracemalloc.start()
    try:
        write_onnx(MadeWhenRead(shapes), config, GraphSpec((98, 98)), tmp_path / "model.onnx")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    written = (tmp_path / "model.onnx.data").stat().st_size
    assert written > 35 * largest
    assert peak < 8 * largest


@pytest.mark.parametrize("size", [(98, 97), (0, 98)])
def test_size_off_the_patch_grid_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of the patch size 14"):
        build_onnx({}, BASE, GraphSpec(size))


def test_a_graph_for_any_size_looks_at_whole_patches_only() -> None:
    """The graph ignores pixels beyond the last whole patch. Engines refuse inputs of such sizes."""
    graph, pixels = built(random_model(BASE), GraphSpec(None)), random_pixels(1, (97, 71))
    whole = np.ascontiguousarray(pixels[:, :, :84, :70])
    for ours, cut in zip(run(graph, pixels), run(graph, whole), strict=True):
        np.testing.assert_allclose(ours, cut, atol=1e-6)


@pytest.mark.parametrize("output", ["layer.3", "layer.-1", "layer.x", "x_norm", "Attention"])
def test_an_unknown_output_is_refused(output: str) -> None:
    allowed = r"cls, patches, registers, attention, layer\.0 to layer\.2"
    with pytest.raises(ValueError, match=rf"unknown output '{output}': one of {allowed}"):
        build_onnx({}, BASE, GraphSpec((98, 98), outputs=("cls", output)))


@pytest.mark.parametrize("outputs", [(), ("cls", "cls")])
def test_outputs_are_named_once(outputs: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="each once"):
        build_onnx({}, BASE, GraphSpec((98, 98), outputs=outputs))


def test_a_spec_names_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="precision must be one of fp32, fp16, bf16, int8, fp8, not 'int4'"):
        GraphSpec(None, "int4")
    with pytest.raises(ValueError, match="attention must be one of standard, tiled, upcast, not 'flash'"):
        GraphSpec(None, attention="flash")
