"""The input of one training step: the crops of its images and their masks.

The crops and masks of an image depend only on the seed, the step and the image's position in the batch of the step.

Legend: b images of a micro-batch, V local crops per image, N patches of a global crop, M patches of the micro-batch for
which iBOT's loss is computed, S side of an image (stored as a square), G and L sides of global and local crops.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor

from training.data.augment import Geometry, Jitter, View, augmented_views
from training.data.boxes import CROP_ASPECT
from training.data.masking import batch_masks
from training.distributed import World
from training.randomness import SampleRandom, sample_keys

WIDEST_ASPECT: Final = 3 / 2
"""The aspect ratio of images up to which `least_cache_side` enlarges no crop more than Meta's code does."""

SIDE_STEP: Final = 16  # pixels


@dataclass(frozen=True)
class Phase:
    """A part of a training run, with its own kinds of crops and its own micro-batch size."""

    starts_at: float  # share of the run that is done when the phase begins
    views: tuple[tuple[View, int], ...]  # (kind of crop, number per image): first global, second global, local
    micro_batch: int | None = None  # images of one forward pass on one rank; None: all images of the rank


@dataclass(frozen=True)
class CropSettings:
    """The settings of crops and masks. All random choices are derived from `seed`."""

    seed: int
    batch_size: int  # images of a step, over all ranks and micro-batches
    patch_size: int
    phases: tuple[Phase, ...]  # in the order of the run
    jitter: Jitter
    mask_ratio: tuple[float, float]
    mask_probability: float
    ibot_on_all_patches: bool = False  # iBOT uses every patch, and no patch is masked
    geometry: Geometry = field(default_factory=Geometry)

    def phase(self, share_done: float) -> Phase:
        """Return the phase that is active once the share `share_done` (0 to 1) of the run's steps has been done."""
        return [phase for phase in self.phases if share_done >= phase.starts_at][-1]


def least_cache_side(views: Iterable[View]) -> int:
    """Return the side S of the squares to which images must be squashed so that cropping loses no detail.

    Meta's code crops the full image. In an image of W x H pixels, a crop with the share f of the area and the aspect
    ratio r (width / height) has sqrt(f r W H) columns. After the image has been squashed to a square of side S, the
    same crop has S sqrt(f r H / W) columns and S sqrt(f W / (r H)) rows. The result is the least S, rounded up to a
    multiple of 16 pixels, for which the smallest crops have at least as many columns and rows in the square as they
    have after resizing, in images with an aspect ratio of up to 3:2 (or 2:3):

        S = size * sqrt(3/2 / (3/4 * f)) = size * sqrt(2 / f), where f is the smallest area of the view

    So no crop is enlarged from the square. If Meta's code enlarges a crop, because the image is small, the enlargement
    happens here when the image is squashed, and is of the same size. An image with an aspect ratio a above 3:2 is an
    exception: its narrowest crops are enlarged up to sqrt(a / 1.5) times, which is 1.15 at 2:1. Images with both sides
    below S are no exception, because the square has all their pixels.
    """
    shortest = [view.size * math.sqrt(WIDEST_ASPECT / (CROP_ASPECT[0] * view.scale[0])) for view in views]
    return SIDE_STEP * math.ceil(max(shortest) / SIDE_STEP)


@dataclass(frozen=True)
class Crops:
    """The crops and masks of one micro-batch of b images.

    Each tensor is ordered by crop: the first crops of all images, then their second crops, and so on.
    """

    globals_: Tensor  # [2b, 3, G, G]
    locals_: Tensor | None  # [V*b, 3, L, L]
    hidden: Tensor  # bool [2b, N]: patches that the student does not see
    masks: Tensor  # bool [2b, N]: patches for which iBOT's loss is computed
    selected: Tensor  # int64 [M]: positions of the True entries of `masks`, flattened to [2b * N]


def make_crops(
    settings: CropSettings,
    images: Tensor,
    aspect: Tensor,
    step: int,
    positions: Tensor,
    phase: Phase,
    device: torch.device,
) -> Crops:
    """Make the crops and masks for some of the images of a training step.

    The result for an image does not depend on how the batch is split over ranks and micro-batches.

    Args:
        settings: the crop settings of the run.
        images: the b images as squares of side S, uint8 [b, 3, S, S].
        aspect: width / height of each image before it was squashed to a square, float [b] on the CPU.
        step: the step, counted from 0.
        positions: positions of the images among the `batch_size` images of the step, over all ranks and micro-batches;
            int64 [b] on the CPU. The image at position p gets mask p of the step for its first global crop, and mask
            batch_size + p for its second one.
        phase: the current phase of the run, which defines the kinds of crops (see `CropSettings.phase`).
        device: the device on which the crops are made and returned.
    """
    assert len(images) == len(aspect) == len(positions), (len(images), len(aspect), len(positions))
    moved = images.to(device, non_blocking=True)
    random = SampleRandom(sample_keys(settings.seed, step, positions))
    first, second, *local = (
        augmented_views(moved, aspect, view, n, settings.jitter, settings.geometry, random.fork(kind))
        for kind, (view, n) in enumerate(phase.views)
        if n
    )
    side = phase.views[0][0].size // settings.patch_size
    hidden = batch_masks(
        settings.seed,
        step,
        torch.cat((positions, settings.batch_size + positions)).tolist(),
        2 * settings.batch_size,
        (side, side),
        ratio=settings.mask_ratio,
        probability=0.0 if settings.ibot_on_all_patches else settings.mask_probability,
    )
    masks = np.ones_like(hidden) if settings.ibot_on_all_patches else hidden
    # The positions are computed on the CPU, because the host would have to wait for a GPU to compute them.
    tensors = [torch.from_numpy(x) for x in (hidden, masks, np.flatnonzero(masks))]
    if device.type == "cuda":  # the host does not wait for a copy from pinned memory
        tensors = [x.pin_memory().to(device, non_blocking=True) for x in tensors]
    return Crops(torch.cat((first, second)), local[0] if local else None, *tensors)


def make_micros(
    settings: CropSettings, world: World, pixels: Tensor, aspect: Tensor, step: int, total: int
) -> list[Crops]:
    """Make the crops and masks of this rank's images for a training step, as one `Crops` per micro-batch.

    Args:
        settings: the crop settings of the run.
        world: this process's rank and device.
        pixels: the n images of this rank as squares of side S, uint8 [n, 3, S, S].
        aspect: width / height of each image before it was squashed to a square, float [n] on the CPU.
        step: the step, counted from 0.
        total: number of steps of the run.
    """
    phase = settings.phase(step / total)
    mine = range(world.rank * len(pixels), (world.rank + 1) * len(pixels))
    positions = torch.arange(mine.start, mine.stop)
    size = phase.micro_batch or len(pixels)
    return [
        make_crops(settings, p, a, step, at, phase, world.device)
        for p, a, at in zip(*(torch.split(x, size) for x in (pixels, aspect, positions)), strict=True)
    ]
