"""The gate between an engine and the traffic: its numbers are compared with torch float32 before it may serve.

Four figures: the largest absolute difference of any output; the lowest cosine of a class token and of a patch token;
and how often the nearest other photo, by class token, stays the same. The last one is what a search user would notice.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.artifact import ParityRecord
from model.engine import Engine, Features, FloatArray
from model.preprocess import PreprocessSpec, preprocess


@dataclass(frozen=True)
class ParityLimits:
    """What an engine of one precision must reach."""

    max_abs_error: float
    min_cosine_cls: float
    min_cosine_patches: float


LIMITS = {"fp32": ParityLimits(max_abs_error=1e-3, min_cosine_cls=0.99999, min_cosine_patches=0.9999)}


class ParityError(ValueError):
    """An engine strays from the reference; the message has every figure and its limit."""


def sample_photos(count: int = 16, seed: int = 0) -> list[npt.NDArray[np.uint8]]:
    """Deterministic pictures (uint8 [H, W, 3]): coloured waves with noise, of several sizes and aspects."""
    rng = np.random.default_rng(seed)
    photos = []
    for _ in range(count):
        height, width = rng.integers(180, 420, 2)
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        channels = []
        for _ in range(3):
            fy, fx, phase = rng.uniform(0.01, 0.2), rng.uniform(0.01, 0.2), rng.uniform(0, 6.28)
            wave = np.sin(fy * y + fx * x + phase) + 0.1 * rng.standard_normal((height, width))
            channels.append(127.5 + 100 * wave)
        photos.append(np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8))
    return photos


def compare(reference: Features, candidate: Features) -> tuple[float, float, float, float]:
    """(max abs error, lowest class cosine, lowest patch cosine, share of equal nearest neighbours) of two batches."""
    error = max(
        float(np.abs(ours - theirs).max(initial=0.0)) for ours, theirs in zip(candidate, reference, strict=True)
    )
    agreement = float(np.mean(_nearest_other(candidate.cls) == _nearest_other(reference.cls)))
    return (
        error,
        _min_cosine(reference.cls, candidate.cls),
        _min_cosine(reference.patches, candidate.patches),
        agreement,
    )


def measure(
    reference: Engine, candidate: Engine, photos: list[npt.NDArray[np.uint8]], spec: PreprocessSpec
) -> ParityRecord:
    """Run both engines on `photos` (uint8 [H, W, 3], at least two) and compare all outputs."""
    assert len(photos) > 1, "nearest neighbours need two photos"
    pixels = np.stack([preprocess(photo, spec) for photo in photos])
    error, cls, patches, agreement = compare(_run(reference, pixels), _run(candidate, pixels))
    return ParityRecord(
        engine=candidate.name,
        precision=candidate.precision,
        images=len(photos),
        max_abs_error=error,
        min_cosine_cls=cls,
        min_cosine_patches=patches,
        neighbour_agreement=agreement,
    )


def check(record: ParityRecord) -> None:
    """Raise unless the record is within the limits of its precision (NaN is not).

    Raises:
        ParityError: the engine must not serve.
    """
    limits = LIMITS[record.precision]
    passed = (
        record.max_abs_error <= limits.max_abs_error
        and record.min_cosine_cls >= limits.min_cosine_cls
        and record.min_cosine_patches >= limits.min_cosine_patches
    )
    if not passed:
        raise ParityError(
            f"{record.engine} {record.precision} strays from torch float32 on {record.images} photos: "
            f"max error {record.max_abs_error:.3g} (limit {limits.max_abs_error:g}), "
            f"class cosine {record.min_cosine_cls:.6f} (at least {limits.min_cosine_cls}), "
            f"patch cosine {record.min_cosine_patches:.6f} (at least {limits.min_cosine_patches})"
        )


def _run(engine: Engine, pixels: FloatArray, batch: int = 4) -> Features:
    """All features of `pixels` in small batches, so that parity of a large model fits in memory."""
    parts = [engine.run(pixels[i : i + batch]) for i in range(0, len(pixels), batch)]
    return Features(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def _min_cosine(a: FloatArray, b: FloatArray) -> float:
    dot = np.sum(a * b, axis=-1, dtype=np.float64)
    norms = np.linalg.norm(a, axis=-1).astype(np.float64) * np.linalg.norm(b, axis=-1)
    return float(np.min(dot / np.maximum(norms, 1e-12)))


def _nearest_other(cls: FloatArray) -> npt.NDArray[np.intp]:
    unit = cls / np.maximum(np.linalg.norm(cls, axis=1, keepdims=True), 1e-12)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return np.asarray(similarity.argmax(axis=1))
