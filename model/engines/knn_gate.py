"""The k-NN gate: checks that k-NN classification is about as accurate with an int8 graph as with the float32 model.

An int8 graph must pass this gate in addition to the parity check. The parity check limits the cosines between int8 and
float32 features, but cosines say little about which image is nearest. The gate classifies labelled images by their
nearest neighbours, once with int8 and once with float32 class tokens. `training/evaluate/knn.py` classifies in the same
way. `model` must not import `training`, so the code exists twice, and a test compares the two implementations.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from model.artifact import GateRecord
from model.engines.parity import BATCH, Image, pixels_at, unit_length
from model.engines.protocol import Engine, FloatArray
from model.folder import split_folder, walk
from model.preprocess import PreprocessSpec

KNN_K: Final = 20  # usually the best of 10, 20, 100 and 200
KNN_TEMPERATURE: Final = 0.07
MAX_VAL_LOSS: Final = 2  # maximum net loss of correctly classified images of val
MAX_TRAIN_LOSS: Final = 0.005  # maximum net loss as a share of train, leave-one-out
MIN_VAL: Final = 200  # images; with fewer, a loss of two images is not meaningful
MIN_TRAIN: Final = 500


@dataclass(frozen=True)
class LabelledImages:
    """The files in the folders `train/` and `val/`, each with the name of its class.

    The function `read` returns the pixels of a file, or None if the file is not an image.
    """

    train: Sequence[tuple[Path, str]]
    val: Sequence[tuple[Path, str]]
    read: Callable[[Path], Image | None]


@dataclass(frozen=True)
class ClassTokens:
    """The class tokens [n, D] and the class numbers [n] of the readable images in `train/` and in `val/`.

    n is the number of readable images in the respective folder, and D is the width of the model.
    """

    train: FloatArray
    train_labels: npt.NDArray[np.intp]
    val: FloatArray
    val_labels: npt.NDArray[np.intp]


def find_labelled(folder: Path, read: Callable[[Path], Image | None]) -> LabelledImages | None:
    """Return the labelled images in `folder`, or None if its subfolder `train/` or `val/` contains no images.

    Both subfolders contain one folder per class. Instead of `val/`, any name in `model.folder.HELD_OUT` may be used.
    """

    def files_of(part: str) -> list[tuple[Path, str]]:
        root = split_folder(folder, part)
        paths = [Path(listed.path).relative_to(root) for listed in walk(root) if listed.is_image]
        return [(root / path, path.parts[0]) for path in paths if len(path.parts) > 1]

    train, val = files_of("train"), files_of("val")
    return LabelledImages(train, val, read) if train and val else None


def class_tokens(engine: Engine, images: LabelledImages, spec: PreprocessSpec, size: tuple[int, int]) -> ClassTokens:
    """Return the class tokens that an engine computes for all labelled images, and their class numbers.

    Images are read one at a time and preprocessed according to `spec`, scaled to the input size `size` (H, W) in
    pixels.

    Raises:
        ValueError: `train/` or `val/` contains no file that can be read as an image.
    """
    numbers = {name: i for i, name in enumerate(sorted({name for _, name in [*images.train, *images.val]}))}

    def of(files: Sequence[tuple[Path, str]]) -> tuple[FloatArray, npt.NDArray[np.intp]]:
        labels: list[int] = []

        def readable() -> Iterator[FloatArray]:
            for path, name in files:
                if (image := images.read(path)) is not None:
                    labels.append(numbers[name])
                    yield pixels_at([image], spec, size)[0]

        tokens = [engine.run(np.stack(batch)).cls for batch in _batches(readable())]
        if not tokens:
            raise ValueError(f"{files[0][0].parent.parent}: none of the {len(files)} files can be read as an image")
        return np.concatenate(tokens), np.array(labels)

    return ClassTokens(*of(images.train), *of(images.val))


def _batches(pixels: Iterator[FloatArray]) -> Iterator[list[FloatArray]]:
    batch: list[FloatArray] = []
    for image in pixels:
        batch.append(image)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def knn_hits(
    train: FloatArray,
    train_labels: npt.NDArray[np.intp],
    test: FloatArray,
    test_labels: npt.NDArray[np.intp],
    ks: Sequence[int],
    *,
    leave_one_out: bool = False,
) -> npt.NDArray[np.bool_]:
    """Return, for each class token in `test` [m, D] and each of the K values in `ks`, whether k-NN on `train` [n, D]
    classifies it correctly, as bool [m, K].

    The k nearest images in `train` vote for their classes with weight exp(cosine / KNN_TEMPERATURE). If `train` has
    fewer than k images, all of them vote. If `leave_one_out` is True, `test` must be `train`, and no image votes for
    itself.
    """
    most = min(max(ks), len(train) - leave_one_out)
    n_classes = int(max(train_labels.max(), test_labels.max())) + 1
    unit_train, hits = unit_length(train), np.empty((len(test), len(ks)), np.bool_)
    for top in range(0, len(test), 1024):
        rows = np.arange(top, min(top + 1024, len(test)))
        similarity = unit_length(test[rows]) @ unit_train.T  # [rows, n]
        if leave_one_out:
            similarity[rows - top, rows] = -np.inf
        nearest = np.argpartition(-similarity, most - 1, axis=1)[:, :most]
        values = np.take_along_axis(similarity, nearest, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        nearest, values = np.take_along_axis(nearest, order, axis=1), np.take_along_axis(values, order, axis=1)
        weights, classes = np.exp(values / KNN_TEMPERATURE), train_labels[nearest]  # [rows, most]
        for column, k in enumerate(ks):
            votes = np.zeros((len(rows), n_classes))
            np.add.at(votes, (np.arange(len(rows))[:, None], classes[:, :k]), weights[:, :k])
            hits[rows, column] = votes.argmax(axis=1) == test_labels[rows]
    return hits


def knn_right(
    train: FloatArray,
    train_labels: npt.NDArray[np.intp],
    test: FloatArray,
    test_labels: npt.NDArray[np.intp],
    k: int = KNN_K,
    *,
    leave_one_out: bool = False,
) -> int:
    """Return how many class tokens in `test` [m, D] are classified correctly by k-NN on `train` [n, D].

    The arguments are those of `knn_hits`, with a single k.
    """
    return int(knn_hits(train, train_labels, test, test_labels, (k,), leave_one_out=leave_one_out).sum())


def knn_gate(reference: ClassTokens, candidate: ClassTokens) -> GateRecord:
    """Compare the k-NN accuracy of the int8 class tokens `candidate` with that of the float32 class tokens `reference`.

    If there are too few images, the status of the result is "failed" or "not measured", never "passed".
    """
    val, train = [], []
    for tokens in (reference, candidate):
        labelled = (tokens.train, tokens.train_labels)
        val.append(knn_right(*labelled, tokens.val, tokens.val_labels))
        train.append(knn_right(*labelled, *labelled, leave_one_out=True))
    n_val, n_train = len(reference.val_labels), len(reference.train_labels)
    finite = bool(np.isfinite(candidate.train).all() and np.isfinite(candidate.val).all())
    passed = finite and val[0] - val[1] <= MAX_VAL_LOSS and train[0] - train[1] <= MAX_TRAIN_LOSS * n_train
    enough = n_val >= MIN_VAL and n_train >= MIN_TRAIN
    few = "" if enough else f"too few images (at least {MIN_TRAIN} in train and {MIN_VAL} in val are needed): "
    return GateRecord(
        status="failed" if not passed else "passed" if enough else "not measured",
        reason=few
        + (
            f"k-NN (k={KNN_K}) on val {val[0]} -> {val[1]} of {n_val} images (may fall by {MAX_VAL_LOSS}), "
            f"leave-one-out on train {100 * train[0] / n_train:.2f} -> {100 * train[1] / n_train:.2f} % "
            f"(may fall by {100 * MAX_TRAIN_LOSS:g} points){'' if finite else '; some features are not finite'}"
        ),
        k=KNN_K,
        val_photos=n_val,
        val_right=(val[0], val[1]),
        train_photos=n_train,
        train_right=(train[0], train[1]),
    )


NO_LABELS: Final = GateRecord(
    status="not measured",
    reason="the export had no labelled images: add --images FOLDER with train/ and val/, one folder per class in each",
)
