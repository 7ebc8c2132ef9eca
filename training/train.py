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

import copy
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from model.checkpoint import save_checkpoint
from model.vit import DinoVisionTransformer
from training.config import TrainConfig
from training.crops import Crops, crop_views, make_crops
from training.data import Data, open_data
from training.distill import PrototypeTeacher, load_teacher
from training.distributed import World, agree, from_main, join, mean_over_ranks, min_over_ranks, wait_for_all, whole
from training.evaluate.knn import Pooling, evaluate_knn, extract_features
from training.flops import device_peak_flops, step_work
from training.monitor import Monitor
from training.optimizer import Part
from training.provenance import provenance
from training.report import write_report
from training.sentinels import NEVER, FirstNotFinite, Limits, Sentinels, Verdict, rankme_share, save_replay
from training.setup import Setup, attention_kernel, make_setup
from training.sheets import write_sheet
from training.sinks import make_sinks
from training.state import Saved, check_same_settings, drop_states, find_state, load_state, save_state
from training.step import Schedules, make_schedules, train_step
from training.whiten import whiten

WHITENING_PHOTOS = 10_000  # enough for the covariance of the widest model's 1,536 dimensions
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
        attention_kernel(world.device),
    ):
        run, step = begin(config, world, data, console)
        with run.monitor:
            while step < run.total:
                if not run.sentinels.passes_over(step + 1):
                    terms, seen = one_step(run, step)
                    # fp16 finds its loss scale by gradients that overflow
                    run.not_finite.note(step + 1, {k: v for k, v in terms.items() if k == "loss" or watched(config, k)})
                step += 1
                run.monitor.advance(step, run.facts["flops_per_step"])
                if look_up(run, step, stop):
                    step = check(run, step, terms, seen, stop)
            return finish(run)


def watched(config: TrainConfig, name: str) -> bool:
    """Whether a figure must be finite in every step."""
    return name.startswith("grad_norm") and config.precision != "fp16"


def one_step(run: Run, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Photos, crops, update."""
    with run.monitor.waiting():
        batch = run.data.loader.batch(step)
    micros = make_micros(run.config, run.world, batch.pixels, batch.aspect, step, run.total)
    measure = is_time(step + 1, run.config.log_every) or step + 1 == run.total
    return train_step(run.config, run.setup, run.schedules, micros, step, run.sentinels.lr_factor, measure)


def make_micros(
    config: TrainConfig, world: World, pixels: torch.Tensor, aspect: torch.Tensor, step: int, total: int
) -> list[Crops]:
    """This rank's photos of a step as crops, cut into micro-batches."""
    views = crop_views(config, step / total)
    mine = range(world.rank * len(pixels), (world.rank + 1) * len(pixels))
    positions = torch.arange(mine.start, mine.stop)
    size = config.micro_batch or len(pixels)
    return [
        make_crops(config, p, a, step, at, views, world.device)
        for p, a, at in zip(pixels.split(size), aspect.split(size), positions.split(size), strict=True)
    ]


def begin(config: TrainConfig, world: World, data: Data, console: Console) -> tuple[Run, int]:
    """Everything before the first step, and the number of steps done before."""
    steps_per_epoch = len(data.loader) // config.batch_size
    total = max(1, round(config.epochs * steps_per_epoch))
    teacher = load_teacher(config).to(world.device) if config.teacher else None
    setup = make_setup(config, world, teacher)
    facts = provenance(config, data.digest, len(data.loader)) | {"flops_per_step": step_work(config)}
    limits = Limits(
        total,
        config.n_prototypes,
        on_collapse=config.on_collapse,
        on_not_finite=config.on_not_finite,
        on_knn=config.on_knn,
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
    monitor = Monitor(
        config.out / "metrics.jsonl",
        total,
        first,
        config.batch_size,
        console,
        active=world.is_main,
        device=world.device,
        sinks=make_sinks(config.out, first, config.wandb, settings) if world.is_main else [],
        peak_flops=(device_peak_flops(world.device) or 0) * world.size or None,
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


def check(run: Run, step: int, terms: dict[str, torch.Tensor], seen: torch.Tensor, stop: list[bool]) -> int:
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
            write_checkpoint(run, released_backbone(run), step, config.out / "checkpoints" / f"step_{step:08}.safetensors")
        if is_time(step, config.sheet_every) and step < run.total:
            picture(run, step)
        stopping = agree(world, stop[0])
        if agree(world, save_is_due(run)) or stopping or step == run.total:
            save(run, step)
    if stopping and step < run.total:
        raise Interrupted(f"stopped by SIGTERM after step {step} of {run.total}: saved; the same command goes on")
    return step


def is_time(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def check_finite(run: Run) -> Verdict | None:
    """What was not finite since the last look; its batch is kept. The weights have not taken it in (training/step.py)."""
    first = int(min_over_ranks(run.world, run.not_finite.step))
    if first == NEVER:
        return None
    found = run.not_finite.read()
    figures = found[1] if found else {}  # of another rank
    batch = run.data.loader.batch(first - 1)
    path = None
    if run.world.is_main:
        [crops, *_] = make_micros(run.config, run.world, batch.pixels, batch.aspect, first - 1, run.total)
        tensors = {"globals": crops.globals_, "masks": crops.masks}
        tensors |= {} if crops.locals_ is None else {"locals": crops.locals_}
        facts = {"indices": batch.indices, "seed": run.config.seed}
        path = save_replay(run.config.out / "replay", first, batch.names, tensors, figures, facts=facts)
    verdict = from_main(run.world, run.sentinels.check_finite(first, figures, path))
    run.not_finite.clear()
    return verdict


def write_line(run: Run, step: int, terms: dict[str, torch.Tensor], seen: torch.Tensor) -> Verdict | None:
    """A line of metrics.jsonl; what the collapse sentinel says of it."""
    config = run.config
    means = mean_over_ranks(run.world, torch.stack([value.float() for value in terms.values()]))
    figures: dict[str, Any] = dict(zip(terms, means.tolist(), strict=True))
    figures["dino_over_ln_k"] = figures["dino"] / math.log(config.n_prototypes)
    figures["rankme_share"] = rankme_share(seen[:RANKME_ROWS])
    parts: tuple[Part, ...] = ("head", "backbone")
    figures |= {
        "epoch": step / run.steps_per_epoch,
        **{("lr" if p == "head" else f"lr_{p}"): float(run.schedules.lr[p][step - 1]) for p in parts},
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
    backbone = released_backbone(run)
    verdict = None
    with run.monitor.paused():
        if run.world.is_main and (knn := report_knn(run, backbone)):
            run.monitor.evaluated(step, {f"knn_{k}": value for k, value in knn["cls"].items()})
            verdict = run.sentinels.check_knn(step, knn["cls"][10])
        verdict = from_main(run.world, verdict)
    return verdict


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


def save(run: Run, step: int) -> None:
    """State and checkpoint. Every rank must call it."""
    memory = {"data": run.data.digest, "sentinels": run.sentinels.state_dict()}
    memory = from_main(run.world, memory)
    save_state(run.config.out, run.setup.parts, step, run.settings, memory, run.config.keep_states, run.world)
    if step:
        write_checkpoint(run, released_backbone(run), step, run.config.out / "checkpoint.safetensors")
    run.saved_at = time.monotonic()


def released_backbone(run: Run) -> DinoVisionTransformer:
    """The average's backbone as a plain network on this device, whatever the ranks keep of it. All ranks must call it."""
    ema = run.setup.parts.ema.backbone
    with torch.device("meta"):
        backbone = DinoVisionTransformer(run.config.vit_config)
    backbone.load_state_dict({key: whole(value).clone() for key, value in ema.state_dict().items()}, assign=True)
    return backbone.eval().requires_grad_(False)


def report_knn(run: Run, backbone: DinoVisionTransformer) -> dict[Pooling, dict[int, float]]:
    """k-NN of the backbone on the held-out photos; empty if there are none or only one class."""
    return evaluate_knn(backbone, run.data.known, run.data.held_out, run.config.eval_spec) if run.data.has_classes else {}


def picture(run: Run, step: int) -> None:
    """A picture sheet of some held-out photos, or of training photos."""
    backbone = released_backbone(run)
    if run.world.is_main:
        write_sheet(run.config, backbone, run.data.loader, step, run.total, run.config.out / "sheets")


def write_checkpoint(run: Run, backbone: DinoVisionTransformer, step: int, path: Path, **facts: Any) -> None:
    """A backbone in the format that `dinov2 export` reads."""
    if run.world.is_main:
        path.parent.mkdir(exist_ok=True)
        save_checkpoint(path, backbone.state_dict(), run.config.vit_config, {**run.facts, "steps": step, **facts})


def finish(run: Run) -> Path:
    """Whitening, k-NN, the final checkpoint, a picture and the report."""
    config, out = run.config, run.config.out
    path = out / "checkpoint.safetensors"
    backbone = released_backbone(run)
    if run.world.is_main:
        if config.whiten is not None:
            backbone = copy.deepcopy(backbone)
            sample = run.data.known[:: math.ceil(len(run.data.known) / WHITENING_PHOTOS)]
            whiten(backbone, extract_features(backbone, sample, config.eval_spec)["cls"], config.whiten)
        knn = report_knn(run, backbone)
        (out / "knn.json").write_text(json.dumps(knn, indent=1))
        write_checkpoint(run, backbone, run.total, path, knn=knn)
        write_sheet(config, backbone, run.data.loader, run.total, run.total, out / "sheets")
        report = write_report(out)
        run.monitor.console.print(
            f"k-NN on {len(run.data.held_out)} held-out photos, {config.eval_spec.crop} px: {knn}\nreport: {report}",
            markup=False,
        )
    wait_for_all(run.world)
    return path


@contextmanager
def sigterm_noted() -> Iterator[list[bool]]:
    """A flag that SIGTERM sets, so that the loop can save and leave between two steps."""
    flag = [False]
    before = signal.signal(signal.SIGTERM, lambda number, frame: flag.__setitem__(0, True))
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)
