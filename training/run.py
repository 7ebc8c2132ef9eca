"""A run between its steps: lines and pictures written, sentinels asked, states saved, an earlier one gone back to."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from training.config import TrainConfig
from training.data.crops import make_micros
from training.data.run_images import Data, list_skipped
from training.distributed import World, agree, from_all, from_main, mean_over_ranks, min_over_ranks, wait_for_all
from training.outcome import CHECKPOINT, released_backbone, report_knn, write_checkpoint, write_sheet
from training.setup import Setup
from training.state import Saved, drop_states, find_state, load_state, remember, save_state
from training.step import Schedules
from training.watch.monitor import Monitor
from training.watch.sentinels import NEVER, FirstNotFinite, Sentinels, Verdict, rankme_share, save_replay

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


def save_is_due(run: Run) -> bool:
    return time.monotonic() - run.saved_at > 60 * run.config.save_every_minutes


def every_steps(run: Run, epochs: float) -> int:
    """Epochs as steps; 0 is never."""
    return max(1, round(epochs * run.steps_per_epoch)) if epochs else 0


def is_time(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


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
        best = config.on_knn != "warn" and step == run.sentinels.state.best_knn_step  # to go back to, or to stay
        if agree(world, save_is_due(run)) or best or stopping or step == run.total:
            save(run, step)
    if stopping:
        raise Interrupted(f"stopped by SIGTERM after step {step} of {run.total}: saved; the same command goes on")
    return step


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
