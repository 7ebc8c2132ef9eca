"""The served artifact, with the data that vision tasks derive from it and keep."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from model.artifact import Artifact
from model.config import ViTConfig
from model.preprocess import PreprocessSpec
from service.errors import EngineFailed

FloatArray = npt.NDArray[np.float32]

NORM_EPS = 1e-6


@dataclass(frozen=True)
class ServedModel:
    """An artifact and what is computed from it once. Any thread may use it, except where a method says otherwise.

    `forward_zeros` runs an input of zeros with a height and width in pixels, and returns its patch features [N, D].
    """

    artifact: Artifact
    forward_zeros: Callable[[int, int], FloatArray] | None = field(default=None, compare=False)
    derived: dict[tuple[Any, ...], Any] = field(default_factory=dict, compare=False)

    @property
    def config(self) -> ViTConfig:
        return self.artifact.manifest.config

    @cached_property
    def _norm(self) -> tuple[FloatArray, FloatArray]:
        weights = self.artifact.weights
        return weights["norm.weight"].astype(np.float32), weights["norm.bias"].astype(np.float32)

    def patches_of_zeros(self, height: int, width: int) -> FloatArray:
        """Return the patch features [N, D] of a network's input of zeros. In the service, this must be called in a
        worker thread, because the event loop's thread starts the forward pass.

        Raises:
            EngineFailed: the forward pass failed, or this model has no engine.
        """
        if self.forward_zeros is None:
            raise EngineFailed("this model was loaded without an engine")
        return self.forward_zeros(height, width)

    def keep(self, key: tuple[Any, ...], value: Any, *, most: int) -> None:
        """Keep a value in `derived`. At most `most` values are kept whose keys have the same first part."""
        self.derived[key] = value
        same_kind = [other for other in list(self.derived) if other[0] == key[0]]
        for old in same_kind[: max(0, len(same_kind) - most)]:
            self.derived.pop(old, None)

    def norm(self, tokens: FloatArray) -> FloatArray:
        """Apply the last LayerNorm of the network to tokens [T, D], for instance to an inner output `tokens.<i>`."""
        weight, bias = self._norm
        centred = tokens - tokens.mean(axis=-1, keepdims=True)
        deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + NORM_EPS)
        return np.asarray(centred / deviation * weight + bias, np.float32)

    def spec(self, size: int | None) -> PreprocessSpec | None:
        """Return the preprocessing for a request with this `size`. It resizes the whole image so that its short side
        has `size` pixels, rounded to a multiple of the patch size. If `size` is None, return None, which means the
        preprocessing of the artifact."""
        if size is None:
            return None
        own = self.artifact.manifest.preprocess
        return PreprocessSpec(resize=size, crop=None, patch_size=own.patch_size, mean=own.mean, std=own.std)
