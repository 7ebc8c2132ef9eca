"""Decide whether a separated part of an image is an object.

Methods that need no labels always separate something, even in a blank image. Four measurements distinguish objects from
the parts that are separated in blank images, gradients, noise and textures. A logistic function combines them into a
score from 0 to 1. benchmarks/object_score.py fits its constants and prints the error rates, which
docs/decisions/0024-no-object.md reports.

Legend: h, w size of the patch grid; n = h * w patches; D features.
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service.vision.cut import spread

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

WEIGHTS: Final = (1.48, 0.89, 2.18, -4.19)
BIAS: Final = -0.88
MIN_SCORE: Final = 0.7
"""The default of the lowest score of an object."""

_FLOOR: Final = 0.01
"""A squared distance that is too small to mean anything. It keeps ratios of tiny distances small."""


class Measurements(NamedTuple):
    """The measurements from which `object_score` computes the score.

    edge: logarithm of the mean cosine distance of neighbouring patches across the outline, divided by that of other
        neighbours. It is near 0 if the outline crosses a smooth transition.
    separation: logarithm of the squared distance between the mean inside and the mean outside, divided by the squared
        error of this distance. It is low for a few patches that differ by chance.
    step: logarithm of the mean cosine distance of neighbouring patches across the outline.
    explained: the share of the variance of all patches that the division into inside and outside explains.
    """

    edge: float
    separation: float
    step: float
    explained: float


def object_score(features: Floats, mask: Mask, among: Mask | None = None) -> float:
    """Return how likely it is that the patches in `mask` [h, w] show an object, from 0 to 1.

    Args:
        features: [n, D] the features of all patches, scaled to length 1.
        mask: bool [h, w].
        among: bool [h, w], the patches that are not a part of another object, including those in `mask`. None means all
            patches.

    Returns:
        The score. It is 0 if the mask is empty or no other patch in `among` is next to it.
    """
    measured = measure(features, mask, among)
    return 0.0 if measured is None else float(1 / (1 + np.exp(-(np.asarray(measured) @ WEIGHTS + BIAS))))


def measure(features: Floats, mask: Mask, among: Mask | None = None) -> Measurements | None:
    """Return the measurements of the patches in `mask` [h, w]. Return None if the mask is empty or no other patch in
    `among` is next to it. The arguments are those of `object_score`."""
    kept = np.ones_like(mask) if among is None else among
    distances = _neighbour_distances(features, mask, kept)
    if distances is None:
        return None
    across, elsewhere = distances
    rows = features[kept.ravel()]
    inside = mask.ravel()[kept.ravel()]
    share = float(inside.mean())
    gap = rows[inside].mean(axis=0, dtype=np.float64) - rows[~inside].mean(axis=0, dtype=np.float64)
    between = float(gap @ gap)
    total = spread(rows)
    explained = min(1.0, share * (1 - share) * between / max(total, 1e-9))
    error = (total * (1 - explained) + _FLOOR) * (1 / inside.sum() + 1 / (~inside).sum())
    return Measurements(
        edge=float(np.log((across + 1e-3) / (elsewhere + 1e-3))),
        separation=float(np.log(between / error + 1e-3)),
        step=float(np.log(across + _FLOOR)),
        explained=explained,
    )


def _neighbour_distances(features: Floats, mask: Mask, kept: Mask) -> tuple[float, float] | None:
    """Return two mean cosine distances of neighbouring patches: that of pairs with exactly one patch in the mask, and
    that of all other pairs. Only patches in `kept` are used. If there are no other pairs, the second mean is 0. Return
    None if no patch in the mask has a neighbour outside."""
    cells = features.reshape(*mask.shape, -1)  # [h, w, D]
    distances, crossing = [], []
    for one, other in (
        ((slice(1, None), slice(None)), (slice(None, -1), slice(None))),  # below, above
        ((slice(None), slice(1, None)), (slice(None), slice(None, -1))),  # right, left
    ):
        both = kept[one] & kept[other]
        distances.append((1 - np.einsum("ijd,ijd->ij", cells[one], cells[other]))[both])
        crossing.append((mask[one] != mask[other])[both])
    all_distances, all_crossing = np.concatenate(distances), np.concatenate(crossing)
    if not all_crossing.any():
        return None
    rest = all_distances[~all_crossing]
    return float(all_distances[all_crossing].mean()), float(rest.mean()) if len(rest) else 0.0
