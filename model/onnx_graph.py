"""The ONNX graph of a backbone, written from its weights with numpy alone.

Why not `torch.onnx.export`: this graph has one standard `Attention` operator a block (opset 23: fused by ONNX Runtime
and TensorRT), the position embedding baked for the input size, LayerScale folded into the layer before it, and
initializers that keep Meta's parameter names. It needs no torch, so a server can derive `model.onnx` from
`weights.safetensors` by itself; the same weights always give the same bytes.

Input `pixels` [B, 3, H, W] float32; outputs `cls` [B, D], `patches` [B, N, D], `registers` [B, R, D] (R may be 0).
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from model.config import ViTConfig
from model.pos_embed import resize_pos_embed

OPSET = 23
IR_VERSION = 11
NORM_EPS = 1e-6
EXTERNAL_ABOVE_BYTES = 1 << 30  # a protobuf message ends at 2 GiB

FloatArray = npt.NDArray[np.float32]


class _Graph:
    """Nodes and initializers in the order they are added; every name is given, none invented."""

    def __init__(self, weights: Mapping[str, npt.NDArray[np.floating]]) -> None:
        self._weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def weight(self, key: str) -> FloatArray:
        return self._weights[key].astype(np.float32)

    def constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: int | float | list[int]) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def layer_norm(self, x: str, key: str) -> str:
        scale = self.constant(f"{key}.weight", self.weight(f"{key}.weight"))
        bias = self.constant(f"{key}.bias", self.weight(f"{key}.bias"))
        return self.node("LayerNormalization", [x, scale, bias], f"{key}.out", axis=-1, epsilon=NORM_EPS)

    def linear(self, x: str, key: str, gain: FloatArray | None = None) -> str:
        """x @ W^T + b, with LayerScale's `gain` per output channel folded into both."""
        weight, bias = self.weight(f"{key}.weight"), self.weight(f"{key}.bias")
        if gain is not None:
            weight, bias = weight * gain[:, None], bias * gain
        product = self.node("MatMul", [x, self.constant(f"{key}.weight", weight.T)], f"{key}.matmul")
        return self.node("Add", [product, self.constant(f"{key}.bias", bias)], f"{key}.out")


def build_onnx(
    weights: Mapping[str, npt.NDArray[np.floating]], config: ViTConfig, image_size: tuple[int, int]
) -> onnx.ModelProto:
    """The graph for inputs of `image_size` = (H, W) pixels and any batch.

    Args:
        weights: Meta's parameter names to arrays, of any float type; the graph computes in float32.

    Raises:
        ValueError: a side of `image_size` is not a multiple of the patch size.
    """
    height, width = image_size
    p = config.patch_size
    if height % p or width % p or min(height, width) < p:
        raise ValueError(f"image size {height}x{width}: both sides must be multiples of the patch size {p}")
    grid = (height // p, width // p)
    n_patches, dim, registers = grid[0] * grid[1], config.embed_dim, config.num_register_tokens
    graph = _Graph(weights)
    x = _tokens(graph, config, grid)
    for index in range(config.depth):
        x = _block(graph, x, f"blocks.{index}", config)
    x = graph.layer_norm(x, "norm")
    sizes = graph.constant("token_split", np.array([1, registers, n_patches], np.int64))
    graph.nodes.append(
        helper.make_node("Split", [x, sizes], ["cls_token_out", "registers", "patches"], name="split", axis=1)
    )
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
    return helper.make_model(proto, opset_imports=opset, ir_version=IR_VERSION, producer_name="dinov2-service")


def _tokens(graph: _Graph, config: ViTConfig, grid: tuple[int, int]) -> str:
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


def _block(graph: _Graph, x: str, key: str, config: ViTConfig) -> str:
    gains: list[FloatArray | None] = [None, None]
    if config.layerscale_init is not None:
        gains = [graph.weight(f"{key}.ls{i}.gamma") for i in (1, 2)]
    heads = config.num_heads
    qkv = graph.linear(graph.layer_norm(x, f"{key}.norm1"), f"{key}.attn.qkv")
    parts = [f"{key}.attn.{part}" for part in "qkv"]
    graph.nodes.append(helper.make_node("Split", [qkv], parts, name=f"{key}.attn.split", axis=-1, num_outputs=3))
    mixed = graph.node("Attention", parts, f"{key}.attn.out", q_num_heads=heads, kv_num_heads=heads)
    x = graph.node("Add", [x, graph.linear(mixed, f"{key}.attn.proj", gains[0])], f"{key}.attn.residual")

    normed = graph.layer_norm(x, f"{key}.norm2")
    if config.ffn == "mlp":
        hidden = graph.node("Gelu", [graph.linear(normed, f"{key}.mlp.fc1")], f"{key}.mlp.gelu")
        out = graph.linear(hidden, f"{key}.mlp.fc2", gains[1])
    else:
        gate_value = graph.linear(normed, f"{key}.mlp.w12")
        halves = [f"{key}.mlp.gate", f"{key}.mlp.value"]
        graph.nodes.append(
            helper.make_node("Split", [gate_value], halves, name=f"{key}.mlp.split", axis=-1, num_outputs=2)
        )
        sigmoid = graph.node("Sigmoid", [halves[0]], f"{key}.mlp.sigmoid")
        silu = graph.node("Mul", [halves[0], sigmoid], f"{key}.mlp.silu")
        hidden = graph.node("Mul", [silu, halves[1]], f"{key}.mlp.gated")
        out = graph.linear(hidden, f"{key}.mlp.w3", gains[1])
    return graph.node("Add", [x, out], f"{key}.mlp.residual")


def write_onnx(model: onnx.ModelProto, path: Path) -> list[str]:
    """Write the model, its weights beside it when they outgrow one file; returns the names written.

    Attribute and field order is fixed, so equal graphs give equal bytes.
    """
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > EXTERNAL_ABOVE_BYTES:
        data = f"{path.name}.data"
        onnx.save(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data)
        return [path.name, data]
    with path.open("wb") as file:
        file.write(model.SerializeToString(deterministic=True))
        file.flush()
        os.fsync(file.fileno())
    return [path.name]
