"""Scores of single queries: how well a model's features find the class of a query, or the image that it shows.

A score is an integer, the number of right answers to a fixed number of questions. `service/jobs/bootstrap.py` needs
integers.

Legend: n images, m queries, V views of each image, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from model.engines.knn_gate import knn_hits
from model.engines.parity import unit_length

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

RANKS: Final = (1, 5)
"""An image is found by a crop of itself if it is among this many most similar images. As in training
(`training/evaluate/label_free.py`), the score is the mean over both."""


@dataclass(frozen=True)
class Pair:
    """Features of the same images, computed by the champion and by the challenger. The last axis may differ."""

    champion: FloatArray
    challenger: FloatArray

    def __post_init__(self) -> None:
        if self.champion.shape[:-1] != self.challenger.shape[:-1]:
            raise ValueError(
                f"features of shapes {list(self.champion.shape)} and {list(self.challenger.shape)}: champion and "
                "challenger need features of the same images"
            )


@dataclass(frozen=True)
class Scores:
    """The scores of m queries, each from 0 to `most`, for both models.

    `measure` describes the score, and `classes` is the class of each query [m], or None.
    """

    champion: IntArray
    challenger: IntArray
    most: int
    measure: str
    classes: npt.NDArray[np.str_] | None = None


def knn_scores(
    images: Pair, labels: Sequence[str], queries: Pair | None, query_labels: Sequence[str], ks: Sequence[int]
) -> Scores:
    """Score each query with the number of values in `ks` for which k-NN finds its class.

    Args:
        images: features of the n images that vote, [n, D].
        labels: their classes.
        queries: features of the m queries, [m, D]. If None, the images are the queries, and none votes for itself.
        query_labels: the classes of the queries; not used if `queries` is None.
        ks: numbers of neighbours.
    """
    names = np.array(labels if queries is None else [*labels, *query_labels], np.str_)
    numbers = np.unique(names, return_inverse=True)[1].astype(np.intp)
    own, asked = numbers[: len(labels)], numbers if queries is None else numbers[len(labels) :]

    def right(model: str) -> IntArray:
        index = getattr(images, model)
        test = index if queries is None else getattr(queries, model)
        hits = knn_hits(index, own, test, asked, ks, leave_one_out=queries is None)
        return np.asarray(hits.sum(axis=1), np.int64)

    shown = f"k = {', '.join(map(str, ks))}" if len(ks) > 1 else f"k = {ks[0]}"
    measure = f"k-NN accuracy ({'mean over ' * (len(ks) > 1)}{shown}{'; leave-one-out' * (queries is None)})"
    return Scores(right("champion"), right("challenger"), len(ks), measure, names[len(names) - len(asked) :])


def view_scores(images: Pair, views: Pair) -> Scores:
    """Score each image with the number of its views that find it, counted for each rank in `RANKS`.

    `images` contains features [n, D] of whole images, and `views` features [n, V, D] of V random crops of each image.
    Images that are exactly as similar to a crop as the own image count as more similar, so a model that maps all images
    to the same vector finds nothing.
    """

    def found(database: FloatArray, crops: FloatArray) -> IntArray:
        unit = unit_length(database)
        scores = np.zeros(len(unit), np.int64)
        for view in range(crops.shape[1]):
            for top in range(0, len(unit), 1024):
                rows = np.arange(top, min(top + 1024, len(unit)))
                similarity = unit_length(crops[rows, view]) @ unit.T
                better = (similarity >= similarity[rows - top, rows][:, None]).sum(axis=1) - 1
                scores[rows] += sum((better < rank).astype(np.int64) for rank in RANKS)
        return scores

    n_views = views.champion.shape[1]
    measure = f"images found by crops of themselves (mean over the first and the first {RANKS[-1]} ranks)"
    return Scores(
        found(images.champion, views.champion),
        found(images.challenger, views.challenger),
        n_views * len(RANKS),
        measure,
    )
