"""Estimate the time, the memory and the disk space that a training run needs, before its first step.

`training/trial.py` measures the costs of a few steps, of a forward pass and of a few images on this machine. The
functions in this file compute from these costs what the whole run needs. They measure nothing themselves, so they can
be called for any number of epochs, for example to find how many fit into a number of hours (`epochs_within`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from training.resources import Free

EVALUATION_BATCH = 64  # images in one forward pass of an evaluation
NEIGHBOURS_BLOCK = (1024, 65_536)  # similarities that k-NN holds at a time, see `training.evaluate.knn.nearest`
# Later peak memory of a process / that of the trial. Freed memory becomes fragmented. In three runs, the ratio was
# 1.10, 1.25 and 1.28 (benchmarks/results/2026-11-30-estimates.json).
CPU_GROWTH = 1.18
SHEET_BYTES = 2_500_000  # a typical image sheet, together with its copy in the report
LINE_BYTES = 1_600  # a line of metrics.jsonl, together with its copy for TensorBoard
NOTE_BYTES = 2_048  # the JSON file of a saved state


@dataclass(frozen=True)
class ReadingCosts:
    """The costs of reading and decoding images with all threads of one rank.

    `seconds` is the time per image if nothing else runs: the time for many images divided by their number.
    `core_seconds` is the time for which one image occupies one core. `cores` is the number of cores that the threads
    share with the rest of the process, and `ahead` the number of images that are read while the network is busy.
    """

    seconds: float
    core_seconds: float
    cores: int
    ahead: int


@dataclass(frozen=True)
class Costs:
    """What a trial has measured: seconds and bytes of the single parts of a run, on this machine.

    `step_seconds` has one value per phase of the run. A step includes its crops and masks, but does not wait for
    images. `threads` is the number of cores that a step occupies. Memory is that of the slowest or largest rank.
    """

    step_seconds: tuple[float, ...]
    first_seconds: float  # what the first step of each phase takes longer than the others, in total
    log_seconds: float  # what a step with a log line takes longer than the others
    forward_seconds: float  # one forward pass of an evaluation with `EVALUATION_BATCH` images
    threads: int
    training_images: ReadingCosts
    evaluation_images: ReadingCosts
    digest_seconds: float  # reading the bytes of one image and computing their digest
    step_bytes: int  # peak memory in the steps: of the device, or of the process if the device is the CPU
    forward_bytes: int  # peak memory in the forward pass of an evaluation
    feature_bytes: int  # memory for the features of one image that an evaluation reads
    first_state_bytes: int  # the state at step 0, which has no optimizer state
    state_bytes: int
    checkpoint_bytes: int
    write_bytes_per_s: float


@dataclass(frozen=True)
class Plan:
    """What a run is going to do. All numbers are those of the whole run unless they are per rank."""

    images: int  # to train on
    epochs: float
    phase_steps: tuple[int, ...]  # steps of each phase, see `steps_of_phases`
    batch_size: int  # images of a step, over all ranks
    n_ranks: int
    on_cpu: bool
    in_memory: bool  # whether all images are decoded before the first step
    image_bytes: int  # main memory for decoded images, per rank
    log_every: int  # steps
    save_every_seconds: float
    best_saves: int  # states that are saved because an evaluation was the best so far, at most
    keep_states: int
    rollback_states: int  # states that are kept in addition because a rollback may need them
    checkpoints: int  # checkpoint files at the end of the run
    sheets: int  # image sheets at the end of the run
    evaluations: int
    images_per_evaluation: int
    other_images: int = 0  # that pass through the network for image sheets and whitening

    @property
    def steps(self) -> int:
        """Return the number of steps in the run."""
        return sum(self.phase_steps)


@dataclass(frozen=True)
class Estimate:
    """The time, the memory and the disk space that a run is expected to need.

    `startup_seconds` is the time before the first step, without evaluations. `training_seconds` includes the time spent
    waiting for images. `memory_bytes` is the peak memory of each device. If the device is the CPU, it is the peak
    memory of the process, including `image_bytes`. `host_bytes` is the main memory of each rank for images and, with a
    GPU, for saving a state. `disk_bytes` is the size of the run's folder at the end, and `disk_peak_bytes` includes the
    temporary file of a state that is being written.
    """

    images: int
    epochs: float
    steps: int
    batch_size: int
    n_ranks: int
    on_cpu: bool
    seconds_per_step: float
    images_per_s: float
    startup_seconds: float
    training_seconds: float
    evaluations: int
    evaluation_seconds: float
    saving_seconds: float
    total_seconds: float
    memory_bytes: int
    image_bytes: int
    host_bytes: int
    disk_bytes: int
    disk_peak_bytes: int
    free: Free

    @property
    def problems(self) -> list[str]:
        """Return one message for each resource of which the run needs more than is free."""
        free, problems = self.free, []
        if free.device_bytes is not None and self.memory_bytes > free.device_bytes:
            kind = "process" if self.on_cpu else "GPU"
            problems.append(
                f"each {kind} needs {size(self.memory_bytes)} of memory, but {size(free.device_bytes)} is available: "
                "lower micro_batch, set checkpoint_blocks=true" + (" or lower cache_bytes" if self.on_cpu else "")
            )
        if not self.on_cpu and free.host_bytes is not None and self.host_bytes > free.host_bytes:
            problems.append(
                f"each rank needs {size(self.host_bytes)} of main memory for images and states, but "
                f"{size(free.host_bytes)} is available: lower cache_bytes"
            )
        if free.disk_bytes is not None and self.disk_peak_bytes > free.disk_bytes:
            problems.append(
                f"the run writes {size(self.disk_peak_bytes)}, but {size(free.disk_bytes)} is free on the disk: "
                "free some space, choose another out folder, or lower keep_states"
            )
        return problems

    @property
    def fits(self) -> bool:
        """Return whether no resource is too small, as far as is known."""
        return not self.problems


def steps_of_phases(starts_at: Sequence[float], total: int) -> tuple[int, ...]:
    """Return the number of steps in each phase of a run of `total` steps.

    `starts_at` contains, for each phase in order, the share of the run that is done when the phase begins.
    """
    shares = np.arange(total) / total  # as in `CropSettings.phase`
    begun = [int((shares >= start).sum()) for start in starts_at]
    return tuple(a - b for a, b in zip(begun, [*begun[1:], 0], strict=True))


def image_memory(
    n_images: int, side: int, per_rank: int, *, cache_bytes: int, ahead_steps: int, ahead_bytes: int
) -> tuple[bool, int]:
    """Compute the main memory that one rank needs for decoded images, as `open_loader` will allocate it.

    Args:
        n_images: number of training images.
        side: side of the squares that images are stored as, pixels.
        per_rank: images of a step on one rank.
        cache_bytes: limit on the memory for squares. If the squares of all images fit, they are decoded only once.
        ahead_steps: maximum number of steps that are decoded ahead.
        ahead_bytes: limit on the memory for the steps that are decoded ahead.

    Returns:
        two values: whether all images are in memory, and the number of bytes.
    """
    square = 3 * side**2
    if n_images * square <= cache_bytes:
        return True, n_images * square
    step = per_rank * square
    return False, step * (1 + min(ahead_steps, ahead_bytes // step))


def count_evaluations(total: int, every: int) -> int:
    """Return how often the loop of a run of `total` steps evaluates, with an evaluation every `every` steps (0: none).

    The run is also evaluated before the first step and after the last one.
    """
    return 2 + ((total - 1) // every if every else 0)


def step_with_reading(step_seconds: float, n_images: int, threads: int, reading: ReadingCosts) -> float:
    """Compute the time of a step during which threads decode the `n_images` images of another step, in seconds.

    The time is limited by the step itself, by the threads that decode, or by the cores that both share.
    """
    busy = step_seconds * threads + n_images * reading.core_seconds
    return max(step_seconds, n_images * reading.seconds, busy / reading.cores)


def seconds_of_evaluation(n_images: int, costs: Costs) -> float:
    """Compute the time for the features of `n_images` images, in seconds.

    While the network is busy with a batch, the threads read up to `ahead` images of the next batch. The other images of
    a batch are read while the network waits.
    """
    if not n_images:
        return 0.0
    reading, forward = costs.evaluation_images, costs.forward_seconds
    read = EVALUATION_BATCH * reading.seconds
    overlap = min(forward, read, reading.ahead * reading.seconds)
    busy = forward * costs.threads + EVALUATION_BATCH * reading.core_seconds
    return n_images / EVALUATION_BATCH * max(forward + read - overlap, busy / reading.cores)


def evaluation_memory(n_images: int, costs: Costs) -> int:
    """Compute the memory that an evaluation of `n_images` images needs for features and similarities, in bytes."""
    rows, columns = (min(n_images, side) for side in NEIGHBOURS_BLOCK)
    return n_images * costs.feature_bytes + 4 * rows * columns


def estimate(plan: Plan, costs: Costs, free: Free) -> Estimate:
    """Estimate what a run needs from the costs that a trial has measured."""
    per_rank = plan.batch_size // plan.n_ranks
    step_seconds = costs.step_seconds
    if not plan.in_memory:
        reading = costs.training_images
        step_seconds = tuple(step_with_reading(s, per_rank, costs.threads, reading) for s in step_seconds)
    lines = math.ceil(plan.steps / plan.log_every)
    training = sum(n * s for n, s in zip(plan.phase_steps, step_seconds, strict=True)) + lines * costs.log_seconds
    startup = costs.first_seconds
    if plan.in_memory:
        startup += plan.images * (costs.training_images.seconds + costs.digest_seconds)
    n_evaluated = plan.evaluations * plan.images_per_evaluation + plan.other_images
    evaluation = seconds_of_evaluation(n_evaluated, costs)

    saves = int(training // plan.save_every_seconds) + plan.best_saves + 1  # after step 0
    written = costs.first_state_bytes + saves * (costs.state_bytes + costs.checkpoint_bytes)
    saving = (written + plan.checkpoints * costs.checkpoint_bytes) / costs.write_bytes_per_s
    states = min(plan.keep_states, saves) + plan.rollback_states
    first_state = costs.first_state_bytes + NOTE_BYTES if saves < plan.keep_states else 0
    disk = states * (costs.state_bytes + NOTE_BYTES) + first_state + plan.checkpoints * costs.checkpoint_bytes
    disk += plan.sheets * SHEET_BYTES + lines * LINE_BYTES

    memory = max(costs.step_bytes, costs.forward_bytes + evaluation_memory(plan.images_per_evaluation, costs))
    return Estimate(
        images=plan.images,
        epochs=plan.epochs,
        steps=plan.steps,
        batch_size=plan.batch_size,
        n_ranks=plan.n_ranks,
        on_cpu=plan.on_cpu,
        seconds_per_step=training / plan.steps,
        images_per_s=plan.batch_size * plan.steps / training,
        startup_seconds=startup,
        training_seconds=training,
        evaluations=plan.evaluations,
        evaluation_seconds=evaluation,
        saving_seconds=saving,
        total_seconds=startup + training + evaluation + saving,
        memory_bytes=int(memory * CPU_GROWTH) + plan.image_bytes if plan.on_cpu else memory,
        image_bytes=plan.image_bytes,
        host_bytes=plan.image_bytes + (0 if plan.on_cpu else costs.state_bytes),
        disk_bytes=disk,
        disk_peak_bytes=disk + costs.state_bytes,
        free=free,
    )


def epochs_within(
    hours: float, total_seconds: Callable[[float], float], steps_per_epoch: int, most: float = 1e6
) -> float:
    """Return the largest number of epochs, in whole steps, that a run can do in a number of hours.

    Args:
        hours: the time for the whole run, including the time before the first step, evaluations and saved states.
        total_seconds: a function that estimates the time of a run, in seconds, from its number of epochs. The time must
            not fall if the number of epochs rises.
        steps_per_epoch: the number of steps in one epoch.
        most: the largest number of epochs to return.

    Raises:
        ValueError: a run of a single step takes longer.
    """
    limit = hours * 3600
    least = total_seconds(1 / steps_per_epoch)
    if least > limit:
        raise ValueError(
            f"hours={hours:g} is too short: a run of one step takes {duration(least)}, including the time for reading "
            f"the images and for evaluations; give at least hours={math.ceil(least / 36) / 100:g}"
        )
    fits, too_many = 1, int(most * steps_per_epoch) + 1  # numbers of steps
    while too_many - fits > 1:
        middle = min(2 * fits, (fits + too_many) // 2)  # small numbers first, because most runs are short
        if total_seconds(middle / steps_per_epoch) <= limit:
            fits = middle
        else:
            too_many = middle
    return fits / steps_per_epoch


def size(n_bytes: float) -> str:
    """Return a number of bytes in words, such as `780 MiB` or `1.5 GiB`."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if n_bytes >= scale or unit == "MiB":
            value = n_bytes / scale
            break
    return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"


def duration(seconds: float) -> str:
    """Return a time in words with at most two units, such as `440 ms`, `45 s`, `2 min 5 s` or `3 d 4 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
    units = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    rest, parts = round(seconds), list[tuple[int, str]]()
    for name, length in units:
        if rest >= length or parts:
            parts.append((rest // length, name))
            rest %= length
    return " ".join(f"{n} {name}" for n, name in parts[:2] if n)


def in_words(estimated: Estimate) -> list[str]:
    """Describe an estimate in a few plain lines, with one further line for each resource that is too small."""
    e, free = estimated, estimated.free
    each = "each" if e.n_ranks > 1 else "the"

    def available(n_bytes: int | None, word: str = "available") -> str:
        return "" if n_bytes is None else f"; {size(n_bytes)} {word}"

    if e.on_cpu:
        memory = f"{size(e.memory_bytes)} for {each} process, of which {size(e.image_bytes)} is for images"
        memory += available(free.device_bytes)
    else:
        memory = f"{size(e.memory_bytes)} on {each} GPU{available(free.device_bytes)}; main memory for images and "
        memory += f"states: {size(e.host_bytes)}{available(free.host_bytes)}"
    parts = [
        f"before the first step {duration(e.startup_seconds)}",
        f"training {duration(e.training_seconds)}",
        f"{e.evaluations} evaluation{'s' * (e.evaluations != 1)} {duration(e.evaluation_seconds)}",
        f"saving {duration(e.saving_seconds)}",
    ]
    return [
        f"{e.images:,} images; {e.steps:,} steps of {e.batch_size:,} images ({e.epochs:g} epochs)",
        f"estimated time: {duration(e.total_seconds)} ({', '.join(parts)}); {duration(e.seconds_per_step)} a step, "
        f"{e.images_per_s:.3g} images/s",
        f"estimated memory: {memory}",
        f"estimated disk space: {size(e.disk_bytes)}{available(free.disk_bytes, 'free')}",
        *(f"warning: {problem}" for problem in e.problems),
    ]
