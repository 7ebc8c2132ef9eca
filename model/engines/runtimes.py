"""The table of runtimes: their precisions, whether they need a GPU, and the file that opens them.

A new runtime is one more `*_engine.py` in this folder and one more row here.
"""

from dataclasses import dataclass
from typing import Final

from model.engines import onnxruntime_engine, tensorrt_engine, torch_engine
from model.engines.protocol import EngineFile


@dataclass(frozen=True)
class Runtime:
    """One row of the table."""

    name: str
    precisions: tuple[str, ...]  # the first is the default
    file: EngineFile
    needs_gpu: bool = False


_ROWS: Final = (
    Runtime("onnxruntime", ("fp32", "fp16", "bf16", "int8"), onnxruntime_engine),
    Runtime("onnxruntime-cuda", ("bf16", "fp16", "fp32"), onnxruntime_engine, needs_gpu=True),
    Runtime("onnxruntime-tensorrt", ("bf16", "fp16"), onnxruntime_engine, needs_gpu=True),
    Runtime("torch", ("fp32", "bf16"), torch_engine),
    Runtime("tensorrt", ("bf16", "fp16", "fp8"), tensorrt_engine, needs_gpu=True),
)
RUNTIMES: Final = {runtime.name: runtime for runtime in _ROWS}


def parse_engine(name: str) -> tuple[str, str]:
    """Split `runtime[:precision]` into (runtime, precision). `auto` and `fastest` have no precision ("").

    Raises:
        ValueError: an unknown runtime, or a precision that it does not support.
    """
    runtime, colon, precision = name.partition(":")
    if name in ("auto", "fastest"):
        return name, ""
    if runtime not in RUNTIMES:
        raise ValueError(f"unknown engine {name!r}: one of auto, fastest, {', '.join(RUNTIMES)}")
    precisions = RUNTIMES[runtime].precisions
    if colon and precision not in precisions:
        raise ValueError(f"engine {name!r}: {runtime} supports {', '.join(precisions)}")
    return runtime, precision or precisions[0]
