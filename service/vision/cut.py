"""Cut the patches of an image into an object and its surroundings: the normalised cut of TokenCut (Wang et al. 2022,
arXiv 2202.11539; Shi and Malik 2000).

The patches are the nodes of a graph. Two patches are linked with the weight 1 if their cosine is above a threshold, and
with the weight `LINK` otherwise. A is the matrix of the weights, and D is the diagonal matrix of their sums. The vector
v is the generalised eigenvector of (D - A) v = l D v with the second smallest eigenvalue. The patches are divided into
two sides: those whose value of v is above the mean, and the others. The patch with the largest distance from the mean
is the seed, and the object is the connected part of its side that contains it.

- The features are the keys of the last block. docs/decisions/0024-no-object.md compares them with others.
- TokenCut's threshold is 0.2. With some models, nearly all cosines are higher, so this threshold would link nearly all
  patches. The default is therefore computed from the cosines of the image (`link_threshold`).
- The eigenvector is computed with Lanczos' method, which needs a few dozen products of A with a vector. The time of a
  dense solver would grow with the third power of the number of patches.

Legend: h, w size of the patch grid; n = h * w patches; D features; m patches that take part.
"""

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service.vision.foreground import MIN_SPREAD, otsu_threshold

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

LINK: Final = 1e-5
MAX_PATCHES: Final = 6400
"""The highest number of patches. The cosines of 6400 patches fill 164 MB."""

_ATTEMPTS: Final = 8
_THRESHOLD_SHARE: Final = 0.8
_SAMPLED_PATCHES: Final = 128
_STEPS: Final = 160
_RESIDUAL: Final = 1e-5


class Cut(NamedTuple):
    """An object that a cut separates.

    mask: bool [h, w], the connected part that contains the seed.
    value: the normalised cut of the mask, from 0 (separate) to 2.
    """

    mask: Mask
    value: float


def normalised_cut(
    features: Floats, grid: tuple[int, int], *, threshold: float | None = None, among: Mask | None = None
) -> Cut | None:
    """Separate one object. Return None if fewer than two patches take part, or if all of these are equal.

    Args:
        features: [n, D] the features of the patches, scaled to length 1, in row-major order.
        grid: (h, w).
        threshold: the cosine above which two patches are linked. If None, it is computed from the cosines.
        among: bool [h, w], the patches that take part. None means all.
    """
    kept = np.arange(len(features)) if among is None else np.flatnonzero(among)
    rows = features[kept]
    if len(rows) < 2 or spread(rows) <= MIN_SPREAD:
        return None
    cosines = rows @ rows.T  # [m, m]
    linked = (cosines > (link_threshold(rows) if threshold is None else threshold)).astype(np.float32)
    del cosines
    vector = second_eigenvector(linked)[1]
    vector -= vector.mean()
    seed = int(np.abs(vector).argmax())
    side = np.zeros(grid, bool)
    side.ravel()[kept] = vector * np.sign(vector[seed]) > 0
    mask = part_at(side, int(kept[seed]))
    return Cut(mask, _cut_value(linked, mask.ravel()[kept]))


def first_object(
    features: Floats, grid: tuple[int, int], *, threshold: float | None = None, among: Mask | None = None
) -> Cut | None:
    """Separate one object of at least 2 % of all patches, and of at least two patches. Return None if there is none.
    The arguments are those of `normalised_cut`.

    A cut often separates one or two patches that resemble nothing else. Such patches are removed from the graph, and
    the remaining patches are cut again, up to 8 cuts.
    """
    remaining = np.ones(grid, bool) if among is None else among.copy()
    for _ in range(_ATTEMPTS):
        cut = normalised_cut(features, grid, threshold=threshold, among=remaining)
        if cut is None or cut.mask.sum() >= smallest_object(grid):
            return cut
        remaining &= ~cut.mask
    return None


def smallest_object(grid: tuple[int, int]) -> int:
    """Return the lowest number of patches that an object may have."""
    return max(2, -(-grid[0] * grid[1] // 50))


def second_eigenvector(linked: Floats) -> tuple[float, Doubles]:
    """Return the second smallest generalised eigenvalue of (D - A) v = l D v and its eigenvector [m].

    A is `LINK + (1 - LINK) * linked` for the symmetric matrix `linked` [m, m] of zeros and ones, and D is the diagonal
    matrix of the sums of A's rows. The method of Lanczos, with full orthogonalisation, is applied to D^-1/2 A D^-1/2,
    after the trivial eigenvector has been removed. It ends at a residual of 1e-5 or after 160 steps.
    """
    count = len(linked)
    degrees = LINK * count + (1 - LINK) * linked.sum(axis=1, dtype=np.float64)
    scale = 1 / np.sqrt(degrees)
    trivial = np.sqrt(degrees / degrees.sum())

    def product(vector: Doubles) -> Doubles:
        scaled = scale * vector
        linked_sum = linked @ scaled.astype(np.float32)
        result = scale * (LINK * scaled.sum() + (1 - LINK) * linked_sum)
        return np.asarray(result - trivial * (trivial @ vector))

    basis = np.empty((min(_STEPS, count - 1), count))  # [steps, m]
    diagonal: list[float] = []
    beside: list[float] = []
    current = np.cos(1.7 * np.arange(count) ** 2 + 0.3)  # any vector that has no regular structure
    current -= trivial * (trivial @ current)
    current /= _length(current)
    for step in range(len(basis)):
        basis[step] = current
        following = product(current)
        diagonal.append(float(current @ following))
        used = basis[: step + 1]
        for _ in range(2):  # rounding errors make one pass insufficient
            following -= trivial * (trivial @ following)
            following -= (used @ following) @ used
        length = _length(following)
        last = step + 1 == len(basis) or length < 1e-10
        if last or step % 8 == 7:
            largest, weights = _largest(diagonal, beside)
            if last or abs(length * weights[-1]) < _RESIDUAL:
                break
        beside.append(length)
        current = following / length
    vector = scale * (weights @ basis[: len(diagonal)])
    return 1 - largest, np.asarray(vector / _length(vector))


def _length(vector: Doubles) -> float:
    return math.sqrt(float(vector @ vector))  # several times faster than numpy's function


def _largest(diagonal: list[float], beside: list[float]) -> tuple[float, Doubles]:
    """Return the largest eigenvalue of a symmetric tridiagonal matrix and its eigenvector."""
    matrix = np.diag(diagonal)
    if beside:
        matrix += np.diag(beside, 1) + np.diag(beside, -1)
    values, vectors = np.linalg.eigh(matrix)
    return float(values[-1]), vectors[:, -1]


def link_threshold(rows: Floats) -> float:
    """Return the cosine above which two of the patches [m, D] are linked.

    Otsu's threshold divides the cosines into low and high ones. The result lies between the mean of the low cosines and
    Otsu's threshold, at 0.8 of the way. If all cosines are high, the result is high too, so it still divides the
    patches. It is computed from at most 128 patches.
    """
    sample = rows[:: -(-len(rows) // _SAMPLED_PATCHES)]
    cosines = (sample @ sample.T)[np.triu_indices(len(sample), 1)]
    if not len(cosines):
        return 0.0
    middle = otsu_threshold(cosines)
    low = float(cosines[cosines <= middle].mean())
    return low + _THRESHOLD_SHARE * (middle - low)


def spread(rows: Floats) -> float:
    """Return the mean squared distance of the rows [m, D] from their mean, divided by their mean squared length."""
    mean = rows.mean(axis=0, dtype=np.float64)
    square = float(np.square(rows, dtype=np.float64).sum(axis=1).mean())
    return 1 - float(mean @ mean) / square if square > 0 else 0.0


def part_at(mask: Mask, index: int) -> Mask:
    """Return the part of `mask` [h, w] that contains the patch `index` and is connected through common edges. Return an
    empty mask if this patch is not in `mask`."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask)
    label = labels.ravel()[index]
    return np.asarray((labels == label) & (label > 0))


def _cut_value(linked: Floats, inside: Mask) -> float:
    """Return the normalised cut between the patches in `inside` [m] and the others."""
    ones = inside.astype(np.float32)
    total = LINK * len(linked) + (1 - LINK) * linked.sum(axis=1, dtype=np.float64)
    within = LINK * ones.sum() + (1 - LINK) * (linked @ ones).astype(np.float64)  # links of each patch to the inside
    crossing = float(within[~inside].sum())
    return crossing / float(total[inside].sum()) + crossing / max(float(total[~inside].sum()), 1e-12)
