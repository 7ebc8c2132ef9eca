"""Writes the graph of Meta's DPT depth head from its weights, and computes it with ONNX Runtime.

DPT ("Vision Transformers for Dense Prediction", arXiv 2103.13413; facebookresearch/dinov2,
`dinov2/hub/depth/decode_heads.py`) combines the tokens of four blocks. In each block, the class token is merged into
the patch tokens, and the result becomes a map at 4, 2, 1 or 1/2 times the patch grid. Beginning with the smallest map,
four fusion blocks add the next larger map and double the size. Two more steps double the size once more and reduce the
channels to one. The depth is relu(output) + the smallest depth.

One step differs from Meta's code: the 1x1 convolution at the end of a fusion block comes before the enlargement, not
after it. It then takes a quarter of the multiplications, and the result is the same, because bilinear weights sum to 1.

Legend: B batch, D width, h x w patches, H x W = 32 ceil(h/2) x 32 ceil(w/2) size of the result.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from model.cpus import available_cpus
from model.engines.onnxruntime_engine import load_runtime
from model.heads.record import Floats, HeadError
from model.onnx_graph.build import IR_VERSION, OPSET
from model.onnx_graph.nodes import GraphBuilder

MAX_PATCHES: Final = 2500
"""The largest number of patches. The graph's largest map then has 640,000 positions and 256 channels, and takes 0.7
GB."""


def output_size(grid: tuple[int, int]) -> tuple[int, int]:
    """Return the (H, W) of the depth map for a grid of (h, w) patches."""
    return 32 * -(-grid[0] // 2), 32 * -(-grid[1] // 2)


def build_dpt(tensors: Mapping[str, Floats], embed_dim: int) -> onnx.ModelProto:
    """Build the graph of a DPT head.

    The inputs are `patches.<k>` [B, h, w, D] and `cls.<k>` [B, 1, 1, D] for k = 0..3. The grid may have any size. The
    output `depth` [B, H, W] is the depth minus the smallest depth, in metres.

    Args:
        tensors: the head's tensors, with the names and shapes that `model.heads.record.dpt_shapes` returns.
        embed_dim: D.
    """
    graph = GraphBuilder(tensors)
    maps = [_reassemble(graph, k, embed_dim) for k in range(4)]
    x = maps[3]
    for block, skip in enumerate((None, *reversed(maps[:3]))):
        x = _fuse(graph, x, skip, block)
    x = graph.node("Relu", [_conv(graph, x, "project.conv", pad=1)], "project.relu")
    x = _double(graph, _conv(graph, x, "conv_depth.head.0", pad=1), "conv_depth.enlarged")
    x = graph.node("Relu", [_conv(graph, x, "conv_depth.head.2", pad=1)], "conv_depth.relu")
    x = graph.node("Relu", [_conv(graph, x, "conv_depth.head.4")], "conv_depth.positive")
    graph.node("Squeeze", [x, graph.constant("channel_axis", np.array([1]))], "depth")
    inputs = [
        helper.make_tensor_value_info(f"{part}.{k}", TensorProto.FLOAT, ["batch", *shape, embed_dim])
        for k in range(4)
        for part, shape in (("patches", ("height", "width")), ("cls", (1, 1)))
    ]
    depth = helper.make_tensor_value_info("depth", TensorProto.FLOAT, ["batch", "out_height", "out_width"])
    proto = helper.make_graph(graph.nodes, "dpt", inputs, [depth], graph.initializers)
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(proto, opset_imports=opset, ir_version=IR_VERSION, producer_name="dinov2-service")


class DptSession:
    """A DPT head that is loaded in ONNX Runtime, on the CPU. Several threads may call it."""

    most_patches: Final = MAX_PATCHES

    def __init__(self, tensors: Mapping[str, Floats], embed_dim: int) -> None:
        ort = load_runtime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = available_cpus()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        graph = build_dpt(tensors, embed_dim).SerializeToString()
        self._session: Any = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(self, layers: Sequence[tuple[Floats, Floats]], grid: tuple[int, int], min_depth: float) -> Floats:
        """Compute depths in metres, [H, W]. `layers` contains the class token [D] and the patch tokens [h * w, D] of
        four blocks.

        Raises:
            HeadError: there are more than `MAX_PATCHES` patches.
        """
        if grid[0] * grid[1] > MAX_PATCHES:
            raise HeadError(
                f"a DPT head accepts at most {MAX_PATCHES} patches, not {grid[0]} x {grid[1]}: use a smaller input size"
            )
        inputs = {}
        for k, (cls, patches) in enumerate(layers):
            inputs[f"cls.{k}"] = np.ascontiguousarray(cls, np.float32).reshape(1, 1, 1, -1)
            inputs[f"patches.{k}"] = np.ascontiguousarray(patches, np.float32).reshape(1, *grid, -1)
        depth = self._session.run(["depth"], inputs)[0][0]
        return np.asarray(depth + np.float32(min_depth), np.float32)


def _reassemble(graph: GraphBuilder, k: int, dim: int) -> str:
    """Add the nodes that turn the tokens of the head's block k into a map of 256 channels, and return its name."""
    key = f"reassemble_blocks.readout_projects.{k}.0"
    weight = graph.weight(f"{key}.weight")  # [D, 2D]: the columns for the patches, then those for the class token
    patch_part = graph.constant(f"{key}.patches", weight[:, :dim].T)
    cls_part = graph.constant(f"{key}.cls", weight[:, dim:].T)
    constant = graph.node("MatMul", [f"cls.{k}", cls_part], f"{key}.of_cls")  # [B, 1, 1, D]
    constant = graph.node(
        "Add", [constant, graph.constant(f"{key}.bias", graph.weight(f"{key}.bias"))], f"{key}.constant"
    )
    x = graph.node(
        "Add", [graph.node("MatMul", [f"patches.{k}", patch_part], f"{key}.of_patches"), constant], f"{key}.sum"
    )
    x = graph.node(
        "Transpose", [graph.node("Gelu", [x], f"{key}.gelu")], f"{key}.map", perm=[0, 3, 1, 2]
    )  # [B, D, h, w]
    x = _conv(graph, x, f"reassemble_blocks.projects.{k}.conv")
    key = f"reassemble_blocks.resize_layers.{k}"
    if k < 2:
        stride = 4 >> k
        inputs = [x, *(graph.constant(f"{key}.{part}", graph.weight(f"{key}.{part}")) for part in ("weight", "bias"))]
        x = graph.node("ConvTranspose", inputs, f"{key}.out", kernel_shape=[stride] * 2, strides=[stride] * 2)
    elif k == 3:
        x = _conv(graph, x, key, pad=1, stride=2)
    return _conv(graph, x, f"convs.{k}.conv", pad=1, bias=False)


def _fuse(graph: GraphBuilder, x: str, skip: str | None, block: int) -> str:
    """Add a fusion block and return the name of its result: `x` plus `skip`, at twice the size of `x`."""
    key = f"fusion_blocks.{block}"
    if skip is not None:
        size = graph.node("Shape", [x], f"{key}.size")
        skip = graph.node(
            "Resize", [skip, "", "", size], f"{key}.skip", mode="linear", coordinate_transformation_mode="half_pixel"
        )
        x = graph.node("Add", [x, _residual(graph, skip, f"{key}.res_conv_unit1")], f"{key}.sum")
    x = _residual(graph, x, f"{key}.res_conv_unit2")
    return _double(graph, _conv(graph, x, f"{key}.project.conv"), f"{key}.enlarged")


def _residual(graph: GraphBuilder, x: str, key: str) -> str:
    inner = x
    for conv in (f"{key}.conv1", f"{key}.conv2"):
        inner = _conv(graph, graph.node("Relu", [inner], f"{conv}.relu"), f"{conv}.conv", pad=1, bias=False)
    return graph.node("Add", [x, inner], f"{key}.out")


def _double(graph: GraphBuilder, x: str, output: str) -> str:
    """Add a bilinear enlargement by a factor of 2 that keeps the corners in place."""
    factors = graph.constant("twice", np.array([1, 1, 2, 2], np.float32))
    return graph.node("Resize", [x, "", factors], output, mode="linear", coordinate_transformation_mode="align_corners")


def _conv(graph: GraphBuilder, x: str, key: str, *, pad: int = 0, stride: int = 1, bias: bool = True) -> str:
    weight = graph.weight(f"{key}.weight")
    inputs = [x, graph.constant(f"{key}.weight", weight)]
    if bias:
        inputs.append(graph.constant(f"{key}.bias", graph.weight(f"{key}.bias")))
    kernel = list(weight.shape[2:])
    return graph.node("Conv", inputs, f"{key}.out", kernel_shape=kernel, pads=[pad] * 4, strides=[stride] * 2)
