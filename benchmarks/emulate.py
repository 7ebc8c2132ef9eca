"""Emulation of half-precision graphs for runtimes without such arithmetic: float32, rounded after every operator.

ONNX Runtime has no bfloat16 matrix product on a CPU, and it computes float16 in float32 without rounding in between,
which improves the result and hides overflow. OpenVINO does the same. To allow a comparison with torch on a machine
without a GPU, every operator here takes float32 and its result is rounded to the half type's grid. This equals a GPU
that accumulates in float32. Nothing is rounded inside the attention operator.

The emulated graph is slow and larger than the original; use it for checks only.
"""

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

HALF_TYPES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
MOVES = ("Split", "Slice", "Reshape", "Transpose")  # rounded inputs, so rounded outputs


def emulate_half(model: ModelProto) -> ModelProto:
    """Return `model` (with its weights inside) with every float16 or bfloat16 tensor stored in float32, rounded.

    Raises:
        ValueError: its weights are in an external file.
    """
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise ValueError("a graph with weights in an external file cannot be emulated: build it in memory")
    emulated = ModelProto()
    emulated.CopyFrom(model)
    graph = emulated.graph
    half: dict[str, int] = {}  # tensors of the original that are halves
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
    """Return the nodes that replace `node`; add to `half` those of its outputs that were half precision."""
    kinds = [half[name] for name in node.input if name in half]
    if node.op_type == "Cast":
        target = next(attribute.i for attribute in node.attribute if attribute.name == "to")
        if target not in HALF_TYPES:
            return [node]  # from float32 to float32, where it led out of a half
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
