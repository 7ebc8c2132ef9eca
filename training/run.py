"""The objects of a training run, and the actions of the training loop: log a line, evaluate, save, roll back, finish.

Sentinels are checks that detect a failing run (training/watch/sentinels.py). Every rank must call each action. Only
rank 0 writes files and asks the sentinels for decisions.
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

RANKME_ROWS = 1024  # enough class tokens to estimate an effective rank, which is then quick to compute
WHITENING_PHOTOS = 10_000  # enough images for the covariance of the widest model's 1,536 dimensions


class RunStopped(RuntimeError):
    """An error that ends a training run, usually because a check found a failure. The message states why."""


class Interrupted(RuntimeError):
    """An exception that ends the run because of SIGTERM. No work is lost, and the same command resumes the run."""


@dataclass
class Sigterm:
    """The SIGTERM handler of a run. It sets `came` to True and raises `Interrupted`.

    While `deferred` is True, the handler only sets `came`. The training loop then reads `came`, saves a state and
    raises `Interrupted` itself.
    """

    came: bool = False
    deferred: bool = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if not self.deferred:
            raise Interrupted("stopped by SIGTERM; no work is lost: run the same command again to resume")


@contextmanager
def sigterm_noted() -> Iterator[Sigterm]:
    """Install a `Sigterm` as the SIGTERM handler for the duration of the block, and yield it.

    Only the main thread can install a signal handler. In any other thread, the `Sigterm` is yielded but not installed.
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
    """How often a run logs, evaluates, draws an image sheet, keeps a checkpoint and saves its state.

    `log`, `evaluate`, `sheet` and `checkpoint` are numbers of steps, and 0 means never. `save_seconds` is the time
    between saved states.
    """

    log: int
    evaluate: int
    sheet: int
    checkpoint: int
    save_seconds: float


@dataclass
class Run:
    """The objects and settings that the training loop uses."""

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
    """Return whether `step` is a multiple of `every`. If `every` is 0, return False."""
    return every > 0 and step % every == 0


def is_save_due(run: Run) -> bool:
    """Return whether the last save was more than `run.every.save_seconds` ago, by this rank's clock."""
    return time.monotonic() - run.saved_at > run.every.save_seconds


def needs_the_host(run: Run, step: int, stop: Sigterm) -> bool:
    """Return whether the host has to write or decide something after step `step`. The result is the same on all ranks.

    Each rank has its own clock and receives its own signals, so the ranks tell each other after every step whether a
    save is due or SIGTERM has arrived. Waiting until the next log line could take too long, because torchrun kills the
    ranks 30 seconds after SIGTERM.
    """
    every = run.every
    if step == run.total or any(is_due(step, n) for n in (every.log, every.evaluate, every.sheet, every.checkpoint)):
        return True
    return agree(run.world, stop.came or is_save_due(run))


def watched(run: Run, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of `terms` that must be finite: the loss and, unless the run uses fp16, the gradient norms.

    With fp16, gradients may overflow while the loss scale adapts.
    """
    norms = () if "loss_scale" in run.setup.parts.buffers else ("grad_norm",)
    return {name: value for name, value in terms.items() if name == "loss" or name.startswith(norms)}


def find_not_finite(run: Run) -> Verdict | None:
    """Check whether the loss and the gradient norms of all steps since the last call were finite (see `watched`).

    If a value was not finite, rank 0 stores its first micro-batch of the first step with such a value for inspection.
    Gradients that are not finite have not changed the student (training/step.py).

    Returns:
        the verdict of the sentinels (the checks for a failing run), or None if all values were finite.
    """
    first = int(min_over_ranks(run.world, run.not_finite.step))
    if first == NEVER:
        return None
    noted = run.not_finite.read()
    figures = noted[1] if noted else {}  # empty if only another rank has a metric that is not finite
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
    """Write a line to metrics.jsonl, and check for collapse. Return a verdict, or None if no collapse is found."""
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
    """Compute the k-NN accuracy on the held-out images, and check whether it has fallen.

    Return the verdict of this check. Return None if the check has nothing to report, if k-NN is not possible, or if no
    evaluations during the run are configured.
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
    """Call `ask` on rank 0, and return the verdict on all ranks.

    Also copy the state of rank 0's sentinels (the checks for a failing run) to all ranks. The metrics differ between
    ranks, so only rank 0 decides.
    """
    verdict = ask() if run.world.is_main else None
    verdict, state = from_main(run.world, (verdict, run.sentinels.state_dict()))
    run.sentinels.load_state_dict(state)
    return verdict


def obey(run: Run, step: int, verdict: Verdict | None) -> Verdict | None:
    """Report a verdict of the sentinels (the checks for a failing run) to the user, if there is one.

    Return the verdict if its action is a rollback, and None otherwise.

    Raises:
        RunStopped: the action of the verdict is `stop`.
    """
    if verdict is None:
        return None
    run.monitor.say(step, {"warn": "warning"}.get(verdict.action, verdict.action), verdict.message)
    if verdict.action == "stop":
        raise RunStopped(verdict.message)
    return verdict if verdict.action == "rollback" else None


def roll_back(run: Run, verdict: Verdict) -> int:
    """Load the newest complete state from step `verdict.back_to` or earlier, and return the step of this state.

    Later states are removed. If the loaded state is later than step 0, the run's checkpoint is overwritten to match it.

    Raises:
        RunStopped: there is no such state.
    """
    wait_for_all(run.world)
    saved, _ = from_main(run.world, find_state(run.out, verdict.back_to) if run.world.is_main else (None, []))
    if saved is None:
        raise RunStopped(f"{verdict.message} No saved state of step {verdict.back_to} or before exists: the run stops.")
    load_state(saved, run.setup.parts)
    run.sentinels.forget_after(saved.memory["sentinels"], verdict.kind)
    if run.world.is_main:
        drop_states(run.out, saved.step)
        remember(saved, memory_of(run))  # store the current state of the sentinels
    if saved.step:
        save_checkpoint(run, run.out / CHECKPOINT, saved.step)
    run.monitor.rewind(saved.step)
    run.monitor.say(saved.step, "rollback", f"continuing after step {saved.step}")
    run.saved_at = time.monotonic()
    return saved.step


def is_best(run: Run, step: int) -> bool:
    """Return whether the state of `step` must be saved because its k-NN accuracy is the best of the run so far.

    The run can then roll back to this state if the accuracy falls. If a fall only causes a warning (`on_knn` is
    `warn`), the state is not needed, and the result is False.
    """
    return run.sentinels.limits.on_knn != "warn" and step == run.sentinels.state.best_knn_step


def save(run: Run, step: int) -> Saved | None:
    """Save the state after `step` steps and, except at step 0, the checkpoint.

    Return the saved state on rank 0, and None on other ranks.
    """
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
    """Return the values that a saved state contains in addition to tensors, as JSON types.

    They are the digests of the training images and of the teacher, and the state of the sentinels (the checks for a
    failing run).
    """
    return {"data": run.data.digest, "teacher": run.teacher_digest, "sentinels": run.sentinels.state_dict()}


def save_checkpoint(run: Run, path: Path, step: int) -> None:
    """Save the backbone of the student's moving average to the checkpoint `path`, with `step` in the metadata."""
    backbone = released_backbone(run.release.vit, run.world, run.setup.parts)
    if run.world.is_main:
        write_checkpoint(path, backbone, run.release.vit, {**run.release.facts, "steps": step})


def draw_sheet(run: Run, step: int) -> None:
    """Draw an image sheet, and write it to `sheets/step_N.png` for step N.

    The sheet shows a few training images, their crops, and what the student's moving average computes from them.
    """
    backbone = released_backbone(run.release.vit, run.world, run.setup.parts)
    if run.world.is_main:
        write_sheet(sheet_path(run, step), backbone, run.data, run.crops, run.release, step, run.total)


def sheet_path(run: Run, step: int) -> Path:
    return run.out / "sheets" / f"step_{step:08}.png"


def release(run: Run) -> Path:
    """Finish the run: compute the final k-NN accuracy, and write the last checkpoint, an image sheet and the report.

    If the setting `whiten` is not None, the backbone is whitened first. Return the path of the checkpoint.
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
        summary = f"k-NN on {len(data.labelled_held_out)} held-out images, {settings.eval_spec.crop} px: {knn}"
        run.monitor.console.print(
            f"{summary if knn else f'no k-NN: {data.why_no_classes}'}\nreport: {report}", markup=False
        )
    wait_for_all(run.world)
    return path
