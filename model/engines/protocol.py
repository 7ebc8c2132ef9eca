"""What serving needs of a runtime: one small protocol, the names of the runtimes, and how one is asked for.

An engine turns a batch of normalised pixels into all features of one forward pass. It is called by one worker thread
at a time. Concrete engines live in `engine_*.py` and are imported by `engine_choice.py` only when their turn comes, so
that a server without torch never looks for it.

Legend: B batch, H x W pixels, N patches (row-major grid), R registers, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from model.artifact import Artifact

FloatArray = npt.NDArray[np.float32]


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


class Tried(NamedTuple):
    """One engine that was tried at the start, and what came of it, in one line."""

    engine: str  # runtime:precision
    outcome: Literal["serves", "passed over"]
    reason: str


@dataclass(frozen=True)
class Choice:
    """The engine that serves, and everything that was tried, in order."""

    engine: Engine
    tried: tuple[Tried, ...]


BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64)
"""Batches that a GPU has CUDA graphs for; others are padded up, larger ones cut."""

RUNTIMES: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("fp32", "fp16", "bf16", "int8"),
    "onnxruntime-cuda": ("bf16", "fp16", "fp32"),
    "onnxruntime-tensorrt": ("bf16", "fp16"),
    "torch": ("fp32", "bf16"),
    "tensorrt": ("bf16", "fp16", "fp8"),
}
"""Runtimes with their precisions; the first is meant when none is given."""


def bucket_of(batch: int) -> int:
    """The smallest bucket that a batch of 1 to 64 fits into."""
    return next(bucket for bucket in BUCKETS if bucket >= batch)


def parse_engine(name: str) -> tuple[str, str]:
    """`runtime[:precision]` as (runtime, precision); `auto` and `fastest` have no precision ("").

    Raises:
        ValueError: an unknown runtime, or a precision that it does not have.
    """
    runtime, colon, precision = name.partition(":")
    if name in ("auto", "fastest"):
        return name, ""
    if runtime not in RUNTIMES:
        raise ValueError(f"unknown engine {name!r}: one of auto, fastest, {', '.join(RUNTIMES)}")
    if colon and precision not in RUNTIMES[runtime]:
        raise ValueError(f"engine {name!r}: {runtime} computes in {', '.join(RUNTIMES[runtime])}")
    return runtime, precision or RUNTIMES[runtime][0]


def load_engine(
    artifact: Artifact,
    name: str = "auto",
    *,
    threads: int | None = None,
    photos: Sequence[npt.NDArray[np.uint8]] | None = None,
) -> Engine:
    """The engine that `model.engines.choice.choose_engine` chooses; see there."""
    from model.engines.choice import choose_engine

    return choose_engine(artifact, name, threads=threads, photos=photos).engine
