"""A bounded queue of images that wait for the engine. Images of different requests share forward passes.

One worker thread owns the engine. Whenever this thread is free, it takes the next waiting images as one batch. It
never waits for a batch to fill, so an idle engine answers a single image at once. Under load, images arrive during a
pass and form the next batch. Clients are served in turn (service/fair.py). All images in a batch have the same shape
and need the same inner outputs as the image whose turn it is. To limit memory, a batch contains at most
`batch_max_patches` patches, and the patches of an image that needs inner outputs count several times. An image with
more patches than this forms a batch on its own.

The queue has two limits. `reserve` limits the number of accepted images that have no result yet. It is called before an
image is decoded. `submit` limits the number of patches in the queue. Both methods raise `QueueFull`, or `ShareUsed` if
only the share of the client is used, with a Retry-After time that is computed from the measured throughput.

If a client disconnects, its waiting images are dropped when the next batch is formed. If the engine fails on a batch,
the images of this batch are tried one by one, so an image that the engine cannot process does not affect the others. If
the worker thread dies or hangs, or if the engine is broken (service/features/engine_faults.py), `health` reports the
fault, and the liveness check `/livez` fails.

The methods in the section "The worker thread" run in that thread. All other methods are called on the event loop's
thread.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from model.engines.broken import is_sticky
from service.clients import ITSELF, Sender, current_sender
from service.errors import EngineFailed, ModelUnavailable, QueueFull, ServiceError, ShareUsed, ShuttingDown
from service.fair import FairQueue, Shares
from service.features.engine_faults import EngineFaults
from service.telemetry import Metrics
from service.tracing import Batch, RequestTrace, current_trace, record_batch

FloatArray = npt.NDArray[np.float32]
Row = TypeVar("Row")
log = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 60
OUTPUTS_PER_PATCH = 4
"""An image that needs this many inner outputs counts as twice its patches. One that needs twice as many counts as three
times its patches, and so on. Each inner output is as large as the patch features, and a pass needs memory for a few
arrays of this size anyway."""


@dataclass(frozen=True)
class Done(Generic[Row]):
    """The result for one image: its features (`row`), the time that the image waited in the queue (`queue_s`), and the
    time that its batch took for the forward pass and the pooling (`infer_s`). Both times are in seconds. The pass began
    at `started`, a value of `time.perf_counter()`. `batch` is its span, if it was recorded."""

    row: Row
    queue_s: float
    infer_s: float
    started: float
    batch: Batch | None


@dataclass(eq=False)
class Job(Generic[Row]):
    """One image in the queue. `pixels` is float32 [3, h, w]. `outputs` are the names of the inner outputs that it needs
    (see `model/engines/protocol.py`). `patches` is the number of patches that the image counts as."""

    pixels: FloatArray
    outputs: tuple[str, ...]
    patches: int
    future: "asyncio.Future[Done[Row]]"
    sender: Sender = field(default_factory=current_sender.get)
    queued_at: float = field(default_factory=time.perf_counter)
    trace: RequestTrace | None = field(default_factory=current_trace)


Outcome = tuple[Job[Row], Done[Row] | Exception]


class Batcher(Generic[Row]):
    """A bounded queue of images, and the worker thread that passes them to the engine in batches.

    Args:
        run: a function that runs a forward pass with pooling. It takes pixels [B, 3, h, w] and the names of inner
            outputs, and returns the features of each image, B rows. Only the worker thread calls it.
        probe: a function that runs a forward pass that is known to work (see `EngineFaults`). Only the worker thread
            calls it.
        patch_size: the side of a patch in pixels. It is used to count patches.

    Any thread may change the attribute `batch_max_patches`. The next batch observes it.
    """

    def __init__(
        self,
        run: Callable[[FloatArray, tuple[str, ...]], Sequence[Row]],
        *,
        patch_size: int,
        batch_max_patches: int,
        queue_max_images: int,
        queue_max_patches: int,
        metrics: Metrics,
        hang_timeout_s: float = 120.0,
        client_share: float = 1.0,
        probe: Callable[[], object] | None = None,
    ) -> None:
        self._run = run
        self._patch_size = patch_size
        self.batch_max_patches = batch_max_patches
        self._places = Shares(queue_max_images, client_share)  # images without a result
        self._patches = Shares(queue_max_patches, client_share)  # of the images in the queue; changes under _wake
        self._metrics = metrics
        self._hang_timeout_s = hang_timeout_s
        self._faults = EngineFaults(probe)
        self._queue: FairQueue[Job[Row]] = FairQueue()
        self._taken: list[Job[Row]] = []
        self._wake = threading.Condition()
        self._closing = False
        self._dead = False  # set under _wake, when the queue is emptied for the last time
        self._busy_since: float | None = None
        self._images_per_s: float | None = None
        metrics.queue_images_limit.set(queue_max_images)
        # Reused, because a new array of this size would consist of new memory pages, which slow down each pass.
        self._pixels = np.empty(batch_max_patches * 3 * patch_size**2, np.float32)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="engine-worker", daemon=True)
        self._thread.start()

    @property
    def images(self) -> int:
        """The number of accepted images that have no result yet."""
        return self._places.used

    @property
    def patches(self) -> int:
        """The number of patches that wait for the engine."""
        return self._patches.used

    @property
    def waiting(self) -> int:
        """The number of decoded images that wait for the engine."""
        return len(self._queue)

    @property
    def oldest_s(self) -> float:
        """The time in seconds that the oldest image in the queue has waited for the engine. 0 if none waits."""
        with self._wake:
            oldest = min((job.queued_at for job in self._queue.in_turn()), default=None)
        return 0.0 if oldest is None else time.perf_counter() - oldest

    @property
    def full(self) -> bool:
        """True if the queue has reached one of its two limits, and more than one client has filled it."""
        return self._places.is_full or self._patches.is_full

    def health(self) -> str | None:
        """Return None if the worker thread and the engine are healthy or the batcher is closing. Otherwise return a
        description of the fault."""
        if self._closing:
            return None
        if self._dead or self._faults.fault:
            return self._why_dead()
        busy_since = self._busy_since
        if busy_since is not None and time.monotonic() - busy_since > self._hang_timeout_s:
            return f"the engine's worker has been in one forward pass for more than {self._hang_timeout_s:g} s"
        return None

    def reserve(self, images: int, client: str = ITSELF.client) -> None:
        """Reserve places in the queue for `images` more images of a client. If too few places are free, none is
        reserved. The caller must free every reserved place with `release`.

        Raises:
            QueueFull: too few places are free at the moment.
            ShareUsed: the client has used its share of the places.
            ShuttingDown: the batcher is closing.
            ModelUnavailable: the worker thread has died.
        """
        self._check_open()
        self._check_room(self._places, client, images, "images")
        self._places.add(client, images)

    def release(self, images: int, client: str = ITSELF.client) -> None:
        """Free `images` places that were reserved with `reserve`."""
        self._places.add(client, -images)

    def submit(self, pixels: FloatArray, outputs: tuple[str, ...] = ()) -> "asyncio.Future[Done[Row]]":
        """Put one image, float32 [3, h, w], into the queue and return a future for its result. `outputs` are the names
        of the inner outputs to compute. If the future is cancelled before the engine takes the image, the image is
        dropped.

        Raises:
            QueueFull: too many patches are waiting.
            ShareUsed: too many patches of this client are waiting.
            ShuttingDown: the batcher is closing.
            ModelUnavailable: the worker thread has died.
            EngineFailed: the forward pass failed. The future raises this error, not this method.
        """
        patches = (pixels.shape[1] // self._patch_size) * (pixels.shape[2] // self._patch_size)
        patches *= 1 + len(outputs) // OUTPUTS_PER_PATCH
        job: Job[Row] = Job(pixels, outputs, patches, self._loop.create_future())
        with self._wake:
            self._check_open()
            if self._queue:
                self._check_room(self._patches, job.sender.client, patches, "patches")
            self._queue.push(job.sender, job)
            self._patches.add(job.sender.client, patches)
            self._wake.notify()
        return job.future

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop the worker thread after its current forward pass, and wait at most `timeout_s` seconds for it to stop.
        The futures of images that are still in the queue fail with `ShuttingDown`."""
        with self._wake:
            self._closing = True
            waiting = self._queue.clear()
            self._wake.notify()
        for job in waiting:
            if not job.future.done():
                job.future.set_exception(ShuttingDown("the service is shutting down"))
        self._thread.join(timeout_s)

    def retry_after_s(self) -> int:
        """Estimate how many seconds the engine needs to process the accepted images, based on the measured throughput.
        Return a number from 1 to 60."""
        if not self._images_per_s:
            return 1
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(self._places.used / self._images_per_s)))

    def _check_room(self, shares: Shares, client: str, amount: int, what: str) -> None:
        """Raise an error if there is no room for `amount` more images or patches of a client."""
        error: ServiceError
        if not shares.may_add(client, amount):
            error = ShareUsed(
                f"{shares.held(client)} {what} of this client are in the queue, and {amount} more would exceed its "
                "share; try again later",
                retry_after_s=self.retry_after_s(),
            )
        elif not shares.fits(amount):
            error = QueueFull(
                f"the queue has {shares.used} of {shares.limit} {what}; try again later",
                retry_after_s=self.retry_after_s(),
            )
        else:
            return
        raise error

    def _check_open(self) -> None:
        if self._closing:
            raise ShuttingDown("the service is shutting down", retry_after_s=1)
        if self._dead:
            raise ModelUnavailable(f"{self._why_dead()}; the service must be restarted")

    def _why_dead(self) -> str:
        return self._faults.fault or "the engine's worker thread has died"

    # The worker thread.

    def _work(self) -> None:
        try:
            while not self._faults.is_final and (batch := self._next_batch()) is not None:
                self._busy_since = time.monotonic()
                outcomes = self._outcomes(batch)
                self._busy_since = None
                self._deliver(outcomes)
        except BaseException:
            log.critical("the engine's worker thread has died", exc_info=True)
            raise
        finally:
            if not self._closing:
                with self._wake:
                    self._dead = True
                    lost = self._taken + self._queue.clear()
                self._deliver([(job, EngineFailed(self._why_dead())) for job in lost])

    def _next_batch(self) -> list[Job[Row]] | None:
        """Wait for images, and return the next batch. Return None if the batcher is closing. The batch is empty if the
        engine has failed and must be probed."""
        with self._wake:
            while True:
                self._taken = self._take()
                if self._taken or self._closing:
                    return self._taken or None
                if not self._wake.wait(self._faults.probe_in_s):
                    return []

    def _take(self) -> list[Job[Row]]:
        """Remove the next batch from the queue and return it. The batch consists of the next image and later images
        with the same shape and outputs, up to the limit of patches. Images with a cancelled future are dropped."""
        batch: list[Job[Row]] = []
        dropped: list[Job[Row]] = []
        patches = 0
        for job in self._queue.in_turn():
            if job.future.cancelled():
                dropped.append(job)
                continue
            if batch and (job.pixels.shape, job.outputs) != (batch[0].pixels.shape, batch[0].outputs):
                continue
            if batch and patches + job.patches > self.batch_max_patches:
                break
            batch.append(job)
            patches += job.patches
        for job in dropped + batch:
            self._queue.remove(job.sender, job)
            self._patches.add(job.sender.client, -job.patches)
        self._metrics.dropped.inc(len(dropped))
        return batch

    def _stacked(self, batch: list[Job[Row]]) -> FloatArray:
        """Return the pixels of a batch, float32 [B, 3, h, w]. They are valid until the next call."""
        pixels = [job.pixels for job in batch]
        if len(batch) == 1:
            return np.ascontiguousarray(pixels[0])[None]  # it may have more patches than fit into the buffer
        size = len(batch) * pixels[0].size
        return np.stack(pixels, out=self._pixels[:size].reshape(len(batch), *pixels[0].shape))

    def _outcomes(self, batch: list[Job[Row]]) -> list[Outcome[Row]]:
        """Run a forward pass over the batch, and return the result or the error of each image. If the pass fails, run a
        separate pass for each image. If the batch is empty, only find out whether the engine works."""
        if not batch:
            self._faults.probe()
            return []
        started, patches = time.perf_counter(), sum(job.patches for job in batch)
        try:
            rows = self._run(self._stacked(batch), batch[0].outputs)
            if len(rows) != len(batch):
                raise ValueError(f"the engine returned {len(rows)} rows for {len(batch)} images")
        except Exception as error:
            record_batch(batch, started, time.perf_counter(), patches, failed=True)
            self._metrics.engine_errors.inc()
            log.exception("a forward pass of %d images failed", len(batch))
            if len(batch) > 1 and not is_sticky(error):
                return [outcome for job in batch if not job.future.cancelled() for outcome in self._outcomes([job])]
            self._faults.failed(error)
            return [(job, _engine_failed(error)) for job in batch]
        self._faults.passed()
        ended = time.perf_counter()
        span = record_batch(batch, started, ended, patches)
        seconds = ended - started
        self._metrics.batch_images.observe(len(batch))
        self._metrics.batch_fill.observe(min(1.0, patches / self.batch_max_patches))
        self._metrics.images.inc(len(batch))
        rate = len(batch) / max(seconds, 1e-6)
        self._images_per_s = rate if self._images_per_s is None else 0.8 * self._images_per_s + 0.2 * rate
        return [
            (job, Done(row, started - job.queued_at, seconds, started, span))
            for job, row in zip(batch, rows, strict=True)
        ]

    def _deliver(self, outcomes: list[Outcome[Row]]) -> None:
        """Pass the outcomes of a batch to the event loop in a single call, so that the loop wakes up only once."""
        try:
            self._loop.call_soon_threadsafe(_set_results, outcomes)
        except RuntimeError:  # the loop is closed: the service has stopped and no client waits
            log.warning("%d results arrived after the service had stopped", len(outcomes))


def _engine_failed(error: Exception) -> EngineFailed:
    failed = EngineFailed("the engine failed on this image")
    failed.__cause__ = error
    return failed


def _set_results(outcomes: list[Outcome[Row]]) -> None:
    """For each image, set the result or the error on its future. This function runs on the event loop."""
    for job, outcome in outcomes:
        if job.future.done():  # cancelled while the engine processed the image
            continue
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)
