"""Compute DINO's loss on held-out images, as a measure that needs no classes.

The teacher computes targets from two global crops of each image, and the network that will be released, the student's
moving average, predicts them from the other crops. The crops of an image are the same in every call, and so are the
batches, so that two calls differ only if the networks differ. A call changes nothing in the run: no weight, no moving
centre, no random generator.

Legend: n held-out images of this rank, b images of a micro-batch, S side of a square.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from model.decode import Pixels
from training.data.crops import Crops, CropSettings, make_crops
from training.data.dataset import Photo, squash
from training.distributed import World, mean_over_ranks, min_over_ranks
from training.evaluate.features import default_workers, in_order
from training.step import MicroBatch, Setup, StepSettings, dino_term, teacher_targets
from training.student_teacher import Network

SEED = 0x48454C44  # the crops are the same in every run
MOST_IMAGES = 512  # over all ranks


@dataclass(frozen=True)
class HeldOutImages:
    """The held-out images of this rank for `held_out_loss`, in memory.

    `pixels` uint8 [n, 3, S, S] are squares, and `aspect` [n] is the width / height of each image before it was squashed
    to a square. Every rank has the same number of images.
    """

    pixels: Tensor
    aspect: Tensor


def read_held_out(
    photos: Sequence[Photo], side: int, world: World, most: int = MOST_IMAGES, workers: int | None = None
) -> HeldOutImages | None:
    """Read this rank's share of the held-out images into memory. Every rank must call this function.

    Unreadable images are left out.

    Args:
        photos: the held-out images, in the same order on every rank.
        side: side of the squares that the images are stored as, in pixels (`cache_size` of the run).
        world: this process's rank and the number of ranks.
        most: maximum number of images, over all ranks. They are spread evenly over `photos`.
        workers: number of threads that read images; None: one per CPU, at most 8.

    Returns:
        the images, or None if a rank would have fewer than two.
    """
    chosen = photos[:: max(1, -(-len(photos) // most))][world.rank :: world.size]

    def read(photo: Photo) -> tuple[Pixels, float] | None:
        try:
            return squash(photo.read(), side)
        except ValueError:  # the evaluation that lists unreadable images reads this image too
            return None

    squares = [square for square in in_order(read, chosen, workers or default_workers()) if square is not None]
    n_mine = int(min_over_ranks(world, torch.tensor(len(squares), device=world.device)))
    if n_mine < 2:
        return None
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in squares[:n_mine]]))
    return HeldOutImages(pixels, torch.tensor([aspect for _, aspect in squares[:n_mine]]))


@torch.no_grad()
def held_out_loss(
    settings: StepSettings,
    setup: Setup,
    crops: CropSettings,
    images: HeldOutImages,
    teacher_temp: float,
    predictor: Network | None = None,
) -> float:
    """Compute DINO's loss on held-out images, divided by ln K for K prototypes. Every rank must call this function.

    A value of 1 means that the predictions carry no information about the targets. Lower is better.

    The images are processed in batches of the run's size, because Sinkhorn-Knopp and batch normalisation centre the
    targets of a batch. If there are fewer images, they form one batch. Images that do not fill a batch are left out.

    Args:
        settings: the settings of a training step.
        setup: the networks and the buffers of the run. They are not changed.
        crops: the crop settings of the run. The crops are always those of the run's first phase, and are not masked.
        images: this rank's images.
        teacher_temp: the teacher's temperature. Use the same value, for example the last one of the schedule, for all
            losses that are compared.
        predictor: the network that predicts the targets, in evaluation mode; None: the student's moving average.
    """
    world, phase = setup.world, crops.phases[0]
    per_rank = min(len(images.pixels), crops.batch_size // world.size)
    size = min(per_rank, phase.micro_batch or per_rank)
    settings = replace(settings, loss_weights={**settings.loss_weights, "ibot": 0.0})
    fixed = replace(crops, seed=SEED)
    losses = []
    for number in range(len(images.pixels) // per_rank):
        micros = []
        for at in torch.arange(per_rank).split(size):
            mine, positions = number * per_rank + at, world.rank * per_rank + at
            made = make_crops(fixed, images.pixels[mine], images.aspect[mine], number, positions, phase, world.device)
            micros.append(_without_masks(made))
        losses.append(_loss_of_batch(settings, setup, micros, teacher_temp, predictor or setup.parts.ema))
    mean = mean_over_ranks(world, torch.stack(losses).mean())
    return float(mean) / math.log(setup.parts.ema.dino_head.last_layer.weight_v.shape[0])


def _without_masks(crops: Crops) -> Crops:
    """Return the crops with nothing masked, and without any patch for iBOT's loss."""
    return replace(
        crops,
        hidden=torch.zeros_like(crops.hidden),
        masks=torch.zeros_like(crops.masks),
        selected=crops.selected[:0],
    )


def _loss_of_batch(
    settings: StepSettings, setup: Setup, micros: Sequence[Crops], temp: float, network: Network
) -> Tensor:
    """Return DINO's loss of the batch that consists of the given micro-batches, as a scalar."""
    buffers = {name: value.clone() for name, value in setup.parts.buffers.items()}  # moving centres change in a call
    setup = replace(setup, parts=replace(setup.parts, buffers=buffers))
    with setup.autocast:
        targets = teacher_targets(settings, setup, micros, temp)
        terms = [
            dino_term(
                MicroBatch(
                    crops, network(crops.globals_, crops.locals_, None, crops.selected), target, settings, setup.world
                )
            )
            for crops, target in zip(micros, targets, strict=True)
        ]
    weights = torch.tensor([len(crops.globals_) for crops in micros], dtype=torch.float32, device=terms[0].device)
    return (torch.stack(terms).float() * weights).sum() / weights.sum()
