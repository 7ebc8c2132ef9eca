"""The protocol of engines, which serving calls, and the types that describe how an engine was chosen.

An engine computes all features of a batch of normalised pixels in one forward pass. Only one thread calls it at a time.
Each runtime has a file `*_engine.py` in this folder with the functions `fault` and `open` (see `EngineFile`), and a row
in `runtimes.py`. These files import their runtime only when they open an engine, so a server that does not use torch
never imports it.

Legend: B batch, H x W pixels, N patches (row-major grid), R registers, D width.
"""

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from model.artifact import Artifact

FloatArray = npt.NDArray[np.float32]


class Features(NamedTuple):
    """The float32 tokens of one forward pass, after the last LayerNorm."""

    cls: FloatArray  # [B, D]
    patches: FloatArray  # [B, N, D]
    registers: FloatArray  # [B, R, D]


class Engine(Protocol):
    """A model that is loaded in a runtime.

    `name` identifies the runtime and `precision` the number format. `device` is "cpu" or "cuda". On a GPU, an engine
    pads every batch to one of the sizes in `BUCKETS`.
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
        """Release the engine's memory, including memory on the GPU. The engine cannot run afterwards."""
        ...


@dataclass(frozen=True)
class OpenRequest:
    """The parameters for opening an engine.

    `runtime` and `precision` are a name and a precision from `runtimes.RUNTIMES`. `threads` is the number of CPU
    threads per forward pass. `device` applies to runtimes that support both devices; None means a GPU if the host has
    one. If `few_passes` is True, the engine should use less memory and may be slower.
    """

    artifact: Artifact
    runtime: str
    precision: str
    threads: int
    device: Literal["cpu", "cuda"] | None = None
    few_passes: bool = False


class EngineFile(Protocol):
    """The functions that each runtime's file `*_engine.py` provides."""

    def fault(self, request: OpenRequest) -> str | None:
        """Return why the engine cannot serve from this artifact or on this host, or None if no reason is known.

        The reason has one line. The call loads neither the runtime nor the model. The caller checks for a GPU.
        """
        ...

    def open(self, request: OpenRequest) -> Engine:
        """Import the runtime, load the model, and return the engine.

        Raises:
            ValueError, OSError, RuntimeError: the engine cannot serve. The message says why.
            ModuleNotFoundError: the runtime is not installed.
        """
        ...


class Tried(NamedTuple):
    """One engine that was tried at startup, with the outcome and its reason."""

    engine: str  # runtime:precision
    outcome: Literal["serves", "passed over"]
    reason: str


@dataclass(frozen=True)
class Choice:
    """The serving engine, and all engines that were tried, in order."""

    engine: Engine
    tried: tuple[Tried, ...]


BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64)
"""The batch sizes for which a GPU engine has a CUDA graph. Other batches are padded to the next size, and batches above
64 are split.
"""


def bucket_of(batch: int) -> int:
    """Return the smallest size in `BUCKETS` that is at least `batch` (1 to 64)."""
    return next(bucket for bucket in BUCKETS if bucket >= batch)
