"""Find the copies in a set of images, and decide which image of each group of copies is kept."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.curate.copies.candidates import Neighbours, Pairs, near_embeddings, near_hashes
from training.curate.copies.groups import (
    KnownPairs,
    choose_keepers,
    connect_copies,
    detail_grade,
    nothing_stored,
    ordered,
)
from training.curate.copies.verify import DEFAULT_THRESHOLD, Compare, PairComparison, Read
from training.curate.drops import Drop
from training.curate.neighbours import neighbours_above
from training.curate.table import Images, Indices

STAGE = "copies"
Grade = Callable[[Indices], npt.NDArray[np.float64]]
"""Returns the grades of detail [p] of images, which are given by their numbers [p]. See `detail_grade`."""


@dataclass(frozen=True)
class CopySettings:
    """What counts as a copy, and how many candidates are compared.

    Raises:
        ValueError: a value is out of range.
    """

    threshold: float = DEFAULT_THRESHOLD  # similarity of the aligned pixels
    hash_radius: int = 10  # bits in which the perceptual hashes of candidates may differ
    neighbours: int = 16  # images with the nearest embeddings that each image is compared with

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it must be above 0 and at most 1")
        if not 0 <= self.hash_radius <= 15:
            raise ValueError(f"hash_radius is {self.hash_radius}; it must be from 0 to 15")
        if not 0 <= self.neighbours <= 1024:
            raise ValueError(f"neighbours is {self.neighbours}; it must be from 0 to 1024")


def find_copies(
    images: Images,
    read: Read,
    settings: CopySettings,
    *,
    compare: Compare | None = None,
    recall: Compare = nothing_stored,
    grade: Grade | None = None,
    neighbours: Neighbours = neighbours_above,
) -> list[Drop]:
    """Return the images to drop because another image shows the same, sorted by number.

    Args:
        images: the n images.
        read: returns the pixels of an image, RGB [H, W, 3] uint8, upright.
        settings: what counts as a copy.
        compare: compares pairs of images; by default, a `PairComparison` of the images that `read` returns.
        recall: returns the similarities of pairs that an earlier run has compared, and NaN for the others.
        grade: returns the grades of detail of images; by default, those of the images that `read` returns.
        neighbours: finds the nearest embeddings.
    """
    comparison: Compare = compare or PairComparison(read)
    grades: Grade = grade or (lambda numbers: np.array([detail_grade(read(n)) for n in numbers.tolist()], np.float64))
    same = identical(images)
    keeper = same
    known, quality = KnownPairs(len(images)), np.zeros(len(images))
    rated = np.zeros(len(images), bool)

    def keepers(links: Pairs) -> Indices:
        connect_copies(links, len(images), known, settings.threshold, comparison, recall)
        linked = np.unique(np.concatenate(known.copies(settings.threshold)))
        new = linked[~rated[linked]]
        quality[new], rated[new] = grades(new), True
        return choose_keepers(known, quality, settings.threshold, comparison)

    unique = np.flatnonzero(same == np.arange(len(images)))
    near = _numbered(near_hashes(images.phash[unique], settings.hash_radius), unique)
    connect_copies(near, len(images), known, settings.threshold, comparison, recall)
    # The first search by embedding includes the copies found so far, because one of them may be the only neighbour of
    # another copy. The next searches are without copies, because they may have hidden others.
    left, searched = unique, np.empty(0, np.int64)
    while not np.array_equal(left, searched):
        searched = left
        keeper = keepers(_numbered(near_embeddings(images.embedding[left], settings.neighbours, neighbours), left))
        left = unique[keeper[unique] == unique]
    return _drops(images, same, keeper, known)


def _numbered(pairs: Pairs, numbers: Indices) -> Pairs:
    """Return pairs of images of a subset as pairs of images of the whole set. `numbers` are those of the subset."""
    return Pairs(numbers[pairs.first], numbers[pairs.second])


def identical(images: Images) -> Indices:
    """Return, for each image, the number of the first image [n] with the same pixels."""
    _, first, group = np.unique(_as_bytes(images.pixels_sha256), return_index=True, return_inverse=True)
    return first[group].astype(np.int64)


def _as_bytes(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    return np.ascontiguousarray(digests).view(f"V{digests.shape[1]}").ravel()


def _drops(images: Images, same: Indices, keeper: Indices, known: KnownPairs) -> list[Drop]:
    drops = []
    for image in range(len(images)):
        kept = int(keeper[same[image]])
        if kept == image:
            continue
        if kept == same[image]:
            equal = (images.sha256[image] == images.sha256[kept]).all()
            reason = f"{'same file' if equal else 'same pixels'} as {images.key[kept]}"
        else:
            similarity = float(known.similarity(ordered(same[image : image + 1], np.array([kept])))[0])
            reason = f"copy of {images.key[kept]} (similarity {similarity:.3f})"
        drops.append(Drop(image, STAGE, reason, kept))
    return drops
