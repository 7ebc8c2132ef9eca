"""Check that the figures of an evaluation mean something, and raise an error that gives the reason if they do not.

A figure says nothing about a model if every model would get the same figure. With a single class, for instance, every
model scores 100 %. A figure says nothing either if a number from which it was computed is not finite: `argmax` and
`topk` accept NaN and return an index, so the result would look like an accuracy.

Legend: n training images, m val images.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class NoMeaning(ValueError):
    """A figure would be the same for every model. The message gives the reason."""


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name the first tensor that contains NaN or infinity, and count these values. Return None if there is none."""
    for name, tensor in tensors.items():
        if count := int((~torch.isfinite(tensor)).sum()):
            return f"{name} contains {count} of {tensor.numel()} values that are NaN or infinite"
    return None


def check_finite(**tensors: Tensor) -> None:
    """Check that tensors, which are given by name, contain neither NaN nor infinity.

    Raises:
        ValueError: one does. The message names it.
    """
    if (problem := not_finite(tensors)) is not None:
        raise ValueError(problem)


def usable_ks(ks: Sequence[int], most: int, *, figure: str, reason: str) -> tuple[tuple[int, ...], list[str]]:
    """Return the values of k up to `most`, and a note that names the other values.

    The notes are a list of at most one entry. `figure` is the name of the figure in the note, and `reason` states what
    the limit is.
    """
    others = " and ".join(", ".join(str(k) for k in ks if k > most).rsplit(", ", 1))
    notes = [f"{figure} for k={others} is left out: {reason}"] if others else []
    return tuple(k for k in ks if k <= most), notes


def check_classification(train_labels: Tensor, val_labels: Tensor, train: str = "train", val: str = "val") -> None:
    """Check that the accuracy on val, after training or searching in train, can differ between models.

    `train_labels` [n] and `val_labels` [m] are class numbers. `train` and `val` name the two parts in messages.

    Raises:
        NoMeaning: a part has no image, train has fewer than two classes, or no class of val occurs in train.
    """
    for part, labels in ((train, train_labels), (val, val_labels)):
        if not len(labels):
            raise NoMeaning(f"{part} has no image with a label that can be read")
    classes = train_labels.unique()
    if len(classes) < 2:
        raise NoMeaning(
            f"the {len(train_labels)} images of {train} have 1 class, but a classification needs at least 2: "
            "every model would classify all images alike"
        )
    if not torch.isin(val_labels, classes).any():
        raise NoMeaning(
            f"no class of the {len(val_labels)} images of {val} is among the {len(classes)} classes of {train}: "
            "every model would score 0.0 %"
        )


def check_leave_one_out(labels: Tensor) -> None:
    """Check that the accuracy of leave-one-out can differ between models. `labels` [n] are class numbers.

    Raises:
        NoMeaning: there are fewer than two classes, or no class has two images.
    """
    check_classification(labels, labels, "the data", "the data")
    if not (labels.bincount() > 1).any():
        raise NoMeaning(f"each of the {len(labels)} images is alone in its class: every model would score 0.0 %")


def few_val_images(n_val: int, n_classes: int) -> list[str]:
    """Return a note if val has fewer images than train has classes, as a list of at most one entry."""
    if n_val >= n_classes:
        return []
    return [
        f"val has {n_val} images for {n_classes} classes: at least {n_classes - n_val} classes are not tested, and one "
        f"image changes the accuracy by {100 / n_val:.1f} percentage points"
    ]
