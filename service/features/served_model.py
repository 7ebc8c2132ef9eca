"""The served artifact, and the data that vision tasks compute from it once and keep."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from model.artifact import Artifact
from model.config import ViTConfig
from model.heads.linear import layer_norm
from model.heads.record import NORM_EPS
from model.preprocess import PreprocessSpec
from service.errors import EngineFailed
from service.features.forward import Row

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ServedModel:
    """An artifact and the data computed from it once. Any thread may use it, unless a method says otherwise.

    `forward_zeros` runs a forward pass on zeros of the given height and width in pixels, and returns the patch features
    [N, D]. `forward_pixels` runs a forward pass on an input [3, h, w] and returns its features.
    """

    artifact: Artifact
    forward_zeros: Callable[[int, int], FloatArray] | None = field(default=None, compare=False)
    forward_pixels: Callable[[FloatArray], Row] | None = field(default=None, compare=False)
    derived: dict[tuple[Any, ...], Any] = field(default_factory=dict, compare=False)

    @property
    def config(self) -> ViTConfig:
        return self.artifact.manifest.config

    @cached_property
    def _norm(self) -> tuple[FloatArray, FloatArray]:
        weights = self.artifact.weights
        return weights["norm.weight"].astype(np.float32), weights["norm.bias"].astype(np.float32)

    def patches_of_zeros(self, height: int, width: int) -> FloatArray:
        """Return the patch features [N, D] of an input of zeros with this height and width in pixels. In the service,
        this must be called in a worker thread, because the event loop's thread starts the forward pass.

        Raises:
            EngineFailed: the forward pass failed, or this model has no engine.
        """
        if self.forward_zeros is None:
            raise EngineFailed("this model was loaded without an engine")
        return self.forward_zeros(height, width)

    def features_of(self, pixels: FloatArray) -> Row:
        """Return the features of an input [3, h, w] of the network. In the service, this must be called in a worker
        thread, because the event loop's thread starts the forward pass.

        Raises:
            EngineFailed: the forward pass failed, or this model has no engine.
        """
        if self.forward_pixels is None:
            raise EngineFailed("this model was loaded without an engine")
        return self.forward_pixels(pixels)

    def keep(self, key: tuple[Any, ...], value: Any, *, most: int) -> None:
        """Keep a value in `derived`. Among the values whose keys begin with the same part, only the latest `most` are
        kept."""
        self.derived[key] = value
        same_kind = [other for other in list(self.derived) if other[0] == key[0]]
        for old in same_kind[: max(0, len(same_kind) - most)]:
            self.derived.pop(old, None)

    def norm(self, tokens: FloatArray) -> FloatArray:
        """Apply the network's final LayerNorm to tokens [T, D], for instance to an inner output `tokens.<i>`."""
        return layer_norm(tokens, *self._norm, NORM_EPS)

    def spec(self, size: int | None) -> PreprocessSpec | None:
        """Return the preprocessing for a request with this `size`. The preprocessing resizes the whole image so that
        its short side has `size` pixels, rounded to a multiple of the patch size. If `size` is None, return None, which
        stands for the artifact's own preprocessing."""
        if size is None:
            return None
        own = self.artifact.manifest.preprocess
        return PreprocessSpec(resize=size, crop=None, patch_size=own.patch_size, mean=own.mean, std=own.std)
