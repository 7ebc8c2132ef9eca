"""Random numbers that depend on the sample (one image in one step) and not on the process that draws them.

With an ordinary generator, the numbers for an image depend on all earlier draws, and therefore on the batch size, the
rank and the device. Here a number is a hash of (seed, step, position in the step's batch, draw). The crops are
therefore the same whether one rank processes 2b images or two ranks process b images each, with or without
micro-batches. A resumed run needs no generator state, and no draw affects another. Such generators are called
counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The hash is built from the
increment and the finaliser of SplitMix64 (Steele et al., OOPSLA 2014).

Only wrapping int64 arithmetic and one exact conversion to float32 are used, so the bits are the same on every device.
A sample's key is the hash of (seed, step, position). Numbers are computed on the device on which the keys are
stored. Training stores them on the CPU, so that random choices are known without waiting for a GPU.

Legend: n samples.
"""

import math

import torch
from torch import Tensor

FLOAT_BITS = 24  # a float32 in 0..1 holds this many evenly spaced bits


def _signed(word: int) -> int:
    """Return the lowest 64 bits of `word` as a signed integer, which fits into a torch int64."""
    return (word & (2**64 - 1)) - (word >> 63 & 1) * 2**64


# SplitMix64's increment, and another odd number so that the results of `fork` and of `uniform` differ.
DRAW_STEP = _signed(0x9E3779B97F4A7C15)
FORK_STEP = _signed(0xD1342543DE82EF95)


def _shift(words: Tensor, bits: int) -> Tensor:
    """Shift int64 words right by `bits` (at least 1) and fill with zeros. torch's own shift copies the sign bit."""
    return (words >> bits) & (2 ** (64 - bits) - 1)


def _mix(words: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64 to int64 words.

    If one bit of a word changes, about half of the bits of the result change.
    """
    words = (words ^ _shift(words, 30)) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ _shift(words, 27)) * _signed(0x94D049BB133111EB)
    return words ^ _shift(words, 31)


def sample_keys(seed: int, step: int, positions: Tensor) -> Tensor:
    """Compute the keys of a step's samples, from which `SampleRandom` derives their random numbers.

    Args:
        seed: the run's seed.
        step: the number of the step.
        positions: the positions of n samples in the step's batch, counted over all ranks, int64 [n].

    Returns:
        one key for each sample, int64 [n].

    Raises:
        ValueError: `seed` or `step` does not fit into a signed 64-bit integer.
    """
    for name, value in (("seed", seed), ("step", step)):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}={value} must fit into 64 bits: -2**63 to 2**63 - 1")
    keys = torch.zeros((), dtype=torch.int64, device=positions.device)
    for word in (torch.full_like(keys, seed), torch.full_like(keys, step), positions):
        keys = _mix(keys + (word + 1) * FORK_STEP)
    return keys


class SampleRandom:
    """A source of random numbers for n samples with the given keys, int64 [n] (see `sample_keys`).

    A random number depends only on the sample's key, the draw's number, and the element's index within the draw. The
    caller numbers the draws, so skipping a draw does not change the others.
    """

    def __init__(self, keys: Tensor) -> None:
        assert keys.dtype == torch.int64, keys.dtype
        assert keys.ndim == 1, keys.shape
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def fork(self, purpose: int) -> "SampleRandom":
        """Return a new `SampleRandom` for the same samples. Different values of `purpose` give independent numbers."""
        return SampleRandom(_mix(self.keys + _signed((purpose + 1) * FORK_STEP)))

    def views(self, n_views: int) -> "SampleRandom":
        """Return a `SampleRandom` for `n_views` views of each of the n samples, with n_views * n keys.

        The first views of all samples come first, then the second views, and so on.
        """
        steps = torch.arange(1, n_views + 1, device=self.keys.device) * FORK_STEP
        return SampleRandom(_mix(self.keys + steps[:, None]).flatten())

    def uniform(self, draw: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Return uniform random numbers, float32 [n, *shape]. They are multiples of 2^-24 in the range [0, 1).

        `draw` is the number of the draw. The same draw with the same shape always gives the same numbers.
        """
        elements = torch.arange(1, math.prod(shape) + 1, device=self.keys.device)
        states = _mix(self.keys + _signed((draw + 1) * DRAW_STEP))
        words = _mix(states[:, None] + elements * DRAW_STEP)  # [n, elements]
        return (_shift(words, 64 - FLOAT_BITS).float() * 2.0**-FLOAT_BITS).view(-1, *shape)
