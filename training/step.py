"""One step: targets from the teacher, losses of the student, an update of both.

Legend: B photos per step, V views, N patches of a global crop, K prototypes, M masked patches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.config import TrainConfig
from training.data.crops import Crops
from training.distributed import gather_rows, gradients_stay_local, local, logsumexp_over_ranks, sum_over_ranks
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
from training.schedules import Schedule, cosine, linear_then_constant
from training.setup import Setup
from training.student_teacher import update_teacher
from training.teacher_targets import TeacherTargets

SCALE_GROWS_AFTER = 2000


@dataclass(frozen=True)
class Schedules:
    """One value per step of everything that changes over the run. `lr` is 0 while a part is frozen."""

    lr: dict[Part, Schedule]
    weight_decay: Schedule
    momentum: Schedule
    teacher_temp: Schedule


def make_schedules(config: TrainConfig, total: int) -> Schedules:
    """The run's schedules, `total` steps each.

    With a frozen backbone the heads warm up in the first half of its rest, so that they have learned something when it
    begins, and its own warm-up begins with it. A last phase with an `lr_mult` has a rate and a momentum of its own.
    """
    peak, warmup = config.lr * math.sqrt(config.batch_size / 1024), int(config.warmup * total)
    frozen = int(config.freeze_backbone * total)
    heads = cosine(peak, config.min_lr, total, warmup=min(warmup, frozen // 2) if frozen else warmup)
    rest = cosine(peak, config.min_lr, total - frozen, warmup=min(warmup, total - frozen))
    fixed_layer = np.arange(total) < int(config.freeze_last_layer * total)
    lr: dict[Part, Schedule] = {
        "backbone": np.concatenate((np.zeros(frozen), rest)),
        "head": heads,
        "last_layer": np.where(fixed_layer, 0, heads),
    }
    momentum = cosine(*config.momentum, total)
    if config.last_phase is not None and config.last_phase.lr_mult is not None:
        phase = np.arange(total) / total >= 1 - config.last_phase.share  # as `crop_views` has it
        n_steps = int(phase.sum())
        for schedule in lr.values():
            schedule[phase] = cosine(peak * config.last_phase.lr_mult, config.min_lr, n_steps)
        momentum[phase] = cosine(*config.momentum, n_steps)
    return Schedules(
        lr=lr,
        weight_decay=cosine(*config.weight_decay, total),
        momentum=momentum,
        teacher_temp=linear_then_constant(*config.teacher_temp, total, int(config.teacher_temp_warmup * total)),
    )


@dataclass(frozen=True)
class Targets:
    """What the student of one micro-batch is asked for: class tokens [2, b, K] and patches [M, K], rows sum to one."""

    cls: Tensor | TeacherTargets
    patches: Tensor | TeacherTargets


@torch.no_grad()
def teacher_targets(config: TrainConfig, setup: Setup, micros: Sequence[Crops], temp: float) -> list[Targets]:
    """Targets for every micro-batch, centred over all of them and over all ranks: as if they were one batch."""
    outputs = [setup.parts.teacher(crops.globals_, None, None, crops.selected) for crops in micros]
    cls_logits = [torch.stack(output.global_logits.chunk(2)) for output in outputs]  # [2, b, K] each
    cls = _center(config, setup, "dino", cls_logits, temp)
    patches: Sequence[Tensor | TeacherTargets] = [output.patch_logits for output in outputs]
    if config.ibot_weight > 0:
        patches = _center(config, setup, "ibot", [output.patch_logits for output in outputs], temp)
    return [Targets(*pair) for pair in zip(cls, patches, strict=True)]


def _center(
    config: TrainConfig, setup: Setup, head: str, logits: list[Tensor], temp: float
) -> Sequence[Tensor | TeacherTargets]:
    """Logits [..., K] of each micro-batch to targets. The moving centre is updated after it was used."""
    total = sum_over_ranks(setup.world)
    if config.centering == "sinkhorn":
        return sinkhorn_targets(logits, temp, combine=logsumexp_over_ranks(setup.world))
    if config.centering == "batch_norm":
        return batch_norm_center(logits, temp, sum_over_ranks=total)
    center = setup.parts.buffers[head]
    targets = [center_targets(part, center.clone(), temp) for part in logits]
    moved = update_center(center, logits, config.center_momentum, sum_over_ranks=total)
    center.copy_(torch.where(moved.isfinite().all(), moved, center))
    return targets


def entropy(targets: Tensor | TeacherTargets) -> Tensor:
    """Mean entropy of the rows of targets [2, b, K], view by view, since each is a copy of K columns."""
    views = [targets[view] for view in range(2)]
    probs = (view.probs() if isinstance(view, TeacherTargets) else view for view in views)
    return torch.stack([torch.special.entr(p).sum(dim=-1).mean() for p in probs]).mean()


def losses(config: TrainConfig, setup: Setup, crops: Crops, targets: Targets) -> tuple[dict[str, Tensor], Tensor]:
    """The three losses of one micro-batch, and the student's class tokens [b, D] of the first view, detached.

    DINO is the mean over all pairs of different views.

    Without local crops the official code divides the two pairs by 3 (its guard against zero terms counts as one); here
    they are divided by 2, so that ln K stays the mark of collapse.
    """
    temp = config.student_temp
    out = setup.learner(crops.globals_, crops.locals_, crops.hidden, crops.selected)
    global_logits = out.global_logits.unflatten(0, (2, -1))  # [2, b, K]
    pair_sum = sum(dino_loss(global_logits[view], targets.cls[1 - view], temp) for view in range(2))
    n_pairs = 2
    if out.local_logits is not None:
        local_logits = out.local_logits.unflatten(0, (-1, global_logits.shape[1]))  # [V, b, K]
        pair_sum = pair_sum + dino_loss(local_logits, targets.cls, temp)
        n_pairs += 2 * len(local_logits)
    zero = out.cls.new_zeros((), dtype=torch.float32)
    terms = {
        "dino": torch.as_tensor(pair_sum) / n_pairs,
        "ibot": zero
        if config.ibot_weight == 0
        else ibot_loss(out.patch_logits, targets.patches, crops.masks, temp, selected=crops.selected),
        "koleo": sum((_koleo(config, setup, view) for view in out.cls.chunk(2)), start=zero),
    }
    return terms, out.cls.detach().chunk(2)[0]


def _koleo(config: TrainConfig, setup: Setup, cls: Tensor) -> Tensor:
    """Of one global view of this micro-batch; neighbours are looked for on all ranks, if the configuration says so."""
    if config.koleo_weight == 0:
        return cls.new_zeros((), dtype=torch.float32)
    if setup.world.size == 1 or not config.koleo_over_ranks:
        return koleo_loss(cls)
    return koleo_loss(cls, gather_rows(setup.world, cls), offset=setup.world.rank * len(cls))


def train_step(
    config: TrainConfig,
    setup: Setup,
    schedules: Schedules,
    micros: Sequence[Crops],
    step: int,
    lr_factor: float = 1.0,
    measure: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:
    """One update of student and average (`ema`).

    A step whose gradients are not finite changes neither weights nor optimizer; `finite` says so, without a wait for
    the device.

    Args:
        config, setup, schedules: of the run.
        micros: this rank's photos in micro-batches of one size.
        step: index into the schedules.
        lr_factor: on all learning rates: lowered by a run that was rolled back.
        measure: give `teacher_entropy` too, which costs a pass over the targets.

    Returns:
        scalars on the device, means over this rank: `dino`, `ibot`, `koleo` unweighted, their weighted sum `loss`,
        `teacher_entropy`, norms of the gradients before clipping, `finite` (1 or 0); and the student's class tokens
        [b, D] of the first view of each photo, for RankMe.
    """
    parts, world = setup.parts, setup.world
    # Drop path draws from the global generator.
    torch.manual_seed((config.seed * 1_000_003 + step) * world.size + world.rank)
    lr = {part: float(schedule[step]) * lr_factor for part, schedule in schedules.lr.items()}
    set_schedule(parts.optimizer, lr, float(schedules.weight_decay[step]))
    with setup.autocast:
        targets = teacher_targets(config, setup, micros, float(schedules.teacher_temp[step]))
    scale = parts.buffers.get("loss_scale")
    weights = {"dino": config.dino_weight, "ibot": config.ibot_weight, "koleo": config.koleo_weight}
    sums: dict[str, Tensor] = {}
    tokens = []
    parts.optimizer.zero_grad(set_to_none=True)
    for number, (crops, target) in enumerate(zip(micros, targets, strict=True)):
        with gradients_stay_local(setup.learner, when=number + 1 < len(micros)):
            with setup.autocast:
                terms, cls = losses(config, setup, crops, target)
            tokens.append(cls)
            loss = torch.stack([weights[name] * value for name, value in terms.items()]).sum() / len(micros)
            torch.autograd.backward(loss if scale is None else loss * scale)
        terms["loss"] = loss * len(micros)
        if measure:
            terms["teacher_entropy"] = entropy(target.cls)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach() / len(micros)
    if scale is not None:
        grads = [parameter.grad for parameter in parts.student.parameters() if parameter.grad is not None]
        torch._foreach_mul_([local(grad) for grad in grads], 1 / scale)
    norms = clip_gradients(parts.student, config.clip_grad)
    finite = torch.stack(list(norms.values())).isfinite().all()
    optimizer_step(parts.optimizer, finite)
    if scale is not None:
        adapt_scale(parts.buffers, finite)
    update_teacher(parts.student, parts.ema, float(schedules.momentum[step]))
    return {**sums, **{f"grad_norm_{name}": norm for name, norm in norms.items()}, "finite": finite.float()}, torch.cat(
        tokens
    )


def adapt_scale(buffers: dict[str, Tensor], finite: Tensor) -> None:
    """fp16's loss scale: halved after a step that was not finite, doubled after 2,000 that were (as torch's)."""
    good = torch.where(finite, buffers["good_steps"] + 1, 0)
    grown = torch.where(good >= SCALE_GROWS_AFTER, 2.0, 1.0)
    buffers["loss_scale"].mul_(torch.where(finite, grown, 0.5))
    buffers["good_steps"].copy_(torch.where(good >= SCALE_GROWS_AFTER, 0, good))
