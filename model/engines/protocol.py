"""What serving needs of a runtime: one small protocol, and the record that an engine is opened from.

An engine turns a batch of normalised pixels into all features of one forward pass. It is called by one worker thread
at a time. Each runtime has a file `*_engine.py` in this folder that offers `fault` and `open` (`EngineFile`), and a row
in `runtimes.py`. These files import their runtime only when they open an engine, so a server without torch never looks
for it.

Legend: B batch, H x W pixels, N patches (row-major grid), R registers, D width.
"""

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
    """A loaded model. `name` and `precision` say which runtime and number format answer; `device` is "cpu" or "cuda".

    A GPU engine has kernels of its own for each batch size of `BUCKETS`.
    """

    name: str
    precision: str
    device: str

    def run(self, pixels: FloatArray) -> Features:
        """Features of a batch of normalised pixels [B, 3, H, W].

        Raises:
            ValueError: a shape that this engine was not built for.
        """
        ...

    def close(self) -> None:
        """Give the memory back, a GPU's in particular. The engine cannot run afterwards."""
        ...


@dataclass(frozen=True)
class OpenRequest:
    """What an engine is opened from.

    `runtime` and `precision` are of `runtimes.RUNTIMES`. `device` is for runtimes that take either; None takes a GPU
    if there is one. An engine that is opened for few passes may be slower and should need less memory.
    """

    artifact: Artifact
    runtime: str
    precision: str
    threads: int
    device: Literal["cpu", "cuda"] | None = None
    few_passes: bool = False


class EngineFile(Protocol):
    """What the file of a runtime offers."""

    def fault(self, request: OpenRequest) -> str | None:
        """Why the engine cannot serve from this artifact or on this host, in one line; None if nothing is known.

        Cheap: neither the runtime nor the model is loaded. Whether there is a GPU is asked elsewhere.
        """
        ...

    def open(self, request: OpenRequest) -> Engine:
        """Import the runtime and load the model.

        Raises:
            ValueError, OSError, RuntimeError: the engine cannot serve; the message says why.
            ModuleNotFoundError: the runtime is not installed.
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


def bucket_of(batch: int) -> int:
    """The smallest bucket that a batch of 1 to 64 fits into."""
    return next(bucket for bucket in BUCKETS if bucket >= batch)
