"""The loop: photos in, checkpoint out.

Per step (facebookresearch/dinov2, `dinov2/train/ssl_meta_arch.py`): the teacher looks at two large crops of each photo
and gives targets; the student looks at the same two with patches masked, and at several small ones; its class tokens
must agree with the teacher's of the other crops (DINO), its masked patches with what the teacher sees there (iBOT), and
its embeddings must spread (KoLeo). The teacher then follows the student slowly.

All randomness of a step is drawn from (seed, step, sample): a stopped run goes on as if it had not stopped, and two
ranks see what one would. The host waits for the device only where a line is written.

    out/checkpoint.safetensors   what is released: the average's backbone; `dinov2 export` reads it
    out/states/                  what a stopped run goes on from; out/lock is held while a process trains here
    out/metrics.jsonl ...        training/watch/monitor.py; report.html at the end
    out/skipped.txt              photos that could not be read
"""

import functools
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from model.cpus import available_cpus
from model.files import write_text
from training.config import TrainConfig
from training.data.crops import make_micros
from training.data.loader import waiting_advice
from training.data.run_images import Data, check_apart, open_data
from training.distill import PrototypeTeacher, check_same_teacher, load_teacher, teacher_digest
from training.distributed import World, from_main, join, wait_for_all
from training.outcome import finish
from training.provenance import provenance
from training.run import Run, Sigterm, check, guard_knn, is_time, look_up, memory_of, save
from training.setup import attention_kernel, compute_dtype, make_autocast, make_setup
from training.state import (
    Saved,
    alone_in,
    check_same_settings,
    drop_states,
    load_state,
    remember,
    start_from,
)
from training.step import make_schedules, train_step
from training.watch.flops import describe_device, device_peak_flops, work_of_step
from training.watch.monitor import EVALUATIONS, METRICS, Monitor, cut_lines
from training.watch.sentinels import FirstNotFinite, Limits, Sentinels
from training.watch.sinks import make_sinks

INTERRUPTED = 128 + signal.SIGTERM  # exit status of a run that SIGTERM ended, saved


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
        write_text(config.out / "config.json", json.dumps(run.settings, indent=1))
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
