"""The loop: photos in, checkpoint out.

Per step (facebookresearch/dinov2, `dinov2/train/ssl_meta_arch.py`): the teacher looks at two large crops of each photo
and gives targets; the student looks at the same two with patches masked, and at several small ones; its class tokens
must agree with the teacher's of the other crops (DINO), its masked patches with what the teacher sees there (iBOT), and
its embeddings must spread (KoLeo). The teacher then follows the student slowly.

All randomness of a step is drawn from (seed, step, sample): a stopped run goes on as if it had not stopped, and two
ranks see what one would. The host waits for the device only where a line is written.

    out/checkpoint.safetensors   what is released: the average's backbone; `dinov2 export` reads it
    out/states/                  what a stopped run goes on from
    out/metrics.jsonl ...        training/monitor.py; report.html at the end
    out/skipped.txt              photos that could not be read
"""

import functools
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from training.config import TrainConfig
from training.crops import Crops, crop_views, make_crops
from training.data import Data, open_data
from training.distill import PrototypeTeacher, load_teacher
from training.distributed import World, agree, from_main, join, mean_over_ranks, min_over_ranks, wait_for_all
from training.flops import describe_device, device_peak_flops, work_of_step
from training.loader import n_cores, waiting_advice
from training.monitor import Monitor
from training.outcome import CHECKPOINT, finish, released_backbone, report_knn, write_checkpoint, write_sheet
from training.provenance import provenance
from training.sentinels import NEVER, FirstNotFinite, Limits, Sentinels, Verdict, rankme_share, save_replay
from training.setup import Setup, attention_kernel, compute_dtype, make_autocast, make_setup
from training.sinks import make_sinks
from training.state import check_same_settings, drop_states, find_state, load_state, save_state
from training.step import Schedules, make_schedules, train_step

INTERRUPTED = 128 + signal.SIGTERM  # exit status of a run that SIGTERM ended, saved
RANKME_ROWS = 1024  # enough for an effective rank, and a short wait


class RunStopped(RuntimeError):
    """A sentinel ended the run; the message says what happened and what to change."""


class Interrupted(RuntimeError):
    """SIGTERM came; the state is saved and the same command goes on."""


@dataclass
class Run:
    """What the loop holds."""

    config: TrainConfig
    world: World
    data: Data
    setup: Setup
    schedules: Schedules
    total: int
    steps_per_epoch: int
    facts: dict[str, Any]
    sentinels: Sentinels
    monitor: Monitor
    not_finite: FirstNotFinite
    saved_at: float  # time.monotonic() of the last save

    @property
    def settings(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")


def train(config: TrainConfig, console: Console | None = None) -> Path:
    """Run, or go on with, one training run.

    Returns:
        the checkpoint's path.

    Raises:
        ValueError: no usable photos, or `config.out` holds a run with other settings or photos.
        OSError: the photos' place or the run's folder does not answer.
        RunStopped: a sentinel ended it.
        Interrupted: SIGTERM ended it.
    """
    console = console or Console()
    with (
        sigterm_noted() as stop,
        join(config.device) as world,
        open_data(config, world, console) as data,
        attention_kernel(world.device, compute_dtype(make_autocast(config.precision, world.device))),
    ):
        run, step = begin(config, world, data, console)
        with run.monitor:
            while step < run.total:
                if run.sentinels.passes_over(step + 1):
                    step += 1
                    continue
                terms, seen = one_step(run, step)
                run.not_finite.note(step + 1, {name: terms[name] for name in terms if is_watched(config, name)})
                step += 1
                run.monitor.advance(step, work_of_step(config, (step - 1) / run.total))
                if look_up(run, step, stop):
                    step = check(run, step, terms, seen, stop)
            path, words = finish(config, world, data, run.setup.parts, run.facts, run.total)
            if world.is_main:
                console.print(words, markup=False)
            wait_for_all(world)
            return path


def is_watched(config: TrainConfig, name: str) -> bool:
    """Whether a figure must be finite in every step. fp16 finds its loss scale by gradients that overflow."""
    return name == "loss" or (name.startswith("grad_norm") and config.precision != "fp16")


def one_step(run: Run, step: int) -> tuple[dict[str, Tensor], Tensor]:
    """Photos, crops, update."""
    with run.monitor.waiting():
        batch = run.data.loader.batch(step)
    micros = make_micros(run.config, run.world, batch.pixels, batch.aspect, step, run.total)
    measure = is_time(step + 1, run.config.log_every) or step + 1 == run.total
    return train_step(run.config, run.setup, run.schedules, micros, step, run.sentinels.lr_factor, measure)


def make_micros(
    config: TrainConfig, world: World, pixels: Tensor, aspect: Tensor, step: int, total: int
) -> list[Crops]:
    """This rank's photos of a step as crops, cut into micro-batches."""
    views = crop_views(config, step / total)
    mine = range(world.rank * len(pixels), (world.rank + 1) * len(pixels))
    positions = torch.arange(mine.start, mine.stop)
    size = config.micro_batch or len(pixels)
    return [
        make_crops(config, p, a, step, at, views, world.device)
        for p, a, at in zip(*(torch.split(x, size) for x in (pixels, aspect, positions)), strict=True)
    ]


def begin(config: TrainConfig, world: World, data: Data, console: Console) -> tuple[Run, int]:
    """Everything before the first step, and the number of steps done before."""
    steps_per_epoch = len(data.loader) // config.batch_size
    total = max(1, round(config.epochs * steps_per_epoch))
    teacher = load_teacher(config).to(world.device) if config.teacher else None
    setup = make_setup(config, world, teacher)
    hardware = f"{world.size} x " * (world.size > 1) + describe_device(world.device)
    facts = provenance(config, data.digest, len(data.loader), hardware)
    limits = Limits(
        total,
        config.n_prototypes,
        on_collapse=config.on_collapse,
        on_not_finite=config.on_not_finite,
        on_knn=config.on_knn,
        patience=config.sentinel_lines,
        rollback_lr_factor=config.rollback_lr_factor,
        min_rankme_share=config.min_rankme_share,
        knn_margin=config.knn_margin,
        max_rollbacks=config.max_rollbacks,
    )
    saved, broken = from_main(world, find_state(config.out) if world.is_main else (None, []))
    first = saved.step if saved else 0
    settings = config.model_dump(mode="json")
    if saved:
        check_same_settings(saved, settings)
        data.check_same(saved.memory["data"])
    peak = (
        None
        if compute_dtype(setup.autocast) == torch.float32 and world.device.type == "cuda"
        else device_peak_flops(world.device, measure=config.measure_peak)
    )
    monitor = Monitor(
        config.out / "metrics.jsonl",
        total,
        first,
        config.batch_size,
        console,
        active=world.is_main,
        device=world.device,
        sinks=make_sinks(config.out, first, config.wandb, settings, console.print) if world.is_main else [],
        peak_flops=None if peak is None else peak * world.size,
        advise=functools.partial(
            waiting_advice, loader=data.loader, side=config.cache_size, workers=config.workers or n_cores()
        ),
    )
    run = Run(
        config,
        world,
        data,
        setup,
        make_schedules(config, total),
        total,
        steps_per_epoch,
        facts,
        Sentinels(limits),
        monitor,
        FirstNotFinite(world.device),
        time.monotonic(),
    )
    for message in broken:
        monitor.say(first, "warning", message)
    if isinstance(teacher, PrototypeTeacher):
        batches = (data.loader.batch(step) for step in range(total))
        teacher.choose(
            (c for n, b in enumerate(batches) for c in make_micros(config, world, b.pixels, b.aspect, n, total)), world
        )
    if saved:
        load_state(saved, setup.parts)
        run.sentinels.load_state_dict(saved.memory["sentinels"])
    else:
        save(run, 0)  # says at once whether the folder can hold a state, and is what a rollback may need
        guard_knn(run, 0)
    if world.is_main:
        (config.out / "config.json").write_text(json.dumps(settings, indent=1))
        announce(run, first, console)
    return run, first


def announce(run: Run, first: int, console: Console) -> None:
    """One line for people: what is trained on what."""
    config, world, autocast = run.config, run.world, run.setup.autocast
    console.print(
        f"{len(run.data.loader)} photos to train on{'' if run.data.loader.in_memory else ' (streamed)'}, "
        f"{len(run.data.held_out)} held out; {run.total} steps of {config.batch_size} on "
        f"{f'{world.size} x ' if world.size > 1 else ''}{world.device.type}"
        f"{f' in {str(autocast.fast_dtype)[6:]}' if autocast._enabled else ''}; ViT {asdict(config.vit_config)}"
        + (f"; goes on after step {first}" if first else ""),
        markup=False,
    )


def look_up(run: Run, step: int, stop: list[bool]) -> bool:
    """Whether to wait for the device, write and decide after this step; the same on all ranks."""
    config = run.config
    every = [config.log_every, every_steps(run, config.eval_every_epochs), config.sheet_every]
    every.append(every_steps(run, config.keep_checkpoints_every_epochs))
    if step == run.total or any(step % n == 0 for n in every if n):
        return True
    return run.world.size == 1 and (stop[0] or save_is_due(run))  # ranks have clocks of their own


def every_steps(run: Run, epochs: float) -> int:
    """Epochs as steps; 0 is never."""
    return max(1, round(epochs * run.steps_per_epoch)) if epochs else 0


def save_is_due(run: Run) -> bool:
    return time.monotonic() - run.saved_at > 60 * run.config.save_every_minutes


def check(run: Run, step: int, terms: dict[str, Tensor], seen: Tensor, stop: list[bool]) -> int:
    """Write a line, ask the sentinels, save what is due. The step to go on after: an earlier one after a rollback.

    Raises:
        RunStopped, Interrupted.
    """
    config, world, monitor = run.config, run.world, run.monitor
    verdict = check_finite(run)
    if verdict is None and (is_time(step, config.log_every) or step == run.total):
        verdict = write_line(run, step, terms, seen)
    if verdict is None and step < run.total and is_time(step, every_steps(run, config.eval_every_epochs)):
        verdict = guard_knn(run, step)
    if verdict is not None:
        monitor.say(step, {"warn": "warning"}.get(verdict.action, verdict.action), verdict.message)
        if verdict.action == "stop":
            raise RunStopped(verdict.message)
        if verdict.action == "rollback":
            return go_back(run, verdict)
    with monitor.paused():
        if is_time(step, every_steps(run, config.keep_checkpoints_every_epochs)):
            keep_checkpoint(run, config.out / "checkpoints" / f"step_{step:08}.safetensors", step)
        if is_time(step, config.sheet_every) and step < run.total:
            backbone = released_backbone(config, run.setup.parts)
            if world.is_main:
                write_sheet(config, run.data, backbone, step, run.total)
        stopping = agree(world, stop[0])
        if agree(world, save_is_due(run)) or stopping or step == run.total:
            save(run, step)
    if stopping and step < run.total:
        raise Interrupted(f"stopped by SIGTERM after step {step} of {run.total}: saved; the same command goes on")
    return step


def is_time(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def check_finite(run: Run) -> Verdict | None:
    """What was not finite since the last look; its batch is kept. Weights have not taken it in (training/step.py)."""
    first = int(min_over_ranks(run.world, run.not_finite.step))
    if first == NEVER:
        return None
    found = run.not_finite.read()
    figures = found[1] if found else {}  # of another rank
    batch = run.data.loader.batch(first - 1)
    path = None
    if run.world.is_main:
        [crops, *_] = make_micros(run.config, run.world, batch.pixels, batch.aspect, first - 1, run.total)
        tensors = {"globals_": crops.globals_, "masks": crops.masks}
        tensors |= {} if crops.locals_ is None else {"locals_": crops.locals_}
        facts = {"indices": batch.indices, "seed": run.config.seed}
        path = save_replay(run.config.out / "replays", first, batch.names, tensors, figures, facts=facts)
    verdict = from_main(run.world, run.sentinels.check_finite(first, figures, path))
    run.not_finite.clear()
    return verdict


def write_line(run: Run, step: int, terms: dict[str, Tensor], seen: Tensor) -> Verdict | None:
    """A line of metrics.jsonl; what the collapse sentinel says of it."""
    config = run.config
    means = mean_over_ranks(run.world, torch.stack([value.float() for value in terms.values()]))
    figures: dict[str, Any] = dict(zip(terms, means.tolist(), strict=True))
    figures["dino_over_ln_k"] = figures["dino"] / math.log(config.n_prototypes)
    figures["rankme_share"] = rankme_share(seen[:RANKME_ROWS])
    figures |= {
        "epoch": step / run.steps_per_epoch,
        "lr": float(run.schedules.lr["head"][step - 1]) * run.sentinels.lr_factor,
        "weight_decay": float(run.schedules.weight_decay[step - 1]),
        "momentum": float(run.schedules.momentum[step - 1]),
        "teacher_temp": float(run.schedules.teacher_temp[step - 1]),
    }
    run.monitor.write(step, figures)
    return from_main(run.world, run.sentinels.check_line(step, figures))


def guard_knn(run: Run, step: int) -> Verdict | None:
    """k-NN on the held-out photos, if it is asked for during the run; what its sentinel says."""
    if not run.config.eval_every_epochs:
        return None
    verdict = None
    with run.monitor.paused():
        backbone = released_backbone(run.config, run.setup.parts)
        if run.world.is_main and (knn := report_knn(run.config, run.data, backbone)):
            run.monitor.evaluated(step, {f"knn_{p}_{k}": value for p, by_k in knn.items() for k, value in by_k.items()})
            verdict = run.sentinels.check_knn(step, knn["cls"][10])
        return from_main(run.world, verdict)


def go_back(run: Run, verdict: Verdict) -> int:
    """Take the newest state of `verdict.back_to` or before; the step to go on after.

    Raises:
        RunStopped: there is none.
    """
    wait_for_all(run.world)
    saved, _ = from_main(run.world, find_state(run.config.out, verdict.back_to) if run.world.is_main else (None, []))
    if saved is None:
        raise RunStopped(f"{verdict.message} No state of step {verdict.back_to} or before is left: the run stops.")
    load_state(saved, run.setup.parts)
    run.monitor.rewind(saved.step)
    if run.world.is_main:
        drop_states(run.config.out, saved.step)
    run.monitor.say(saved.step, "rollback", f"goes on after step {saved.step}")
    save(run, saved.step)  # with what the sentinels have learned
    return saved.step


def keep_checkpoint(run: Run, path: Path, step: int) -> None:
    """The average's backbone as a checkpoint. Every rank must call it."""
    backbone = released_backbone(run.config, run.setup.parts)
    if run.world.is_main:
        write_checkpoint(path, run.config, backbone, run.facts, step)


def save(run: Run, step: int) -> None:
    """State and checkpoint. Every rank must call it."""
    memory = {"data": run.data.digest, "sentinels": run.sentinels.state_dict()}
    memory = from_main(run.world, memory)
    save_state(run.config.out, run.setup.parts, step, run.settings, memory, run.config.keep_states, run.world)
    if step:
        keep_checkpoint(run, run.config.out / CHECKPOINT, step)
    run.saved_at = time.monotonic()


@contextmanager
def sigterm_noted() -> Iterator[list[bool]]:
    """A flag that SIGTERM sets, so that the loop can save and leave between two steps."""
    flag = [False]
    before = signal.signal(signal.SIGTERM, lambda number, frame: flag.__setitem__(0, True))
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)
