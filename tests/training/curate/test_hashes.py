"""The perceptual hash, and the hashes of mirrored and rotated images that follow from it."""

import numpy as np
from PIL import Image

from tests.training.curate.scenes import scene
from training.curate.copies.hashes import distances, perceptual_hash, symmetric_hashes


def test_a_bit_says_whether_a_frequency_exceeds_the_median() -> None:
    pixels = scene(1)
    gray = np.asarray(
        Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64
    )  # the definition, without a fast transform
    cosines = np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(32) + 1) / 64)
    low = cosines @ gray @ cosines.T
    expected = "".join("01"[int(bit)] for bit in (low > np.median(low)).ravel())
    assert f"{perceptual_hash(pixels):064b}" == expected


def test_the_hash_of_each_symmetric_image_is_predicted() -> None:
    for number in range(4):
        pixels = scene(number, 200, 200)
        predicted = symmetric_hashes(np.array([perceptual_hash(pixels)], np.uint64))[0]
        for turned in (pixels, pixels.swapaxes(0, 1)):
            for image in (turned, turned[::-1], turned[:, ::-1], turned[::-1, ::-1]):
                actual = np.uint64(perceptual_hash(np.ascontiguousarray(image)))
                assert (distances(predicted, actual) <= 10).sum() == 1


def test_the_first_symmetric_hash_is_the_hash_itself() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 5, np.uint64)
    assert (symmetric_hashes(hashes)[:, 0] == hashes).all()


def test_distances_count_bits() -> None:
    assert distances(np.array([0, 2**64 - 1], np.uint64)[:, None], np.array([0, 1, 2**63], np.uint64)).tolist() == [
        [0, 1, 1],
        [64, 63, 63],
    ]
