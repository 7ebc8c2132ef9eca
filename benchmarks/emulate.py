"""Emulate half-precision graphs on a machine without a GPU: compute in float32 and round the result of every operator.

On a CPU, ONNX Runtime has no bfloat16 matrix product, and it computes float16 in float32 without rounding between the
operators. This improves the result and hides overflow. OpenVINO does the same. In an emulated graph, every operator
computes in float32 and its result is rounded to float16 or bfloat16. The results equal those of a GPU that accumulates
in float32. Nothing is rounded inside the attention operator.

An emulated graph is slower and larger than the original. Use it only for checks.
"""

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

HALF_TYPES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
MOVES = ("Split", "Slice", "Reshape", "Transpose")  # their outputs are rounded, because their inputs are


def emulate_half(model: ModelProto) -> ModelProto:
    """Return a copy of `model` that stores every float16 or bfloat16 tensor as rounded float32 values.

    Raises:
        ValueError: the weights are in an external file.
    """
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise ValueError("a graph with weights in an external file cannot be emulated: build it in memory")
    emulated = ModelProto()
    emulated.CopyFrom(model)
    graph = emulated.graph
    half: dict[str, int] = {}  # name and type of each half-precision tensor of the original
    for tensor in graph.initializer:
        if tensor.data_type in HALF_TYPES:
            half[tensor.name] = tensor.data_type
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes += _emulated(node, half)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(emulated)
    return emulated


def _emulated(node: NodeProto, half: dict[str, int]) -> list[NodeProto]:
    """Return the nodes that replace `node`, and add to `half` the outputs of `node` that have half precision."""
    kinds = [half[name] for name in node.input if name in half]
    if node.op_type == "Cast":
        target = next(attribute.i for attribute in node.attribute if attribute.name == "to")
        if target not in HALF_TYPES:
            return [node]  # this cast from half precision is now one from float32 to float32
        half[node.output[0]] = target
        return _rounded(node.input[0], node.output[0], target)
    if not kinds or node.op_type == "QuantizeLinear":
        return [node]
    half.update(dict.fromkeys(node.output, kinds[0]))
    if node.op_type in MOVES:
        return [node]
    (output,) = node.output
    exact = NodeProto()
    exact.CopyFrom(node)
    exact.output[0] = f"{output}.exact"
    return [exact, *_rounded(exact.output[0], output, kinds[0])]


def _rounded(x: str, output: str, kind: int) -> list[NodeProto]:
    return [
        helper.make_node("Cast", [x], [f"{output}.rounded"], name=f"{output}.rounded", to=kind),
        helper.make_node("Cast", [f"{output}.rounded"], [output], name=f"{output}.widened", to=TensorProto.FLOAT),
    ]
