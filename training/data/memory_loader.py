"""A loader that decodes all images once, before the first step."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from training.data.batches import Batch, Plan, Reading, check_broken, empty_batch, none_readable, to_device
from training.data.dataset import Skipped, Source, Subset, decode_square
from training.data.order import MixedPlan
from training.data.progress import Tell, progress

CHUNK = 32
"""The number of images that a thread of `MemoryLoader` gets at a time."""


class MemoryLoader:
    """A loader that decodes all images when it is created.

    The images are stored in memory as squares, which take 3 * side^2 bytes each. `tell` shows the progress of decoding.

    Raises:
        ValueError: no image could be read, or the share of broken images is larger than `max_broken_share`.
        OSError: the images cannot be reached.
    """

    in_memory = True
    fetching_share = 0.0

    def __init__(
        self,
        source: Source,
        side: int,
        plan: Plan,
        *,
        workers: int,
        device: torch.device,
        max_broken_share: float = Reading.max_broken_share,
        tell: Tell | None = None,
    ) -> None:
        self._device = device
        self.waited_s = 0.0
        pixels, aspect = torch.empty(len(source), 3, side, side, dtype=torch.uint8), torch.empty(len(source))
        squares, aspects = pixels.numpy(), aspect.numpy()

        def load(start: int) -> list[Skipped | None]:
            outcome: list[Skipped | None] = []
            for index in range(start, min(start + CHUNK, len(source))):
                try:
                    squares[index], aspects[index] = decode_square(source.encoded(index), side)
                    outcome.append(None)
                except ValueError as error:
                    outcome.append(Skipped(source.name(index), str(error)))
            return outcome

        n, outcome = len(source), list[Skipped | None]()
        pool = ThreadPoolExecutor(workers)
        try:
            with progress(
                tell,
                lambda: f"decoding {n:,} images, {100 * len(outcome) / n:.0f} %",
                lambda: len(outcome) / n,
            ):
                for chunk in pool.map(load, range(0, n, CHUNK)):
                    outcome += chunk
        finally:
            pool.shutdown(cancel_futures=True)
        self.skipped = [problem for problem in outcome if problem is not None]
        good = np.array([i for i, problem in enumerate(outcome) if problem is None], np.int64)
        if not len(good):
            raise ValueError(none_readable(len(source), self.skipped))
        check_broken(self.skipped, len(source), len(source), max_broken_share)
        if self.skipped:
            _compact(pixels, aspect, good)
        self.source: Source = Subset(source, good) if self.skipped else source
        self._plan = plan.among(good) if isinstance(plan, MixedPlan) and self.skipped else plan
        self.pixels, self.aspect = pixels[: len(good)], aspect[: len(good)]

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, step: int) -> Batch:
        """Return the images that this rank needs in a training step."""
        start = time.perf_counter()
        indices = self._plan(len(self), step)
        pixels = empty_batch(len(indices), self.pixels.shape[-1], self._device)
        torch.index_select(self.pixels, 0, indices, out=pixels)
        batch = Batch(to_device(pixels, self._device), self.aspect[indices], indices.tolist(), self.source)
        self.waited_s += time.perf_counter() - start
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass  # the threads ended before the first step


def _compact(pixels: Tensor, aspect: Tensor, good: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    """Move the rows of `pixels` and `aspect` whose numbers are in `good` to the front.

    The rows are moved in place, because a second copy might not fit into memory.
    """
    for to, at in enumerate(good.tolist()):
        if to != at:
            pixels[to], aspect[to] = pixels[at], aspect[at]
