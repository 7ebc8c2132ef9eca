"""How well the parts of one image are found in another, at any position.

One vector describes an image as a whole. Two images of the same shelf, or of one logo in different scenes, may differ
as wholes and agree in parts. MaxSim (Khattab and Zaharia 2020, "ColBERT", arXiv 2004.12832, section 3.3) finds the best
cosine of every patch of the query among all patches of the candidate, and averages:

    score = mean over i of  max over j of  cos(query[i], candidate[j])

The definition has two loops. The code computes all cosines of a pair as one matrix product and takes the maximum over
its rows. The score is not symmetric: content of the candidate that is not in the query costs nothing. Relative
positions of patches do not matter, so MaxSim re-orders candidates that a vector search has found but does not verify
geometry.

Two patches match if each is the other's best (mutual nearest neighbours).

Legend: Q and N patches of query and candidate, D features, rows of length 1.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Match(NamedTuple):
    """A matching pair: a patch of the query and one of the candidate, by index, and their cosine."""

    query: int
    candidate: int
    score: float


def maxsim(query: Floats, candidate: Floats, weights: Floats | None = None) -> float:
    """Return the mean over the query's rows [Q, D], weighted by `weights` [Q], of the best cosine among the candidate's
    [N, D]."""
    return _mean_best(query @ candidate.T, weights)


def maxsim_matches(
    query: Floats, candidate: Floats, weights: Floats | None = None, limit: int = 10
) -> tuple[float, list[Match]]:
    """Return the score of `maxsim` and the best mutual matches, best first. Query rows with weight 0 do not match."""
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
