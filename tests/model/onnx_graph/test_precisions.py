"""Tests of half precision, int8 and fp8: which parts stay float32, how accurate each precision is, and how runtimes run
it.
"""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.emulate import emulate_half
from model.engines.activations import measure_activations
from model.onnx_graph.build import build_onnx, write_onnx
from model.onnx_graph.linear import Linear
from model.onnx_graph.nodes import GraphBuilder
from model.onnx_graph.quantize import fp8_per_channel, int8_per_channel
from model.onnx_graph.spec import GraphSpec
from tests.model.random_models import (
    BASE,
    VARIANTS,
    arrays,
    built,
    min_cosine,
    random_model,
    random_pixels,
    run,
    session,
    torch_features,
)

torch = pytest.importorskip("torch", reason="torch is the reference: pip install '.[train]'")

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "fp8": TensorProto.BFLOAT16}
LINEAR = [f"blocks.{i}.{layer}" for i in range(3) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def types_of(graph: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every tensor of a graph, by name."""
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True).graph
    found = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    return found | {info.name: info.type.tensor_type.elem_type for info in [*inferred.value_info, *inferred.output]}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("baked", [True, False])
@pytest.mark.parametrize(
    ("precision", "cosine", "error"), [("fp16", 0.99999, 0.01), ("int8", 0.997, 0.4), ("bf16", 0.9998, 0.1)]
)
def test_close_to_torch(variant: str, baked: bool, precision: str, cosine: float, error: float) -> None:
    model = random_model(VARIANTS[variant])
    for size, batch in (((98, 98), 1), ((70, 126), 3)):
        graph = built(model, GraphSpec(size if baked else None, precision))
        onnx.checker.check_model(graph, full_check=True)
        pixels = random_pixels(batch, size)
        found = run(emulate_half(graph) if precision == "bf16" else graph, pixels)
        for ours, theirs in zip(found, torch_features(model, pixels), strict=True):
            assert ours.dtype == np.float32
            assert min_cosine(ours, theirs) > cosine
            np.testing.assert_allclose(ours, theirs, atol=error)


@pytest.mark.parametrize("attention", ["standard", "tiled", "upcast"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_every_form_runs(attention: str, precision: str) -> None:
    model, pixels = random_model(BASE), random_pixels(2, (98, 98))
    found = run(built(model, GraphSpec((98, 98), precision, attention=attention)), pixels)
    assert min_cosine(found.cls, torch_features(model, pixels).cls) > 0.998


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("attention", ["standard", "upcast"])
def test_what_is_half_and_what_stays_float32(precision: str, attention: str) -> None:
    activations = dict.fromkeys(LINEAR, 4.0)
    graph = built(random_model(BASE), GraphSpec((98, 98), precision, attention=attention), activations)
    types, half = types_of(graph), HALF[precision]
    for node in graph.graph.node:
        kinds = {types[name] for name in [*node.input, *node.output] if name in types}
        if node.op_type in ("LayerNormalization", "Conv") or node.name.endswith("residual") or ".ls" in node.name:
            assert kinds == {TensorProto.FLOAT}, node.name
        if node.op_type in ("MatMul", "Gelu"):
            assert kinds == {half}, node.name
        if node.op_type == "Attention":
            assert kinds == {TensorProto.FLOAT if attention == "upcast" else half}
    assert {types[output.name] for output in graph.graph.output} == {TensorProto.FLOAT}


def test_a_residual_stream_beyond_float16_survives() -> None:
    """One channel of the residual stream is 100,000, which float16 cannot represent. The norms scale it back into
    range.
    """
    model, pixels = random_model(BASE), random_pixels(1, (98, 98))
    with torch.no_grad():
        model.pos_embed[:, :, 5] = 1e5
    found, expected = run(built(model, GraphSpec((98, 98), "fp16")), pixels), torch_features(model, pixels)
    assert np.isfinite(found.patches).all()
    assert min_cosine(found.patches, expected.patches) > 0.9999


def test_gains_below_float16_survive() -> None:
    """LayerScale has its initial gain of 1e-5. If it were folded into float16 weights, most products would be subnormal
    or zero.
    """
    model, pixels = random_model(BASE), random_pixels(1, (98, 98))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.fill_(1e-7)
        model.pos_embed.mul_(1e-6)
        model.patch_embed.proj.weight.mul_(1e-6)
        model.patch_embed.proj.bias.mul_(1e-6)
    outputs = ("layer.2",)
    spec = GraphSpec((98, 98), "fp16", outputs)
    (found,) = session(built(model, spec)).run(None, {"pixels": pixels})
    (expected,) = session(built(model, dataclasses.replace(spec, precision="fp32"))).run(None, {"pixels": pixels})
    np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_emulation_rounds_like_the_reference_evaluator(precision: str) -> None:
    """onnx's own evaluator supports bfloat16. Both results differ from float32 by the same amount, and from each other
    by no more.
    """
    from onnx.reference import ReferenceEvaluator

    config = dataclasses.replace(BASE, depth=1)
    model, pixels = random_model(config), random_pixels(1, (28, 28))
    graph = built(model, GraphSpec((28, 28), precision, ("cls",)))
    exact = torch_features(model, pixels).cls
    reference = ReferenceEvaluator(graph).run(None, {"pixels": pixels})[0]
    (emulated,) = session(emulate_half(graph)).run(None, {"pixels": pixels})
    strays = np.abs(reference - exact).max()
    assert strays > 0
    assert 0.2 * strays < np.abs(emulated - exact).max() < 5 * strays
    assert np.abs(emulated - reference).max() < 3 * strays


def test_emulation_keeps_its_roundings_in_onnx_runtime(tmp_path: Path) -> None:
    graph = emulate_half(built(random_model(BASE), GraphSpec((98, 98), "bf16")))
    session(graph, tmp_path / "optimized.onnx")
    down = [
        sum(a.i == TensorProto.BFLOAT16 for node in g.graph.node if node.op_type == "Cast" for a in node.attribute)
        for g in (graph, onnx.load(tmp_path / "optimized.onnx"))
    ]
    assert down[0] == down[1] > 8 * BASE.depth


def test_int8_equals_onnx_runtimes_own_quantizer(tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model, pixels = random_model(VARIANTS["registers"]), random_pixels(2, (98, 98))
    weights, config = arrays(model), model.config
    write_onnx(weights, config, GraphSpec((98, 98)), tmp_path / "float.onnx")
    write_onnx(weights, config, GraphSpec((98, 98), "int8"), tmp_path / "ours.onnx")
    quantize_dynamic(
        tmp_path / "float.onnx",
        tmp_path / "theirs.onnx",
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
    )
    for name in ("ours", "theirs"):
        session(tmp_path / f"{name}.onnx", tmp_path / f"{name}.optimized.onnx")
    fused = [
        Counter(node.op_type for node in onnx.load(tmp_path / f"{name}.optimized.onnx").graph.node)
        for name in ("ours", "theirs")
    ]
    assert fused[0] == fused[1]
    assert fused[0]["DynamicQuantizeMatMul"] == 4 * config.depth
    for ours, theirs in zip(run(tmp_path / "ours.onnx", pixels), run(tmp_path / "theirs.onnx", pixels), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("form", "largest"), [("s7", 64), ("u8", 127)])
def test_int8_weights_keep_to_their_bits(form: str, largest: int) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    weight[2] = 0
    quantized, scale, zero = int8_per_channel(weight, form)
    steps = quantized.astype(int) - zero[:, None]
    assert np.abs(steps).max() == largest
    assert scale[2] == 1
    assert not steps[2].any()
    np.testing.assert_allclose(steps * scale[:, None], weight, atol=np.delete(scale, 2).max() / 2 * 1.001)


def test_full_int8_weights_are_fused_and_closer(tmp_path: Path) -> None:
    model, pixels = random_model(BASE), random_pixels(2, (98, 98))
    exact, strays = torch_features(model, pixels), {}
    for form in ("s7", "u8"):
        graph = built(model, GraphSpec((98, 98), "int8", int8_weights=form))
        session(graph, tmp_path / f"{form}.onnx")
        census = Counter(node.op_type for node in onnx.load(tmp_path / f"{form}.onnx").graph.node)
        assert census["DynamicQuantizeMatMul"] == 4 * BASE.depth
        strays[form] = np.square(run(graph, pixels).patches - exact.patches).mean()
    assert strays["u8"] < 0.8 * strays["s7"]


@pytest.mark.parametrize("form", ["s7", "u8"])
def test_int8_products_never_saturate(form: str) -> None:
    """All weights and inputs have their largest value. With eight-bit signed weights AVX2 would overflow 16 bits."""
    rng = np.random.default_rng(0)
    weight = np.where(rng.random((32, 64)) < 0.9, 1, -1).astype(np.float32)
    x = np.where(rng.random((1, 5, 64)) < 0.9, 2, 0).astype(np.float32)
    builder = GraphBuilder({"layer.weight": weight, "layer.bias": np.zeros(32, np.float32)})
    out = Linear(builder, "int8", {}, form, ())("x", "layer")
    shapes = [helper.make_tensor_value_info(*info) for info in (("x", 1, [1, 5, 64]), (out, 1, [1, 5, 32]))]
    graph = helper.make_graph(builder.nodes, "layer", shapes[:1], shapes[1:], builder.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    (found,) = session(model).run(None, {"x": x})
    np.testing.assert_allclose(found, x @ weight.T, atol=1e-3)


@pytest.mark.parametrize(
    ("float_layers", "kept"),
    [(("mlp.fc2",), 3), (("blocks.1",), 4), (("blocks.2.attn.qkv", "mlp.fc1"), 4), (("fc2", "blocks.0"), 6)],
)
def test_layers_are_left_in_float(float_layers: tuple[str, ...], kept: int) -> None:
    model = random_model(BASE)
    int8 = built(model, GraphSpec((98, 98), "int8", float_layers=float_layers)).graph
    fp8 = built(model, GraphSpec((98, 98), "fp8", float_layers=float_layers), dict.fromkeys(LINEAR, 4.0)).graph
    assert sum(node.op_type == "MatMulInteger" for node in int8.node) == len(LINEAR) - kept
    assert sum(tensor.data_type == TensorProto.FLOAT8E4M3FN for tensor in fp8.initializer) == len(LINEAR) - kept + 1


def test_float_layers_must_exist() -> None:
    with pytest.raises(
        ValueError, match=r"no layer is named 'blocks\.3'; a block's layers are attn\.qkv, attn\.proj, mlp\.fc1"
    ):
        build_onnx({}, BASE, GraphSpec(None, "int8", float_layers=("blocks.3",)))
    with pytest.raises(ValueError, match="float_layers apply to int8 and fp8, not to bf16"):
        GraphSpec(None, "bf16", float_layers=("mlp.fc2",))


def test_fp8_weights_use_the_whole_range() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    quantized, scale = fp8_per_channel(weight)
    assert (np.abs(quantized.astype(np.float32)).max(axis=1) == 448).all()
    np.testing.assert_allclose(quantized.astype(np.float32) * scale[:, None], weight, rtol=0.0625, atol=1e-4)


def test_fp8_against_torch_and_what_it_needs() -> None:
    model, pixels = random_model(VARIANTS["registers"]), random_pixels(2, (98, 98))
    weights, config, spec = arrays(model), model.config, GraphSpec((98, 98), "fp8")
    with pytest.raises(ValueError, match=r"activations has no 'blocks\.0\.attn\.qkv'"):
        build_onnx(weights, config, spec)
    graph = build_onnx(weights, config, spec, activations=measure_activations(weights, config, pixels))
    onnx.checker.check_model(graph, full_check=True)
    stored = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    assert all(stored[f"{layer}.weight"] == TensorProto.FLOAT8E4M3FN for layer in LINEAR)
    found, expected = run(emulate_half(graph), pixels), torch_features(model, pixels)
    assert min_cosine(found.cls, expected.cls) > 0.99
    assert min_cosine(found.patches, expected.patches) > 0.99


@pytest.mark.parametrize("variant", ["mlp", "swiglu"])
def test_activations_equal_torch_hooks(variant: str) -> None:
    model, pixels = random_model(VARIANTS[variant]), random_pixels(3, (70, 98))
    largest: dict[str, float] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(
                lambda _, inputs, __, name=name: largest.__setitem__(name, float(inputs[0].abs().max()))
            )
    torch_features(model, pixels)
    found = measure_activations(arrays(model), model.config, pixels, batch=2)
    assert found.keys() == largest.keys()
    for name, value in found.items():
        assert value == pytest.approx(largest[name], rel=1e-4)


def test_activations_refuse_what_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        measure_activations({}, BASE, np.zeros((0, 3, 98, 98), np.float32))
    weights = arrays(random_model(BASE))
    with pytest.raises(ValueError, match="not finite"):
        measure_activations(weights, BASE, np.full((1, 3, 98, 98), np.nan, np.float32))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_same_bytes_in_every_precision(precision: str) -> None:
    weights, activations = arrays(random_model(BASE)), dict.fromkeys(LINEAR, 4.0)
    spec = GraphSpec(None, precision)
    first, second = (
        build_onnx(given, BASE, spec, activations=activations).SerializeToString(deterministic=True)
        for given in (weights, dict(reversed(weights.items())))
    )
    assert first == second


def test_half_weights_are_rounded_to_nearest() -> None:
    weights = arrays(random_model(BASE))
    graph = build_onnx(weights, BASE, GraphSpec((98, 98), "bf16"))
    (stored,) = (t for t in graph.graph.initializer if t.name == "blocks.0.mlp.fc1.weight")
    expected = torch.from_numpy(weights["blocks.0.mlp.fc1.weight"].T.copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(numpy_helper.to_array(stored).astype(np.float32), expected)
