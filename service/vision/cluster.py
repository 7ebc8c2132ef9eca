"""Group the patches of an image by their features, with k-means (Lloyd 1982; k-means++, Arthur and Vassilvitskii
2007).

The result is deterministic: the random choices have a fixed seed. If the number of groups is not given, the numbers
from 2 to 8 are compared by their simplified silhouette (Hruschka et al. 2006). For a patch, this is (b - a) / max(a,
b), where a is its distance to the centre of its own group, and b is its distance to the nearest other centre. The
number of groups with the highest mean over all patches is chosen.

Legend: h, w size of the patch grid; n = h * w patches; D features; k groups.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from service.vision.cut import spread
from service.vision.foreground import MIN_SPREAD

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

MAX_GROUPS: Final = 32

_CHOICES: Final = range(2, 9)
_STARTS: Final = 4
_ITERATIONS: Final = 50
_SEED: Final = 0


def cluster(features: Floats, k: int | None = None) -> Indices:
    """Divide patches into groups and return the group of each patch, int64 [n]. The groups are numbered from 0, the
    largest first. If all patches are equal, they form one group. There are never more groups than different patches.

    Args:
        features: [n, D] the features of the patches, scaled to length 1.
        k: the number of groups, or None to choose it.
    """
    if len(features) < 2 or spread(features) <= MIN_SPREAD:
        return np.zeros(len(features), np.int64)
    if k is not None:
        return _by_size(k_means(features, min(k, len(features)))[0])
    best, best_score = np.zeros(len(features), np.int64), -np.inf
    for count in _CHOICES:
        if count > len(features):
            break
        labels, centres = k_means(features, count)
        if (score := silhouette(features, labels, centres)) > best_score:
            best, best_score = labels, score
    return _by_size(best)


def k_means(features: Floats, k: int) -> tuple[Indices, Floats]:
    """Run k-means from four random starts. Return the group of each patch [n] and the centres [k, D] from the run with
    the smallest sum of squared distances."""
    rng = np.random.default_rng(_SEED)
    best: tuple[float, Indices, Floats] | None = None
    for _ in range(_STARTS):
        labels, centres = _lloyd(features, _first_centres(features, k, rng))
        error = float(np.square(features - centres[labels], dtype=np.float64).sum())
        if best is None or error < best[0]:
            best = error, labels, centres
    assert best is not None
    return best[1], best[2]


def silhouette(features: Floats, labels: Indices, centres: Floats) -> float:
    """Return the mean simplified silhouette of the groups, from -1 to 1."""
    distances = np.sqrt(_squared_distances(features, centres))  # [n, k]
    own = np.take_along_axis(distances, labels[:, None], axis=1)[:, 0]
    np.put_along_axis(distances, labels[:, None], np.inf, axis=1)
    nearest = distances.min(axis=1)
    return float(((nearest - own) / np.maximum(np.maximum(nearest, own), 1e-12)).mean())


def _first_centres(features: Floats, k: int, rng: np.random.Generator) -> Floats:
    """Choose k patches as the first centres. The probability of each is its squared distance to the nearest centre that
    is already chosen."""
    chosen = [int(rng.integers(len(features)))]
    nearest = _squared_distances(features, features[chosen])[:, 0].astype(np.float64)
    for _ in range(k - 1):
        total = float(nearest.sum())
        weights = nearest / total if total > 0 else None
        chosen.append(int(rng.choice(len(features), p=weights)))
        nearest = np.minimum(nearest, _squared_distances(features, features[chosen[-1:]])[:, 0])
    return features[chosen]


def _lloyd(features: Floats, centres: Floats) -> tuple[Indices, Floats]:
    """Move the centres to the means of their groups until no patch changes its group. An empty group keeps its
    centre."""
    labels = np.full(len(features), -1, np.int64)
    for _ in range(_ITERATIONS):
        nearest = _squared_distances(features, centres).argmin(axis=1)
        if np.array_equal(nearest, labels):
            break
        labels = nearest
        members = np.zeros((len(centres), len(features)), np.float32)
        members[labels, np.arange(len(features))] = 1
        counts = members.sum(axis=1, keepdims=True)
        centres = np.where(counts > 0, members @ features / np.maximum(counts, 1), centres)
    return labels, centres


def _squared_distances(features: Floats, centres: Floats) -> Floats:
    squares = np.square(features).sum(axis=1)[:, None] + np.square(centres).sum(axis=1)
    return np.asarray(np.maximum(squares - 2 * features @ centres.T, 0), np.float32)


def _by_size(labels: Indices) -> Indices:
    """Number the groups by their size, the largest first. Groups without patches get no number."""
    counts = np.bincount(labels)
    order = np.argsort(-counts, kind="stable")
    numbers = np.empty(len(counts), np.int64)
    numbers[order] = np.arange(len(counts))
    return numbers[labels]
