"""AdamW with DINOv2's parameter groups, and clipping per sub-module.

From facebookresearch/dinov2, `dinov2/utils/param_groups.py`: the learning rate falls by `layer_decay` per block towards
the input, the patch embedding learns at a fraction of it, biases, norms and LayerScale have no weight decay (positions,
class, mask and register tokens and the prototypes' lengths do), and the prototypes are frozen at first. (So can be the
whole backbone, which is ours: fresh heads on a trained backbone first learn alone.)

A group carries its multipliers; `set_schedule` turns the step's values into every group's rates.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from training.student_teacher import Network

Part = Literal["backbone", "head", "last_layer"]
"""What learns at its own times: see `Schedules.lr` in `training/train.py`."""


def layer_of(name: str, depth: int) -> int:
    """Distance from the input of a parameter by its name in `Network`: 0 embeddings, i + 1 block i, else depth + 1."""
    parts = name.split(".")
    if parts[0] != "backbone":
        return depth + 1
    if parts[1] == "blocks":
        return int(parts[2]) + 1
    return depth + 1 if parts[1] == "norm" else 0


def make_optimizer(
    network: Network, *, layer_decay: float, patch_embed_lr_mult: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over all parameters; groups have `part` (of `set_schedule`), `lr_mult` and `wd_mult`."""
    depth = len(network.backbone.blocks)
    groups: dict[tuple[Part, float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        lr_mult = layer_decay ** (depth + 1 - layer_of(name, depth))
        if "patch_embed" in name:
            lr_mult *= patch_embed_lr_mult
        decays = not (name.endswith("bias") or "norm" in name or "gamma" in name)
        part: Part = "backbone" if name.startswith("backbone.") else "last_layer" if "last_layer" in name else "head"
        groups.setdefault((part, lr_mult, float(decays)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "part": part, "lr_mult": lr_mult, "wd_mult": wd_mult}
            for (part, lr_mult, wd_mult), parameters in groups.items()
        ],
        lr=0.0,
        betas=betas,
        fused=True,
    )


def set_schedule(optimizer: torch.optim.Optimizer, lr: dict[Part, float], weight_decay: float) -> None:
    """Write one step's values into every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr[group["part"]] * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


def clip_gradients(network: Network, max_norm: float) -> dict[str, Tensor]:
    """Clip each sub-module's gradient to `max_norm` on its own; the norms before, by sub-module name."""
    return {name: nn.utils.clip_grad_norm_(module.parameters(), max_norm) for name, module in network.named_children()}
