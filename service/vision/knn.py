"""Classify an image by its nearest labelled images (k-NN)."""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from service.search.filters import Scalar

TEMPERATURE: Final = 0.07
"""A neighbour with the cosine similarity s has the weight exp(s / TEMPERATURE). DINO and DINOv2 use this value for
their k-NN evaluation."""


class ClassScore(NamedTuple):
    """A class and its score."""

    label: Scalar
    score: float


def vote(labels: Sequence[Scalar | None], similarities: Sequence[float]) -> list[ClassScore]:
    """Let the neighbours of an image vote for their classes, and return the share of each class, highest first.

    Args:
        labels: the class of each neighbour. A neighbour whose class is None does not vote.
        similarities: the cosine similarity of each neighbour.

    Returns:
        The classes with their shares, which sum to 1. Classes with equal shares are in the order in which they first
        occur. The list is empty if no neighbour votes.
    """
    weights: dict[tuple[bool, Scalar], float] = {}
    highest = max(similarities, default=0.0)
    for label, similarity in zip(labels, similarities, strict=True):
        if label is not None:
            key = (isinstance(label, bool), label)  # 1 == True, but they are different classes
            weights[key] = weights.get(key, 0.0) + math.exp((similarity - highest) / TEMPERATURE)
    total = sum(weights.values())
    ranked = sorted(weights.items(), key=lambda entry: -entry[1])  # stable
    return [ClassScore(label, weight / total) for (_, label), weight in ranked]
