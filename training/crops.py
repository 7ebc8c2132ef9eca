"""What one step looks at: crops and masks of its photos, a function of (seed, step, position).

Legend: b photos of this micro-batch, V views, N patches of a global crop, M selected patches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.augment import Jitter, View, augmented_views
from training.config import TrainConfig
from training.masking import batch_masks


@dataclass(frozen=True)
class Crops:
    """One micro-batch's input.

    `globals_` [2b, 3, G, G], all first views, then all second ones; `locals_` [V*b, 3, L, L] or None; `hidden` bool
    [2b, N], patches that the student does not see; `masks` bool [2b, N], patches that iBOT asks for; `selected` int64
    [M], the places of these in [2b * N].
    """

    globals_: Tensor
    locals_: Tensor | None
    hidden: Tensor
    masks: Tensor
    selected: Tensor


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
    parts = []
    jitter = Jitter(
        white_balance=config.white_balance,
        brightness=config.brightness,
        contrast=config.contrast,
        saturation=config.saturation,
        hue=config.hue,
        probability=config.jitter_probability,
        gray=config.gray,
    )
    for k, p in enumerate(positions.tolist()):
        generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + step * 1000 + p)
        x = images[k : k + 1].to(device).float() / 255
        parts.append([augmented_views(x, aspect[k : k + 1], v, n, jitter, generator) for v, n in views if n])
    first, second, *local = (torch.stack(v).transpose(0, 1).flatten(0, 1) for v in zip(*parts))
    side = views[0][0].size // config.vit_config.patch_size
    at = positions.tolist() + [config.batch_size + p for p in positions.tolist()]
    masks = batch_masks(
        config.seed,
        step,
        at,
        2 * config.batch_size,
        (side, side),
        ratio=config.mask_ratio,
        probability=config.mask_probability,
    )
    masks = torch.from_numpy(masks)
    selected = masks.flatten().nonzero().squeeze(1)
    return Crops(torch.cat((first, second)), local[0] if local else None, masks, masks, selected)
