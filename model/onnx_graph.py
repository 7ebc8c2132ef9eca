"""The ONNX graph of a backbone, written from its weights with numpy alone.

Why not `torch.onnx.export`: this graph has one attention operator a block (fused by ONNX Runtime and TensorRT), the
position embedding baked for the input size, LayerScale folded into the layer before it, and initializers that keep
Meta's parameter names. It needs no torch, so a server can derive `model.onnx` from `weights.safetensors` by itself;
the same weights and `GraphSpec` always give the same bytes.

Input `pixels` [B, 3, H, W] float32; outputs, all float32: `cls` [B, D], `patches` [B, N, D], `registers` [B, R, D]
(R may be 0).

Legend: B batch, H x W pixels, p patch size, h x w = H/p x W/p patches, N = h*w, R registers, T = 1 + R + N tokens,
D width, A attention heads.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np
import onnx
from onnx import TensorProto, helper

from model.config import ViTConfig
from model.onnx_nodes import FloatArray, GraphBuilder, Weights
from model.pos_embed import resize_pos_embed

OPSET = 23
IR_VERSION = 11
NORM_EPS = 1e-6
EXTERNAL_ABOVE_BYTES = 1 << 30  # a protobuf message ends at 2 GiB

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
AttentionForm = Literal["standard", "tiled", "upcast"]


@dataclass(frozen=True)
class GraphSpec:
    """What is to be written of a backbone.

    `size` is (H, W) in pixels, baked in; None takes any multiple of the patch size. `attention`: "standard" is ONNX's
    `Attention` (opset 23), "tiled" ONNX Runtime's `MultiHeadAttention`, which needs memory linear in the tokens on a
    CPU, "upcast" the standard one between casts to float32 (the same as "standard" where q, k, v are float32 anyway).

    Raises:
        ValueError: a field holds something else than what is allowed.
    """

    size: tuple[int, int] | None
    precision: Precision = "fp32"
    outputs: tuple[str, ...] = ("cls", "patches", "registers")
    attention: AttentionForm = "standard"

    def __post_init__(self) -> None:
        for name, allowed in (("precision", get_args(Precision)), ("attention", get_args(AttentionForm))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")


def build_onnx(
    weights: Weights, config: ViTConfig, spec: GraphSpec, *, activations: Mapping[str, float] | None = None
) -> onnx.ModelProto:
    """The graph for any batch.

    Args:
        weights: Meta's parameter names to arrays, of any float type.
        activations: the largest absolute input of each linear layer, for fp8.

    Raises:
        ValueError: a side of the size is not a multiple of the patch size; an unknown output.
    """
    check_spec(config, spec)
    return _build(GraphBuilder(weights), config, spec)


def write_onnx(
    weights: Weights,
    config: ViTConfig,
    spec: GraphSpec,
    path: Path,
    *,
    activations: Mapping[str, float] | None = None,
) -> list[str]:
    """Write the graph, large weights beside it in `<path>.data`; returns the names written. See `build_onnx`.

    Large weights are read, converted and written one at a time. All is flushed to the disk, but not renamed: a killed
    call can leave half a file, so callers write into a temporary folder.

    Raises:
        ValueError: see `build_onnx`.
        OSError: it cannot be written.
    """
    check_spec(config, spec)
    names = [path.name]
    if _weight_bytes(config) > EXTERNAL_ABOVE_BYTES:
        names.append(f"{path.name}.data")
        with path.with_name(names[1]).open("wb") as data:
            model = _build(GraphBuilder(weights, data, names[1]), config, spec)
            _to_disk(data)
    else:
        model = _build(GraphBuilder(weights), config, spec)
    with path.open("wb") as file:
        file.write(model.SerializeToString(deterministic=True))
        _to_disk(file)
    return names


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def check_spec(config: ViTConfig, spec: GraphSpec) -> None:
    if spec.precision != "fp32" or spec.size is None:
        raise NotImplementedError
    height, width = spec.size
    p = config.patch_size
    if height % p or width % p or min(height, width) < p:
        raise ValueError(f"image size {height}x{width}: both sides must be multiples of the patch size {p}")


def _weight_bytes(config: ViTConfig) -> int:
    """Roughly the float32 size: the matrices of all blocks and the positions."""
    d = config.embed_dim
    feed_forward = (2 if config.ffn == "mlp" else 3) * d * config.hidden_dim
    return 4 * (config.depth * (4 * d * d + feed_forward) + config.grid**2 * d)


def _layer_norm(graph: GraphBuilder, x: str, key: str) -> str:
    scale = graph.constant(f"{key}.weight", graph.weight(f"{key}.weight"))
    bias = graph.constant(f"{key}.bias", graph.weight(f"{key}.bias"))
    return graph.node("LayerNormalization", [x, scale, bias], f"{key}.out", axis=-1, epsilon=NORM_EPS)


def _linear(graph: GraphBuilder, x: str, key: str, gain: FloatArray | None = None) -> str:
    """x @ W^T + b, with LayerScale's `gain` per output channel folded into both."""
    weight, bias = graph.weight(f"{key}.weight"), graph.weight(f"{key}.bias")
    if gain is not None:
        weight, bias = weight * gain[:, None], bias * gain
    product = graph.node("MatMul", [x, graph.constant(f"{key}.weight", weight.T)], f"{key}.matmul")
    return graph.node("Add", [product, graph.constant(f"{key}.bias", bias)], f"{key}.out")


def _build(graph: GraphBuilder, config: ViTConfig, spec: GraphSpec) -> onnx.ModelProto:
    assert spec.size is not None
    height, width = spec.size
    p = config.patch_size
    grid = (height // p, width // p)
    n_patches, dim, registers = grid[0] * grid[1], config.embed_dim, config.num_register_tokens
    x = _tokens(graph, config, grid)
    for index in range(config.depth):
        x = _block(graph, x, f"blocks.{index}", config, spec)
    x = _layer_norm(graph, x, "norm")
    sizes = graph.constant("token_split", np.array([1, registers, n_patches], np.int64))
    graph.split([x, sizes], ["cls_token_out", "registers", "patches"], "split", axis=1)
    graph.node("Squeeze", ["cls_token_out", graph.constant("token_axis", np.array([1], np.int64))], "cls")
    float32 = TensorProto.FLOAT
    outputs = [
        helper.make_tensor_value_info("cls", float32, ["batch", dim]),
        helper.make_tensor_value_info("patches", float32, ["batch", n_patches, dim]),
        helper.make_tensor_value_info("registers", float32, ["batch", registers, dim]),
    ]
    pixels = helper.make_tensor_value_info("pixels", float32, ["batch", 3, height, width])
    proto = helper.make_graph(graph.nodes, "dinov2", [pixels], outputs, graph.initializers)
    opset = [helper.make_opsetid("", OPSET)]
    if spec.attention == "tiled":
        opset.append(helper.make_opsetid("com.microsoft", 1))
    return helper.make_model(proto, opset_imports=opset, ir_version=IR_VERSION, producer_name="dinov2-service")


def _tokens(graph: GraphBuilder, config: ViTConfig, grid: tuple[int, int]) -> str:
    """Pixels to tokens [B, 1 + R + N, D]: patches and class token with positions, registers without."""
    kernel = graph.constant("patch_embed.proj.weight", graph.weight("patch_embed.proj.weight"))
    bias = graph.constant("patch_embed.proj.bias", graph.weight("patch_embed.proj.bias"))
    p, dim = config.patch_size, config.embed_dim
    conv = graph.node("Conv", ["pixels", kernel, bias], "patch_embed.conv", kernel_shape=[p, p], strides=[p, p])
    flat_shape = graph.constant("patch_embed.shape", np.array([0, dim, grid[0] * grid[1]], np.int64))
    flat = graph.node("Reshape", [conv, flat_shape], "patch_embed.flat")
    patches = graph.node("Transpose", [flat], "patch_embed.tokens", perm=[0, 2, 1])
    positions = resize_pos_embed(graph.weight("pos_embed"), grid, config.pos_embed_rule)
    positioned = graph.node("Add", [patches, graph.constant("pos_embed", positions[:, 1:])], "patch_embed.positioned")

    prefix = graph.weight("cls_token") + positions[:, :1]
    if config.num_register_tokens:
        prefix = np.concatenate([prefix, graph.weight("register_tokens")], axis=1)
    batch = graph.node("Shape", ["pixels"], "batch_size", start=0, end=1)
    rest = graph.constant("prefix_shape", np.array(prefix.shape[1:], np.int64))
    shape = graph.node("Concat", [batch, rest], "prefix_shape_batch", axis=0)
    expanded = graph.node("Expand", [graph.constant("prefix_tokens", prefix), shape], "prefix")
    return graph.node("Concat", [expanded, positioned], "tokens", axis=1)


def _attention(graph: GraphBuilder, parts: list[str], output: str, heads: int, spec: GraphSpec) -> str:
    if spec.attention == "tiled":
        return graph.node("MultiHeadAttention", parts, output, domain="com.microsoft", num_heads=heads)
    return graph.node("Attention", parts, output, q_num_heads=heads, kv_num_heads=heads)


def _block(graph: GraphBuilder, x: str, key: str, config: ViTConfig, spec: GraphSpec) -> str:
    gains: list[FloatArray | None] = [None, None]
    if config.layerscale_init is not None:
        gains = [graph.weight(f"{key}.ls{i}.gamma") for i in (1, 2)]
    qkv = _linear(graph, _layer_norm(graph, x, f"{key}.norm1"), f"{key}.attn.qkv")
    parts = graph.split([qkv], [f"{key}.attn.{part}" for part in "qkv"], f"{key}.attn.split", axis=-1, num_outputs=3)
    mixed = _attention(graph, parts, f"{key}.attn.out", config.num_heads, spec)
    x = graph.node("Add", [x, _linear(graph, mixed, f"{key}.attn.proj", gains[0])], f"{key}.attn.residual")

    normed = _layer_norm(graph, x, f"{key}.norm2")
    if config.ffn == "mlp":
        hidden = graph.node("Gelu", [_linear(graph, normed, f"{key}.mlp.fc1")], f"{key}.mlp.gelu")
        out = _linear(graph, hidden, f"{key}.mlp.fc2", gains[1])
    else:
        gate_value = _linear(graph, normed, f"{key}.mlp.w12")
        gate, value = graph.split(
            [gate_value], [f"{key}.mlp.gate", f"{key}.mlp.value"], f"{key}.mlp.split", axis=-1, num_outputs=2
        )
        sigmoid = graph.node("Sigmoid", [gate], f"{key}.mlp.sigmoid")
        silu = graph.node("Mul", [gate, sigmoid], f"{key}.mlp.silu")
        hidden = graph.node("Mul", [silu, value], f"{key}.mlp.gated")
        out = _linear(graph, hidden, f"{key}.mlp.w3", gains[1])
    return graph.node("Add", [x, out], f"{key}.mlp.residual")
