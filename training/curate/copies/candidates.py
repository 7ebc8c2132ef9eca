"""Pairs of images that may be copies. Every pair is verified later, so they only have to include the copies.

Two searches complement each other. Hashes find re-encoded, resized, recoloured, mirrored and rotated copies, also by 90
degrees; they miss crops and small rotations. The nearest embeddings find these.
"""

from typing import Final, NamedTuple, Protocol

import faiss
import numpy as np
import numpy.typing as npt

from training.curate.copies.hashes import Hashes, symmetric_hashes
from training.curate.table import Indices

FloatArray = npt.NDArray[np.float32]

HASH_CHUNKS: Final = 4


class Pairs(NamedTuple):
    """Pairs of images [p], without repetition, sorted by the first image and then by the second."""

    first: Indices
    second: Indices


class Neighbours(Protocol):
    """Finds, for each query, up to k vectors whose cosine similarity is at least `threshold`.

    It returns the numbers of the query and of the vector, and the similarity, of each pair.
    `training.curate.neighbours.neighbours_above` is one.
    """

    def __call__(
        self, queries: FloatArray, vectors: FloatArray, threshold: float, k: int, /
    ) -> tuple[Indices, Indices, npt.NDArray[np.float32]]: ...


def unique_pairs(first: Indices, second: Indices) -> Pairs:
    """Return pairs of different images of one set, the lower number first."""
    different = first != second
    low, high = np.minimum(first, second)[different], np.maximum(first, second)[different]
    return _sorted(low, high)


def _sorted(first: Indices, second: Indices) -> Pairs:
    pairs = np.unique(np.stack([first, second], axis=1).reshape(-1, 2).astype(np.int64), axis=0)
    return Pairs(pairs[:, 0], pairs[:, 1])


def near_hashes(hashes: Hashes, radius: int) -> Pairs:
    """Return the pairs of images whose hashes [n] differ in at most `radius` bits for one of the 8 symmetries."""
    return unique_pairs(*hash_neighbours(hashes, hashes, radius))


def near_embeddings(embedding: FloatArray, k: int, neighbours: Neighbours) -> Pairs:
    """Return the pairs of images of which one is among the k nearest of the other.

    Args:
        embedding: vectors of length 1, [n, D].
        k: the number of nearest images.
        neighbours: finds the nearest vectors.
    """
    query, index, _ = neighbours(embedding, embedding, -1.0, k + 1)  # one is the image itself
    return unique_pairs(query, index)


def hash_neighbours(hashes: Hashes, others: Hashes, radius: int) -> Pairs:
    """Return the pairs of hashes [m] and others [n] that differ in at most `radius` bits for one of 8 symmetries."""
    if not len(hashes) or not len(others):
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64))
    # If two hashes differ in at most r bits, one of their 4 chunks differs in at most r // 4 bits. The index compares
    # only such hashes, and finds all of them.
    index = faiss.IndexBinaryMultiHash(64, HASH_CHUNKS, 64 // HASH_CHUNKS)
    index.nflip = radius // HASH_CHUNKS
    index.add(_bytes(others))
    variants = symmetric_hashes(hashes)
    limits, _, found = index.range_search(_bytes(variants.ravel()), radius + 1)  # faiss excludes the radius itself
    query = np.repeat(np.arange(variants.size), np.diff(limits.astype(np.int64))) // variants.shape[1]
    return _sorted(query, found.astype(np.int64))


def _bytes(hashes: Hashes) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 8)
