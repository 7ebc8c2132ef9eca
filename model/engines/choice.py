"""Which engine serves: the one asked for, the first of a fixed order that is right, or the fastest on this CPU.

Nothing serves before its numbers were compared. The reference on a serving host is ONNX Runtime's CPU engine in
float32, whose own parity with torch the manifest records; every other engine runs the same few photos when it is
loaded, and one that strays is discarded. Whatever was tried is logged in order, with the reason, and kept for
/v1/models.

`auto` never takes int8: a vector's tag has its precision, and a service must not begin to write other vectors because
it was started on another host. A GPU's bf16 is another precision too, so a collection that was filled on a GPU is
searched on one.
"""

import ctypes
import gc
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from model.artifact import ONNX, WEIGHTS, Artifact, GraphRecord, derive_graph
from model.cpus import available_cpus
from model.engines import parity
from model.engines.protocol import BUCKETS, Choice, Engine, Features, FloatArray, Tried, parse_engine
from model.onnx_graph.build import GraphSpec

log = logging.getLogger(__name__)


class Candidate(NamedTuple):
    """An engine that may serve; `device` is torch's, None where it takes a GPU if there is one."""

    runtime: str
    precision: str
    device: Literal["cpu", "cuda"] | None = None

    @property
    def name(self) -> str:
        return f"{self.runtime}:{self.precision}"


AUTO: Final = (
    Candidate("tensorrt", "bf16"),
    Candidate("onnxruntime-cuda", "bf16"),
    Candidate("torch", "bf16", "cuda"),
    Candidate("onnxruntime", "fp32"),
    Candidate("torch", "fp32", "cpu"),  # for an artifact without a graph
)
FASTEST: Final = (Candidate("onnxruntime", "fp32"), Candidate("onnxruntime", "int8"))
BENCHMARK_S: Final = 2.0
INT8_MARGIN: Final = 1.1
"""How much faster than float32 an engine of less precision must be to be worth it."""

PHOTOS_AT_LOAD: Final = 5  # on a CPU in batches of 4 and 1; on a GPU in each that it has kernels of its own for


class NotHere(ValueError):
    """Why an engine cannot serve on this host or from this artifact, in one line."""


def choose_engine(
    artifact: Artifact,
    name: str = "auto",
    *,
    threads: int | None = None,
    photos: Sequence[npt.NDArray[np.uint8]] | None = None,
) -> Choice:
    """Load `artifact` in a runtime.

    Args:
        artifact: the verified artifact.
        name: `runtime[:precision]` (see `model.engines.protocol.RUNTIMES`); `auto`, the first of `AUTO` that is here
            and passes; or `fastest`, by a benchmark of two seconds among the CPU engines that pass.
        threads: CPU threads of a forward pass; None takes what the machine and its cgroup grant.
        photos: uint8 [H, W, 3] pictures, at least two, for the comparison at load; None takes generated ones.

    Raises:
        ValueError: an unknown engine name, `threads` below 1, or no engine that can serve; the message has the reasons.
        ModuleNotFoundError: the runtime that was asked for is not installed.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    runtime, precision = parse_engine(name)
    host = _Host(artifact, threads or available_cpus(), photos)
    if name == "fastest":
        choice = _fastest(host)
    elif name == "auto":
        choice = _first(host, AUTO)
    else:
        choice = _asked(host, Candidate(runtime, precision))
    for tried in choice.tried:
        log.info("engine %s %s: %s", *tried)
    log.info("engine %s (%s), %d threads", choice.engine.name, choice.engine.precision, host.threads)
    return choice


def _asked(host: "_Host", candidate: Candidate) -> Choice:
    try:
        engine = host.load(candidate)
    except NotHere as error:
        raise NotHere(f"engine {candidate.name}: {error}") from error
    except RuntimeError as error:  # CUDA's, mostly; ValueError is what a start that fails in one line knows
        raise ValueError(f"engine {candidate.name}: {_line(error)}") from error
    return Choice(engine, (Tried(candidate.name, "serves", "asked for"),))


def _first(host: "_Host", candidates: Sequence[Candidate]) -> Choice:
    tried: list[Tried] = []
    for candidate in candidates:
        try:
            engine = host.load(candidate)
        except Exception as error:  # whatever a GPU's libraries raise, the next one may be able to
            if not isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
                log.warning("engine %s failed in a way of its own", candidate.name, exc_info=True)
            tried.append(Tried(candidate.name, "passed over", _line(error)))
        else:
            return Choice(engine, (*tried, Tried(candidate.name, "serves", "the first that can")))
        gc.collect()  # what was passed over may hold memory, the GPU's among it, in cycles
    raise ValueError(f"no engine can serve {host.artifact.name}: {'; '.join(f'{t.engine}: {t.reason}' for t in tried)}")


def _fastest(host: "_Host") -> Choice:
    loaded, tried = [], []
    for candidate in FASTEST:
        try:
            loaded.append((candidate.name, host.load(candidate)))
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            tried.append(Tried(candidate.name, "passed over", _line(error)))
    if not loaded:
        raise ValueError(f"no CPU engine can serve {host.artifact.name}: {'; '.join(t.reason for t in tried)}")
    if len(loaded) == 1:
        return Choice(loaded[0][1], (*tried, Tried(loaded[0][0], "serves", "the only CPU engine that can")))
    pixels = np.zeros((1, 3, *host.artifact.manifest.input_size), np.float32)
    speeds = images_per_s([engine for _, engine in loaded], pixels)
    best = 0
    for index in range(1, len(loaded)):
        margin = INT8_MARGIN if loaded[index][1].precision == "int8" else 1.0
        best = index if speeds[index] > margin * speeds[best] else best
    for index, (name, _) in enumerate(loaded):
        figure = f"{speeds[index]:.1f} images/s"
        tried.append(Tried(name, "serves" if index == best else "passed over", figure))
    return Choice(loaded[best][1], tuple(tried))


def images_per_s(
    engines: Sequence[Engine],
    pixels: FloatArray,
    *,
    seconds: float = BENCHMARK_S,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median images/s of each engine: all take turns until `seconds` are over, each at least once after a warm-up."""
    start = clock()
    for engine in engines:
        engine.run(pixels)
    times: list[list[float]] = [[] for _ in engines]
    while not times[0] or clock() - start < seconds:
        for engine, taken in zip(engines, times, strict=True):
            begun = clock()
            engine.run(pixels)
            taken.append(clock() - begun)
    return [len(pixels) / max(statistics.median(taken), 1e-9) for taken in times]


class _Host:
    """What loading an engine needs, and the reference's features once they were asked for."""

    def __init__(self, artifact: Artifact, threads: int, photos: Sequence[npt.NDArray[np.uint8]] | None = None) -> None:
        self.artifact, self.threads = artifact, threads
        self._photos = photos

    def load(self, candidate: Candidate) -> Engine:
        """An engine that has been compared with the reference.

        Raises:
            ValueError, OSError, RuntimeError: it cannot serve; the message says why.
            ModuleNotFoundError: its runtime is not installed.
        """
        if (fault := self._fault(candidate)) is not None:
            raise NotHere(fault)
        engine = self._open(candidate)
        if candidate != self._recorded:
            try:
                for batch in BUCKETS if getattr(engine, "device", "cpu") == "cuda" else (parity.BATCH,):
                    record = parity.measure(self._reference, engine, self._pixels, batch=batch)
                    parity.check(record, "the float32 reference")
            except BaseException:
                if close := getattr(engine, "close", None):  # the GPU's memory, for the next one
                    close()
                raise
        return engine

    def _fault(self, candidate: Candidate) -> str | None:
        """What can be told without loading anything."""
        if candidate.runtime == "onnxruntime" and candidate.precision == "fp32" and ONNX not in self.artifact.locations:
            return f"the artifact has no {ONNX}"
        if candidate.precision == "int8":
            return self._int8_fault()
        if candidate.runtime in ("tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt") or candidate.device == "cuda":
            return no_gpu()
        return None

    def _int8_fault(self) -> str | None:
        graph = self._graph("int8")
        if graph is None:
            return "the artifact has no int8 graph of its input size: dinov2 export --precision fp32,int8"
        gates = [record.gate for record in self.artifact.manifest.parity if record.file == graph.file and record.gate]
        if not gates:
            return f"{graph.file} has no gate in the manifest"
        bad = [gate for gate in gates if gate.status != "passed"]
        return f"the gate of {graph.file} {_STATUS[bad[0].status]}: {bad[0].reason}" if bad else None

    def _open(self, candidate: Candidate, *, once: bool = False) -> Engine:
        """Load without comparing; `once`: for a few passes, so memory counts more than speed."""
        artifact, precision = self.artifact, candidate.precision
        config, size = artifact.manifest.config, artifact.manifest.input_size
        if candidate.runtime == "torch":
            from model.engines.torch_engine import TorchEngine

            return TorchEngine(
                artifact.file(WEIGHTS),
                config,
                threads=self.threads,
                precision=_torch_precision(precision),
                device=candidate.device,
                input_size=size,
            )
        if candidate.runtime == "tensorrt":
            from model.engines.tensorrt_engine import load_tensorrt

            engine: Engine = load_tensorrt(artifact, precision, artifact.derived)
            return engine
        from model.engines.onnxruntime_engine import OnnxEngine, need_provider

        provider = _PROVIDERS[candidate.runtime]
        need_provider(provider)  # before a graph is made for it
        path, cache = self._graph_file(precision, any_size=provider == "cpu"), artifact.derived
        if provider == "tensorrt":
            cache.mkdir(parents=True, exist_ok=True)
        return OnnxEngine(
            path, threads=self.threads, precision=precision, provider=provider, cache_dir=cache, prepack=not once
        )

    def _graph(self, precision: str) -> GraphRecord | None:
        """The artifact's graph of this precision for its input size: one of that size, else a dynamic one."""
        graphs = [graph for graph in self.artifact.manifest.graphs if graph.precision == precision]
        usable = [graph for graph in graphs if graph.size in (self.artifact.manifest.input_size, None)]
        return min(usable, key=lambda graph: graph.size is None, default=None)

    def _graph_file(self, precision: str, *, any_size: bool = True) -> Path:
        """The graph's file: the artifact's, or one that this host makes from the weights and keeps.

        `any_size`: a dynamic graph will do. TensorRT takes none.
        """
        artifact = self.artifact
        if precision == "fp32" and ONNX in artifact.locations:
            return artifact.file(ONNX)
        if (graph := self._graph(precision)) is not None and (any_size or graph.size is not None):
            return artifact.file(graph.file)
        size = artifact.manifest.input_size
        spec = GraphSpec(size=size, precision=_graph_precision(precision))
        path = artifact.derived / graph_name(size, precision)
        if not path.exists():
            derive_graph(artifact.weights, artifact.manifest.config, spec, path)
        return path

    @property
    def _recorded(self) -> Candidate:
        """What the others are compared with: ONNX Runtime's CPU, or torch where the artifact has no graph."""
        has_graph = ONNX in self.artifact.locations
        return Candidate("onnxruntime", "fp32") if has_graph else Candidate("torch", "fp32", "cpu")

    @cached_property
    def _pixels(self) -> FloatArray:
        photos = self._photos if self._photos is not None else parity.sample_photos(PHOTOS_AT_LOAD)
        manifest = self.artifact.manifest
        return parity.pixels_at(photos, manifest.preprocess, manifest.input_size)

    @cached_property
    def _reference(self) -> Features:
        return parity.features(self._open(self._recorded, once=True), self._pixels)


_PROVIDERS: Final[dict[str, Literal["cpu", "cuda", "tensorrt"]]] = {
    "onnxruntime": "cpu",
    "onnxruntime-cuda": "cuda",
    "onnxruntime-tensorrt": "tensorrt",
}
_STATUS = {"failed": "failed", "not measured": "was not measured"}


def graph_name(size: tuple[int, int] | None, precision: str) -> str:
    """The file of a further graph: `model-224-int8.onnx`, `model-224x336-fp32.onnx`, `model-dynamic-fp32.onnx`."""
    shown = "dynamic" if size is None else str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
    return f"model-{shown}-{precision}.onnx"


def no_gpu() -> str | None:
    """Why this host has no NVIDIA GPU that a program can use, asked of the driver; None if it has one.

    torch would know too, but takes seconds and hundreds of megabytes to say so.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1) on this host"
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return f"the NVIDIA driver does not start (CUDA error {status})"
    return None if count.value else "the NVIDIA driver sees no GPU"


def _torch_precision(precision: str) -> Literal["fp32", "bf16"]:
    return "bf16" if precision == "bf16" else "fp32"


def _graph_precision(precision: str) -> Literal["fp32", "fp16", "bf16"]:
    for known in ("fp32", "fp16", "bf16"):
        if precision == known:
            return known
    raise AssertionError(precision)  # int8 is never derived: its gate belongs to the artifact


def _line(error: Exception) -> str:
    """A message in one line that a table can show: some runtimes' have many."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
