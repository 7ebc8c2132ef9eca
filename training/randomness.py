"""Random numbers that belong to a sample, not to a process.

A generator hands out numbers in turn, so what an image gets depends on who asked before: on the batch's size, the rank,
the device. Here a number is a hash of what it is for (seed, step, position in the step's batch, purpose): one rank
with a batch of 2b, two ranks with b, or micro-batches of it see the same crops, a resumed run needs no state, and no
draw moves another one. Counter-based generators are the known way (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011); the hash is SplitMix64's step and finaliser (Steele et al., OOPSLA 2014).

Only wrapping int64 arithmetic and one exact conversion: the same bits on every device. The tensors are tiny, so they
stay on the CPU unless the keys are elsewhere: a batch's choices are then known without waiting for the GPU.

Legend: n samples.
"""

import math

import torch
from torch import Tensor

FLOAT_BITS = 24  # a float32 in 0..1 holds this many evenly spaced bits


def _signed(word: int) -> int:
    """The 64 bits of `word` as the int64 that torch can hold."""
    return (word & (2**64 - 1)) - (word >> 63 & 1) * 2**64


# SplitMix64's step, and another odd one so that the children of `fork` and of `uniform` differ.
DRAW_STEP = _signed(0x9E3779B97F4A7C15)
FORK_STEP = _signed(0xD1342543DE82EF95)


def _shift(words: Tensor, bits: int) -> Tensor:
    """Logical shift right: torch's own keeps the sign."""
    return (words >> bits) & (2 ** (64 - bits) - 1)


def _mix(words: Tensor) -> Tensor:
    """SplitMix64's finaliser: every bit of an int64 moves about half of all the others."""
    words = (words ^ _shift(words, 30)) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ _shift(words, 27)) * _signed(0x94D049BB133111EB)
    return words ^ _shift(words, 31)


def sample_keys(seed: int, step: int, positions: Tensor) -> Tensor:
    """Keys int64 [n] of the samples at `positions` (int64 [n]) of the step's whole batch, over all ranks.

    Raises:
        ValueError: seed or step is no signed 64-bit number.
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

    Draws are named by number rather than counted, so that leaving one out moves no other.
    """

    def __init__(self, keys: Tensor) -> None:
        assert keys.dtype == torch.int64, keys.dtype
        assert keys.ndim == 1, keys.shape
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def fork(self, purpose: int) -> "SampleRandom":
        """The same samples with numbers of their own for `purpose`."""
        return SampleRandom(_mix(self.keys + _signed((purpose + 1) * FORK_STEP)))

    def views(self, n_views: int) -> "SampleRandom":
        """`n_views` forks in one, [n_views * n]: all samples' first views, then all second ones."""
        steps = torch.arange(1, n_views + 1, device=self.keys.device) * FORK_STEP
        return SampleRandom(_mix(self.keys + steps[:, None]).flatten())

    def uniform(self, draw: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Float32 [n, *shape], uniform in [0, 1) in steps of 2^-24."""
        elements = torch.arange(1, math.prod(shape) + 1, device=self.keys.device)
        states = _mix(self.keys + _signed((draw + 1) * DRAW_STEP))
        words = _mix(states[:, None] + elements * DRAW_STEP)  # [n, elements]
        return (_shift(words, 64 - FLOAT_BITS).float() * 2.0**-FLOAT_BITS).view(-1, *shape)
