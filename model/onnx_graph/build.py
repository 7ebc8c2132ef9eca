"""The ONNX graph of a backbone, written from its weights with numpy only.

`torch.onnx.export` is not used, for three reasons. First, this module adds one attention operator per block, which ONNX
Runtime and TensorRT can fuse. Second, it either resizes the position embedding in advance for one input size, or adds
nodes that compute it exactly for any size. Third, it needs no torch, so a server can derive `model.onnx` from
`weights.safetensors`. The same weights and `GraphSpec` always produce the same bytes.

The input is `pixels` [B, 3, H, W], float32 in every precision. The outputs are float32 as well: `cls` [B, D], `patches`
[B, N, D] and `registers` [B, R, D] (R may be 0), all after the last norm. Two further outputs are optional: `attention`
[B, A, T], the class token's softmax weights over all tokens in the last block, and `layer.<i>` [B, T, D], the tokens
after block i with the last norm applied.

Even if a graph accepts any size, H and W must be multiples of the patch size. The graph does not check this: it ignores
the pixels beyond the last whole patch, so an engine must reject other sizes before it runs the graph.

Legend: B batch, H x W pixels, p patch size, h x w = H/p x W/p patches, N = h*w, R registers, T = 1 + R + N tokens, D
width, A attention heads.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from model.config import ViTConfig
from model.onnx_graph.linear import HALVES, Linear, is_named, narrow, widen
from model.onnx_graph.nodes import FloatArray, GraphBuilder, Sink, Weights
from model.onnx_graph.positions import positions_for_any_grid
from model.onnx_graph.spec import GraphSpec
from model.pos_embed import resize_pos_embed

OPSET = 23
IR_VERSION = 11
NORM_EPS = 1e-6
EXTERNAL_ABOVE_BYTES = 1 << 30  # a protobuf message is limited to 2 GiB
END = np.iinfo(np.int64).max  # the end of a Slice that includes the last element


def build_onnx(
    weights: Weights, config: ViTConfig, spec: GraphSpec, *, activations: Mapping[str, float] | None = None
) -> onnx.ModelProto:
    """Build a backbone's graph in memory and return it. A graph above 2 GiB (a giant model) needs `write_onnx`.

    Args:
        weights: arrays of any float type, keyed by Meta's parameter names.
        config: the model's shape.
        spec: the options of the graph.
        activations: the largest absolute input of each linear layer, as returned by
            `model.engines.activations.measure_activations`. fp8 requires these values, and other precisions ignore
            them.

    Raises:
        ValueError: a side of the input is not a multiple of the patch size, an output or a float layer does not exist,
            an output is given twice or none is given, or `activations` lacks a layer that fp8 needs.
    """
    _check(config, spec, activations or {})
    return _build(GraphBuilder(weights), config, spec, activations or {})


def write_onnx(
    weights: Weights,
    config: ViTConfig,
    spec: GraphSpec,
    path: Path,
    *,
    activations: Mapping[str, float] | None = None,
) -> list[str]:
    """Write a backbone's graph to `path` and return the names of the written files.

    The arguments are the same as those of `build_onnx`. The weights of a large graph are written to a second file,
    `<path>.data`. Weights are read, converted and written one at a time, so `weights` may be a mapping that reads from
    a file. If the process is killed during the call, an incomplete file can remain, so callers should write to a
    temporary folder.

    Raises:
        ValueError: see `build_onnx`.
        OSError: a file cannot be written.
    """
    _check(config, spec, activations or {})
    with ExitStack() as files:

        def opened(name: str) -> Sink:
            return files.enter_context(path.with_name(name).open("wb"))

        return _write(weights, config, spec, path.name, opened, activations or {})


class Digest(NamedTuple):
    """The sha256 in hex and the size of a file."""

    sha256: str
    bytes: int


def graph_digests(weights: Weights, config: ViTConfig, spec: GraphSpec, name: str) -> dict[str, Digest]:
    """Return the digests of the files that `write_onnx` would write with the file name `name`, without writing them.

    The arguments are those of `write_onnx`. A graph of up to 1 GiB is built in memory.

    Raises:
        ValueError: see `build_onnx`.
    """
    _check(config, spec, {})
    files: dict[str, _HashedFile] = defaultdict(_HashedFile)
    _write(weights, config, spec, name, files.__getitem__, {})
    return {file: hashed.digest() for file, hashed in files.items()}


class _HashedFile:
    """A file that is hashed and not stored."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview, /) -> int:
        self._hash.update(data)
        size = memoryview(data).nbytes
        self._size += size
        return size

    def tell(self) -> int:
        return self._size

    def digest(self) -> Digest:
        return Digest(self._hash.hexdigest(), self._size)


def _write(
    weights: Weights,
    config: ViTConfig,
    spec: GraphSpec,
    name: str,
    opened: Callable[[str], Sink],
    activations: Mapping[str, float],
) -> list[str]:
    """Write the files of a graph and return their names. `opened` opens a file for writing by its name."""
    names = [name]
    if _weight_bytes(config, spec) > EXTERNAL_ABOVE_BYTES:
        names.append(f"{name}.data")
        model = _build(GraphBuilder(weights, opened(names[1]), names[1]), config, spec, activations)
    else:
        model = _build(GraphBuilder(weights), config, spec, activations)
    opened(name).write(model.SerializeToString(deterministic=True))
    return names


def _check(config: ViTConfig, spec: GraphSpec, activations: Mapping[str, float]) -> None:
    """Raise a ValueError if the graph cannot be built (see `build_onnx`)."""
    p = config.patch_size
    if spec.size is not None and (any(side % p for side in spec.size) or min(spec.size) < p):
        height, width = spec.size
        raise ValueError(f"image size {height}x{width}: both sides must be multiples of the patch size {p}")
    allowed = ["cls", "patches", "registers", "attention", *(f"layer.{i}" for i in range(config.depth))]
    for output in spec.outputs:
        if output not in allowed:
            raise ValueError(
                f"unknown output {output!r}: one of cls, patches, registers, attention, "
                f"layer.0 to layer.{config.depth - 1}"
            )
    if not spec.outputs or len(set(spec.outputs)) < len(spec.outputs):
        raise ValueError(f"outputs must be one or more names, each once, not {list(spec.outputs)}")
    parts = ("attn.qkv", "attn.proj", *(("mlp.fc1", "mlp.fc2") if config.ffn == "mlp" else ("mlp.w12", "mlp.w3")))
    layers = [f"blocks.{i}.{part}" for i in range(config.depth) for part in parts]
    for name in spec.float_layers:
        if not any(is_named(layer, name) for layer in layers):
            raise ValueError(f"float_layers: no layer is named {name!r}; a block's layers are {', '.join(parts)}")
    for layer in layers if spec.precision == "fp8" else []:
        if layer not in activations and not any(is_named(layer, name) for name in spec.float_layers):
            raise ValueError(f"fp8 needs the largest input of every linear layer: activations has no {layer!r}")


def _weight_bytes(config: ViTConfig, spec: GraphSpec) -> int:
    """Return the approximate size of the weights in bytes. Only the weight matrices of the blocks are counted."""
    d = config.embed_dim
    feed_forward = (2 if config.ffn == "mlp" else 3) * d * config.hidden_dim
    width = {"fp32": 4, "fp16": 2, "bf16": 2}.get(spec.precision, 1)
    return config.depth * (4 * d * d + feed_forward) * width


def _build(
    graph: GraphBuilder, config: ViTConfig, spec: GraphSpec, activations: Mapping[str, float]
) -> onnx.ModelProto:
    linear = Linear(graph, spec.precision, activations, spec.int8_weights, spec.float_layers)
    x = _tokens(graph, config, spec)
    for index in range(config.depth):
        x = _block(graph, linear, x, index, config, spec)
        if f"layer.{index}" in spec.outputs:
            _layer_norm(graph, x, "norm", f"layer.{index}")
    if not {"cls", "patches", "registers"}.isdisjoint(spec.outputs):
        _part_tokens(graph, _layer_norm(graph, x, "norm", "norm.out"), config, spec)
    shapes = _shapes(config, spec)
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, shapes["pixels"])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in spec.outputs]
    proto = helper.make_graph(graph.nodes, "dinov2", [pixels], outputs, graph.initializers)
    opset = [helper.make_opsetid("", OPSET)]
    if spec.attention == "tiled":
        opset.append(helper.make_opsetid("com.microsoft", 1))
    return helper.make_model(proto, opset_imports=opset, ir_version=IR_VERSION, producer_name="dinov2-service")


def _shapes(config: ViTConfig, spec: GraphSpec) -> dict[str, list[int | str]]:
    """Return the shapes of the input and of every possible output, keyed by name. A string is a dynamic dimension."""
    dim, p, prefix = config.embed_dim, config.patch_size, 1 + config.num_register_tokens
    height: int | str = "height" if spec.size is None else spec.size[0]
    width: int | str = "width" if spec.size is None else spec.size[1]
    patches: int | str = "patches" if spec.size is None else spec.size[0] // p * (spec.size[1] // p)
    tokens: int | str = "tokens" if isinstance(patches, str) else prefix + patches
    return {
        "pixels": ["batch", 3, height, width],
        "cls": ["batch", dim],
        "patches": ["batch", patches, dim],
        "registers": ["batch", config.num_register_tokens, dim],
        "attention": ["batch", config.num_heads, tokens],
        **{f"layer.{i}": ["batch", tokens, dim] for i in range(config.depth)},
    }


def _layer_norm(graph: GraphBuilder, x: str, key: str, output: str) -> str:
    scale = graph.constant(f"{key}.weight", graph.weight(f"{key}.weight"))
    bias = graph.constant(f"{key}.bias", graph.weight(f"{key}.bias"))
    return graph.node("LayerNormalization", [x, scale, bias], output, axis=-1, epsilon=NORM_EPS)


def _int64(graph: GraphBuilder, name: str, *values: int) -> str:
    return graph.constant(name, np.array(values, np.int64))


def _part_tokens(graph: GraphBuilder, x: str, config: ViTConfig, spec: GraphSpec) -> None:
    """Split the normalised tokens `x` [B, T, D] into the class token, the registers and the patches of each image.

    The results are the graph's outputs `cls`, `registers` and `patches`. `Gather` is not used, because ONNX Runtime
    1.32 returns a wrong class token if the graph also has a `Split` of the same tensor.
    """
    registers = config.num_register_tokens
    if spec.size is not None:
        patches = spec.size[0] // config.patch_size * (spec.size[1] // config.patch_size)
        parts = {"cls_token_out": 1, "registers": registers, "patches": patches}
        if not registers and "registers" not in spec.outputs:
            del parts["registers"]  # an empty output is useless in TensorRT
        graph.several("Split", [x, _int64(graph, "token_split", *parts.values())], list(parts), "split", axis=1)
    else:  # TensorRT's Split does not accept computed sizes
        axis = _int64(graph, "token_axis", 1)
        start, first = _int64(graph, "token_start", 0), _int64(graph, "first_register", 1)
        patch, end = _int64(graph, "first_patch", 1 + registers), _int64(graph, "token_end", END)
        graph.node("Slice", [x, start, first, axis], "cls_token_out")
        graph.node("Slice", [x, patch, end, axis], "patches")
        if "registers" in spec.outputs:
            graph.node("Slice", [x, first, patch, axis], "registers")
    graph.node("Squeeze", ["cls_token_out", _int64(graph, "token_axis", 1)], "cls")


def _tokens(graph: GraphBuilder, config: ViTConfig, spec: GraphSpec) -> str:
    """Add the nodes that convert pixels to tokens [B, 1 + R + N, D], and return the name of the result.

    The class token and the N patches of each of the B images get positions, but the R registers do not. These nodes are
    float32 in every precision, because they account for only 1 % of the computation, and because ONNX Runtime has no
    bfloat16 convolution.
    """
    kernel = graph.constant("patch_embed.proj.weight", graph.weight("patch_embed.proj.weight"))
    bias = graph.constant("patch_embed.proj.bias", graph.weight("patch_embed.proj.bias"))
    p, dim = config.patch_size, config.embed_dim
    conv = graph.node("Conv", ["pixels", kernel, bias], "patch_embed.conv", kernel_shape=[p, p], strides=[p, p])
    grid = None if spec.size is None else (spec.size[0] // p, spec.size[1] // p)
    flat_shape = _int64(graph, "patch_embed.shape", 0, dim, grid[0] * grid[1] if grid else -1)
    flat = graph.node("Reshape", [conv, flat_shape], "patch_embed.flat")
    patches = graph.node("Transpose", [flat], "patch_embed.tokens", perm=[0, 2, 1])
    positions = graph.weight("pos_embed")
    if grid is None:
        table = positions_for_any_grid(graph, config, conv)
    else:
        table = graph.constant("pos_embed", resize_pos_embed(positions, grid, config.pos_embed_rule)[:, 1:])
    positioned = graph.node("Add", [patches, table], "patch_embed.positioned")

    prefix = graph.weight("cls_token") + positions[:, :1]
    if config.num_register_tokens:
        prefix = np.concatenate([prefix, graph.weight("register_tokens")], axis=1)
    batch = graph.node("Shape", ["pixels"], "batch_size", start=0, end=1)
    shape = graph.node(
        "Concat", [batch, _int64(graph, "prefix_shape", *prefix.shape[1:])], "prefix_shape_batch", axis=0
    )
    expanded = graph.node("Expand", [graph.constant("prefix_tokens", prefix), shape], "prefix")
    return graph.node("Concat", [expanded, positioned], "tokens", axis=1)


def _block(graph: GraphBuilder, linear: Linear, x: str, index: int, config: ViTConfig, spec: GraphSpec) -> str:
    """Add a transformer block and return the name of its result.

    The block computes x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))). The sums are float32 in every precision.
    """
    key = f"blocks.{index}"
    gains: list[FloatArray | None] = [None, None]
    if config.layerscale_init is not None:
        gains = [graph.weight(f"{key}.ls{i}.gamma") for i in (1, 2)]
    normed = narrow(graph, _layer_norm(graph, x, f"{key}.norm1", f"{key}.norm1.out"), spec.precision)
    qkv = linear(normed, f"{key}.attn.qkv")
    parts = [f"{key}.attn.{part}" for part in "qkv"]
    graph.several("Split", [qkv], parts, f"{key}.attn.split", axis=-1, num_outputs=3)
    mixed = _attention(graph, parts, f"{key}.attn.out", config.num_heads, spec)
    if index == config.depth - 1 and "attention" in spec.outputs:
        _class_attention(graph, parts[0], parts[1], config)
    out = linear.branch_end(mixed, f"{key}.attn.proj", gains[0], f"{key}.ls1")
    x = graph.node("Add", [x, out], f"{key}.attn.residual")

    normed = narrow(graph, _layer_norm(graph, x, f"{key}.norm2", f"{key}.norm2.out"), spec.precision)
    if config.ffn == "mlp":
        hidden = graph.node("Gelu", [linear(normed, f"{key}.mlp.fc1")], f"{key}.mlp.gelu")
        out = linear.branch_end(hidden, f"{key}.mlp.fc2", gains[1], f"{key}.ls2")
    else:
        gate_value = linear(normed, f"{key}.mlp.w12")
        gate, value = f"{key}.mlp.gate", f"{key}.mlp.value"
        graph.several("Split", [gate_value], [gate, value], f"{key}.mlp.split", axis=-1, num_outputs=2)
        sigmoid = graph.node("Sigmoid", [gate], f"{key}.mlp.sigmoid")
        silu = graph.node("Mul", [gate, sigmoid], f"{key}.mlp.silu")
        hidden = graph.node("Mul", [silu, value], f"{key}.mlp.gated")
        out = linear.branch_end(hidden, f"{key}.mlp.w3", gains[1], f"{key}.ls2")
    return graph.node("Add", [x, out], f"{key}.mlp.residual")


def _attention(graph: GraphBuilder, parts: list[str], output: str, heads: int, spec: GraphSpec) -> str:
    """Add the attention operator, and return the name of its output [B, T, D] for B images of T tokens with width D.

    `parts` are the names of queries, keys and values, each [B, T, D].
    """
    if spec.attention == "tiled":
        return graph.node("MultiHeadAttention", parts, output, domain="com.microsoft", num_heads=heads)
    half = HALVES.get(spec.precision)
    if spec.attention == "upcast" and half is not None:
        wide = [widen(graph, part, spec.precision) for part in parts]
        mixed = graph.node("Attention", wide, f"{output}.wide", q_num_heads=heads, kv_num_heads=heads)
        return graph.node("Cast", [mixed], output, to=half.onnx)
    return graph.node("Attention", parts, output, q_num_heads=heads, kv_num_heads=heads)


def _class_attention(graph: GraphBuilder, q: str, k: str, config: ViTConfig) -> None:
    """Add the output `attention` [B, A, T], which contains the class token's softmax weights in each of the A heads.

    The weights are computed from the queries `q` and the keys `k`, each [B, T, D] for B images of T tokens with width
    D.
    """
    heads, width = config.num_heads, config.embed_dim // config.num_heads
    key = "attention"
    axis = _int64(graph, "token_axis", 1)
    start, end = _int64(graph, f"{key}.start", 0), _int64(graph, f"{key}.end", 1)
    by_head = _int64(graph, f"{key}.by_head", 0, 0, heads, width)
    row = graph.node("Slice", [q, start, end, axis], f"{key}.query")  # [B, 1, D]
    row = graph.node("Reshape", [row, by_head], f"{key}.query_split")
    row = graph.node("Transpose", [row], f"{key}.query_heads", perm=[0, 2, 1, 3])  # [B, A, 1, D/A]
    keys = graph.node("Reshape", [k, by_head], f"{key}.keys_split")
    keys = graph.node("Transpose", [keys], f"{key}.keys_heads", perm=[0, 2, 3, 1])  # [B, A, D/A, T]
    scores = graph.node("MatMul", [row, keys], f"{key}.products")
    scores = graph.node("Cast", [scores], f"{key}.float", to=TensorProto.FLOAT)
    scale = graph.constant(f"{key}.scale", np.array(width**-0.5, np.float32))
    scores = graph.node("Mul", [scores, scale], f"{key}.scores")
    softmax = graph.node("Softmax", [scores], f"{key}.softmax", axis=-1)  # [B, A, 1, T]
    graph.node("Squeeze", [softmax, _int64(graph, f"{key}.row", 2)], "attention")
