"""Find a region in images, by patch features. The region is marked in a few reference images. The steps are those of
INSID3 (arXiv 2603.28480, 2026), which needs neither training nor labels. docs/decisions/0028-find-region.md explains
where this module differs from INSID3, and has the measurements.

1. The positional bias is removed from all features, which are then centred: the origin is the midpoint between the mean
   of the marked patches and the mean of the other patches of the references.
2. The prototype is the mean of the marked patches. A patch of another image is a candidate under two conditions. Its
   cosine to the prototype must be above a threshold, which lies between the mean cosine of the marked and that of the
   other reference patches. And the reference patch that is most similar to it must be marked. To limit the time,
   candidates for the score are only looked for in the half of the patches with the highest cosines.
3. The score of an image is the mean, over the marked patches of a reference, of the highest cosine to a candidate. If
   there are several references, the highest score counts. A score is high only if the image contains all parts of the
   region.
4. The mask starts from a core: the candidates that are nearly as similar to a marked patch as the best candidates. The
   patches of the image are then divided into two classes, by their similarity to the mean of the core and to the mean
   of the other patches.

Steps 1 to 3 take a few matrix products per image, and step 4 is needed only for the images that are returned.

Legend: N patches, D features, K directions of the positional basis, I marked patches and O other patches of all
references. Rows are float32 and have length 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service.features.patches import unit_rows

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[Any]

MAX_COMPARED: Final = 128
"""The highest number of marked patches, and of other patches, of all references that are compared. If there are more,
evenly spaced ones are used."""
_THRESHOLD: Final = 0.4  # between the mean cosine of other reference patches (0) and that of marked ones (1)
_CORE: Final = 0.7  # of the similarity of the best candidates to a marked patch
_BEST: Final = 10  # the best candidates are one in ten, and at least 3
_OWN: Final = 0.8  # weight of the two classes in the image, against the comparison with the references
_LEAST: Final = 1e-12


class Reference(NamedTuple):
    """The patches of a reference image.

    rows: the patch features [N, D] of any number type. Their length does not matter.
    weights: the fraction of each patch that is marked, [N]. At least one is above 0.
    shown: which patches show the image, bool [N]. The others show padding.
    """

    rows: Rows
    weights: Floats
    shown: Bools


@dataclass(frozen=True)
class Region:
    """What the references say about a region.

    basis, origin: the positional basis [K, D] and the origin [D], which define the projection of features.
    prototype: the mean of the projected marked patches, [D].
    threshold: the lowest cosine of a candidate to the prototype.
    inside, outside: the projected marked patches [I, D] and other patches [O, D] of the references.
    starts: the position in `inside` of the first patch of each reference.
    """

    basis: Floats
    origin: Floats
    prototype: Floats
    threshold: float
    inside: Floats
    outside: Floats
    starts: npt.NDArray[np.intp]

    def project(self, rows: Floats) -> Floats:
        """Return the projected rows [N, D]."""
        return _projected(rows, self.origin, self.basis)


def learn_region(references: Sequence[Reference], basis: Floats) -> Region:
    """Return the region that is marked in the references. `basis` [K, D] is the model's positional basis."""
    rows = [unit_rows(reference.rows) for reference in references]
    marks = [_marked(reference) for reference in references]
    others = [reference.shown & ~marked for reference, marked in zip(references, marks, strict=True)]
    weights = [np.where(marked, reference.weights, 0) for reference, marked in zip(references, marks, strict=True)]
    mean_inside = np.mean([_mean(part, by) for part, by in zip(rows, weights, strict=True)], axis=0)
    means_outside = [_mean(part, by) for part, by in zip(rows, others, strict=True) if by.any()]
    if means_outside:
        origin = ((mean_inside + np.mean(means_outside, axis=0)) / 2).astype(np.float32)
    else:  # everything is marked
        origin = np.zeros_like(mean_inside)
    projected = [_projected(part, origin, basis) for part in rows]
    mean = np.mean([_mean(part, by) for part, by in zip(projected, weights, strict=True)], axis=0)
    prototype = unit_rows(mean[None])[0]
    inside = [part[marked] for part, marked in zip(projected, marks, strict=True)]
    outside = np.concatenate([part[other] for part, other in zip(projected, others, strict=True)])
    high = float(np.mean(np.concatenate(inside) @ prototype))
    low = float(np.mean(outside @ prototype)) if len(outside) else 0.0
    share = MAX_COMPARED // len(inside)
    inside = [_spaced(part, share) for part in inside]
    return Region(
        basis=basis,
        origin=origin,
        prototype=prototype,
        threshold=low + _THRESHOLD * (high - low),
        inside=np.concatenate(inside),
        outside=_spaced(outside, MAX_COMPARED),
        starts=np.cumsum([0, *(len(part) for part in inside[:-1])]),
    )


def scores(region: Region, images: Sequence[tuple[Rows, Bools | None]]) -> Floats:
    """Return the score of each image, float32 [len(images)] from 0 to 1. An image without candidates has the score 0.

    Each image is a pair: its patch features [N, D] of any number type, and which of its patches show the image rather
    than padding, bool [N], or None if all patches do.
    """
    counts = [len(rows) for rows, _ in images]
    rows = np.concatenate([rows for rows, _ in images]).astype(np.float32)
    lengths, shortened = _lengths(region, rows)
    cosines = _cosines(region, rows, lengths, shortened, region.prototype[None])[:, 0]
    middle = [np.median(part) for part in np.split(cosines, np.cumsum(counts[:-1]))]
    above = cosines > np.maximum(region.threshold, np.repeat(middle, counts))
    if any(shown is not None for _, shown in images):
        above &= np.concatenate([np.ones(len(part), bool) if shown is None else shown for part, shown in images])
    image_of = np.repeat(np.arange(len(images)), counts)[above]  # [n]
    candidates = rows[above], lengths[above], shortened[above]
    similar = _cosines(region, *candidates, region.inside)  # [n, I]
    if len(region.outside):
        is_candidate = similar.max(axis=1) > _cosines(region, *candidates, region.outside).max(axis=1)
        similar, image_of = similar[is_candidate], image_of[is_candidate]
    found = np.zeros(len(images), np.float32)
    if len(image_of):
        of_images, first = np.unique(image_of, return_index=True)
        best = np.maximum.reduceat(similar, first, axis=0)  # [images with candidates, I]
        sizes = np.diff([*region.starts, best.shape[1]])
        means = np.add.reduceat(best, region.starts, axis=1) / sizes  # [images with candidates, references]
        found[of_images] = means.max(axis=1).clip(0, 1)
    return found


def mask_scores(region: Region, rows: Rows, shown: Bools | None = None) -> Floats:
    """Return a number for each patch of an image, float32 [N]. It is positive for patches that belong to the region. If
    no patch is a candidate, no number is positive. `rows` and `shown` are the pair that `scores` expects for an
    image."""
    projected = region.project(unit_rows(rows))
    similar = (projected @ region.inside.T).max(axis=1)  # [N]
    margins = projected @ region.prototype - region.threshold
    if len(region.outside):
        margins = np.minimum(margins, similar - (projected @ region.outside.T).max(axis=1))
    shown = np.ones(len(margins), bool) if shown is None else shown
    candidates = shown & (margins > 0)
    if candidates.any():
        best = np.sort(similar[candidates])[-max(3, int(candidates.sum()) // _BEST) :].mean()
        core = candidates & (similar >= _CORE * best)
        others = shown & ~core
        if core.any() and others.any():
            classes = unit_rows(np.stack([projected[core].mean(axis=0), projected[others].mean(axis=0)]))
            margins = _OWN * (projected @ (classes[0] - classes[1])) + (1 - _OWN) * margins
    return np.where(shown, margins, np.minimum(margins, -_LEAST)).astype(np.float32)


def _marked(reference: Reference) -> Bools:
    """Return which patches of a reference are marked: those whose weight is at least half of the highest weight. So a
    region that is smaller than a patch marks at least one patch."""
    weights = np.where(reference.shown, reference.weights, 0)
    return np.asarray((weights > 0) & (weights >= 0.5 * float(weights.max())))


def _mean(rows: Floats, weights: npt.NDArray[Any]) -> Floats:
    by = weights.astype(np.float64)
    return np.asarray(by @ rows / by.sum(), np.float32)


def _spaced(rows: Floats, count: int) -> Floats:
    """Return `count` evenly spaced rows, or all rows if there are fewer."""
    if len(rows) <= count:
        return rows
    return rows[np.arange(count) * len(rows) // count]


def _projected(rows: Floats, origin: Floats, basis: Floats) -> Floats:
    centred = rows - origin
    return unit_rows(centred - (centred @ basis.T) @ basis)


def _lengths(region: Region, rows: Floats) -> tuple[Floats, Floats]:
    """For each row, return two lengths, each float32 [N]: that of the row, and that of the projection of the row scaled
    to length 1."""
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    against = np.concatenate([region.origin[None], region.basis])  # [1 + K, D]
    products = (rows @ against.T) / np.maximum(lengths, _LEAST)[:, None]  # [N, 1 + K]
    of_origin = against @ region.origin  # [1 + K]
    squares = (lengths > 0) - 2 * products[:, 0] + of_origin[0]  # of the centred row
    squares -= np.square(products[:, 1:] - of_origin[1:]).sum(axis=1)
    return lengths, np.sqrt(np.maximum(squares, _LEAST)).astype(np.float32)


def _cosines(region: Region, rows: Floats, lengths: Floats, shortened: Floats, against: Floats) -> Floats:
    """Return the cosines of the projected rows to the vectors `against` [M, D], float32 [N, M]. These vectors must
    already be projected. `lengths` and `shortened` are the results of `_lengths` for the rows.

    The result equals `region.project(rows / lengths) @ against.T`. The rows themselves are not projected, which saves
    time: the dot product of a centred row and a projected vector is the same before and after the row is projected.
    """
    products = rows @ against.T
    products /= np.maximum(lengths, _LEAST)[:, None]
    products -= against @ region.origin
    products /= shortened[:, None]
    return np.asarray(products, np.float32)
