"""Runs forward passes, and splits their results into the features of each image.

The serving engine runs most images. Some requests choose their own input size or need inner outputs (see
`model/engines/protocol.py`), which the serving engine may not support. A second engine (see `model/engines/general.py`)
runs the images of such requests. It is opened when the first of them arrives.

Legend: B images in a batch, P parts (see model/pooling.py), D width of the model, N patches, R registers, T = 1 + R + N
tokens, h x w size of the network's input.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.engines.protocol import Engine, Features
from model.pooling import PATCH_PARTS
from service.errors import EngineFailed

FloatArray = npt.NDArray[np.float32]


class Row(NamedTuple):
    """The features of one image from a forward pass. All arrays except `parts` are views into the arrays of the whole
    batch."""

    parts: FloatArray  # [P, D]
    patches: FloatArray  # [N, D]
    registers: FloatArray  # [R, D]
    outputs: Mapping[str, FloatArray]  # inner outputs by name, each [T, D]
    by_serving: bool  # False if the second engine computed the row

    @property
    def tokens(self) -> int:
        """The number of tokens: class, registers, patches."""
        return 1 + len(self.registers) + len(self.patches)


class Forward:
    """The engines of a service, combined into one function from pixels to rows. Only one thread at a time may call it.

    `open_general` opens the engine for images that `engine` cannot run. If it is None, such images fail with
    `EngineFailed`.
    """

    def __init__(self, engine: Engine, open_general: Callable[[], Engine] | None = None) -> None:
        self._engine = engine
        self._open_general = open_general
        self._general: Engine | None = None

    def __call__(self, pixels: FloatArray, names: tuple[str, ...] = ()) -> list[Row]:
        """Run one forward pass over pixels [B, 3, h, w], and return the features of each image, with the inner outputs
        in `names`.

        Raises:
            EngineFailed: a feature is not finite, or no engine can run the images.
        """
        engine = self._engine_for((pixels.shape[2], pixels.shape[3]), names)
        inner: dict[str, FloatArray] = {}
        if names:
            inner = engine.run_outputs(pixels, (*Features._fields, *names))
            features = Features(*(inner.pop(name) for name in Features._fields))
        else:
            features = engine.run(pixels)  # [B, D], [B, N, D], [B, R, D]
        parts = compute_parts(features)
        if not np.isfinite(parts).all():  # the mean is finite only if all patches are
            raise EngineFailed("the engine's features are not finite")
        return [
            Row(
                p.copy(),
                features.patches[i],
                features.registers[i],
                {name: out[i] for name, out in inner.items()},
                engine is self._engine,
            )
            for i, p in enumerate(parts)
        ]

    def close(self) -> None:
        """Release the second engine. The serving engine stays open, because its owner closes it."""
        if self._general is not None:
            self._general.close()

    def _engine_for(self, size: tuple[int, int], names: tuple[str, ...]) -> Engine:
        """Return an engine that accepts inputs of this size (h, w) and can return the inner outputs in `names`."""
        if self._engine.can_run(size, names):
            return self._engine
        if self._general is None:
            if self._open_general is None:
                raise EngineFailed("no engine of this service can run this input size or return inner outputs")
            self._general = self._open_general()
        return self._general


def compute_parts(features: Features) -> FloatArray:
    """For each image of a batch, compute the vectors that are later pooled: the class token and the mean of the patch
    tokens. Return them as [B, P, D], in the order of `PARTS`."""
    return np.stack([features.cls, *(part(features.patches) for part in PATCH_PARTS.values())], axis=1)
