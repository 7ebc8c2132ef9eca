"""Decides how many patches and threads a forward pass may have at most, if no setting gives these numbers.

On a GPU, the limit of patches is the largest batch for which engines are prepared. On a CPU, larger batches often only
make their images wait longer, and more threads may gain nothing. So both numbers are measured when a model is loaded
(`model/engines/pace.py`).
"""

import logging
from collections.abc import Callable
from typing import Final

import numpy as np

from model.artifact import Artifact
from model.cpus import available_cpus
from model.engines.pace import measure_batches, smallest_good, split_if_faster, with_fewer_threads
from model.engines.protocol import BUCKETS, Engine, FloatArray

log = logging.getLogger(__name__)

CPU_PATCHES: Final = 2048
"""The limit on a CPU before the measurement, and the largest batch that is measured. Eight images of 224 x 224."""


def unmeasured_limit(engine: Engine, artifact: Artifact) -> int:
    """Return the limit in patches that needs no measurement."""
    return BUCKETS[-1] * _patches_of_an_image(artifact) if engine.device == "cuda" else CPU_PATCHES


def measured_limit(engine: Engine, artifact: Artifact, run: Callable[[FloatArray], object]) -> int:
    """Measure batches of several sizes on a CPU, and return the limit in patches. On a GPU, nothing is measured.

    `run` runs a forward pass of the engine over pixels [B, 3, h, w]. No other thread may use the engine meanwhile.
    """
    patches = _patches_of_an_image(artifact)
    if engine.device == "cuda" or 2 * patches > CPU_PATCHES:
        return unmeasured_limit(engine, artifact)
    image = np.zeros((3, *artifact.manifest.input_size), np.float32)
    speeds = measure_batches(run, image, CPU_PATCHES // patches)
    batch = smallest_good(speeds)
    shown = ", ".join(f"{size}: {speed:.1f}" for size, speed in speeds.items())
    log.info("largest batch: %d (images/s by batch: %s)", batch, shown)
    return batch * patches


def with_useful_threads(engine: Engine, artifact: Artifact, reopen: Callable[[int], Engine]) -> tuple[Engine, int]:
    """Return an engine without the threads that gain nothing, and its number of threads. The engine is `engine`, or one
    that `reopen` has opened with a smaller number of threads. An engine that is not returned is closed. torch and GPUs
    keep all threads, because the number of torch's threads belongs to the process."""
    threads = available_cpus()
    if engine.device == "cuda" or engine.name == "torch":
        return engine, threads
    batch = max(1, CPU_PATCHES // _patches_of_an_image(artifact))
    pixels = np.zeros((batch, 3, *artifact.manifest.input_size), np.float32)
    chosen, useful = with_fewer_threads(engine, threads, reopen, pixels)
    if useful < threads:
        log.info("%d threads are as fast as %d, so a forward pass uses %d", useful, threads, useful)
    return chosen, useful


def with_split_batches(engine: Engine, artifact: Artifact, threads: int, reopen: Callable[[int], Engine]) -> Engine:
    """Return an engine that splits batches among its threads, or `engine` if this is not faster. Only ONNX Runtime on a
    CPU can run several passes of one engine at the same time."""
    if engine.name != "onnxruntime" or not 2 <= threads <= CPU_PATCHES // _patches_of_an_image(artifact):
        return engine
    pixels = np.zeros((threads, 3, *artifact.manifest.input_size), np.float32)
    chosen = split_if_faster(engine, threads, reopen, pixels)
    if chosen is not engine:
        log.info("each image of a batch uses one thread, because this is faster than all threads on one image")
    return chosen


def _patches_of_an_image(artifact: Artifact) -> int:
    height, width = artifact.manifest.input_size
    patch_size = artifact.manifest.config.patch_size
    return (height // patch_size) * (width // patch_size)
