"""Run the training loop, which turns images into a checkpoint.

Each step follows facebookresearch/dinov2, `dinov2/train/ssl_meta_arch.py`. The teacher sees two large crops of each
image and gives targets. The student sees the same two crops with some patches masked, and several small crops. Three
losses train the student. DINO compares the student's class token for each crop with the teacher's class tokens for the
other crops. iBOT compares the student's tokens for masked patches with the teacher's tokens for the same patches. KoLeo
pushes the class tokens in a batch apart. The teacher is then updated as a moving average of the student.

All random choices of a step depend only on (seed, step, sample), so a resumed run continues as if it had not stopped,
and two ranks see the same crops as a single rank. The host waits for the device only to log, evaluate or save.

    out/checkpoint.safetensors        the backbone of the student's moving average after the last step
    out/checkpoint.best.safetensors   the same after the step with the best measure; this checkpoint is released
    out/states/                       states to resume from; out/lock is locked while a process trains here
    out/metrics.jsonl                 metrics of the run; training/watch/monitor.py lists the other log files
    out/report.html                   the report, written at each evaluation and at the end
    out/stopped.json                  why a check stopped the run
    out/skipped.txt                   images that could not be read
"""

import json
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from model.files import write_text
from training.config import TrainConfig
from training.data.crops import make_micros
from training.data.listing import check_apart, list_images
from training.data.progress import tell
from training.data.run_images import open_data
from training.distill import PrototypeTeacher
from training.distributed import World, agree, from_main, join
from training.ending import STOPPED, RunStopped, Signals, note_stop, signals_noted, why_stopped
from training.kernels import why_no_triton
from training.plan import plan_run
from training.release import release
from training.run import (
    Run,
    draw_sheet,
    evaluate,
    find_not_finite,
    is_best,
    is_due,
    is_save_due,
    keep_best,
    log_line,
    memory_of,
    needs_the_host,
    obey,
    roll_back,
    save,
    save_checkpoint,
    update_report,
    watched,
)
from training.setup import attention_kernel, compute_dtype, make_autocast
from training.state import Saved, alone_in, drop_states, load_state, remember, start_from
from training.step import train_step
from training.watch.monitor import EVALUATIONS, cut_lines
from training.wiring import image_settings, make_run


def train(config: TrainConfig, console: Console | None = None) -> Path:
    """Start or resume one training run.

    Returns:
        the path of the checkpoint.

    Raises:
        ValueError: there are no usable images, a setting does not suit the machine or does not match the file that it
            names, or another process trains in the folder `config.out`. It is also raised if that folder contains a run
            that cannot be resumed, because its settings, images or teacher differ or all its states are damaged.
        OSError: the images cannot be reached, a file cannot be read, or the run's folder cannot be written.
        model.zoo.DownloadError: published weights cannot be downloaded.
        RunStopped: a check detected that the run is failing, for example a collapse.
        Interrupted: SIGTERM or Ctrl-C ended the run.
    """
    console = console or Console()
    with (
        signals_noted() as signals,
        join(config.device) as world,
        run_folder(config.data, config.out, world),
        attention_kernel(world.device, compute_dtype(make_autocast(config.precision, world.device))),
    ):
        given = config.model_dump(mode="json")
        if (reason := from_main(world, why_stopped(config.out, given) if world.is_main else None)) is not None:
            raise RunStopped(reason)
        warn_without_triton(world, console)
        sources, _ = image_settings(config)
        listing = list_images(sources, world, console)
        saved, damaged = from_main(world, start_from(config.out) if world.is_main else (None, []))
        planned = plan_run(config, listing, world, saved, partial(tell, console))
        config = planned.config
        if world.is_main:
            tell(console, *planned.lines)
        _, images = image_settings(config)
        with open_data(listing, images, world, console) as data:
            run = make_run(config, planned.chosen, world, data, console, saved)
            if world.is_main:
                (config.out / STOPPED).unlink(missing_ok=True)
            with run.monitor, reported(run, given):
                announce(run, saved.step if saved else 0)
                step = restore(run, saved, damaged)
                signals.deferred = True
                step = training_loop(run, step, signals)
                signals.deferred = False
                return release(run, step)


def dry_run(config: TrainConfig, console: Console | None = None) -> None:
    """Print what a run with these settings would do and need, without starting it and without writing to `config.out`.

    Raises:
        ValueError: as `train`, as far as a problem shows before the first step.
        OSError: the images cannot be reached.
        model.zoo.DownloadError: published weights cannot be downloaded.
    """
    console = console or Console()
    check_apart(config.data, config.out)
    place = next(path for path in (config.out, *config.out.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"out={config.out} cannot be written: {place} is not a folder that this user may write to")
    with (
        signals_noted(),
        tempfile.TemporaryDirectory() as folder,
        join(config.device) as world,
        attention_kernel(world.device, compute_dtype(make_autocast(config.precision, world.device))),
    ):
        warn_without_triton(world, console)
        sources, _ = image_settings(config.model_copy(update={"out": Path(folder)}))
        listing = list_images(sources, world, console)
        config = config.model_copy(update={"estimate": True, "out": place})
        planned = plan_run(config, listing, world, None, partial(tell, console))
        if world.is_main:
            tell(console, *planned.lines)


def warn_without_triton(world: World, console: Console) -> None:
    """Warn the user if this machine has a GPU, but Triton cannot run there."""
    if world.is_main and world.device.type == "cuda" and (reason := why_no_triton()) is not None:
        tell(console, f"warning: blocks are not compiled and no Triton kernel is used, so training is slower. {reason}")


@contextmanager
def reported(run: Run, given: Mapping[str, Any]) -> Iterator[None]:
    """Write the report of the run when the block ends, for whatever reason.

    If a check stopped the run, also note why. `given` contains the settings as the user and the recipe gave them.
    """
    try:
        yield
    except RunStopped as stopped:
        if run.world.is_main:
            run.monitor.guarded(STOPPED, partial(note_stop, run.out, given, str(stopped)))
        raise
    finally:
        update_report(run)


def training_loop(run: Run, step: int, signals: Signals) -> int:
    """Run the remaining steps of a run that has done `step` steps, and return the number of steps at the end.

    The run ends early if its measure has had no new best value for a while.

    Raises:
        RunStopped: a check detected that the run is failing, for example a collapse.
        Interrupted: SIGTERM or Ctrl-C ended the run.
    """
    while step < run.total and not run.sentinels.is_stale:
        if run.sentinels.passes_over(step + 1):  # the images of this step caused a rollback
            step += 1
            if step == run.total:
                save(run, step)
            continue

        # Step
        with run.monitor.waiting():
            batch = run.data.loader.batch(step)
        micros = make_micros(run.crops, run.world, batch.pixels, batch.aspect, step, run.total)
        measure = is_due(step + 1, run.every.log) or step + 1 == run.total
        lr_factor = run.sentinels.lr_factor
        terms, cls_tokens = train_step(run.step_settings, run.setup, run.schedules, micros, step, lr_factor, measure)
        step += 1
        run.not_finite.note(step, watched(run, terms))
        run.monitor.advance(step, run.work((step - 1) / run.total))
        if not needs_the_host(run, step, signals):
            continue

        # Log and evaluate. Each action may return a verdict of the sentinels.
        last = step == run.total
        rollback = obey(run, step, find_not_finite(run))
        if rollback is None and (last or is_due(step, run.every.log)):
            rollback = obey(run, step, log_line(run, step, terms, cls_tokens))
        if rollback is None and (last or is_due(step, run.every.evaluate)):
            rollback = obey(run, step, evaluate(run, step))
        if rollback is not None:
            step = roll_back(run, rollback)
            continue

        # Save
        with run.monitor.paused():
            if is_due(step, run.every.checkpoint):
                save_checkpoint(run, run.out / "checkpoints" / f"step_{step:08}.safetensors", step)
            if not last and is_due(step, run.every.sheet):
                draw_sheet(run, step)
            stopping = agree(run.world, signals.came is not None)
            ending = last or run.sentinels.is_stale
            if agree(run.world, is_save_due(run)) or is_best(run, step) or stopping or ending:
                save(run, step)
            if is_due(step, run.every.evaluate):
                update_report(run)
        if stopping:
            signals.came = signals.came or signal.SIGTERM  # the signal may have come to another rank
            raise signals.interrupted(f"the state after step {step} of {run.total} is saved")
    if step < run.total:
        n = run.sentinels.limits.patience_evaluations
        run.monitor.say(step, "early stop", f"no better value in {n} evaluations; step {step} of {run.total}")
    return step


def restore(run: Run, saved: Saved | None, damaged: list[str]) -> int:
    """Load the state `saved` into the run. If it is None, save the state of the new run at step 0.

    A new run is evaluated before its first step, so that a later fall of its measure can be detected. The messages in
    `damaged` are shown as warnings. Return the number of steps done.
    """
    step, parts = saved.step if saved else 0, run.setup.parts
    for message in damaged:
        run.monitor.say(step, "warning", message)
    if isinstance(parts.teacher, PrototypeTeacher):
        choose_prototypes(run, parts.teacher)
    if saved:
        load_state(saved, parts)
        run.sentinels.load_state_dict(saved.memory["sentinels"])
        if run.world.is_main:
            drop_states(run.out, step)  # these are damaged, and new states would have the same names
    else:
        saved = save(run, 0)  # this shows early whether the folder can hold a state, and a rollback may need it
    if step == 0 and run.sentinels.state.best is None:
        if run.world.is_main:
            cut_lines(run.out / EVALUATIONS, -1)
        if run.measure is not None:
            run.monitor.tell("evaluating the network before the first step")
        evaluate(run, 0)
        if run.world.is_main and saved:
            remember(saved, memory_of(run))
    keep_best(run, step)  # a killed process may have saved the state, but not yet the checkpoint
    return step


def choose_prototypes(run: Run, teacher: PrototypeTeacher) -> None:
    """Choose the teacher's prototypes from the features of the first images that the run trains on.

    The choice does not depend on the size of micro-batches or the number of ranks.
    """
    batches = ((step, run.data.loader.batch(step)) for step in range(run.total))
    steps = (make_micros(run.crops, run.world, b.pixels, b.aspect, step, run.total) for step, b in batches)
    teacher.choose(steps, run.world)


@contextmanager
def run_folder(data: Sequence[str], out: Path, world: World) -> Iterator[None]:
    """Create the run's folder `out` if it does not exist, and hold its lock inside the block.

    Raises:
        ValueError: `out` is inside a folder of images, or another process holds the lock.
    """
    check_apart(data, out)
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out) if world.is_main else nullcontext():
        yield


def announce(run: Run, step: int) -> None:
    """Write the settings to `config.json`, and print one line about the images, the steps and the network."""
    if not run.world.is_main:
        return
    if step == run.total:
        run.monitor.tell(
            f"this run is finished ({step} steps), and nothing is trained now. To train more, choose another out "
            f"folder and add init={run.out}"
        )
        return
    write_text(run.out / "config.json", json.dumps(run.settings, indent=1))
    loader, n_ranks, autocast = run.data.loader, run.world.size, run.setup.autocast
    run.monitor.tell(
        f"{len(loader)} images to train on{'' if loader.in_memory else ' (streamed)'}, "
        f"{len(run.data.held_out)} held out; {run.total} steps of {run.crops.batch_size} on "
        f"{f'{n_ranks} x ' if n_ranks > 1 else ''}{run.world.device.type}"
        f"{f' in {str(autocast.fast_dtype)[6:]}' if autocast._enabled else ''}; ViT {asdict(run.release.vit)}"
        + (f"; continuing after step {step}" if step else "")
    )
    run.monitor.tell(run.measured)
