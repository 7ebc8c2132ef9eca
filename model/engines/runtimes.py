"""The table of runtimes, with each runtime's precisions, the file that opens its engines, and whether it needs a GPU.

To add a runtime, add a file `*_engine.py` to this folder and a row to this table.
"""

from dataclasses import dataclass
from typing import Final

from model.engines import onnxruntime_engine, openvino_engine, tensorrt_engine, torch_engine
from model.engines.protocol import EngineFile


@dataclass(frozen=True)
class Runtime:
    """One row of the table of runtimes."""

    name: str
    precisions: tuple[str, ...]  # the first is the default
    file: EngineFile
    needs_gpu: bool = False


_ROWS: Final = (
    Runtime("onnxruntime", ("fp32", "fp16", "bf16", "int8"), onnxruntime_engine),
    Runtime("onnxruntime-cuda", ("bf16", "fp16", "fp32"), onnxruntime_engine, needs_gpu=True),
    Runtime("openvino", ("fp32", "bf16"), openvino_engine),
    Runtime("torch", ("fp32", "bf16"), torch_engine),
    Runtime("tensorrt", ("bf16", "fp16", "fp8"), tensorrt_engine, needs_gpu=True),
)
RUNTIMES: Final = {runtime.name: runtime for runtime in _ROWS}


def parse_engine(name: str) -> tuple[str, str]:
    """Split an engine name of the form `runtime[:precision]` into (runtime, precision).

    If the name has no precision, the runtime's default precision is returned. For the names `auto` and `fastest`,
    the precision is "".

    Raises:
        ValueError: the runtime is unknown, or it does not support the precision.
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
