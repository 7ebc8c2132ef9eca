"""A loader that decodes the images of the next steps during training."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from model.decode import Pixels
from training.data.batches import Batch, Plan, check_broken, empty_batch, none_readable, to_device
from training.data.dataset import Skipped, Source, decode_square

GOOD, BROKEN = 1, 2


@dataclass
class _Step:
    """A training step whose images are being decoded."""

    pixels: Tensor
    aspect: Tensor
    used: list[int]  # numbers of the images, after broken ones are replaced
    decoded: list[Future[None]] = field(default_factory=list)


class StreamLoader:
    """A loader whose threads decode the images of the next steps during the current step.

    Args:
        source: the images.
        side: side of the squares, pixels.
        plan: function that selects the images of a step.
        workers: number of decoding threads.
        ahead_steps: maximum number of steps that are decoded ahead.
        ahead_bytes: maximum total size of the squares that are decoded ahead, bytes.
        max_broken_share: the run stops if more than this share of the images tried so far is broken. The check begins
            when 100 images, or all if there are fewer, have been tried.
        device: the device of the batches.
    """

    in_memory = False

    def __init__(
        self,
        source: Source,
        side: int,
        plan: Plan,
        *,
        workers: int,
        ahead_steps: int,
        ahead_bytes: int,
        max_broken_share: float,
        device: torch.device,
    ) -> None:
        self.source, self.skipped, self.waited_s = source, list[Skipped](), 0.0
        self._side, self._plan, self._device = side, plan, device
        self._ahead_steps, self._ahead_bytes, self._max_broken_share = ahead_steps, ahead_bytes, max_broken_share
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="photos")
        self._steps: dict[int, _Step] = {}
        self._lock = threading.Lock()  # for changes of `skipped`, `_seconds`, `_found` and `_n_tried`
        self._seconds = {"fetching": 0.0, "decoding": 0.0}
        self._found = bytearray(len(source))  # per image: 0 (not tried yet), GOOD or BROKEN
        self._n_tried = 0
        self._closed = False

    def __len__(self) -> int:
        return len(self.source)

    @property
    def fetching_share(self) -> float:
        """Return the share of the threads' time that was spent fetching bytes. The rest was spent decoding."""
        return self._seconds["fetching"] / max(sum(self._seconds.values()), 1e-9)

    def batch(self, step: int) -> Batch:
        """Return the images that this rank needs in a training step, and start to decode those for the next steps.

        Steps are normally requested in order. Images that were decoded ahead are discarded if their step is before
        `step`, or more than `ahead_steps` after it.

        Raises:
            ValueError: too many images are broken.
            OSError: the images cannot be reached.
        """
        assert not self._closed
        start = time.perf_counter()
        for stale in [number for number in self._steps if number < step or number > step + self._ahead_steps]:
            for future in self._steps.pop(stale).decoded:
                future.cancel()
        try:
            self._begin(step)
            current = self._steps.pop(step)
            for future in current.decoded:
                future.result()
        except BaseException:
            self.close()
            raise
        batch = Batch(to_device(current.pixels, self._device), current.aspect, current.used, self.source)
        self.waited_s += time.perf_counter() - start
        return batch

    def _begin(self, step: int) -> None:
        """Submit to the threads the images of `step` and of as many of the next steps as the limits allow."""
        square = 3 * self._side**2
        held = 0
        for number in range(step, step + self._ahead_steps + 1):
            if number not in self._steps:
                indices = self._plan(len(self), number).tolist()
                if number > step and held + len(indices) * square > self._ahead_bytes:
                    return
                begun = _Step(
                    empty_batch(len(indices), self._side, self._device), torch.empty(len(indices)), list(indices)
                )
                self._steps[number] = begun
                begun.decoded = [self._pool.submit(self._fill, begun, at) for at in range(len(indices))]
            if number > step:
                held += len(self._steps[number].used) * square

    def _fill(self, step: _Step, position: int) -> None:
        """Decode the image at `position` of a step's batch. If it is broken, use the next readable one."""
        first = step.used[position]
        for offset in range(len(self.source)):
            index = (first + offset) % len(self.source)
            if self._closed:
                return
            if self._found[index] == BROKEN:
                continue
            square = self._tried(index)
            if square is not None:
                # The copy uses numpy, because torch would start a thread pool for each of these threads.
                step.pixels.numpy()[position], step.aspect.numpy()[position] = square
                step.used[position] = index
                return
        raise ValueError(none_readable(len(self.source), self.skipped))

    def _tried(self, index: int) -> tuple[Pixels, float] | None:
        """Decode an image, and return its square and its original width / height.

        If the image is broken, add it to `skipped` and return None.

        Raises:
            ValueError: too many images are broken.
            OSError: the image cannot be reached.
        """
        square, reason = None, ""
        start = fetched = time.perf_counter()
        try:
            data = self.source.encoded(index)
            fetched = time.perf_counter()
            square = decode_square(data, self._side)
        except ValueError as error:
            reason = str(error)
        end = time.perf_counter()
        with self._lock:
            self._seconds["fetching"] += fetched - start
            self._seconds["decoding"] += end - fetched
            self._n_tried += not self._found[index]
            if square is None and self._found[index] != BROKEN:  # two threads may try the same image at the same time
                self.skipped.append(Skipped(self.source.name(index), reason))
            self._found[index] = BROKEN if square is None else GOOD
            check_broken(self.skipped, self._n_tried, len(self.source), self._max_broken_share)
        return square

    def close(self) -> None:
        """Stop decoding, and wait until the threads have ended.

        Each thread first finishes the image that it is decoding.
        """
        self._closed = True
        self._steps.clear()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
