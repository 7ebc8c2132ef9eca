"""Block masks: how many patches, how many images, how they are spread."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from training.masking import batch_masks, block_mask


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


def test_half_of_the_images_are_masked_with_stratified_ratios():
    masks = batch_masks(np.random.default_rng(0), 40, (16, 16), ratio=(0.1, 0.5), probability=0.5)
    assert masks.shape == (40, 256)
    shares = np.sort(masks.mean(axis=1))
    assert np.all(shares[:20] == 0)
    # the i-th of 20 masked images lies in the i-th twentieth of 0.1..0.5, less what did not fit
    edges = np.linspace(0.1, 0.5, 21)
    assert np.all(shares[20:] <= edges[1:])
    assert np.mean(shares[20:] - edges[:-1]) > -0.02


def test_probability_zero_masks_nothing():
    assert not batch_masks(np.random.default_rng(0), 8, (5, 5), probability=0.0).any()
