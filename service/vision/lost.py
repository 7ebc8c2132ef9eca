"""Find objects from the similarity of patches: LOST (Siméoni et al. 2021, arXiv 2109.14279), with centred similarities.

LOST calls two patches similar if the dot product of their features is positive. With DINOv2, nearly all dot products
are positive, so plain LOST fails. Here the mean of all features is subtracted first, so with every model, about half of
the dot products are negative.

- An object is smaller than its surroundings, so its patches are similar to few others. The seed is the patch that is
  similar to the fewest.
- Patches that are similar to the seed and to few others are assumed to belong to the seed's object. A patch is a part
  of the object if the sum of its similarities to these patches is positive.
- The object is the connected part that contains the seed.

Legend: h, w size of the patch grid; n = h * w patches; D features; m patches that take part.
"""

from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from service.vision.cut import part_at, smallest_object, spread
from service.vision.foreground import MIN_SPREAD
from service.vision.multi import Found, several

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_VOTER_SHARE: Final = 0.1
_ATTEMPTS: Final = 8


def lost_mask(features: Floats, grid: tuple[int, int], among: Mask | None = None) -> Mask | None:
    """Find the patches of one object, bool [h, w]. Return None if fewer than two patches take part, or if all of them
    are equal.

    Args:
        features: [n, D] the features of the patches, scaled to length 1, in row-major order.
        grid: (h, w).
        among: bool [h, w], the patches that take part. None means all.
    """
    kept = np.arange(len(features)) if among is None else np.flatnonzero(among)
    rows = features[kept]
    if len(rows) < 2 or spread(rows) <= MIN_SPREAD:
        return None
    centred = rows - rows.mean(axis=0)
    similar = centred @ centred.T  # [m, m]
    degrees = (similar > 0).sum(axis=1)
    order = np.argsort(degrees, kind="stable")
    seed = int(order[0])
    voters = order[: max(1, round(_VOTER_SHARE * len(features)))]
    voters = voters[similar[seed, voters] > 0]
    side = np.zeros(grid, bool)
    side.ravel()[kept] = similar[:, voters].sum(axis=1) > 0
    side.ravel()[kept[seed]] = True
    return part_at(side, int(kept[seed]))


def next_object(features: Floats, grid: tuple[int, int], remaining: Mask) -> Mask | None:
    """Find an object of at least 2 % of all patches among the patches `remaining`, bool [h, w]. Return None if there is
    none. Smaller objects are removed from `remaining`, and the search is repeated, up to 8 times."""
    for _ in range(_ATTEMPTS):
        mask = lost_mask(features, grid, remaining)
        if mask is None or mask.sum() >= smallest_object(grid):
            return mask
        remaining &= ~mask
    return None


def several_lost(features: Floats, grid: tuple[int, int], *, max_objects: int, min_score: float) -> list[Found]:
    """Find up to `max_objects` objects with LOST, best first. Each search leaves out the patches that earlier searches
    found."""
    following = partial(next_object, features, grid)
    return several(features, grid, following, max_objects=max_objects, min_score=min_score)
