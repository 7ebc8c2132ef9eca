"""One query of several: "like these images, and not like that one".

Every part is a direction. They are scaled to length 1, so that none counts more for the size of its numbers, then added
with their weights; the sum's direction is what is searched for.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from service.errors import InvalidRequest
from service.search.checks import normalised_rows
from service.search.store import Floats

NOTHING_LEFT: Final = 1e-5
"""Length of a sum over the sum of its weights' sizes, below which its direction is float32's rounding."""


def combined(vectors: npt.ArrayLike, weights: Sequence[float]) -> Floats:
    """The direction of the weighted sum of unit vectors.

    Args:
        vectors: [n, D], of any scale.
        weights: n finite numbers; a negative one leads away from its vector.

    Returns:
        float32 [D] of length 1.

    Raises:
        InvalidRequest: a vector without a direction; all weights are 0; or the vectors cancel out, so that the sum has
            no direction.
    """
    if not any(weights):
        raise InvalidRequest(
            f"combine: the weights are {list(weights)}, so nothing counts: at least one must not be 0", param="combine"
        )
    rows = normalised_rows(vectors).astype(np.float64)
    total = np.asarray(weights, np.float64) @ rows  # [D]
    length = float(np.linalg.norm(total))
    if length <= NOTHING_LEFT * sum(abs(weight) for weight in weights):
        raise InvalidRequest(
            f"combine: with the weights {list(weights)} the vectors cancel out, so there is no direction to search in: "
            "other weights or vectors are needed",
            param="combine",
        )
    return (total / length).astype(np.float32)
