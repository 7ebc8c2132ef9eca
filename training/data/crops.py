"""What one step looks at: crops and masks of its photos, each a function of (seed, step, position in the batch).

Legend: B photos per step, b of them on this rank and in this micro-batch, V views, N patches of a global crop, M of
all of them selected, S side of a stored photo, G and L sides of global and local crops.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.config import TrainConfig
from training.data.augment import Jitter, View, augmented_views
from training.data.masking import batch_masks
from training.distributed import World
from training.randomness import SampleRandom, sample_keys


@dataclass(frozen=True)
class Crops:
    """One micro-batch's input. All photos' first views come first, then all second ones."""

    globals_: Tensor  # [2b, 3, G, G]
    locals_: Tensor | None  # [V*b, 3, L, L]
    hidden: Tensor  # bool [2b, N]: patches that the student does not see
    masks: Tensor  # bool [2b, N]: patches that iBOT asks for
    selected: Tensor  # int64 [M]: the places of these in [2b * N]


def crop_views(config: TrainConfig, share_done: float) -> list[tuple[View, int]]:
    """First global, second global and local view with how many of each, when `share_done` of the run is over."""
    last = config.last_phase
    sizes = last if last is not None and share_done >= 1 - last.share else config
    return [
        (View(sizes.global_size, sizes.global_scale, config.blur[0]), 1),
        (View(sizes.global_size, sizes.global_scale, config.blur[1], config.solarize), 1),
        (View(sizes.local_size, sizes.local_scale, config.blur[2]), config.n_local),
    ]


def make_crops(
    config: TrainConfig,
    images: Tensor,
    aspect: Tensor,
    step: int,
    positions: Tensor,
    views: list[tuple[View, int]],
    device: torch.device,
) -> Crops:
    """Crops and masks of some photos of a step, the same ones in whatever split of the batch they are asked for.

    Args:
        config: the run's settings; its seed is the root of all randomness.
        images: the photos, uint8 [b, 3, S, S].
        aspect: their width / height before they were squashed, float [b], on the CPU.
        step: counted from 0.
        positions: where they stand among the `config.batch_size` photos of the step, over all ranks and micro-batches;
            int64 [b], on the CPU. The first view of photo p is image p of the step's masks, the second batch_size + p.
        views: `crop_views`.
        device: where the crops are made and stay.
    """
    assert len(images) == len(aspect) == len(positions), (len(images), len(aspect), len(positions))
    jitter = Jitter(
        white_balance=config.white_balance,
        brightness=config.brightness,
        contrast=config.contrast,
        saturation=config.saturation,
        hue=config.hue,
        probability=config.jitter_probability,
        gray=config.gray,
    )
    photos = images.to(device, non_blocking=True)
    random = SampleRandom(sample_keys(config.seed, step, positions))
    first, second, *local = (
        augmented_views(photos, aspect, view, n, jitter, random.fork(kind)) for kind, (view, n) in enumerate(views) if n
    )
    side = views[0][0].size // config.vit_config.patch_size
    hidden = batch_masks(
        config.seed,
        step,
        torch.cat((positions, config.batch_size + positions)).tolist(),
        2 * config.batch_size,
        (side, side),
        ratio=config.mask_ratio,
        probability=config.mask_probability if config.ibot_patches == "masked" else 0.0,
    )
    masks = hidden if config.ibot_patches == "masked" else np.ones_like(hidden)
    # Looked up here, where the masks are made: on a GPU the host would have to wait for the answer.
    there = [torch.from_numpy(x) for x in (hidden, masks, np.flatnonzero(masks))]
    if device.type == "cuda":  # from pinned memory the host need not wait for the copy
        there = [x.pin_memory().to(device, non_blocking=True) for x in there]
    return Crops(torch.cat((first, second)), local[0] if local else None, *there)


def make_micros(
    config: TrainConfig, world: World, pixels: Tensor, aspect: Tensor, step: int, total: int
) -> list[Crops]:
    """This rank's photos of a step as crops, cut into micro-batches."""
    views = crop_views(config, step / total)
    mine = range(world.rank * len(pixels), (world.rank + 1) * len(pixels))
    positions = torch.arange(mine.start, mine.stop)
    size = config.micro_batch or len(pixels)
    if views[0][0].size != config.global_size and config.last_phase is not None:
        size = config.last_phase.micro_batch or size
    return [
        make_crops(config, p, a, step, at, views, world.device)
        for p, a, at in zip(*(torch.split(x, size) for x in (pixels, aspect, positions)), strict=True)
    ]
