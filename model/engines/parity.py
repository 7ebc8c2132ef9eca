"""The parity check: compares an engine's features with those of a float32 reference before the engine may serve.

The check computes four metrics: the largest absolute difference in any output, the lowest cosine between class tokens,
the lowest cosine between patch tokens, and the share of images for which both engines find the same nearest neighbour
by class token. Search results would visibly change if this share were low.

Graphs for input sizes other than the artifact's are compared on the same images, resized and cropped to the graph's
size. Two copies of a large model may not fit into memory, so the reference features are plain arrays, and the reference
engine can be closed before the other engine is loaded.

An int8 graph must also pass the k-NN gate in `knn_gate.py`.
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
    """The limits on an engine's metrics. Each precision has its own limits."""

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
    """The error raised when an engine's results differ too much from the reference. The message gives the metrics."""


def sample_photos(count: int = 16, seed: int = 0) -> list[Image]:
    """Generate `count` images (uint8 [H, W, 3]) of coloured waves with noise, in different sizes.

    The images are the same in every call with the same `seed`.
    """
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
    """Compare the features that two engines computed from the same images.

    Returns:
        The largest absolute difference, the lowest cosine between class tokens, the lowest cosine between patch tokens,
            and the share of images for which both engines find the same nearest neighbour among the other images.
    """
    # np.max propagates NaN. Python's max may not.
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
    """Preprocess images for a graph with input size `size` (H, W), and return the pixels [B, 3, H, W].

    The sizes in `spec` are scaled so that each image becomes a square of side max(H, W). If H and W differ, the central
    H x W pixels of the square are returned.
    """
    assert spec.crop is not None  # an artifact's input is always a square
    side = max(size)
    resize = None if spec.resize is None else round(spec.resize * side / spec.crop)
    resized = spec.model_copy(update={"crop": side, "resize": resize})
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    square = np.stack([preprocess(image, resized) for image in images])
    return np.ascontiguousarray(square[:, :, top : top + size[0], left : left + size[1]])


def features(engine: Engine, pixels: FloatArray, batch: int = BATCH) -> Features:
    """Run `engine` on `pixels` [B, 3, H, W] in batches of `batch` images, and return the features of all images.

    The default batch is small, so that the parity check of a large model fits into memory.
    """
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
    """Run `candidate` on `pixels` [B, 3, H, W], and compare its features with `reference`.

    `pixels` must contain at least two images. If `batch` is larger than the number of images, images are repeated to
    fill one batch. `file`, `size` and `gate` are only copied into the returned record.
    """
    n = len(pixels)
    assert n > 1, "nearest neighbours need two images"
    rows = np.arange(max(n, batch)) % n
    outputs = features(candidate, pixels[rows], batch)
    error, cls, patches, _ = compare(Features(*(part[rows] for part in reference)), outputs)
    # Repeated images are left out here, because the nearest image of each would be its copy.
    agreement = compare(reference, Features(*(part[:n] for part in outputs)))[3]
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
    """Return a copy of `record` that also takes the optional outputs of both engines into account.

    `reference` and `candidate` contain the optional outputs, keyed by name. The copy's largest absolute difference and
    lowest patch cosine include these outputs.
    """
    errors = [float(np.abs(candidate[name] - theirs).max()) for name, theirs in reference.items()]
    cosines = [_min_cosine(theirs, candidate[name]) for name, theirs in reference.items()]
    return record.model_copy(
        update={
            "max_abs_error": float(np.max([record.max_abs_error, *errors])),  # propagates NaN
            "min_cosine_patches": float(np.min([record.min_cosine_patches, *cosines])),
        }
    )


def check(record: ParityRecord, reference: str | None = None) -> None:
    """Check the metrics in `record` against the limits for its precision. A NaN is always outside the limits.

    The k-NN gate for int8 is not checked. `reference` is the name of the reference engine in the error message. If it
    is None, `record.reference` is used.

    Raises:
        ParityError: a metric is outside its limit, so the engine must not serve.
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
            f"{record.engine} {record.precision} differs too much from {reference or record.reference} on "
            f"{record.images} images: max error {record.max_abs_error:.3g}{limit}, "
            f"class cosine {record.min_cosine_cls:.6f} (at least {limits.min_cosine_cls}), "
            f"patch cosine {record.min_cosine_patches:.6f} (at least {limits.min_cosine_patches})"
        )


def _min_cosine(a: FloatArray, b: FloatArray) -> float:
    dot = np.sum(a * b, axis=-1, dtype=np.float64)
    norms = np.linalg.norm(a, axis=-1).astype(np.float64) * np.linalg.norm(b, axis=-1)
    return float(np.min(dot / np.maximum(norms, 1e-12)))


def unit_length(vectors: FloatArray) -> FloatArray:
    """Return `vectors` [n, D] with each row scaled to length 1. A row of zeros is unchanged."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float32)


def _nearest_other(cls: FloatArray) -> npt.NDArray[np.intp]:
    unit = unit_length(cls)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return np.asarray(similarity.argmax(axis=1))
