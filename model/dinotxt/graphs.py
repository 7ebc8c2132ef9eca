"""The ONNX graphs of dino.txt's two networks. Their weights stay in a safetensors file, which ONNX Runtime maps into
memory.

A graph refers to each tensor by its position in the file. It is small, so it is never stored, but built whenever a
network is opened. The tensors keep Meta's names and shapes: `Gemm` can multiply by the transpose of a weight.

Source: facebookresearch/dinov2, `dinov2/hub/text/` and `dinov2/layers/`.

Legend: B images, T tokens per image, P prompts, n nodes of the prompt tree, L length of the longest prompt, D width, A
attention heads, O width of the output.
"""

import json
import math
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from model.dinotxt.towers import HEAD_WIDTH, TextEncoderShape, VisionHeadShape
from model.onnx_graph.build import IR_VERSION, OPSET
from model.onnx_graph.nodes import GraphBuilder

NORM_EPS: Final = 1e-5  # torch's default; the backbone has 1e-6


class _Graph(GraphBuilder):
    """A graph whose weights are the float32 tensors of a safetensors file."""

    def __init__(self, path: Path) -> None:
        super().__init__({})
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._header = json.loads(file.read(length))
        self._path, self._start = path, 8 + length

    def has(self, key: str) -> bool:
        return key in self._header

    def stored(self, key: str) -> str:
        """Add the tensor `key` from the file as an initializer, and return its name."""
        if key in self._names:
            return key
        self._names.add(key)
        entry = self._header[key]
        assert entry["dtype"] == "F32", key
        start, end = entry["data_offsets"]
        tensor = TensorProto(name=key, dims=entry["shape"], data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": self._path.name, "offset": str(self._start + start), "length": str(end - start)}
        for name, value in place.items():
            tensor.external_data.add(key=name, value=value)
        self.initializers.append(tensor)
        return key

    def integers(self, name: str, *values: int) -> str:
        return self.constant(name, np.array(values, np.int64))

    def norm(self, x: str, key: str) -> str:
        inputs = [x, self.stored(f"{key}.weight"), self.stored(f"{key}.bias")]
        return self.node("LayerNormalization", inputs, f"{key}.out", axis=-1, epsilon=NORM_EPS)

    def linear(self, x: str, key: str) -> str:
        """Apply the linear layer `key` to `x`, which has two dimensions. The file may contain no bias for the layer."""
        inputs = [x, self.stored(f"{key}.weight")]
        if self.has(f"{key}.bias"):
            inputs.append(self.stored(f"{key}.bias"))
        return self.node("Gemm", inputs, f"{key}.out", transB=1)

    def model(self, inputs: list[onnx.ValueInfoProto], output: onnx.ValueInfoProto) -> bytes:
        proto = helper.make_graph(self.nodes, "dinotxt", inputs, [output], self.initializers)
        opset = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(proto, opset_imports=opset, ir_version=IR_VERSION, producer_name="dinov2-service")
        content: bytes = model.SerializeToString(deterministic=True)
        return content


def vision_head_graph(path: Path, shape: VisionHeadShape) -> bytes:
    """Return the graph of a vision head, as an ONNX file.

    The input `tokens` [B, T, D] are the backbone's tokens after its final norm, in the order class, registers, patches.
    The output `refined` has the same shape.

    Args:
        path: the safetensors file with the weights. The graph refers to it by its name.
        shape: the shape of the head.
    """
    graph, d = _Graph(path), shape.width
    rows = graph.integers("rows", -1, d)
    whole = graph.node("Shape", ["tokens"], "whole_shape")  # B, T, D
    images = graph.node("Shape", ["tokens"], "images_shape", start=0, end=2)
    joined = graph.node("Concat", [images, graph.integers("qkv_width", 3 * d)], "qkv_shape", axis=0)
    x = graph.node("Reshape", ["tokens", rows], "token_rows")  # [B*T, D]
    for index in range(shape.depth):
        key = f"block_list.{index}"
        qkv = graph.linear(graph.norm(x, f"{key}.norm1"), f"{key}.attn.qkv")
        qkv = graph.node("Reshape", [qkv, joined], f"{key}.attn.by_image")
        parts = [f"{key}.attn.{part}" for part in "qkv"]  # each [B, T, D]
        graph.several("Split", [qkv], parts, f"{key}.attn.split", axis=-1, num_outputs=3)
        heads = d // HEAD_WIDTH
        # This operator computes attention in tiles, so its memory is linear in T.
        mixed = graph.node("MultiHeadAttention", parts, f"{key}.attn.out", domain="com.microsoft", num_heads=heads)
        mixed = graph.linear(graph.node("Reshape", [mixed, rows], f"{key}.attn.rows"), f"{key}.attn.proj")
        scaled = graph.node("Mul", [mixed, graph.stored(f"{key}.ls1.gamma")], f"{key}.ls1.out")
        x = graph.node("Add", [x, scaled], f"{key}.attn.residual")

        normed = graph.norm(x, f"{key}.norm2")
        gate = graph.linear(normed, f"{key}.mlp.w1")
        gate = graph.node("Mul", [gate, graph.node("Sigmoid", [gate], f"{key}.mlp.sigmoid")], f"{key}.mlp.silu")
        hidden = graph.node("Mul", [gate, graph.linear(normed, f"{key}.mlp.w2")], f"{key}.mlp.gated")
        branch = graph.linear(hidden, f"{key}.mlp.w3")
        scaled = graph.node("Mul", [branch, graph.stored(f"{key}.ls2.gamma")], f"{key}.ls2.out")
        x = graph.node("Add", [x, scaled], f"{key}.mlp.residual")
    graph.node("Reshape", [graph.norm(x, "ln_final"), whole], "refined")
    return graph.model(
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["images", "count", d])],
        helper.make_tensor_value_info("refined", TensorProto.FLOAT, ["images", "count", d]),
    )


def text_encoder_graph(path: Path, shape: TextEncoderShape) -> bytes:
    """Return the graph of a text encoder, as an ONNX file.

    The inputs are the arrays of a `model.dinotxt.prompts.PromptTree`: `tokens` [n], `depths` [n], `paths` [n, L] and
    `ends` [P], int64. Node i attends to the first depths[i] + 1 nodes of its path. The output `features` is [P, O].

    Args:
        path: the safetensors file with the weights. The graph refers to it by its name.
        shape: the shape of the encoder.
    """
    graph, heads = _Graph(path), shape.width // HEAD_WIDTH
    embedded = graph.node("Gather", [graph.stored("backbone.token_embedding.weight"), "tokens"], "token_rows")
    positions = graph.node("Gather", [graph.stored("backbone.positional_embedding"), "depths"], "position_rows")
    x = graph.node("Add", [embedded, positions], "embedded")  # [n, D]
    hidden_places = _hidden_places(graph)  # [n, 1, 1, L]
    for index in range(shape.depth):
        key = f"backbone.blocks.{index}"
        qkv = graph.linear(graph.norm(x, f"{key}.attention_norm"), f"{key}.attention.qkv")
        parts = [f"{key}.attention.{part}" for part in "qkv"]  # each [n, D]
        graph.several("Split", [qkv], parts, f"{key}.attention.split", axis=-1, num_outputs=3)
        mixed = _tree_attention(graph, f"{key}.attention", parts, hidden_places, heads)
        x = graph.node("Add", [x, graph.linear(mixed, f"{key}.attention.proj")], f"{key}.attention.residual")

        hidden = graph.linear(graph.norm(x, f"{key}.ffn_norm"), f"{key}.feed_forward.fc1")
        hidden = graph.node("Gelu", [hidden], f"{key}.feed_forward.gelu")
        x = graph.node("Add", [x, graph.linear(hidden, f"{key}.feed_forward.fc2")], f"{key}.feed_forward.residual")
    last = graph.norm(graph.node("Gather", [x, "ends"], "end_rows"), "backbone.ln_final")
    projection = graph.stored("head.linear_projection.weight")
    graph.node("Gemm", [last, projection], "features", transB=1)
    sizes = {"tokens": ["nodes"], "depths": ["nodes"], "paths": ["nodes", "longest"], "ends": ["prompts"]}
    return graph.model(
        [helper.make_tensor_value_info(name, TensorProto.INT64, size) for name, size in sizes.items()],
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["prompts", shape.out_dim]),
    )


def _hidden_places(graph: _Graph) -> str:
    """Add the attention mask [n, 1, 1, L]: 0 for the places on a node's path, and -infinity for the filler after it."""
    longest = graph.node("Shape", ["paths"], "longest_list", start=1, end=2)
    longest = graph.node("Squeeze", [longest], "longest")
    zero, one = (graph.constant(f"scalar_{value}", np.array(value, np.int64)) for value in (0, 1))
    places = graph.node("Range", [zero, longest, one], "places")  # [L]
    depths = graph.node("Unsqueeze", ["depths", graph.integers("new_axes", 1, 2, 3)], "depth_column")
    after = graph.node("Greater", [places, depths], "after_path")
    hidden = graph.constant("hidden", np.array(-math.inf, np.float32))
    seen = graph.constant("seen", np.array(0, np.float32))
    return graph.node("Where", [after, hidden, seen], "hidden_places")


def _tree_attention(graph: _Graph, key: str, parts: list[str], hidden_places: str, heads: int) -> str:
    """Add the attention of each node to the nodes on its path. `parts` and the result are [n, D]."""
    by_head = graph.integers("by_head", 0, heads, HEAD_WIDTH)
    row_shape = graph.integers("row_shape", 0, heads * HEAD_WIDTH)
    queries, *others = (graph.node("Reshape", [part, by_head], f"{part}.by_head") for part in parts)  # [n, A, 64]
    queries = graph.node("Unsqueeze", [queries, graph.integers("query_axis", 2)], f"{key}.queries")  # [n, A, 1, 64]
    keys, values = (graph.node("Gather", [part, "paths"], f"{part}.on_path") for part in others)  # [n, L, A, 64]
    keys = graph.node("Transpose", [keys], f"{key}.keys", perm=[0, 2, 3, 1])  # [n, A, 64, L]
    values = graph.node("Transpose", [values], f"{key}.values", perm=[0, 2, 1, 3])  # [n, A, L, 64]
    scores = graph.node("MatMul", [queries, keys], f"{key}.products")  # [n, A, 1, L]
    scale = graph.constant("scale", np.array(1 / math.sqrt(HEAD_WIDTH), np.float32))
    scores = graph.node("Mul", [scores, scale], f"{key}.scaled")
    scores = graph.node("Add", [scores, hidden_places], f"{key}.scores")
    weights = graph.node("Softmax", [scores], f"{key}.weights", axis=-1)
    mixed = graph.node("MatMul", [weights, values], f"{key}.mixed")  # [n, A, 1, 64]
    return graph.node("Reshape", [mixed, row_shape], f"{key}.rows")
