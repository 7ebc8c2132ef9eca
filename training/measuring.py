"""Choose the measure of a run, and evaluate a backbone with it.

docs/decisions/0032-continue-on-small-sets.md compares the measures. If few images with classes are held out, the k-NN
accuracy of leave-one-out on all images of the run has less noise: self-supervised training does not use the classes, so
the images that were trained on can be classified too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from model.pooling import Pooling
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.data.run_images import Data
from training.evaluate.knn import EVALUATED_KS, accuracies, labelled_features
from training.evaluate.own_images import own_accuracy
from training.watch.measure import KNN, OWN, Measure

MeasureName = Literal["auto", "knn", "own", "none"]
MANY_HELD_OUT = 500
"""Held-out images with classes from which on the k-NN accuracy has a standard error of at most 2.2 points."""

MEASURED_K = 10


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    `knn` contains the k-NN accuracy on held-out images for each pooling and each k. `figures` contains further metrics
    by name. `value` is that of the run's measure, which has the noise of `n_images` images. It is None if it could not
    be computed, for instance because all held-out images are broken.
    """

    knn: Mapping[Pooling, Mapping[int, float]]
    figures: Mapping[str, float] = field(default_factory=dict)
    value: float | None = None
    n_images: int = 0

    def by_name(self) -> dict[str, float]:
        """Return all metrics for a line of evaluations.jsonl."""
        knn = {f"knn_{pooling}_{k}": share for pooling, by_k in self.knn.items() for k, share in by_k.items()}
        return {**knn, **self.figures}


def choose_measure(wanted: MeasureName, data: Data) -> tuple[Measure | None, str]:
    """Return the measure of a run and a line that names it. It is None if nothing can or should be measured.

    Raises:
        ValueError: the images do not allow the measure that is wanted.
    """
    if wanted in ("knn", "own") and not data.has_classes:
        raise ValueError(f"measure={wanted!r} cannot be computed: {data.why_no_classes}")
    if wanted == "none":
        return None, "nothing is measured during the run (measure='none')"
    if data.has_classes:
        n = len(data.labelled_held_out)
        few = wanted == "auto" and n < MANY_HELD_OUT
        measure = OWN if few or wanted == "own" else KNN
        n_images = n + len(data.labelled_train_sample) if measure is OWN else n
        return measure, f"measured during the run: {measure.words} ({n_images:,} images)"
    return None, f"nothing is measured during the run: {data.why_no_classes}"


def evaluate_backbone(
    backbone: DinoVisionTransformer, data: Data, spec: PreprocessSpec, measure: Measure | None
) -> Evaluation:
    """Evaluate a backbone on the images of a run.

    The value of the measure k-NN is the accuracy of the class token with 10 neighbours, or fewer if there are fewer
    images.
    """
    if not data.has_classes:
        return Evaluation({})
    features = labelled_features(backbone, data.labelled_train_sample, data.labelled_held_out, spec)
    if features is None:
        return Evaluation({})
    knn = accuracies(features, EVALUATED_KS, backbone.cls_token.device, lambda note: None)
    tokens, labels = features.together()
    device = backbone.cls_token.device
    own = own_accuracy(tokens.to(device), labels.to(device)) if measure == OWN else None
    figures = {} if own is None else {OWN.name: own}
    if own is not None:
        return Evaluation(knn, figures, own, len(labels))
    usable = [k for k in knn.get("cls", {}) if k <= MEASURED_K]
    return Evaluation(knn, figures, knn["cls"][max(usable)] if usable else None, len(features.test_labels))
