"""Make a run from its configuration.

The other modules of the training loop receive plain values or small dataclasses of settings instead of the whole
configuration. The functions in this file make these dataclasses.
"""

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console

from model.config import ViTConfig
from model.cpus import available_cpus
from training import scale
from training.config import LastPhase, TrainConfig
from training.data.augment import Geometry, Jitter, View
from training.data.batches import Reading
from training.data.crops import CropSettings, Phase, least_cache_side
from training.data.listing import SourceSettings
from training.data.loader import waiting_advice
from training.data.run_images import Data, ImageSettings
from training.distill import check_same_teacher, load_teacher, teacher_digest
from training.distributed import World
from training.held_out import read_held_out
from training.measuring import choose_measure, watched_images
from training.optimizer import Part
from training.outcome import Release
from training.provenance import provenance
from training.run import Intervals, Run
from training.schedules import Schedule, cosine, linear_then_constant
from training.setup import compute_dtype, make_setup
from training.state import Saved, check_same_settings
from training.step import Schedules, StepSettings
from training.watch.flops import HeadShape, StepShape, describe_device, device_peak_flops, expected_masked, step_flops
from training.watch.measure import RETRIEVAL, VIEWS
from training.watch.monitor import METRICS, Monitor, RunSize
from training.watch.sentinels import FirstNotFinite, Limits, Sentinels
from training.watch.sinks import make_sinks


def make_run(
    config: TrainConfig, chosen: Mapping[str, Any], world: World, data: Data, console: Console, saved: Saved | None
) -> Run:
    """Make a run at step 0. `chosen` contains the settings that the plan of the run has chosen.

    If a state `saved` is given, check that it has the same settings, images and teacher as the run, but do not load it.
    The caller loads the state later.

    Raises:
        ValueError: the run does not match `saved`, or the teacher or the initial weights do not match the
            configuration.
        OSError: a file of the teacher or of the initial weights cannot be read.
        model.zoo.DownloadError: published weights cannot be downloaded.
    """
    steps_per_epoch, total = steps_of(config, len(data.loader))
    settings = config.model_dump(mode="json")
    teacher = load_teacher(config).to(world.device) if config.teacher else None
    digest = teacher_digest(teacher) if teacher is not None else None
    setup = make_setup(config, world, teacher)
    if saved:
        check_same_settings(saved, settings)
        data.check_same(saved.memory["data"])
        check_same_teacher(config, saved.memory["teacher"], digest)
    choice = choose_measure(config.measure, data, continues=config.init is not None)
    without_classes = choice.measure in (VIEWS, RETRIEVAL)
    peak = None
    if compute_dtype(setup.autocast) != torch.float32 or world.device.type != "cuda":
        peak = device_peak_flops(world.device, measure=config.measure_peak)
    return Run(
        out=config.out,
        settings=settings,
        world=world,
        data=data,
        crops=crop_settings(config),
        setup=setup,
        step_settings=step_settings(config),
        schedules=make_schedules(config, total),
        total=total,
        steps_per_epoch=steps_per_epoch,
        every=intervals(config, steps_per_epoch, total),
        keep_states=config.keep_states,
        sentinels=Sentinels(limits(config, watched_images(choice, data))),
        not_finite=FirstNotFinite(world.device),
        monitor=make_monitor(config, world, data, console, total, saved.step if saved else 0, peak),
        work=functools.partial(work_of_step, config, teacher=teacher.backbone.config if teacher else None),
        release=release_settings(config, world, data),
        measure=choice.measure,
        measured=choice.words,
        held_out=read_held_out(data.held_out, cache_side(config), world) if without_classes else None,
        evaluations={},
        teacher_digest=digest,
        chosen=chosen,
        saved_at=time.monotonic(),
    )


def steps_of(config: TrainConfig, n_images: int) -> tuple[int, int]:
    """Return the number of steps in an epoch and in the whole run, for `n_images` training images."""
    return n_images // config.batch_size, scale.steps_of(config, n_images)


def image_settings(config: TrainConfig) -> tuple[SourceSettings, ImageSettings]:
    """Return the settings for listing and splitting the run's images, and the settings for reading them."""
    micro_batches = {"micro_batch": config.micro_batch}
    if config.last_phase is not None:
        micro_batches["last_phase.micro_batch"] = config.last_phase.micro_batch
    sources = SourceSettings(
        data=config.data,
        out=config.out,
        seed=config.seed,
        held_out_share=config.held_out_share,
        weights=config.data_weights,
        sampling=config.sampling,
        exclude=config.exclude,
    )
    return sources, ImageSettings(
        batch_size=config.batch_size,
        micro_batches=micro_batches,
        side=cache_side(config),
        cache_bytes=config.cache_bytes,
        reading=Reading(config.workers, config.ahead_steps, config.ahead_bytes, config.max_broken_share),
    )


def cache_side(config: TrainConfig) -> int:
    """Return the side in pixels of the squares that images are resized to before cropping."""
    if config.cache_size is not None:
        return config.cache_size
    return least_cache_side(view for phase in crop_settings(config).phases for view, n in phase.views if n)


def crop_settings(config: TrainConfig) -> CropSettings:
    """Return the settings for making crops and masks."""

    def views(sizes: TrainConfig | LastPhase) -> tuple[tuple[View, int], ...]:
        kinds = (
            (View(sizes.global_size, sizes.global_scale, config.blur[0]), 1),
            (View(sizes.global_size, sizes.global_scale, config.blur[1], config.solarize), 1),
            (View(sizes.local_size, sizes.local_scale, config.blur[2]), config.n_local),
        )
        return tuple((replace(view, filter=config.crop_filter), n) for view, n in kinds)

    phases = [Phase(0.0, views(config), config.micro_batch)]
    if (last := config.last_phase) is not None:
        # The last phase's own micro-batch applies only to larger crops.
        larger = last.global_size != config.global_size
        micro_batch = (last.micro_batch if larger else None) or config.micro_batch
        phases.append(Phase(1 - last.share, views(last), micro_batch))
    return CropSettings(
        seed=config.seed,
        batch_size=config.batch_size,
        patch_size=config.vit_config.patch_size,
        phases=tuple(phases),
        jitter=Jitter(
            white_balance=config.white_balance,
            brightness=config.brightness,
            contrast=config.contrast,
            saturation=config.saturation,
            hue=config.hue,
            probability=config.jitter_probability,
            gray=config.gray,
        ),
        geometry=Geometry(config.flip, config.vertical_flip, config.quarter_turns),
        mask_ratio=config.mask_ratio,
        mask_probability=config.mask_probability,
        ibot_on_all_patches=config.ibot_patches == "all",
    )


def step_settings(config: TrainConfig) -> StepSettings:
    """Return the settings of a training step."""
    return StepSettings(
        seed=config.seed,
        loss_weights=config.loss_weights,
        student_temp=config.student_temp,
        centering=config.centering,
        center_momentum=config.center_momentum,
        koleo_over_ranks=config.koleo_over_ranks,
        clip_grad=config.clip_grad,
    )


def make_schedules(config: TrainConfig, total: int) -> Schedules:
    """Make the schedules of a run of `total` steps.

    If the backbone is frozen at first, the warm-up of the heads lasts for at most half of the steps in which the
    backbone is frozen, so that the heads have learned something before the backbone starts to train. The backbone has
    its own warm-up, which begins when it starts to train. If the last phase sets `lr_mult`, the schedules of the
    learning rate and of the teacher's momentum restart in that phase, without a warm-up.
    """
    peak, warmup = config.lr * math.sqrt(config.batch_size / 1024), int(config.warmup * total)
    frozen = int(config.freeze_backbone * total)
    heads = cosine(peak, config.min_lr, total, warmup=min(warmup, frozen // 2) if frozen else warmup)
    rest = cosine(peak, config.min_lr, total - frozen, warmup=min(warmup, total - frozen))
    fixed_layer = np.arange(total) < int(config.freeze_last_layer * total)
    lr: dict[Part, Schedule] = {
        "backbone": np.concatenate((np.zeros(frozen), rest)),
        "head": heads,
        "last_layer": np.where(fixed_layer, 0, heads),
    }
    momentum = cosine(*config.momentum, total)
    if config.last_phase is not None and config.last_phase.lr_mult is not None:
        phase = np.arange(total) / total >= 1 - config.last_phase.share  # as in `crop_settings`
        n_steps = int(phase.sum())
        for schedule in lr.values():
            schedule[phase] = cosine(peak * config.last_phase.lr_mult, config.min_lr, n_steps)
        momentum[phase] = cosine(*config.momentum, n_steps)
    return Schedules(
        lr=lr,
        weight_decay=cosine(*config.weight_decay, total),
        momentum=momentum,
        teacher_temp=linear_then_constant(*config.teacher_temp, total, int(config.teacher_temp_warmup * total)),
    )


def intervals(config: TrainConfig, steps_per_epoch: int, total: int) -> Intervals:
    """Return how often the run logs, evaluates, draws image sheets, keeps checkpoints and saves its state."""

    def steps(epochs: float) -> int:
        return max(1, round(epochs * steps_per_epoch)) if epochs else 0

    epochs = config.eval_every_epochs
    return Intervals(
        log=config.log_every,
        evaluate=spread_evenly(config.evaluations, total) if epochs is None else steps(epochs),
        sheet=config.sheet_every,
        checkpoint=steps(config.keep_checkpoints_every_epochs),
        save_seconds=60 * config.save_every_minutes,
    )


def spread_evenly(n: int, total: int) -> int:
    """Return the number of steps between `n` evaluations in a run of `total` steps. If n is 0, return 0."""
    return max(1, total // n) if n else 0


def limits(config: TrainConfig, n_measured: int) -> Limits:
    """Return the thresholds and actions of the sentinels (checks for a failing run).

    `n_measured` is the number of images of the figure that tells whether the features are lost.
    """
    return Limits(
        config.n_prototypes,
        on_collapse=config.on_collapse,
        on_not_finite=config.on_not_finite,
        on_measure=config.on_measure,
        patience=config.sentinel_lines,
        rollback_lr_factor=config.rollback_lr_factor,
        min_rankme_share=config.min_rankme_share,
        measure_margin=config.measure_margin,
        max_rollbacks=config.max_rollbacks,
        patience_evaluations=config.patience,
        n_measured=n_measured,
    )


def make_monitor(
    config: TrainConfig, world: World, data: Data, console: Console, total: int, first_step: int, peak: float | None
) -> Monitor:
    """Make the run's monitor, which shows a progress bar and log lines, and writes the log files.

    `peak` is the peak speed of one device in floating-point operations per second. If it is None, the monitor does not
    report MFU (model FLOPs utilisation, the share of the peak speed that the run reaches).
    """
    sinks = []
    if world.is_main:
        settings = config.model_dump(mode="json")
        sinks = make_sinks(config.out, first_step, config.wandb, settings, console.print, config.mlflow)
    return Monitor(
        config.out / METRICS,
        RunSize(total, first_step, config.batch_size),
        console,
        active=world.is_main,
        device=world.device,
        sinks=sinks,
        peak_flops=None if peak is None else peak * world.size,
        advise=functools.partial(
            waiting_advice, loader=data.loader, side=cache_side(config), workers=config.workers or available_cpus()
        ),
    )


def release_settings(config: TrainConfig, world: World, data: Data) -> Release:
    """Return the settings with which the run evaluates its backbone, draws image sheets and writes checkpoints."""
    hardware = f"{world.size} x " * (world.size > 1) + describe_device(world.device)
    return Release(
        vit=config.vit_config,
        eval_spec=config.eval_spec,
        facts=provenance(config, data.digest, len(data.loader), hardware),
        whiten=config.whiten,
        side=cache_side(config),
        title=f"{config.model}, recipe {config.recipe}",
    )


def work_of_step(config: TrainConfig, share_done: float = 0.0, teacher: ViTConfig | None = None) -> float:
    """Compute how many floating-point operations one step needs on all ranks (see training/watch/flops.py).

    The number can change during the run, because the crop sizes can change. `share_done` (0 to 1) is the share of the
    run that is done. `teacher` is the configuration of the teacher's network in distillation, and None otherwise.
    """
    (large, _), _, (small, n_local) = crop_settings(config).phase(share_done).views
    n_images, n_patches = 2 * config.batch_size, (large.size // config.vit_config.patch_size) ** 2
    n_masked = float(n_images * n_patches)
    if config.ibot_patches == "masked":
        n_masked = expected_masked(n_images, n_patches, config.mask_ratio, config.mask_probability)
    head = HeadShape(config.n_prototypes, config.head_hidden_dim, config.head_bottleneck_dim)
    own = replace(head, bottleneck_dim=config.ibot_bottleneck_dim or config.head_bottleneck_dim)
    return step_flops(
        config.vit_config,
        StepShape(
            batch_size=config.batch_size,
            global_size=large.size,
            local_size=small.size,
            n_local=n_local,
            n_masked=n_masked if config.ibot_weight > 0 else 0.0,
        ),
        dino_head=head,
        ibot_head=None if config.shared_head else own,
        drop_path=config.drop_path,
        teacher=teacher,
    ).total
