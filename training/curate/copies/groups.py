"""Groups of copies, and which image of a group is kept.

If A is a copy of B, and B of C, then A and C may still be different images, such as two crops of one image. Groups are
therefore not chains: each image that is dropped was itself compared with the image that is kept in its place.
"""

import math
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import uniform_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from training.curate.copies.candidates import Pairs
from training.curate.copies.verify import Compare, Similarities
from training.curate.table import Indices, Pixels

PLAIN: Final = 2.0  # gray levels; images with less contrast are treated as if they had this much
GRADE: Final = 1.1  # the ratio between one grade of detail and the next
FEW_NEW: Final = 0.1
"""The number of new pairs per stored pair up to which all are compared at once. This is so after a few images were
added, and then many rounds of a few pairs each would take longer than some pairs too many."""


def detail_grade(pixels: Pixels) -> int:
    """Return how much detail an image has, as a grade. A difference of one grade is hardly visible.

    Detail is the number of pixels times the variance of each with respect to the 3 x 3 pixels around it. A reduced,
    cropped, blurred or strongly compressed copy has less of it than the original, and an enlarged copy does not have
    more, because its adjacent pixels hardly differ. The variance is relative to that of the whole image, so a change of
    brightness or contrast makes no difference.
    """
    gray = np.asarray(Image.fromarray(pixels).convert("L"), np.float32)
    local = float(np.square(gray - uniform_filter(gray, 3)).mean())
    detail = gray.size * local / max(float(gray.var()), PLAIN**2)
    return round(math.log(max(detail, 1e-6)) / math.log(GRADE))


class KnownPairs:
    """The similarities of the pairs of n images that have been compared."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._codes: Indices = np.empty(0, np.int64)  # first * n + second, ascending
        self._similarities: Similarities = np.empty(0, np.float32)

    def unknown(self, pairs: Pairs) -> Pairs:
        """Return those of the pairs that have not been compared."""
        new = ~np.isin(pairs.first * self._n + pairs.second, self._codes)
        return Pairs(pairs.first[new], pairs.second[new])

    def add(self, pairs: Pairs, similarities: Similarities) -> None:
        """Add pairs that are not known yet."""
        codes = np.concatenate([self._codes, pairs.first * self._n + pairs.second])
        order = np.argsort(codes, kind="stable")
        self._codes, self._similarities = codes[order], np.concatenate([self._similarities, similarities])[order]

    def similarity(self, pairs: Pairs) -> Similarities:
        """Return the similarities of known pairs."""
        return self._similarities[np.searchsorted(self._codes, pairs.first * self._n + pairs.second)]

    def copies(self, threshold: float) -> Pairs:
        """Return the known pairs whose similarity is at least the threshold."""
        codes = self._codes[self._similarities >= threshold]
        return Pairs(codes // self._n, codes % self._n)


def ordered(first: Indices, second: Indices) -> Pairs:
    """Return pairs with the lower number first, in the given order."""
    return Pairs(np.minimum(first, second), np.maximum(first, second))


def nothing_stored(first: Indices, second: Indices) -> Similarities:
    """Return NaN for each pair: no earlier run has compared it."""
    return np.full(len(first), np.nan, np.float32)


def components(known: KnownPairs, n: int, threshold: float) -> Indices:
    """Return the number of the component of connected copies to which each of n images belongs."""
    first, second = known.copies(threshold)
    links = coo_array((np.ones(len(first), bool), (first, second)), shape=(n, n))
    return connected_components(links, directed=False)[1].astype(np.int64)


def connect_copies(
    links: Pairs, n: int, known: KnownPairs, threshold: float, compare: Compare, recall: Compare = nothing_stored
) -> None:
    """Compare pairs until the components of connected copies are the same as if all pairs had been compared.

    A pair within a component need not be compared, so k copies of an image take about k comparisons, not k squared.

    Args:
        links: the pairs of n images that may be copies.
        n: the number of images.
        known: the pairs that have been compared. Pairs that are compared here are added.
        threshold: the similarity from which two images are copies.
        compare: compares pairs.
        recall: returns the similarities of pairs that an earlier run has compared, and NaN for the others.
    """
    links = known.unknown(links)
    stored = recall(links.first, links.second)
    is_stored = ~np.isnan(stored)
    known.add(Pairs(links.first[is_stored], links.second[is_stored]), stored[is_stored])
    links = Pairs(links.first[~is_stored], links.second[~is_stored])
    while len(links.first):
        component = components(known, n, threshold)
        apart = component[links.first] != component[links.second]
        links = Pairs(links.first[apart], links.second[apart])
        centres = ~np.isin(links.first, links.second)  # the lowest images of their neighbourhoods
        centres |= len(links.first) <= FEW_NEW * is_stored.sum()
        pairs = Pairs(links.first[centres], links.second[centres])
        if len(pairs.first):
            known.add(pairs, compare(pairs.first, pairs.second))
        links = Pairs(links.first[~centres], links.second[~centres])


def choose_keepers(known: KnownPairs, quality: npt.NDArray[np.float64], threshold: float, compare: Compare) -> Indices:
    """Return, for each of n images, the number of the image that is kept in its place. It is its own if it is kept.

    In each component of connected copies, the image of the highest quality is kept, and its copies are dropped. The
    same is repeated with the rest of the component.

    Args:
        known: the pairs that have been compared. Pairs that are compared here are added.
        quality: the quality of each image [n]. Of equal images, the one with the lowest number is kept.
        threshold: the similarity from which two images are copies.
        compare: compares further pairs.
    """
    n = len(quality)
    keeper = np.arange(n, dtype=np.int64)
    component = components(known, n, threshold)
    order = np.lexsort((np.arange(n), -quality, component))
    starts = np.flatnonzero(np.diff(component[order])) + 1
    groups = [group for group in np.split(order, starts) if len(group) > 1]
    while groups:
        others = np.concatenate([group[1:] for group in groups])
        pairs = ordered(np.repeat([group[0] for group in groups], [len(group) - 1 for group in groups]), others)
        unknown = known.unknown(pairs)
        if len(unknown.first):
            known.add(unknown, compare(unknown.first, unknown.second))
        same = np.split(known.similarity(pairs) >= threshold, np.cumsum([len(group) - 1 for group in groups])[:-1])
        rests = []
        for group, copies in zip(groups, same, strict=True):
            keeper[group[1:][copies]] = group[0]
            rests.append(group[1:][~copies])
        groups = [rest for rest in rests if len(rest) > 1]
    return keeper
