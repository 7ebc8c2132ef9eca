"""k-NN classification on frozen features. It is the only evaluation in DINO and DINOv2 that needs no training.

The protocol is that of facebookresearch/dinov2 (`dinov2/eval/knn.py`). Features are L2-normalised. For each test image,
the k most similar training images vote for their classes with weight exp(cosine / 0.07), and the class with the largest
sum of weights wins. Meta's code also divides the weights by their sum over the 200 nearest images, which changes no
result. Meta's code resizes the short side to 256 pixels and crops the central 224. This module uses the model's own
preprocessing, which is reported with every result.

Similarities are computed in blocks, and only the k nearest images of each test image are stored. The full similarity
matrix is therefore never in memory.

Legend: n training images, m test images, D features, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.pooling import POOLINGS, Pooling
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.data.dataset import Photo, label_of
from training.evaluate.features import ImageFeatures, compute_features
from training.evaluate.meaning import NoMeaning, check_classification, check_finite, usable_ks

PathOrPhoto = TypeVar("PathOrPhoto", bound=Path | Photo)
TEMPERATURE = 0.07
HELD_OUT = "the held-out part"
EVALUATED_KS = (1, 10, 20)  # of evaluations during training
KS = (10, 20, 100, 200)  # as in the paper's tables; 20 is usually the best


def nearest(
    train: Tensor, test: Tensor, k: int, *, leave_one_out: bool = False, rows: int = 1024, columns: int = 65_536
) -> tuple[Tensor, Tensor]:
    """Find the k most similar training images of each test image, by cosine similarity.

    Args:
        train: features of the n training images, [n, D]; they need not be normalised.
        test: features of the m test images, [m, D]; they need not be normalised.
        k: number of neighbours, at most n (n - 1 with `leave_one_out`).
        leave_one_out: True if the test images are the training images. No image is then its own neighbour.
        rows: number of test images in one block of similarities; a block takes 4 * rows * columns bytes.
        columns: number of training images in one block.

    Returns:
        the cosine similarities, [m, k] in descending order, and the positions of the neighbours in `train`, [m, k].

    Raises:
        ValueError: a feature is not finite.
    """
    check_finite(train=train, test=test)
    n, m = len(train), len(test)
    assert k <= n - int(leave_one_out)
    assert n == m or not leave_one_out
    values, indices = torch.empty(m, k, device=test.device), torch.empty(m, k, dtype=torch.long, device=test.device)
    for top in range(0, m, rows):
        queries = F.normalize(test[top : top + rows].float(), dim=1)
        best = torch.empty(len(queries), 0, device=test.device)
        where = torch.empty(len(queries), 0, dtype=torch.long, device=test.device)
        for left in range(0, n, columns):
            similarity = queries @ F.normalize(train[left : left + columns].float(), dim=1).T  # [rows, columns]
            if leave_one_out:
                first, last = max(top, left), min(top + len(queries), left + similarity.shape[1])
                same = torch.arange(first, max(first, last))  # images that are in both the rows and the columns
                similarity[same - top, same - left] = -torch.inf
            block = similarity.topk(min(k, similarity.shape[1]), dim=1)
            best, where = torch.cat((best, block.values), dim=1), torch.cat((where, block.indices + left), dim=1)
            kept = best.topk(min(k, best.shape[1]), dim=1)
            best, where = kept.values, where.gather(1, kept.indices)
        values[top : top + rows], indices[top : top + rows] = best, where
    return values, indices


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    *,
    leave_one_out: bool = False,
    rows: int = 1024,
    columns: int = 65_536,
) -> dict[int, float]:
    """Compute the share of test images that k-NN classifies correctly, for each k.

    Args:
        train: features of the n training images, [n, D]; they need not be normalised.
        train_labels: class numbers of the training images, [n].
        test: features of the m test images, [m, D]; they need not be normalised.
        test_labels: class numbers of the test images, [m].
        ks: values of k, the number of neighbours. If k is larger than the number of training images, all training
            images vote.
        leave_one_out: True if the test images are the training images. No image is then its own neighbour.
        rows: number of test images in one block, see `nearest`.
        columns: number of training images in one block, see `nearest`.
    """
    most = len(train) - int(leave_one_out)
    values, indices = nearest(
        train, test, min(max(ks), most), leave_one_out=leave_one_out, rows=rows, columns=columns
    )  # [m, k]
    weights, votes_for = (values / TEMPERATURE).exp(), train_labels[indices]
    n_classes = int(torch.cat((train_labels, test_labels)).max()) + 1
    accuracy = {}
    for k in ks:
        right = 0
        for top in range(0, len(test), rows):
            part = slice(top, top + rows)
            votes = torch.zeros(len(values[part]), n_classes, device=test.device)
            votes.scatter_add_(1, votes_for[part, :k], weights[part, :k])
            right += int((votes.argmax(dim=1) == test_labels[part]).sum())
        accuracy[k] = right / len(test)
    return accuracy


def labels_of(photos: Sequence[Path | Photo], classes: dict[str, int] | None = None) -> tuple[Tensor, dict[str, int]]:
    """Return the class number of each image, and a dictionary that maps labels to class numbers.

    The label of a path is the name of the folder that contains the file. `classes` contains labels that already have a
    number. Other labels get the next numbers.

    Raises:
        ValueError: an image has no label. `with_labels` leaves such images out.
    """
    classes = dict(classes or {})
    numbers = [classes.setdefault(label_of(photo), len(classes)) for photo in photos]
    return torch.tensor(numbers, dtype=torch.long), classes


def with_labels(photos: Sequence[PathOrPhoto], part: str) -> tuple[list[PathOrPhoto], list[str]]:
    """Return the images that have a label, in the same order, and a note with the number of other images.

    The notes are a list of at most one entry. `part` is the name of the images in the note.
    """
    kept = [photo for photo in photos if isinstance(photo, Path) or photo.label is not None]
    n = len(photos) - len(kept)
    return kept, [f"{n} of {len(photos)} images of {part} have no label and are left out"] if n else []


def neighbours_for(ks: Sequence[int], most: int) -> tuple[tuple[int, ...], list[str]]:
    """Return the values of k up to the number of neighbours `most`, and a note that names the other values.

    Raises:
        NoMeaning: all values of k are above `most`.
    """
    usable, notes = usable_ks(ks, most, figure="k-NN", reason=f"an image has only {most} neighbours")
    if not usable:
        raise NoMeaning(f"{notes[0]}, and no other k was given")
    return usable, notes


@dataclass(frozen=True)
class LabelledFeatures:
    """The features of the readable, labelled images of two parts, and their class numbers [n] and [m]."""

    train: ImageFeatures
    train_labels: Tensor
    test: ImageFeatures
    test_labels: Tensor

    def accuracy(self, pooling: Pooling, ks: Sequence[int], device: torch.device) -> dict[int, float]:
        """Compute the k-NN accuracy on the test images, with the training images as neighbours, for each k."""
        train, test = (features.pooled(pooling).to(device) for features in (self.train, self.test))
        return knn_accuracy(train, self.train_labels.to(device), test, self.test_labels.to(device), ks)

    def together(self) -> tuple[Tensor, Tensor]:
        """Return the class tokens and the class numbers of all images."""
        tokens = [features.pooled("cls") for features in (self.train, self.test)]
        return torch.cat(tokens), torch.cat((self.train_labels, self.test_labels))


def labelled_features(
    model: DinoVisionTransformer,
    train: Sequence[Path | Photo],
    test: Sequence[Path | Photo],
    spec: PreprocessSpec,
    say: Callable[[str], object] = lambda note: None,
) -> LabelledFeatures | None:
    """Compute the features of two parts of labelled images. Unreadable images and images without a label are left out.

    The result is None if every model would have the same k-NN accuracy, for instance because there is only one class.
    `say` is called with a sentence about each of these cases, except unreadable images.

    Raises:
        ValueError: no image of `train` or of `test` can be read, or the features of an image are not finite.
    """
    (train, notes), (test, more) = with_labels(train, "train"), with_labels(test, HELD_OUT)
    train_labels, classes = labels_of(train)
    test_labels, _ = labels_of(test, classes)
    try:
        check_classification(train_labels, test_labels, val=HELD_OUT)
        train_features, test_features = compute_features(model, train, spec), compute_features(model, test, spec)
        train_labels, test_labels = train_labels[train_features.kept], test_labels[test_features.kept]
        check_classification(train_labels, test_labels, val=HELD_OUT)
    except NoMeaning as reason:
        say("; ".join([*notes, *more, f"no k-NN: {reason}"]))
        return None
    for note in (*notes, *more):
        say(note)
    return LabelledFeatures(train_features, train_labels, test_features, test_labels)


def accuracies(
    features: LabelledFeatures, ks: Sequence[int], device: torch.device, say: Callable[[str], object]
) -> dict[Pooling, dict[int, float]]:
    """Compute the k-NN accuracy for each pooling and each k. Values of k above the number of neighbours are left out.

    The result is empty if no value of k is left. `say` is called with a sentence about values that are left out.
    """
    try:
        usable, notes = neighbours_for(ks, len(features.train_labels))
    except NoMeaning as reason:
        say(f"no k-NN: {reason}")
        return {}
    for note in notes:
        say(note)
    return {pooling: features.accuracy(pooling, usable, device) for pooling in POOLINGS}


def evaluate_knn(
    model: DinoVisionTransformer,
    train: Sequence[Path | Photo],
    test: Sequence[Path | Photo],
    spec: PreprocessSpec,
    ks: Sequence[int] = EVALUATED_KS,
    say: Callable[[str], object] = lambda note: None,
) -> dict[Pooling, dict[int, float]]:
    """Compute the k-NN accuracy on `test`, with neighbours from `train`, for each pooling and each k.

    Images, values of k and sentences are those of `labelled_features` and `accuracies`. The result is empty if no
    accuracy has a meaning.

    Raises:
        ValueError: no image of `train` or of `test` can be read, or the features of an image are not finite.
    """
    features = labelled_features(model, train, test, spec, say)
    return {} if features is None else accuracies(features, ks, model.cls_token.device, say)
