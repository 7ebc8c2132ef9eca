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
"""

import math

import torch

from model.cpus import available_cpus
from training.data.batches import Loader, Plan, Reading
from training.data.dataset import Source
from training.data.memory_loader import MemoryLoader
from training.data.progress import Tell
from training.data.stream_loader import StreamLoader

WAIT_WORTH_A_WORD = 0.1


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
