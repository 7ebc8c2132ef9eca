"""Find images that are copies of evaluation images.

An evaluation on images that were trained on measures memory, not quality. Each image is compared with each evaluation
image in three ways: by the digests of file and pixels, by perceptual hash, and by embedding. Identical images are
leaks. Pairs with near hashes or similar embeddings are candidates. The caller's verification decides about them, as it
does about duplicates (`copies/verify.py`), so two different images of one object are not a leak.

All pairs are compared, because sets of evaluation images are small. Legend: n images, m evaluation images, p pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.curate.drops import Drop
from training.curate.kmeans import Floats
from training.curate.neighbours import Pairs, neighbours_above, similarities
from training.curate.table import Images, Indices

STAGE = "leaks"


Verify = Callable[[Pairs], npt.NDArray[np.bool_]]
"""Decides which pairs of an image (`query`) and an evaluation image (`vector`) are copies, [p]."""


@dataclass(frozen=True)
class Leaks:
    """The leaks, and what the comparison found for each of the m evaluation images.

    `drops` has one entry for each leaked image. `n_leaks` is the number of images that are copies of the evaluation
    image [m]. `n_rejected` is the number of its candidates that the verification rejected [m].
    """

    drops: list[Drop]
    n_leaks: Indices
    n_rejected: Indices


def find_leaks(
    images: Images,
    evaluation: Images,
    verify: Verify,
    *,
    threshold: float,
    k: int = 64,
    hash_bits: int = 6,
    threads: int | None = None,
) -> Leaks:
    """Find the images that are copies of evaluation images.

    Args:
        images: the n images.
        evaluation: the m evaluation images.
        verify: decides which candidates are copies. They are sorted, and none is given twice.
        threshold: lowest cosine similarity of candidates.
        k: the largest number of candidates of one image by embedding, and by hash.
        hash_bits: the largest number of different bits of the perceptual hashes of candidates.
        threads: number of threads; by default, one per CPU.

    Raises:
        ValueError: see `neighbours_above`; or `hash_bits` is not from 0 to 64.
    """
    same = _identical(images, evaluation)
    pairs = _candidates(images, evaluation, threshold, k, hash_bits, threads)
    pairs = pairs.take(~np.isin(pairs.query, list(same)))
    copies = verify(pairs)
    assert copies.shape == pairs.query.shape
    found = pairs.take(copies)
    n_leaks = np.bincount(found.vector, minlength=len(evaluation))
    drops = []
    for image, (number, what) in same.items():
        n_leaks[number] += 1
        drops.append(Drop(image, STAGE, f"{what} evaluation image {evaluation.key[number]}"))
    order = np.lexsort((found.vector, -found.score, found.query))
    leaked, best = np.unique(found.query[order], return_index=True)
    for image, pair in zip(leaked.tolist(), order[best].tolist(), strict=True):
        name, score = evaluation.key[int(found.vector[pair])], float(found.score[pair])
        drops.append(Drop(image, STAGE, f"copy of evaluation image {name} (similarity {score:.3f})"))
    rejected = np.bincount(pairs.vector[~copies], minlength=len(evaluation))
    return Leaks(sorted(drops, key=lambda drop: drop.index), n_leaks, rejected)


def _identical(images: Images, evaluation: Images) -> dict[int, tuple[int, str]]:
    """Return the evaluation image that is identical with an image, and what they share, for each such image."""
    found: dict[int, tuple[int, str]] = {}
    columns = {
        "same pixels as": (images.pixels_sha256, evaluation.pixels_sha256),
        "same file as": (images.sha256, evaluation.sha256),  # the last, because it says more
    }
    for what, (own, theirs) in columns.items():
        numbers = {digest.tobytes(): number for number, digest in reversed(list(enumerate(theirs)))}
        for image, digest in enumerate(own):
            number = numbers.get(digest.tobytes())
            if number is not None:
                found[image] = number, what
    return found


def _candidates(
    images: Images, evaluation: Images, threshold: float, k: int, hash_bits: int, threads: int | None
) -> Pairs:
    """Return the pairs with similar embeddings or near hashes."""
    if not 0 <= hash_bits <= 64:
        raise ValueError(f"hash_bits is {hash_bits}; it must be from 0 to 64")
    near = neighbours_above(images.embedding, evaluation.embedding, threshold, k, exact=True, threads=threads)
    own, theirs = _signs(images.phash), _signs(evaluation.phash)
    hashes = neighbours_above(own, theirs, 1 - hash_bits / 32, k, exact=True, threads=threads)
    image, number = np.concatenate((near.query, hashes.query)), np.concatenate((near.vector, hashes.vector))
    image, number = np.divmod(np.unique(image * len(evaluation) + number), len(evaluation))
    score = similarities(images.embedding, evaluation.embedding, image, number, threads=threads)
    return Pairs(image, number, score.astype(np.float32))


def _signs(hashes: npt.NDArray[np.uint64]) -> Floats:
    """Return hashes as vectors of length 1, [n, 64]. If d bits differ, the similarity is exactly 1 - d / 32."""
    bits = np.unpackbits(np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 8), axis=1)
    return np.where(bits, np.float32(0.125), np.float32(-0.125))
