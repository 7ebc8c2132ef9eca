"""Tests of the search for leaks. A function of the embeddings stands in for the comparison of patches."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests.training.curate.vectors import around_centres, unit
from training.curate.copies.hashes import symmetric_hashes
from training.curate.leaks import Leaks, find_leaks
from training.curate.neighbours import Pairs
from training.curate.table import Images
from training.curate.views import Views


def make_images(name: str, embedding: np.ndarray, seed: int) -> Images:
    """A table with embeddings. The other columns are random."""
    n = len(embedding)
    rng = np.random.default_rng(seed)
    ones = np.ones(n, np.int32)
    return Images(
        key=[f"{name}/{i:03d}.jpg" for i in range(n)],
        sha256=rng.integers(256, size=(n, 32), dtype=np.uint8),
        pixels_sha256=rng.integers(256, size=(n, 32), dtype=np.uint8),
        phash=rng.integers(2**64, size=n, dtype=np.uint64),
        width=ones,
        height=ones,
        n_bytes=ones.astype(np.int64),
        label=[None] * n,
        measures={},
        embedding=embedding.astype(np.float32),
    )


def sets(n: int = 40, m: int = 6) -> tuple[Images, Images]:
    """Images and evaluation images that have nothing in common: their embeddings are in different dimensions."""
    images, evaluation = np.zeros((n, 32)), np.zeros((m, 32))
    images[:, :16], evaluation[:, 16:] = around_centres(n), around_centres(m, centres=m, spread=1.0, seed=1)
    return make_images("0", images, 2), make_images("val", evaluation, 3)


def changed(images: Images, **rows: tuple[int, object]) -> Images:
    """Return the images with another value in one row of each of the named columns."""
    columns = {}
    for column, (row, value) in rows.items():
        columns[column] = getattr(images, column).copy()
        columns[column][row] = value
    return replace(images, **columns)


def all_pairs(pairs: Pairs) -> np.ndarray:
    return np.ones(len(pairs.query), bool)


def find(images: Images, evaluation: Images, verify: Callable[[Pairs], np.ndarray] = all_pairs) -> Leaks:
    return find_leaks(images, evaluation, Views.only_whole(evaluation), verify, threshold=0.8)


def reasons(leaks: Leaks) -> list[tuple[int, str]]:
    assert {drop.stage for drop in leaks.drops} <= {"leaks"}
    return [(drop.index, drop.reason) for drop in leaks.drops]


def test_sets_without_common_images_have_no_leaks() -> None:
    leaks = find(*sets())
    assert reasons(leaks) == []
    assert leaks.n_leaks.tolist() == leaks.n_rejected.tolist() == [0] * 6


def test_each_kind_of_leak_is_named() -> None:
    images, evaluation = sets()
    images = changed(images, sha256=(3, evaluation.sha256[1]), pixels_sha256=(4, evaluation.pixels_sha256[2]))
    images = changed(
        images, phash=(5, evaluation.phash[3] ^ np.uint64(0b10110)), embedding=(9, evaluation.embedding[0])
    )
    images = changed(images, pixels_sha256=(3, evaluation.pixels_sha256[1]))  # the same file has the same pixels
    leaks = find(images, evaluation)
    assert reasons(leaks) == [
        (3, "same file as evaluation image val/001.jpg"),
        (4, "same pixels as evaluation image val/002.jpg"),
        (5, "copy of evaluation image val/003.jpg (similarity 0.000)"),
        (9, "copy of evaluation image val/000.jpg (similarity 1.000)"),
    ]
    assert leaks.n_leaks.tolist() == [1, 1, 1, 1, 0, 0]


def test_the_verification_decides_about_candidates() -> None:
    images, evaluation = sets()
    images = changed(images, sha256=(3, evaluation.sha256[1]), embedding=(3, evaluation.embedding[1]))
    for row in (6, 7, 8):
        images = changed(images, embedding=(row, evaluation.embedding[0]))
    seen = []

    def only_the_eighth(pairs: Pairs) -> np.ndarray:
        seen.extend(zip(pairs.query.tolist(), pairs.vector.tolist(), strict=True))
        return pairs.query == 8

    leaks = find(images, evaluation, only_the_eighth)
    assert seen == [(6, 0), (7, 0), (8, 0)]  # nothing has to be verified about the same file
    assert [drop.index for drop in leaks.drops] == [3, 8]
    assert leaks.n_leaks.tolist() == [1, 1, 0, 0, 0, 0]
    assert leaks.n_rejected.tolist() == [2, 0, 0, 0, 0, 0]


def test_the_most_similar_evaluation_image_is_named() -> None:
    images, evaluation = sets()
    near = unit(0.95 * evaluation.embedding[:1] + 0.2 * evaluation.embedding[4:5])[0]
    evaluation = changed(evaluation, embedding=(2, unit(evaluation.embedding[:1] + 0.9 * near)[0]))
    leaks = find(changed(images, embedding=(5, evaluation.embedding[2])), evaluation)
    assert reasons(leaks) == [(5, "copy of evaluation image val/002.jpg (similarity 1.000)")]
    assert leaks.n_leaks[[0, 2]].tolist() == [1, 1]


@pytest.mark.parametrize("bits", [0, 5, 10, 11])
def test_hashes_with_few_different_bits_are_candidates(bits: int) -> None:
    images, evaluation = sets()
    different = np.uint64((1 << bits) - 1) << np.uint64(40)
    images = changed(images, phash=(11, evaluation.phash[5] ^ different))
    assert [drop.index for drop in find(images, evaluation).drops] == ([11] if bits <= 10 else [])


def test_a_leak_that_resembles_only_a_view_is_a_candidate() -> None:
    images, evaluation = sets()
    rng = np.random.default_rng(5)
    edits = unit(rng.normal(size=(6 * 5, 32))).reshape(6, 5, 32)
    embedding = np.concatenate((evaluation.embedding[:, None], edits), axis=1)
    phash = np.concatenate((evaluation.phash[:, None], rng.integers(2**64, size=(6, 6), dtype=np.uint64)), axis=1)
    images = changed(images, embedding=(7, embedding[2, 4]))
    images = changed(images, phash=(8, phash[3, 6] ^ np.uint64(0b101)))
    assert find(images, evaluation).drops == []
    leaks = find_leaks(images, evaluation, Views(embedding, phash), all_pairs, threshold=0.9)
    assert [drop.index for drop in leaks.drops] == [7, 8]
    assert leaks.n_leaks.tolist() == [0, 0, 1, 1, 0, 0]


def test_each_image_is_compared_with_at_most_k_evaluation_images() -> None:
    images, evaluation = sets()
    views = Views(np.repeat(evaluation.embedding[:, None], 3, axis=1), evaluation.phash[:, None])
    seen = []

    def note(pairs: Pairs) -> np.ndarray:
        seen.append(np.bincount(pairs.query, minlength=len(images)))
        return all_pairs(pairs)

    find_leaks(images, evaluation, views, note, threshold=-1, k=3)
    assert seen[0].max() <= 3
    assert seen[0].min() >= 2  # three views of an image are equal and take three of the six places


@pytest.mark.parametrize("symmetry", [1, 5])
def test_hashes_of_mirrored_and_rotated_leaks_are_candidates(symmetry: int) -> None:
    images, evaluation = sets()
    images = changed(images, phash=(11, symmetric_hashes(evaluation.phash)[4, symmetry]))
    assert [drop.index for drop in find(images, evaluation).drops] == [11]


def test_empty_sets() -> None:
    images, evaluation = sets()
    nothing = np.empty(0, np.int64)
    assert find(images.take(nothing), evaluation).drops == []
    assert find(images, evaluation.take(nothing)).drops == []


def test_bad_number_of_bits() -> None:
    images, evaluation = sets()
    with pytest.raises(ValueError, match="hash_bits is 65; it must be from 0 to 64"):
        find_leaks(images, evaluation, Views.only_whole(evaluation), all_pairs, threshold=0.8, hash_bits=65)
