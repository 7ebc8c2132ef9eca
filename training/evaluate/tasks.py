"""The six evaluation tasks. Each finds its data, computes features, runs the evaluation and makes a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from training.data.dataset import Skipped, photos_of
from training.evaluate import depth, segmentation
from training.evaluate.dense import DenseData, HeadTraining, Pair, TokenSettings, find_pairs
from training.evaluate.knn import TEMPERATURE, knn_accuracy, labels_of, neighbours_for
from training.evaluate.linear import CODE_LRS, PAPER_LRS, Head, ProbeSettings, evaluate_linear, stack_features
from training.evaluate.logistic import C_GRID, FitSettings, evaluate_logistic
from training.evaluate.meaning import NoMeaning, check_leave_one_out
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
from training.evaluate.task_data import Context, labelled_features, only_labelled, readable


@dataclass(frozen=True)
class TaskTable:
    """A task's results, as a table and as data (`figures`), and the part of its protocol that is not a setting.

    `notes` are sentences about what was left out and why.
    """

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    figures: dict[str, Any]
    protocol: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


Result = tuple[TaskTable, list[Skipped]]


def percent(share: float) -> str:
    """Format a share (0 to 1) as a percentage."""
    return f"{100 * share:.1f} %"


def run_knn(context: Context, settings: KnnSettings) -> Result:
    """Classify each val image with k-NN among the train images.

    If the data is not divided into train and val, classify each image with k-NN among all other images.
    """
    device = context.device
    source = context.source
    if source.parts:
        labelled = labelled_features(context, source, 1, 0.1, settings.seed)
        ks, notes = neighbours_for(settings.k, len(labelled.train_labels))
        train, val = (f.pooled(settings.pooling).to(device) for f in (labelled.train, labelled.val))
        accuracy = knn_accuracy(train, labelled.train_labels, val, labelled.val_labels, ks)
        protocol, skipped, notes = labelled.protocol, labelled.skipped, [*labelled.notes, *notes]
    else:
        photos, notes = only_labelled(context, photos_of(source), "the data")
        check_leave_one_out(labels_of(photos)[0])  # before the features, which may take hours
        features = context.features("images", photos)
        labels, classes = labels_of(readable(features, photos))
        check_leave_one_out(labels)
        ks, more = neighbours_for(settings.k, len(labels) - 1)
        notes += more
        labels, pooled = labels.to(device), features.pooled(settings.pooling).to(device)
        accuracy = knn_accuracy(pooled, labels, pooled, labels, ks, leave_one_out=True)
        protocol, skipped = {"split": "leave-one-out", "photos": len(labels), "classes": len(classes)}, features.skipped
    protocol |= {"metric": "cosine", "votes": f"exp(cosine / {TEMPERATURE})"}
    rows = [(str(k), percent(share)) for k, share in accuracy.items()]
    figures = {"accuracy": {str(k): share for k, share in accuracy.items()}}
    return TaskTable(("k", "accuracy"), rows, figures, protocol, notes), skipped


def run_logistic(context: Context, settings: LogisticSettings) -> Result:
    """Choose the penalty on a part of the train images, fit logistic regression to all of them, and score it on val."""
    labelled, device = labelled_features(context, context.source, 1, settings.held_out, settings.seed), context.device
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
    table = TaskTable(("C", "held-out train", "val accuracy"), [row], figures, protocol, labelled.notes)
    return table, labelled.skipped


def run_linear(context: Context, settings: LinearSettings) -> Result:
    """Train all heads of the linear probe, and score them on val.

    The table shows the best learning rate for each input. The data (`TaskTable.figures`) contains the accuracy of every
    head.
    """
    depth_wanted = max(settings.blocks)
    labelled = labelled_features(context, context.source, depth_wanted, settings.held_out, settings.seed)
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
    notes = list(labelled.notes)
    if report.diverged:
        lrs_lost = ", ".join(f"{lr:g}" for lr in sorted({head.lr for head in report.diverged}))
        n_heads = len(report.diverged) + len(report.accuracy)
        notes.append(f"{len(report.diverged)} of {n_heads} heads diverged and are left out (lr {lrs_lost})")
    table = TaskTable(("class tokens", "mean patch token", "lr", "val accuracy"), rows, figures, protocol, notes)
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
    notes = [f"{report.not_in_train} classes occur only in the masks of val; their IoU is 0"] * bool(
        report.not_in_train
    )
    table = TaskTable(("mIoU", "mean accuracy", "pixel accuracy"), [row], figures, protocol, notes)
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
    without = len(val) - report.photos
    notes = [f"{without} of {len(val)} maps of val have no depth in the range and are left out"] * bool(without)
    return TaskTable(("RMSE", "AbsRel", "delta1"), [row], figures, protocol, notes), train.skipped + val.skipped


def _retrieval_table(scores: dict[str, Scores], protocol: dict[str, Any], notes: Sequence[str]) -> TaskTable:
    """Make the table of retrieval. A row has a dash for each k whose recall was left out in this row only."""
    ks = sorted({k for s in scores.values() for k in s.recall})
    rows = [
        (name, str(s.queries), percent(s.mean_ap), *(percent(s.recall[k]) if k in s.recall else "-" for k in ks))
        for name, s in scores.items()
    ]
    figures = {
        name: {"map": s.mean_ap, "recall": {str(k): share for k, share in s.recall.items()}, "queries": s.queries}
        for name, s in scores.items()
    }
    notes = [*notes, *(f"{name}: {note}" for name, s in scores.items() for note in s.notes)]
    return TaskTable(("relevant", "queries", "mAP", *(f"recall@{k}" for k in ks)), rows, figures, protocol, notes)


def run_retrieval(context: Context, settings: RetrievalSettings) -> Result:
    """Rank images by similarity, and score the rankings.

    With a ground truth file, the setups easy, medium and hard are scored. Without one, every image is a query, all
    other images are its database, and those with the query's label are relevant.
    """
    if settings.ground_truth is not None:
        return _run_ground_truth(context, settings, settings.ground_truth), []
    photos, notes = only_labelled(context, photos_of(context.source), "the data")
    if len({photo.label for photo in photos}) < 2:  # before the features, which may take hours
        raise NoMeaning(f"{context.data}: the {len(photos)} images have 1 class: every model would score 100 %")
    features = context.features("images", photos)
    labels, classes = labels_of(readable(features, photos))
    pooled, device = features.pooled(settings.pooling), context.device
    by_class = score_classes(pooled.to(device), labels.to(device), ks=settings.k)
    protocol = {"ap": "mean precision at relevant images", "photos": len(labels), "classes": len(classes)}
    return _retrieval_table({"same folder": by_class}, protocol | {"metric": "cosine"}, notes), features.skipped


def _run_ground_truth(context: Context, settings: RetrievalSettings, path: Path) -> TaskTable:
    """Score the setups easy, medium and hard of the ground truth file `path`. A setup is left out if every model would
    get the same score."""
    device, truth = context.device, read_ground_truth(path)
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
    scored, notes = dict[str, Scores](), list[str]()
    for setup in SETUPS:
        try:
            scored[setup] = score_setup(truth, setup, query_vectors, database_vectors, ks=settings.k)
        except NoMeaning as reason:
            notes.append(f"{setup} is left out: {reason}")
    if not scored:
        raise NoMeaning(f"{path}: {'; '.join(notes)}")
    protocol = {"ap": "trapezoid rule", "photos": len(truth.database), "metric": "cosine"}
    return _retrieval_table(scored, protocol, notes)
