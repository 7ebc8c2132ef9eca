"""The served artifact, with the data that vision tasks derive from it and keep."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from model.artifact import Artifact
from model.config import ViTConfig
from model.preprocess import PreprocessSpec

FloatArray = npt.NDArray[np.float32]

NORM_EPS = 1e-6


@dataclass(frozen=True)
class ServedModel:
    """An artifact and what is computed from it once. Any thread may use it."""

    artifact: Artifact

    @property
    def config(self) -> ViTConfig:
        return self.artifact.manifest.config

    @cached_property
    def _norm(self) -> tuple[FloatArray, FloatArray]:
        weights = self.artifact.weights
        return weights["norm.weight"].astype(np.float32), weights["norm.bias"].astype(np.float32)

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
