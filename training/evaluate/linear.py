"""The linear probe: linear heads, one for each combination of learning rate and input, trained on cached features.

The protocol is that of facebookresearch/dinov2 (`dinov2/eval/linear.py`). A head is a linear layer on the concatenated
class tokens of the last 1 or 4 blocks, with or without the mean patch token of the last block. It is trained with SGD
with momentum 0.9, no weight decay and cosine decay to zero, for 12,500 iterations with batches of 1,024. The learning
rate is multiplied by batch size / 256. The main result is the val accuracy of the best head. It is slightly optimistic
if val is small, because the head is chosen on val. The accuracy of every head is reported too. Meta's code makes a new
random crop and flip of each image in each iteration. Here the features of one centre crop are computed once.

The features of an image are one row, [class token of block -4 | -3 | -2 | -1 | mean patch token]. The input of a head
is a range of adjacent columns of this row, and the weights of all heads with the same input form one matrix. The losses
of these heads are summed, and no two heads share a weight, so each head gets the same gradient as if it were trained
alone. This gradient has a closed form, so each step needs only two matrix products per input, without autograd and
without a loop over heads.

Legend: n images, b images in a batch, L blocks, D width, F features of an input, H learning rates, C classes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.evaluate.meaning import check_classification

MOMENTUM = 0.9
INIT_STD = 0.01
CODE_LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""The learning rates of the published code."""
PAPER_LRS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.5)
"""The learning rates of the paper."""


@dataclass(frozen=True, order=True)
class Head:
    """One linear head.

    Its input contains the class tokens of the last `blocks` blocks and, if `avgpool` is true, the mean patch token. Its
    learning rate is `lr` times batch size / 256.
    """

    blocks: int
    avgpool: bool
    lr: float


@dataclass(frozen=True)
class ProbeSettings:
    """The settings of the linear probe: which heads are trained, and how.

    There is one head for each combination of an entry in `lrs` (the learning rate), in `blocks` (the number of blocks)
    and in `avgpools` (whether the mean patch token is used). The learning rates are multiplied by batch_size / 256. If
    there are fewer images than `batch_size`, a batch repeats some of them.
    """

    lrs: Sequence[float] = CODE_LRS
    blocks: Sequence[int] = (1, 4)
    avgpools: Sequence[bool] = (False, True)
    iterations: int = 12_500
    batch_size: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class LinearReport:
    """The result of the linear probe: the val accuracy of every head, and the best head.

    If several heads share the highest accuracy, `best` is the first of them. `diverged` lists the heads with weights
    that are not finite. These have no accuracy.
    """

    accuracy: dict[Head, float]
    best: Head
    diverged: tuple[Head, ...] = ()


@dataclass
class _Group:
    """All heads with the same input, one for each of H learning rates.

    The input consists of F features, which are the columns `columns` in the result of `stack_features`. For C classes,
    `weight` is [F, H, C] and `bias` is [H, C].
    """

    columns: slice
    weight: Tensor
    bias: Tensor
    weight_momentum: Tensor
    bias_momentum: Tensor


def stack_features(cls: Tensor, mean: Tensor) -> Tensor:
    """Concatenate the class tokens and the mean patch token of each image, and return them as [n, (L + 1) D].

    `cls` [n, L, D] contains the class tokens of L blocks, with the last block last, and `mean` [n, D] the mean patch
    tokens.
    """
    return torch.cat((cls.flatten(1), mean), dim=1)


def batch_stream(n: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of image positions, int64 [batch_size], without end.

    The positions are taken from successive random permutations of the n images. A batch may span several permutations.
    """
    rest, epoch = np.empty(0, np.int64), 0
    while True:
        while len(rest) < batch_size:
            rest = np.concatenate((rest, np.random.default_rng((seed, epoch)).permutation(n)))
            epoch += 1
        yield torch.from_numpy(rest[:batch_size])
        rest = rest[batch_size:]


def _make_group(
    blocks: int, avgpool: bool, n_lrs: int, n_classes: int, depth: int, features: Tensor, seed: int
) -> _Group:
    """Make the heads for one input, one for each learning rate.

    All heads start with the same weights, so that the learning rates can be compared. The input is the class tokens of
    the last `blocks` of `depth` blocks and, if `avgpool` is true, the mean patch token.
    """
    dim = features.shape[1] // (depth + 1)
    columns = slice((depth - blocks) * dim, (depth + int(avgpool)) * dim)
    draw = torch.Generator().manual_seed(seed * 1000 + blocks * 2 + int(avgpool))
    start = INIT_STD * torch.randn(columns.stop - columns.start, 1, n_classes, generator=draw)
    weight = start.expand(-1, n_lrs, -1).to(features.device).contiguous()
    bias = torch.zeros(n_lrs, n_classes, device=features.device)
    return _Group(columns, weight, bias, torch.zeros_like(weight), torch.zeros_like(bias))


def _step(group: _Group, x: Tensor, labels: Tensor, lrs: Tensor) -> None:
    """Update all heads with the same input by one step of SGD, in place.

    `x` [b, F] contains the input features of b images, `labels` [b] their class numbers, and `lrs` [H] the learning
    rate of each head.
    """
    f, h, c = group.weight.shape
    logits = (x @ group.weight.view(f, h * c)).view(len(x), h, c) + group.bias
    gradient = logits.softmax(dim=2)
    gradient[torch.arange(len(x), device=x.device), :, labels] -= 1
    gradient /= len(x)  # gradient of the mean cross-entropy with respect to the logits, [b, H, C]
    group.weight_momentum.view(f, h * c).mul_(MOMENTUM).addmm_(x.T, gradient.view(len(x), h * c))
    group.bias_momentum.mul_(MOMENTUM).add_(gradient.sum(dim=0))
    group.weight.sub_(group.weight_momentum * lrs[:, None])
    group.bias.sub_(group.bias_momentum * lrs[:, None])


def _accuracy(group: _Group, features: Tensor, labels: Tensor, rows: int = 4096) -> list[float]:
    """Return, for each head of the group, the share of images that it classifies correctly.

    `features` is the result of `stack_features`. The logits of `rows` images are computed at a time.
    """
    f, h, c = group.weight.shape
    right = torch.zeros(h, dtype=torch.long, device=features.device)
    for top in range(0, len(features), rows):
        x = features[top : top + rows, group.columns]
        logits = (x @ group.weight.view(f, h * c)).view(len(x), h, c) + group.bias
        right += (logits.argmax(dim=2) == labels[top : top + rows, None]).sum(dim=0)
    return (right.double() / len(features)).tolist()


def _finite(group: _Group) -> list[bool]:
    """Return, for each head of the group, whether all its weights are finite."""
    finite: list[bool] = (group.weight.isfinite().all(dim=2).all(dim=0) & group.bias.isfinite().all(dim=1)).tolist()
    return finite


@torch.no_grad()
def train_heads(
    features: Tensor,
    labels: Tensor,
    n_classes: int,
    *,
    depth: int,
    settings: ProbeSettings,
    advance: Callable[[int], object] = lambda count: None,
) -> dict[tuple[int, bool], _Group]:
    """Train all heads, and return them in groups, one for each input.

    The key of a group is a pair: the number of blocks, and whether the mean patch token is used. `depth` is the number
    of blocks with class tokens in `features`. The other arguments are those of `evaluate_linear`.
    """
    lrs, seed = settings.lrs, settings.seed
    groups = {
        (blocks, avgpool): _make_group(blocks, avgpool, len(lrs), n_classes, depth, features, seed)
        for blocks in settings.blocks
        for avgpool in settings.avgpools
    }
    scaled = torch.tensor(lrs, dtype=torch.float64) * settings.batch_size / 256
    cosine = (1 + np.cos(np.pi * np.arange(settings.iterations) / settings.iterations)) / 2
    stream = batch_stream(len(features), settings.batch_size, seed)
    for factor in cosine.tolist():
        batch = next(stream).to(features.device)
        x, y, now = features[batch], labels[batch], (scaled * factor).to(features)
        for group in groups.values():
            _step(group, x[:, group.columns], y, now)
        advance(1)
    return groups


@torch.no_grad()
def evaluate_linear(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    *,
    depth: int,
    settings: ProbeSettings | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> LinearReport:
    """Train the heads that `settings` defines, and compute the accuracy of each on val.

    Args:
        train: features of the n training images from `stack_features`, float32 [n, (depth + 1) D].
        train_labels: class numbers of the training images, [n].
        val: features of the m val images, float32 [m, (depth + 1) D], on the same device.
        val_labels: class numbers of the val images, [m]. Classes that occur only in val are never predicted.
        depth: number of blocks with class tokens in the features.
        settings: which heads are trained, and how; None: the published protocol.
        advance: called with 1 after each iteration.

    Raises:
        ValueError: there are no heads or no images, a setting is not above 0, or a head needs more than `depth` blocks.
        NoMeaning: the accuracy on val would be the same for every model.
        FloatingPointError: every head has weights that are not finite.
    """
    settings = settings or ProbeSettings()
    lrs, blocks, iterations, batch_size = settings.lrs, settings.blocks, settings.iterations, settings.batch_size
    if not lrs or not blocks or not settings.avgpools:
        raise ValueError("a linear probe needs at least one value each for lrs, blocks and avgpools")
    if min(lrs) <= 0 or iterations < 1 or batch_size < 1:
        raise ValueError(f"lrs={list(lrs)}, iterations={iterations}, batch_size={batch_size} must be above 0")
    if min(blocks) < 1 or max(blocks) > depth:
        raise ValueError(f"blocks={list(blocks)}: each must be from 1 to {depth}, the number of blocks in the features")
    if not len(train) or not len(val):
        raise ValueError(f"a linear probe needs images of both splits, found {len(train)} and {len(val)}")
    check_classification(train_labels, val_labels)
    n_classes = int(train_labels.max()) + 1
    groups = train_heads(train, train_labels, n_classes, depth=depth, settings=settings, advance=advance)
    shares, diverged = dict[Head, float](), list[Head]()
    for (count, avgpool), group in groups.items():
        for lr, share, finite in zip(lrs, _accuracy(group, val, val_labels), _finite(group), strict=True):
            head = Head(count, avgpool, lr)
            if finite:
                shares[head] = share
            else:
                diverged.append(head)
    if not shares:
        raise FloatingPointError(f"all {len(diverged)} heads of the linear probe have weights that are NaN or infinite")
    return LinearReport(shares, max(shares, key=lambda head: shares[head]), tuple(diverged))
