"""Builds a TensorRT plan on the host that will run it, and stores the plan if it passes the parity check.

The graph is derived from the artifact's weights in the plan's precision, because TensorRT takes all number formats from
the graph. The plan is built in a separate process (`model/engines/tensorrt_build.py`), loaded in the same way as for
serving, and compared with a reference engine on images at every serving batch size, because each profile has its own
kernels. If the results differ too much, only the metrics are stored (see `model/engines/tensorrt_plans.py`).

A refit puts the weights of a retrained model into a copy of a plan that was built with `refit=True`. A refit is faster
than a build. The new plan is checked and stored in the same way as a built one.
"""

import datetime
import hashlib
import json
import logging
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.artifact import Artifact, ParityRecord
from model.engines import parity, tensorrt_build
from model.engines.protocol import BUCKETS, Engine
from model.engines.tensorrt_build import BuildError, count_fused_attention
from model.engines.tensorrt_plans import (
    PROFILES,
    PlanKey,
    PlanMissing,
    PlanPrecision,
    PlanRecord,
    Toolchain,
    figures,
    file_digest,
    graph_identity,
    graph_spec,
    make_key,
    plan_path,
    read_plan,
    remember_graph,
    write_plan,
)
from model.files import write_bytes
from model.onnx_graph.build import write_onnx

logger = logging.getLogger(__name__)

Progress = Callable[[Mapping[str, Any]], None]
"""A function that receives the events of a build. An event has the keys "phase", "parent" and "steps" at the start of a
phase, "phase" and "step" during it, and "phase" and "done" at its end.
"""

LOG_TAIL_LINES = 12


@dataclass(frozen=True)
class BuildOptions:
    """The options for building a plan.

    If `refit` is True, the plan's weights can be replaced later. If `refit_from` is the path of a plan that was built
    with `refit`, this plan is copied and given the artifact's weights, and nothing is built. `timing_cache` is the file
    in which the full TensorRT library stores its kernel measurements. `photos` are the images for the parity check,
    uint8 [H, W, 3]. `activations` contains the largest absolute input of each linear layer, which fp8 requires. The
    build is stopped after `time_limit_s` seconds. If `rebuild` is True, a plan is built even if a plan with the same
    key exists.
    """

    precision: PlanPrecision = "bf16"
    refit: bool = False
    refit_from: Path | None = None
    timing_cache: Path | None = None
    photos: Sequence[npt.NDArray[np.uint8]] = field(default_factory=parity.sample_photos)
    activations: Mapping[str, float] | None = None
    time_limit_s: float = 3600.0
    rebuild: bool = False


JobRunner = Callable[..., dict[str, Any]]
EngineMaker = Callable[[bytes, Toolchain, PlanPrecision, Path], Engine]
"""A function that loads a plan into an engine. The path is the file in which the engine stores compiled kernels."""


def build_plan(
    artifact: Artifact,
    toolchain: Toolchain,
    reference: Engine,
    folder: Path,
    options: BuildOptions,
    *,
    progress: Progress = lambda event: None,
    run: JobRunner | None = None,
    make_engine: EngineMaker | None = None,
) -> tuple[Path, PlanRecord]:
    """Build or refit a plan for `artifact` and this host, compare it with `reference`, and store it in `folder`.

    Args:
        reference: an engine that runs the artifact in float32 on the CPU.
        folder: the folder of plans. It is created if missing.
        progress: a function that is called with each event of the build.
        run: the function that runs the build or refit job. If None, `run_job` is used.
        make_engine: the function that loads the plan. If None, the plan is loaded into a `TensorRTEngine`.

    Returns:
        The path of the plan and its record. An existing plan is reused unless `options.rebuild` is True.

    Raises:
        BuildError (a ValueError): TensorRT cannot build or refit the plan. The message gives the reason.
        ParityError (a ValueError): the plan's results differ too much from the reference. Only the metrics are stored.
        OSError: the folder cannot be written.
    """
    run, make_engine = run or run_job, make_engine or _load
    folder.mkdir(parents=True, exist_ok=True)
    spec = graph_spec(artifact, options.precision, toolchain.library)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as temporary:
        work = Path(temporary)
        names = write_onnx(
            artifact.weights, artifact.manifest.config, spec, work / "graph.onnx", activations=options.activations
        )
        onnx_sha256 = file_digest([work / name for name in names])
        key = make_key(onnx_sha256, options.precision, toolchain, refit=options.refit or bool(options.refit_from))
        if (existing := None if options.rebuild else _existing(folder, key)) is not None:
            remember_graph(folder, graph_identity(artifact, spec), onnx_sha256)
            return existing
        job = _job_here(artifact, toolchain, options, work / names[0])
        done = run(job, work, time_limit_s=options.time_limit_s, progress=progress)
        plan = (work / "plan").read_bytes()
        _store_timings(work / "timings", options.timing_cache)
        if options.refit_from is None:  # a refit changes no kernels
            check_fusion(toolchain.library.name, _fused(plan, done), artifact.manifest.config.depth)
        progress({"phase": "parity", "parent": None, "steps": len(BUCKETS)})
        candidate = make_engine(plan, toolchain, options.precision, work / "kernels")
        try:
            records = measure_batches(reference, candidate, artifact, options.photos)
        finally:
            candidate.close()  # the engine that will serve needs the GPU's memory
        record = _record(artifact, key, plan, records, reference, done)
        path = write_plan(folder, plan if record.passed else None, record)
        if record.passed and (work / "kernels").exists():
            (work / "kernels").replace(path.with_suffix(".jit"))  # so the first start does not compile them again
    remember_graph(folder, graph_identity(artifact, spec), onnx_sha256)
    _check_passed(record, path)
    return path, record


def _job_here(artifact: Artifact, toolchain: Toolchain, options: BuildOptions, onnx: Path) -> dict[str, Any]:
    """Return the job that builds a plan for this host from the graph file `onnx`. The plan is written beside it."""
    return make_job(
        toolchain.library.name,
        onnx,
        onnx.with_name("plan"),
        artifact.manifest.input_size,
        options,
        targets=targets_of(toolchain),
        workspace_bytes=_workspace(toolchain),
    )


def _check_passed(record: PlanRecord, path: Path) -> None:
    precision, said = record.key.precision, figures(record.parity)
    if not record.passed:
        limits = parity.LIMITS[precision]
        raise parity.ParityError(
            f"the {precision} plan differs too much from {record.reference} and was not stored: {said}; "
            f"at least {limits.min_cosine_cls} and {limits.min_cosine_patches} are required. "
            f"The metrics are in {path.with_suffix('.json')}"
        )
    logger.info("plan %s (%s): %s", path, precision, said)


def _existing(folder: Path, key: PlanKey) -> tuple[Path, PlanRecord] | None:
    """Return the path and the record of the stored plan with this key, or None if there is no valid plan."""
    try:
        record = read_plan(folder, key)[1]
    except PlanMissing as missing:
        logger.info("%s", missing)
        return None
    return plan_path(folder, key), record


def targets_of(toolchain: Toolchain) -> list[str]:
    """Return the compute capabilities for which TensorRT should build, such as ["SM89"].

    The list is empty for the full TensorRT library, which builds for the GPU of this host. The list is also empty if
    TensorRT for RTX has no name for the GPU's capability, for example SM90. According to its documentation, a plan
    without a target runs on compute capability 8.0, 8.6, 8.9, 12.0 "and later". In any case, the library checks a plan
    when it loads the plan.
    """
    if toolchain.library.name != "tensorrt_rtx":
        return []
    name = "SM{}{}".format(*toolchain.gpu.capability)
    return [name] if hasattr(toolchain.library.module.ComputeCapability, name) else []


def _workspace(toolchain: Toolchain) -> int | None:
    """Return the number of bytes that the builder may use on the GPU for the kernels that it tries.

    The result is half of the free memory, because by default the full TensorRT library uses all of it, and a service on
    the same GPU may need some at any time. The result is None for TensorRT for RTX, which builds without the GPU.
    """
    return None if toolchain.library.name == "tensorrt_rtx" else toolchain.cuda.free_memory() // 2


def _store_timings(new: Path, cache: Path | None) -> None:
    """Copy the library's new kernel measurements, if it wrote any, to the file `cache` for the next build."""
    if cache is None or not new.exists():
        return
    try:
        write_bytes(cache, new.read_bytes())
    except OSError as error:  # it only slows down the next build
        logger.warning("%s: cannot store kernel measurements: %s", cache, error.strerror)


def make_job(
    library: str,
    onnx: Path,
    plan: Path,
    size: tuple[int, int],
    options: BuildOptions,
    *,
    targets: Sequence[str] = (),
    workspace_bytes: int | None = None,
) -> dict[str, Any]:
    """Return the job that `model/engines/tensorrt_build.py` runs, as a dictionary that can be stored as JSON.

    `onnx` is the path of the graph, `plan` is the path of the plan to write, and `size` is the input size (H, W) in
    pixels. `workspace_bytes` limits the GPU memory for the kernels that the builder tries.
    """
    job: dict[str, Any] = {"library": library, "onnx": str(onnx), "plan": str(plan)}
    if options.refit_from is not None:
        return job | {"action": "refit", "from": str(options.refit_from.resolve())}
    shapes = [[[batch, 3, *size] for batch in profile] for profile in PROFILES]
    job |= {"action": "build", "input": "pixels", "profiles": shapes, "refit": options.refit}
    job |= {"targets": list(targets), "workspace_bytes": workspace_bytes}
    if options.timing_cache is not None and library == "tensorrt":  # RTX builds without measurements
        job["timing_cache"] = str(options.timing_cache.resolve())
        job["new_timings"] = str(plan.with_name("timings"))
    return job


def run_job(job: Mapping[str, Any], folder: Path, *, time_limit_s: float, progress: Progress) -> dict[str, Any]:
    """Run one job in a separate process and return its result.

    Args:
        job: the job that `make_job` returned.
        folder: the folder to which the job and its log are written.
        time_limit_s: the time in seconds after which the process is killed.
        progress: a function that is called with each event.

    Raises:
        BuildError: the process failed, was killed by a signal, or took longer than `time_limit_s`.
    """
    job_file, log = folder / "job.json", folder / "build.log"
    job_file.write_text(json.dumps(job))
    # -P: otherwise the script's folder is searched first, and its files hide modules of the same names.
    command = [sys.executable, "-P", str(Path(tensorrt_build.__file__).resolve()), str(job_file)]
    late = threading.Event()
    with (
        log.open("wb") as errors,
        subprocess.Popen(  # noqa: S603 - our own file, no shell
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder
        ) as process,
    ):

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(time_limit_s, stop)
        timer.start()
        try:
            assert process.stdout is not None
            last = _follow(process.stdout, progress)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
    if late.is_set():
        raise BuildError(f"the build took longer than {time_limit_s:g} s and was stopped. {_tail(log)}")
    if code < 0:
        raise BuildError(
            f"the build was killed by {_signal_name(-code)}: TensorRT crashed on this graph, or memory ran out. "
            f"{_tail(log)}"
        )
    if "error" in last:
        raise BuildError(str(last["error"]))
    if code != 0 or "result" not in last:
        raise BuildError(f"the build ended with status {code} and no result. {_tail(log)}")
    result: dict[str, Any] = last["result"]
    return result


def _follow(lines: Iterable[str], progress: Progress) -> dict[str, Any]:
    """Parse each line as JSON, call `progress` with each object that has a "phase", and return the last object."""
    last: dict[str, Any] = {}
    for line in lines:
        last = json.loads(line)
        if "phase" in last:
            progress(last)
    return last


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"Its log ends: {' | '.join(lines[-LOG_TAIL_LINES:])}" if lines else "Its log is empty."


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def check_fusion(library: str, fused: int, depth: int) -> None:
    """Check that a plan has one fused attention kernel per transformer block and profile.

    `fused` is the number of fused attention kernels in the plan, and `depth` is the number of blocks. If a plan of the
    full TensorRT library has fewer, this is only logged as a warning. Such a plan may be slow, but its results are
    compared in any case, and the names by which its kernels are counted have not been seen on a GPU yet.

    Raises:
        BuildError: a TensorRT for RTX plan does not have `depth` times the number of profiles.
    """
    wanted = depth * len(PROFILES)
    if fused == wanted:
        return
    message = (
        f"the plan has {fused} fused attention kernels, and {depth} blocks with {len(PROFILES)} profiles need {wanted}"
    )
    if library == "tensorrt_rtx":
        raise BuildError(f"attention was not fused: {message}")
    if fused < wanted:
        logger.warning("attention may not be fused, which makes the plan slow: %s", message)


def _fused(plan: bytes, done: Mapping[str, Any]) -> int:
    """Return the number of fused attention kernels, as the build counted them or as the bytes of the plan name them."""
    return int(done.get("fused_attention", count_fused_attention(plan)))


def measure_batches(
    reference: Engine, candidate: Engine, artifact: Artifact, photos: Sequence[npt.NDArray[np.uint8]]
) -> list[ParityRecord]:
    """Compare `candidate` with `reference` at every batch size in `BUCKETS`, and return one record per size.

    `photos` are the images for the comparison, uint8 [H, W, 3].

    Raises:
        ValueError: `photos` has fewer than two images.
    """
    if len(photos) < 2:
        raise ValueError(f"parity needs at least two images, not {len(photos)}")
    pixels = parity.pixels_at(photos, artifact.manifest.preprocess, artifact.manifest.input_size)
    expected = parity.features(reference, pixels)
    return [parity.measure(expected, candidate, pixels, batch=batch) for batch in BUCKETS]


def _record(
    artifact: Artifact,
    key: PlanKey,
    plan: bytes,
    records: list[ParityRecord],
    reference: Engine,
    done: Mapping[str, Any],
) -> PlanRecord:
    return PlanRecord(
        key=key,
        artifact=artifact.name,
        size=artifact.manifest.input_size,
        sha256=hashlib.sha256(plan).hexdigest(),
        bytes=len(plan),
        passed=all(_within_limits(record) for record in records),
        parity=records,
        reference=f"{reference.name} {reference.precision}",
        fused_attention=_fused(plan, done),
        build=dict(done),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _within_limits(record: ParityRecord) -> bool:
    try:
        parity.check(record)
    except parity.ParityError:
        return False
    return True


def _load(plan: bytes, toolchain: Toolchain, precision: PlanPrecision, kernels: Path) -> Engine:
    from model.engines.tensorrt_engine import TensorRTEngine

    return TensorRTEngine(plan, toolchain, precision, jit_cache=kernels)
