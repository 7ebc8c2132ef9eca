"""Logistic regression on frozen features. This evaluation does not depend on the choice of a learning rate.

The protocol is that of facebookresearch/dinov2 (`dinov2/eval/log_regression.py`): multinomial regression in float64
with an L2 penalty. C is the inverse strength of the penalty, as in scikit-learn: the fit minimises C * sum of the log
losses + 0.5 * sum of the squared weights, and the bias has no penalty. The best of 45 values of C between 1e-6 and 1e5
is chosen on a tenth of the training images, drawn with a fixed seed. Then a model with this C is fitted to all training
images. Features are not normalised. Meta's code uses cuML's solver with tolerance 1e-12 and 1,000 iterations, so it
stops at the iteration limit if C is large. Here L-BFGS runs until the largest entry of the gradient is below
`tolerance`, and the fit for each C starts from the solution for the next smaller C.

L-BFGS converges fast only if all unknowns have similar curvature, but at C = 1e-6 the penalty makes the curvature of
the weights a million times that of the biases. The fit therefore uses rescaled unknowns. Features are centred, which
only shifts the bias, and each weight is scaled so that its curvature at the start equals that of a bias. The solution
is the same, and the fit takes tens of steps instead of hundreds.

Legend: n images, D features, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.evaluate.meaning import check_classification, not_finite

C_GRID: tuple[float, ...] = tuple(10.0**power for power in np.linspace(-6, 5, 45).tolist())


@dataclass(frozen=True)
class Logistic:
    """A fitted logistic regression for D features and K classes: `weight` [K, D] and `bias` [K], float64."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Compute the logits of n images for K classes, [n, K], from their features [n, D]."""
        return features.to(self.weight) @ self.weight.T + self.bias


def logistic_loss(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, c: float) -> Tensor:
    """Compute the objective of logistic regression divided by c * n: mean log loss + |weight|^2 / (2 c n).

    n is the number of images, and c is the inverse strength of the penalty. Because of the division, the size of the
    result does not grow with n or c.
    """
    loss = F.cross_entropy(features @ weight.T + bias, labels)
    return loss + weight.square().sum() / (2 * c * len(labels))


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    c: float,
    n_classes: int,
    *,
    start: Logistic | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
) -> Logistic:
    """Fit multinomial logistic regression with an L2 penalty, and return the fitted model.

    The fit runs L-BFGS in float64 on the device of the features.

    Args:
        features: features of the n images, [n, D].
        labels: class numbers [n], below `n_classes`.
        c: inverse strength of the penalty, scikit-learn's C.
        n_classes: number of classes.
        start: model to start from; None: all weights and biases are zero.
        tolerance: the fit ends when no entry of the gradient of `logistic_loss` is larger than this. The gradient is
            with respect to the rescaled weights and biases (see the docstring of this module).
        max_iterations: maximum number of iterations.

    Raises:
        ValueError: c is not above 0, or there are no images.
        FloatingPointError: a weight of the fitted model is not finite.
    """
    if not c > 0:
        raise ValueError(f"c={c} must be above 0")
    if not len(labels):
        raise ValueError("logistic regression needs at least one image")
    features = features.double()
    n, mean = len(labels), features.mean(dim=0)
    centred = features - mean
    curvature = max(1 / n_classes * (1 - 1 / n_classes), 1e-3)  # of the log loss, if classes are equally likely
    penalty = 1 / (c * n)
    scale = (curvature / (curvature * centred.square().mean(dim=0) + penalty)).sqrt()  # [D]
    weight = features.new_zeros(n_classes, features.shape[1]) if start is None else start.weight / scale
    bias = features.new_zeros(n_classes) if start is None else start.bias + start.weight @ mean
    scaled = centred.mul_(scale)
    optimizer = torch.optim.LBFGS(
        [weight.requires_grad_(), bias.requires_grad_()],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=1e-14,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(scaled @ weight.T + bias, labels) + (weight * scale).square().sum() * penalty / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = weight.detach() * scale
    model = Logistic(fitted, bias.detach() - fitted @ mean)
    if (problem := not_finite({"weight": model.weight, "bias": model.bias})) is not None:
        raise FloatingPointError(f"logistic regression with C={c:g} failed: {problem}")
    return model


def accuracy(model: Logistic, features: Tensor, labels: Tensor, rows: int = 65_536) -> float:
    """Return the share of images that the model classifies correctly.

    The predicted class of an image is the one with the largest logit. `features` are [n, D] and `labels` class numbers
    [n]. The logits of `rows` images are computed at a time.
    """
    right = 0
    for top in range(0, len(labels), rows):
        part = slice(top, top + rows)
        right += int((model.logits(features[part]).argmax(dim=1) == labels[part]).sum())
    return right / len(labels)


def split_off(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split n images at random into two sets, and return the positions of each set's images, in ascending order.

    The second set contains the share `share` of the images, but at least one image. The first contains the others. The
    split depends only on the arguments.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    aside = max(1, int(n * share))
    return order[aside:].sort().values, order[:aside].sort().values


@dataclass(frozen=True)
class LogisticReport:
    """The result of a logistic regression.

    `c` is the chosen value of C, the inverse strength of the penalty. `accuracy` is the val accuracy with this value.
    `sweep` maps every value of C that was tried to the accuracy on the training images that were held out to choose C.
    """

    accuracy: float
    c: float
    sweep: dict[float, float]


@dataclass(frozen=True)
class FitSettings:
    """The settings of a logistic regression.

    `held_out_share` is the share of the training images that is held out to choose C, the inverse strength of the
    penalty. `seed` is the seed for drawing these images. For `tolerance` and `max_iterations`, see `fit_logistic`.
    """

    held_out_share: float = 0.1
    seed: int = 0
    tolerance: float = 1e-6
    max_iterations: int = 1000


def evaluate_logistic(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    *,
    c_grid: Sequence[float] = C_GRID,
    fit: FitSettings | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> LogisticReport:
    """Choose C on held-out training images, fit a model with this C to all training images, and score it on val.

    C is the inverse strength of the penalty.

    Args:
        train: features of the n training images, [n, D].
        train_labels: class numbers of the training images, [n].
        val: features of the m val images, [m, D].
        val_labels: class numbers of the val images, [m]. Classes that occur only in val are never predicted.
        c_grid: values of C to try. If several give the highest accuracy, the smallest is chosen.
        fit: settings of the fit; None: the defaults.
        advance: called with 1 after each value of C.

    Raises:
        ValueError: there are fewer than two training images, `c_grid` is empty, or a value in it is not above 0.
        NoMeaning: the accuracy on val or the accuracy that chooses C would be the same for every model.
        FloatingPointError: a weight of a fitted model is not finite.
    """
    if len(train) < 2:
        raise ValueError(f"logistic regression needs at least 2 training images, found {len(train)}")
    if not c_grid:
        raise ValueError("c_grid is empty; it needs at least one value of C")
    check_classification(train_labels, val_labels)
    fit = fit or FitSettings()
    tolerance, max_iterations = fit.tolerance, fit.max_iterations
    n_classes = int(train_labels.max()) + 1
    fitted, chosen_on = split_off(len(train), fit.held_out_share, fit.seed)
    fitted, chosen_on = fitted.to(train.device), chosen_on.to(train.device)
    features, labels = train[fitted].double(), train_labels[fitted]
    check_classification(labels, train_labels[chosen_on], "the part of train to fit", "the part of train to choose C")
    sweep: dict[float, float] = {}
    model: Logistic | None = None
    for c in sorted(c_grid):
        model = fit_logistic(
            features, labels, c, n_classes, start=model, tolerance=tolerance, max_iterations=max_iterations
        )
        sweep[c] = accuracy(model, train[chosen_on], train_labels[chosen_on])
        advance(1)
    best = max(sweep, key=lambda c: sweep[c])
    final = fit_logistic(train, train_labels, best, n_classes, tolerance=tolerance, max_iterations=max_iterations)
    return LogisticReport(accuracy(final, val, val_labels), best, sweep)
