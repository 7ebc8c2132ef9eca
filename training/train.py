"""The loop: photos in, checkpoint out.

Per step (facebookresearch/dinov2, `dinov2/train/ssl_meta_arch.py`): the teacher looks at two large crops of each photo
and gives targets; the student looks at the same two with patches masked, and at several small ones; its class tokens
must agree with the teacher's of the other crops (DINO), its masked patches with what the teacher sees there (iBOT), and
its embeddings must spread (KoLeo). The teacher then follows the student slowly.

All randomness of a step is drawn from (seed, step, sample): a stopped run goes on as if it had not stopped, and two
ranks see what one would. The host waits for the device only where a line is written.

    out/checkpoint.safetensors   what is released: the average's backbone; `dinov2 export` reads it
    out/states/                  what a stopped run goes on from; out/lock is held while a process trains here
    out/metrics.jsonl ...        training/monitor.py; report.html at the end
    out/skipped.txt              photos that could not be read
"""

import functools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from model.engine import available_cpus
from training.config import TrainConfig
from training.crops import Crops, crop_views, make_crops
from training.data import Data, check_apart, list_skipped, open_data
from training.distill import PrototypeTeacher, check_same_teacher, load_teacher, teacher_digest
from training.distributed import World, agree, from_all, from_main, join, mean_over_ranks, min_over_ranks, wait_for_all
from training.flops import describe_device, device_peak_flops, work_of_step
from training.loader import waiting_advice
from training.monitor import EVALUATIONS, METRICS, Monitor, cut_lines
from training.outcome import CHECKPOINT, finish, released_backbone, report_knn, write_checkpoint, write_sheet
from training.provenance import provenance
from training.sentinels import NEVER, FirstNotFinite, Limits, Sentinels, Verdict, rankme_share, save_replay
from training.setup import Setup, attention_kernel, compute_dtype, make_autocast, make_setup
from training.sinks import make_sinks
from training.state import (
    Saved,
    alone_in,
    check_same_settings,
    drop_states,
    find_state,
    load_state,
    remember,
    save_state,
    start_from,
    write_whole,
)
from training.step import Schedules, make_schedules, train_step

INTERRUPTED = 128 + signal.SIGTERM  # exit status of a run that SIGTERM ended, saved
RANKME_ROWS = 1024  # enough for an effective rank, and a short wait


class RunStopped(RuntimeError):
    """A sentinel ended the run; the message says what happened and what to change."""


class Interrupted(RuntimeError):
    """SIGTERM came; what was done is saved, and the same command goes on."""


@dataclass
class Sigterm:
    """What a run does when it is asked to leave: at once, or, while `deferred`, when the loop has saved."""

    came: bool = False
    deferred: bool = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if not self.deferred:
            raise Interrupted("stopped by SIGTERM; nothing was under way that is not saved: the same command goes on")


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
    teacher_digest: str | None
    sentinels: Sentinels
    monitor: Monitor
    not_finite: FirstNotFinite
    work: Callable[[float], float]  # floating-point operations of a step, when so much of the run is over
    saved_at: float  # time.monotonic() of the last save

    @property
    def settings(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")


def train(config: TrainConfig, console: Console | None = None) -> Path:
    """Run, or go on with, one training run.

    Returns:
        the checkpoint's path.

    Raises:
        ValueError: no usable photos, another process trains in `config.out`, or it holds a run with other settings or
            photos, or with states of which none is whole.
        OSError: the photos' place does not answer, or the run's folder cannot be written.
        RunStopped: a sentinel ended it.
        Interrupted: SIGTERM ended it.
    """
    console = console or Console()
    with (
        sigterm_noted() as stop,
        join(config.device) as world,
        run_folder(config, world),
        open_data(config, world, console) as data,
        attention_kernel(world.device, compute_dtype(make_autocast(config.precision, world.device))),
    ):
        run, saved, broken = begin(config, world, data, console)
        with run.monitor:
            start(run, saved, broken)
            stop.deferred = True
            loop(run, saved.step if saved else 0, stop)
            stop.deferred = False
            path, words = finish(config, world, data, run.setup.parts, run.facts, run.total)
            if world.is_main:
                console.print(words, markup=False)
            wait_for_all(world)
            return path


@contextmanager
def run_folder(config: TrainConfig, world: World) -> Iterator[None]:
    """The run's folder, made if it is missing, and this run's alone."""
    check_apart(config.data, config.out)
    config.out.mkdir(parents=True, exist_ok=True)
    with alone_in(config.out) if world.is_main else nullcontext():
        yield


def loop(run: Run, step: int, stop: Sigterm) -> None:
    """All steps after the first `step`."""
    while step < run.total:
        if run.sentinels.passes_over(step + 1):
            step += 1
            if step == run.total:
                save(run, step)
            continue
        terms, seen = one_step(run, step)
        run.not_finite.note(step + 1, {name: terms[name] for name in terms if is_watched(run.config, name)})
        step += 1
        run.monitor.advance(step, run.work((step - 1) / run.total))
        if look_up(run, step, stop):
            step = check(run, step, terms, seen, stop)


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
    if views[0][0].size != config.global_size and config.last_phase is not None:
        size = config.last_phase.micro_batch or size
    return [
        make_crops(config, p, a, step, at, views, world.device)
        for p, a, at in zip(*(torch.split(x, size) for x in (pixels, aspect, positions)), strict=True)
    ]


def begin(config: TrainConfig, world: World, data: Data, console: Console) -> tuple[Run, Saved | None, list[str]]:
    """The run as it is before its first step; the state to go on from, and what is to be said of damaged ones."""
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
    digest = teacher_digest(teacher) if teacher is not None else None
    saved, broken = from_main(world, start_from(config.out) if world.is_main else (None, []))
    first = saved.step if saved else 0
    settings = config.model_dump(mode="json")
    if saved:
        check_same_settings(saved, settings)
        data.check_same(saved.memory["data"])
        check_same_teacher(config, saved.memory["teacher"], digest)
    peak = (
        None
        if compute_dtype(setup.autocast) == torch.float32 and world.device.type == "cuda"
        else device_peak_flops(world.device, measure=config.measure_peak)
    )
    monitor = Monitor(
        config.out / METRICS,
        total,
        first,
        config.batch_size,
        console,
        active=world.is_main,
        device=world.device,
        sinks=make_sinks(config.out, first, config.wandb, settings, console.print) if world.is_main else [],
        peak_flops=None if peak is None else peak * world.size,
        advise=functools.partial(
            waiting_advice, loader=data.loader, side=config.cache_size, workers=config.workers or available_cpus()
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
        digest,
        Sentinels(limits),
        monitor,
        FirstNotFinite(world.device),
        functools.partial(work_of_step, config, teacher=teacher.backbone.config if teacher else None),
        time.monotonic(),
    )
    return run, saved, broken


def start(run: Run, saved: Saved | None, broken: list[str]) -> None:
    """What a run does before its first step, or to go on from a state."""
    config, world, parts = run.config, run.world, run.setup.parts
    first = saved.step if saved else 0
    for message in broken:
        run.monitor.say(first, "warning", message)
    if isinstance(parts.teacher, PrototypeTeacher):
        choose_prototypes(run, parts.teacher)
    if saved:
        load_state(saved, parts)
        run.sentinels.load_state_dict(saved.memory["sentinels"])
        if world.is_main:
            drop_states(config.out, first)  # damaged ones, in the way of those to come
    else:
        saved = save(run, 0)  # says at once whether the folder can hold a state, and is what a rollback may need
    if first == 0 and run.sentinels.state.best_knn is None:
        if world.is_main:
            cut_lines(config.out / EVALUATIONS, -1)
        guard_knn(run, 0)
        if world.is_main and saved:
            remember(saved, memory_of(run))
    if world.is_main:
        write_whole(config.out / "config.json", json.dumps(run.settings, indent=1))
        announce(run, first, run.monitor.console)


def choose_prototypes(run: Run, teacher: PrototypeTeacher) -> None:
    """From the run's first photos; the same ones in whatever micro-batches and on whatever ranks."""
    steps = ((step, run.data.loader.batch(step)) for step in range(run.total))
    teacher.choose((make_micros(run.config, run.world, b.pixels, b.aspect, n, run.total) for n, b in steps), run.world)


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


def look_up(run: Run, step: int, stop: Sigterm) -> bool:
    """Whether to wait for the device, write and decide after this step; the same on all ranks.

    Ranks have clocks and signals of their own, so they ask each other: torchrun gives them 30 seconds to leave.
    """
    config = run.config
    every = [config.log_every, every_steps(run, config.eval_every_epochs), config.sheet_every]
    every.append(every_steps(run, config.keep_checkpoints_every_epochs))
    if step == run.total or any(step % n == 0 for n in every if n):
        return True
    return agree(run.world, stop.came or save_is_due(run))


def every_steps(run: Run, epochs: float) -> int:
    """Epochs as steps; 0 is never."""
    return max(1, round(epochs * run.steps_per_epoch)) if epochs else 0


def save_is_due(run: Run) -> bool:
    return time.monotonic() - run.saved_at > 60 * run.config.save_every_minutes


def check(run: Run, step: int, terms: dict[str, Tensor], seen: Tensor, stop: Sigterm) -> int:
    """Write a line, ask the sentinels, save what is due. The step to go on after: an earlier one after a rollback.

    Raises:
        RunStopped, Interrupted.
    """
    config, world, monitor = run.config, run.world, run.monitor
    asked: list[Callable[[], Verdict | None]] = [lambda: check_finite(run)]
    if is_time(step, config.log_every) or step == run.total:
        asked.append(lambda: write_line(run, step, terms, seen))
    if step < run.total and is_time(step, every_steps(run, config.eval_every_epochs)):
        asked.append(lambda: guard_knn(run, step))
    for ask in asked:
        if (verdict := ask()) is None:
            continue
        monitor.say(step, {"warn": "warning"}.get(verdict.action, verdict.action), verdict.message)
        if verdict.action == "stop":
            raise RunStopped(verdict.message)
        if verdict.action == "rollback":
            return go_back(run, verdict)
    with monitor.paused():
        if is_time(step, every_steps(run, config.keep_checkpoints_every_epochs)):
            keep_checkpoint(run, config.out / "checkpoints" / f"step_{step:08}.safetensors", step)
        if is_time(step, config.sheet_every) and step < run.total:
            backbone = released_backbone(config, world, run.setup.parts)
            if world.is_main:
                write_sheet(config, run.data, backbone, step, run.total)
        stopping = agree(world, stop.came)
        best = config.on_knn == "rollback" and step == run.sentinels.state.best_knn_step  # to go back to just this
        if agree(world, save_is_due(run)) or best or stopping or step == run.total:
            save(run, step)
    if stopping:
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
    run.not_finite.clear()
    return decide(run, lambda: run.sentinels.check_finite(first, figures, path))


def decide(run: Run, ask: Callable[[], Verdict | None]) -> Verdict | None:
    """What the sentinels of rank 0 answer. The others learn what these remember: each rank's figures are its own."""
    verdict = ask() if run.world.is_main else None
    verdict, state = from_main(run.world, (verdict, run.sentinels.state_dict()))
    run.sentinels.load_state_dict(state)
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
    return decide(run, lambda: run.sentinels.check_line(step, figures))


def guard_knn(run: Run, step: int) -> Verdict | None:
    """k-NN on the held-out photos, if it is asked for during the run; what its sentinel says."""
    if not run.config.eval_every_epochs:
        return None
    with run.monitor.paused():
        backbone = released_backbone(run.config, run.world, run.setup.parts)

        def ask() -> Verdict | None:
            if not (knn := report_knn(run.config, run.data, backbone)):
                return None
            run.monitor.evaluated(step, {f"knn_{p}_{k}": value for p, by_k in knn.items() for k, value in by_k.items()})
            return run.sentinels.check_knn(step, knn["cls"][10])

        return decide(run, ask)


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
    run.sentinels.forget_after(saved.memory["sentinels"], verdict.kind)
    if run.world.is_main:
        drop_states(run.config.out, saved.step)
        remember(saved, memory_of(run))  # what the sentinels have learned
    if saved.step:
        keep_checkpoint(run, run.config.out / CHECKPOINT, saved.step)
    run.monitor.rewind(saved.step)
    run.monitor.say(saved.step, "rollback", f"goes on after step {saved.step}")
    run.saved_at = time.monotonic()
    return saved.step


def keep_checkpoint(run: Run, path: Path, step: int) -> None:
    """The average's backbone as a checkpoint. Every rank must call it."""
    backbone = released_backbone(run.config, run.world, run.setup.parts)
    if run.world.is_main:
        write_checkpoint(path, run.config, backbone, run.facts, step)


def memory_of(run: Run) -> dict[str, Any]:
    """What a state holds besides tensors, of JSON types."""
    return {"data": run.data.digest, "teacher": run.teacher_digest, "sentinels": run.sentinels.state_dict()}


def save(run: Run, step: int) -> Saved | None:
    """State and checkpoint. Every rank must call it; None on those that do not write."""
    config, needed = run.config, run.sentinels.may_go_back_to()
    skipped = from_all(run.world, run.data.unlisted())  # a run that goes on from here does not try their photos again
    if run.world.is_main:
        list_skipped(skipped, config.out, run.monitor.console)
    saved = save_state(
        config.out, run.setup.parts, step, run.settings, memory_of(run), config.keep_states, run.world, needed
    )
    if step:
        keep_checkpoint(run, config.out / CHECKPOINT, step)
    run.saved_at = time.monotonic()
    return saved


@contextmanager
def sigterm_noted() -> Iterator[Sigterm]:
    """Inside, SIGTERM is what `Sigterm` says. Only a process's main thread hears signals: in others nothing changes."""
    stop = Sigterm()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
