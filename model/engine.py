"""What serving needs of a runtime: one small protocol, and the choice between its implementations.

An engine turns a batch of normalised pixels into all features of one forward pass. It is called by one worker thread
at a time. Concrete engines live in `engine_onnx.py` and `engine_torch.py` and are imported here only when chosen, so
that a server without torch never looks for it.

Legend: B batch, H x W pixels, N patches (row-major grid), R registers, D width.
"""

import logging
import os
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from model.artifact import Artifact

FloatArray = npt.NDArray[np.float32]
log = logging.getLogger(__name__)


class Features(NamedTuple):
    """All outputs of one forward pass, after the last LayerNorm, float32."""

    cls: FloatArray  # [B, D]
    patches: FloatArray  # [B, N, D]
    registers: FloatArray  # [B, R, D]


class Engine(Protocol):
    """A loaded model. `name` and `precision` say which runtime and number format answer."""

    name: str
    precision: str

    def run(self, pixels: FloatArray) -> Features:
        """Features of a batch of normalised pixels [B, 3, H, W].

        Raises:
            ValueError: a shape that this engine was not built for.
        """
        ...


ENGINES = ("onnxruntime", "torch")


def load_engine(artifact: Artifact, name: str = "auto", *, threads: int | None = None) -> Engine:
    """Load `artifact` in a runtime: "auto" is ONNX Runtime.

    Args:
        artifact: the verified artifact.
        name: "auto", "onnxruntime" or "torch".
        threads: CPU threads of one forward pass; None takes what the machine and its cgroup grant.

    Raises:
        ValueError: an unknown engine name, or `threads` below 1.
        ModuleNotFoundError: the runtime is not installed.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    n_threads = threads or available_cpus()
    if name in ("auto", "onnxruntime"):
        from model.engine_onnx import OnnxEngine

        engine: Engine = OnnxEngine(artifact.file("model.onnx"), threads=n_threads)
    elif name == "torch":
        from model.engine_torch import TorchEngine

        engine = TorchEngine(artifact.file("weights.safetensors"), artifact.manifest.config, threads=n_threads)
    else:
        raise ValueError(f"unknown engine {name!r}: one of auto, {', '.join(ENGINES)}")
    log.info("engine %s (%s), %d threads, model %s", engine.name, engine.precision, n_threads, artifact.name)
    return engine


def available_cpus() -> int:
    """CPUs this process may use: its affinity, cut by a cgroup v2 quota; at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):  # no cgroup v2 here: nothing cuts the affinity
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))
