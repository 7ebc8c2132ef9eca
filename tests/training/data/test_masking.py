"""Block masks: how many patches, how many images, how they are spread, and that no batch matters."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.masking import batch_masks, block_mask, patches_to_mask


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(2, 16), st.integers(2, 16), st.floats(0, 0.6))
def test_a_mask_never_has_more_patches_than_asked(seed, h, w, ratio):
    wanted = int(h * w * ratio)
    mask = block_mask(np.random.default_rng(seed), (h, w), wanted)
    assert mask.shape == (h, w)
    assert mask.sum() <= wanted


def test_masks_reach_nearly_what_was_asked():
    counts = [block_mask(np.random.default_rng(seed), (16, 16), 100).sum() for seed in range(100)]
    assert np.mean(counts) > 95


def test_masks_are_blocks_not_noise():
    def neighbours(mask):
        return (mask[:, 1:] & mask[:, :-1]).sum() / mask.sum()

    rng = np.random.default_rng(0)
    blocks = np.mean([neighbours(block_mask(rng, (16, 16), 64)) for _ in range(50)])
    noise = np.mean([neighbours(rng.random((16, 16)) < 0.25) for _ in range(50)])
    assert blocks > 2 * noise


def plain_block_mask(rng, grid, n_masked):
    """The definition on an array, a patch at a time; the numbers come in the same order."""
    h, w = grid
    mask = np.zeros(grid, bool)
    numbers = iter(rng.random(10_000).tolist())
    while mask.sum() < n_masked:
        most = min(n_masked - mask.sum(), h * w // 2)
        for _ in range(10):
            area = min(4, most) + (most - min(4, most)) * next(numbers)
            aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * next(numbers))
            block_h, block_w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < block_h < h and 0 < block_w < w):
                continue
            top, left = int(next(numbers) * (h - block_h + 1)), int(next(numbers) * (w - block_w + 1))
            block = mask[top : top + block_h, left : left + block_w]
            if 0 < (~block).sum() <= most:
                block[:] = True
                break
        else:
            break
    return mask


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 20), st.floats(0, 1))
def test_masks_are_the_plain_definition(seed, h, w, ratio):
    wanted = int(h * w * ratio)
    expected = plain_block_mask(np.random.default_rng(seed), (h, w), wanted)
    np.testing.assert_array_equal(block_mask(np.random.default_rng(seed), (h, w), wanted), expected)


def test_half_of_the_images_are_masked_with_stratified_ratios():
    masks = batch_masks(0, 5, range(40), 40, (16, 16), ratio=(0.1, 0.5), probability=0.5)
    assert masks.shape == (40, 256)
    assert masks.dtype == bool
    shares = np.sort(masks.mean(axis=1))
    assert np.all(shares[:20] == 0)
    # the i-th of 20 masked images lies in the i-th twentieth of 0.1..0.5, less what did not fit
    edges = np.linspace(0.1, 0.5, 21)
    assert np.all(shares[20:] <= edges[1:])
    assert np.mean(shares[20:] - edges[:-1]) > -0.02


def test_every_image_gets_every_ratio_in_time():
    wanted = np.stack([patches_to_mask(3, step, 12, 100, (0.1, 0.5), 0.5) for step in range(400)])
    assert np.all((wanted > 0).sum(axis=1) == 6)
    np.testing.assert_allclose((wanted > 0).mean(axis=0), 0.5, atol=0.12)
    np.testing.assert_allclose([image[image > 0].mean() for image in wanted.T], 30, atol=4)


@pytest.mark.parametrize("probability", [0.3, 0.5, 1.0])
def test_any_split_of_the_batch_has_the_masks_of_the_whole(probability):
    whole = batch_masks(7, 3, range(24), 24, (6, 5), probability=probability)
    for parts in ([range(12), range(12, 24)], [[i] for i in range(24)], [[5, 17, 0], [23, 1]]):
        for part in parts:
            found = batch_masks(7, 3, part, 24, (6, 5), probability=probability)
            np.testing.assert_array_equal(found, whole[list(part)])


def test_masks_differ_by_seed_step_and_image():
    def drawn(seed, step):
        return batch_masks(seed, step, range(16), 16, (16, 16), ratio=(0.3, 0.3), probability=1.0)

    masks = np.concatenate([drawn(0, 0), drawn(0, 1), drawn(1, 0)])
    assert len(np.unique(masks, axis=0)) == 48
    np.testing.assert_array_equal(drawn(0, 1), drawn(0, 1))


def test_probability_zero_masks_nothing():
    masks = batch_masks(0, 0, range(8), 8, (5, 5), probability=0.0)
    assert masks.shape == (8, 25)
    assert not masks.any()


def test_an_image_outside_the_batch_is_our_bug():
    with pytest.raises(AssertionError):
        batch_masks(0, 0, [8], 8, (5, 5))
