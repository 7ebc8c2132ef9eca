"""One step: targets from the teacher, losses of the student, an update of both.

Legend: B photos per step, V views, N patches of a global crop, K prototypes, M masked patches.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.config import TrainConfig
from training.crops import Crops
from training.losses import dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from training.optimizer import Part, clip_gradients, set_schedule
from training.schedules import Schedule, cosine, linear_then_constant
from training.state import Parts
from training.student_teacher import Network, update_teacher


@dataclass(frozen=True)
class Schedules:
    """One value per step of everything that changes over the run. `lr` is 0 while a part is frozen."""

    lr: dict[Part, Schedule]
    weight_decay: Schedule
    momentum: Schedule
    teacher_temp: Schedule


def make_schedules(config: TrainConfig, total: int) -> Schedules:
    """The run's schedules, `total` steps each."""
    peak = config.lr * math.sqrt(config.batch_size / 1024)
    lr = cosine(peak, config.min_lr, total, warmup=int(config.warmup * total))
    frozen: dict[Part, float] = {
        "backbone": config.freeze_backbone,
        "head": 0,
        "last_layer": config.freeze_last_layer,
    }
    return Schedules(
        lr={part: np.where(np.arange(total) < int(share * total), 0, lr) for part, share in frozen.items()},
        weight_decay=cosine(*config.weight_decay, total),
        momentum=cosine(*config.momentum, total),
        teacher_temp=linear_then_constant(*config.teacher_temp, total, int(config.teacher_temp_warmup * total)),
    )


@torch.no_grad()
def teacher_targets(teacher: Network, crops: Crops, temp: float) -> tuple[Tensor, Tensor]:
    """Targets for the class tokens [2, B, K] and the masked patches [M, K]."""
    features = teacher.backbone.forward_features(crops.globals_)
    cls_probs = sinkhorn_knopp(teacher.dino_head(features["x_norm_clstoken"]), temp)
    patches = features["x_norm_patchtokens"][crops.masks]
    patch_probs = sinkhorn_knopp(teacher.ibot_head(patches), temp) if len(patches) else cls_probs[:0]
    return torch.stack(cls_probs.chunk(2)), patch_probs


def losses(
    student: Network, crops: Crops, cls_probs: Tensor, patch_probs: Tensor, student_temp: float
) -> dict[str, Tensor]:
    """The three losses of one step. DINO is the mean over all pairs of different views.

    Without local crops the official code divides the two pairs by 3 (its guard against zero terms counts as one); here
    they are divided by 2, so that ln K stays the mark of collapse.
    """
    features = student.backbone.forward_features(crops.globals_, crops.masks)
    cls = features["x_norm_clstoken"]
    global_logits = torch.stack(student.dino_head(cls).chunk(2))  # [2, B, K]
    pair_sum = sum(dino_loss(global_logits[view], cls_probs[1 - view], student_temp) for view in range(2))
    n_pairs = 2
    if crops.locals_ is not None:
        local_cls = student.backbone.forward_features(crops.locals_)["x_norm_clstoken"]
        local_logits = torch.stack(student.dino_head(local_cls).split(cls_probs.shape[1]))  # [V, B, K]
        pair_sum = pair_sum + dino_loss(local_logits, cls_probs, student_temp)
        n_pairs += 2 * len(local_logits)
    patch_logits = student.ibot_head(features["x_norm_patchtokens"][crops.masks])
    return {
        "dino": torch.as_tensor(pair_sum) / n_pairs,
        "ibot": ibot_loss(patch_logits, patch_probs, crops.masks, student_temp),
        "koleo": sum((koleo_loss(view) for view in cls.chunk(2)), start=cls.new_zeros((), dtype=torch.float32)),
    }


def train_step(
    config: TrainConfig, parts: Parts, schedules: Schedules, crops: Crops, step: int, autocast: torch.autocast
) -> dict[str, Tensor]:
    """One update of student and teacher; the losses, unweighted, and their weighted sum `loss`."""
    torch.manual_seed(config.seed * 1_000_003 + step)  # drop path draws from the global generator
    lr = {part: float(schedule[step]) for part, schedule in schedules.lr.items()}
    set_schedule(parts.optimizer, lr, float(schedules.weight_decay[step]))
    with autocast:
        targets = teacher_targets(parts.teacher, crops, float(schedules.teacher_temp[step]))
        terms = losses(parts.student, crops, *targets, config.student_temp)
    weights = {"dino": config.dino_weight, "ibot": config.ibot_weight, "koleo": config.koleo_weight}
    loss = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
    parts.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    clip_gradients(parts.student, config.clip_grad)
    parts.optimizer.step()
    update_teacher(parts.student, parts.teacher, float(schedules.momentum[step]))
    entropy = torch.special.entr(targets[0]).sum(dim=-1).mean()
    return {"loss": loss.detach(), **{n: value.detach() for n, value in terms.items()}, "teacher_entropy": entropy}
