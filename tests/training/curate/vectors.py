"""Vectors of length 1 around random centres, for the tests of clustering and of neighbours."""

import numpy as np

from training.curate.kmeans import Floats


def unit(vectors: np.ndarray) -> Floats:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def around_centres(n: int, centres: int = 20, dimensions: int = 16, spread: float = 0.2, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    middle = rng.normal(size=(centres, dimensions))
    return unit(middle[rng.integers(centres, size=n)] + spread * rng.normal(size=(n, dimensions)))
