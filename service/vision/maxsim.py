"""How well the parts of one image are found in another, wherever they lie there.

One vector says what an image shows as a whole. Two images of the same shelf, or of one logo in different scenes, may
differ as wholes and agree in parts. MaxSim (Khattab and Zaharia 2020, "ColBERT", arXiv 2004.12832, section 3.3) looks
for every patch of the query in all patches of the candidate, takes the best cosine, and averages:

    score = mean over i of  max over j of  cos(query[i], candidate[j])

Written so it is two loops; all cosines of a pair are one matrix product, and the rest is a maximum over its rows. The
score is not symmetric: what the candidate shows beside the query costs nothing. Patches have no say in where the others
must lie, so it re-orders candidates that vectors have found; it does not verify geometry.

Two patches match when each is the other's best (mutual nearest neighbours).

Legend: Q and N patches of query and candidate, D features, rows of length 1.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Match(NamedTuple):
    """A patch of the query and one of the candidate, by their numbers, and their cosine."""

    query: int
    candidate: int
    score: float


def maxsim(query: Floats, candidate: Floats, weights: Floats | None = None) -> float:
    """Mean over the query's rows [Q, D], weighted by `weights` [Q], of the best cosine among the candidate's [N, D]."""
    return _mean_best(query @ candidate.T, weights)


def maxsim_matches(
    query: Floats, candidate: Floats, weights: Floats | None = None, limit: int = 10
) -> tuple[float, list[Match]]:
    """`maxsim`, and the best mutual matches of the query's rows that have a weight, best first."""
    cosines = query @ candidate.T  # [Q, N]
    best = cosines.argmax(axis=1)  # [Q], the first of equals
    mutual = cosines.argmax(axis=0)[best] == np.arange(len(query))
    if weights is not None:
        mutual &= weights > 0
    rows = np.flatnonzero(mutual)
    scores = cosines[rows, best[rows]]
    order = np.argsort(-scores, kind="stable")[:limit]
    found = [Match(int(rows[i]), int(best[rows[i]]), float(min(1.0, scores[i]))) for i in order]
    return _mean_best(cosines, weights), found


def _mean_best(cosines: Floats, weights: Floats | None) -> float:
    best = cosines.max(axis=1)  # [Q]
    return float(np.clip(np.average(best, weights=weights), -1, 1))
