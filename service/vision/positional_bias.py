"""Remove the part of patch features that depends on the position of a patch rather than on the image.

A network adds a learned position to each patch, and a trace of it remains in the features. Two patches at the same
place in two images are therefore more similar than their content. INSID3 (arXiv 2603.28480, 2026) measures this trace
on an image of zeros, which has no content, so its features differ only by position. The directions in which these
features vary most are removed from the features of other images.

INSID3 removes a fixed number of directions. Models differ in width, so this module removes the lowest number of
directions that explains a given share of the variance. docs/decisions/0028-find-region.md measures the effect.

Legend: N patches, D features, K directions. Basis: K orthogonal unit vectors, [K, D].
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from service.features.served_model import ServedModel

Floats = npt.NDArray[np.float32]

EXPLAINED: Final = 0.95
"""The share of the variance of the features of zeros that the removed directions explain."""
_MAX_GRIDS: Final = 16


def positional_basis(of_zeros: Floats, explained: float = EXPLAINED) -> Floats:
    """Return the directions in which the features of an image of zeros [N, D] vary most, float32 [K, D]. K is the
    lowest number of directions that explain the share `explained` of the variance, and at most half of D."""
    rows = of_zeros.astype(np.float64)
    values, directions = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[1:]
    total = float(np.sum(values**2))
    if total <= 1e-12 * float(np.sum(rows**2)):
        return np.zeros((0, rows.shape[1]), np.float32)  # the features do not depend on the position
    count = int(np.searchsorted(np.cumsum(values**2) / total, explained)) + 1
    return directions[: min(count, rows.shape[1] // 2)].astype(np.float32)


def without_bias(rows: Floats, basis: Floats) -> Floats:
    """Return the rows [N, D] without their components in the directions of the basis [K, D]."""
    return np.asarray(rows - (rows @ basis.T) @ basis, np.float32)


def basis_of(model: ServedModel, grid: tuple[int, int]) -> Floats:
    """Return the basis of a model for inputs with this grid of patches (h, w). The bases of the 16 grids that were
    computed last are kept. Call this function in a worker thread.

    Raises:
        ServiceError: the forward pass failed.
    """
    key = ("positional basis", grid)
    basis = model.derived.get(key)
    if basis is None:
        patch = model.config.patch_size
        basis = positional_basis(model.patches_of_zeros(grid[0] * patch, grid[1] * patch))
        model.keep(key, basis, most=_MAX_GRIDS)
    return np.asarray(basis, np.float32)
