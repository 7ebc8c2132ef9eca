"""Optimizers with DINOv2's parameter groups, clipping per sub-module, and updates that skip non-finite steps.

As in facebookresearch/dinov2, `dinov2/utils/param_groups.py`: the learning rate falls by `layer_decay` per block
towards the input, and the patch embedding learns at a fraction of it. Biases, norms and LayerScale have no weight decay
(positions, class, mask and register tokens and the prototypes' lengths do). The prototypes are frozen at first. The
whole backbone can be frozen at first too, which is our addition: fresh heads on a trained backbone first learn alone.

A group stores its multipliers; `set_schedule` turns the step's values into every group's rates. Nothing here waits for
a GPU: norms, and whether a step counts, stay tensors.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from training.distributed import local, whole
from training.student_teacher import Network

Part = Literal["backbone", "head", "last_layer"]
"""Parts of the network with schedules of their own, see `Schedules.lr` in `training/step.py`."""

OptimizerKind = Literal["adamw", "sgd_normalized"]


def layer_of(name: str, depth: int) -> int:
    """Return a parameter's distance from the input, by its name: 0 embeddings, i + 1 block i, depth + 1 the rest."""
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
    """Make an optimizer of all parameters; its groups have `part`, `unit`, `lr_mult` and `wd_mult`.

    Args:
        betas: of the running averages of gradients and, for AdamW, of their squares.
        kind: `adamw`, or `sgd_normalized` (see `NormalizedSGD`) for very large batches.

    Raises:
        ValueError: an unknown kind.
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
    """Write one step's values into every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr[group["part"]] * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


@torch.no_grad()
def clip_gradients(network: nn.Module, max_norm: float) -> dict[str, Tensor]:
    """Clip each sub-module's gradient to `max_norm` on its own; return the norms before clipping, by sub-module name.

    The norms are scalars on the network's device, over all ranks if gradients are sharded.
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
    """Return the L2 norm of the gradients of `parameters` as one vector, the same on every rank; 0 without any."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return local(parameters[0]).new_zeros(())
    return whole(nn.utils.get_total_norm(gradients))


@torch.no_grad()
def optimizer_step(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Do one update if `finite` is true; otherwise leave weights and optimizer state, with its step count, unchanged.

    The host does not wait to learn which. Both kinds of `make_optimizer` read the attribute that torch's gradient
    scaler sets for optimizers that can skip a step themselves (`torch/optim/adam.py`, `_fused_adam`).

    Args:
        finite: bool scalar on the network's device, the same on all ranks: whether loss and gradient norms are finite.
    """
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


class NormalizedSGD(torch.optim.Optimizer):
    """SGD with momentum over normalised gradients, for very large batches.

    With g the gradient of a whole unit (backbone or a head: the same units as for clipping) and w a weight of it:

        m = beta * m + (1 - beta) * g / |g|,    w = w - lr * weight_decay * w - lr * m

    A step's length is at most lr whatever the size of the gradient, and neither clipping nor the scale of the loss
    changes it. m starts at 0 without bias correction: the warm-up of lr covers the first 1 / (1 - beta) steps.
    """

    def __init__(self, params: list[dict[str, Any]], *, lr: float = 0.0, beta: float = 0.9, weight_decay: float = 0.0):
        """Create the optimizer. Each group of `params` has a `unit`; gradients are measured together per unit.

        Raises:
            ValueError: beta is outside 0..1.
        """
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta} must be at least 0 and less than 1")
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})
        self._step_supports_amp_scaling = True  # a gradient scaler may set found_inf; its scale cancels out

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Do one update of all weights that have a gradient, or none if the attribute `found_inf` is 1."""
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
        if broken is not None:  # then m and w become 1 * themselves + 0 * finite numbers
            gradients = [gradient.masked_fill(broken, 0) for gradient in gradients]
            share, lr = share.masked_fill(broken, 0), torch.where(broken, 0.0, lr)
            beta, shrink = torch.where(broken, 1.0, beta), torch.where(broken, 1.0, shrink)
        torch._foreach_mul_(averages, beta)
        torch._foreach_add_(averages, torch._foreach_mul(gradients, share))
        torch._foreach_mul_(weights, shrink)
        torch._foreach_sub_(weights, torch._foreach_mul(averages, lr))
