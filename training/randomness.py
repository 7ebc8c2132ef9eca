"""Random numbers that depend on the sample (one image in one step) and not on the process that draws them.

With an ordinary generator, the numbers of an image depend on all earlier draws, and so on the batch size, the rank and
the device. Here a number is a hash of what it is for: (seed, step, position in the step's batch, draw). The crops are
therefore the same for one rank with a batch of 2b images, for two ranks with b images each, and for micro-batches. A
resumed run needs no generator state, and no draw affects another. Such generators are known as counter-based (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The hash is the step and the finaliser of SplitMix64
(Steele et al., OOPSLA 2014).

Only wrapping int64 arithmetic and one exact conversion are used, so the bits are the same on every device. Numbers are
computed on the device of the keys. Training keeps the keys on the CPU, so that random choices are known without waiting
for a GPU.

Legend: n samples.
"""

import math

import torch
from torch import Tensor

FLOAT_BITS = 24  # a float32 in 0..1 holds this many evenly spaced bits


def _signed(word: int) -> int:
    """Return the 64 bits of `word` as an int64, which torch can hold."""
    return (word & (2**64 - 1)) - (word >> 63 & 1) * 2**64


# SplitMix64's step, and another odd number so that the results of `fork` and of `uniform` differ.
DRAW_STEP = _signed(0x9E3779B97F4A7C15)
FORK_STEP = _signed(0xD1342543DE82EF95)


def _shift(words: Tensor, bits: int) -> Tensor:
    """Shift right logically; torch's own shift keeps the sign."""
    return (words >> bits) & (2 ** (64 - bits) - 1)


def _mix(words: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64 to int64 words. Changing one bit of a word changes about half of its bits."""
    words = (words ^ _shift(words, 30)) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ _shift(words, 27)) * _signed(0x94D049BB133111EB)
    return words ^ _shift(words, 31)


def sample_keys(seed: int, step: int, positions: Tensor) -> Tensor:
    """Return the keys, int64 [n], of the samples at `positions` (int64 [n]) in the step's batch of all ranks.

    Raises:
        ValueError: seed or step does not fit into a signed 64-bit number.
    """
    for name, value in (("seed", seed), ("step", step)):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}={value} must fit into 64 bits: -2**63 to 2**63 - 1")
    keys = torch.zeros((), dtype=torch.int64, device=positions.device)
    for word in (torch.full_like(keys, seed), torch.full_like(keys, step), positions):
        keys = _mix(keys + (word + 1) * FORK_STEP)
    return keys


class SampleRandom:
    """The random numbers of n samples, given by their keys, int64 [n].

    A number depends only on the key, the draw and the index of the element. The caller numbers the draws, so skipping a
    draw does not change the others.
    """

    def __init__(self, keys: Tensor) -> None:
        assert keys.dtype == torch.int64, keys.dtype
        assert keys.ndim == 1, keys.shape
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def fork(self, purpose: int) -> "SampleRandom":
        """Return a `SampleRandom` of the same samples, whose numbers are independent of all other purposes."""
        return SampleRandom(_mix(self.keys + _signed((purpose + 1) * FORK_STEP)))

    def views(self, n_views: int) -> "SampleRandom":
        """Return a `SampleRandom` with a key per view, [n_views * n].

        The first views of all samples come first, then the second views, and so on.
        """
        steps = torch.arange(1, n_views + 1, device=self.keys.device) * FORK_STEP
        return SampleRandom(_mix(self.keys + steps[:, None]).flatten())

    def uniform(self, draw: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Return the numbers of a draw, float32 [n, *shape], uniform in [0, 1) in steps of 2^-24."""
        elements = torch.arange(1, math.prod(shape) + 1, device=self.keys.device)
        states = _mix(self.keys + _signed((draw + 1) * DRAW_STEP))
        words = _mix(states[:, None] + elements * DRAW_STEP)  # [n, elements]
        return (_shift(words, 64 - FLOAT_BITS).float() * 2.0**-FLOAT_BITS).view(-1, *shape)
