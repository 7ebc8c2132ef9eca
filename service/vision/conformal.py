"""Decide whether an image belongs to none of the known classes, at an error rate that the user chooses.

This is conformal prediction (Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005). Each image has a
score that is high if the image is similar to the known images. The p-value of an image is the share of known images
whose score is not higher than its own. An image is unknown if its p-value is at most the error rate. If the image and
the known images are exchangeable (their order carries no information, as with random samples from the same source), an
image of a known class is called unknown with a probability of at most the error rate. docs/decisions/0026-unknown.md
gives the reasons and the measurements.
"""

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]


def p_values(calibration: npt.ArrayLike, scores: npt.ArrayLike) -> Scores:
    """Return the p-value of each score: (1 + the number of calibration scores that are not higher) / (m + 1).

    Args:
        calibration: the scores of m known images, in ascending order.
        scores: the scores of q images. A high score means that an image is similar to the known images.

    Returns:
        float64 [q], from 1 / (m + 1) to 1.
    """
    known = np.asarray(calibration, np.float64)
    not_higher = np.searchsorted(known, np.asarray(scores, np.float64), side="right")
    result: Scores = ((1 + not_higher) / (len(known) + 1)).astype(np.float64)
    return result


def least_error_rate(count: int) -> float:
    """Return the lowest error rate at which an image can be called unknown, given `count` calibration scores. It equals
    the lowest possible p-value."""
    return 1.0 / (count + 1)


def can_promise(count: int, error_rate: float) -> bool:
    """Return whether `count` calibration scores are enough for this error rate. With fewer, every p-value is above the
    error rate, so no image is called unknown."""
    return least_error_rate(count) <= error_rate
