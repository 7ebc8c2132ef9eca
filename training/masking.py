"""Which patches the student does not see: iBOT's block masks.

As in facebookresearch/dinov2 (`dinov2/data/masking.py`, `collate.py`), after BEiT (arXiv 2106.08254): rectangles of
random area and aspect are put on the grid until the wanted number of patches is covered. A given share of the images
is masked, and their ratios are stratified over the range, so that every batch has weak and strong masks.

Legend: h x w patches of one image, B images.
"""

import itertools
import math

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

MIN_BLOCK_PATCHES = 4
MIN_ASPECT = 0.3
ATTEMPTS_PER_BLOCK = 10


def block_mask(rng: np.random.Generator, grid: tuple[int, int], n_masked: int) -> Mask:
    """A mask [h, w] of at most `n_masked` patches, in rectangles of aspect 0.3 to 3.3 and at most half the grid each.

    Fewer patches come out when no further block fits in ten attempts, as in the original.
    """
    h, w = grid
    mask = np.zeros(grid, bool)
    count = 0
    while count < n_masked:
        added = _add_block(rng, mask, min(n_masked - count, h * w // 2))
        if not added:
            break
        count += added
    return mask


def _add_block(rng: np.random.Generator, mask: Mask, max_patches: int) -> int:
    """Put one rectangle with 1 to `max_patches` new patches onto `mask`; how many were new, 0 if none was found."""
    h, w = mask.shape
    for _ in range(ATTEMPTS_PER_BLOCK):
        area = rng.uniform(min(MIN_BLOCK_PATCHES, max_patches), max_patches)
        aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
        block_h, block_w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < block_h < h and 0 < block_w < w):
            continue
        top, left = rng.integers(0, h - block_h + 1), rng.integers(0, w - block_w + 1)
        block = mask[top : top + block_h, left : left + block_w]
        n_new = block.size - int(block.sum())
        if 0 < n_new <= max_patches:
            block[:] = True
            return n_new
    return 0


def batch_masks(
    rng: np.random.Generator,
    n_images: int,
    grid: tuple[int, int],
    *,
    ratio: tuple[float, float] = (0.1, 0.5),
    probability: float = 0.5,
) -> Mask:
    """Masks [B, h * w]: `probability` of the images masked, their ratios stratified over `ratio`, in random order."""
    h, w = grid
    n_with_mask = int(n_images * probability)
    edges = np.linspace(*ratio, n_with_mask + 1)
    masks = np.zeros((n_images, h * w), bool)
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        masks[index] = block_mask(rng, grid, int(h * w * rng.uniform(low, high))).ravel()
    return rng.permutation(masks)
