"""Find images that are copies of evaluation images.

An evaluation on images that were trained on measures memory, not quality. Each image is compared with each evaluation
image in three ways: by the digests of file and pixels, by perceptual hash, and by embedding. Identical images are
leaks. Pairs with near hashes or similar embeddings are candidates. So are pairs of an image and a crop or a mixture of
the colours of an evaluation image (`views.py`). The caller's verification decides about candidates, as it does about
duplicates (`copies/verify.py`), so two different images of one object are not a leak.

All pairs are compared, because sets of evaluation images are small. Legend: n images, m evaluation images, V
embeddings and H hashes of each, p pairs, D dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.curate.copies.candidates import hash_neighbours
from training.curate.drops import Drop
from training.curate.kmeans import Floats
from training.curate.neighbours import Pairs, neighbours_above, similarities
from training.curate.table import Images, Indices
from training.curate.views import Views

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
    views: Views,
    verify: Verify,
    *,
    threshold: float,
    k: int = 16,
    hash_bits: int = 10,
    threads: int | None = None,
) -> Leaks:
    """Find the images that are copies of evaluation images.

    Args:
        images: the n images.
        evaluation: the m evaluation images.
        views: the embeddings [m, V, D] and hashes [m, H] of the evaluation images and of their edits.
        verify: decides which candidates are copies. They are sorted, and none is given twice.
        threshold: lowest cosine similarity of candidates.
        k: the largest number of candidates of one image by embedding.
        hash_bits: the largest number of bits in which the perceptual hashes of candidates differ, for the best of the
            8 symmetries.
        threads: number of threads; by default, one per CPU.

    Raises:
        ValueError: see `neighbours_above`; or `hash_bits` is not from 0 to 64.
    """
    same = _identical(images, evaluation)
    different = np.setdiff1d(np.arange(len(images)), list(same))
    pairs = _candidates(images.take(different), evaluation, views, threshold, k, hash_bits, threads)
    pairs = Pairs(different[pairs.query], pairs.vector, pairs.score)
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
    images: Images, evaluation: Images, views: Views, threshold: float, k: int, hash_bits: int, threads: int | None
) -> Pairs:
    """Return the pairs with similar embeddings or near hashes. Their scores are those of the whole images."""
    if not 0 <= hash_bits <= 64:
        raise ValueError(f"hash_bits is {hash_bits}; it must be from 0 to 64")
    near = _near_views(images.embedding, views.embedding, threshold, k, threads)
    n_hashes = views.phash.shape[1]
    hashes = hash_neighbours(views.phash.ravel(), images.phash, hash_bits)
    image = np.concatenate((near.query, hashes.second))
    number = np.concatenate((near.vector, hashes.first // n_hashes))
    image, number = np.divmod(np.unique(image * len(evaluation) + number), max(1, len(evaluation)))
    score = similarities(images.embedding, evaluation.embedding, image, number, threads=threads)
    return Pairs(image, number, score.astype(np.float32))


def _near_views(embedding: Floats, views: Floats, threshold: float, k: int, threads: int | None) -> Pairs:
    """Return, for each image [n, D], the k evaluation images of which a view [m, V, D] is most similar."""
    n_views = views.shape[1]
    # An evaluation image takes up to V places. Most of its views resemble each other, so twice k places are enough.
    places = 2 * k if n_views > 1 else k
    near = neighbours_above(
        embedding, views.reshape(-1, views.shape[2]), threshold, places, exact=True, threads=threads
    )
    number = near.vector // n_views
    _, first = np.unique(near.query * (len(views) + 1) + number, return_index=True)  # the best view, as they are sorted
    first.sort()
    query = near.query[first]
    rank = np.arange(len(query)) - np.searchsorted(query, query)  # within the image
    chosen = first[rank < k]
    return Pairs(near.query[chosen], number[chosen], near.score[chosen])
