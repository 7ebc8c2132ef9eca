"""Optimizers with DINOv2's parameter groups, gradient clipping per sub-module, and skipping of non-finite updates.

The groups follow facebookresearch/dinov2, `dinov2/utils/param_groups.py`. The learning rate of each block is
`layer_decay` times that of the block after it, and that of the patch embedding is multiplied by a further factor.
Biases, norms and LayerScale have no weight decay. Position embeddings, the class, mask and register tokens, and the
lengths of the prototypes have weight decay. The prototypes are frozen at the start of a run. Unlike in DINOv2, the
whole backbone can be frozen at the start too, so that new heads on a trained backbone learn first.

Each parameter group stores multipliers, from which `set_schedule` computes the group's learning rate and weight decay
for a step. No function in this file makes the host wait for a GPU. The gradient norms stay on the device as tensors,
and so does the flag that says whether they are finite.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from training.distributed import local, whole
from training.student_teacher import Network

Part = Literal["backbone", "head", "last_layer"]
"""A part of the network that has its own learning rate schedule, see `Schedules.lr` in `training/step.py`."""

OptimizerKind = Literal["adamw", "sgd_normalized"]


def layer_of(name: str, depth: int) -> int:
    """Return how far the parameter `name` is from the input of a network with `depth` blocks, counted in blocks.

    The distance is 0 for embeddings and tokens, i + 1 for block i, and depth + 1 for the last norm and the heads.
    """
    parts = name.split(".")
    if parts[0] != "backbone":
        return depth + 1
    if parts[1] == "blocks":
        return int(parts[2]) + 1
    return depth + 1 if parts[1] == "norm" else 0


def make_optimizer(
    network: Network,
    *,
    layer_decay: float,
    patch_embed_lr_mult: float,
    betas: tuple[float, float],
    kind: OptimizerKind = "adamw",
) -> torch.optim.Optimizer:
    """Make an optimizer for all parameters of a network.

    Each parameter group has four additional entries. `unit` is the name of the sub-module (the backbone or a head).
    `part` is `backbone`, `head` or `last_layer`, which have separate learning rate schedules. `set_schedule` multiplies
    the learning rate by `lr_mult` and the weight decay by `wd_mult`.

    Args:
        network: the student.
        layer_decay: the learning rate of each block is `layer_decay` times that of the block after it.
        patch_embed_lr_mult: a further factor on the learning rate of the patch embedding.
        betas: the decay rates of the running averages of the gradients and of the squared gradients. Only AdamW uses
            the second rate.
        kind: `adamw`, or `sgd_normalized` (see `NormalizedSGD`) for very large batches.

    Raises:
        ValueError: `kind` is unknown.
    """
    depth = len(network.backbone.blocks)
    groups: dict[tuple[str, Part, float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        lr_mult = layer_decay ** (depth + 1 - layer_of(name, depth))
        if "patch_embed" in name:
            lr_mult *= patch_embed_lr_mult
        decays = not (name.endswith("bias") or "norm" in name or "gamma" in name)
        part: Part = "backbone" if name.startswith("backbone.") else "last_layer" if "last_layer" in name else "head"
        groups.setdefault((name.split(".")[0], part, lr_mult, float(decays)), []).append(parameter)
    described = [
        {"params": parameters, "unit": unit, "part": part, "lr_mult": lr_mult, "wd_mult": wd_mult}
        for (unit, part, lr_mult, wd_mult), parameters in groups.items()
    ]
    if kind == "adamw":
        return torch.optim.AdamW(described, lr=0.0, betas=betas, fused=True)
    if kind == "sgd_normalized":
        return NormalizedSGD(described, beta=betas[0])
    raise ValueError(f"optimizer={kind!r}: choose adamw or sgd_normalized")


def set_schedule(optimizer: torch.optim.Optimizer, lr: dict[Part, float], weight_decay: float) -> None:
    """Set the learning rate and the weight decay of every parameter group for one step.

    `lr` maps each part of the network (`backbone`, `head` and `last_layer`) to its learning rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr[group["part"]] * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


@torch.no_grad()
def clip_gradients(network: nn.Module, max_norm: float) -> dict[str, Tensor]:
    """Clip the gradient of each sub-module of `network` separately, so that its L2 norm is at most `max_norm`.

    Returns:
        a dictionary that maps each sub-module's name to the norm of its gradient before clipping. The norms are scalars
        on the network's device. If gradients are sharded, a norm covers the slices on all ranks.
    """
    norms = {}
    for name, module in network.named_children():
        norms[name] = gradient_norm(list(module.parameters()))
        factor = (max_norm / (norms[name] + 1e-6)).clamp(max=1)
        gradients = [local(parameter.grad) for parameter in module.parameters() if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)
    return norms


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Compute the L2 norm of all gradients of `parameters`, as one scalar. It is 0 if there are no gradients.

    If gradients are sharded, the norm covers the slices on all ranks.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return local(parameters[0]).new_zeros(())
    return whole(nn.utils.get_total_norm(gradients))


@torch.no_grad()
def optimizer_step(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Update the weights if `finite` is True. Otherwise leave the weights and the optimizer's state unchanged.

    The host does not read `finite`, so it does not wait for the device. Instead, the optimizer skips the step if its
    attribute `found_inf` is 1. torch's gradient scaler sets this attribute too (`torch/optim/adam.py`, `_fused_adam`).

    Args:
        optimizer: an optimizer that `make_optimizer` returned.
        finite: a bool scalar on the network's device that is True if all gradients are finite. It must be the same on
            all ranks.
    """
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


class NormalizedSGD(torch.optim.Optimizer):
    """An SGD optimizer with momentum over normalised gradients, for very large batches.

    A unit is a sub-module (the backbone or a head) whose gradient is normalised separately. For a unit with gradient g,
    weights w and momentum m, a step computes

        m = beta * m + (1 - beta) * g / |g|,    w = w - lr * weight_decay * w - lr * m

    Apart from weight decay, the length of an update is at most lr, however large the gradient is. An update depends
    neither on clipping nor on the scale of the loss. m starts at 0, so it is too small in the first 1 / (1 - beta)
    steps. This is not corrected, because the warm-up of the learning rate covers these steps.
    """

    def __init__(self, params: list[dict[str, Any]], *, lr: float = 0.0, beta: float = 0.9, weight_decay: float = 0.0):
        """Create the optimizer for the parameter groups `params`. Each group must have the entry `unit`.

        Raises:
            ValueError: `beta` is negative, or is 1 or more.
        """
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta} must be at least 0 and less than 1")
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})
        self._step_supports_amp_scaling = True  # a gradient scaler may set found_inf; its scale cancels out

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient. If the attribute `found_inf` is 1, no weight changes."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        units: dict[str, list[nn.Parameter]] = {}
        for group in self.param_groups:
            units.setdefault(group["unit"], []).extend(group["params"])
        norms = {unit: gradient_norm(parameters) for unit, parameters in units.items()}
        for group in self.param_groups:
            self._update(group, norms[group["unit"]], None if found_inf is None else found_inf > 0)

    def _update(self, group: dict[str, Any], norm: Tensor, broken: Tensor | None) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        averages = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        weights = [local(parameter) for parameter in parameters]
        gradients = [local(parameter.grad) for parameter in parameters]
        beta, lr = group["beta"], group["lr"]
        share = (1 - beta) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        shrink = 1 - lr * group["weight_decay"]
        if broken is not None:  # a broken step multiplies m and w by 1 and adds 0
            gradients = [gradient.masked_fill(broken, 0) for gradient in gradients]
            share, lr = share.masked_fill(broken, 0), torch.where(broken, 0.0, lr)
            beta, shrink = torch.where(broken, 1.0, beta), torch.where(broken, 1.0, shrink)
        torch._foreach_mul_(averages, beta)
        torch._foreach_add_(averages, torch._foreach_mul(gradients, share))
        torch._foreach_mul_(weights, shrink)
        torch._foreach_sub_(weights, torch._foreach_mul(averages, lr))
