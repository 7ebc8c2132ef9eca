"""Reduce the patch features of one or more images to three numbers per patch, by principal component analysis (PCA).
Shown as red, green and blue, these numbers give similar parts similar colours, within an image and across images that
are analysed together (DINOv2 paper, arXiv 2304.07193, figure 1).

The sign of a principal component is arbitrary, and a different sign inverts a colour. `_oriented` therefore chooses the
sign by a rule that depends on the component alone: the dot product with a fixed reference direction is positive. Two
similar components get the same sign, unless both are nearly orthogonal to the reference direction. Rules that depend on
the largest number in a component, or on the distribution of the patches, change the sign more often when an image
changes slightly. docs/decisions/0023-attention-maps.md compares the rule with others.

Legend: n patches of all images together, D features, C components.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

COMPONENTS: Final = 3  # red, green, blue
TAIL: Final = 0.01
"""The fraction of patches whose values are clipped at each end of a colour channel. Without clipping, a few outliers
would leave little contrast for all other patches."""
MIN_SPREAD: Final = 1e-9
"""If the variance along a component is at most this fraction of the mean square of the features, it is rounding error,
and the component is dropped. Rounding errors of float32 alone give values of about 1e-13."""

_GOLDEN: Final = 0.6180339887498949


class Pca(NamedTuple):
    """The mean of the patches [D] and the components [C, D], as float64. The components are unit vectors, largest
    variance first. A component without variance is a zero vector."""

    mean: Doubles
    components: Doubles


def fit_pca(groups: Sequence[Floats], count: int = COMPONENTS) -> Pca:
    """Return the first `count` principal components of all rows of `groups`, each [n, D]. The rows are added up group
    by group, so only one group at a time is converted to float64.

    Raises:
        ValueError: there are no rows, or a feature is not finite.
    """
    from scipy.linalg import eigh

    rows = sum(map(len, groups))
    if not rows:
        raise ValueError("a principal component analysis needs at least one patch")
    mean = sum(group.sum(axis=0, dtype=np.float64) for group in groups) / rows
    if not np.isfinite(mean).all():  # the sum is finite only if all features are
        raise ValueError("patch features must be finite")
    width = len(mean)
    products = np.zeros((width, width))  # of the centred rows
    squares = 0.0
    for group in groups:
        centred = group.astype(np.float64) - mean
        products += centred.T @ centred
        squares += float(np.square(group, dtype=np.float64).sum())
    first = max(0, width - count)
    variances, vectors = eigh(products, subset_by_index=[first, width - 1])  # ascending
    components = np.zeros((count, width))
    for row, index in enumerate(reversed(range(len(variances)))):
        if variances[index] > MIN_SPREAD * squares:
            components[row] = _oriented(vectors[:, index])
    return Pca(np.asarray(mean), components)


def project(patches: Floats, pca: Pca) -> Floats:
    """Return the coordinates of the patches [n, D] along the components, float32 [n, C]. The coordinate along a
    component without variance is 0."""
    return np.asarray((patches - pca.mean) @ pca.components.T, np.float32)


def colour_range(coordinates: Floats) -> tuple[Floats, Floats]:
    """Return the lowest and the highest value that each channel shows, each [C]: two quantiles of the coordinates [n,
    C]."""
    low, high = np.quantile(coordinates, [TAIL, 1 - TAIL], axis=0)
    return low.astype(np.float32), high.astype(np.float32)


def to_colours(coordinates: Floats, limits: tuple[Floats, Floats]) -> Floats:
    """Scale coordinates [..., C] to colours from 0 to 1, and clip values outside the limits. A channel whose two limits
    are equal becomes 0.5."""
    low, high = limits
    span = high - low
    colours = np.full(coordinates.shape, 0.5, np.float32)
    np.divide(coordinates - low, span, out=colours, where=span > 0)
    return np.asarray(np.clip(colours, 0, 1))


def reference_direction(width: int) -> Doubles:
    """Return the direction [D] that decides the sign of a component. Its numbers are multiples of the golden ratio
    modulo 1, scaled to the range from -1 to 1, over which they are evenly spread. They are the same on every platform
    and in every version of numpy, unlike random numbers."""
    return np.asarray(2 * (np.arange(1, width + 1) * _GOLDEN % 1) - 1, np.float64)


def _oriented(component: Doubles) -> Doubles:
    """Return the component [D] or its negative, so that its dot product with the reference direction is positive."""
    return component if component @ reference_direction(len(component)) > 0 else np.negative(component)
