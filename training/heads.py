"""Fits heads that predict classes, a class per pixel, or depth from frozen features. A head needs at least 20 labelled
images.

The features of each image are computed once and stay in memory. Some of the images are held out, and the metrics of a
head are measured only on them. All random choices depend on the seed, so the same call gives the same head.

    classification   FOLDER/<class>/...                     one folder for each class
    segmentation     FOLDER/images/..., FOLDER/masks/...    masks are indexed or 8-bit gray PNGs; 255: ignored
    depth            FOLDER/images/..., FOLDER/depth/...    depth maps are 16-bit PNGs in millimetres; 0: unknown

An image and its mask or depth map have the same name, except for the suffix. If the images are divided into `train` and
`val`, `val` is held out. The networks and their training are those of the evaluations (`training/evaluate/`): batch
normalisation and a linear layer for segmentation, linear depth, and logistic regression.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from model.folder import split_folders
from model.heads.linear import fold_batch_norm
from model.heads.record import Floats, HeadDescription, Kind
from model.heads.store import read_class_names
from model.preprocess import PreprocessSpec, read_spec
from training.data.dataset import Photo, Skipped, Source, photos_of, read_photo
from training.evaluate import depth, segmentation
from training.evaluate.backbone import Backbone
from training.evaluate.dense import DenseData, HeadTraining, Pair, TokenSettings, pair_folders
from training.evaluate.features import FeatureCache, ImageFeatures, cached_features, default_workers, in_order
from training.evaluate.knn import labels_of
from training.evaluate.logistic import Logistic, fit_logistic

Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

MIN_IMAGES: Final = 20
MAX_CLASSES: Final = 10_000
HEADROOM: Final = 1.5  # a weighted mean of all bins hardly ever reaches the last bin
C_CHOICES: Final = tuple(10.0**power for power in range(-5, 5))
TOLERANCE, MAX_ITERATIONS = 1e-5, 300  # of logistic regression
CLASS_NAMES: Final = "classes.txt"

Track = Callable[[str, int], Callable[[int], object]]
"""A function that starts a progress bar with a title and a total, and returns the function that advances the bar."""


@dataclass(frozen=True)
class FitSettings:
    """The settings for fitting a head.

    `held_out` is the share of the images that is held out if the folder is not divided into `train` and `val`. `blocks`
    is the number of blocks that the head reads, counted from the last. `resize` is the short side of the network's
    input in pixels for segmentation and depth, which use the whole image. If it is None, the model's own short side is
    used. `min_depth` and `max_depth` are in metres. If `max_depth` is None, it is 1.5 times the largest depth in the
    training maps (docs/decisions/0025-heads.md).
    """

    held_out: float = 0.2
    seed: int = 0
    blocks: int = 1
    resize: int | None = None
    iterations: int = 300
    batch_size: int = 8
    lr: float = 1e-3
    weight_decay: float = 1e-3
    zero_is_ignored: bool = False
    min_depth: float = 1e-3
    max_depth: float | None = None
    memory_gb: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must be between 0 and 1")
        for field in ("iterations", "batch_size", "blocks"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")


class FittedHead(NamedTuple):
    """A fitted head for `model.heads.store.add_head`, and the files that could not be read."""

    description: HeadDescription
    tensors: Mapping[str, Floats]
    skipped: list[Skipped]


# Segmentation and depth


def fit_segmentation(name: str, backbone: Backbone, folder: Path, settings: FitSettings, track: Track) -> FittedHead:
    """Fit a segmentation head on the images and masks in a folder.

    The names of the classes are read from `classes.txt` in the folder, if it exists. Otherwise, a class is named by its
    number.

    Raises:
        ValueError: there are fewer than 20 images, the masks contain fewer than two classes, a mask and its image
            differ in size, or a setting cannot be used. The message gives the reason.
        FloatingPointError: the loss is not finite.
        OSError: a file or a folder cannot be read.
    """
    names = read_class_names(folder / CLASS_NAMES) if (folder / CLASS_NAMES).exists() else None
    read = partial(segmentation.read_mask, zero_is_ignored=settings.zero_is_ignored)
    train, val = _dense(backbone, folder, "masks", segmentation.SUFFIXES, read, settings, track)
    n_classes = segmentation.count_classes([train, val], None if names is None else len(names))
    present = _classes_in(chain(_targets(train), _targets(val)))
    if len(present) < 2:
        raise ValueError(
            f"{folder / 'masks'}: all labelled pixels have class {present[0]}; segmentation needs at least two classes "
            f"({segmentation.IGNORE} marks pixels to ignore)"
        )
    head, loss = segmentation.fit_segmentation(
        train, _training(settings), n_classes, track("iterations", settings.iterations)
    )
    report = segmentation.score_segmentation(head, val, n_classes, loss)
    classes = names or tuple(map(str, range(n_classes)))
    metrics = {
        "mean_iou": report.mean_iou,
        "pixel_accuracy": report.pixel_accuracy,
        "mean_accuracy": report.mean_accuracy,
        "iou": dict(zip(classes, report.iou, strict=True)),
    }
    state = {key: _array(tensor) for key, tensor in head.state_dict().items()}
    norm = [state[f"bn.{part}"] for part in ("weight", "bias", "running_mean", "running_var")]
    weight, bias = fold_batch_norm(state["linear.weight"], state["linear.bias"], norm, head.bn.eps)
    about = _description(name, "segmentation", backbone, settings, metrics, len(train), len(val))
    return FittedHead(
        about.model_copy(update={"classes": classes}), {"weight": weight, "bias": bias}, train.skipped + val.skipped
    )


def fit_depth(name: str, backbone: Backbone, folder: Path, settings: FitSettings, track: Track) -> FittedHead:
    """Fit a linear depth head on the images and depth maps in a folder.

    Raises:
        ValueError: there are fewer than 20 images, the maps contain no depth in the range, a map and its image differ
            in size, or a setting cannot be used. The message gives the reason.
        FloatingPointError: the loss is not finite.
        OSError: a folder cannot be listed.
    """
    train, val = _dense(backbone, folder, "depth", depth.SUFFIXES, depth.read_depth, settings, track)
    largest = settings.max_depth
    if largest is None:
        largest = HEADROOM * max(float(metres.max()) for metres in _targets(train))
        if largest <= HEADROOM * settings.min_depth:
            raise ValueError(f"{folder / 'depth'}: no map has a depth above min_depth={settings.min_depth:g}")
    dim = train[0][0].shape[-1]
    head = depth.LinearDepth(dim, settings.min_depth, largest, seed=settings.seed).to(train[0][0].device)
    loss = depth.fit_depth(head, train, _training(settings), advance=track("iterations", settings.iterations))
    report = depth.score_depth(head, val, loss)
    metrics = {"delta1": report.delta1, "rmse": report.rmse, "abs_rel": report.abs_rel}
    about = _description(name, "depth", backbone, settings, metrics, len(train), len(val))
    return FittedHead(
        about.model_copy(update={"depth_range": (settings.min_depth, largest)}),
        {"weight": _array(head.linear.weight), "bias": _array(head.linear.bias)},
        train.skipped + val.skipped,
    )


def _dense(
    backbone: Backbone,
    folder: Path,
    kind: str,
    suffixes: Sequence[str],
    read: Callable[[Path], Tensor],
    settings: FitSettings,
    track: Track,
) -> tuple[DenseData, DenseData]:
    """Return the training data and the held-out data of a segmentation or depth head, with the tokens in memory."""
    if settings.blocks > len(backbone.model.blocks):
        raise ValueError(f"blocks={settings.blocks}: the model has {len(backbone.model.blocks)}")
    train, val = _pairs(folder, kind, suffixes, settings)
    check_sizes([*train, *val], read)
    spec = dense_spec(backbone.spec, settings.resize)
    tokens = TokenSettings(settings.blocks, with_cls=kind == "depth")
    data: list[DenseData] = []
    for title, pairs in (("tokens of train", train), ("tokens of held-out images", val)):
        memory = data[-1].memory_left if data else int(settings.memory_gb * 1e9)
        advance = track(title, len(pairs))
        data.append(DenseData(backbone.model, pairs, spec, read, tokens, memory_bytes=memory, advance=advance))
    _check_count(folder, sum(map(len, data)))
    return data[0], data[1]


def _pairs(folder: Path, kind: str, suffixes: Sequence[str], settings: FitSettings) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs of images and maps to train on, and those to hold out."""
    images, targets = split_folders(folder / "images"), split_folders(folder / kind)
    if images is not None and targets is not None:
        train, val = (pair_folders(i, t, suffixes) for i, t in zip(images, targets, strict=True))
        return train, val
    pairs = pair_folders(folder / "images", folder / kind, suffixes)
    _check_count(folder, len(pairs))
    aside = hold_out(np.zeros(len(pairs), np.int64), settings.held_out, settings.seed)
    return [pairs[i] for i in np.flatnonzero(~aside)], [pairs[i] for i in np.flatnonzero(aside)]


def check_sizes(pairs: Sequence[Pair], read: Callable[[Path], Tensor]) -> None:
    """Check that each map has the size of its image. Pairs that cannot be read are skipped here, because `DenseData`
    handles them.

    Raises:
        ValueError: the sizes of a map and its image differ. The message counts such maps and names the first.
    """

    def sizes(pair: Pair) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        try:
            return tuple(read_photo(pair.image).shape[:2]), tuple(read(pair.target).shape)
        except ValueError:
            return None

    outcomes = zip(pairs, in_order(sizes, pairs, default_workers()), strict=True)
    different = [(pair, both) for pair, both in outcomes if both is not None and both[0] != both[1]]
    if different:
        pair, (image, target) = different[0]
        raise ValueError(
            f"{len(different)} of {len(pairs)} maps have another size than their image, e.g. {pair.target} has "
            f"{target[0]}x{target[1]} pixels and {pair.image} {image[0]}x{image[1]} (height x width)"
        )


def dense_spec(own: PreprocessSpec, resize: int | None) -> PreprocessSpec:
    """Return the preprocessing for segmentation and depth: the whole image with a short side of `resize` pixels."""
    side = resize or own.resize or own.crop
    return read_spec(own.model_dump() | {"crop": None, "resize": side, "fit": "crop"})


def _targets(data: DenseData) -> Iterator[Tensor]:
    """Read the maps one at a time, at their original sizes."""
    return (data.read_target(pair.target) for pair in data.pairs)


def _classes_in(masks: Iterable[Tensor]) -> list[int]:
    """Return the numbers of the classes that occur in masks."""
    counts = torch.zeros(256, dtype=torch.long)
    for mask in masks:
        counts += torch.bincount(mask.flatten(), minlength=256)
    return [number for number in counts.nonzero().flatten().tolist() if number != segmentation.IGNORE]


def _training(settings: FitSettings) -> HeadTraining:
    return HeadTraining(settings.iterations, settings.batch_size, settings.lr, settings.weight_decay, settings.seed)


# Classification


def fit_classification(
    name: str,
    backbone: Backbone,
    source: Source,
    settings: FitSettings,
    track: Track,
    cache: FeatureCache | None = None,
) -> FittedHead:
    """Fit a classification head on labelled images: logistic regression on the class tokens of the last blocks and the
    mean patch token, which are the inputs of Meta's heads.

    The L2 penalty is the one with the lowest log loss on a fifth of the training images, which are set aside to choose
    it.

    Raises:
        ValueError: there are fewer than 20 readable images or fewer than two classes, or an image has no label.
        OSError: the cache cannot be written.
    """
    if settings.blocks > len(backbone.model.blocks):
        raise ValueError(f"blocks={settings.blocks}: the model has {len(backbone.model.blocks)}")
    photos = photos_of(source)
    _check_count(None, len(photos))
    features = cached_features(
        cache,
        backbone.model,
        photos,
        backbone.spec,
        n_blocks=settings.blocks,
        advance=track("features", len(photos)),
    )
    kept = features.kept.tolist()
    _check_count(None, len(kept))
    labels, classes = labels_of([photos[i] for i in kept])
    _check_classes(classes)
    aside = _held_out_images(source, photos, kept, labels.numpy(), settings)
    inputs = _classifier_inputs(features)
    train, val = torch.from_numpy(~aside), torch.from_numpy(aside)
    model, c = _fit(inputs[train], labels[train], len(classes), settings.seed, track)
    predicted, actual = model.logits(inputs[val]).argmax(dim=1), labels[val]
    correct = (predicted == actual).double()
    by_class = {
        label: correct[actual == number].mean().item() if bool((actual == number).any()) else None
        for label, number in classes.items()
    }
    metrics = {"accuracy": correct.mean().item(), "accuracy_by_class": by_class, "c": c}
    about = _description(name, "classification", backbone, settings, metrics, int(train.sum()), int(val.sum()))
    tensors = {"weight": _array(model.weight), "bias": _array(model.bias)}
    return FittedHead(about.model_copy(update={"classes": tuple(classes)}), tensors, features.skipped)


def _classifier_inputs(features: ImageFeatures) -> Tensor:
    """Return the inputs of a classification head, [n, F]: the class tokens of the blocks, then the mean patch token."""
    return torch.cat([features.cls.flatten(1), features.patch_parts["mean"]], dim=1)


def _check_classes(classes: Mapping[str, int]) -> None:
    if len(classes) < 2:
        raise ValueError(
            f"all images have the class {next(iter(classes))!r}; classification needs at least two classes"
        )
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"{len(classes)} classes; at most {MAX_CLASSES} are allowed")


def _held_out_images(
    source: Source, photos: Sequence[Photo], kept: Sequence[int], labels: Indices, settings: FitSettings
) -> Flags:
    """Return which of the readable images are held out, bool [n].

    Raises:
        ValueError: no image can be held out, or none is left.
    """
    if {"train", "val"} <= set(source.parts):
        held_out = set(source.parts["val"].tolist())
        aside = np.array([photos[i].index in held_out for i in kept])
    else:
        aside = hold_out(labels, settings.held_out, settings.seed)
    if not aside.any() or aside.all():
        raise ValueError(f"{int(aside.sum())} of {len(kept)} images are held out; both parts need at least one image")
    return aside


def _fit(inputs: Tensor, labels: Tensor, n_classes: int, seed: int, track: Track) -> tuple[Logistic, float]:
    """Choose the inverse strength C of the penalty, and fit a logistic regression to all training images.

    The values of C are tried in ascending order, until the log loss on the images that are set aside has risen twice in
    a row.
    """
    aside = torch.from_numpy(hold_out(labels.numpy(), 0.2, seed))
    losses: dict[float, float] = {}
    model: Logistic | None = None
    advance = track("strengths of the penalty", len(C_CHOICES))
    for c in C_CHOICES if bool(aside.any()) else ():
        model = fit_logistic(
            inputs[~aside],
            labels[~aside],
            c,
            n_classes,
            start=model,
            tolerance=TOLERANCE,
            max_iterations=MAX_ITERATIONS,
        )
        losses[c] = F.cross_entropy(model.logits(inputs[aside]), labels[aside]).item()
        advance(1)
        if min(losses.values()) < min(list(losses.values())[-2:]):
            break
    best = min(losses, key=lambda c: losses[c]) if losses else 1.0
    fitted = fit_logistic(inputs, labels, best, n_classes, tolerance=TOLERANCE, max_iterations=MAX_ITERATIONS)
    return fitted, best


def hold_out(labels: Indices, share: float, seed: int) -> Flags:
    """Choose images to hold out at random, and return bool [n]. From each class, the share `share` of its images is
    held out, but at least one image and never all. A class with one image is not held out. `labels` are class numbers
    [n]."""
    rng = np.random.default_rng(seed)
    aside = np.zeros(len(labels), bool)
    for number in np.unique(labels):
        members = np.flatnonzero(labels == number)
        if len(members) > 1:
            count = min(len(members) - 1, max(1, round(share * len(members))))
            aside[rng.permutation(members)[:count]] = True
    return aside


# All kinds


def _check_count(folder: Path | None, count: int) -> None:
    if count < MIN_IMAGES:
        where = "" if folder is None else f"{folder}: "
        raise ValueError(f"{where}{count} labelled images can be read; a head needs at least {MIN_IMAGES}")


def _description(
    name: str,
    kind: Kind,
    backbone: Backbone,
    settings: FitSettings,
    metrics: Mapping[str, Any],
    n_train: int,
    n_held_out: int,
) -> HeadDescription:
    blocks = len(backbone.model.blocks)
    counts = {"train_images": n_train, "held_out_images": n_held_out}
    spec = backbone.spec if kind == "classification" else dense_spec(backbone.spec, settings.resize)
    return HeadDescription(
        name=name,
        kind=kind,
        layers=tuple(range(blocks - settings.blocks, blocks)),
        normed=True,
        metrics=_without_nan({**metrics, **counts}),
        training=asdict(settings) | {"preprocess": spec.model_dump(mode="json")},
        source="dinov2 train-head",
    )


def _without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with None in place of nan, which JSON does not have."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _without_nan(value)
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return {key: plain(value) for key, value in values.items()}


def _array(tensor: Tensor) -> Floats:
    return np.asarray(tensor.detach().cpu().numpy(), np.float32)
