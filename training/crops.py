"""What one step looks at: crops and masks of its photos, a function of (seed, step).

Legend: B photos per step, V views, N patches of a global crop.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.augment import Jitter, View, augmented_views
from training.config import TrainConfig
from training.dataset import PhotoCache, batch_indices
from training.masking import batch_masks


@dataclass(frozen=True)
class Crops:
    """One step's input: `globals_` [2B, 3, G, G], `locals_` [VB, 3, L, L] or None, `masks` bool [2B, N]."""

    globals_: Tensor
    locals_: Tensor | None
    masks: Tensor


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
    config: TrainConfig, photos: PhotoCache, step: int, views: list[tuple[View, int]], device: torch.device
) -> Crops:
    """The crops and masks of one step, a function of (seed, step) and the `views` asked for."""
    generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + step)
    indices = batch_indices(len(photos), config.batch_size, step, config.seed)
    images = photos.pixels[indices].to(device).float() / 255
    aspect = photos.aspect[indices].to(device)
    jitter = Jitter(
        white_balance=config.white_balance,
        brightness=config.brightness,
        contrast=config.contrast,
        saturation=config.saturation,
        hue=config.hue,
        probability=config.jitter_probability,
        gray=config.gray,
    )
    first, second, *local = (augmented_views(images, aspect, v, n, jitter, generator) for v, n in views if n)
    side = views[0][0].size // config.vit_config.patch_size
    masks = batch_masks(
        np.random.default_rng((config.seed, step)),
        2 * len(indices),
        (side, side),
        ratio=config.mask_ratio,
        probability=config.mask_probability,
    )
    return Crops(torch.cat((first, second)), local[0] if local else None, torch.from_numpy(masks).to(device))
