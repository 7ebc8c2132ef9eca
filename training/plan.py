"""Plan a run before its first step: choose the settings that depend on the images and the time, and estimate the costs.

A new run measures its costs in a short trial (`training/trial.py`). The settings that the plan chooses are stored in
the states of the run, so a resumed run has the same ones, whatever its speed is then.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.cpus import available_cpus
from model.loading import read_model
from training import scale
from training.config import TrainConfig
from training.data.listing import Listing
from training.data.run_images import ASKED_PHOTOS, KNN_PHOTOS
from training.distill import load_teacher
from training.distributed import World
from training.estimate import (
    Costs,
    Estimate,
    Plan,
    count_evaluations,
    epochs_within,
    estimate,
    image_memory,
    in_words,
    steps_of_phases,
)
from training.evaluate.label_free import MOST_IMAGES
from training.measuring import FEWEST_HELD_OUT, MANY_HELD_OUT, WHITENING_IMAGES
from training.outcome import GALLERY
from training.resources import Free
from training.setup import make_setup
from training.state import Saved
from training.trial import Pieces, trial
from training.wiring import cache_side, crop_settings, intervals, make_schedules, step_settings, steps_of

CHOSEN = "chosen"
EVALUATION_SHARE = 0.2  # of the training time


@dataclass(frozen=True)
class Planned:
    """The plan of a run: its settings, those among them that the plan has chosen, and lines to tell the user."""

    config: TrainConfig
    chosen: Mapping[str, Any]
    lines: list[str]


def plan_run(
    config: TrainConfig, listing: Listing, world: World, saved: Saved | None, tell: Callable[[str], None]
) -> Planned:
    """Choose the settings of `config` that depend on the images and on the time budget, and estimate the costs.

    A resumed run takes what the state `saved` contains, and is not estimated. `tell` shows a line to the user. Every
    rank must call this function.

    Raises:
        ValueError: the time budget is too short, the batch is larger than the number of images, or a step needs more
            memory than the device has.
        OSError: the images cannot be reached, or the run's folder cannot be written.
    """
    if saved is not None:
        return resumed_plan(config, saved)
    plan = Planned(config, {}, [])
    if world.is_main and (config.estimate or config.hours is not None):
        tell(
            f"{len(listing.train):,} images to train on; a few steps on trial show what the run needs "
            "(estimate=false skips them)"
        )
    if config.scale == "continue":
        plan = scaled(plan, listing, world)
    n_images = len(listing.train)
    if n_images < plan.config.batch_size:
        raise ValueError(f"batch_size={plan.config.batch_size} is more than the {n_images} images to train on")
    if config.hours is None and not config.estimate:
        return replace(plan, lines=choice_in_words(plan, n_images))
    costs = measure(plan.config, listing, world)
    plan = with_evaluations(plan, listing, world, costs)
    if config.hours is not None:
        plan = within_hours(plan, listing, world, costs)
    found = estimated(plan.config, listing, world, costs)
    return replace(plan, lines=[*choice_in_words(plan, n_images), *in_words(found)])


def choice_in_words(plan: Planned, n_images: int) -> list[str]:
    """Return the lines that say which settings the plan has chosen, and what the user should know about them."""
    config, lines = plan.config, []
    if plan.chosen:
        values = ", ".join(f"{name}={_short(value)}" for name, value in plan.chosen.items())
        lines.append(f"chosen for {n_images:,} images: {values}")
    if config.scale == "continue" and (warning := scale.warning(config, n_images)):
        lines.append(f"warning: {warning}")
    if config.init is not None and (Path(config.init).exists()):
        spec = read_model(config.init, arch=config.model).preprocess
        if (spec.resize, spec.crop) != (config.eval_resize, config.eval_crop):
            lines.append(
                f"warning: init was made for images of {spec.crop} pixels (short side {spec.resize}), but this run "
                f"measures with eval_crop={config.eval_crop} (eval_resize={config.eval_resize}), and an exported model "
                "will use this size: accuracies at two sizes cannot be compared"
            )
    return lines


def resumed_plan(config: TrainConfig, saved: Saved) -> Planned:
    """Return the plan of a resumed run: the settings that it chose when it began, unless the user gives them now."""
    chosen = saved.memory.get(CHOSEN, {})
    given = config.model_fields_set - ({"epochs"} if config.hours is not None else set())
    return Planned(changed(config, {k: v for k, v in chosen.items() if k not in given}), chosen, [])


def add(plan: Planned, values: Mapping[str, Any]) -> Planned:
    """Return the plan with further chosen settings."""
    return replace(plan, config=changed(plan.config, values), chosen={**plan.chosen, **values})


def scaled(plan: Planned, listing: Listing, world: World) -> Planned:
    """Choose the settings for continuing from a trained backbone that neither the recipe nor the user gives.

    With a time budget, the speed is measured with the settings for a run without one.
    """
    config, n_images = plan.config, len(listing.train)

    def choose(**budget: float) -> Planned:
        settings = scale.continue_settings(n_images, config.vit_config.embed_dim, **budget).as_overrides()
        return add(plan, {k: v for k, v in settings.items() if k not in config.model_fields_set})

    chosen = choose()
    if config.hours is not None:
        costs = measure(chosen.config, listing, world)
        speed = estimated(chosen.config, listing, world, costs).images_per_s
        chosen = choose(hours=config.hours, images_per_s=speed)
    return chosen


def _short(value: Any) -> str:
    return "[" + ", ".join(f"{part:g}" for part in value) + "]" if isinstance(value, list | tuple) else f"{value:g}"


def with_evaluations(plan: Planned, listing: Listing, world: World, costs: tuple[Costs, Free]) -> Planned:
    """Choose fewer evaluations if they would take more than a fifth of the time, unless the user has set their number.

    The evaluations at the start and at the end are not counted.
    """
    config = plan.config
    if config.model_fields_set & {"evaluations", "eval_every_epochs"} or not config.evaluations:
        return plan
    found = estimated(config, listing, world, costs)
    each = found.evaluation_seconds / max(found.evaluations, 1)
    seconds = found.training_seconds if config.hours is None else 3600 * config.hours
    n = int(EVALUATION_SHARE * seconds / each) if each else config.evaluations
    return plan if n >= config.evaluations else add(plan, {"evaluations": n})


def within_hours(plan: Planned, listing: Listing, world: World, costs: tuple[Costs, Free]) -> Planned:
    """Choose the number of epochs that the time budget allows.

    A run that continues from a trained backbone has no more epochs than it can use (`training/scale.py`).

    Raises:
        ValueError: the time is too short for a single step.
    """
    config = plan.config
    assert config.hours is not None

    def total_seconds(epochs: float) -> float:
        return estimated(changed(config, {"epochs": epochs}), listing, world, costs).total_seconds

    n_steps = len(listing.train) // config.batch_size
    if config.scale == "continue":
        return add(plan, {"epochs": epochs_within(config.hours, total_seconds, n_steps, config.epochs)})
    return add(plan, {"epochs": epochs_within(config.hours, total_seconds, n_steps)})


def changed(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration with other values for some settings.

    Raises:
        ValueError: a value is not allowed, or does not fit the other settings.
    """
    if not values:
        return config
    made = TrainConfig.model_validate({**config.model_dump(), **values})
    return config.model_copy(update={name: getattr(made, name) for name in values}, deep=False)


def measure(config: TrainConfig, listing: Listing, world: World) -> tuple[Costs, Free]:
    """Measure what the parts of the run cost, in a trial."""
    total = steps_of(config, len(listing.train))[1]
    return trial(pieces_of(config, world, total), listing.train, world)


def estimated(config: TrainConfig, listing: Listing, world: World, costs: tuple[Costs, Free]) -> Estimate:
    """Estimate what the run needs, from the costs and the free resources that `measure` returned."""
    return estimate(costed_plan(config, len(listing.train), evaluated_images(config, listing), world), *costs)


def pieces_of(config: TrainConfig, world: World, total: int) -> Pieces:
    """Return the parts of a run of `total` steps that a trial needs."""
    return Pieces(
        make_setup=lambda: make_setup(config, world, load_teacher(config).to(world.device) if config.teacher else None),
        step_settings=step_settings(config),
        schedules=make_schedules(config, total),
        crops=crop_settings(config),
        total=total,
        side=cache_side(config),
        vit=config.vit_config,
        eval_spec=config.eval_spec,
        workers=config.workers or max(1, available_cpus() // world.on_machine),
        out=config.out,
    )


def evaluated_images(config: TrainConfig, listing: Listing) -> int:
    """Return how many images pass through the network in an evaluation of the run (see `training/measuring.py`)."""
    if config.measure == "none":
        return 0
    n_images, n_held_out = len(listing.train), len(listing.held_out)
    for_knn = min(n_images, KNN_PHOTOS) + min(n_held_out, ASKED_PHOTOS) if listing.n_classes > 1 else 0
    by_views = config.measure in ("auto", "views") and FEWEST_HELD_OUT <= n_held_out < MANY_HELD_OUT
    return for_knn + (2 * min(n_held_out, MOST_IMAGES) if by_views or not for_knn else 0)


def costed_plan(config: TrainConfig, n_images: int, n_evaluated: int, world: World) -> Plan:
    """Return what a run with `n_images` training images is going to do.

    `n_evaluated` images pass through the network in each evaluation. If there are none, the run has no measure.
    """
    steps_per_epoch, total = steps_of(config, n_images)
    every = intervals(config, steps_per_epoch, total)
    in_memory, image_bytes = image_memory(
        n_images,
        cache_side(config),
        config.batch_size // world.size,
        cache_bytes=config.cache_bytes,
        ahead_steps=config.ahead_steps,
        ahead_bytes=config.ahead_bytes,
    )
    measured = n_evaluated > 0 and config.measure != "none"
    in_the_loop = count_evaluations(total, every.evaluate)
    # backbones that are whitened: one in each evaluation, the last one, and the best one
    n_whitened = 0 if config.whiten is None else in_the_loop + 2 if measured else 1
    n_sheets = 1 + ((total - 1) // every.sheet if every.sheet else 0)
    return Plan(
        images=n_images,
        epochs=config.epochs,
        phase_steps=steps_of_phases([phase.starts_at for phase in crop_settings(config).phases], total),
        batch_size=config.batch_size,
        n_ranks=world.size,
        on_cpu=world.device.type == "cpu",
        in_memory=in_memory,
        image_bytes=image_bytes,
        log_every=every.log,
        save_every_seconds=every.save_seconds,
        best_saves=max(0, in_the_loop - 2) if measured else 0,  # step 0 and the last step are saved anyway
        keep_states=config.keep_states,
        rollback_states=(config.on_collapse == "rollback") + (config.on_measure == "rollback"),
        # the last one, the best one before and after it is whitened, and those for `dinov2 average`
        checkpoints=(3 if measured else 1) + (total // every.checkpoint if every.checkpoint else 0),
        sheets=n_sheets,
        evaluations=in_the_loop if measured else 0,
        images_per_evaluation=n_evaluated,
        other_images=n_sheets * min(n_images, GALLERY) + n_whitened * min(n_images, WHITENING_IMAGES),
    )
