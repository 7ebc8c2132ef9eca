"""Copies are found, different images are not, and the image that is kept is a good one."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.training.curate.scenes import scene
from training.curate.copies.align import align
from training.curate.copies.candidates import Pairs, hash_neighbours, near_embeddings, near_hashes
from training.curate.copies.edits import EDITS, edited
from training.curate.copies.find import CopySettings, find_copies, identical
from training.curate.copies.groups import KnownPairs, choose_keepers, components, connect_copies, detail_grade
from training.curate.copies.hashes import distances, perceptual_hash, symmetric_hashes
from training.curate.copies.keypoints import keypoints_of
from training.curate.copies.verify import DEFAULT_THRESHOLD, PairComparison
from training.curate.neighbours import neighbours_above
from training.curate.table import Images, Indices, Pixels


def table(pixels: Sequence[Pixels], embedding: np.ndarray | None = None) -> Images:
    """Return a table of images. Unless given, the embeddings are the same, so all images are neighbours."""
    n = len(pixels)
    digests = [hashlib.sha256(repr(p.shape).encode() + p.tobytes()).digest() for p in pixels]
    return Images(
        key=[f"0/{number:03}" for number in range(n)],
        sha256=np.frombuffer(b"".join(digests), np.uint8).reshape(n, 32),
        pixels_sha256=np.frombuffer(b"".join(digests), np.uint8).reshape(n, 32),
        phash=np.array([perceptual_hash(p) for p in pixels], np.uint64),
        width=np.array([p.shape[1] for p in pixels], np.int32),
        height=np.array([p.shape[0] for p in pixels], np.int32),
        n_bytes=np.array([p.size for p in pixels], np.int64),
        label=[None] * n,
        measures={},
        embedding=np.ones((n, 1), np.float32) if embedding is None else embedding.astype(np.float32),
    )


def pairs_of(*pairs: tuple[int, int]) -> Pairs:
    columns = np.array(pairs, np.int64).reshape(-1, 2)
    return Pairs(columns[:, 0], columns[:, 1])


def comparing(copies: set[tuple[int, int]], asked: list[tuple[int, int]]) -> Callable[[Indices, Indices], np.ndarray]:
    """Return a comparison that knows the pairs of copies, and records what it was asked."""

    def compare(first: Indices, second: Indices) -> np.ndarray:
        pairs = list(zip(first.tolist(), second.tolist(), strict=True))
        asked.extend(pairs)
        return np.array([float(pair in copies) for pair in pairs], np.float32)

    return compare


# Two images


@pytest.mark.parametrize("kind", EDITS)
def test_an_edited_copy_aligns_with_its_source(kind: str) -> None:
    source = scene(5)
    found = align(keypoints_of(source), keypoints_of(edited(source, kind, np.random.default_rng(1))))
    assert found.similarity > DEFAULT_THRESHOLD
    assert found.overlap > 0.8
    assert found.inliers > 20


def test_a_copy_with_another_hue_aligns_with_its_source() -> None:
    """The gray levels of the two images have little in common, but a mixture of the channels has."""
    source = scene(5)
    turned = source[..., [1, 2, 0]]
    assert align(keypoints_of(source), keypoints_of(turned)).similarity > DEFAULT_THRESHOLD


def test_a_squashed_copy_aligns_with_its_source() -> None:
    source = scene(6)
    squashed = np.asarray(Image.fromarray(source).resize((200, 240)))
    assert align(keypoints_of(source), keypoints_of(squashed)).similarity > DEFAULT_THRESHOLD


def test_different_images_do_not_align() -> None:
    keypoints = [keypoints_of(scene(number)) for number in range(3)]
    assert max(align(keypoints[a], keypoints[b]).similarity for a, b in ((0, 1), (0, 2), (1, 2))) < 0.5


def test_another_view_of_the_same_objects_is_no_copy() -> None:
    source = scene(7)
    sheared = Image.fromarray(source).transform((300, 240), Image.Transform.AFFINE, (1, 0.08, -10, 0, 1, 0))
    assert align(keypoints_of(source), keypoints_of(np.asarray(sheared))).similarity < DEFAULT_THRESHOLD


@pytest.mark.parametrize("erased", [True, False])
def test_an_image_with_a_changed_object_is_no_copy(erased: bool) -> None:
    source, changed = scene(8), scene(8).copy()
    changed[60:170, 80:230] = 128 if erased else scene(9)[60:170, 80:230]
    assert align(keypoints_of(source), keypoints_of(changed)).similarity < DEFAULT_THRESHOLD
    changed[:, 110:], changed[90:] = source[:, 110:], source[90:]  # what is left of the change covers 1 % of the image
    assert align(keypoints_of(source), keypoints_of(changed)).similarity > DEFAULT_THRESHOLD


def test_images_without_keypoints_are_compared_as_a_whole() -> None:
    y, x = np.mgrid[:200, :200]
    blob = np.repeat(40 + 160 * np.exp(-((x - 70) ** 2 + (y - 110) ** 2) / 5000)[..., None], 3, 2).astype(np.uint8)
    ramp = np.repeat((x * 0.9 + 20)[..., None], 3, 2).astype(np.uint8)
    source, other = keypoints_of(blob), keypoints_of(ramp)
    assert max(len(source.xy), len(other.xy)) < 6
    for copy in (blob[:, ::-1], blob[::-1], blob.swapaxes(0, 1), blob.swapaxes(0, 1)[::-1]):
        assert align(source, keypoints_of(np.ascontiguousarray(copy))).similarity > DEFAULT_THRESHOLD
    assert align(source, other).similarity < 0.5


def test_plain_images_are_copies_if_their_colours_are_equal() -> None:
    white, white_too, red = (
        keypoints_of(np.full((64, 64 + extra, 3), colour, np.uint8))
        for extra, colour in ((0, (250, 250, 250)), (4, (250, 250, 250)), (0, (200, 20, 20)))
    )
    assert align(white, white_too).similarity == 1
    assert align(white, red).similarity == 0


def test_a_comparison_reads_an_image_once_for_many_pairs() -> None:
    reads: list[int] = []

    def read(index: int) -> Pixels:
        reads.append(index)
        return scene(index % 2, 80, 80)

    similarity = PairComparison(read)(np.array([0, 0, 1]), np.array([1, 2, 2]))
    assert sorted(reads) == [0, 1, 2]
    assert similarity[1] > DEFAULT_THRESHOLD > max(similarity[0], similarity[2])


def test_pairs_of_two_sets_read_each_image_from_its_set() -> None:
    compare = PairComparison(lambda index: scene(index, 80, 80), lambda index: scene(index + 1, 80, 80))
    similarity = compare(np.array([1, 1]), np.array([0, 1]))
    assert similarity[0] > DEFAULT_THRESHOLD > similarity[1]


# Candidates


def test_hash_neighbours_are_all_within_the_radius() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 40, np.uint64)
    near = []
    for number, flips in enumerate(range(14)):
        bits = rng.choice(64, flips, replace=False)
        variant = symmetric_hashes(hashes[number : number + 1])[0, number % 8]
        near.append(variant ^ np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64), initial=np.uint64(0)))
    others = np.concatenate([np.array(near, np.uint64), rng.integers(0, 2**63, 30, np.uint64)])
    found = hash_neighbours(hashes, others, 10)
    expected = np.argwhere(distances(symmetric_hashes(hashes)[:, :, None], others).min(1) <= 10)
    assert len(expected) >= 11
    assert np.stack(found, axis=1).tolist() == expected.tolist()


def test_pairs_within_a_set_have_the_lower_number_first() -> None:
    hashes = np.array([7, 2**40, 7, 6], np.uint64)
    assert np.stack(near_hashes(hashes, 1), axis=1).tolist() == [[0, 2], [0, 3], [2, 3]]
    angles = np.array([0.0, 2.0, 0.1, 3.0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    pairs = near_embeddings(vectors, 1, neighbours_above)
    assert np.stack(pairs, axis=1).tolist() == [[0, 2], [1, 3]]


# Groups


def test_the_copies_of_an_image_are_compared_once_each() -> None:
    n = 12
    links = pairs_of(*((a, b) for a in range(n) for b in range(a + 1, n)))
    asked: list[tuple[int, int]] = []
    known = KnownPairs(n)
    connect_copies(links, n, known, 0.5, comparing({(a, b) for a in range(n) for b in range(n)}, asked))
    assert len(asked) == n - 1
    assert len(set(components(known, n, 0.5).tolist())) == 1


def test_added_images_are_compared_in_one_round_and_stored_pairs_not_at_all() -> None:
    n, rng = 80, np.random.default_rng(0)
    group = rng.integers(0, 30, n)
    copies = {(a, b) for a in range(n) for b in range(n) if group[a] == group[b] and rng.random() < 0.6}
    links = pairs_of(*((a, b) for a in range(n) for b in range(a + 1, n)))
    is_old = links.second < n - 2
    before: list[tuple[int, int]] = []
    old = Pairs(links.first[is_old], links.second[is_old])
    connect_copies(old, n, KnownPairs(n), 0.5, comparing(copies, before))

    def recall(first: Indices, second: Indices) -> np.ndarray:
        pairs = zip(first.tolist(), second.tolist(), strict=True)
        return np.array([float(pair in copies) if pair in before else np.nan for pair in pairs], np.float32)

    rounds: list[list[tuple[int, int]]] = []

    def compare(first: Indices, second: Indices) -> np.ndarray:
        rounds.append([])
        return comparing(copies, rounds[-1])(first, second)

    scratch, added = KnownPairs(n), KnownPairs(n)
    connect_copies(links, n, scratch, 0.5, comparing(copies, []))
    connect_copies(links, n, added, 0.5, compare, recall)
    np.testing.assert_array_equal(components(added, n, 0.5), components(scratch, n, 0.5))
    assert len(rounds) == 1
    assert set(rounds[0]).isdisjoint(before)


def test_a_copy_of_a_copy_is_connected() -> None:
    asked: list[tuple[int, int]] = []
    known = KnownPairs(4)
    links = pairs_of((0, 1), (0, 2), (1, 2), (2, 3))  # 0 and 2 are different
    connect_copies(links, 4, known, 0.5, comparing({(0, 1), (1, 2)}, asked))
    assert components(known, 4, 0.5).tolist() == [0, 0, 0, 1]
    assert len(asked) == len(set(asked))


def test_a_chain_is_not_a_group() -> None:
    """Images 0 and 2 are copies of image 1, but not of each other. If 0 is the best, 2 has to stay."""
    known = KnownPairs(3)
    known.add(pairs_of((0, 1), (1, 2)), np.ones(2, np.float32))
    asked: list[tuple[int, int]] = []
    compare = comparing({(0, 1), (1, 2)}, asked)
    assert choose_keepers(known, np.array([3.0, 1, 2]), 0.5, compare).tolist() == [0, 0, 2]
    assert asked == [(0, 2)]
    assert choose_keepers(known, np.array([1.0, 3, 2]), 0.5, compare).tolist() == [1, 1, 1]


def test_the_rest_of_a_group_is_divided_again() -> None:
    known, copies = KnownPairs(5), {(0, 1), (1, 2), (2, 3), (2, 4), (3, 4)}
    known.add(pairs_of((0, 1), (1, 2), (2, 3), (2, 4)), np.ones(4, np.float32))
    keeper = choose_keepers(known, np.array([9.0, 1, 2, 8, 3]), 0.5, comparing(copies, []))
    assert keeper.tolist() == [0, 0, 3, 3, 3]


def test_an_edited_copy_has_less_detail() -> None:
    source = scene(11)
    image = Image.fromarray(source)
    worse = [
        image.resize((150, 120)),
        image.crop((0, 0, 250, 220)),
        image.resize((150, 120)).resize((300, 240)),
        image.resize((600, 480), Image.Resampling.BICUBIC),
    ]
    assert detail_grade(source) > max(detail_grade(np.asarray(copy)) for copy in worse)
    brighter = np.clip(source * 0.5 + 60, 0, 255).astype(np.uint8)
    assert abs(detail_grade(brighter) - detail_grade(source)) <= 1


# A set of images


def test_copies_are_dropped_and_name_the_image_that_is_kept() -> None:
    rng = np.random.default_rng(0)
    images = [scene(0), scene(1), scene(0), *(edited(scene(1), kind, rng) for kind in ("resized", "cropped")), scene(2)]
    drops = find_copies(table(images), lambda index: images[index], CopySettings())
    assert [(drop.index, drop.because) for drop in drops] == [(2, 0), (3, 1), (4, 1)]
    assert drops[0].reason == "same file as 0/000"
    assert drops[1].reason.startswith("copy of 0/001 (similarity 0.9")
    assert {drop.stage for drop in drops} == {"copies"}


def test_copies_beyond_the_nearest_images_are_found() -> None:
    """The nearest images of image 0 are its own copies, and that of the crop is image 5. Hashes find nothing here."""
    rng = np.random.default_rng(0)
    copies = [edited(scene(3), "re-encoded", rng) for _ in range(3)]
    images = [scene(3), *copies, edited(scene(3), "cropped", rng), scene(4)]
    angles = np.array([0, 0.01, 0.02, 0.03, 0.5, 0.6])
    embedding = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = replace(table(images, embedding), phash=rng.integers(0, 2**63, 6, np.uint64))
    drops = find_copies(found, lambda index: images[index], CopySettings(neighbours=1))
    assert len(drops) == 4
    assert len({drop.because for drop in drops}) == 1
    assert 5 not in {drop.index for drop in drops}


def test_a_copy_is_found_by_its_nearest_image_although_that_is_dropped() -> None:
    """Image 1 is dropped for image 0, whose embedding is far from that of the crop of image 1."""
    source = scene(3)
    almost = source.copy()
    almost[0, 0] ^= 1
    images = [almost, source, edited(source, "cropped", np.random.default_rng(0)), scene(4), scene(5)]
    angles = np.array([2, 0, 0.1, 0.15, 2.1])
    embedding = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    drops = find_copies(table(images, embedding), lambda index: images[index], CopySettings(neighbours=1))
    assert [(drop.index, drop.because) for drop in drops] == [(1, 0), (2, 0)]


def test_an_exact_copy_follows_the_image_that_it_equals() -> None:
    """Images 1 and 2 are equal. The first is dropped for image 0, so the second is, too."""
    small = np.asarray(Image.fromarray(scene(6)).resize((150, 120)))
    images = [scene(6), small, small.copy()]
    drops = find_copies(table(images), lambda index: images[index], CopySettings())
    assert [(drop.index, drop.because) for drop in drops] == [(1, 0), (2, 0)]


def test_the_result_does_not_depend_on_the_comparison_of_further_pairs() -> None:
    images = [scene(number, 80, 80) for number in range(3)]
    assert find_copies(table(images), lambda index: images[index], CopySettings()) == []
    assert find_copies(table(images[:0]), lambda index: images[index], CopySettings()) == []


def test_identical_images_have_the_number_of_the_first() -> None:
    images = [scene(0, 32, 32), scene(1, 32, 32), scene(0, 32, 32), scene(1, 32, 32)]
    assert identical(table(images)).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 0.0}, "threshold is 0.0; it must be above 0 and at most 1"),
        ({"hash_radius": 16}, "hash_radius is 16; it must be from 0 to 15"),
        ({"neighbours": -1}, "neighbours is -1; it must be from 0 to 1024"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CopySettings(**values)  # type: ignore[arg-type]
