"""The six evaluation tasks. Each finds its data, computes features, runs the evaluation and makes a table."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.preprocess import PreprocessSpec
from training.data.dataset import Photo, Skipped, Source, photos_of, split_source
from training.data.sources import open_source
from training.evaluate import depth, segmentation
from training.evaluate.backbone import Backbone
from training.evaluate.dense import DenseData, HeadTraining, Pair, TokenSettings, find_pairs
from training.evaluate.features import Box, FeatureCache, ForwardSettings, ImageFeatures, Precision, cached_features
from training.evaluate.knn import TEMPERATURE, knn_accuracy, labels_of
from training.evaluate.linear import CODE_LRS, PAPER_LRS, Head, ProbeSettings, evaluate_linear, stack_features
from training.evaluate.logistic import C_GRID, FitSettings, evaluate_logistic
from training.evaluate.retrieval import SETUPS, Scores, read_ground_truth, score_classes, score_setup
from training.evaluate.settings import (
    DenseSettings,
    DepthSettings,
    KnnSettings,
    LinearSettings,
    LogisticSettings,
    RetrievalSettings,
    SegmentationSettings,
)

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
class TaskTable:
    """A task's results, as a table and as data (`figures`), and the part of its protocol that is not a setting."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    figures: dict[str, Any]
    protocol: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Labelled:
    """The features and class numbers of the train and val images.

    Classes that occur only in val have the highest numbers.
    """

    train: ImageFeatures
    train_labels: Tensor
    val: ImageFeatures
    val_labels: Tensor
    protocol: dict[str, Any]

    @property
    def skipped(self) -> list[Skipped]:
        return [*self.train.skipped, *self.val.skipped]


Result = tuple[TaskTable, list[Skipped]]


def percent(share: float) -> str:
    """Format a share (0 to 1) as a percentage."""
    return f"{100 * share:.1f} %"


def _read(features: ImageFeatures, paths: Sequence[Photo]) -> list[Photo]:
    """Return the images in `paths` that could be read."""
    return [paths[index] for index in features.kept.tolist()]


def _check_classes(classes: dict[str, int], where: str | Path) -> None:
    if len(classes) < 2:
        raise ValueError(f"{where}: the images have {len(classes)} class, but a classification needs at least 2")


def _labelled(context: Context, source: Source, n_blocks: int, held_out: float, seed: int) -> Labelled:
    """Compute the features and class numbers of the train and val images.

    If the source is not divided into train and val, the share `held_out` of its images is drawn with `seed` and used as
    val.
    """
    train_images, val_images = (photos_of(part) for part in split_source(source, held_out, seed))
    if not val_images:
        raise ValueError(f"{context.data}: {len(train_images)} images are too few to hold out a share of {held_out}")
    train = context.features("train", train_images, n_blocks)
    val = context.features("val", val_images, n_blocks)
    train_labels, classes = labels_of(_read(train, train_images))
    _check_classes(classes, context.data)
    val_labels, _ = labels_of(_read(val, val_images), classes)
    protocol = {
        "split": "train and val" if source.parts else f"a share of {held_out} held out by the seed",
        "train_photos": len(train_labels),
        "val_photos": len(val_labels),
        "train_classes": len(classes),
        "val_photos_of_classes_not_in_train": int((val_labels >= len(classes)).sum()),
    }
    device = context.device
    return Labelled(train, train_labels.to(device), val, val_labels.to(device), protocol)


def run_knn(context: Context, settings: KnnSettings) -> Result:
    """Classify each val image with k-NN among the train images.

    If the data is not divided into train and val, classify each image with k-NN among all other images.
    """
    device = context.device
    source = context.source
    if source.parts:
        labelled = _labelled(context, source, 1, 0.1, settings.seed)
        train, val = (f.pooled(settings.pooling).to(device) for f in (labelled.train, labelled.val))
        accuracy = knn_accuracy(train, labelled.train_labels, val, labelled.val_labels, settings.k)
        protocol, skipped = labelled.protocol, labelled.skipped
    else:
        photos = photos_of(source)
        features = context.features("images", photos)
        labels, classes = labels_of(_read(features, photos))
        _check_classes(classes, context.data)
        labels, pooled = labels.to(device), features.pooled(settings.pooling).to(device)
        accuracy = knn_accuracy(pooled, labels, pooled, labels, settings.k, leave_one_out=True)
        protocol, skipped = {"split": "leave-one-out", "photos": len(labels), "classes": len(classes)}, features.skipped
    protocol |= {"metric": "cosine", "votes": f"exp(cosine / {TEMPERATURE})"}
    rows = [(str(k), percent(share)) for k, share in accuracy.items()]
    return TaskTable(("k", "accuracy"), rows, {"accuracy": {str(k): a for k, a in accuracy.items()}}, protocol), skipped


def run_logistic(context: Context, settings: LogisticSettings) -> Result:
    """Choose the penalty on a part of the train images, fit logistic regression to all of them, and score it on val."""
    labelled, device = _labelled(context, context.source, 1, settings.held_out, settings.seed), context.device
    report = evaluate_logistic(
        labelled.train.pooled(settings.pooling).to(device),
        labelled.train_labels,
        labelled.val.pooled(settings.pooling).to(device),
        labelled.val_labels,
        fit=FitSettings(settings.held_out, settings.seed, settings.tolerance, settings.iterations),
        advance=context.track("values of C", len(C_GRID)),
    )
    row = (f"{report.c:.3g}", percent(report.sweep[report.c]), percent(report.accuracy))
    figures = {"accuracy": report.accuracy, "c": report.c, "held_out_accuracy_by_c": list(report.sweep.items())}
    protocol = labelled.protocol | {"penalty": "L2", "C": "45 values, 1e-6 to 1e5", "solver": "L-BFGS, float64"}
    return TaskTable(("C", "held-out train", "val accuracy"), [row], figures, protocol), labelled.skipped


def run_linear(context: Context, settings: LinearSettings) -> Result:
    """Train all heads of the linear probe, and score them on val.

    The table shows the best learning rate for each input. The data (`TaskTable.figures`) contains the accuracy of every
    head.
    """
    depth_wanted = max(settings.blocks)
    labelled = _labelled(context, context.source, depth_wanted, settings.held_out, settings.seed)
    device, lrs = context.device, CODE_LRS if settings.grid == "code" else PAPER_LRS
    report = evaluate_linear(
        stack_features(labelled.train.cls, labelled.train.patch_parts["mean"]).to(device),
        labelled.train_labels,
        stack_features(labelled.val.cls, labelled.val.patch_parts["mean"]).to(device),
        labelled.val_labels,
        depth=depth_wanted,
        settings=ProbeSettings(
            lrs=lrs,
            blocks=settings.blocks,
            iterations=settings.iterations,
            batch_size=settings.batch_size,
            seed=settings.seed,
        ),
        advance=context.track("iterations", settings.iterations),
    )
    rows = []
    for blocks, avgpool in dict.fromkeys((head.blocks, head.avgpool) for head in report.accuracy):
        same = {h: a for h, a in report.accuracy.items() if (h.blocks, h.avgpool) == (blocks, avgpool)}
        best = max(same, key=lambda head: same[head])
        marked = percent(same[best]) + (" *" if best == report.best else "")
        rows.append((f"last {blocks}", "yes" if avgpool else "no", f"{best.lr:g}", marked))

    def entry(head: Head) -> dict[str, Any]:
        named = {"blocks": head.blocks, "avgpool": head.avgpool, "lr": head.lr}
        return named | {"accuracy": report.accuracy[head]}

    figures = {"best": entry(report.best), "heads": [entry(head) for head in report.accuracy]}
    protocol = labelled.protocol | {
        "optimizer": "SGD, momentum 0.9, no weight decay, cosine to 0",
        "lr": "times batch / 256",
        "lrs": list(lrs),
        "augmentation": "none",
        "figure": "best head by val accuracy (*)",
    }
    table = TaskTable(("class tokens", "mean patch token", "lr", "val accuracy"), rows, figures, protocol)
    return table, labelled.skipped


def _dense(context: Context, settings: DenseSettings, kind: str, suffixes: Sequence[str], read: Any) -> list[DenseData]:
    pairs: dict[str, list[Pair]] = {
        split: find_pairs(context.folder, split, kind, suffixes) for split in ("train", "val")
    }
    data: list[DenseData] = []
    for split, split_pairs in pairs.items():
        data.append(
            DenseData(
                context.backbone.model,
                split_pairs,
                context.spec,
                read,
                TokenSettings(settings.blocks, isinstance(settings, DepthSettings), context.precision),
                memory_bytes=data[-1].memory_left if data else int(settings.memory_gb * 1e9),
                advance=context.track(f"tokens of {split}", len(split_pairs)),
            )
        )
    return data


def _training(settings: DenseSettings, lr: float) -> HeadTraining:
    return HeadTraining(settings.iterations, settings.batch_size, lr, settings.weight_decay, settings.seed)


DENSE_PROTOCOL = {
    "view": "whole image, sides to multiples of the patch",
    "augmentation": "none",
    "optimizer": "AdamW, linear warm-up 3.75 %, linear decay to 0",
}


def run_segmentation(context: Context, settings: SegmentationSettings) -> Result:
    """Train a linear segmentation head on patch tokens, and compute mIoU at the original size of each mask."""
    read = partial(segmentation.read_mask, zero_is_ignored=settings.zero_is_ignored)
    train, val = _dense(context, settings, "masks", segmentation.SUFFIXES, read)
    report = segmentation.evaluate_segmentation(
        train,
        val,
        _training(settings, settings.lr),
        n_classes=settings.classes,
        advance=context.track("iterations", settings.iterations),
    )
    figures = {
        "mean_iou": report.mean_iou,
        "pixel_accuracy": report.pixel_accuracy,
        "mean_accuracy": report.mean_accuracy,
        "iou": [None if value != value else value for value in report.iou],  # JSON has no nan
        "train_loss": report.loss,
    }
    row = tuple(percent(share) for share in (report.mean_iou, report.mean_accuracy, report.pixel_accuracy))
    protocol = DENSE_PROTOCOL | {
        "head": "batch norm + 1x1 convolution",
        "scored": "at the mask's size, 255 ignored, one confusion matrix",
        "classes": len(report.iou),
        "train_photos": len(train),
        "val_photos": len(val),
    }
    table = TaskTable(("mIoU", "mean accuracy", "pixel accuracy"), [row], figures, protocol)
    return table, train.skipped + val.skipped


def run_depth(context: Context, settings: DepthSettings) -> Result:
    """Train a linear depth head, and compute RMSE, AbsRel and delta1 at the original size of each map."""
    read = partial(depth.read_depth, units_per_metre=settings.units_per_metre)
    train, val = _dense(context, settings, "depth", depth.SUFFIXES, read)
    report = depth.evaluate_depth(
        train,
        val,
        _training(settings, settings.lr),
        min_depth=settings.min_depth,
        max_depth=settings.max_depth,
        n_bins=settings.bins,
        gradient_weight=settings.gradient_weight,
        advance=context.track("iterations", settings.iterations),
    )
    figures = {
        "rmse": report.rmse,
        "abs_rel": report.abs_rel,
        "delta1": report.delta1,
        "photos": report.photos,
        "train_loss": report.loss,
    }
    row = (f"{report.rmse:.3f} m", f"{report.abs_rel:.3f}", percent(report.delta1))
    protocol = DENSE_PROTOCOL | {
        "head": "patch and class tokens, linear to uniform bins, linear normalisation, 4 times enlarged",
        "loss": "scale-invariant log + gradients",
        "scored": "at the map's size, mean over images, no border crop",
        "train_photos": len(train),
        "val_photos": report.photos,
    }
    return TaskTable(("RMSE", "AbsRel", "delta1"), [row], figures, protocol), train.skipped + val.skipped


def _retrieval_table(scores: dict[str, Scores], protocol: dict[str, Any]) -> TaskTable:
    ks = list(next(iter(scores.values())).recall)
    rows = [
        (name, str(s.queries), percent(s.mean_ap), *(percent(s.recall[k]) for k in ks)) for name, s in scores.items()
    ]
    figures = {
        name: {"map": s.mean_ap, "recall": {str(k): s.recall[k] for k in ks}, "queries": s.queries}
        for name, s in scores.items()
    }
    return TaskTable(("relevant", "queries", "mAP", *(f"recall@{k}" for k in ks)), rows, figures, protocol)


def run_retrieval(context: Context, settings: RetrievalSettings) -> Result:
    """Rank images by similarity, and score the rankings.

    With a ground truth file, the setups easy, medium and hard are scored. Without one, every image is a query, all
    other images are its database, and those with the query's label are relevant.
    """
    device = context.device
    if settings.ground_truth is None:
        source = context.source
        photos = photos_of(source)
        features = context.features("images", photos)
        labels, classes = labels_of(_read(features, photos))
        by_class = score_classes(features.pooled(settings.pooling).to(device), labels.to(device), ks=settings.k)
        protocol = {"ap": "mean precision at relevant images", "photos": len(labels), "classes": len(classes)}
        return _retrieval_table({"same folder": by_class}, protocol | {"metric": "cosine"}), features.skipped
    truth = read_ground_truth(settings.ground_truth)
    database = context.features("database", [context.folder / name for name in truth.database])
    queries = context.features(
        "queries",
        [context.folder / query.image for query in truth.queries],
        boxes=[query.box for query in truth.queries],
    )
    skipped = queries.skipped + database.skipped
    if skipped:  # without these images the data set would be easier or harder
        raise ValueError(f"{len(skipped)} images of the ground truth cannot be read, e.g. {skipped[0].name}")
    database_vectors, query_vectors = (f.pooled(settings.pooling).to(device) for f in (database, queries))
    by_setup = {setup: score_setup(truth, setup, query_vectors, database_vectors, ks=settings.k) for setup in SETUPS}
    scored = {str(setup): scores for setup, scores in by_setup.items() if scores is not None}
    if not scored:
        raise ValueError(f"{settings.ground_truth}: no query has an easy or hard image")
    protocol = {"ap": "trapezoid rule", "photos": len(truth.database), "metric": "cosine"}
    return _retrieval_table(scored, protocol), []
