"""Linear depth: predict the distance of each pixel in metres from frozen tokens.

The protocol follows the DINOv2 paper (section 7.4; facebookresearch/dinov2, `dinov2/eval/depth`). Each patch token is
concatenated with the class token, for the last block ("lin. 1") or for each of the last four blocks ("lin. 4"). One
linear layer maps this vector to logits of 256 bins, which are evenly spaced depths from `min_depth` to `max_depth`. The
logits are enlarged bilinearly by a factor of 4. The weight of a bin is relu(logit) + 0.1, divided by the sum of these
values over all bins. The predicted depth is the weighted mean of the bins, enlarged to the size of the map. The loss is
the scale-invariant loss of log depth (sqrt(variance + 0.15 * mean^2) of the log error) plus 0.5 times MegaDepth's
gradient loss at four scales. Unlike the paper, this module uses the whole image, without augmentation, without a
flipped second view, and without cropping the map's border.

RMSE, AbsRel and delta1 (the share of pixels predicted within a factor of 1.25) are computed for each image and averaged
over images. Only pixels with a depth above `min_depth` and up to `max_depth` count. Predictions are clamped to the same
range.

Legend: K bins, h x w patches, H x W pixels of the map, F features of a patch, n pixels with a known depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from training.evaluate.dense import Advance, DenseData, HeadTraining, train_head
from training.evaluate.meaning import NoMeaning

SUFFIXES = (".png", ".npy")
N_BINS = 256
UPSAMPLE = 4
BIN_FLOOR = 0.1
LOG_EPS = 1e-3
MEAN_WEIGHT = 0.15
GRADIENT_WEIGHT = 0.5
STRIDES = (1, 2, 4, 8)


@dataclass(frozen=True)
class DepthReport:
    """The scores of a depth head, averaged over the val images, and the last training loss.

    `rmse` is in metres, and `photos` is the number of images in the average.
    """

    rmse: float
    abs_rel: float
    delta1: float
    photos: int
    loss: float


def read_depth(path: Path, *, units_per_metre: float = 1000.0) -> Tensor:
    """Read a depth map in metres, float32 [H, W], from a 16-bit gray PNG or a .npy file.

    A PNG is in millimetres by default, and a .npy file is in metres. Values that are zero, negative or not finite mean
    "unknown" and become zero.

    Args:
        path: the file.
        units_per_metre: the value in a PNG that stands for one metre; 256 for KITTI.

    Raises:
        ValueError: the file cannot be read, or is neither a 16-bit gray PNG nor an array [H, W].
    """
    try:
        if path.suffix == ".npy":
            metres = np.load(path, allow_pickle=False).astype(np.float32)
        else:
            with Image.open(path) as image:
                if image.mode not in ("I;16", "I;16B", "I"):
                    raise ValueError(f"a depth map is a 16-bit gray PNG, not one of mode {image.mode}")
                metres = np.asarray(image).astype(np.float32) / units_per_metre
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if metres.ndim != 2:
        raise ValueError(f"a depth map has the shape [H, W], not {list(metres.shape)}")
    return torch.from_numpy(np.where(np.isfinite(metres) & (metres > 0), metres, 0).astype(np.float32))


class LinearDepth(nn.Module):
    """A head that predicts depths as weighted means of K evenly spaced depths, which are called bins.

    A linear layer computes a logit for each bin. The weight of a bin is relu(logit) + 0.1, divided by the sum of these
    values over all bins.
    """

    bins: Tensor

    def __init__(self, dim: int, min_depth: float, max_depth: float, n_bins: int = N_BINS, seed: int = 0) -> None:
        super().__init__()
        if not 0 < min_depth < max_depth:
            raise ValueError(f"min_depth={min_depth} must be above 0 and below max_depth={max_depth}")
        self.linear = nn.Linear(dim, n_bins)
        self.register_buffer("bins", torch.linspace(min_depth, max_depth, n_bins))
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.linear.weight.copy_(0.01 * torch.randn(n_bins, dim, generator=draw))
            self.linear.bias.zero_()

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Predict depths in metres, [H, W] with (H, W) = `size`, from the tokens [h, w, F] of h x w patches."""
        logits = self.linear(tokens).permute(2, 0, 1)[None]  # [1, K, h, w]
        logits = F.interpolate(logits, scale_factor=UPSAMPLE, mode="bilinear", align_corners=False)
        weights = logits.relu() + BIN_FLOOR
        metres = torch.einsum("bkhw,k->bhw", weights / weights.sum(dim=1, keepdim=True), self.bins)
        return F.interpolate(metres[:, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def scale_invariant_loss(predicted: Tensor, depth: Tensor) -> Tensor:
    """Compute the scale-invariant loss of a depth prediction, sqrt(variance + 0.15 * mean^2) of the log error.

    `predicted` and `depth`, [n] in metres, contain only the pixels whose true depth is known. The log error of a pixel
    is log predicted - log depth.
    """
    difference = (predicted + LOG_EPS).log() - (depth + LOG_EPS).log()
    spread = difference.var(correction=0) + MEAN_WEIGHT * difference.mean().square()
    return (spread + 1e-12).sqrt()  # the root has no gradient at zero


def gradient_loss(predicted: Tensor, depth: Tensor, known: Tensor) -> Tensor:
    """Compute how much the log error of a depth prediction differs between neighbouring pixels, at four strides.

    The log error of a pixel is log predicted - log depth. At stride s, only every s-th row and column is used. The
    absolute differences between vertical or horizontal neighbours that are both known are added up and divided by the
    number of known pixels. The result is the sum over the strides.

    Args:
        predicted: predicted depths in metres, [H, W].
        depth: true depths in metres, [H, W].
        known: bool [H, W], True for pixels whose true depth is known.

    Returns:
        a scalar tensor.
    """
    total = predicted.new_zeros(())
    for stride in STRIDES:
        p, d, k = (part[::stride, ::stride] for part in (predicted, depth, known))
        error = torch.where(k, (p + LOG_EPS).log() - (d + LOG_EPS).log(), 0.0)
        down = (error[1:] - error[:-1]).abs() * (k[1:] & k[:-1])
        right = (error[:, 1:] - error[:, :-1]).abs() * (k[:, 1:] & k[:, :-1])
        total = total + (down.sum() + right.sum()) / k.sum().clamp(min=1)
    return total


def depth_metrics(predicted: Tensor, depth: Tensor) -> tuple[float, float, float]:
    """Compute the RMSE in metres, the AbsRel and the delta1 of one image.

    AbsRel is the mean relative error, and delta1 is the share of pixels predicted within a factor of 1.25. `predicted`
    and `depth`, [n] in metres, contain only the pixels whose true depth is known.
    """
    p, d = predicted.double(), depth.double()
    ratio = torch.maximum(p / d, d / p)
    return (
        (p - d).square().mean().sqrt().item(),
        ((p - d).abs() / d).mean().item(),
        (ratio < 1.25).double().mean().item(),
    )


def _in_range(depth: Tensor, bins: Tensor) -> Tensor:
    """Return which pixels of a map count: those with a depth in the range of the head's `bins`. The result is bool,
    with the shape of `depth`."""
    return (depth > bins[0].item()) & (depth <= bins[-1].item())


def fit_depth(
    head: LinearDepth,
    train: DenseData,
    training: HeadTraining,
    *,
    gradient_weight: float = GRADIENT_WEIGHT,
    advance: Advance = lambda count: None,
) -> float:
    """Train a head in place on the tokens of `train`, and return the loss of the last iteration.

    The other arguments are those of `evaluate_depth`.

    Raises:
        ValueError: the maps contain no depth in the range of the head's bins.
        FloatingPointError: the head's loss is not finite.
    """

    def loss_of(tokens: list[Tensor], maps: list[Tensor]) -> Tensor:
        pairs = [(head(t, (d.shape[0], d.shape[1])), d) for t, d in zip(tokens, maps, strict=True)]
        inside = [_in_range(d, head.bins) for d in maps]
        p = torch.cat([photo[k] for (photo, _), k in zip(pairs, inside, strict=True)])
        d = torch.cat([depth[k] for (_, depth), k in zip(pairs, inside, strict=True)])
        if not len(d):  # no map in the batch has a known pixel, so there is nothing to learn
            return pairs[0][0].sum() * 0
        gradients = [gradient_loss(photo, depth, k) for (photo, depth), k in zip(pairs, inside, strict=True)]
        return scale_invariant_loss(p, d) + gradient_weight * torch.stack(gradients).mean()

    if not any(bool(_in_range(train[index][1], head.bins).any()) for index in range(len(train))):
        raise ValueError(f"no train map has a depth {_range_of(head)}")
    return train_head(head, train, loss_of, training, advance)


@torch.no_grad()
def score_depth(head: LinearDepth, val: DenseData, loss: float) -> DepthReport:
    """Score a head on `val` at the original size of each map. `loss` is the last training loss.

    Raises:
        ValueError: the maps contain no depth in the range of the head's bins.
    """
    metrics = []
    for index, pair in enumerate(val.pairs):
        depth = val.read_target(pair.target)
        inside = _in_range(depth, head.bins)
        if inside.any():
            metres = head(val[index][0], (depth.shape[0], depth.shape[1])).cpu()
            metres = metres.clamp(head.bins[0].item(), head.bins[-1].item())
            metrics.append(depth_metrics(metres[inside], depth[inside]))
    if not metrics:
        raise ValueError(f"no val map has a depth {_range_of(head)}")
    rmse, abs_rel, delta1 = np.mean(metrics, axis=0).tolist()
    return DepthReport(rmse, abs_rel, delta1, len(metrics), loss)


def check_depths_differ(head: LinearDepth, data: Sequence[DenseData]) -> None:
    """Check that the maps contain at least two different depths in the range of the head's bins.

    Raises:
        NoMeaning: all depths in this range are equal, so the head would predict this depth for every model.
    """
    low, high = torch.inf, -torch.inf
    for part in data:
        for pair in part.pairs:
            depth = part.read_target(pair.target)
            inside = depth[_in_range(depth, head.bins)]
            if len(inside):
                low, high = min(low, inside.min().item()), max(high, inside.max().item())
        if low < high:
            return
    if low == high:
        raise NoMeaning(f"every known depth in the maps is {low:g} m: the head would predict it, whatever the model")


def _range_of(head: LinearDepth) -> str:
    return f"above min_depth={head.bins[0].item():g} and up to max_depth={head.bins[-1].item():g}"


def evaluate_depth(
    train: DenseData,
    val: DenseData,
    training: HeadTraining,
    *,
    min_depth: float,
    max_depth: float,
    n_bins: int = N_BINS,
    gradient_weight: float = GRADIENT_WEIGHT,
    advance: Advance = lambda count: None,
) -> DepthReport:
    """Train a linear depth head on the tokens of `train`, and score it on `val` at the original size of each map.

    Args:
        train: training data, with maps from `read_depth` and with class tokens (`with_cls`).
        val: data to score on, with the same kind of maps and tokens.
        training: iterations, batch size, learning rate, weight decay and seed.
        min_depth: depth of the first bin, metres. Only pixels with a larger depth count.
        max_depth: depth of the last bin, metres. Pixels with a larger depth do not count.
        n_bins: number of bins.
        gradient_weight: weight of the gradient loss.
        advance: called with 1 after each iteration.

    Raises:
        ValueError: `min_depth` is not above 0 or not below `max_depth`, or the maps in `train` or in `val` contain no
            depth in this range.
        NoMeaning: all depths in this range are equal.
        FloatingPointError: the head's loss or a weight of the head is not finite.
    """
    first = train[0][0]
    head = LinearDepth(first.shape[-1], min_depth, max_depth, n_bins, training.seed).to(first.device)
    check_depths_differ(head, (train, val))
    loss = fit_depth(head, train, training, gradient_weight=gradient_weight, advance=advance)
    return score_depth(head, val, loss)
