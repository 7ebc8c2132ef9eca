"""Segment the region that a user points at with points, a box or a mask. Only patch features are needed, so if the
features of an image are kept, each further click on the image takes a few milliseconds.

- Points and masks: a patch belongs to the region if its highest cosine to a positive patch is above Otsu's threshold of
  these cosines, and above its highest cosine to a negative patch. This step is repeated once with the mean of the
  region as an additional positive patch.
- A box: the region starts as the middle of the box, and all patches outside the box are background. A patch in the box
  belongs to the region if its cosine to the mean of the region is higher than its cosine to the mean of the rest. This
  is repeated until nothing changes, up to five times, as in GrabCut (Rother et al. 2004).

Legend: h, w size of the patch grid; n = h * w patches; D features.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from service.vision.foreground import otsu_threshold

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_ROUNDS: Final = 5
_DIVISIONS: Final = 3
_EXPLAINED: Final = 0.87


def similar_region(features: Floats, positive: Mask, negative: Mask, *, connected: bool = True) -> Mask:
    """Return the patches that are similar to the positive ones, bool [h, w].

    Args:
        features: [n, D] the features of the patches, scaled to length 1.
        positive, negative: bool [h, w], the patches that the user marked. At least one patch is positive.
        connected: return only the connected parts that contain a positive patch. If false, return all parts, except
            those that contain a negative patch and no positive one.
    """
    positives, negatives = features[positive.ravel()], features[negative.ravel()]
    against = (features @ negatives.T).max(axis=1) if len(negatives) else np.full(len(features), -np.inf, np.float32)
    region = positive
    for _ in range(2):
        cosines = (features @ positives.T).max(axis=1)  # [n]
        chosen = (cosines > _threshold(cosines)) & (cosines > against)
        region = chosen.reshape(positive.shape) | positive | negative
        kept = parts_with(region, positive)
        if not connected:  # a negative point also removes a part without a positive one
            kept |= region & ~parts_with(region, negative)
        region = kept & ~negative
        if not region.any():
            return positive & ~negative
        positives = np.vstack([features[positive.ravel()], _mean(features, region)])
    return region


def _threshold(cosines: Floats) -> float:
    """Return the cosine above which patches are similar to the positive ones.

    Otsu's threshold divides the cosines [n] into two classes. If the image has several objects, the upper class can
    contain some of them together with the region. The upper class is therefore divided again, up to three times, as
    long as it clearly consists of two classes. This is the case if the division explains at least 87 % of its variance
    (75 % for a uniform distribution) and leaves at least 1 % of all patches.
    """
    threshold = otsu_threshold(cosines)
    for _ in range(_DIVISIONS):
        upper = cosines[cosines > threshold]
        if len(upper) < 2 or upper.min() == upper.max():
            break
        following = otsu_threshold(upper)
        above = upper > following
        share = float(above.mean())
        gap = float(upper[above].mean() - upper[~above].mean())
        if above.sum() < len(cosines) / 100 or share * (1 - share) * gap**2 < _EXPLAINED * float(upper.var()):
            break
        threshold = following
    return threshold


def region_in_box(features: Floats, inside: Mask, positive: Mask, negative: Mask) -> Mask:
    """Return the patches of the object in a box, bool [h, w].

    Args:
        features: [n, D] the features of the patches, scaled to length 1.
        inside: bool [h, w], the patches in the box, at least one.
        positive, negative: bool [h, w], patches that the user marked.
    """
    allowed, fixed = inside & ~negative, positive & inside & ~negative
    if allowed.all():
        return allowed
    region, rest = (_middle(inside) & allowed) | fixed, ~allowed
    for _ in range(_ROUNDS):
        if not region.any():
            break
        nearer = features @ _mean(features, region) > features @ _mean(features, rest)
        following = (nearer.reshape(inside.shape) & allowed) | fixed
        if not following.any() or np.array_equal(following, region):
            break
        region, rest = following, ~following
    return region if region.any() else allowed


def _middle(inside: Mask) -> Mask:
    """Return the patches in the middle of a box [h, w]: half of its rows and half of its columns."""
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    down, across = len(rows) // 4, len(columns) // 4
    middle = np.zeros_like(inside)
    middle[rows[0] + down : rows[-1] + 1 - down, columns[0] + across : columns[-1] + 1 - across] = True
    return middle


def _mean(features: Floats, mask: Mask) -> Floats:
    """Return the mean of the patches in `mask`, scaled to length 1, [D]."""
    mean = features[mask.ravel()].mean(axis=0)
    return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-12), np.float32)


def parts_with(mask: Mask, seeds: Mask) -> Mask:
    """Return the connected parts of `mask` [h, w] that contain at least one of the `seeds` [h, w]."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask)
    wanted = np.unique(labels[seeds & mask])
    return np.isin(labels, wanted[wanted > 0])
