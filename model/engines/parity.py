"""The gate between an engine and the traffic: its numbers are compared with torch float32 before it may serve.

Four figures: the largest absolute difference of any output; the lowest cosine of a class token and of a patch token;
and how often the nearest other image, by class token, stays the same. The last one is what a search user would notice.

Graphs of other sizes are compared on the same images with the crop resized. Reference features are plain arrays, so
that the engine that made them can be let go before the next one is loaded: two copies of a large model do not fit.

An int8 graph has to pass `knn_gate.py` as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from model.artifact import ONNX, GateRecord, ParityRecord
from model.engines.protocol import Engine, Features, FloatArray
from model.preprocess import PreprocessSpec, preprocess

BATCH: Final = 4

Image = npt.NDArray[np.uint8]  # RGB [H, W, 3]


@dataclass(frozen=True)
class ParityLimits:
    """What an engine of one precision must reach."""

    max_abs_error: float
    min_cosine_cls: float
    min_cosine_patches: float


_HALF = ParityLimits(max_abs_error=np.inf, min_cosine_cls=0.999, min_cosine_patches=0.998)
LIMITS = {
    "fp32": ParityLimits(max_abs_error=1e-3, min_cosine_cls=0.99999, min_cosine_patches=0.9999),
    "fp16": _HALF,
    "bf16": _HALF,
    "fp8": _HALF,
    "int8": ParityLimits(max_abs_error=np.inf, min_cosine_cls=0.998, min_cosine_patches=0.998),
}


class ParityError(ValueError):
    """An engine strays from the reference; the message has every figure and its limit."""


def sample_photos(count: int = 16, seed: int = 0) -> list[Image]:
    """Deterministic images (uint8 [H, W, 3]): coloured waves with noise, of several sizes and aspects."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        height, width = rng.integers(180, 420, 2)
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        channels = []
        for _ in range(3):
            fy, fx, phase = rng.uniform(0.01, 0.2), rng.uniform(0.01, 0.2), rng.uniform(0, 6.28)
            wave = np.sin(fy * y + fx * x + phase) + 0.1 * rng.standard_normal((height, width))
            channels.append(127.5 + 100 * wave)
        images.append(np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8))
    return images


def compare(reference: Features, candidate: Features) -> tuple[float, float, float, float]:
    """(max abs error, lowest class cosine, lowest patch cosine, share of equal nearest neighbours) of two batches."""
    # numpy's maximum keeps a NaN, Python's may lose it.
    error = float(
        np.max([np.abs(ours - theirs).max(initial=0.0) for ours, theirs in zip(candidate, reference, strict=True)])
    )
    agreement = float(np.mean(_nearest_other(candidate.cls) == _nearest_other(reference.cls)))
    return (
        error,
        _min_cosine(reference.cls, candidate.cls),
        _min_cosine(reference.patches, candidate.patches),
        agreement,
    )


def pixels_at(images: Sequence[Image], spec: PreprocessSpec, size: tuple[int, int]) -> FloatArray:
    """Images as a graph of `size` (H, W) takes them, [B, 3, H, W]: the preprocessing with its crop resized.

    A size that is not square is cut from the centre of the square that holds it.
    """
    assert spec.crop is not None  # an artifact's graph has one size
    assert spec.resize is not None
    side = max(size)
    resized = spec.model_copy(update={"crop": side, "resize": round(spec.resize * side / spec.crop)})
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    square = np.stack([preprocess(image, resized) for image in images])
    return np.ascontiguousarray(square[:, :, top : top + size[0], left : left + size[1]])


def features(engine: Engine, pixels: FloatArray, batch: int = BATCH) -> Features:
    """All features of `pixels`, by default in small batches, so that parity of a large model fits in memory."""
    parts = [engine.run(pixels[i : i + batch]) for i in range(0, len(pixels), batch)]
    return Features(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def measure(
    reference: Features,
    candidate: Engine,
    pixels: FloatArray,
    *,
    batch: int = BATCH,
    file: str = ONNX,
    size: tuple[int, int] | None = None,
    gate: GateRecord | None = None,
) -> ParityRecord:
    """Run `candidate` on `pixels` [B, 3, H, W] (at least two) and compare all outputs with the reference's.

    A batch above the number of images holds some of them several times, so that each of its rows is compared.
    """
    n = len(pixels)
    assert n > 1, "nearest neighbours need two images"
    rows = np.arange(max(n, batch)) % n
    found = features(candidate, pixels[rows], batch)
    error, cls, patches, _ = compare(Features(*(part[rows] for part in reference)), found)
    # The nearest other image of one that is there twice would be itself.
    agreement = compare(reference, Features(*(part[:n] for part in found)))[3]
    return ParityRecord(
        engine=candidate.name,
        precision=candidate.precision,
        images=n,
        max_abs_error=error,
        min_cosine_cls=cls,
        min_cosine_patches=patches,
        neighbour_agreement=agreement,
        file=file,
        size=size,
        batch=batch,
        gate=gate,
    )


def with_extras(
    record: ParityRecord, reference: dict[str, FloatArray], candidate: dict[str, FloatArray]
) -> ParityRecord:
    """The record with further outputs in its figures: the error, and as patch tokens every vector of theirs."""
    errors = [float(np.abs(candidate[name] - theirs).max()) for name, theirs in reference.items()]
    cosines = [_min_cosine(theirs, candidate[name]) for name, theirs in reference.items()]
    return record.model_copy(
        update={
            "max_abs_error": float(np.max([record.max_abs_error, *errors])),  # a NaN stays
            "min_cosine_patches": float(np.min([record.min_cosine_patches, *cosines])),
        }
    )


def check(record: ParityRecord, reference: str = "torch float32") -> None:
    """Raise unless the record is within the limits of its precision (NaN is not). The gate of int8 is not looked at.

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
        limit = f" (limit {limits.max_abs_error:g})" if np.isfinite(limits.max_abs_error) else ""
        raise ParityError(
            f"{record.engine} {record.precision} strays from {reference} on {record.images} images: "
            f"max error {record.max_abs_error:.3g}{limit}, "
            f"class cosine {record.min_cosine_cls:.6f} (at least {limits.min_cosine_cls}), "
            f"patch cosine {record.min_cosine_patches:.6f} (at least {limits.min_cosine_patches})"
        )


def _min_cosine(a: FloatArray, b: FloatArray) -> float:
    dot = np.sum(a * b, axis=-1, dtype=np.float64)
    norms = np.linalg.norm(a, axis=-1).astype(np.float64) * np.linalg.norm(b, axis=-1)
    return float(np.min(dot / np.maximum(norms, 1e-12)))


def unit_length(vectors: FloatArray) -> FloatArray:
    """Each row [n, D] scaled to length 1; a zero row stays zero."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float32)


def _nearest_other(cls: FloatArray) -> npt.NDArray[np.intp]:
    unit = unit_length(cls)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return np.asarray(similarity.argmax(axis=1))
