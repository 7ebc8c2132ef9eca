"""Classifies images by the labelled items of a collection (k-NN), or by a few example images of each class.

Both ways also decide whether an image belongs to none of the classes (`service/vision/conformal.py`). The functions
work on vectors, which their callers compute.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.retrieval.calibration import Calibration, Reference, calibration_of
from service.search.filters import Scalar, scalar_at
from service.search.store import CollectionInfo, Floats, Hit, VectorStore
from service.shared_results import SharedResults
from service.vision.conformal import can_promise, p_values
from service.vision.knn import ClassScore, vote
from service.vision.prototypes import Prototypes


@dataclass(frozen=True)
class Neighbour:
    """An item of the collection that is near an image. `score` is the cosine similarity."""

    id: str
    label: Scalar | None
    score: float


@dataclass(frozen=True)
class Verdict:
    """The classification of one image.

    label: the class, or None if the image is unknown.
    p_value: the p-value of the hypothesis that the image is known, or None if there is no calibration item.
    scores: the classes, best first.
    neighbours: the k nearest items, nearest first, or None for a classification by examples.
    """

    label: Scalar | None
    unknown: bool
    p_value: float | None
    scores: Sequence[ClassScore]
    neighbours: Sequence[Neighbour] | None = None


@dataclass(frozen=True)
class Classified:
    """The verdicts on all images of a request, and the calibration on which they are based. `promised` says whether the
    calibration suffices for the error rate. If not, no image is called unknown."""

    verdicts: list[Verdict]
    calibration: Calibration
    promised: bool


async def classify_by_collection(
    store: VectorStore,
    shared: SharedResults,
    info: CollectionInfo,
    vectors: Floats,
    reference: Reference,
    error_rate: float,
) -> Classified:
    """Classify images by a vote of their nearest labelled items in a collection.

    Args:
        vectors: [Q, D], computed like the vectors of the collection.
        reference: the items that vote, and the number of neighbours.
        error_rate: the share of images of known classes that may be called unknown.

    Raises:
        InvalidRequest: no item has a label, or no labelled item is held out.
        ModelMismatch, Conflict: the vectors do not fit the collection.
    """
    calibration = await calibration_of(store, shared, info, reference)
    rankings = await store.search(
        info.ref, vectors, calibration.k, tag=info.tag, where=calibration.where, params=reference.params
    )
    verdicts = []
    for hits, p_value in zip(rankings, _p_values(calibration, [_kth(hits) for hits in rankings]), strict=True):
        neighbours = [Neighbour(hit.id, scalar_at(hit.metadata, reference.path), hit.score) for hit in hits]
        scores = vote([neighbour.label for neighbour in neighbours], [hit.score for hit in hits])
        verdicts.append(_verdict(scores, p_value, error_rate, neighbours))
    return _classified(verdicts, calibration, error_rate)


def classify_by_examples(examples: Floats, labels: Sequence[str], vectors: Floats, error_rate: float) -> Classified:
    """Classify images by example images. The score of a class is the cosine similarity to its prototype.

    Args:
        examples: [E, D], each of length 1.
        labels: the class of each example.
        vectors: [Q, D], each of length 1.
        error_rate: the share of images of known classes that may be called unknown.
    """
    prototypes = Prototypes.of(examples, labels)
    similarities = prototypes.similarities(vectors)  # [Q, C]
    scores = prototypes.leave_one_out()
    calibration = Calibration(scores, "examples", len(examples))
    verdicts = []
    for row, p_value in zip(similarities, _p_values(calibration, similarities.max(axis=1)), strict=True):
        order = np.argsort(-row, kind="stable")
        ranked = [ClassScore(prototypes.names[position], float(row[position])) for position in order]
        verdicts.append(_verdict(ranked, p_value, error_rate))
    return _classified(verdicts, calibration, error_rate)


def _p_values(calibration: Calibration, scores: Sequence[float] | Floats) -> list[float | None]:
    if not len(calibration.scores):
        return [None] * len(scores)
    return list(map(float, p_values(calibration.scores, scores)))


def _kth(hits: Sequence[Hit]) -> float:
    """Return the similarity to the last hit. `hits` are the k nearest items. If there are none, return -1."""
    return hits[-1].score if hits else -1.0


def _verdict(
    scores: Sequence[ClassScore],
    p_value: float | None,
    error_rate: float,
    neighbours: Sequence[Neighbour] | None = None,
) -> Verdict:
    unknown = p_value is not None and p_value <= error_rate
    label = None if unknown or not scores else scores[0].label
    return Verdict(label, unknown, p_value, scores, neighbours)


def _classified(verdicts: list[Verdict], calibration: Calibration, error_rate: float) -> Classified:
    enough = can_promise(len(calibration.scores), error_rate)
    return Classified(verdicts, calibration, enough and calibration.is_random)
