"""Quantizes weights to eight bits, with numpy only.

int8 weights are symmetric, with one scale per output channel, in one of two forms:

- "s7": int8 values from -64 to 64. AVX2's u8 x s8 instruction adds two neighbouring products in 16 bits and saturates,
  but 2 * 255 * 64 still fits into 16 bits. This form is the fastest on AVX2. Its values are the same as those of
  `onnxruntime.quantization.quantize_dynamic(per_channel=True, reduce_range=True)`, as a test checks.
- "u8": uint8 values from 1 to 255 with zero point 128. ONNX Runtime multiplies u8 x u8 without saturation. The weight
  error is half that of "s7", but the multiplication is slower on CPUs without VNNI.

fp8 is E4M3, whose largest value is 448. Weights are scaled by their largest value per output channel, and inputs by the
largest value that `model.engines.activations.measure_activations` observed.
"""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from model.onnx_graph.nodes import FloatArray
from model.onnx_graph.spec import Int8Weights

_INT8: dict[str, tuple[int, npt.DTypeLike, int]] = {"s7": (64, np.int8, 0), "u8": (127, np.uint8, 128)}
"""The largest distance from the zero point, the type, and the zero point of each form."""
FP8_LARGEST = 448.0


def int8_per_channel(
    weight: FloatArray, form: Int8Weights
) -> tuple[npt.NDArray[np.integer], FloatArray, npt.NDArray[np.integer]]:
    """Quantize `weight` [out, in] so that (integer - zero point) * scale approximates `weight`.

    Returns:
        The integers [out, in], the float32 scales [out] and the zero points [out].
    """
    largest, kind, zero = _INT8[form]
    scale = _scale(weight, largest)
    steps = np.clip(np.rint(weight / scale[:, None]), -largest, largest)
    return (steps + zero).astype(kind), scale, np.full(len(scale), zero, kind)


def fp8_per_channel(weight: FloatArray) -> tuple[npt.NDArray[Any], FloatArray]:
    """Quantize `weight` [out, in] so that value * scale approximates `weight`.

    Returns:
        The float8 E4M3 values [out, in] and the float32 scales [out]. The scales are rounded to bfloat16, because the
            graph stores them in this type.
    """
    scale = _scale(weight, FP8_LARGEST).astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.clip(weight / scale[:, None], -FP8_LARGEST, FP8_LARGEST).astype(ml_dtypes.float8_e4m3fn), scale


def _scale(weight: FloatArray, largest: float) -> FloatArray:
    """Return a scale for each row of `weight`.

    A row divided by its scale has the maximum absolute value `largest`. The scale of a row of zeros is 1.
    """
    scale = (np.abs(weight).max(axis=1).astype(np.float64) / largest).astype(np.float32)
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
