"""The features of every pooling for a set of images, for benchmarks and tests. All images must be readable."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from model.pooling import POOLINGS, Pooling
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.data.dataset import Photo
from training.evaluate.features import ForwardSettings, compute_features


def extract_features(
    model: DinoVisionTransformer, paths: Sequence[Path | Photo], spec: PreprocessSpec, batch_size: int = 64
) -> dict[Pooling, Tensor]:
    """Return features [n, D] (cls+mean: [n, 2D]) of images, float32 on the CPU. Each half of cls+mean has unit length.

    Raises:
        ValueError: an image cannot be read.
    """
    features = compute_features(model, paths, spec, forward=ForwardSettings(batch_size))
    if features.skipped:
        raise ValueError(f"{features.skipped[0].name}: {features.skipped[0].reason}")
    return {pooling: features.pooled(pooling) for pooling in POOLINGS}
