"""Which patches the student does not see: iBOT's block masks.

As in facebookresearch/dinov2 (`dinov2/data/masking.py`, `collate.py`), after BEiT (arXiv 2106.08254): rectangles of
random area and aspect are put on the grid until the wanted number of patches is covered. A given share of the images
is masked, and their ratios are stratified over the range, so that every batch has weak and strong masks.

The strata are spread over the whole batch of a step, but each image's mask is drawn from a generator of its own: ranks
and micro-batches build the masks of their images only, and together they have those of one process with all images.

A grid is one Python integer, a bit per patch: a block is put on it and counted in a few operations on 256 bits, where
each operation on a small array costs a microsecond.

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
STREAM = 0x3A5C  # numpy seeds (seed, step) and (seed, step, 0) alike: a word of our own keeps off other users' streams


def _uniforms(rng: np.random.Generator) -> Iterator[float]:
    """Numbers in [0, 1) without end; numpy hands out many at once for the price of one."""
    while True:
        yield from rng.random(DRAWN_AT_ONCE).tolist()


def _add_block(uniforms: Iterator[float], mask: int, grid: tuple[int, int], max_patches: int) -> int:
    """`mask` with one more rectangle of 1 to `max_patches` new patches; unchanged if none was found."""
    h, w = grid
    smallest, log_aspect = min(MIN_BLOCK_PATCHES, max_patches), math.log(MIN_ASPECT)
    for _ in range(ATTEMPTS_PER_BLOCK):
        area = smallest + (max_patches - smallest) * next(uniforms)
        aspect = math.exp(log_aspect * (1 - 2 * next(uniforms)))
        block_h, block_w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < block_h < h and 0 < block_w < w):
            continue
        top, left = int(next(uniforms) * (h - block_h + 1)), int(next(uniforms) * (w - block_w + 1))
        first_column = ((1 << w * block_h) - 1) // ((1 << w) - 1)  # a bit at the start of each of its rows
        block = ((1 << block_w) - 1) * first_column << top * w + left
        if 0 < (block & ~mask).bit_count() <= max_patches:
            return mask | block
    return mask


def block_mask(rng: np.random.Generator, grid: tuple[int, int], n_masked: int) -> Mask:
    """A mask [h, w] of at most `n_masked` patches, in rectangles of aspect 0.3 to 3.3 and at most half the grid each.

    Fewer patches come out when no further block fits in ten attempts, as in the original.
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
    """How many patches to mask in each of a step's images [n_total].

    `probability` of the images get a mask, the i-th of m in random order one with a ratio in the i-th m-th of `ratio`.
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
    """Masks [B, h * w] of the images at `positions` [B] among the `n_total` of a step, all ranks together.

    A pure function of (seed, step, position, n_total) and the settings: any split of the positions gives the same.
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
