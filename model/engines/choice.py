"""Chooses the engine that serves an artifact on this host.

The user requests a specific engine, `auto` (the first engine in a fixed list that can serve) or `fastest` (the fastest
engine on this CPU). On a serving host, the reference is ONNX Runtime's CPU engine in float32, whose features were
already checked at export. Every other engine must pass the parity check when it is loaded: it runs the same few images
as the reference, and is discarded if its features differ too much. All attempts and their outcomes are logged in order,
and reported at /v1/models.

On a CPU, `auto` always selects float32, because other precisions change a vector's tag. On a GPU, it prefers bf16, or
fp16 if the GPU cannot compute in bf16 (compute capability below 8.0, such as T4). All vectors in a collection must be
computed in the same precision, so with `auto`, a collection that was filled on a GPU must also be searched on a GPU.
"""

import gc
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from model.artifact import ONNX, Artifact
from model.cpus import available_cpus
from model.engines import parity
from model.engines.cuda_driver import capability_without_bf16, no_gpu
from model.engines.protocol import BUCKETS, Choice, Engine, Features, FloatArray, OpenRequest, Tried
from model.engines.runtimes import RUNTIMES, parse_engine

log = logging.getLogger(__name__)


class Candidate(NamedTuple):
    """An engine that can be chosen, described by its runtime, precision and device.

    Only torch uses `device`. If `device` is None, torch uses a GPU when the host has one.
    """

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
    Candidate("torch", "fp32", "cpu"),  # for artifacts without a graph
)
AUTO_WITHOUT_BF16: Final = (
    Candidate("tensorrt", "fp16"),
    Candidate("onnxruntime-cuda", "fp16"),
    *(candidate for candidate in AUTO if candidate.precision == "fp32"),
)
"""The engines that `auto` tries on a GPU that cannot compute in bf16. torch has no fp16 engine."""
FASTEST: Final = (
    Candidate("onnxruntime", "fp32"),
    Candidate("openvino", "fp32"),
    Candidate("openvino", "bf16"),
    Candidate("onnxruntime", "int8"),
)
"""The engines that `fastest` compares, the more precise ones first."""
BENCHMARK_S: Final = 2.0
LOSSY_MARGIN: Final = 1.1
"""The speed-up over more precise engines that a bf16 or int8 engine must exceed to be chosen by `fastest`."""

PHOTOS_AT_LOAD: Final = 5
"""The number of generated images on which an engine is compared with the reference when it is loaded.

A CPU engine runs them in batches of 4 and 1. A GPU engine runs them at every batch size in `BUCKETS`.
"""


class NotHere(ValueError):
    """The error raised when an engine cannot serve on this host or from this artifact. The message gives the reason."""


def choose_engine(
    artifact: Artifact,
    name: str = "auto",
    *,
    threads: int | None = None,
    photos: Sequence[npt.NDArray[np.uint8]] | None = None,
) -> Choice:
    """Choose and load the engine that serves `artifact` on this host.

    The engine must be the float32 reference engine itself, or its results must agree with those of the reference.

    Args:
        artifact: the artifact (exported model) to serve.
        name: `runtime[:precision]` (see `model.engines.runtimes.RUNTIMES`), `auto` or `fastest`. `auto` selects the
            first engine that can serve in `AUTO`, or in `AUTO_WITHOUT_BF16` on a GPU without bf16. `fastest` selects
            the winner of a two-second benchmark of the CPU engines that can serve.
        threads: the number of CPU threads per forward pass. If None, the engine uses all CPUs that this process may
            use.
        photos: at least two images for the comparison with the reference, uint8 [H, W, 3]. If None, images are
            generated.

    Returns:
        The engine, and all engines that were tried.

    Raises:
        ValueError: the engine name is unknown, `threads` is below 1, or no engine can serve. The message gives the
            reasons.
        ModuleNotFoundError: the requested runtime is not installed.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    runtime, precision = parse_engine(name)
    host = _Host(artifact, threads or available_cpus(), photos)
    if name == "fastest":
        choice = _fastest(host)
    elif name == "auto":
        choice = _first(host, AUTO_WITHOUT_BF16 if capability_without_bf16() else AUTO)
    else:
        choice = _requested(host, Candidate(runtime, precision))
    for tried in choice.tried:
        log.info("engine %s %s: %s", *tried)
    log.info("engine %s (%s), %d threads", choice.engine.name, choice.engine.precision, host.threads)
    return choice


def known_precision(name: str) -> str | None:
    """Return the precision of the engine that `choose_engine` would choose for this name, without loading an engine.

    Return None if only loading can tell: for `fastest`, and for `auto` on a host with a GPU.

    Raises:
        ValueError: the engine name is unknown.
    """
    _, precision = parse_engine(name)
    if name == "auto" and no_gpu() is not None:
        return "fp32"  # the precision of every engine in AUTO that needs no GPU
    return precision or None


def load_engine(
    artifact: Artifact,
    name: str = "auto",
    *,
    threads: int | None = None,
    photos: Sequence[npt.NDArray[np.uint8]] | None = None,
) -> Engine:
    """Return the engine that `choose_engine` selects.

    The arguments and the errors are the same as those of `choose_engine`.
    """
    return choose_engine(artifact, name, threads=threads, photos=photos).engine


def _requested(host: "_Host", candidate: Candidate) -> Choice:
    try:
        engine = host.load(candidate)
    except NotHere as error:
        raise NotHere(f"engine {candidate.name}: {error}") from error
    except RuntimeError as error:  # mostly from CUDA; the command line reports a ValueError on one line
        raise ValueError(f"engine {candidate.name}: {_line(error)}") from error
    return Choice(engine, (Tried(candidate.name, "serves", "requested"),))


def _first(host: "_Host", candidates: Sequence[Candidate]) -> Choice:
    tried: list[Tried] = []
    for candidate in candidates:
        try:
            engine = host.load(candidate)
        except Exception as error:  # GPU libraries raise almost anything; the next candidate may work
            if not isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
                log.warning("engine %s failed unexpectedly", candidate.name, exc_info=True)
            tried.append(Tried(candidate.name, "passed over", _line(error)))
        else:
            return Choice(engine, (*tried, Tried(candidate.name, "serves", "first that can serve")))
        gc.collect()  # reference cycles may keep the memory of a rejected engine, including the GPU's
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
        return Choice(loaded[0][1], (*tried, Tried(loaded[0][0], "serves", "only CPU engine that can serve")))
    pixels = np.zeros((1, 3, *host.artifact.manifest.input_size), np.float32)
    speeds = images_per_s([engine for _, engine in loaded], pixels)
    best = 0
    for index in range(1, len(loaded)):
        margin = 1.0 if loaded[index][1].precision == "fp32" else LOSSY_MARGIN
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
    """Measure the speed of each engine on the batch `pixels` [B, 3, H, W].

    Each engine first runs once to warm up. The engines then take turns until `seconds` have passed, and each runs at
    least once more.

    Returns:
        The median speed of each engine, in images per second.
    """
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
    """Loads an artifact's engines on this host, and compares each engine with the reference engine.

    The reference engine's features are computed once and kept.
    """

    def __init__(self, artifact: Artifact, threads: int, photos: Sequence[npt.NDArray[np.uint8]] | None = None) -> None:
        self.artifact, self.threads = artifact, threads
        self._photos = photos

    def load(self, candidate: Candidate) -> Engine:
        """Load an engine, compare it with the reference engine, and return it. The reference itself is not compared.

        Raises:
            ValueError, OSError, RuntimeError: the engine cannot serve. The message gives the reason.
            ModuleNotFoundError: the engine's runtime is not installed.
        """
        if (fault := self._fault(candidate)) is not None:
            raise NotHere(fault)
        engine = self._open(candidate)
        if candidate != self._recorded:
            try:
                for batch in BUCKETS if engine.device == "cuda" else (parity.BATCH,):
                    record = parity.measure(self._reference, engine, self._pixels, batch=batch)
                    parity.check(record, "the float32 reference")
            except BaseException:
                engine.close()  # the next candidate needs the memory
                raise
        return engine

    def _fault(self, candidate: Candidate) -> str | None:
        """Return the reason why an engine cannot serve, or None if no reason is known before the engine is loaded."""
        runtime = RUNTIMES[candidate.runtime]
        needs_gpu = runtime.needs_gpu or candidate.device == "cuda"
        fault = (no_gpu() or _no_bf16(candidate)) if needs_gpu else None
        return fault or runtime.file.fault(self._request(candidate))

    def _open(self, candidate: Candidate, *, few_passes: bool = False) -> Engine:
        """Load and return an engine without comparing it with the reference engine."""
        return RUNTIMES[candidate.runtime].file.open(self._request(candidate, few_passes=few_passes))

    def _request(self, candidate: Candidate, *, few_passes: bool = False) -> OpenRequest:
        return OpenRequest(
            self.artifact, candidate.runtime, candidate.precision, self.threads, candidate.device, few_passes
        )

    @property
    def _recorded(self) -> Candidate:
        """The reference engine: ONNX Runtime on the CPU in float32, or torch if the artifact has no graph."""
        has_graph = ONNX in self.artifact.locations
        return Candidate("onnxruntime", "fp32") if has_graph else Candidate("torch", "fp32", "cpu")

    @cached_property
    def _pixels(self) -> FloatArray:
        photos = self._photos if self._photos is not None else parity.sample_photos(PHOTOS_AT_LOAD)
        manifest = self.artifact.manifest
        return parity.pixels_at(photos, manifest.preprocess, manifest.input_size)

    @cached_property
    def _reference(self) -> Features:
        return parity.features(self._open(self._recorded, few_passes=True), self._pixels)


def _no_bf16(candidate: Candidate) -> str | None:
    """Return the reason why the GPU cannot compute in bf16, or None if it can, or the candidate does not need it."""
    if candidate.precision != "bf16" or (capability := capability_without_bf16()) is None:
        return None
    major, minor = capability
    return f"this GPU cannot compute in bf16: its compute capability is {major}.{minor}, and bf16 needs 8.0"


def _line(error: Exception) -> str:
    """Return the message of an error as one line of at most 300 characters.

    If the message is empty, return the name of the error's class.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
