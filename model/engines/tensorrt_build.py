"""Finds the installed TensorRT library, and runs one build or refit of a plan in a separate process.

A plan is an engine that TensorRT compiled for one GPU. A refit replaces the weights in an existing plan.

A graph that TensorRT's builder cannot handle can kill the process with a signal (this has been observed), so
`model/engines/tensorrt_export.py` runs this file as a program: `python -P tensorrt_build.py JOB.json`. The file imports
nothing from the project. The program writes one JSON object per line to standard output: progress events, then the
result. Everything that the libraries print goes to standard error.

Two libraries provide the TensorRT API: `tensorrt` (10.14 or newer, the first version with the `Attention` operator) and
`tensorrt_rtx` (TensorRT for RTX; its wheels install from PyPI, and it can build for a given target without a GPU).

Attention must become one fused kernel per block. By default TensorRT does not decompose an `Attention` operator, so a
build without a matching kernel fails. TensorRT-RTX 1.7.1, however, decomposed a float32 `Attention` when the batch size
was fixed to 1. The fused kernels are therefore counted as a second check: `count_fused_attention` finds their names in
the bytes of TensorRT-RTX plans, and `count_attention_layers` in what the full library reports about a plan.
"""

import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

LIBRARIES = ("tensorrt", "tensorrt_rtx")
OLDEST_TENSORRT = (10, 14)
INSTALL_HINT = "pip install -e '.[tensorrt]' (its wheels come from NVIDIA's index) or '.[tensorrt-rtx]' (from PyPI)"
_FUSED = re.compile(rb"(?<![A-Za-z0-9_])_gemm_mha_v2(?![A-Za-z0-9_])")
_FUSED_LAYER = re.compile(r"(?<![a-z])f?mha(?![a-z])", re.IGNORECASE)
_STEP_INTERVAL_S = 0.2


@dataclass(frozen=True)
class Library:
    """An installed TensorRT library."""

    name: str  # one of LIBRARIES
    version: str
    module: Any


def find_library(name: str | None = None) -> Library:
    """Import an installed TensorRT library and return it.

    If `name` is None, `tensorrt` is returned if it is installed and new enough, otherwise `tensorrt_rtx`.

    Raises:
        ModuleNotFoundError: no suitable library is installed. The message gives reasons and says how to install one.
        ValueError: `name` is unknown, or `name` is "tensorrt" and the installed version is older than 10.14.
    """
    if name is not None and name not in LIBRARIES:
        raise ValueError(f"unknown library {name!r}: one of {', '.join(LIBRARIES)}")
    reasons = []
    for candidate in (name,) if name else LIBRARIES:
        try:
            module = importlib.import_module(candidate)
        except (ImportError, OSError) as error:  # OSError: the wheel's shared library is missing or does not load
            reasons.append(f"{candidate}: {error}")
            continue
        version = str(module.__version__)
        if candidate == "tensorrt" and tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TENSORRT:
            reasons.append(f"tensorrt {version}: no fused attention operator; 10.14 or newer is needed")
            continue
        return Library(candidate, version, module)
    if all("10.14" in reason for reason in reasons):
        raise ValueError("; ".join(reasons))
    raise ModuleNotFoundError(f"TensorRT is not installed ({'; '.join(reasons)}): {INSTALL_HINT}")


def count_fused_attention(plan: bytes) -> int:
    """Return the number of fused attention kernels whose names occur in a TensorRT-RTX plan.

    If all attention is fused, a plan contains one such name per transformer block and optimization profile. It is not
    known whether plans from the full TensorRT library name these kernels.
    """
    return len(_FUSED.findall(plan))


def count_attention_layers(information: str) -> int:
    """Return the number of layers that are fused attention kernels in the JSON text of TensorRT's engine inspector.

    The names of the layers and of their tactics are searched for "mha" and "fmha", which NVIDIA's fused kernels have in
    their names. The other fields name nodes of the graph, which stay the same if attention is not fused.
    """
    layers = json.loads(information).get("Layers", [])
    names = [
        f"{layer.get('Name')} {layer.get('TacticName')}" if isinstance(layer, dict) else str(layer) for layer in layers
    ]
    return sum(bool(_FUSED_LAYER.search(name)) for name in names)


class BuildError(ValueError):
    """The error raised when a build or refit fails. The message explains the reason and quotes TensorRT."""


def plain_reason(errors: list[str]) -> str:
    """Return a plain explanation of the builder's error messages, followed by the last three of them."""
    said = " | ".join(errors[-3:]) or "it gave no reason"
    if "not supported by a dedicated kernel" in said:
        return (
            "attention cannot be fused on this target: TensorRT has no kernel for its number format, head width or "
            f"length (float32 never fuses: build bf16 or fp16). TensorRT says: {said}"
        )
    if "HW-specific datatypes" in said:
        return f"the target GPU cannot compute in this number format (bf16 needs 8.0, fp8 8.9). TensorRT says: {said}"
    if "CUDA_SUCCESS" in said or "CUDA initialization failure" in said or "cudaError" in said:
        return f"this build needs a GPU, and CUDA can use none. TensorRT says: {said}"
    if "out of memory" in said.lower():
        return f"the GPU's memory was too small for the build: stop other programs that use it. TensorRT says: {said}"
    return f"TensorRT cannot build this graph. It says: {said}"


@dataclass
class _Events:
    """Writes each progress event to `out` as one line of JSON."""

    out: TextIO
    last_step: float = 0.0

    def send(self, **event: Any) -> None:
        self.out.write(json.dumps(event) + "\n")
        self.out.flush()

    def step(self, phase: str, step: int) -> None:
        if time.monotonic() - self.last_step > _STEP_INTERVAL_S:
            self.last_step = time.monotonic()
            self.send(phase=phase, step=step)


def make_logger(trt: Any, on_message: Callable[[str, str], None]) -> Any:
    """Return a TensorRT logger that calls `on_message(severity, message)` for all messages except verbose ones."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.INFO:
                on_message(severity.name, message)

    return Logger()


def _logger(trt: Any, errors: list[str]) -> Any:
    """Return a TensorRT logger that prints messages to standard error and appends error messages to `errors`."""

    def on_message(severity: str, message: str) -> None:
        if "ERROR" in severity:
            errors.append(message)
        print(f"[{severity}] {message}", file=sys.stderr, flush=True)

    return make_logger(trt, on_message)


def _monitor(trt: Any, events: _Events) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            events.send(phase=phase_name, parent=parent_phase, steps=num_steps)

        def phase_finish(self, phase_name: str) -> None:
            events.send(phase=phase_name, done=True)

        def step_complete(self, phase_name: str, step: int) -> bool:
            events.step(phase_name, step)
            return True

    return Monitor()


def build(trt: Any, job: dict[str, Any], events: _Events) -> dict[str, Any]:
    """Parse the graph file `job["onnx"]`, build a plan, and write it to the file `job["plan"]`.

    Returns:
        A dictionary with the profiles of the plan, and the durations of parsing and building in seconds. With the full
        library, it also has the number of fused attention kernels.

    Raises:
        BuildError: TensorRT cannot parse or build the graph, or cannot load the plan.
    """
    errors: list[str] = []
    logger = _logger(trt, errors)
    builder = trt.Builder(logger)
    # Since version 11 every network is strongly typed, and the flag may be missing.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    started = time.monotonic()
    if not parser.parse_from_file(job["onnx"]):
        reasons = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise BuildError(f"TensorRT cannot read the graph: {' | '.join(reasons[-3:])}")
    parsed = time.monotonic()
    config, profiles, monitor = _configure(trt, builder, job, events)
    plan = builder.build_serialized_network(network, config)
    del monitor  # the monitor must outlive the build
    if plan is None:
        raise BuildError(plain_reason(errors))
    built = time.monotonic()
    Path(job["plan"]).write_bytes(plan)
    if new_timings := job.get("new_timings"):
        Path(new_timings).write_bytes(config.get_timing_cache().serialize())
    done = {"profiles": profiles, "parse_s": round(parsed - started, 3), "build_s": round(built - parsed, 3)}
    if job["library"] == "tensorrt":  # TensorRT-RTX could load the plan only on a GPU
        done["fused_attention"] = count_attention_layers(_inspect(trt, plan, logger, errors))
    return done


def _inspect(trt: Any, plan: Any, logger: Any, errors: list[str]) -> str:
    """Load a plan, and return what TensorRT reports about its layers, as JSON text.

    Raises:
        BuildError: TensorRT cannot load the plan.
    """
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildError(f"TensorRT cannot load the plan that it has built: {plain_reason(errors)}")
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _configure(trt: Any, builder: Any, job: dict[str, Any], events: _Events) -> tuple[Any, list[Any], Any]:
    """Return the builder's configuration, the profiles stored in it, and the progress monitor.

    The monitor is None if the installed TensorRT does not support progress monitors. The caller must keep the monitor
    alive until the build ends.

    Raises:
        BuildError: TensorRT refuses a profile, or cannot build for one of the target GPUs.
    """
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # keeps layer names for inspecting a plan
    if workspace := job.get("workspace_bytes"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    profiles = []
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        profile.set_shape(job["input"], *(tuple(shape) for shape in shapes))
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"TensorRT refuses the profile {shapes}")
        profiles.append([list(shape) for shape in profile.get_shape(job["input"])])
    if job.get("refit"):
        config.set_flag(trt.BuilderFlag.REFIT)
    if job["library"] == "tensorrt_rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # required for capture in CUDA graphs
    targets = job.get("targets") or []
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            capability = getattr(trt.ComputeCapability, target, None)
            if capability is None or not config.set_compute_capability(capability, index):
                raise BuildError(f"this TensorRT cannot build for {target}")
    if cache := job.get("timing_cache"):
        stored = Path(cache).read_bytes() if Path(cache).exists() else b""
        timings = config.create_timing_cache(stored)
        if timings is None or not config.set_timing_cache(timings, False):  # the cache is for another GPU or version
            config.set_timing_cache(config.create_timing_cache(b""), False)
    monitor = None
    if hasattr(trt, "IProgressMonitor"):
        monitor = _monitor(trt, events)
        config.progress_monitor = monitor
    return config, profiles, monitor


def refit(trt: Any, job: dict[str, Any], events: _Events) -> dict[str, Any]:
    """Copy the plan `job["from"]` to `job["plan"]`, and replace its weights with those in the graph `job["onnx"]`.

    All three entries of `job` are file paths.

    Returns:
        A dictionary with the duration of the refit in seconds.

    Raises:
        BuildError: the plan cannot be loaded, was built without the refit flag, or was built from a different graph.
    """
    errors: list[str] = []
    logger = _logger(trt, errors)
    started = time.monotonic()
    events.send(phase="refit", parent=None, steps=1)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(Path(job["from"]).read_bytes())
    if engine is None:
        raise BuildError(f"{job['from']}: TensorRT cannot load it: {plain_reason(errors)}")
    if not engine.refittable:
        raise BuildError(f"{job['from']}: built without --refit, so its weights cannot be replaced")
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(job["onnx"]):
        reasons = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise BuildError(f"the plan was built from a different graph: {' | '.join(reasons[-3:] or errors[-3:])}")
    missing = list(refitter.get_missing_weights())
    if missing:
        raise BuildError(f"the new graph leaves {len(missing)} weights of the plan without values: {missing[:5]}")
    if not refitter.refit_cuda_engine():
        raise BuildError(f"the weights cannot be replaced: {plain_reason(errors)}")
    settings = engine.create_serialization_config()
    settings.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    Path(job["plan"]).write_bytes(engine.serialize_with_config(settings))
    return {"refit_s": round(time.monotonic() - started, 3)}


def main(job_file: str) -> int:
    """Run the job in the JSON file `job_file`, and return the exit status: 0 after success, 1 after a failure.

    The last line of output is a JSON object with the key "result" or "error".
    """
    events = _Events(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # the libraries also print to standard output
    job = json.loads(Path(job_file).read_text())
    try:
        library = find_library(job["library"])
        action = {"build": build, "refit": refit}[job["action"]]
        done = action(library.module, job, events)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        events.send(error=str(error))
        return 1
    events.send(result=done | {"library": library.name, "version": library.version})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
