"""Embed images with an artifact, one at a time and on one thread, so that embeddings do not depend on other images."""

from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.artifact import load_artifact
from model.engines.choice import load_engine
from model.pooling import PATCH_PARTS, Pooling, pool
from model.preprocess import preprocess
from training.curate.table import Pixels

ENGINE = "onnxruntime:fp32"

FloatArray = npt.NDArray[np.float32]


class Embedder:
    """A model that embeds images."""

    def __init__(self, artifact: Path, pooling: Pooling, derived_dir: Path) -> None:
        """Load an artifact.

        Args:
            artifact: the artifact's folder.
            pooling: the features that form the embedding.
            derived_dir: a folder for graphs that the artifact lacks.

        Raises:
            ValueError, OSError: the artifact cannot be used. The message gives the reason.
        """
        loaded = load_artifact(artifact, derived_dir=derived_dir)
        self._engine, self._spec = load_engine(loaded, ENGINE, threads=1), loaded.manifest.preprocess
        self._pooling: Pooling = pooling

    def __call__(self, pixels: Pixels) -> FloatArray:
        """Return the embedding [D], of length 1, of an upright RGB image [H, W, 3].

        Raises:
            ValueError: the model returns an embedding that is not finite, or has the length 0.
        """
        features = self._engine.run(preprocess(pixels, self._spec)[None])
        parts = {"cls": features.cls, **{name: part(features.patches) for name, part in PATCH_PARTS.items()}}
        pooled = pool(parts, self._pooling, unit=unit, join=partial(np.concatenate, axis=-1))
        return unit(pooled)[0]


def unit(vectors: FloatArray) -> FloatArray:
    """Return vectors [..., D] with length 1.

    Raises:
        ValueError: a vector is not finite or has the length 0.
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ValueError("the model's features are not finite or all 0")
    return (vectors / lengths).astype(np.float32)
