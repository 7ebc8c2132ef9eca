"""The OpenVINO engine. It runs the artifact's float32 graph on the CPU, and computes in float32 or in bf16.

On CPUs with bf16 instructions, bf16 is much faster than float32 (docs/decisions/0050-openvino.md). Without these
instructions OpenVINO would emulate bf16 or compute in float32, so `fault` refuses such a CPU, and the engine checks the
precision that OpenVINO reports. By default, OpenVINO itself chooses bf16 where the CPU has it. This engine always sets
the precision, because vectors of different precisions are not comparable.

OpenVINO pins its threads to cores by default. Two processes would then share some cores while others are idle, so
pinning is off.

When it is imported, the package `openvino` sends an event to Google Analytics and stores a client id in the home
folder, if its dependency `openvino_telemetry` can be imported. A self-hosted service must not report to anyone, so
`load_runtime`, the only function that imports `openvino`, blocks this dependency first.

Inner outputs (see `model/engines/protocol.py`) come from a second compiled graph, as in ONNX Runtime's engine.
"""

import logging
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from model.engines.onnxruntime_engine import graph_file
from model.engines.protocol import Features, FloatArray, OpenRequest
from model.onnx_graph.spec import INNER_TENSORS

log = logging.getLogger(__name__)

CPU_INFO: Final = Path("/proc/cpuinfo")
BF16_FLAGS: Final = ("avx512_bf16", "amx_bf16")
"""The CPU features with which bf16 is faster than float32. One of them is enough."""

_HINTS: Final = {"fp32": "f32", "bf16": "bf16"}  # OpenVINO's names


def load_runtime() -> Any:
    """Import the module `openvino` without its telemetry, and return the module.

    Raises:
        ModuleNotFoundError: OpenVINO is not installed, or its libraries cannot be loaded.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing it raises ImportError
    try:
        import openvino
    except ImportError as error:
        raise ModuleNotFoundError(
            f"OpenVINO is not installed (pip install 'dinov2-service[openvino]'): {error}"
        ) from error
    return openvino


def fault(request: OpenRequest) -> str | None:
    """Return the reason why the engine cannot serve, or None (see `model.engines.protocol.EngineFile`).

    For bf16, the CPU must have one of the features in `BF16_FLAGS`.
    """
    if request.precision != "bf16" or _cpu_flags() & set(BF16_FLAGS):
        return None
    return f"this CPU has no bf16 instructions: {CPU_INFO} lists none of {', '.join(BF16_FLAGS)}"


def open(request: OpenRequest) -> "OpenVinoEngine":
    """Open and return the engine (see `model.engines.protocol.EngineFile.open`).

    Both precisions run `model.onnx`. If the artifact has no such graph, it is first built from the weights.
    """
    load_runtime()  # raises an error before a graph is built
    path = graph_file(request.artifact, "fp32", any_size=False)
    return OpenVinoEngine(path, threads=request.threads, precision=request.precision)


class OpenVinoEngine:
    """An engine that runs one graph of a fixed input size in OpenVINO. It implements `model.engines.protocol.Engine`.

    Args:
        path: the file of the float32 graph. External data must be in the same folder.
        threads: the number of CPU threads per forward pass. OpenVINO uses at most one thread per CPU.
        precision: "fp32" or "bf16".

    Raises:
        ValueError: OpenVINO cannot load the file, or does not compute in this precision.
        ModuleNotFoundError: OpenVINO is not installed.
    """

    name, device = "openvino", "cpu"

    def __init__(self, path: Path, *, threads: int, precision: str = "fp32") -> None:
        self.precision = precision
        self._path, self._threads = path, threads
        self._core: Any = load_runtime().Core()
        graph = self._read()
        _, *shape = graph.inputs[0].partial_shape
        self._shape = tuple(side.get_length() for side in shape)  # (3, H, W)
        self._tensors = {output.any_name: output.any_name for output in graph.outputs}  # by the output's public name
        self._inner_tensors = _inner_tensors(graph)
        self._request: Any = self._compile(graph)
        self._inner_request: Any = None

    def run(self, pixels: FloatArray) -> Features:
        """Compute the features of a batch of normalised pixels [B, 3, H, W].

        Raises:
            ValueError: the graph does not accept the shape.
        """
        return Features(**self.run_outputs(pixels, Features._fields))

    def can_run(self, size: tuple[int, int], outputs: Collection[str]) -> bool:
        return (3, *size) == self._shape and set(outputs) <= {*self._tensors, *self._inner_tensors}

    def run_outputs(self, pixels: FloatArray, names: Sequence[str]) -> dict[str, FloatArray]:
        """Run a batch of normalised pixels [B, 3, H, W], and return the outputs in `names` as float32, keyed by name.

        Raises:
            ValueError: the graph does not accept the shape, or lacks one of the outputs.
        """
        if pixels.ndim != 4 or not len(pixels) or pixels.shape[1:] != self._shape:
            raise ValueError(
                f"pixels of shape {pixels.shape}: this model takes [B, {', '.join(map(str, self._shape))}]"
            )
        tensors = self._tensors | self._inner_tensors
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"this graph has no output {missing[0]!r}; its outputs are {', '.join(tensors)}")
        request = self._request
        if any(name in self._inner_tensors for name in names):
            request = self._inner_request = self._inner_request or self._compile(self._read(inner=True))
        outputs = request.infer({"pixels": pixels}, share_inputs=True)
        return {name: np.asarray(outputs[tensors[name]], dtype=np.float32) for name in names}

    def close(self) -> None:
        """Release the compiled graphs. The engine cannot run afterwards."""
        self._request = self._inner_request = self._core = None

    def _read(self, *, inner: bool = False) -> Any:
        """Read and return the graph. If `inner` is True, the inner outputs are among its outputs."""
        try:
            graph = self._core.read_model(self._path)
        except RuntimeError as error:
            raise ValueError(f"{self._path}: OpenVINO cannot read it: {error}") from error
        if inner:
            graph.add_outputs(list(self._inner_tensors.values()))
        return graph

    def _compile(self, graph: Any) -> Any:
        """Compile a graph for this CPU, and return a request that runs it."""
        hint = _HINTS[self.precision]
        options = {
            "PERFORMANCE_HINT": "LATENCY",  # all threads work on one batch
            "INFERENCE_NUM_THREADS": self._threads,
            "INFERENCE_PRECISION_HINT": hint,
            "ENABLE_HYPER_THREADING": True,  # otherwise OpenVINO may use fewer threads
            "ENABLE_CPU_PINNING": False,
        }
        try:
            compiled = self._core.compile_model(graph, "CPU", options)
        except RuntimeError as error:
            raise ValueError(f"{self._path}: OpenVINO cannot compile it: {error}") from error
        used = compiled.get_property("INFERENCE_PRECISION_HINT")
        if used != getattr(load_runtime().Type, hint):
            raise ValueError(f"OpenVINO computes in {used.get_type_name()} on this CPU, not in {self.precision}")
        threads = compiled.get_property("INFERENCE_NUM_THREADS")
        if threads != self._threads:
            log.warning("OpenVINO uses %d threads instead of %d", threads, self._threads)
        return compiled.create_infer_request()


def _cpu_flags() -> set[str]:
    """Return the features of the first CPU that Linux lists. The set is empty if the system is not Linux on x86."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return set()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return set(flags.partition(":")[2].split())


def _inner_tensors(graph: Any) -> dict[str, str]:
    """Return the names of the tensors of all inner outputs, keyed by the names of the outputs."""
    made = {name for op in graph.get_ops() for output in op.outputs() for name in output.get_names()}
    tensors: dict[str, str] = {}
    block = 0
    while INNER_TENSORS["tokens"].format(block) in made:
        tensors |= {f"{kind}.{block}": pattern.format(block) for kind, pattern in INNER_TENSORS.items()}
        block += 1
    return tensors
