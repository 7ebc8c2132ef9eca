"""Loaders, which provide the images for each training step.

If all images fit into memory, they are decoded once before the first step. Otherwise threads decode the images of the
next steps during training.

A loader decodes each image and resizes it to a square, without keeping its aspect ratio. `batch(step)` returns the
squares of a step's images. A function called the plan selects these images, and its result depends only on the step. A
resumed run therefore continues with the images that come next, regardless of the number and timing of threads.

A few unreadable images do not stop a run. `MemoryLoader` leaves them out before the first step. `StreamLoader` replaces
an unreadable image with the next readable one, so the replacement depends only on the data. A server or disk that fails
(OSError) stops the run, because replacements would then differ from run to run.

The workers are threads rather than processes, because Pillow releases the interpreter's lock (GIL) while it decodes,
and threads share memory.

Legend: n images, b images of a step on this rank, S side of the squares.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from model.cpus import available_cpus
from model.decode import Pixels
from training.data.dataset import Skipped, Source, Subset, batch_indices, decode_square
from training.data.order import MixedPlan
from training.data.progress import Tell, progress

Plan = Callable[[int, int], Tensor]
"""A function of the number of images and the step that returns the numbers of this rank's images, int64 [b]."""

MIN_TRIES = 100
"""The share of broken images is checked only after this number of images, or all if there are fewer, has been tried."""

CHUNK = 32
"""The number of images that a thread of `MemoryLoader` gets at a time."""

WAIT_WORTH_A_WORD = 0.1
GOOD, BROKEN = 1, 2


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
            raise ValueError(_none_readable(len(source), self.skipped))
        _check_broken(self.skipped, len(source), len(source), max_broken_share)
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
        pixels = _empty_batch(len(indices), self.pixels.shape[-1], self._device)
        torch.index_select(self.pixels, 0, indices, out=pixels)
        batch = Batch(to_device(pixels, self._device), self.aspect[indices], indices.tolist(), self.source)
        self.waited_s += time.perf_counter() - start
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass  # the threads ended before the first step


def _none_readable(n: int, skipped: Sequence[Skipped]) -> str:
    first = f"; the first: {skipped[0].name}: {skipped[0].reason}" if skipped else ""
    return f"none of {n} images could be read{first}"


def _check_broken(skipped: Sequence[Skipped], n_tried: int, n: int, max_broken_share: float) -> None:
    """Check the share of broken images. `n_tried` of the `n` images have been tried so far, and `skipped` are broken.

    Raises:
        ValueError: at least `MIN_TRIES` images, or all, have been tried, and the share is larger than
            `max_broken_share`.
    """
    if n_tried >= min(MIN_TRIES, n) and len(skipped) > max_broken_share * n_tried:
        if len(skipped) == n:
            raise ValueError(_none_readable(n, skipped))
        first = skipped[0]
        raise ValueError(
            f"{len(skipped)} of the {n_tried} images tried so far cannot be read, more than "
            f"max_broken_share={max_broken_share:g}; the first: {first.name}: {first.reason}"
        )


def _compact(pixels: Tensor, aspect: Tensor, good: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    """Move the rows of `pixels` and `aspect` whose numbers are in `good` to the front.

    The rows are moved in place, because a second copy might not fit into memory.
    """
    for to, at in enumerate(good.tolist()):
        if to != at:
            pixels[to], aspect[to] = pixels[at], aspect[at]


def _empty_batch(n: int, side: int, device: torch.device) -> Tensor:
    return torch.empty(n, 3, side, side, dtype=torch.uint8, pin_memory=device.type == "cuda")


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
                    _empty_batch(len(indices), self._side, self._device), torch.empty(len(indices)), list(indices)
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
        raise ValueError(_none_readable(len(self.source), self.skipped))

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
            _check_broken(self.skipped, self._n_tried, len(self.source), self._max_broken_share)
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


def open_loader(
    source: Source,
    side: int,
    plan: Plan,
    *,
    cache_bytes: int = 4 * 2**30,
    reading: Reading | None = None,
    device: torch.device | None = None,
    tell: Tell | None = None,
) -> Loader:
    """Open a loader, and return it.

    It is a `MemoryLoader` if all squares (n * 3 * side^2 bytes for n images) fit into `cache_bytes`, otherwise a
    `StreamLoader`. A resumed run must use the same kind of loader: a `MemoryLoader` leaves broken images out, which
    changes the order of the other images, whereas a `StreamLoader` replaces them.

    Args:
        source: the images.
        side: side of the squares, pixels.
        plan: function that selects the images of a step: one that `shuffled` returns, or a `MixedPlan`.
        cache_bytes: limit on the memory for squares, per process.
        reading: number of threads, and limits on decoding ahead; None: the defaults.
        device: the device of the batches; None: the CPU.
        tell: function that shows the progress of decoding; None: it is not shown.

    Raises:
        ValueError: there are no images, no image could be read, too many images are broken, or a setting is out of
            range.
        OSError: the images cannot be reached.
    """
    if not len(source):
        raise ValueError("there are no images to train on")
    reading = reading or Reading()
    workers = available_cpus() if reading.workers is None else reading.workers
    if min(workers, reading.ahead_steps, reading.ahead_bytes) < 1 or not 0 <= reading.max_broken_share <= 1:
        raise ValueError(
            f"workers={workers}, ahead_steps={reading.ahead_steps} and ahead_bytes={reading.ahead_bytes} must be at "
            f"least 1, max_broken_share={reading.max_broken_share} between 0 and 1"
        )
    device = device or torch.device("cpu")
    if len(source) * 3 * side**2 <= cache_bytes:
        share = reading.max_broken_share
        return MemoryLoader(source, side, plan, workers=workers, device=device, max_broken_share=share, tell=tell)
    return StreamLoader(
        source,
        side,
        plan,
        workers=workers,
        ahead_steps=reading.ahead_steps,
        ahead_bytes=reading.ahead_bytes,
        max_broken_share=reading.max_broken_share,
        device=device,
    )


def waiting_advice(share: float, loader: Loader, *, side: int, workers: int) -> str | None:
    """Return advice on how to shorten the wait for images, or None if it takes at most 10 % of the time.

    Args:
        share: share of the training loop's time that was spent in `Loader.batch`.
        loader: the loader of the run.
        side: side of the squares, pixels.
        workers: number of decoding threads.
    """
    if share <= WAIT_WORTH_A_WORD:
        return None
    waited = f"{share:.0%} of the time was spent waiting for images"
    if loader.in_memory:
        return f"{waited}, although they are in memory: lower cache_size (now {side}), or stop other local processes"
    if loader.fetching_share > 0.5:
        more = f"raise workers (now {workers}; {loader.fetching_share:.0%} of their time is spent getting bytes), "
    elif workers < available_cpus():
        more = f"raise workers (now {workers}), "
    else:
        more = f"all {available_cpus()} cores are decoding; "
    needed = math.ceil(len(loader) * 3 * side**2 / 2**30)
    return (
        f"{waited}: {more}shrink the images beforehand (short side near {2 * side}), or make them fit into memory "
        f"(cache_bytes, {needed} GiB)"
    )
