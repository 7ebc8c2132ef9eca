"""The input of one training step: crops and masks of its images.

The crops and masks of an image depend only on (seed, step, position in the step's batch).

Legend: b images of a micro-batch, V local crops per image, N patches of a global crop, M patches of the micro-batch
that iBOT's loss is computed on, S side of a stored image, G and L sides of global and local crops.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.data.augment import Jitter, View, augmented_views
from training.data.masking import batch_masks
from training.distributed import World
from training.randomness import SampleRandom, sample_keys


@dataclass(frozen=True)
class Phase:
    """One part of a run, with its own kinds of crops and its own micro-batch size."""

    starts_at: float  # share of the run that is done when the phase begins
    views: tuple[tuple[View, int], ...]  # (kind of crop, number per image): first global, second global, local
    micro_batch: int | None = None  # images of one forward pass on one rank; None: all of them


@dataclass(frozen=True)
class CropSettings:
    """The settings by which crops and masks are made. All randomness derives from `seed`."""

    seed: int
    batch_size: int  # images of a step, over all ranks and micro-batches
    patch_size: int
    phases: tuple[Phase, ...]  # in the order of the run
    jitter: Jitter
    mask_ratio: tuple[float, float]
    mask_probability: float
    ibot_on_all_patches: bool = False  # iBOT uses every patch, and no patch is masked

    def phase(self, share_done: float) -> Phase:
        """Return the phase that is active when the share `share_done` (0 to 1) of the run is done."""
        return [phase for phase in self.phases if share_done >= phase.starts_at][-1]


@dataclass(frozen=True)
class Crops:
    """The input of one micro-batch. In each tensor the first views of all images come first, then the second views."""

    globals_: Tensor  # [2b, 3, G, G]
    locals_: Tensor | None  # [V*b, 3, L, L]
    hidden: Tensor  # bool [2b, N]: patches that the student does not see
    masks: Tensor  # bool [2b, N]: patches that iBOT's loss is computed on
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
    """Make the crops and masks of some images of a step. The result does not depend on how the batch is split.

    Args:
        settings: the run's crop settings.
        images: uint8 [b, 3, S, S].
        aspect: width / height of the images before they were squashed, float [b] on the CPU.
        step: the step, counted from 0.
        positions: positions of the images among the `batch_size` images of the step, over all ranks and micro-batches;
            int64 [b] on the CPU. Masks are numbered over the step: those of the image at position p are p (first view)
            and batch_size + p (second view).
        phase: the phase of the run that defines the views, from `settings.phase(...)`.
        device: where the crops are made and stay.
    """
    assert len(images) == len(aspect) == len(positions), (len(images), len(aspect), len(positions))
    moved = images.to(device, non_blocking=True)
    random = SampleRandom(sample_keys(settings.seed, step, positions))
    first, second, *local = (
        augmented_views(moved, aspect, view, n, settings.jitter, random.fork(kind))
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
    # Positions are computed here on the CPU with the masks: on a GPU the host would have to wait for them.
    tensors = [torch.from_numpy(x) for x in (hidden, masks, np.flatnonzero(masks))]
    if device.type == "cuda":  # from pinned memory the host need not wait for the copy
        tensors = [x.pin_memory().to(device, non_blocking=True) for x in tensors]
    return Crops(torch.cat((first, second)), local[0] if local else None, *tensors)


def make_micros(
    settings: CropSettings, world: World, pixels: Tensor, aspect: Tensor, step: int, total: int
) -> list[Crops]:
    """Make the crops of this rank's images of a step, one `Crops` per micro-batch.

    `pixels` [n, 3, S, S] and `aspect` [n] are this rank's images, `step` counts from 0, and `total` is the number of
    steps of the run.
    """
    phase = settings.phase(step / total)
    mine = range(world.rank * len(pixels), (world.rank + 1) * len(pixels))
    positions = torch.arange(mine.start, mine.stop)
    size = phase.micro_batch or len(pixels)
    return [
        make_crops(settings, p, a, step, at, phase, world.device)
        for p, a, at in zip(*(torch.split(x, size) for x in (pixels, aspect, positions)), strict=True)
    ]
