"""Find several objects by repeated cuts, as MaskCut does (Wang et al. 2023, "Cut and Learn for Unsupervised Object
Detection", arXiv 2301.11320, section 3.2).

After each cut, the patches of the object are removed from the graph, and the remaining patches are cut again. MaskCut
always returns a fixed number of masks. Here each mask has a score, and a mask with a low score is not returned.

Legend: h, w size of the patch grid; n = h * w patches; D features.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service.vision.cut import first_object
from service.vision.object_score import object_score

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

MAX_OBJECTS: Final = 32
"""The highest number of objects that a request may ask for."""

_EXTRA_ATTEMPTS: Final = 3


class Found(NamedTuple):
    """An object: its patches, bool [h, w], and its score from 0 to 1."""

    mask: Mask
    score: float


def several(
    features: Floats,
    grid: tuple[int, int],
    next_mask: Callable[[Mask], Mask | None],
    *,
    max_objects: int,
    min_score: float,
) -> list[Found]:
    """Find up to `max_objects` objects with at least the score `min_score`, best first.

    `next_mask` receives the patches that are not in an earlier mask, bool [h, w]. It returns a mask of some of these
    patches, or None to end the search. The search also ends after three masks whose score is too low.

    Args:
        features: [n, D] the features of all patches, scaled to length 1, from which the scores are computed.
        grid: (h, w).
    """
    remaining, unclaimed = np.ones(grid, bool), np.ones(grid, bool)
    found: list[Found] = []
    failures = 0
    while len(found) < max_objects and failures < _EXTRA_ATTEMPTS:
        mask = next_mask(remaining)
        if mask is None:
            break
        score = object_score(features, mask, unclaimed)
        remaining &= ~mask
        if score >= min_score:
            unclaimed &= ~mask
            found.append(Found(mask, score))
        else:
            failures += 1
    return sorted(found, key=lambda each: -each.score)


def several_cuts(
    features: Floats, grid: tuple[int, int], *, max_objects: int, min_score: float, threshold: float | None = None
) -> list[Found]:
    """Find up to `max_objects` objects with repeated cuts, best first. `threshold` is that of `normalised_cut`."""

    def cut(remaining: Mask) -> Mask | None:
        following = first_object(features, grid, threshold=threshold, among=remaining)
        return None if following is None else following.mask

    return several(features, grid, cut, max_objects=max_objects, min_score=min_score)
