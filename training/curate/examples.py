"""Scores learned from example images: a linear classifier on embeddings learns what tells marked images from others.

The same function serves two stages. In sensitive content, the wanted images are the sensitive ones, and everything that
scores at least the threshold is dropped. In quality by example, the wanted images are the good ones, and everything
below the threshold is dropped. In both, the user wishes a recall: the share of the wanted images that the threshold
must find.

A part of the examples is held out. The other part fits the classifier, and it also chooses the threshold, with scores
that are cross-validated: each example is scored by a classifier that was not fitted to it. The held-out part has no
influence on either of them, so the recall that is measured on it, with Wilson's interval, is an honest estimate.

Legend: n images, D dimensions of the embedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits

from training.curate.table import Indices
from training.evaluate.logistic import fit_logistic

Embeddings = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

C_GRID: Final = (1.0, 10.0, 100.0, 1000.0)
"""Inverse strengths of the penalty to choose from. Embeddings have the length 1, so useful values are above 1."""
FOLDS: Final = 5
LEAST: Final = 10
"""The least number of examples of each kind: each fold needs some, and the held-out part too."""
Z_95: Final = 1.959963984540054


@dataclass(frozen=True)
class ExampleSettings:
    """How a score is learned.

    `recall` is the share of the wanted images that the threshold must find. `held_out_share` is the share of the
    examples of each kind that measures the recall. `seed` draws the held-out part and the folds.
    """

    recall: float = 0.95
    held_out_share: float = 0.3
    seed: int = 0


@dataclass(frozen=True)
class Share:
    """A share of counted images, with Wilson's 95 % confidence interval."""

    count: int
    of: int

    @property
    def value(self) -> float:
        return self.count / self.of

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.count, self.of)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} ({self.count} of {self.of}; 95 % interval {low:.1%} to {high:.1%})"


@dataclass(frozen=True)
class ExampleScore:
    """A linear score of embeddings, and the threshold from which an image counts as wanted.

    `recall` is the share of the held-out wanted images at or above the threshold, and `false_alarms` that of the other
    held-out images. `c` is the chosen inverse strength of the penalty.
    """

    weight: Scores  # [D]
    bias: float
    threshold: float
    recall: Share
    false_alarms: Share
    c: float

    def scores(self, embeddings: Embeddings) -> Scores:
        """Return the scores [n] of embeddings [n, D]: the logits of being wanted.

        One thread computes them in blocks of a fixed size, so they do not depend on the number of threads.
        """
        with threadpool_limits(1):
            return np.concatenate([_scores(self.weight, self.bias, block) for block in _blocks(embeddings)])

    def wanted(self, embeddings: Embeddings) -> Flags:
        """Return which of the images with these embeddings [n, D] count as wanted, [n]."""
        return self.scores(embeddings) >= self.threshold


def _blocks(embeddings: Embeddings, rows: int = 65_536) -> Iterator[Embeddings]:
    """Yield the embeddings in blocks, at least one, so that few of them are in memory as float64."""
    for top in range(0, max(len(embeddings), 1), rows):
        yield embeddings[top : top + rows]


def _scores(weight: Scores, bias: float, embeddings: Embeddings) -> Scores:
    return embeddings.astype(np.float64) @ weight + bias


def wilson(count: int, of: int, z: float = Z_95) -> tuple[float, float]:
    """Return Wilson's confidence interval for a share: `count` of `of` images.

    The default of `z` gives the interval of 95 %. Source: E. B. Wilson, JASA 22 (1927), 209-212.

    Raises:
        ValueError: `of` is 0.
    """
    if of < 1:
        raise ValueError("a share of 0 images has no confidence interval")
    share = count / of
    centre = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def learn_score(wanted: Embeddings, others: Embeddings, settings: ExampleSettings) -> ExampleScore:
    """Learn to tell wanted images from others, choose the threshold for the wished recall, and measure it.

    Args:
        wanted: embeddings of the wanted example images, [p, D].
        others: embeddings of the other example images, [q, D].
        settings: the wished recall, the held-out share and the seed.

    Raises:
        ValueError: there are too few examples of a kind, or the recall or the share is not between 0 and 1.
        FloatingPointError: a fit failed.
    """
    _check(wanted, others, settings)
    draw = np.random.default_rng(settings.seed)
    features = np.concatenate([wanted, others])
    is_wanted = np.arange(len(features)) < len(wanted)
    held_out = np.zeros(len(features), np.bool_)
    fold = np.zeros(len(features), np.int64)
    for kind in (np.flatnonzero(is_wanted), np.flatnonzero(~is_wanted)):
        order = draw.permutation(kind)
        n_held_out = max(round(len(kind) * settings.held_out_share), 1)
        held_out[order[:n_held_out]] = True
        fold[order] = np.arange(len(order)) % FOLDS
    fit = np.flatnonzero(~held_out)
    with threadpool_limits(1):  # the same result for any number of threads
        c, validated = _choose_c(features[fit], is_wanted[fit], fold[fit])
        weight, bias = _fit(features[fit], is_wanted[fit], c)
        threshold = threshold_for(validated[is_wanted[fit]], settings.recall)
        above = _scores(weight, bias, features) >= threshold
    return ExampleScore(
        weight=weight,
        bias=bias,
        threshold=threshold,
        recall=_share(above[held_out & is_wanted]),
        false_alarms=_share(above[held_out & ~is_wanted]),
        c=c,
    )


def _check(wanted: Embeddings, others: Embeddings, settings: ExampleSettings) -> None:
    for name, examples in (("wanted", wanted), ("other", others)):
        if len(examples) < LEAST:
            raise ValueError(f"{len(examples)} {name} example images are too few; at least {LEAST} are needed")
    if not 0 < settings.recall <= 1:
        raise ValueError(f"recall={settings.recall} must be above 0 and at most 1")
    if not 0 < settings.held_out_share <= 0.5:
        raise ValueError(f"held_out_share={settings.held_out_share} must be above 0 and at most 0.5")


def _share(flags: Flags) -> Share:
    return Share(int(flags.sum()), len(flags))


def _choose_c(features: Embeddings, is_wanted: Flags, fold: Indices) -> tuple[float, Scores]:
    """Choose the C with the lowest cross-validated log loss. Return it, and the cross-validated scores [n]."""
    best: tuple[float, float, Scores] | None = None
    for c in C_GRID:
        scores = np.empty(len(features))
        for number in range(FOLDS):
            aside = fold == number
            scores[aside] = _scores(*_fit(features[~aside], is_wanted[~aside], c), features[aside])
        loss = float(np.logaddexp(0, np.where(is_wanted, -scores, scores)).mean())
        if best is None or loss < best[0]:
            best = loss, c, scores
    assert best is not None
    return best[1], best[2]


def _fit(features: Embeddings, is_wanted: Flags, c: float) -> tuple[Scores, float]:
    """Fit logistic regression, and return the weight [D] and the bias of the logit of being wanted."""
    labels = torch.from_numpy(is_wanted.astype(np.int64))
    model = fit_logistic(torch.from_numpy(features.astype(np.float64)), labels, c, n_classes=2)
    weight, bias = model.weight.numpy(), model.bias.numpy()
    return weight[1] - weight[0], float(bias[1] - bias[0])


def threshold_for(scores: Scores, recall: float) -> float:
    """Return the highest threshold that at least the share `recall` of the scores [n] reaches."""
    needed = int(np.ceil(recall * len(scores) - 1e-9))
    return float(np.sort(scores)[len(scores) - needed])
