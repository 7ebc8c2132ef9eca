"""Measure how well the parts of one image match parts of another image, regardless of their positions.

One vector describes an image as a whole. Two images of the same logo in different scenes may therefore have very
different vectors. MaxSim (Khattab and Zaharia 2020, "ColBERT", arXiv 2004.12832, section 3.3) compares the patches of a
query image with those of a candidate, which is an image that a search has found. For every patch of the query, MaxSim
finds the highest cosine similarity to any patch of the candidate. The score is the mean of these cosines:

    score = mean over i of  max over j of  cos(query[i], candidate[j])

The code computes all cosines as one matrix product and takes the maximum of each row. The score is not symmetric:
content that is in the candidate but not in the query does not lower it. The positions of patches do not matter, so a
high score does not prove that the parts are arranged in the same way.

A patch of the query and a patch of the candidate match if each is the other's nearest neighbour.

Legend: Q patches of the query, N patches of the candidate, D features. All rows have length 1.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Match(NamedTuple):
    """Two matching patches: the index of one patch in the query, the index of the other in the candidate, and their
    cosine."""

    query: int
    candidate: int
    score: float


def maxsim(query: Floats, candidate: Floats, weights: Floats | None = None) -> float:
    """Return the MaxSim score of `query` [Q, D] and `candidate` [N, D], from -1 to 1. For each patch of the query, find
    the highest cosine similarity to any patch of the candidate. The score is the mean of these values, weighted with
    `weights` [Q]. If `weights` is None, all weights are equal."""
    return _mean_best(query @ candidate.T, weights)


def maxsim_matches(
    query: Floats, candidate: Floats, weights: Floats | None = None, limit: int = 10
) -> tuple[float, list[Match]]:
    """Return the MaxSim score (see `maxsim`) and up to `limit` pairs of matching patches, best first. Two patches match
    if each is the other's nearest neighbour and the weight of the query's patch is not 0."""
    cosines = query @ candidate.T  # [Q, N]
    best = cosines.argmax(axis=1)  # [Q], the first if several are equal
    mutual = cosines.argmax(axis=0)[best] == np.arange(len(query))
    if weights is not None:
        mutual &= weights > 0
    rows = np.flatnonzero(mutual)
    scores = cosines[rows, best[rows]]
    order = np.argsort(-scores, kind="stable")[:limit]
    matches = [Match(int(rows[i]), int(best[rows[i]]), float(min(1.0, scores[i]))) for i in order]
    return _mean_best(cosines, weights), matches


def _mean_best(cosines: Floats, weights: Floats | None) -> float:
    best = cosines.max(axis=1)  # [Q]
    return float(np.clip(np.average(best, weights=weights), -1, 1))
