"""The gate between an engine and the traffic: its numbers are compared with torch float32 before it may serve.

Four figures: the largest absolute difference of any output; the lowest cosine of a class token and of a patch token;
and how often the nearest other photo, by class token, stays the same. The last one is what a search user would notice.

Graphs of other sizes are compared on the same photos with the crop resized. Reference features are plain arrays, so
that the engine that made them can be let go before the next one is loaded: two copies of a large model do not fit.

An int8 graph has to pass one gate more, since cosines say little about which photo is nearest: k-NN classification of
labelled photos (`training/evaluate/knn.py` has the protocol and its source; `model` may not import it), with its class
tokens and with float32's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from model.artifact import ONNX, GateRecord, ParityRecord
from model.engines.protocol import Engine, Features, FloatArray
from model.preprocess import PreprocessSpec, preprocess

BATCH: Final = 4

Photo = npt.NDArray[np.uint8]  # RGB [H, W, 3]


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

KNN_K: Final = 20  # the usual best of the paper's
KNN_TEMPERATURE: Final = 0.07
MAX_VAL_LOSS: Final = 2  # photos of val that int8 may classify wrongly and float32 rightly, net
MAX_TRAIN_LOSS: Final = 0.005  # share of train, each photo among the others
MIN_VAL: Final = 200  # photos, below which losing two of them says nothing
MIN_TRAIN: Final = 500


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


def pixels_at(photos: Sequence[Photo], spec: PreprocessSpec, size: tuple[int, int]) -> FloatArray:
    """Photos as a graph of `size` (H, W) takes them, [B, 3, H, W]: the preprocessing with its crop resized.

    A size that is not square is cut from the centre of the square that holds it.
    """
    assert spec.crop is not None  # an artifact's graph has one size
    assert spec.resize is not None
    side = max(size)
    resized = spec.model_copy(update={"crop": side, "resize": round(spec.resize * side / spec.crop)})
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    square = np.stack([preprocess(photo, resized) for photo in photos])
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

    A batch above the number of photos holds some of them several times, so that each of its rows is compared.
    """
    n = len(pixels)
    assert n > 1, "nearest neighbours need two photos"
    rows = np.arange(max(n, batch)) % n
    found = features(candidate, pixels[rows], batch)
    error, cls, patches, _ = compare(Features(*(part[rows] for part in reference)), found)
    # The nearest other photo of one that is there twice would be itself.
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
    """Raise unless the record is within the limits of its precision (NaN is not). The gate of int8 is another matter.

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
            f"{record.engine} {record.precision} strays from {reference} on {record.images} photos: "
            f"max error {record.max_abs_error:.3g}{limit}, "
            f"class cosine {record.min_cosine_cls:.6f} (at least {limits.min_cosine_cls}), "
            f"patch cosine {record.min_cosine_patches:.6f} (at least {limits.min_cosine_patches})"
        )


@dataclass(frozen=True)
class LabelledPhotos:
    """Files of `train/` and `val/`, each with its class; `read` gives a file's pixels, or None if it is no photo."""

    train: Sequence[tuple[Path, str]]
    val: Sequence[tuple[Path, str]]
    read: Callable[[Path], Photo | None]


@dataclass(frozen=True)
class ClassTokens:
    """Class tokens [n, D] of the labelled photos that could be read, and their class numbers [n]."""

    train: FloatArray
    train_labels: npt.NDArray[np.intp]
    val: FloatArray
    val_labels: npt.NDArray[np.intp]


def find_labelled(folder: Path, read: Callable[[Path], Photo | None]) -> LabelledPhotos | None:
    """The labelled photos of a folder that holds `train/` and `val/`, each with a folder per class; None of another."""

    def files_of(part: str) -> list[tuple[Path, str]]:
        classes = sorted(path for path in (folder / part).glob("*") if path.is_dir())
        return [(file, c.name) for c in classes for file in sorted(c.rglob("*")) if file.is_file()]

    train, val = files_of("train"), files_of("val")
    return LabelledPhotos(train, val, read) if train and val else None


def class_tokens(engine: Engine, photos: LabelledPhotos, spec: PreprocessSpec, size: tuple[int, int]) -> ClassTokens:
    """Class tokens of all labelled photos at `size`, read one after the other."""
    numbers = {name: i for i, name in enumerate(sorted({name for _, name in [*photos.train, *photos.val]}))}

    def of(files: Sequence[tuple[Path, str]]) -> tuple[FloatArray, npt.NDArray[np.intp]]:
        labels: list[int] = []

        def readable() -> Iterator[FloatArray]:
            for path, name in files:
                if (photo := photos.read(path)) is not None:
                    labels.append(numbers[name])
                    yield pixels_at([photo], spec, size)[0]

        tokens = [engine.run(np.stack(batch)).cls for batch in _batches(readable())]
        if not tokens:
            raise ValueError(f"{files[0][0].parent.parent}: none of its {len(files)} files can be read as a photo")
        return np.concatenate(tokens), np.array(labels)

    return ClassTokens(*of(photos.train), *of(photos.val))


def _batches(images: Iterator[FloatArray]) -> Iterator[list[FloatArray]]:
    batch: list[FloatArray] = []
    for image in images:
        batch.append(image)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def knn_right(
    train: FloatArray,
    train_labels: npt.NDArray[np.intp],
    test: FloatArray,
    test_labels: npt.NDArray[np.intp],
    k: int = KNN_K,
    *,
    leave_one_out: bool = False,
) -> int:
    """How many of `test` [m, D] the k nearest of `train` [n, D] classify rightly, votes weighted by exp(cosine / T).

    With `leave_one_out` both are the same photos, and none is its own neighbour. Fewer than k photos all vote.
    """
    k = min(k, len(train) - leave_one_out)
    known, right = _unit(train), 0
    for top in range(0, len(test), 1024):
        rows = np.arange(top, min(top + 1024, len(test)))
        similarity = _unit(test[rows]) @ known.T  # [rows, n]
        if leave_one_out:
            similarity[rows - top, rows] = -np.inf
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / KNN_TEMPERATURE)
        votes = np.zeros((len(rows), int(max(train_labels.max(), test_labels.max())) + 1))
        np.add.at(votes, (np.arange(len(rows))[:, None], train_labels[nearest]), weights)
        right += int((votes.argmax(axis=1) == test_labels[rows]).sum())
    return right


def knn_gate(reference: ClassTokens, candidate: ClassTokens) -> GateRecord:
    """Whether k-NN with the candidate's class tokens is as good as with float32's; of few photos it can only fail."""
    val, train = [], []
    for tokens in (reference, candidate):
        known = (tokens.train, tokens.train_labels)
        val.append(knn_right(*known, tokens.val, tokens.val_labels))
        train.append(knn_right(*known, *known, leave_one_out=True))
    n_val, n_train = len(reference.val_labels), len(reference.train_labels)
    finite = bool(np.isfinite(candidate.train).all() and np.isfinite(candidate.val).all())
    passed = finite and val[0] - val[1] <= MAX_VAL_LOSS and train[0] - train[1] <= MAX_TRAIN_LOSS * n_train
    enough = n_val >= MIN_VAL and n_train >= MIN_TRAIN
    few = "" if enough else f"too few photos, at least {MIN_TRAIN} of train and {MIN_VAL} of val are needed: "
    return GateRecord(
        status="failed" if not passed else "passed" if enough else "not measured",
        reason=few
        + (
            f"k-NN of {KNN_K} on val {val[0]} -> {val[1]} of {n_val} photos (may fall by {MAX_VAL_LOSS}), "
            f"leave-one-out on train {100 * train[0] / n_train:.2f} -> {100 * train[1] / n_train:.2f} % "
            f"(may fall by {100 * MAX_TRAIN_LOSS:g} points){'' if finite else '; not every feature is finite'}"
        ),
        k=KNN_K,
        val_photos=n_val,
        val_right=(val[0], val[1]),
        train_photos=n_train,
        train_right=(train[0], train[1]),
    )


NO_LABELS: Final = GateRecord(
    status="not measured",
    reason="the export had no labelled photos: --images FOLDER with train/ and val/, a folder per class in each",
)


def _min_cosine(a: FloatArray, b: FloatArray) -> float:
    dot = np.sum(a * b, axis=-1, dtype=np.float64)
    norms = np.linalg.norm(a, axis=-1).astype(np.float64) * np.linalg.norm(b, axis=-1)
    return float(np.min(dot / np.maximum(norms, 1e-12)))


def _unit(vectors: FloatArray) -> FloatArray:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float32)


def _nearest_other(cls: FloatArray) -> npt.NDArray[np.intp]:
    unit = _unit(cls)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return np.asarray(similarity.argmax(axis=1))
