"""Measure what the parts of a training run cost on this machine, in a short trial before the run.

The trial runs a few real training steps on random images, with networks of its own that it deletes afterwards. The
run's weights and the state of torch's random generators stay the same to the bit. The trial also decodes a few of the
run's images, runs one forward pass of an evaluation, and writes a temporary file. `training/estimate.py` computes from
the measured costs what the whole run needs.

Peak memory is measured rather than computed (`training/resources.py`).
"""

import gc
import hashlib
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from model.config import ViTConfig
from model.cpus import available_cpus
from model.pooling import PATCH_PARTS
from model.preprocess import PreprocessSpec
from model.vit import DinoVisionTransformer
from training.data.crops import CropSettings, make_micros
from training.data.dataset import Photo, Source, decode_square
from training.distributed import World, from_all, from_main
from training.estimate import EVALUATION_BATCH, Costs, ReadingCosts, steps_of_phases
from training.evaluate.features import default_workers, read_pixels
from training.outcome import released_backbone
from training.resources import Free, free_resources, least_free, peak_bytes, restart_peak, write_speed
from training.spread import RANKME_ROWS, rankme_share
from training.state import Parts
from training.step import Schedules, Setup, StepSettings, train_step

MEASURED_STEPS = 3
LONG_S = 15.0  # if a step or a forward pass takes longer, it is measured only once
IMAGES_READ = 32  # at least, to measure the time for an image
METADATA_BYTES = 4096  # of a checkpoint, which are mostly the run's settings


@dataclass(frozen=True)
class Pieces:
    """The parts of a run that a trial needs.

    `make_setup` makes networks and an optimizer like those of the run. It is called on every rank. `total` is the
    number of steps in the run, to which the schedules belong. `side` is the side in pixels of the squares that images
    are stored as. `workers` is the number of threads that decode images on this rank. `out` is the run's folder, which
    may be missing.
    """

    make_setup: Callable[[], Setup]
    step_settings: StepSettings
    schedules: Schedules
    crops: CropSettings
    total: int
    side: int
    vit: ViTConfig
    eval_spec: PreprocessSpec
    workers: int
    out: Path


def trial(pieces: Pieces, source: Source, world: World) -> tuple[Costs, Free]:
    """Measure the costs of a run, and find how much memory and disk space is free.

    Every rank must call this function, inside the context `training.setup.attention_kernel` if the run uses it. The
    result is the same on all ranks. A trial takes four steps for each phase of the run, and a few seconds for images
    and the disk.

    Args:
        pieces: the parts of the run.
        source: the training images.
        world: the rank of this process, the number of ranks and the device.

    Raises:
        ValueError: a step needs more memory than the GPU has, or no image can be read.
        OSError: the images cannot be reached, or the run's folder cannot be written.
    """
    free = free_resources(pieces.out, world)
    with _undisturbed(world.device):
        images = _measure_images(pieces, source, world)
        try:
            network = _measure_network(pieces, world)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"a training step needs more memory than {world.device} has: lower micro_batch or batch_size, or set "
                f"checkpoint_blocks=true ({str(error).splitlines()[0]})"
            ) from error
    costs = Costs(
        **vars(images),
        **vars(network),
        threads=torch.get_num_threads() if world.device.type == "cpu" else 1,
        write_bytes_per_s=write_speed(pieces.out, network.state_bytes) if world.is_main else math.inf,
    )
    return _of_all(from_all(world, [costs])), least_free(from_all(world, [free]))


@dataclass(frozen=True)
class _ImageCosts:
    """The costs of reading images; the fields are those of `Costs`."""

    training_images: ReadingCosts
    evaluation_images: ReadingCosts
    digest_seconds: float


def _measure_images(pieces: Pieces, source: Source, world: World) -> _ImageCosts:
    """Measure how long it takes to read an image for training and, on rank 0, for an evaluation."""

    def for_training(index: int) -> None:
        decode_square(source.encoded(index), pieces.side)

    def for_evaluation(index: int) -> None:
        read_pixels(Photo(source, index), pieces.eval_spec)

    def for_digest(index: int) -> None:
        hashlib.sha256(source.encoded(index)).digest()

    cores = max(1, available_cpus() // world.on_machine)
    training = _measure_reading(for_training, len(source), pieces.workers, cores)
    if not world.is_main:  # rank 0 evaluates, and computes the digest, while the others wait
        return _ImageCosts(training, training, 0.0)
    workers = default_workers()
    evaluation = _measure_reading(for_evaluation, len(source), workers, available_cpus())
    evaluation = replace(evaluation, ahead=4 * workers)  # as `training.evaluate.features.in_order`
    return _ImageCosts(training, evaluation, _measure_reading(for_digest, len(source), 1, 1).seconds)


def _measure_reading(read: Callable[[int], None], n_images: int, workers: int, cores: int) -> ReadingCosts:
    """Call `read` with the numbers of a few images, evenly spread over the `n_images` images, in `workers` threads.

    Raises:
        ValueError: no image could be read.
    """
    count = min(n_images, max(IMAGES_READ, 4 * workers))
    problems: list[ValueError] = []

    def core_seconds(number: int) -> float:
        start = time.thread_time()
        try:
            read(number * n_images // count)
        except ValueError as error:  # the run skips unreadable images
            problems.append(error)
        return time.thread_time() - start

    core_seconds(0)  # the first image takes longer
    problems.clear()
    with ThreadPoolExecutor(workers) as pool:
        start = time.perf_counter()
        busy = sum(pool.map(core_seconds, range(count)))
        seconds = time.perf_counter() - start
    if len(problems) == count:
        raise ValueError(f"none of {count} images could be read; the first: {problems[0]}")
    return ReadingCosts(seconds / count, busy / count, cores, ahead=0)


@dataclass(frozen=True)
class _NetworkCosts:
    """The costs of steps, of a forward pass and of a state; the fields are those of `Costs`."""

    step_seconds: tuple[float, ...]
    first_seconds: float
    log_seconds: float
    forward_seconds: float
    step_bytes: int
    forward_bytes: int
    feature_bytes: int
    first_state_bytes: int
    state_bytes: int
    checkpoint_bytes: int


def _measure_network(pieces: Pieces, world: World) -> _NetworkCosts:
    """Make networks like those of the run, and measure the steps of each phase and a forward pass of an evaluation."""
    setup = pieces.make_setup()
    first_state_bytes = state_bytes(setup.parts)
    generator = torch.Generator().manual_seed(pieces.crops.seed)
    per_rank = pieces.crops.batch_size // world.size
    shape = (per_rank, 3, pieces.side, pieces.side)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(world.device)
    seconds, first_seconds, cls_tokens, start = list[float](), 0.0, torch.zeros(1, 1), 0
    for n_steps in steps_of_phases([phase.starts_at for phase in pieces.crops.phases], pieces.total):
        end = start + n_steps
        if not n_steps:
            seconds.append(0.0)
            continue
        # The last steps of a phase are the most expensive, because the backbone may be frozen before.
        numbers = [max(start, end - 1 - n) for n in range(1 + MEASURED_STEPS)]
        first, mean, cls_tokens = _time_steps(pieces, setup, pixels, numbers)
        seconds.append(mean)
        first_seconds += max(0.0, first - mean)
        start = end
    begin = time.perf_counter()
    rankme_share(cls_tokens[:RANKME_ROWS])
    log_seconds = time.perf_counter() - begin
    step_bytes = peak_bytes(world.device)
    restart_peak(world.device)
    backbone = released_backbone(pieces.vit, world, setup.parts)
    forward_seconds = _time_forward(backbone, pieces.eval_spec) if world.is_main else 0.0
    width = 4 * pieces.vit.embed_dim
    poolings = 6 * width  # class token, mean patch token, both together, and the last one normalised
    return _NetworkCosts(
        step_seconds=tuple(seconds),
        first_seconds=first_seconds,
        log_seconds=log_seconds,
        forward_seconds=forward_seconds,
        step_bytes=step_bytes,
        forward_bytes=peak_bytes(world.device),
        feature_bytes=poolings + ((1 + len(PATCH_PARTS)) * width if world.device.type == "cpu" else 0),
        first_state_bytes=first_state_bytes,
        state_bytes=state_bytes(setup.parts),
        checkpoint_bytes=checkpoint_bytes(setup.parts),
    )


def _time_steps(pieces: Pieces, setup: Setup, pixels: Tensor, numbers: Sequence[int]) -> tuple[float, float, Tensor]:
    """Run the steps with the given numbers. Return the seconds of the first, the mean of the others, and class tokens.

    If the second step takes long, it is the last one.
    """
    world, aspect = setup.world, torch.ones(len(pixels))
    first_number, second_number, *others = numbers

    def seconds_of(group: Sequence[int]) -> tuple[float, Tensor]:
        _wait_for(world.device)
        start = time.perf_counter()
        for number in group:
            micros = make_micros(pieces.crops, world, pixels, aspect, number, pieces.total)
            _, cls_tokens = train_step(pieces.step_settings, setup, pieces.schedules, micros, number, measure=False)
        _wait_for(world.device)
        return time.perf_counter() - start, cls_tokens

    first, _ = seconds_of([first_number])
    second, cls_tokens = seconds_of([second_number])
    if from_main(world, second > LONG_S):
        return first, second, cls_tokens
    rest, cls_tokens = seconds_of(others)
    return first, (second + rest) / (1 + len(others)), cls_tokens


@torch.no_grad()
def _time_forward(backbone: DinoVisionTransformer, spec: PreprocessSpec) -> float:
    """Return the seconds that a forward pass of an evaluation takes on a batch of `EVALUATION_BATCH` images."""
    device, side = backbone.cls_token.device, spec.crop or spec.resize or backbone.config.img_size
    seconds = 0.0
    for _ in range(2):  # the first pass takes longer
        pixels = torch.zeros(EVALUATION_BATCH, 3, side, side)
        _wait_for(device)
        start = time.perf_counter()
        backbone.get_intermediate_layers(pixels.to(device), n=1, return_class_token=True)
        _wait_for(device)
        seconds = time.perf_counter() - start
        if seconds > LONG_S:
            break
    return seconds


def state_bytes(parts: Parts) -> int:
    """Compute the size of the file that `training.state.save_state` writes for these networks, without writing it."""
    optimizer = {
        f"{name}/{key}": value
        for name, parameter in parts.student.named_parameters()
        for key, value in parts.optimizer.state.get(parameter, {}).items()
    }
    state = {
        "student": parts.student.state_dict(),
        "ema": parts.ema.state_dict(),
        "optimizer": optimizer,
        "buffers": parts.buffers,
    }
    # A file with the same names but tensors of one float32 shows the space that is not taken by values.
    frame = {part: {name: torch.zeros(1) for name in tensors} for part, tensors in state.items()}
    file = io.BytesIO()
    torch.save(frame, file)
    tensors = [tensor for part in state.values() for tensor in part.values()]
    return len(file.getvalue()) - 4 * len(tensors) + sum(map(_n_bytes, tensors))


def checkpoint_bytes(parts: Parts) -> int:
    """Compute the size of the run's checkpoint."""
    tensors = parts.ema.backbone.state_dict()
    frame = safetensors.torch.save({name: torch.zeros(1) for name in tensors})
    return len(frame) - 4 * len(tensors) + sum(map(_n_bytes, tensors.values())) + METADATA_BYTES


def _n_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Restore torch's random generators after the block, free the memory that it used, and restart the peak memory."""
    devices = list(range(torch.cuda.device_count())) if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        restart_peak(device)
        try:
            yield
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            restart_peak(device)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _of_all(ranks: Sequence[Costs]) -> Costs:
    """Combine the costs of all ranks. A step takes as long as on the slowest rank. Rank 0 evaluates and saves."""
    return replace(
        ranks[0],
        step_seconds=tuple(max(seconds) for seconds in zip(*(costs.step_seconds for costs in ranks), strict=True)),
        first_seconds=max(costs.first_seconds for costs in ranks),
        training_images=max((costs.training_images for costs in ranks), key=lambda reading: reading.seconds),
        step_bytes=max(costs.step_bytes for costs in ranks),
    )
