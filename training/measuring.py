"""Choose the measure of a run, and evaluate a backbone with it.

docs/decisions/0032-continue-on-small-sets.md compares the measures. k-NN on a few held-out images is too coarse to
notice what training gains. How surely another view of a held-out image finds the image has less noise, and needs no
classes.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from model.pooling import Pooling
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.data.run_images import Data
from training.evaluate.features import compute_features
from training.evaluate.knn import EVALUATED_KS, accuracies, labelled_features
from training.evaluate.label_free import MOST_IMAGES, measure_label_free
from training.evaluate.own_images import own_accuracy
from training.spread import RANKME_ROWS, rankme_share
from training.watch.measure import KNN, OWN, RETRIEVAL, VIEWS, Measure
from training.whiten import whiten

MeasureName = Literal["auto", "knn", "own", "views", "retrieval", "none"]
MANY_HELD_OUT = 500
"""Held-out images with classes from which on the k-NN accuracy has a standard error of at most 2.2 points."""

MANY_IN_VAL = 100
"""Held-out images with classes from which on k-NN on a part that the user has held out is preferred."""

KEYS = {"rankme_share": "held_out_rankme_share", "spread": "held_out_spread"}
"""Keys in evaluations.jsonl of metrics that metrics.jsonl has too, there of crops of training images."""

MEASURED_K = 10
WHITENING_IMAGES = 10_000  # enough images for the covariance of the widest model's 1,536 dimensions
FEWEST_HELD_OUT = 20  # with fewer, one image is worth more than five percentage points


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    `knn` contains the k-NN accuracy on held-out images for each pooling and each k. `figures` contains further metrics
    by name. `value` is that of the run's measure, which has the noise of `n_images` images. It is None if it could not
    be computed, for instance because all held-out images are broken. `rankme_share` is RankMe of the measured features
    as a share of its maximum, for the measures that training can raise without better features. `retrieval` is the
    share of held-out images that are found by another view, if enough images are held out.
    """

    knn: Mapping[Pooling, Mapping[int, float]]
    figures: Mapping[str, float] = field(default_factory=dict)
    value: float | None = None
    n_images: int = 0
    rankme_share: float | None = None
    retrieval: float | None = None

    def by_name(self) -> dict[str, float]:
        """Return all metrics for a line of evaluations.jsonl."""
        knn = {f"knn_{pooling}_{k}": share for pooling, by_k in self.knn.items() for k, share in by_k.items()}
        return {**knn, **self.figures}


@dataclass(frozen=True)
class Choice:
    """The measure of a run (None if nothing is measured), the number of its images, and a line that says so."""

    measure: Measure | None
    n_images: int
    words: str


def choose_measure(wanted: MeasureName, data: Data, *, continues: bool) -> Choice:
    """Choose the measure of a run.

    Images are measured by k-NN if many images with classes are held out. Fewer suffice if the user has held them out,
    because they may be from another source. Otherwise, a run that continues from trained weights is measured by how
    surely another view of a held-out image finds the image. That value falls while the features of random weights
    spread out, so a run from scratch is measured by k-NN on all images, or by how often the views find their images.

    Args:
        wanted: the name of a measure, or "auto".
        data: the images of the run.
        continues: whether the run starts from trained weights.

    Raises:
        ValueError: the images do not allow the measure that is wanted.
    """
    labelled, n_held_out = len(data.labelled_held_out), len(data.held_out)
    if wanted == "none":
        return Choice(None, 0, "nothing is measured during the run (measure='none')")
    enough = n_held_out >= FEWEST_HELD_OUT
    if wanted == "auto":
        many = data.has_classes and labelled >= (MANY_IN_VAL if data.divided else MANY_HELD_OUT)
        by_views: MeasureName = "views" if continues else "own" if data.has_classes else "retrieval"
        wanted = "knn" if many else by_views if enough else "own"
        if wanted == "own" and not data.has_classes:
            return Choice(
                None,
                0,
                "nothing is measured during the run, and its last checkpoint is released: "
                f"{data.why_no_classes}, and a measure without classes needs {FEWEST_HELD_OUT} held-out images "
                f"(there are {n_held_out}; held_out_share)",
            )
    without_classes = wanted in ("views", "retrieval")
    if without_classes and not enough:
        raise ValueError(f"measure={wanted!r} needs {FEWEST_HELD_OUT} held-out images, and there are {n_held_out}")
    if not without_classes and not data.has_classes:
        raise ValueError(f"measure={wanted!r} cannot be computed: {data.why_no_classes}")
    measure, n_images = {
        "knn": (KNN, labelled),
        "own": (OWN, labelled + len(data.labelled_train_sample)),
        "views": (VIEWS, min(n_held_out, MOST_IMAGES)),
        "retrieval": (RETRIEVAL, min(n_held_out, MOST_IMAGES)),
    }[wanted]
    scale = "; 0 % is chance, 100 % certainty" if measure == VIEWS else ""
    return Choice(measure, n_images, f"measured during the run: {measure.words} ({n_images:,} images{scale})")


def watched_images(choice: Choice, data: Data) -> int:
    """Return the number of images of the figure that tells whether the features of a run are lost.

    The figure is retrieval by views if enough images are held out, and otherwise the measure of the run.
    """
    n_held_out = len(data.held_out)
    return min(n_held_out, MOST_IMAGES) if choice.measure and n_held_out >= FEWEST_HELD_OUT else choice.n_images


def evaluate_backbone(
    backbone: DinoVisionTransformer, data: Data, spec: PreprocessSpec, measure: Measure | None
) -> Evaluation:
    """Evaluate a backbone on the images of a run.

    k-NN is computed if the images have classes, and the measures without classes if enough images are held out,
    whatever the measure is. The value of the measure `KNN` is the accuracy of the class token with 10 neighbours, or
    fewer if there are fewer images.
    """
    knn: dict[Pooling, dict[int, float]] = {}
    features, device = None, backbone.cls_token.device
    if data.has_classes:
        features = labelled_features(backbone, data.labelled_train_sample, data.labelled_held_out, spec)
    if features is not None:
        knn = accuracies(features, EVALUATED_KS, device, lambda note: None)
    figures: dict[str, float] = {}
    retrieval = None
    if measure is not None and len(data.held_out) >= FEWEST_HELD_OUT:
        found = measure_label_free(backbone, data.held_out, spec)
        retrieval = found.retrieval
        figures = {KEYS.get(name, name): value for name, value in asdict(found).items() if name != "n_images"}
        figures[RETRIEVAL.name] = retrieval
        if measure in (VIEWS, RETRIEVAL):
            return Evaluation(knn, figures, figures[measure.name], found.n_images, found.rankme_share, retrieval)
    if features is None:
        return Evaluation(knn, figures)
    if measure == OWN:
        tokens, labels = features.together()
        own = own_accuracy(tokens.to(device), labels.to(device))
        rank = rankme_share(tokens[:: max(1, len(tokens) // RANKME_ROWS)])
        return Evaluation(knn, {**figures, OWN.name: own}, own, len(labels), rank, retrieval)
    usable = [k for k in knn.get("cls", {}) if k <= MEASURED_K]
    value = knn["cls"][max(usable)] if usable else None
    return Evaluation(knn, figures, value, len(features.test_labels), None, retrieval)


def whiten_backbone(backbone: DinoVisionTransformer, data: Data, spec: PreprocessSpec, shrinkage: float | None) -> None:
    """Whiten a backbone in place with the class tokens of training images. If `shrinkage` is None, do nothing."""
    if shrinkage is not None:
        sample = data.train_sample[:: math.ceil(len(data.train_sample) / WHITENING_IMAGES)]
        whiten(backbone, compute_features(backbone, sample, spec).pooled("cls"), shrinkage)
