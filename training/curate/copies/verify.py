"""Compare pairs of images pixel by pixel, after aligning them."""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

from training.curate.copies.align import align
from training.curate.copies.keypoints import Keypoints, keypoints_of
from training.curate.table import Indices, Pixels

Read = Callable[[int], Pixels]
Similarities = npt.NDArray[np.float32]
Compare = Callable[[Indices, Indices], Similarities]
"""Returns the similarities [p] of pairs of images, which are given by their numbers [p]."""

DEFAULT_THRESHOLD = 0.92
"""The similarity from which two images are copies (docs/decisions/0058-copies.md)."""
KEPT_IMAGES = 1024
"""The number of images whose keypoints are kept in memory, of about 250 kB each."""


class PairComparison:
    """Computes the similarity of pairs of images, from 0 to 1. A pair is a function of the pixels of its two images.

    Args:
        read: returns the pixels of an image, RGB [H, W, 3] uint8, upright.
        read_second: returns the pixels of the second image of a pair, if the pairs connect two sets of images.
        kept: the number of images whose keypoints are kept in memory.
    """

    def __init__(self, read: Read, read_second: Read | None = None, kept: int = KEPT_IMAGES) -> None:
        self._first = _remembered(read, kept)
        self._second = self._first if read_second is None else _remembered(read_second, kept)

    def __call__(self, first: Indices, second: Indices) -> Similarities:
        """Return the similarities [p] of the pairs of the images `first` [p] and `second` [p]."""
        found = np.zeros(len(first), np.float32)
        for pair in np.lexsort((second, first)).tolist():  # so the first image of a pair is the one just read
            found[pair] = align(self._first(int(first[pair])), self._second(int(second[pair]))).similarity
        return found


def _remembered(read: Read, kept: int) -> Callable[[int], Keypoints]:
    return lru_cache(kept)(partial(_keypoints, read))


def _keypoints(read: Read, index: int) -> Keypoints:
    return keypoints_of(read(index))
