"""Linear layers of a graph in each precision, and the casts around them.

- fp32: a layer is a MatMul and an Add. LayerScale's gain is folded into the weight and the bias.
- fp16, bf16: linear layers, attention and the feed-forward activation run in half precision. Three parts stay in
  float32. The first is LayerNormalization, because of its sums. The second is the residual stream: every block adds to
  it, and in trained ViTs a few channels have values in the thousands, where bfloat16 has steps of 8 and float16 nears
  its maximum of 65504. The third is LayerScale, whose gains start at 1e-5 and would underflow in float16 weights.
- int8: each linear layer quantizes its input at run time, with a scale computed from the range of the input's values,
  and multiplies integers. Weights have one scale per output channel (`model/onnx_graph/quantize.py`), with LayerScale's
  gain folded in. ONNX Runtime fuses a layer's five operators into one. Everything else is float32.
- fp8: for TensorRT only. Inputs and weights of linear layers are rounded to E4M3. Everything else is as in bf16.

The layers in `float_layers` are not quantized: with int8 they are float32, and with fp8 they are bfloat16.
"""

from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from model.onnx_graph.nodes import FloatArray, GraphBuilder
from model.onnx_graph.quantize import FP8_LARGEST, fp8_per_channel, int8_per_channel
from model.onnx_graph.spec import Int8Weights


class Half(NamedTuple):
    """A half-precision type, as ONNX and as numpy represent it."""

    onnx: int
    numpy: npt.DTypeLike


HALVES = {
    "fp16": Half(TensorProto.FLOAT16, np.float16),
    "bf16": Half(TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    "fp8": Half(TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}


def narrow(graph: GraphBuilder, x: str, precision: str) -> str:
    """Add a node that casts `x` from float32 to the half-precision type of `precision`, and return the result's name.

    If `precision` has no such type, return `x`.
    """
    half = HALVES.get(precision)
    return x if half is None else graph.node("Cast", [x], f"{x}.half", to=half.onnx)


def widen(graph: GraphBuilder, x: str, precision: str) -> str:
    """Add a node that casts `x` from the half-precision type of `precision` to float32, and return the result's name.

    If `precision` has no such type, return `x`.
    """
    return x if precision not in HALVES else graph.node("Cast", [x], f"{x}.float", to=TensorProto.FLOAT)


def is_named(layer: str, name: str) -> bool:
    """Return whether `name` selects the linear layer `layer`.

    A layer such as "blocks.3.mlp.fc2" is selected by its full name, by an ending of this name such as "mlp.fc2", and by
    a beginning such as "blocks.3".
    """
    return f".{layer}".endswith(f".{name}") or f"{layer}.".startswith(f"{name}.")


class Linear:
    """Adds linear layers, x @ W^T + b, to a graph in one precision.

    `GraphSpec` describes `precision`, `int8_weights` and `float_layers`. `build_onnx` describes `activations`.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        precision: str,
        activations: Mapping[str, float],
        int8_weights: Int8Weights,
        float_layers: tuple[str, ...],
    ) -> None:
        self._graph, self._precision, self._activations = graph, precision, activations
        self._int8_weights, self._float_layers = int8_weights, float_layers
        self._half = HALVES.get(precision)

    def __call__(self, x: str, key: str, gain: FloatArray | None = None) -> str:
        """Add the linear layer `key` and return the name of its result [B, T, out], for B images of T tokens.

        LayerScale's `gain` [out] is folded into the weights if it is not None. The input `x` and the result are float16
        with fp16, bfloat16 with bf16 and fp8, and float32 with fp32 and int8.
        """
        graph = self._graph
        weight, bias = graph.weight(f"{key}.weight"), graph.weight(f"{key}.bias")  # [out, in], [out]
        if gain is not None:
            weight, bias = weight * gain[:, None], bias * gain
        eight_bits = not any(is_named(key, layers) for layers in self._float_layers)
        if self._precision == "int8" and eight_bits:
            product = self._int8(x, key, weight)
        elif self._precision == "fp8" and eight_bits:
            product = self._fp8(x, key, weight)
        else:
            product = graph.node("MatMul", [x, self._stored(f"{key}.weight", weight.T)], f"{key}.matmul")
        return graph.node("Add", [product, self._stored(f"{key}.bias", bias)], f"{key}.out")

    def branch_end(self, x: str, key: str, gain: FloatArray | None, scale_key: str) -> str:
        """Add the linear layer `key` that ends a residual branch, and LayerScale's `gain` if it is not None.

        Return the name of the result, which is float32.
        """
        if self._half is None:
            return self(x, key, gain)
        out = widen(self._graph, self(x, key), self._precision)
        if gain is None:
            return out
        gamma = self._graph.constant(f"{scale_key}.gamma", gain)
        return self._graph.node("Mul", [out, gamma], f"{scale_key}.out")

    def _stored(self, name: str, value: FloatArray) -> str:
        return self._graph.constant(name, value if self._half is None else value.astype(self._half.numpy))

    def _int8(self, x: str, key: str, weight: FloatArray) -> str:
        graph = self._graph
        quantized, scale, zero = int8_per_channel(weight, self._int8_weights)
        stored = graph.constant(f"{key}.weight", quantized.T)
        scales = graph.constant(f"{key}.weight_scale", scale)
        zeros = graph.constant(f"{key}.weight_zero_point", zero)
        x_int, x_scale, x_zero = graph.several(
            "DynamicQuantizeLinear", [x], [f"{key}.in", f"{key}.in_scale", f"{key}.in_zero_point"], f"{key}.in"
        )
        sums = graph.node("MatMulInteger", [x_int, stored, x_zero, zeros], f"{key}.sums")
        sums = graph.node("Cast", [sums], f"{key}.sums_float", to=TensorProto.FLOAT)
        both = graph.node("Mul", [x_scale, scales], f"{key}.scales")
        return graph.node("Mul", [sums, both], f"{key}.matmul")

    def _fp8(self, x: str, key: str, weight: FloatArray) -> str:
        graph, zero = self._graph, np.zeros((), ml_dtypes.float8_e4m3fn)
        quantized, scale = fp8_per_channel(weight)
        stored = graph.constant(f"{key}.weight", quantized.T)
        scales = self._stored(f"{key}.weight_scale", scale)
        w = graph.node("DequantizeLinear", [stored, scales], f"{key}.weight_half", axis=1)
        largest = np.array(max(self._activations[key], 1e-6) / FP8_LARGEST, np.float32)
        x_scale, x_zero = self._stored(f"{key}.in_scale", largest), graph.constant("fp8_zero", zero)
        x_fp8 = graph.node("QuantizeLinear", [x, x_scale, x_zero], f"{key}.in")
        return graph.node(
            "MatMul", [graph.node("DequantizeLinear", [x_fp8, x_scale, x_zero], f"{key}.in_half"), w], f"{key}.matmul"
        )
