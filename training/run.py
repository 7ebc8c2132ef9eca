"""The objects of a training run, and the actions of the loop: log a line, evaluate, save, roll back, release.

Every rank must call each action. Rank 0 writes files and takes the sentinels' decisions.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from model.files import write_text
from training.data.crops import CropSettings, make_micros
from training.data.run_images import Data, list_skipped
from training.distributed import World, agree, from_all, from_main, mean_over_ranks, min_over_ranks, wait_for_all
from training.evaluate.features import compute_features
from training.outcome import CHECKPOINT, Release, released_backbone, report_knn, write_checkpoint, write_sheet
from training.pages.report import write_report
from training.state import Saved, drop_states, find_state, load_state, remember, save_state
from training.step import Schedules, Setup, StepSettings
from training.watch.monitor import Monitor
from training.watch.sentinels import NEVER, FirstNotFinite, Sentinels, Verdict, rankme_share, save_replay
from training.whiten import whiten

RANKME_ROWS = 1024  # enough for an effective rank, and quick to compute
WHITENING_PHOTOS = 10_000  # enough for the covariance of the widest model's 1,536 dimensions


class RunStopped(RuntimeError):
    """A sentinel ended the run; the message gives the reason and what to change."""


class Interrupted(RuntimeError):
    """SIGTERM ended the run. Its state is saved, and the same command resumes it."""


@dataclass
class Sigterm:
    """The SIGTERM handler of a run. It raises `Interrupted` at once, except while `deferred` is True.

    Then it only sets `came`, and the training loop saves a state and raises.
    """

    came: bool = False
    deferred: bool = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if not self.deferred:
            raise Interrupted("stopped by SIGTERM; no work is lost: run the same command again to resume")


@contextmanager
def sigterm_noted() -> Iterator[Sigterm]:
    """Handle SIGTERM with a `Sigterm` inside the block.

    Only the main thread can set a signal handler; in other threads the handling of SIGTERM does not change.
    """
    stop = Sigterm()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Intervals:
    """Steps between log lines, evaluations, sheets and kept checkpoints (0: never), and seconds between states."""

    log: int
    evaluate: int
    sheet: int
    checkpoint: int
    save_seconds: float


@dataclass
class Run:
    """Everything that the training loop uses."""

    out: Path
    settings: dict[str, Any]  # the configuration, as JSON types
    world: World
    data: Data
    crops: CropSettings
    setup: Setup
    step_settings: StepSettings
    schedules: Schedules
    total: int
    steps_per_epoch: int
    every: Intervals
    keep_states: int
    sentinels: Sentinels
    not_finite: FirstNotFinite
    monitor: Monitor
    work: Callable[[float], float]  # floating-point operations of a step, by the share of the run that is done
    release: Release
    teacher_digest: str | None
    saved_at: float  # time.monotonic() of the last save


def is_due(step: int, every: int) -> bool:
    """Return whether `step` is a multiple of `every`. The answer is always False if `every` is 0."""
    return every > 0 and step % every == 0


def is_save_due(run: Run) -> bool:
    """Return whether the last save was more than `save_seconds` ago, by this rank's clock."""
    return time.monotonic() - run.saved_at > run.every.save_seconds


def needs_the_host(run: Run, step: int, stop: Sigterm) -> bool:
    """Return whether the host has something to write or decide after this step. The answer is the same on all ranks.

    Each rank has its own clock and receives its own signals, so the ranks have to agree. They do so after every step,
    because torchrun kills them 30 seconds after SIGTERM.
    """
    every = run.every
    if step == run.total or any(is_due(step, n) for n in (every.log, every.evaluate, every.sheet, every.checkpoint)):
        return True
    return agree(run.world, stop.came or is_save_due(run))


def watched(run: Run, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those of the figures that must be finite: the loss and, except with fp16, the gradient norms.

    With fp16, gradients may overflow while the loss scale adapts.
    """
    norms = () if "loss_scale" in run.setup.parts.buffers else ("grad_norm",)
    return {name: value for name, value in terms.items() if name == "loss" or name.startswith(norms)}


def find_not_finite(run: Run) -> Verdict | None:
    """Check whether a figure was not finite in a step since the last call. If so, store the first such step's batch.

    Return the sentinels' verdict, or None if all figures were finite. A step with gradients that are not finite has not
    changed the student (training/step.py).
    """
    first = int(min_over_ranks(run.world, run.not_finite.step))
    if first == NEVER:
        return None
    noted = run.not_finite.read()
    figures = noted[1] if noted else {}  # empty if it happened on another rank
    batch = run.data.loader.batch(first - 1)
    path = None
    if run.world.is_main:
        [crops, *_] = make_micros(run.crops, run.world, batch.pixels, batch.aspect, first - 1, run.total)
        tensors = {"globals_": crops.globals_, "masks": crops.masks}
        tensors |= {} if crops.locals_ is None else {"locals_": crops.locals_}
        facts = {"indices": batch.indices, "seed": run.crops.seed}
        path = save_replay(run.out / "replays", first, batch.names, tensors, figures, facts=facts)
    run.not_finite.clear()
    return decide(run, lambda: run.sentinels.check_finite(first, figures, path))


def log_line(run: Run, step: int, terms: dict[str, Tensor], cls_tokens: Tensor) -> Verdict | None:
    """Write a line of metrics.jsonl and check it for collapse. Return the verdict, or None if all is well."""
    means = mean_over_ranks(run.world, torch.stack([value.float() for value in terms.values()]))
    figures: dict[str, Any] = dict(zip(terms, means.tolist(), strict=True))
    figures["dino_over_ln_k"] = figures["dino"] / math.log(run.sentinels.limits.n_prototypes)
    figures["rankme_share"] = rankme_share(cls_tokens[:RANKME_ROWS])
    figures |= {
        "epoch": step / run.steps_per_epoch,
        "lr": float(run.schedules.lr["head"][step - 1]) * run.sentinels.lr_factor,
        "weight_decay": float(run.schedules.weight_decay[step - 1]),
        "momentum": float(run.schedules.momentum[step - 1]),
        "teacher_temp": float(run.schedules.teacher_temp[step - 1]),
    }
    run.monitor.write(step, figures)
    return decide(run, lambda: run.sentinels.check_line(step, figures))


def evaluate(run: Run, step: int) -> Verdict | None:
    """Compute k-NN on the held-out images, and return the verdict on it, or None.

    Nothing is computed if the settings have no evaluation during the run.
    """
    if not run.every.evaluate:
        return None
    with run.monitor.paused():
        backbone = released_backbone(run.release.vit, run.world, run.setup.parts)

        def ask() -> Verdict | None:
            if not (knn := report_knn(run.release.eval_spec, run.data, backbone)):
                return None
            run.monitor.evaluated(step, {f"knn_{p}_{k}": value for p, by_k in knn.items() for k, value in by_k.items()})
            return run.sentinels.check_knn(step, knn["cls"][10])

        return decide(run, ask)


def decide(run: Run, ask: Callable[[], Verdict | None]) -> Verdict | None:
    """Return, on all ranks, the verdict that `ask` gives on rank 0, and copy the state of rank 0's sentinels to all.

    Ranks have different figures, so only rank 0 decides.
    """
    verdict = ask() if run.world.is_main else None
    verdict, state = from_main(run.world, (verdict, run.sentinels.state_dict()))
    run.sentinels.load_state_dict(state)
    return verdict


def obey(run: Run, step: int, verdict: Verdict | None) -> Verdict | None:
    """Report a verdict, and stop the run if it says so. Return the verdict if it requires a rollback, else None.

    Raises:
        RunStopped: the verdict ends the run.
    """
    if verdict is None:
        return None
    run.monitor.say(step, {"warn": "warning"}.get(verdict.action, verdict.action), verdict.message)
    if verdict.action == "stop":
        raise RunStopped(verdict.message)
    return verdict if verdict.action == "rollback" else None


def roll_back(run: Run, verdict: Verdict) -> int:
    """Load the newest state of step `verdict.back_to` or before, and return its step.

    Later states are removed, and the checkpoint is replaced by that of the loaded state.

    Raises:
        RunStopped: there is no such state.
    """
    wait_for_all(run.world)
    saved, _ = from_main(run.world, find_state(run.out, verdict.back_to) if run.world.is_main else (None, []))
    if saved is None:
        raise RunStopped(f"{verdict.message} No state of step {verdict.back_to} or before is left: the run stops.")
    load_state(saved, run.setup.parts)
    run.sentinels.forget_after(saved.memory["sentinels"], verdict.kind)
    if run.world.is_main:
        drop_states(run.out, saved.step)
        remember(saved, memory_of(run))  # store what the sentinels have learned
    if saved.step:
        save_checkpoint(run, run.out / CHECKPOINT, saved.step)
    run.monitor.rewind(saved.step)
    run.monitor.say(saved.step, "rollback", f"continuing after step {saved.step}")
    run.saved_at = time.monotonic()
    return saved.step


def is_best(run: Run, step: int) -> bool:
    """Return whether `step` has the run's best k-NN so far and must be saved, because the run may return to it.

    It is False if a fall of k-NN only causes a warning.
    """
    return run.sentinels.limits.on_knn != "warn" and step == run.sentinels.state.best_knn_step


def save(run: Run, step: int) -> Saved | None:
    """Save the state and the checkpoint after `step` steps. Return the state on rank 0, and None on other ranks."""
    skipped = from_all(run.world, run.data.unlisted())  # a resumed run does not try these images again
    if run.world.is_main:
        list_skipped(skipped, run.out, run.monitor.console)
    saved = save_state(
        run.out,
        run.setup.parts,
        step,
        run.settings,
        memory_of(run),
        run.keep_states,
        run.world,
        run.sentinels.may_go_back_to(),
    )
    if step:
        save_checkpoint(run, run.out / CHECKPOINT, step)
    run.saved_at = time.monotonic()
    return saved


def memory_of(run: Run) -> dict[str, Any]:
    """Return what a state stores besides tensors: digests of data and teacher, the sentinels' state (JSON types)."""
    return {"data": run.data.digest, "teacher": run.teacher_digest, "sentinels": run.sentinels.state_dict()}


def save_checkpoint(run: Run, path: Path, step: int) -> None:
    """Save the backbone of the student's moving average as a checkpoint."""
    backbone = released_backbone(run.release.vit, run.world, run.setup.parts)
    if run.world.is_main:
        write_checkpoint(path, backbone, run.release.vit, {**run.release.facts, "steps": step})


def draw_sheet(run: Run, step: int) -> None:
    """Write the image sheet `sheets/step_N.png`, made with the student's moving average."""
    backbone = released_backbone(run.release.vit, run.world, run.setup.parts)
    if run.world.is_main:
        write_sheet(sheet_path(run, step), backbone, run.data, run.crops, run.release, step, run.total)


def sheet_path(run: Run, step: int) -> Path:
    return run.out / "sheets" / f"step_{step:08}.png"


def release(run: Run) -> Path:
    """Finish the run: whiten the backbone if `settings.whiten` is set, compute k-NN, and write the last checkpoint, a
    sheet and the report.

    Return the path of the checkpoint.
    """
    path, data, settings = run.out / CHECKPOINT, run.data, run.release
    backbone = released_backbone(settings.vit, run.world, run.setup.parts)
    if run.world.is_main:
        if settings.whiten is not None:
            sample = data.train_sample[:: math.ceil(len(data.train_sample) / WHITENING_PHOTOS)]
            whiten(backbone, compute_features(backbone, sample, settings.eval_spec).pooled("cls"), settings.whiten)
        knn = report_knn(settings.eval_spec, data, backbone)
        write_text(run.out / "knn.json", json.dumps(knn, indent=1))
        results = {"knn": knn, "whitened": settings.whiten is not None, "steps": run.total}
        write_checkpoint(path, backbone, settings.vit, {**settings.facts, **results})
        write_sheet(sheet_path(run, run.total), backbone, data, run.crops, settings, run.total, run.total)
        report = write_report(run.out)
        summary = f"k-NN on {len(data.held_out)} held-out images, {settings.eval_spec.crop} px: {knn}"
        run.monitor.console.print(
            f"{summary if knn else 'no k-NN: only one class, or no held-out images'}\nreport: {report}", markup=False
        )
    wait_for_all(run.world)
    return path
