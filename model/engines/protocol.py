"""What serving needs from a runtime: a small protocol, and the record that an engine is opened from.

An engine turns a batch of normalised pixels into all features of one forward pass. One worker thread calls it at a
time. Each runtime has a file `*_engine.py` in this folder that provides `fault` and `open` (`EngineFile`), and a row in
`runtimes.py`. These files import their runtime only when they open an engine, so a server without torch never imports
it.

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
    """A loaded model. `name` and `precision` identify runtime and number format; `device` is "cpu" or "cuda".

    A GPU engine has separate kernels for each batch size in `BUCKETS`.
    """

    name: str
    precision: str
    device: str

    def run(self, pixels: FloatArray) -> Features:
        """Compute the features of a batch of normalised pixels [B, 3, H, W].

        Raises:
            ValueError: the engine was not built for this shape.
        """
        ...

    def close(self) -> None:
        """Release the memory, including the GPU's. The engine cannot run afterwards."""
        ...


@dataclass(frozen=True)
class OpenRequest:
    """The parameters for opening an engine.

    `runtime` and `precision` come from `runtimes.RUNTIMES`. `device` applies to runtimes that support both devices;
    None means a GPU if there is one. With `few_passes` the engine should use less memory and may be slower.
    """

    artifact: Artifact
    runtime: str
    precision: str
    threads: int
    device: Literal["cpu", "cuda"] | None = None
    few_passes: bool = False


class EngineFile(Protocol):
    """The interface of a runtime's file."""

    def fault(self, request: OpenRequest) -> str | None:
        """Return why the engine cannot serve from this artifact or on this host, on one line; None if no reason is
        known.

        The call is cheap: it loads neither the runtime nor the model. The caller checks for a GPU.
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
    """One engine that was tried at startup, with the outcome on one line."""

    engine: str  # runtime:precision
    outcome: Literal["serves", "passed over"]
    reason: str


@dataclass(frozen=True)
class Choice:
    """The serving engine, and all attempts in order."""

    engine: Engine
    tried: tuple[Tried, ...]


BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes that have a CUDA graph on a GPU. Other batches are padded up; larger ones are split."""


def bucket_of(batch: int) -> int:
    """Return the smallest bucket that holds a batch of 1 to 64."""
    return next(bucket for bucket in BUCKETS if bucket >= batch)
