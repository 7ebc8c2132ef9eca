"""Weights in eight bits, with numpy alone.

int8: symmetric, one scale per output channel, values within +-64. Seven bits because AVX2's u8 x s8 product adds two
neighbours in 16 bits and saturates: 2 * 255 * 64 still fits. The same numbers as
`onnxruntime.quantization.quantize_dynamic(per_channel=True, reduce_range=True)`, which the tests compare with.

fp8 (E4M3, largest value 448): weights by their largest value per output channel; inputs by the largest value that
`model.calibrate.measure_activations` saw.
"""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from model.onnx_nodes import FloatArray

INT8_LARGEST = 64
FP8_LARGEST = 448.0


def int8_per_channel(weight: FloatArray) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Weight [out, in] as (int8 [out, in], float32 scale [out]); weight = int8 * scale, nearly."""
    scale = _scale(weight, INT8_LARGEST)
    steps = np.rint(weight / scale[:, None])
    return np.clip(steps, -INT8_LARGEST, INT8_LARGEST).astype(np.int8), scale


def fp8_per_channel(weight: FloatArray) -> tuple[npt.NDArray[Any], FloatArray]:
    """Weight [out, in] as (float8 E4M3 [out, in], float32 scale [out]); weight = float8 * scale, nearly."""
    scale = _scale(weight, FP8_LARGEST)
    return np.clip(weight / scale[:, None], -FP8_LARGEST, FP8_LARGEST).astype(ml_dtypes.float8_e4m3fn), scale


def _scale(weight: FloatArray, largest: float) -> FloatArray:
    """Per row; a row of zeros gets one."""
    scale = (np.abs(weight).max(axis=1).astype(np.float64) / largest).astype(np.float32)
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
