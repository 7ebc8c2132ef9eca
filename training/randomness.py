"""Random numbers that belong to a sample and not to a process.

A generator hands out numbers in turn, so an image's numbers depend on all draws before: on the batch's size, the rank
and the device. Here a number is a hash of its purpose (seed, step, position in the step's batch, draw). One rank with a
batch of 2b, two ranks with b, and micro-batches all see the same crops. A resumed run needs no generator state, and a
draw does not affect any other. Counter-based generators are the known method (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", SC 2011); the hash is SplitMix64's step and finaliser (Steele et al., OOPSLA 2014).

Only wrapping int64 arithmetic and one exact conversion are used, so the bits are the same on every device. The tensors
are tiny and stay on the CPU unless the keys are elsewhere: then a batch's choices are known without waiting for a GPU.

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
    """Apply SplitMix64's finaliser: every bit of an int64 flips about half of all the others."""
    words = (words ^ _shift(words, 30)) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ _shift(words, 27)) * _signed(0x94D049BB133111EB)
    return words ^ _shift(words, 31)


def sample_keys(seed: int, step: int, positions: Tensor) -> Tensor:
    """Return keys int64 [n] of the samples at `positions` (int64 [n]) of the step's whole batch, over all ranks.

    Raises:
        ValueError: seed or step is not a signed 64-bit number.
    """
    for name, value in (("seed", seed), ("step", step)):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}={value} must fit into 64 bits: -2**63 to 2**63 - 1")
    keys = torch.zeros((), dtype=torch.int64, device=positions.device)
    for word in (torch.full_like(keys, seed), torch.full_like(keys, step), positions):
        keys = _mix(keys + (word + 1) * FORK_STEP)
    return keys


class SampleRandom:
    """Random numbers of n samples with the int64 `keys` [n]; a pure function of (key, draw, element).

    Draws are named by number and not counted, so that skipping one does not change the others.
    """

    def __init__(self, keys: Tensor) -> None:
        assert keys.dtype == torch.int64, keys.dtype
        assert keys.ndim == 1, keys.shape
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def fork(self, purpose: int) -> "SampleRandom":
        """Return the same samples with separate numbers for `purpose`."""
        return SampleRandom(_mix(self.keys + _signed((purpose + 1) * FORK_STEP)))

    def views(self, n_views: int) -> "SampleRandom":
        """Return `n_views` forks as one, [n_views * n]: all samples' first views, then all second ones, and so on."""
        steps = torch.arange(1, n_views + 1, device=self.keys.device) * FORK_STEP
        return SampleRandom(_mix(self.keys + steps[:, None]).flatten())

    def uniform(self, draw: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Return float32 [n, *shape], uniform in [0, 1) in steps of 2^-24."""
        elements = torch.arange(1, math.prod(shape) + 1, device=self.keys.device)
        states = _mix(self.keys + _signed((draw + 1) * DRAW_STEP))
        words = _mix(states[:, None] + elements * DRAW_STEP)  # [n, elements]
        return (_shift(words, 64 - FLOAT_BITS).float() * 2.0**-FLOAT_BITS).view(-1, *shape)
