"""A threshold with a promise: the similarity from which two of the user's images are copies, at a wished precision.

Copies of some of the user's own images are made by the edits in `edits.py`. A copy and its source must be found. A copy
and the images nearest to its source must not, so the test consists of the pairs that are hardest to tell apart. Half of
the sources choose the threshold, and the other half, held out, measures what it reaches.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from training.curate.copies.align import align
from training.curate.copies.edits import EDITS, edited
from training.curate.copies.find import identical
from training.curate.copies.keypoints import keypoints_of
from training.curate.copies.verify import DEFAULT_THRESHOLD, Read
from training.curate.neighbours import neighbours_above
from training.curate.table import Images

NEGATIVES: Final = 4
"""The number of images nearest to its source that each copy is compared with."""
Z: Final = 1.645
"""The quantile of the normal distribution for a one-sided confidence of 95 %."""
LOST_RECALL: Final = 0.005
SPARE: Final = 1.3  # more sources than the promise needs if every copy is found


@dataclass(frozen=True)
class Reached:
    """What a threshold reaches on the held-out part."""

    copies: Mapping[str, int]  # edit -> number of copies
    found: Mapping[str, int]  # edit -> number of copies that were found
    others: int  # pairs of a copy and another image than its source
    false: int  # how many of them count as copies

    @property
    def precision(self) -> float:
        """The share of the pairs found that are copies, or 1 if none was found."""
        found = sum(self.found.values())
        return found / (found + self.false) if found + self.false else 1.0

    @property
    def recall(self) -> float:
        """The share of the copies that were found."""
        return sum(self.found.values()) / sum(self.copies.values())


@dataclass(frozen=True)
class Threshold:
    """A calibrated threshold."""

    value: float  # the similarity from which two images are copies
    precision: float  # the precision that was asked for
    reached: Reached
    set_aside: int  # pairs of the user's images that are too similar to serve as examples of different images

    def describe(self) -> list[str]:
        """Return lines of text that say what the threshold reaches."""
        reached = self.reached
        total, found = sum(reached.copies.values()), sum(reached.found.values())
        kinds = ", ".join(f"{kind} {reached.found[kind]}/{count}" for kind, count in reached.copies.items())
        lines = [
            f"threshold {self.value:.3f} for a precision of {self.precision:g}",
            f"held out: {found} of {total} copies found ({kinds}), {reached.false} of {reached.others} other pairs"
            f" taken for copies: precision {reached.precision:.4f}, recall {reached.recall:.4f}",
        ]
        if reached.precision < self.precision:
            lines.append(
                f"on the held out pairs, the precision is below {self.precision:g}; look at the copies in report.html, "
                "and ask for a higher precision if they are not copies"
            )
        if self.set_aside:
            lines.append(f"{self.set_aside} pairs of images are copies already, or almost, and were not used")
        return lines


@dataclass(frozen=True)
class _Examples:
    source: npt.NDArray[np.int64]  # [p], number of the source in the sample
    kind: npt.NDArray[np.int64]  # [p], number of the edit
    copy: npt.NDArray[np.bool_]  # [p], whether the pair is a copy and its source
    similarity: npt.NDArray[np.float64]  # [p]

    def part(self, held_out: bool) -> "_Examples":
        chosen = (self.source % 2 == 1) == held_out
        return _Examples(self.source[chosen], self.kind[chosen], self.copy[chosen], self.similarity[chosen])


def calibrate(images: Images, read: Read, precision: float, seed: int) -> Threshold:
    """Choose the threshold at which, with a confidence of 95 %, the share of true copies is at least `precision`.

    The share is that of the test, in which each image has one copy of each kind. If copies are rarer in the user's
    images, then the share of true ones among those found is lower.

    Args:
        images: the user's images. Those of the sample are chosen from them.
        read: returns the pixels of an image, RGB [H, W, 3] uint8, upright.
        precision: the wished precision, above 0 and below 1.
        seed: the seed of the sample and of the edits.

    Raises:
        ValueError: `precision` is out of range, or these images cannot show it. The message says what they can show.
    """
    if not 0 < precision < 1:
        raise ValueError(f"precision is {precision}; it must be above 0 and below 1")
    examples, set_aside = _examples(images, read, sources_needed(precision), seed)
    value = _choose(examples.part(held_out=False), precision)
    held_out = examples.part(held_out=True)
    found = held_out.similarity >= value
    names = list(EDITS)
    reached = Reached(
        copies=Counter(names[kind] for kind in held_out.kind[held_out.copy]),
        found=Counter(names[kind] for kind in held_out.kind[held_out.copy & found]),
        others=int((~held_out.copy).sum()),
        false=int((~held_out.copy & found).sum()),
    )
    return Threshold(value, precision, reached, set_aside)


def sources_needed(precision: float) -> int:
    """Return the number of images whose copies can show a precision if all copies are found and no other pair is."""
    copies = Z**2 * precision / (1 - precision)
    return 2 * math.ceil(SPARE * copies / len(EDITS))


def lower_bound(right: int, wrong: int) -> float:
    """Return the lower end of the Wilson interval of a share, with a one-sided confidence of 95 %."""
    n = right + wrong
    if n == 0:
        return 0.0
    share, z2 = right / n, Z**2
    margin = Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return (share + z2 / (2 * n) - margin) / (1 + z2 / n)


def _examples(images: Images, read: Read, count: int, seed: int) -> tuple[_Examples, int]:
    """Return the pairs of the test, and the number of pairs that were set aside."""
    rng = np.random.default_rng(seed)
    unique = np.flatnonzero(identical(images) == np.arange(len(images)))
    if len(unique) < 2 + NEGATIVES:
        raise ValueError(f"a calibration needs at least {2 + NEGATIVES} different images, not {len(unique)}")
    sources = rng.permutation(unique)[:count]
    vectors = images.embedding[unique]
    near = neighbours_above(images.embedding[sources], vectors, -1.0, NEGATIVES + 1)
    rows: list[tuple[int, int, bool, float]] = []
    set_aside = 0
    for number, source in enumerate(sources.tolist()):
        pixels = read(source)
        original = keypoints_of(pixels)
        nearest = unique[near.vector[near.query == number]]
        others = []
        for other in nearest[nearest != source][:NEGATIVES].tolist():
            keypoints = keypoints_of(read(other))
            if align(original, keypoints).similarity < DEFAULT_THRESHOLD:
                others.append(keypoints)
            else:
                set_aside += 1
        for kind, name in enumerate(EDITS):
            copy = keypoints_of(edited(pixels, name, rng))
            rows.append((number, kind, True, align(original, copy).similarity))
            rows.extend((number, kind, False, align(other, copy).similarity) for other in others)
    numbers, kinds, copies, similarities = (np.array(column) for column in zip(*rows, strict=True))
    return _Examples(numbers, kinds, copies, similarities), set_aside


def _choose(examples: _Examples, precision: float) -> float:
    """Return the middle of the range of thresholds that keep the promise and find almost as many copies as possible."""
    positive, negative = np.sort(examples.similarity[examples.copy]), np.sort(examples.similarity[~examples.copy])
    values = np.unique(np.concatenate([positive, negative]))
    values = np.unique(np.concatenate([values, values[:-1] + np.diff(values) / 2]))
    right = len(positive) - np.searchsorted(positive, values)
    wrong = len(negative) - np.searchsorted(negative, values)
    bounds = np.array([lower_bound(int(r), int(w)) for r, w in zip(right, wrong, strict=True)])
    allowed = np.flatnonzero((bounds >= precision) & (values > 0))
    if not len(allowed):
        raise ValueError(
            f"these images cannot show a precision of {precision:g}: the lower end of the 95 % interval is at most "
            f"{bounds.max():.4f} with {len(positive)} copies. Give more images, or ask for less."
        )
    most = right[allowed].max()
    good = allowed[right[allowed] >= most - LOST_RECALL * len(positive)]
    return float((values[good[0]] + values[good[-1]]) / 2)
