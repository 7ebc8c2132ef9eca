"""Weights in eight bits, with numpy only.

int8: symmetric, one scale per output channel, in one of two forms.

- "s7": int8 within +-64. Seven bits, because AVX2's u8 x s8 product adds two neighbours in 16 bits and saturates, and 2
  * 255 * 64 still fits. This form is the fastest on AVX2. Its numbers equal those of
  `onnxruntime.quantization.quantize_dynamic(per_channel=True, reduce_range=True)`, which the tests compare with.
- "u8": uint8 around 128, all eight bits. ONNX Runtime multiplies u8 x u8 in 16 bits without saturation: half the weight
  error, but a slower product on CPUs without VNNI.

fp8 (E4M3, largest value 448): weights are scaled by their largest value per output channel, inputs by the largest value
that `model.engines.activations.measure_activations` observed.
"""

from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from model.onnx_graph.nodes import FloatArray

Int8Weights = Literal["s7", "u8"]
_INT8: dict[str, tuple[int, npt.DTypeLike, int]] = {"s7": (64, np.int8, 0), "u8": (127, np.uint8, 128)}
"""Largest step from zero, type, and zero point."""
FP8_LARGEST = 448.0


def int8_per_channel(
    weight: FloatArray, form: Int8Weights
) -> tuple[npt.NDArray[np.integer], FloatArray, npt.NDArray[np.integer]]:
    """Quantize weight [out, in] to (integers [out, in], float32 scale [out], zero point [out]).

    weight ~ (integer - zero) * scale.
    """
    largest, kind, zero = _INT8[form]
    scale = _scale(weight, largest)
    steps = np.clip(np.rint(weight / scale[:, None]), -largest, largest)
    return (steps + zero).astype(kind), scale, np.full(len(scale), zero, kind)


def fp8_per_channel(weight: FloatArray) -> tuple[npt.NDArray[Any], FloatArray]:
    """Quantize weight [out, in] to (float8 E4M3 [out, in], float32 scale [out]), with weight ~ float8 * scale.

    The scales are rounded to bfloat16, as the graph stores them.
    """
    scale = _scale(weight, FP8_LARGEST).astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.clip(weight / scale[:, None], -FP8_LARGEST, FP8_LARGEST).astype(ml_dtypes.float8_e4m3fn), scale


def _scale(weight: FloatArray, largest: float) -> FloatArray:
    """Return one scale per row. A row of zeros gets scale 1."""
    scale = (np.abs(weight).max(axis=1).astype(np.float64) / largest).astype(np.float32)
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
