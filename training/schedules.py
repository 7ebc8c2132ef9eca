"""Compute schedules: arrays with one value per step. The training loop reads the value of each step from them.

The schedules follow facebookresearch/dinov2, `dinov2/utils/utils.py` (CosineScheduler). An array can be printed,
plotted and tested, and a resumed run reads the same values as an uninterrupted run.
"""

import numpy as np
import numpy.typing as npt

Schedule = npt.NDArray[np.float64]


def cosine(base: float, final: float, total: int, *, warmup: int = 0) -> Schedule:
    """Return a schedule of `total` steps that rises linearly from 0 to `base` over the first `warmup` steps.

    After the warm-up the schedule follows half a period of a cosine from `base` to `final`.

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    n_cosine = total - warmup
    if n_cosine < 0:
        raise ValueError(f"warmup of {warmup} steps does not fit into a run of {total}")
    steps = np.arange(n_cosine)
    decay = final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / max(1, n_cosine)))
    return np.concatenate([np.linspace(0, base, warmup), decay])


def linear_then_constant(start: float, end: float, total: int, warmup: int) -> Schedule:
    """Return a schedule of `total` steps that changes linearly from `start` to `end` over the first `warmup` steps.

    After the warm-up the value is constant. If the warm-up is longer than the run, `end` is not reached. The teacher's
    temperature follows this kind of schedule.
    """
    ramp = np.linspace(start, end, warmup)[:total]
    return np.concatenate([ramp, np.full(total - len(ramp), end)])
