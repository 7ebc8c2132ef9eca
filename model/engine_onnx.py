"""The ONNX Runtime engine: the default on CPU, and on CUDA where the GPU build of the package is installed.

Threads of ONNX Runtime spin while they wait by default, which steals the cores that decode photos for the next batch;
spinning is off here (figures: docs/decisions/0002-engine-threads.md).

ONNX Runtime's released builds since 1.29 report to Microsoft (sessions, model hashes, a device id kept in ~/.cache)
unless a variable says no before the module loads; its own call to turn that off comes after a first event. A
self-hosted service reports to nobody, so this file, the only one that imports it, says no first.
"""

import os
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort

from model.engine import Features, FloatArray


class OnnxEngine:
    """Runs `model.onnx`.

    Raises:
        ValueError: the file is not a model that ONNX Runtime loads.
    """

    name = "onnxruntime"
    precision = "fp32"

    def __init__(self, path: Path, *, threads: int, spinning: bool = False) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
        ort.preload_dlls()  # CUDA as pip's wheels bring it; without, the GPU build looks only where the system keeps it
        wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        providers = [provider for provider in wanted if provider in ort.get_available_providers()]
        try:
            self._session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime raises its own unrelated classes
            raise ValueError(f"{path}: ONNX Runtime cannot load it: {error}") from error
        self.device = "cuda" if self._session.get_providers()[0].startswith("CUDA") else "cpu"
        self._input_shape = tuple(self._session.get_inputs()[0].shape[1:])  # (3, H, W)

    def run(self, pixels: FloatArray) -> Features:
        """See `model.engine.Engine`."""
        if pixels.ndim != 4 or pixels.shape[1:] != self._input_shape:
            shape = ", ".join(map(str, self._input_shape))
            raise ValueError(f"pixels of shape {pixels.shape}: this model takes [B, {shape}]")
        outputs = self._session.run(["cls", "patches", "registers"], {"pixels": pixels})
        return Features(*(np.asarray(output, dtype=np.float32) for output in outputs))
