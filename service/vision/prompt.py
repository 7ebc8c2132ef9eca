"""Segment the region that a user points at: points, a box or a mask in, the similar region out. Only the patch features
are needed, so each further click on an image costs a few milliseconds if its features are kept.

- Points and masks: a patch belongs to the region if its highest cosine to a positive patch is above Otsu's threshold of
  these cosines, and above its highest cosine to a negative patch. The region is then described by its mean, and the
  step is repeated once with this mean as a further positive patch.
- A box: all patches outside are negative, and the patches inside are divided by a simple form of GrabCut (Rother et al.
  2004). The positive and the negative patches are each described by a few centres of k-means. Patches in the box that
  are nearer to a negative centre become negative, and this is repeated until nothing changes.

Legend: h, w size of the patch grid; n = h * w patches; D features.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from service.vision.cluster import k_means
from service.vision.foreground import otsu_threshold

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_CENTRES: Final = 4
_ROUNDS: Final = 5


def similar_region(features: Floats, positive: Mask, negative: Mask, *, connected: bool = True) -> Mask:
    """Return the patches that are similar to the positive ones, bool [h, w].

    Args:
        features: [n, D] the features of the patches, scaled to length 1.
        positive, negative: bool [h, w]. At least one patch is positive.
        connected: return only the parts that contain a positive patch.
    """
    positives, negatives = features[positive.ravel()], features[negative.ravel()]
    against = (features @ negatives.T).max(axis=1) if len(negatives) else np.full(len(features), -np.inf, np.float32)
    region = positive
    for _ in range(2):
        cosines = (features @ positives.T).max(axis=1)  # [n]
        chosen = (cosines > max(otsu_threshold(cosines), -1)) & (cosines > against)
        region = (chosen.reshape(positive.shape) | positive) & ~negative
        if connected:
            region = parts_with(region, positive)
        if not region.any():
            return positive & ~negative
        mean = features[region.ravel()].mean(axis=0)
        positives = np.vstack([features[positive.ravel()], mean / max(float(np.linalg.norm(mean)), 1e-12)])
    return region


def region_in_box(features: Floats, inside: Mask, positive: Mask, negative: Mask) -> Mask:
    """Return the patches of the object in a box, bool [h, w].

    Args:
        features: [n, D] the features of the patches, scaled to length 1.
        inside: bool [h, w], the patches in the box, at least one.
        positive, negative: bool [h, w], patches that the user marked.
    """
    fixed = positive & inside
    outside = ~inside | negative
    if not outside.any():
        return inside
    region = inside & ~negative
    for _ in range(_ROUNDS):
        front, back = _centres(features[region.ravel()]), _centres(features[~region.ravel()])
        nearer = (features @ front.T).max(axis=1) > (features @ back.T).max(axis=1)
        following = (nearer.reshape(inside.shape) & inside & ~negative) | fixed
        if not following.any() or np.array_equal(following, region):
            break
        region = following
    return region


def parts_with(mask: Mask, seeds: Mask) -> Mask:
    """Return the connected parts of `mask` [h, w] that contain at least one of the `seeds` [h, w]."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask)
    wanted = np.unique(labels[seeds & mask])
    return np.isin(labels, wanted[wanted > 0])


def _centres(rows: Floats) -> Floats:
    """Return up to four centres of the rows [m, D], scaled to length 1."""
    centres = k_means(rows, min(_CENTRES, len(rows)))[1]
    return np.asarray(centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12), np.float32)
