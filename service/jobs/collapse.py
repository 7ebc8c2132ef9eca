"""Signs that a model has collapsed: it gives different images almost the same features.

`training/watch/collapse.py` finds a collapse during a run, from the losses and from the highest figures of the run. The
gate only has the features of two finished models, so it compares each sign with a fixed limit and with the champion.

Legend: n images, D features.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from model.engines.parity import unit_length
from service.jobs.verdict import GateRules, Signs

FloatArray = npt.NDArray[np.float32]

RANKME_ROWS: Final = 1024
"""The number of images from which RankMe is computed, as in training."""


def rankme_share(features: FloatArray) -> float:
    """Return the effective rank of features [n, D] as a share of its maximum, min(n, D).

    The effective rank is exp(H), where H is the entropy of the singular values scaled to sum to 1 (RankMe,
    arXiv 2210.02885, equation 2).
    """
    singular = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = singular / max(float(singular.sum()), 1e-30) + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()) / min(features.shape))


def spread(features: FloatArray) -> float:
    """Return 1 minus the mean cosine of two different rows of features [n, D]: 0 if all rows point in one direction,
    and about 1 if they point in random directions."""
    unit = unit_length(features).astype(np.float64)
    return float(np.square(unit - unit.mean(axis=0)).sum() / max(1, len(unit) - 1))


def nearest_others(features: FloatArray, k: int) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Return the positions [n, k] and the cosines [n, k] of the k rows that are most similar to each row of features
    [n, D], without the row itself. The most similar row comes first. k must be below n."""
    unit = unit_length(features)
    indices, cosines = np.empty((len(unit), k), np.intp), np.empty((len(unit), k), np.float32)
    for top in range(0, len(unit), 1024):
        rows = np.arange(top, min(top + 1024, len(unit)))
        similarity = unit[rows] @ unit.T
        similarity[rows - top, rows] = -np.inf
        best = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(similarity, best, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        indices[rows], cosines[rows] = (
            np.take_along_axis(best, order, axis=1),
            np.take_along_axis(values, order, axis=1),
        )
    return indices, cosines


def neighbours_kept(champion: FloatArray, challenger: FloatArray, k: int) -> float | None:
    """Return the share of the k nearest images that two models have in common, as a mean over n images.

    The rows of `champion` [n, D] and `challenger` [n, E] belong to the same images. With fewer than k + 1 images, all
    but one are used as k. Return None if there are fewer than three images, because the neighbours are then always the
    same.
    """
    k = min(k, len(champion) - 1)
    if k < 1 or len(champion) < 3:
        return None
    first, second = (nearest_others(features, k)[0] for features in (champion, challenger))
    return float((first[:, :, None] == second[:, None, :]).sum() / first.size)


def signs_of_collapse(features: FloatArray, rules: GateRules) -> Signs:
    """Measure the signs of collapse in features [n, D] of n different images."""
    not_finite = int((~np.isfinite(features).all(axis=1)).sum())
    if not_finite:
        return Signs(len(features), not_finite)
    std = features.astype(np.float64).std(axis=0)
    dead = std <= rules.dead_std * np.sqrt(np.square(std).mean())  # all dimensions if all images are equal
    similar = nearest_others(features, 1)[1][:, 0] >= rules.near_identical
    zero = np.linalg.norm(features, axis=1) == 0  # such a vector has no direction
    sample = features[:: max(1, -(-len(features) // RANKME_ROWS))]
    return Signs(
        len(features),
        not_finite,
        rankme_share(sample),
        spread(features),
        float((similar | zero).mean()),
        float(dead.mean()),
    )


def broken_rules(champion: Signs, challenger: Signs, rules: GateRules) -> list[str]:
    """Return one sentence for each sign of collapse of the challenger."""
    if challenger.not_finite:
        return [f"{challenger.not_finite} of {challenger.n_images} images have a feature that is NaN or infinite"]
    assert champion.rankme_share is not None
    assert champion.spread is not None
    assert champion.near_identical is not None
    assert champion.dead_dimensions is not None
    found = [
        _too_low("RankMe", challenger.rankme_share, champion.rankme_share, rules.min_rankme_share, rules.rankme_fall),
        _too_low("the spread of the features", challenger.spread, champion.spread, rules.min_spread, rules.spread_fall),
        _too_high(
            "the share of images that are near-identical to another",
            challenger.near_identical,
            champion.near_identical,
            rules.max_near_identical,
            rules.near_identical_rise,
        ),
        _too_high(
            "the share of dead dimensions",
            challenger.dead_dimensions,
            champion.dead_dimensions,
            rules.max_dead,
            rules.dead_rise,
        ),
    ]
    return [f"collapse: {text}" for text in found if text]


def _too_low(what: str, value: float | None, champion: float, least: float, fall: float) -> str:
    assert value is not None
    limit = max(least, fall * champion)
    return f"{what} is {value:.3f}, below {limit:.3f} (the champion has {champion:.3f})" if value < limit else ""


def _too_high(what: str, value: float | None, champion: float, most: float, rise: float) -> str:
    assert value is not None
    limit = min(most, champion + rise)
    return f"{what} is {value:.1%}, above {limit:.1%} (the champion has {champion:.1%})" if value > limit else ""
