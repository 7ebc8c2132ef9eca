"""The order in which a run uses its images if sources or classes have given shares of the samples.

The images are divided into groups: sources, classes, or the classes of each source. Each group has a share of the
samples. Within a group, images are drawn without replacement: one random permutation of the group follows the other.
The groups take turns at regular intervals (Webster's method of apportionment), so the number of samples that a group
has had differs by about one from its share. An epoch contains as many batches as without shares, and the turns of an
epoch are shuffled.

The order depends only on the images, the shares, the seed and the epoch. A resumed run therefore continues with the
images that come next, and all ranks agree. The order of one epoch is computed at a time, in blocks, so that it needs
little memory for ten million images.

Legend: n images, G groups, t turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.data.dataset import Indices

Sampling = Literal["uniform", "balanced"]

BLOCK = 2**20
"""The number of images that are put into random order at once. A larger group is put into order as a whole."""

Numbers = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Mixture:
    """The source and the class of n images, and the rule for the share of each group.

    `sources` [n] contains numbers of sources, which are named in `names`. `classes` [n] contains class numbers, and -1
    for an image without a class. Images without a class count as one class. `weights` are the relative shares of the
    sources. If it is None, the images are not divided by source. If `balanced` is True, the classes (of each source if
    there are weights) have equal shares.

    Raises:
        ValueError: a source that has a weight has no image.
    """

    names: Sequence[str]
    sources: Numbers
    classes: Numbers
    weights: tuple[float, ...] | None
    balanced: bool

    def __post_init__(self) -> None:
        for number, n in enumerate(np.bincount(self.sources, minlength=len(self.names))):
            if self.weights is not None and not n:
                raise ValueError(f"data={self.names[number]} has a weight, but no image that can be read")

    def __len__(self) -> int:
        return len(self.sources)

    def among(self, indices: Indices) -> "Mixture":
        """Return the same rule for some of the images."""
        return Mixture(self.names, self.sources[indices], self.classes[indices], self.weights, self.balanced)

    def groups(self) -> tuple[Indices, npt.NDArray[np.float64]]:
        """Return the number of each image's group, int64 [n], and the share of each group, float64 [G]."""
        code = np.zeros(len(self), np.int64)
        n_classes = int(self.classes.max(initial=-1)) + 2 if self.balanced else 1
        if self.balanced:
            code += self.classes.astype(np.int64) + 1
        if self.weights is not None:
            code += self.sources.astype(np.int64) * n_classes
        codes = np.flatnonzero(np.bincount(code))
        numbers = np.zeros(codes.max(initial=0) + 1, np.int64)
        numbers[codes] = np.arange(len(codes))
        source = codes // n_classes
        weights = np.array(self.weights if self.weights is not None else (1.0,))
        shares = (weights / weights.sum())[source] / np.bincount(source)[source]
        return numbers[code], shares


class MixedOrder:
    """The order of n images that are divided into groups.

    Args:
        groups: number of each image's group, [n]; every group has an image.
        shares: share of each group in the samples, [G]; they add up to 1.
        seed: seed of the random choices.
    """

    def __init__(self, groups: Indices, shares: npt.NDArray[np.float64], seed: int) -> None:
        random = np.random.default_rng((seed, 0, 1))  # `batch_indices` uses two numbers, this order three
        self._seed, self._shares = seed, shares
        self._salt = random.integers(2**64, dtype=np.uint64)
        self._phases = random.random(len(shares))
        self._members = np.argsort(groups, kind="stable").astype(np.uint32)  # [n] the images, group by group
        self._sizes = np.bincount(groups, minlength=len(shares))
        self._starts = np.cumsum(self._sizes) - self._sizes

    def epoch(self, number: int, length: int) -> npt.NDArray[np.uint32]:
        """Return the images of an epoch of `length` samples, uint32 [length]. Epochs are numbered from 0."""
        first, last = (turns(self._shares, self._phases, length * n) for n in (number, number + 1))
        drawn = self._drawn(first, last)
        whose = np.repeat(np.arange(len(first), dtype=np.int32), last - first)
        np.random.default_rng((self._seed, number, 2)).shuffle(whose)
        order = np.empty_like(drawn)
        order[np.argsort(whose, kind="stable")] = drawn  # each group's turns keep the order of its permutations
        return order

    def _drawn(self, first: Indices, last: Indices) -> npt.NDArray[np.uint32]:
        """Return the images that each group draws in its turns `first` [G] to `last` [G], group by group."""
        begin = first // self._sizes
        n_rounds = np.where(last > first, (last - 1) // self._sizes + 1 - begin, 0)
        group = np.repeat(np.arange(len(first)), n_rounds)  # of each permutation that is needed
        turn = np.arange(len(group)) - np.repeat(np.cumsum(n_rounds) - n_rounds, n_rounds) + begin[group]
        ends = np.cumsum(self._sizes[group])
        cuts = np.flatnonzero(np.diff((ends - 1) // BLOCK)) + 1
        pieces = [
            self._permuted(group[part], turn[part], first, last)
            for part in (slice(a, b) for a, b in zip([0, *cuts], [*cuts, len(group)], strict=True))
        ]
        return np.concatenate(pieces)

    def _permuted(self, group: Indices, turn: Indices, first: Indices, last: Indices) -> npt.NDArray[np.uint32]:
        """Return the parts of some permutations that lie in the turns `first` to `last` of their groups.

        `group` and `turn` are the group of each permutation and its number in the group.
        """
        size = self._sizes[group]
        which = np.repeat(np.arange(len(group)), size)
        place = np.arange(len(which)) - np.repeat(np.cumsum(size) - size, size)  # in its permutation
        row = self._starts[group][which] + place
        keys = mixed(row.astype(np.uint64), turn.astype(np.uint64)[which], self._salt)
        keys = keys >> np.uint64(21) | which.astype(np.uint64) << np.uint64(43)  # at most BLOCK permutations
        order = np.argsort(keys, kind="stable")
        at = place + (turn * size)[which]
        return self._members[row[order[(at >= first[group][which]) & (at < last[group][which])]]]


def mixed(a: npt.NDArray[np.uint64], b: npt.NDArray[np.uint64], salt: np.uint64) -> npt.NDArray[np.uint64]:
    """Return a random 64-bit number for each pair of numbers, with the finaliser of SplitMix64.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    found = np.full(len(a), salt)
    for numbers in (a, b):
        found = (found ^ numbers) * np.uint64(0x9E3779B97F4A7C15)
        found = (found ^ found >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        found = (found ^ found >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        found = found ^ found >> np.uint64(31)
    return found


def turns(shares: npt.NDArray[np.float64], phases: npt.NDArray[np.float64], total: int) -> Indices:
    """Return how many of the first `total` turns each group has, int64 [G].

    At time t, a group with share s and phase p has had floor(s * t + p) turns. The first `total` turns in time are
    counted. Turns at the same time are ordered by the number of their group.

    Args:
        shares: share of each group in the turns, [G]; they add up to 1.
        phases: number from 0 to less than 1 for each group, [G], which shifts its turns.
        total: number of turns.
    """

    def by(time: float) -> Indices:
        return np.floor(shares * time + phases).astype(np.int64)

    low, high = 0.0, total + len(shares) + 1.0
    while low < (time := (low + high) / 2) < high:
        if (n := by(time).sum()) == total:
            return by(time)
        low, high = (time, high) if n < total else (low, time)
    counts = by(low)
    at_once = np.flatnonzero(by(high) > counts)
    counts[at_once[: total - counts.sum()]] += 1
    return counts


@dataclass
class MixedPlan:
    """A plan of a loader: the numbers of the images that this rank loads in a step, int64 [b].

    `share` is the slice of each batch that this rank loads. The plan keeps the orders of two epochs, because images
    of the next epoch may be decoded during the current one.
    """

    mixture: Mixture
    batch_size: int
    seed: int
    share: slice
    _order: MixedOrder | None = field(default=None, repr=False)
    _epochs: dict[int, npt.NDArray[np.uint32]] = field(default_factory=dict, repr=False)

    def among(self, indices: Indices) -> "MixedPlan":
        """Return the plan of a run that has only some of the images."""
        return MixedPlan(self.mixture.among(indices), self.batch_size, self.seed, self.share)

    def __call__(self, n_images: int, step: int) -> Tensor:
        assert n_images == len(self.mixture)
        if not 1 <= self.batch_size <= n_images:
            raise ValueError(f"batch_size={self.batch_size} must be 1 to {n_images}, the number of images")
        n_batches = n_images // self.batch_size
        number, position = divmod(step, n_batches)
        if number not in self._epochs:
            self._order = self._order or MixedOrder(*self.mixture.groups(), self.seed)
            self._epochs = {old: order for old, order in self._epochs.items() if abs(old - number) == 1}
            self._epochs[number] = self._order.epoch(number, n_batches * self.batch_size)
        batch = self._epochs[number][position * self.batch_size : (position + 1) * self.batch_size]
        return torch.from_numpy(batch[self.share].astype(np.int64))
