"""Compute the features of every pooling for a set of images, for benchmarks and tests."""

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
    """Return the features of n images for each pooling, in float32 on the CPU.

    The shape is [n, D], where D is the width of the model, or [n, 2D] for the pooling cls+mean. Each half of a cls+mean
    vector has length 1.

    Raises:
        ValueError: an image cannot be read.
    """
    features = compute_features(model, paths, spec, forward=ForwardSettings(batch_size))
    if features.skipped:
        raise ValueError(f"{features.skipped[0].name}: {features.skipped[0].reason}")
    return {pooling: features.pooled(pooling) for pooling in POOLINGS}
