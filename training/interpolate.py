"""Mix the initial and the final weights of a run that continued from a trained backbone.

A run on a small set can improve some features and lose others. The weights between the start and the end of the run
often keep what the start could do and most of what the run learned (WiSE-FT, arXiv 2109.01903). The mix costs one
evaluation for each share, and no training.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

SHARES = (0.25, 0.5, 0.75, 1.0)
"""The shares of the final weights to try. Share 0 is the start, which has been measured before the first step."""


@torch.no_grad()
def mix(initial: Mapping[str, Tensor], final: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Compute `(1 - share) * initial + share * final` for each tensor of two state dicts of the same network.

    The sums are computed in float32 or, for float64 tensors, in float64. The results are new tensors that have the
    types of `final`. With share 0 and share 1 they equal `initial` and `final` exactly.

    Args:
        initial: the weights before the run.
        final: the weights after it.
        share: the share of `final`, 0 to 1.

    Raises:
        ValueError: `share` is not 0 to 1, the names or the shapes of the tensors differ, or a tensor is not of a
            floating-point type.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must be 0 (the initial weights) to 1 (the final weights)")
    if initial.keys() != final.keys():
        raise ValueError(f"the weights differ in {sorted(initial.keys() ^ final.keys())}: mix weights of one network")
    mixed = {}
    for name, end in final.items():
        start = initial[name]
        if start.shape != end.shape:
            raise ValueError(f"{name} has shape {list(start.shape)} and {list(end.shape)}: mix weights of one network")
        if not end.is_floating_point():
            raise ValueError(f"{name} has type {end.dtype}: only floating-point weights can be mixed")
        precise = torch.promote_types(end.dtype, torch.float32)
        mixed[name] = torch.lerp(start.to(end.device, precise), end.to(precise), share).to(end.dtype)
    return mixed


def best_share(measures: Mapping[float, float], margin: float = 0.0) -> float:
    """Choose the share of the final weights to release from the measure (higher is better) of each share.

    The result is the share with the highest measure, and the smallest one if several have it. It is 0, the start,
    unless the highest measure exceeds that of the start by more than `margin`. A margin above 0 makes up for the noise
    of a measure on few images, because the highest of several noisy figures is too high.

    Raises:
        ValueError: `measures` has no entry for share 0, or a measure is not finite.
    """
    if 0 not in measures:
        raise ValueError(f"the measures of shares {sorted(measures)} lack the start: measure share 0 too")
    for share, value in measures.items():
        if not torch.tensor(value).isfinite():
            raise ValueError(f"the measure of share {share:g} is {value}: it must be a finite number")
    best = max(sorted(measures), key=lambda share: measures[share])
    return best if measures[best] > measures[0] + margin else 0.0
