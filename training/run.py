"""The objects of a training run, and the actions of the training loop: log a line, evaluate, save and roll back.

Sentinels are checks that detect a failing run (training/watch/sentinels.py). Every rank must call each action. Only
rank 0 writes files and asks the sentinels for decisions.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.data.crops import CropSettings, make_micros
from training.data.run_images import Data, list_skipped
from training.distributed import World, agree, from_all, from_main, mean_over_ranks, min_over_ranks, wait_for_all
from training.ending import RunStopped, Signals
from training.held_out import HeldOutImages, held_out_loss
from training.measuring import Evaluation, evaluate_backbone, whiten_backbone
from training.outcome import (
    BEST,
    CHECKPOINT,
    Release,
    released_backbone,
    steps_of,
    write_checkpoint,
    write_sheet,
)
from training.pages.report import write_report
from training.spread import RANKME_ROWS, token_spread
from training.state import KEPT_BEST, Saved, drop_states, find_state, load_state, remember, save_state
from training.step import Schedules, Setup, StepSettings
from training.watch.measure import Measure
from training.watch.monitor import Monitor
from training.watch.sentinels import NEVER, FirstNotFinite, Sentinels, Verdict, rankme_share, save_replay


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
    measure: Measure | None  # None: nothing can be measured
    measured: str  # says what is measured
    held_out: HeldOutImages | None  # for the loss on held-out images, if the run measures without classes
    evaluations: dict[int, Evaluation]  # by the number of steps done, of this process
    teacher_digest: str | None
    chosen: Mapping[str, Any]  # the settings that the plan of the run has chosen, by name
    saved_at: float  # time.monotonic() of the last save


def is_due(step: int, every: int) -> bool:
    """Return whether `step` is a multiple of `every`. If `every` is 0, return False."""
    return every > 0 and step % every == 0


def is_save_due(run: Run) -> bool:
    """Return whether the last save was more than `run.every.save_seconds` ago, by this rank's clock."""
    return time.monotonic() - run.saved_at > run.every.save_seconds


def needs_the_host(run: Run, step: int, signals: Signals) -> bool:
    """Return whether the host has to write or decide something after step `step`. The result is the same on all ranks.

    Each rank has its own clock and receives its own signals, so the ranks tell each other after every step whether a
    save is due or a signal has arrived. Waiting until the next log line could take too long, because torchrun kills the
    ranks 30 seconds after SIGTERM.
    """
    every = run.every
    if step == run.total or any(is_due(step, n) for n in (every.log, every.evaluate, every.sheet, every.checkpoint)):
        return True
    return agree(run.world, signals.came is not None or is_save_due(run))


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
    terms = {**terms, "token_spread": token_spread(cls_tokens)}
    means = mean_over_ranks(run.world, torch.stack([value.float() for value in terms.values()]))
    figures: dict[str, Any] = dict(zip(terms, means.tolist(), strict=True))
    figures["dino_over_ln_k"] = figures["dino"] / math.log(run.sentinels.limits.n_prototypes)
    figures["rankme_share"] = rankme_share(cls_tokens[:RANKME_ROWS])
    figures |= {
        "epoch": step / run.steps_per_epoch,
        "lr": float(run.schedules.lr["head"][step - 1]) * run.sentinels.lr_factor,
        "lr_backbone": float(run.schedules.lr["backbone"][step - 1]) * run.sentinels.lr_factor,
        "weight_decay": float(run.schedules.weight_decay[step - 1]),
        "momentum": float(run.schedules.momentum[step - 1]),
        "teacher_temp": float(run.schedules.teacher_temp[step - 1]),
    }
    run.monitor.write(step, figures)
    return decide(run, lambda: run.sentinels.check_line(step, figures))


def evaluate(run: Run, step: int) -> Verdict | None:
    """Evaluate the features on the held-out images, and check whether the measure of the run has fallen.

    A run that whitens the backbone that it releases evaluates whitened copies. Their RankMe and measure can be compared
    with those of a start that was whitened before.

    Return the verdict of this check, or None if the check has nothing to report or the run has no measure.
    """
    measure = run.measure
    if measure is None:
        return None
    with run.monitor.paused():
        loss = loss_on_held_out(run)
        backbone = released_backbone(run.release.vit, run.world, run.setup.parts)

        def ask() -> Verdict | None:
            whiten_backbone(backbone, run.data, run.release.eval_spec, run.release.whiten)
            found = evaluate_backbone(backbone, run.data, run.release.eval_spec, measure)
            run.evaluations[step] = found
            if found.value is None:
                return None
            run.monitor.evaluated(step, found.by_name() | loss)
            return run.sentinels.check_measure(
                step, measure, found.value, found.n_images, found.rankme_share, found.retrieval
            )

        return decide(run, ask)


def loss_on_held_out(run: Run) -> dict[str, float]:
    """Compute DINO's loss on the held-out images, and return it by name, or nothing if the run does not compute it."""
    if run.held_out is None:
        return {}
    temp = float(run.schedules.teacher_temp[-1])
    return {"held_out_loss": held_out_loss(run.step_settings, run.setup, run.crops, run.held_out, temp)}


def update_report(run: Run) -> None:
    """Write the report of the run, so that it can be read during the run. A failure never stops the run."""
    if run.world.is_main:
        run.monitor.guarded("report.html", lambda: write_report(run.out))


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
    if from_main(run.world, run.world.is_main and (steps_of(run.out / KEPT_BEST) or 0) > saved.step):
        run.sentinels.state.best = None  # its file has been overwritten by that of a step that is undone
        evaluate(run, saved.step)
        keep_best(run, saved.step)
        if run.world.is_main:
            remember(saved, memory_of(run))
    run.monitor.say(saved.step, "rollback", f"continuing after step {saved.step}")
    run.saved_at = time.monotonic()
    return saved.step


def is_best(run: Run, step: int) -> bool:
    """Return whether the measure after `step` steps is the best of the run so far."""
    state = run.sentinels.state
    return run.measure is not None and state.best is not None and step == state.best_step


def keep_best(run: Run, step: int) -> None:
    """Keep the backbone if its measure is the best of the run so far.

    It is written to `checkpoint.best.safetensors`, which is whitened at the end of the run if the run asks for it, and
    to `states/`, where it stays as it is. The state of `step` must have been saved before, so that the files never
    belong to a step that a killed run repeats.
    """
    if is_best(run, step) and from_main(run.world, run.world.is_main and steps_of(run.out / KEPT_BEST) != step):
        facts = {"measure": {run.sentinels.state.measure: run.sentinels.state.best}}
        for name in (BEST, KEPT_BEST):
            save_checkpoint(run, run.out / name, step, facts)


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
    keep_best(run, step)
    run.saved_at = time.monotonic()
    return saved


def memory_of(run: Run) -> dict[str, Any]:
    """Return the values that a saved state contains in addition to tensors, as JSON types.

    They are the digests of the training images and of the teacher, the settings that the plan has chosen, and the state
    of the sentinels (the checks for a failing run).
    """
    digests = {"data": run.data.digest, "teacher": run.teacher_digest}
    return {**digests, "chosen": dict(run.chosen), "sentinels": run.sentinels.state_dict()}


def save_checkpoint(run: Run, path: Path, step: int, facts: Mapping[str, Any] | None = None) -> None:
    """Save the backbone of the student's moving average to the checkpoint `path`.

    The metadata contains `step` and the entries of `facts`.
    """
    backbone = released_backbone(run.release.vit, run.world, run.setup.parts)
    if run.world.is_main:
        write_checkpoint(path, backbone, run.release.vit, {**run.release.facts, "steps": step, **(facts or {})})


def draw_sheet(run: Run, step: int) -> None:
    """Draw an image sheet, and write it to `sheets/step_N.png` for step N.

    The sheet shows a few training images, their crops, and what the student's moving average computes from them.
    """
    backbone = released_backbone(run.release.vit, run.world, run.setup.parts)
    if run.world.is_main:
        write_sheet(sheet_path(run, step), backbone, run.data, run.crops, run.release, step, run.total)


def sheet_path(run: Run, step: int) -> Path:
    return run.out / "sheets" / f"step_{step:08}.png"
