"""Combine several examples into one query: "like these images, and not like that one".

Each example is a vector. It is scaled to length 1, so that its magnitude does not matter, and multiplied by its weight.
The vector of the query is the sum of these vectors, scaled to length 1.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from service.errors import InvalidRequest
from service.search.checks import normalised_rows
from service.search.store import Floats

NOTHING_LEFT: Final = 1e-5
"""The weighted vectors cancel out if the length of their sum is at most this share of the sum of the absolute weights.
The direction of such a short sum is mostly float32 rounding error."""


def combined(vectors: npt.ArrayLike, weights: Sequence[float]) -> Floats:
    """Scale vectors to length 1, compute their weighted sum, and return it scaled to length 1.

    Args:
        vectors: [n, D]. The norm of a vector has no effect.
        weights: n finite numbers. A negative weight moves the query away from its vector.

    Returns:
        float32 [D] of length 1.

    Raises:
        InvalidRequest: a vector is zero, all weights are 0, or the weighted vectors cancel out.
    """
    if not any(weights):
        raise InvalidRequest(f"combine: the weights are {list(weights)}: at least one must not be 0", param="combine")
    rows = normalised_rows(vectors).astype(np.float64)
    total = np.asarray(weights, np.float64) @ rows  # [D]
    length = float(np.linalg.norm(total))
    if length <= NOTHING_LEFT * sum(abs(weight) for weight in weights):
        raise InvalidRequest(
            f"combine: with the weights {list(weights)} the vectors cancel out, so there is no direction to search in: "
            "change weights or vectors",
            param="combine",
        )
    return (total / length).astype(np.float32)
