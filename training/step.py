"""Compute one training step: the teacher's targets, the student's losses, and an update of both networks.

`TERMS` lists the losses. To add a loss, add its definition to `losses.py`, an entry to `TERMS` and a setting
`NAME_weight` to `config.py`.

Legend: B images per step on this rank, b of them in a micro-batch, V local views, N patches of a global crop, K
prototypes, M masked patches, D width of the student.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from training.data.crops import Crops
from training.distributed import (
    World,
    drop_gathered,
    gather_rows,
    gradients_stay_local,
    local,
    logsumexp_over_ranks,
    sum_over_ranks,
)
from training.losses import (
    batch_norm_center,
    center_targets,
    dino_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_targets,
    update_center,
)
from training.optimizer import Part, clip_gradients, optimizer_step, set_schedule
from training.schedules import Schedule
from training.state import Parts
from training.student_teacher import Output, update_teacher
from training.teacher_targets import TeacherTargets

SCALE_GROWS_AFTER = 2000  # finite steps in a row


@dataclass(frozen=True)
class StepSettings:
    """The settings of a training step.

    A loss with weight 0 is not computed and is reported as 0, except DINO's loss, which is always computed.
    """

    seed: int
    loss_weights: Mapping[str, float]  # by the names of `TERMS`
    student_temp: float
    centering: Literal["sinkhorn", "softmax", "batch_norm"]
    center_momentum: float
    koleo_over_ranks: bool  # True: KoLeo searches neighbours on all ranks; False: on this rank only
    clip_grad: float


@dataclass(frozen=True)
class Setup:
    """The objects that every step uses. `learner` is the module to call: the student or, with DDP, its wrapper."""

    parts: Parts
    learner: nn.Module
    autocast: torch.autocast
    world: World


@dataclass(frozen=True)
class Schedules:
    """The schedules of a run: arrays with one value per step.

    `lr` has one schedule for each part of the network (see `Part`). The learning rate of a frozen part is 0.
    """

    lr: dict[Part, Schedule]
    weight_decay: Schedule
    momentum: Schedule
    teacher_temp: Schedule


@dataclass(frozen=True)
class Targets:
    """The teacher's targets for one micro-batch of b images and K prototypes. Each row of targets sums to one.

    `cls` [2, b, K] contains the targets for the class tokens of both global crops. `patches` [M, K] contains the
    targets for the M patches that iBOT's loss uses. If that loss has weight 0, `patches` contains the teacher's logits
    instead, which no loss uses.
    """

    cls: Tensor | TeacherTargets
    patches: Tensor | TeacherTargets


def train_step(
    settings: StepSettings,
    setup: Setup,
    schedules: Schedules,
    micros: Sequence[Crops],
    step: int,
    lr_factor: float = 1.0,
    measure: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:
    """Update the student with one optimizer step, and then update its moving average.

    If a gradient is not finite, the student and the optimizer stay unchanged. The returned metric `finite` says whether
    they were updated, without making the host wait for the device.

    Args:
        settings: the settings of the step.
        setup: the networks, the optimizer and the buffers, which are changed in place.
        schedules: the schedules of the run.
        micros: the crops of this rank's images, in micro-batches of the same size.
        step: the index into the schedules, from 0.
        lr_factor: a factor on all learning rates. A rollback lowers it.
        measure: whether to compute `teacher_entropy`, the mean entropy of the class tokens' targets. This requires
            another pass over the targets.

    Returns:
        two values: a dictionary of metrics, and the student's class tokens [B, D] for the first view of this rank's B
        images. The metrics are scalars on the device. The unweighted losses of `TERMS`, their weighted sum `loss`, and
        `teacher_entropy` are averaged over this rank's micro-batches. The other metrics are the gradient norms before
        clipping and `finite` (1 or 0).
    """
    parts, world = setup.parts, setup.world
    # Drop path uses torch's global generator.
    torch.manual_seed((settings.seed * 1_000_003 + step) * world.size + world.rank)
    lr = {part: float(schedule[step]) * lr_factor for part, schedule in schedules.lr.items()}
    set_schedule(parts.optimizer, lr, float(schedules.weight_decay[step]))
    with setup.autocast:
        targets = teacher_targets(settings, setup, micros, float(schedules.teacher_temp[step]))
    parts.optimizer.zero_grad(set_to_none=True)
    terms, cls_tokens = accumulate_gradients(settings, setup, micros, targets, measure)
    norms, finite = update_student(parts, settings.clip_grad)
    update_teacher(parts.student, parts.ema, float(schedules.momentum[step]))
    return {
        **terms,
        **{f"grad_norm_{name}": norm for name, norm in norms.items()},
        "finite": finite.float(),
    }, cls_tokens


@torch.no_grad()
def teacher_targets(settings: StepSettings, setup: Setup, micros: Sequence[Crops], temp: float) -> list[Targets]:
    """Compute the teacher's targets for every micro-batch. All micro-batches on all ranks are centred as one batch."""
    outputs = [setup.parts.teacher(crops.globals_, None, None, crops.selected) for crops in micros]
    cls_logits = [torch.stack(output.global_logits.chunk(2)) for output in outputs]  # [2, b, K] each
    cls = _center(settings, setup, "dino", cls_logits, temp)
    patches: Sequence[Tensor | TeacherTargets] = [output.patch_logits for output in outputs]
    if settings.loss_weights["ibot"] > 0:
        patches = _center(settings, setup, "ibot", [output.patch_logits for output in outputs], temp)
    return [Targets(*pair) for pair in zip(cls, patches, strict=True)]


def _center(
    settings: StepSettings, setup: Setup, head: str, logits: list[Tensor], temp: float
) -> Sequence[Tensor | TeacherTargets]:
    """Turn the teacher's logits [..., K] of each micro-batch into targets over K prototypes.

    `head` is the name of the loss, `dino` or `ibot`. If the run uses a moving centre, the centre is updated afterwards.
    """
    total = sum_over_ranks(setup.world)
    if settings.centering == "sinkhorn":
        return sinkhorn_targets(logits, temp, combine=logsumexp_over_ranks(setup.world))
    if settings.centering == "batch_norm":
        return batch_norm_center(logits, temp, sum_over_ranks=total)
    center = setup.parts.buffers[head]
    targets = [center_targets(part, center.clone(), temp) for part in logits]
    moved = update_center(center, logits, settings.center_momentum, sum_over_ranks=total)
    center.copy_(torch.where(moved.isfinite().all(), moved, center))
    return targets


def entropy(targets: Tensor | TeacherTargets) -> Tensor:
    """Compute the mean entropy over all rows of targets [2, b, K] for 2 views of b images.

    The views are processed one at a time to save memory.
    """
    views = [targets[view] for view in range(2)]
    probs = (view.probs() if isinstance(view, TeacherTargets) else view for view in views)
    return torch.stack([torch.special.entr(p).sum(dim=-1).mean() for p in probs]).mean()


@dataclass(frozen=True)
class MicroBatch:
    """The input of the losses for one micro-batch: the crops, the student's output and the teacher's targets."""

    crops: Crops
    output: Output
    targets: Targets
    settings: StepSettings
    world: World


def dino_term(micro: MicroBatch) -> Tensor:
    """Compute DINO's loss: the mean cross-entropy over all pairs of a student view and a different teacher view.

    Without local crops there are only two pairs. Meta's code nevertheless divides the sum of their losses by 3, because
    it counts at least one local pair. Here the sum is divided by 2, so that a collapsed network has a loss of ln K for
    K prototypes.
    """
    output, targets, temp = micro.output, micro.targets.cls, micro.settings.student_temp
    global_logits = output.global_logits.unflatten(0, (2, -1))  # [2, b, K]
    pair_sum = sum(dino_loss(global_logits[view], targets[1 - view], temp) for view in range(2))
    n_pairs = 2
    if output.local_logits is not None:
        local_logits = output.local_logits.unflatten(0, (-1, global_logits.shape[1]))  # [V, b, K]
        pair_sum = pair_sum + dino_loss(local_logits, targets, temp)
        n_pairs += 2 * len(local_logits)
    return torch.as_tensor(pair_sum) / n_pairs


def ibot_term(micro: MicroBatch) -> Tensor:
    """Compute iBOT's loss on the patches that `micro.crops.masks` selects in both global crops."""
    crops, temp = micro.crops, micro.settings.student_temp
    return ibot_loss(micro.output.patch_logits, micro.targets.patches, crops.masks, temp, selected=crops.selected)


def koleo_term(micro: MicroBatch) -> Tensor:
    """Compute KoLeo's loss on the class tokens of each of the two global views, and return the sum of the two losses.

    The setting `koleo_over_ranks` decides whether nearest neighbours are searched on all ranks or only on this rank.
    """
    world = micro.world

    def of_view(cls: Tensor) -> Tensor:
        if world.size == 1 or not micro.settings.koleo_over_ranks:
            return koleo_loss(cls)
        return koleo_loss(cls, gather_rows(world, cls), offset=world.rank * len(cls))

    first, second = micro.output.cls.chunk(2)
    return of_view(first) + of_view(second)


TERMS: dict[str, Callable[[MicroBatch], Tensor]] = {"dino": dino_term, "ibot": ibot_term, "koleo": koleo_term}
"""The functions that compute the unweighted losses of a micro-batch, keyed by the losses' names in metrics.jsonl."""

ALWAYS_COMPUTED = frozenset({"dino"})  # the value shows a collapse, even if the weight is 0


def losses(settings: StepSettings, setup: Setup, crops: Crops, targets: Targets) -> tuple[dict[str, Tensor], Tensor]:
    """Run the student on a micro-batch of b images, and compute the losses.

    Returns:
        two values: a dictionary of losses, and the student's class tokens [b, D] for the first view, without gradient.
    """
    output = setup.learner(crops.globals_, crops.locals_, crops.hidden, crops.selected)
    micro = MicroBatch(crops, output, targets, settings, setup.world)
    zero = output.cls.new_zeros((), dtype=torch.float32)
    terms = {
        name: compute(micro) if settings.loss_weights[name] != 0 or name in ALWAYS_COMPUTED else zero
        for name, compute in TERMS.items()
    }
    return terms, output.cls.detach().chunk(2)[0]


def accumulate_gradients(
    settings: StepSettings, setup: Setup, micros: Sequence[Crops], targets: Sequence[Targets], measure: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Run the forward and backward pass of each micro-batch, and add up the gradients.

    The backward pass of the last micro-batch averages the gradients over the ranks.

    Returns:
        two values: a dictionary of metrics, and the student's class tokens [B, D] for the first view of this rank's B
        images. The metrics are the losses, their weighted sum `loss` and, if `measure` is True, `teacher_entropy`. Each
        is averaged over the micro-batches.
    """
    weights, scale = settings.loss_weights, setup.parts.buffers.get("loss_scale")
    means: dict[str, Tensor] = {}
    cls_tokens = []
    for number, (crops, target) in enumerate(zip(micros, targets, strict=True)):
        with gradients_stay_local(setup.learner, when=number + 1 < len(micros)):
            with setup.autocast:
                terms, cls = losses(settings, setup, crops, target)
            cls_tokens.append(cls)
            loss = torch.stack([weights[name] * value for name, value in terms.items()]).sum() / len(micros)
            torch.autograd.backward(loss if scale is None else loss * scale)
        terms["loss"] = loss * len(micros)
        if measure:
            terms["teacher_entropy"] = entropy(target.cls)
        for name, value in terms.items():
            means[name] = means.get(name, 0) + value.detach() / len(micros)
    drop_gathered(setup.learner)
    return means, torch.cat(cls_tokens)


def update_student(parts: Parts, clip_grad: float) -> tuple[dict[str, Tensor], Tensor]:
    """Clip the gradients, and update the student if all gradients are finite.

    Returns:
        two values: a dictionary that maps each sub-module's name to the norm of its gradient before clipping, and a
        bool scalar tensor that is True if all norms are finite.
    """
    scale = parts.buffers.get("loss_scale")
    if scale is not None:
        grads = [parameter.grad for parameter in parts.student.parameters() if parameter.grad is not None]
        torch._foreach_mul_([local(grad) for grad in grads], 1 / scale)
    norms = clip_gradients(parts.student, clip_grad)
    finite = torch.stack(list(norms.values())).isfinite().all()
    optimizer_step(parts.optimizer, finite)
    if scale is not None:
        adapt_scale(parts.buffers, finite)
    return norms, finite


def adapt_scale(buffers: dict[str, Tensor], finite: Tensor) -> None:
    """Adapt the loss scale of fp16 in place, by the rule of torch's GradScaler.

    The scale is halved after a step with gradients that are not finite, and doubled after 2,000 finite steps in a row.
    """
    good = torch.where(finite, buffers["good_steps"] + 1, 0)
    grown = torch.where(good >= SCALE_GROWS_AFTER, 2.0, 1.0)
    buffers["loss_scale"].mul_(torch.where(finite, grown, 0.5))
    buffers["good_steps"].copy_(torch.where(good >= SCALE_GROWS_AFTER, 0, good))
