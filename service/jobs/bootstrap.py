"""The bootstrap distribution of a mean, without random numbers.

A bootstrap sample of n scores is n draws with replacement. If the scores are multiples of a common step, the sum of the
draws has a discrete distribution: the n-fold convolution of the distribution of one draw. It is computed with a Fourier
transform. The result is the limit of infinitely many bootstrap samples, so it is the same in every call, and even a
probability of one in 100,000 is exact.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.fft

IntArray = npt.NDArray[np.int64]


def bootstrap_quantiles(scores: IntArray, probabilities: Sequence[float]) -> list[float]:
    """Return quantiles of the bootstrap distribution of the mean of n scores [n], which are integers.

    The quantile for a probability p is the smallest mean m for which a bootstrap sample has a mean of at most m with
    probability p or more. Rounding errors are below 1e-10, so p should be between 1e-8 and 1 - 1e-8.

    Raises:
        ValueError: there are no scores.
    """
    n = len(scores)
    if n == 0:
        raise ValueError("0 scores: the bootstrap needs at least one")
    lowest, highest = int(scores.min()), int(scores.max())
    if lowest == highest:
        return [float(lowest)] * len(probabilities)
    one_draw = np.bincount(scores - lowest) / n
    sums = n * (highest - lowest) + 1  # the sum of n draws, minus n * lowest, is below this number
    size = scipy.fft.next_fast_len(sums, real=True)
    pmf = scipy.fft.irfft(scipy.fft.rfft(one_draw, size) ** n, size)[:sums]
    cdf = np.cumsum(np.maximum(pmf, 0))
    found = np.minimum(np.searchsorted(cdf / cdf[-1], probabilities), sums - 1)
    return [lowest + float(position) / n for position in found]
