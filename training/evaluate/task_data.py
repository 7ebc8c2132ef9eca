"""The data of the evaluation tasks: the images of each part, their features, and their class numbers.

Images without a label are left out, and a note states their number.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.preprocess import PreprocessSpec
from training.data.dataset import Photo, Skipped, Source, photos_of, split_source
from training.data.sources import open_source
from training.evaluate.backbone import Backbone
from training.evaluate.features import Box, FeatureCache, ForwardSettings, ImageFeatures, Precision, cached_features
from training.evaluate.knn import labels_of, with_labels
from training.evaluate.meaning import NoMeaning, check_classification, few_val_images

Track = Callable[[str, int], Callable[[int], object]]
"""A function that starts a progress bar with a title and a total, and returns the function that advances the bar."""


@dataclass(frozen=True)
class Context:
    """The inputs of a task: its model, data, preprocessing and feature cache, and a function for progress bars."""

    backbone: Backbone
    data: str | Path
    spec: PreprocessSpec
    precision: Precision
    cache: Path | None
    track: Track

    def features(
        self, what: str, paths: Sequence[Path | Photo], n_blocks: int = 1, boxes: Sequence[Box | None] | None = None
    ) -> ImageFeatures:
        return cached_features(
            None if self.cache is None else FeatureCache(self.cache, self.backbone.fingerprint),
            self.backbone.model,
            paths,
            self.spec,
            n_blocks=n_blocks,
            boxes=boxes,
            forward=ForwardSettings(precision=self.precision),
            advance=self.track(f"features of {what}", len(paths)),
        )

    @property
    def source(self) -> Source:
        """Open the data, in any form that training accepts, and return it as a source of labelled images."""
        with tempfile.TemporaryDirectory() as index:  # for the index of tar shards, which is also in memory
            return open_source(self.data, Path(index))

    @property
    def folder(self) -> Path:
        """Return the task's data as the path of a folder, for tasks that read individual files in it."""
        return Path(self.data)

    @property
    def device(self) -> torch.device:
        return self.backbone.model.cls_token.device


@dataclass(frozen=True)
class Labelled:
    """The features and class numbers of the train and val images that have a label.

    Classes that occur only in val have the highest numbers. `notes` are sentences about what was left out and why.
    """

    train: ImageFeatures
    train_labels: Tensor
    val: ImageFeatures
    val_labels: Tensor
    protocol: dict[str, Any]
    notes: list[str]

    @property
    def skipped(self) -> list[Skipped]:
        return [*self.train.skipped, *self.val.skipped]


def readable(features: ImageFeatures, paths: Sequence[Photo]) -> list[Photo]:
    """Return the images in `paths` that could be read."""
    return [paths[index] for index in features.kept.tolist()]


def only_labelled(context: Context, photos: Sequence[Photo], part: str) -> tuple[list[Photo], list[str]]:
    """Return the images of a part of the data that have a label, and a note with the number of other images.

    Raises:
        NoMeaning: no image has a label.
    """
    labelled, notes = with_labels(photos, part)
    if photos and not labelled:
        raise NoMeaning(
            f"{context.data}: none of the {len(photos)} images of {part} has a label: put the images of each class "
            "into a folder"
        )
    return labelled, notes


def labelled_features(context: Context, source: Source, n_blocks: int, held_out: float, seed: int) -> Labelled:
    """Compute the features and class numbers of the train and val images that have a label.

    If the source is not divided into train and val, the share `held_out` of its images is drawn with `seed` and used as
    val.

    Raises:
        ValueError: no image can be read, or the images are too few to hold out the share.
        NoMeaning: the accuracy would be the same for every model.
    """
    train_images, val_images = (photos_of(part) for part in split_source(source, held_out, seed))
    if not source.parts and not (train_images and val_images):
        raise ValueError(f"{context.data}: {len(source)} images are too few to hold out a share of {held_out}")
    (train_images, notes), (val_images, more) = (
        only_labelled(context, photos, part) for part, photos in (("train", train_images), ("val", val_images))
    )
    _labels_of_both(train_images, val_images)  # before the features, which may take hours
    train = context.features("train", train_images, n_blocks)
    val = context.features("val", val_images, n_blocks)
    train_labels, val_labels, classes = _labels_of_both(readable(train, train_images), readable(val, val_images))
    protocol = {
        "split": "train and val" if source.parts else f"a share of {held_out} held out by the seed",
        "train_photos": len(train_labels),
        "val_photos": len(val_labels),
        "train_classes": len(classes),
        "val_photos_of_classes_not_in_train": int((val_labels >= len(classes)).sum()),
    }
    device, notes = context.device, [*notes, *more, *few_val_images(len(val_labels), len(classes))]
    return Labelled(train, train_labels.to(device), val, val_labels.to(device), protocol, notes)


def _labels_of_both(train: Sequence[Photo], val: Sequence[Photo]) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Return the class numbers of the train and val images, and the class number of each label in train.

    Raises:
        NoMeaning: the accuracy on val would be the same for every model.
    """
    train_labels, classes = labels_of(train)
    val_labels, _ = labels_of(val, classes)
    check_classification(train_labels, val_labels)
    return train_labels, val_labels, classes
