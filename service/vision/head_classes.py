"""Classify an image with a classification head of the artifact: one of Meta's, or one that was trained here."""

from collections.abc import Mapping

import numpy as np

from model.heads.record import Floats, ImageTokens
from model.heads.store import Head
from service.errors import EngineFailed
from service.features.pipeline import Embedded
from service.features.served_model import ServedModel
from service.vision.heads import open_named
from service.vision.knn import ClassScore


def open_classification_head(model: ServedModel, name: str) -> Head:
    """Open a classification head of the served model. `name` may be "auto" if the model has only one such head. This
    function reads files, so call it in a worker thread.

    Raises:
        InvalidRequest: there is no such head. The message lists the heads that exist.
        EngineFailed: the files of the head are damaged.
    """
    return open_named(model, "classification", None if name == "auto" else name)


def head_scores(head: Head, embedded: Embedded, outputs: Mapping[str, Floats]) -> list[ClassScore]:
    """Return the probability of each class, highest first. `outputs` contains the inner outputs of the image that the
    head needs.

    Raises:
        EngineFailed: a logit is not finite, because the numbers of the head are too large.

    A classification head reads the patches only through their mean, which the embedding contains. So a head that needs
    no inner outputs can use an embedding from the cache.
    """
    cls, mean_patch = embedded.vector("cls", False), embedded.vector("mean", False)
    logits = head.classify(ImageTokens(cls, mean_patch[None], (1, 1), outputs)).astype(np.float64)
    if not np.isfinite(logits).all():
        raise EngineFailed(f"the head {head.record.name!r} gives classes that are not finite")
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    return [ClassScore(head.record.classes[position], float(shares[position])) for position in order]
