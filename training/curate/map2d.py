"""Positions of images on a map: the two first principal components of their embeddings.

Sums are exact, because the embeddings are first rounded to multiples of 1 / 4096. So the map does not depend on the
number of threads or on the order of summation.
"""

import numpy as np
import numpy.typing as npt

STEPS = 2**12  # per unit of an embedding's entries; the product of two is an integer below 2**24
DIRECTION_STEPS = 2**20
BLOCK = 2**14  # images

Positions = npt.NDArray[np.float64]


def positions(embedding: npt.NDArray[np.float32]) -> tuple[Positions, float]:
    """Return the positions of images on a map, [n, 2], and the share of the variance that the map shows.

    The positions are from 0 to 1 in the longer direction, and centred in the other. The sign of a principal component
    is arbitrary, so its entry with the largest magnitude is made positive. Memory for one block of images is needed
    besides the embeddings.

    Args:
        embedding: [n, D], entries from -1 to 1. It may be mapped from a file.
    """
    n = len(embedding)
    total, products = moments(embedding)
    mean = total / max(n, 1)
    covariance = products / max(n, 1) - np.outer(mean, mean)
    variances, directions = np.linalg.eigh(covariance)  # ascending
    directions = directions[:, ::-1][:, :2]  # [D, 2]
    largest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(directions[largest, np.arange(directions.shape[1])])
    steps = np.round(directions * DIRECTION_STEPS)
    result = np.zeros((n, 2))
    for start in range(0, n, BLOCK):
        block = _rounded(embedding[start : start + BLOCK])
        result[start : start + BLOCK, : steps.shape[1]] = block @ steps
    shown = variances[::-1][:2].sum() / max(variances.sum(), 1e-12)
    return _scaled(result), float(np.clip(shown, 0, 1))


def moments(embedding: npt.NDArray[np.float32]) -> tuple[Positions, Positions]:
    """Return the sums of the entries [D] and of their products [D, D], in units of 1 / `STEPS` and its square.

    They are integers below 2**53, so they are exact in whichever order they are added.
    """
    n, width = embedding.shape
    total, products = np.zeros(width), np.zeros((width, width))
    for start in range(0, n, BLOCK):
        block = _rounded(embedding[start : start + BLOCK])
        total += block.sum(axis=0)
        products += block.T @ block
    return total, products


def _rounded(block: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return np.round(block.astype(np.float64) * STEPS)


def _scaled(points: Positions) -> Positions:
    if not len(points):
        return points
    low, high = points.min(axis=0), points.max(axis=0)
    side = max((high - low).max(), 1.0)
    result: Positions = 0.5 + (points - (low + high) / 2) / side
    return result
