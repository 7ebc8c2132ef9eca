"""An engine that runs the images of a batch side by side, each with one thread.

If several threads share a forward pass, they wait for each other after every operation, and for the slowest of them:
the one whose core also decodes an image. Passes of one thread each never wait. So they process more images per second,
but a single image takes longer. `SplitEngine` therefore splits only batches, which are formed while images wait
(docs/decisions/0055-decoding-beside-the-engine.md).
"""

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from model.engines.protocol import Engine, Features, FloatArray


class SplitEngine:
    """An engine made of two of the same runtime and precision. It implements `model.engines.protocol.Engine`.

    Args:
        engine: an engine with `threads` threads per pass. It runs what cannot be split evenly.
        single: an engine with one thread per pass. Several threads must be able to call its method `run` at the same
            time.
        threads: the number of images that run side by side.
    """

    def __init__(self, engine: Engine, single: Engine, threads: int) -> None:
        self.name, self.precision, self.device = engine.name, engine.precision, engine.device
        self._engine, self._single, self._threads = engine, single, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="engine")

    def run(self, pixels: FloatArray) -> Features:
        """Compute the features of a batch of normalised pixels [B, 3, H, W].

        Raises:
            ValueError: the engines do not accept the shape.
        """
        split = len(pixels) - len(pixels) % self._threads
        if not split:
            return self._engine.run(pixels)
        done = list(self._pool.map(self._single.run, np.split(pixels[:split], split)))
        if split < len(pixels):
            done.append(self._engine.run(pixels[split:]))
        return Features(*(np.concatenate(arrays) for arrays in zip(*done, strict=True)))

    def can_run(self, size: tuple[int, int], outputs: Collection[str]) -> bool:
        return self._engine.can_run(size, outputs)

    def run_outputs(self, pixels: FloatArray, names: Sequence[str]) -> dict[str, FloatArray]:
        return self._engine.run_outputs(pixels, names)

    def close_single(self) -> Engine:
        """Release the engine with one thread, and return the other one."""
        self._pool.shutdown()
        self._single.close()
        return self._engine

    def close(self) -> None:
        """Release both engines. They cannot run afterwards."""
        self.close_single().close()
