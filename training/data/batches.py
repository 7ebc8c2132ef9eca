"""The images of one training step, and the interface of the loaders that provide them.

Legend: n images, b images of a step on this rank, S side of the squares.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from training.data.dataset import Skipped, Source, batch_indices

Plan = Callable[[int, int], Tensor]
"""A function of the number of images and the step that returns the numbers of this rank's images, int64 [b]."""

MIN_TRIES = 100
"""The share of broken images is checked only after this number of images, or all if there are fewer, has been tried."""


@dataclass(frozen=True)
class Batch:
    """The images of one step on this rank: b squares of side S.

    `pixels`, uint8 [b, 3, S, S], is on the device. `aspect`, float [b] on the CPU, is each image's width / height
    before it was squashed. `indices` [b] are the numbers of the images in `source`.
    """

    pixels: Tensor
    aspect: Tensor
    indices: list[int]
    source: Source

    @property
    def names(self) -> list[str]:
        """Return the names of the images. They are rarely needed, so they are not stored."""
        return [self.source.name(index) for index in self.indices]


@dataclass(frozen=True)
class Reading:
    """The settings for reading images.

    `workers` is the number of decoding threads; None means one per core that this process may use. `StreamLoader`
    documents `ahead_steps`, `ahead_bytes` and `max_broken_share`.
    """

    workers: int | None = None
    ahead_steps: int = 4
    ahead_bytes: int = 2**30
    max_broken_share: float = 0.5


class Loader(AbstractContextManager["Loader"], Protocol):
    """The interface of a loader. It is a context manager that ends its threads on exit.

    `source` contains the images to which `Batch.indices` refers. `skipped` lists the images that have been found to be
    unreadable so far. `waited_s` is the total time, in seconds, that calls of `batch` have taken. `in_memory` is True
    if all images are in memory. `fetching_share` is the share of the threads' time that was spent fetching the images'
    bytes; the rest was spent decoding.
    """

    source: Source
    skipped: list[Skipped]
    waited_s: float
    in_memory: bool

    @property
    def fetching_share(self) -> float: ...

    def __len__(self) -> int: ...

    def batch(self, step: int) -> Batch: ...


def shuffled(batch_size: int, seed: int, share: slice = slice(None)) -> Plan:
    """Return a run's plan: a function that returns the numbers of the images that this rank loads in a step.

    The arguments of the plan are the number of images and the step. The batches are shuffled (see `batch_indices`), and
    `share` is the slice of each batch that this rank loads.
    """
    return lambda n_photos, step: batch_indices(n_photos, batch_size, step, seed)[share]


def to_device(pixels: Tensor, device: torch.device) -> Tensor:
    """Copy pixels to the device, and return the copy.

    If the pixels are in pinned memory, the host does not wait for the copy.
    """
    return pixels.to(device, non_blocking=True)


def empty_batch(n: int, side: int, device: torch.device) -> Tensor:
    return torch.empty(n, 3, side, side, dtype=torch.uint8, pin_memory=device.type == "cuda")


def none_readable(n: int, skipped: Sequence[Skipped]) -> str:
    first = f"; the first: {skipped[0].name}: {skipped[0].reason}" if skipped else ""
    return f"none of {n} images could be read{first}"


def check_broken(skipped: Sequence[Skipped], n_tried: int, n: int, max_broken_share: float) -> None:
    """Check the share of broken images. `n_tried` of the `n` images have been tried so far, and `skipped` are broken.

    Raises:
        ValueError: at least `MIN_TRIES` images, or all, have been tried, and the share is larger than
            `max_broken_share`.
    """
    if n_tried >= min(MIN_TRIES, n) and len(skipped) > max_broken_share * n_tried:
        if len(skipped) == n:
            raise ValueError(none_readable(n, skipped))
        first = skipped[0]
        raise ValueError(
            f"{len(skipped)} of the {n_tried} images tried so far cannot be read, more than "
            f"max_broken_share={max_broken_share:g}; the first: {first.name}: {first.reason}"
        )
