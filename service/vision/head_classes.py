"""Classify an image with a classification head of the artifact: one of Meta's, or one that was trained here."""

from collections.abc import Mapping

import numpy as np

from model.heads.record import Floats, HeadError, HeadNotFound, ImageTokens
from model.heads.store import Head, choose_head, open_head
from service.errors import EngineFailed, NotFound
from service.features.pipeline import Embedded
from service.features.served_model import ServedModel
from service.vision.knn import ClassScore


def open_classification_head(model: ServedModel, name: str) -> Head:
    """Open a classification head of the served model. `name` may be "auto" if the model has only one. This function
    reads files.

    Raises:
        NotFound: there is no such head. The message lists the heads that exist.
        EngineFailed: the file of the head is damaged.
    """
    try:
        record = choose_head(model.artifact, "classification", None if name == "auto" else name)
        return open_head(model.artifact, record)
    except HeadNotFound as error:
        raise NotFound(str(error), param="head") from error
    except HeadError as error:
        raise EngineFailed(f"head {name!r} cannot be used: {error}") from error


def head_scores(head: Head, embedded: Embedded, outputs: Mapping[str, Floats]) -> list[ClassScore]:
    """Return the probability of each class, highest first. `outputs` contains the inner outputs of the image that the
    head needs.

    A classification head reads the patches only through their mean, which the embedding contains. So a head that needs
    no inner outputs can use an embedding from the cache.
    """
    cls, mean_patch = embedded.vector("cls", False), embedded.vector("mean", False)
    logits = head.classify(ImageTokens(cls, mean_patch[None], (1, 1), outputs)).astype(np.float64)
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    return [ClassScore(head.record.classes[position], float(shares[position])) for position in order]
