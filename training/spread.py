"""Measure how different the features of different images are. These figures show whether a network has collapsed.

Legend: n images, D features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RANKME_ROWS = 1024  # enough class tokens to estimate an effective rank, which is then quick to compute


def rankme(features: Tensor) -> float:
    """Compute the effective rank of features [n, D]: exp(H), where H is the entropy of the singular values scaled to
    sum to 1.

    The effective rank is 1 if all rows are multiples of one vector, and min(n, D) if all singular values are equal
    (RankMe, arXiv 2210.02885, equation 2, with epsilon 1e-7). As in the paper, features are not centred. If a feature
    is not finite, the result is NaN.
    """
    if not bool(torch.isfinite(features).all()):
        return math.nan
    singular = torch.linalg.svdvals(features.detach().float())
    shares = singular / singular.sum().clamp(min=1e-30) + 1e-7
    return float((-(shares * shares.log()).sum()).exp())


def rankme_share(features: Tensor) -> float:
    """Return the effective rank (`rankme`) of features [n, D] as a share of its maximum, min(n, D)."""
    return rankme(features) / min(features.shape)


def token_spread(features: Tensor) -> Tensor:
    """Compute the spread of features [n, D], as a scalar on their device: 1 minus the mean cosine of two rows.

    The spread is 0 if all rows point in the same direction, and about 1 if they point in random directions. It is
    computed as the variance of the L2-normalised rows, summed over the dimensions, which equals 1 minus the mean cosine
    over all pairs of different rows. Unlike the cosines themselves, the variance stays accurate if the rows are almost
    equal. A single row has spread 0. If a feature is not finite, the result is NaN.
    """
    unit = F.normalize(features.detach().float(), dim=1)
    return (unit - unit.mean(dim=0)).square().sum() / max(1, len(unit) - 1)
