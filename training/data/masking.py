"""Random masks for iBOT: each mask selects the patches of an image that the student does not see.

The method is that of facebookresearch/dinov2 (`dinov2/data/masking.py`, `collate.py`), after BEiT (arXiv 2106.08254):
random rectangles are added to a mask until it covers the required number of patches. Only a given share of the images
is masked. The shares of patches that are masked in these images are spread evenly over a range, so every batch contains
lightly and heavily masked images.

The numbers of patches to mask are drawn together for all images of a step, but each mask has its own random generator.
Each rank can therefore make just the masks for the images of one micro-batch, and they are the same masks that a single
process would make for the whole batch.

While a mask is built, it is one Python integer with one bit per patch. An operation on a small array takes about a
microsecond, and an operation on such an integer much less.

Legend: h x w patches of one image, B images.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

MIN_BLOCK_PATCHES = 4
MIN_ASPECT = 0.3
ATTEMPTS_PER_BLOCK = 10
DRAWN_AT_ONCE = 64
STREAM = 0x3A5C  # makes these seeds differ from (seed, step) and (seed, step, 0), which numpy treats alike


def _uniforms(rng: np.random.Generator) -> Iterator[float]:
    """Yield random numbers in [0, 1) without end.

    The numbers are drawn in blocks of 64, because drawing a block takes about as long as drawing one number.
    """
    while True:
        yield from rng.random(DRAWN_AT_ONCE).tolist()


def _add_block(uniforms: Iterator[float], mask: int, grid: tuple[int, int], max_patches: int) -> int:
    """Add one random rectangle to a mask, and return the new mask.

    A mask is an integer with one bit per patch of `grid` (height and width in patches). The rectangle adds between 1
    and `max_patches` patches. If ten attempts give no such rectangle, the mask is returned unchanged.
    """
    h, w = grid
    smallest, log_aspect = min(MIN_BLOCK_PATCHES, max_patches), math.log(MIN_ASPECT)
    for _ in range(ATTEMPTS_PER_BLOCK):
        area = smallest + (max_patches - smallest) * next(uniforms)
        aspect = math.exp(log_aspect * (1 - 2 * next(uniforms)))
        block_h, block_w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < block_h < h and 0 < block_w < w):
            continue
        top, left = int(next(uniforms) * (h - block_h + 1)), int(next(uniforms) * (w - block_w + 1))
        first_column = ((1 << w * block_h) - 1) // ((1 << w) - 1)  # a bit at the start of each row of the block
        block = ((1 << block_w) - 1) * first_column << top * w + left
        if 0 < (block & ~mask).bit_count() <= max_patches:
            return mask | block
    return mask


def block_mask(rng: np.random.Generator, grid: tuple[int, int], n_masked: int) -> Mask:
    """Make a random mask of at most `n_masked` patches for a grid of h x w patches, and return it as bool [h, w].

    The mask consists of rectangles with an aspect ratio of about 0.3 to 3.3. Each rectangle adds at most half of the
    grid's patches. As in Meta's code, the mask has fewer than `n_masked` patches if ten attempts give no further
    suitable rectangle.
    """
    h, w = grid
    uniforms = _uniforms(rng)
    mask = 0
    while (missing := n_masked - mask.bit_count()) > 0:
        more = _add_block(uniforms, mask, grid, min(missing, h * w // 2))
        if more == mask:
            break
        mask = more
    packed = np.frombuffer(mask.to_bytes(-(-h * w // 8), "little"), np.uint8)
    return np.unpackbits(packed, count=h * w, bitorder="little").astype(bool).reshape(grid)


def patches_to_mask(
    seed: int, step: int, n_total: int, n_patches: int, ratio: tuple[float, float], probability: float
) -> npt.NDArray[np.int64]:
    """Return the number of patches to mask in each of the `n_total` images of a step, int64 [n_total].

    The share `probability` of the images, chosen at random, is masked. Every image has `n_patches` patches, and the
    share of them to mask is in the range `ratio`. This range is divided into as many equal parts as there are masked
    images, and the share for each masked image is drawn from a different part.
    """
    rng = np.random.default_rng((STREAM, seed, step))
    n_with_mask = int(n_total * probability)
    edges = np.linspace(*ratio, n_with_mask + 1)
    wanted = np.zeros(n_total, np.int64)
    chosen = rng.permutation(n_total)[:n_with_mask]
    wanted[chosen] = (n_patches * rng.uniform(edges[:-1], edges[1:])).astype(np.int64)
    return wanted


def batch_masks(
    seed: int,
    step: int,
    positions: Sequence[int],
    n_total: int,
    grid: tuple[int, int],
    *,
    ratio: tuple[float, float] = (0.1, 0.5),
    probability: float = 0.5,
) -> Mask:
    """Make the masks of the images at `positions` [B] among all `n_total` images of a step.

    A mask depends only on the seed, the step, the image's position, `n_total` and the settings, and not on the other
    positions. The split of the images over ranks and micro-batches therefore does not change the masks.

    Args:
        seed: seed of the run.
        step: number of the step.
        positions: positions of the images, from 0 to `n_total` - 1.
        n_total: number of images in the step, over all ranks and micro-batches.
        grid: height h and width w of an image in patches.
        ratio: smallest and largest share of patches that are masked in a masked image.
        probability: share of the images that are masked.

    Returns:
        bool [B, h * w], True for masked patches.
    """
    assert all(0 <= position < n_total for position in positions), (positions, n_total)
    h, w = grid
    masks = np.zeros((len(positions), h * w), bool)
    if probability == 0:
        return masks
    wanted = patches_to_mask(seed, step, n_total, h * w, ratio, probability)
    for mask, position in zip(masks, positions, strict=True):
        if wanted[position]:
            rng = np.random.default_rng((STREAM, seed, step, position + 1))
            mask[:] = block_mask(rng, grid, int(wanted[position])).ravel()
    return masks
