"""The protocol that every engine implements, and the types that describe how an engine was opened and chosen.

An engine computes all features of a batch of normalised pixels in one forward pass. Only one thread calls an engine at
a time. Each runtime is implemented in a file `*_engine.py` in this folder with the functions `fault` and `open` (see
`EngineFile`), and has a row in `runtimes.py`. These files import their runtime only when they open an engine, so a
server that does not use torch never imports torch.

An engine may also return *inner outputs*, from which attention maps and the results of heads are computed. Each inner
output is float32 [B, T, D], with the T tokens in the order class, registers, patches:

    queries.<i>, keys.<i>   the queries and keys of block i, the A heads side by side
    tokens.<i>              the tokens after block i, before the final norm

Legend: B batch, H x W pixels, N patches (row-major grid), R registers, T = 1 + R + N tokens, D width, A heads.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from model.artifact import Artifact

FloatArray = npt.NDArray[np.float32]


class Features(NamedTuple):
    """The tokens of a batch of images after the last LayerNorm, as float32 arrays."""

    cls: FloatArray  # [B, D]
    patches: FloatArray  # [B, N, D]
    registers: FloatArray  # [B, R, D]


class Engine(Protocol):
    """A model that is loaded in a runtime.

    `name` is the name of the runtime, and `precision` is the number format. `device` is "cpu" or "cuda". An engine
    that uses CUDA graphs pads a batch to one of the sizes in `BUCKETS`.
    """

    name: str
    precision: str
    device: str

    def run(self, pixels: FloatArray) -> Features:
        """Compute the features of a batch of normalised pixels [B, 3, H, W].

        Raises:
            ValueError: the engine does not accept this shape.
        """
        ...

    def can_run(self, size: tuple[int, int], outputs: Collection[str]) -> bool:
        """Return whether `run_outputs` accepts pixels of this size (H, W) and returns the outputs with these names."""
        ...

    def run_outputs(self, pixels: FloatArray, names: Sequence[str]) -> dict[str, FloatArray]:
        """Run a batch of normalised pixels [B, 3, H, W] once, and return the outputs in `names`, keyed by name.

        The names are the fields of `Features` and the names of inner outputs.

        Raises:
            ValueError: the engine does not accept this shape, or cannot return one of the outputs.
        """
        ...

    def close(self) -> None:
        """Release the engine's memory, including memory on the GPU. The engine cannot run afterwards."""
        ...


@dataclass(frozen=True)
class OpenRequest:
    """The parameters for opening an engine.

    `runtime` is a name in `runtimes.RUNTIMES`, and `precision` is one of its precisions. `threads` is the number of CPU
    threads per forward pass. `device` applies only to runtimes that run on both CPU and GPU. If `device` is None, these
    runtimes use a GPU when the host has one. If `few_passes` is True, the engine will run only a few times, so it
    should save memory rather than time.
    """

    artifact: Artifact
    runtime: str
    precision: str
    threads: int
    device: Literal["cpu", "cuda"] | None = None
    few_passes: bool = False


class EngineFile(Protocol):
    """The functions that a file `*_engine.py` provides for its runtimes."""

    def fault(self, request: OpenRequest) -> str | None:
        """Return the reason why an engine cannot serve this artifact on this host, or None if no reason is known.

        The reason is one line. The function loads neither the runtime nor the model. It does not check whether the host
        has a GPU, because the caller does that.
        """
        ...

    def open(self, request: OpenRequest) -> Engine:
        """Import the runtime, load the model, and return the engine.

        Raises:
            ValueError, OSError, RuntimeError: the engine cannot serve. The message gives the reason.
            ModuleNotFoundError: the runtime is not installed.
        """
        ...


class Tried(NamedTuple):
    """One engine that was tried at startup, with the outcome and the reason for this outcome."""

    engine: str  # runtime:precision
    outcome: Literal["serves", "passed over"]
    reason: str


@dataclass(frozen=True)
class Choice:
    """The chosen engine, and all engines that were tried, in order."""

    engine: Engine
    tried: tuple[Tried, ...]


BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64)
"""The batch sizes for which an engine captures CUDA graphs.

Such an engine pads other batches to the next size, and splits batches above 64 images.
"""


def bucket_of(batch: int) -> int:
    """Return the smallest size in `BUCKETS` that is at least `batch`, which must be from 1 to 64."""
    return next(bucket for bucket in BUCKETS if bucket >= batch)
