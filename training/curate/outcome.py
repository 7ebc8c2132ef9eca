"""The outcome of a curation: which images are kept, and why the others are dropped.

Everything that is written comes from an outcome. It depends only on the set of images and the settings, so equal images
give equal files, byte for byte.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from training.curate.drops import Drop
from training.curate.table import Images, Indices


@dataclass(frozen=True)
class Outcome:
    """The outcome of a curation.

    `kept` contains the numbers of the kept images in ascending order, and `held_out` those of them that are held out
    for evaluation. `drops` contains the decisions of all stages; if there are several for one image, the first counts.
    `restored` contains the numbers of images that the user has brought back; they are also in `kept`. `unreadable`
    contains the key of each image that could not be read, and the reason. `sources` contains the addresses of the
    images, in the order of the numbers with which the keys begin.

    Raises:
        ValueError: the numbers are not in ascending order, an image is held out or restored but not kept, a dropped
            image is kept but not restored, an image is neither kept nor dropped, or no image is kept.
    """

    images: Images
    kept: Indices
    held_out: Indices
    drops: Sequence[Drop]
    restored: frozenset[int] = frozenset()
    unreadable: Sequence[tuple[str, str]] = ()
    sources: Sequence[str] = ()
    drop_of: dict[int, Drop] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        drop_of: dict[int, Drop] = {}
        for drop in self.drops:
            drop_of.setdefault(drop.index, drop)
        object.__setattr__(self, "drop_of", drop_of)
        if not len(self.kept):
            raise ValueError(f"none of {len(self.images):,} images is kept, so there is nothing to write")
        for name, indices in (("kept", self.kept), ("held_out", self.held_out)):
            if (np.diff(indices) <= 0).any():
                raise ValueError(f"{name} must contain each number once, in ascending order")
        kept = set(self.kept.tolist())
        for name, numbers in (("held out", self.held_out.tolist()), ("restored", self.restored)):
            if not kept.issuperset(numbers):
                raise ValueError(f"an image is {name} but not kept: {self._first(set(numbers) - kept)}")
        if unexplained := set(range(len(self.images))) - kept - drop_of.keys():
            raise ValueError(f"an image is neither kept nor dropped: {self._first(unexplained)}")
        if doubtful := (kept & drop_of.keys()) - self.restored:
            raise ValueError(f"an image is both kept and dropped: {self._first(doubtful)}")

    def _first(self, numbers: Iterable[int]) -> str:
        return self.images.key[min(numbers)]

    @property
    def train(self) -> Indices:
        """Return the numbers of the kept images that are not held out, in ascending order."""
        return np.setdiff1d(self.kept, self.held_out, assume_unique=True)


def data_digest(images: Images, indices: Indices) -> str:
    """Compute the sha256 of images: of the key and the sha256 of each, in the order of the keys.

    It does not depend on how the images are divided into shards.
    """
    digest = hashlib.sha256()
    for index in np.sort(indices).tolist():
        digest.update(images.key[index].encode() + b"\0" + images.sha256[index].tobytes())
    return digest.hexdigest()


# The held-out part


def split(images: Images, kept: Indices, drops: Sequence[Drop], share: float, seed: int) -> Indices:
    """Select the kept images to hold out for evaluation, and return their numbers in ascending order.

    Images that could show the same picture form a group, and a group is held out as a whole. They are images with equal
    pixels or equal perceptual hashes, and a restored copy together with the image of which it is a copy. A group is
    held out if the digest of `seed` and the smallest of its keys is among the share `share` of all possible digests. So
    an image usually stays in its part when others are added.

    Args:
        images: all readable images.
        kept: numbers of the kept images, in ascending order.
        drops: the decisions of the stages, of which some may be for restored images.
        share: share of the images to hold out, 0 to less than 1. If it is more than 0 and there are at least two
            groups, at least one group is held out, and at least one is not.
        seed: any number; another one selects other images.

    Raises:
        ValueError: `share` is not in its range.
    """
    if not 0 <= share < 1:
        raise ValueError(f"held_out_share={share:g} must be at least 0 and less than 1")
    if share == 0:
        return np.zeros(0, np.int64)
    groups = _groups(images, kept, drops)
    draws = {group: _draw(f"{seed}/{images.key[group]}") for group in np.unique(groups).tolist()}
    chosen = {group for group, draw in draws.items() if draw < share}
    if len(draws) > 1:
        chosen = chosen or {min(draws, key=lambda group: draws[group])}
        if len(chosen) == len(draws):
            chosen.remove(max(draws, key=lambda group: draws[group]))
    return kept[np.isin(groups, list(chosen))] if chosen else np.zeros(0, np.int64)


def _draw(text: str) -> float:
    """Return a number from 0 to less than 1 that depends only on the text and looks random."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def _groups(images: Images, kept: Indices, drops: Sequence[Drop]) -> Indices:
    """Return for each kept image the smallest number of a kept image in its group, [kept]."""
    keeper = {drop.index: drop.because for drop in reversed(drops) if drop.because is not None}
    parent = {index: index for index in kept.tolist()}

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, object], int] = {}
    for index in kept.tolist():
        of_whom, seen = index, {index}
        while (next_keeper := keeper.get(of_whom)) is not None and next_keeper not in seen:
            of_whom = next_keeper
            seen.add(of_whom)
        alike: tuple[tuple[str, object], ...] = (
            ("pixels", images.pixels_sha256[index].tobytes()),
            ("phash", int(images.phash[index])),
            ("copies of", of_whom),
        )
        for likeness in alike:
            a, b = root(index), root(first.setdefault(likeness, index))
            parent[max(a, b)] = min(a, b)
    return np.array([root(index) for index in kept.tolist()], np.int64)


def check_apart(images: Images, train: Indices, held_out: Indices) -> None:
    """Check that no image is both trained on and held out, also not as another file.

    Raises:
        ValueError: an image of one part has the same pixels or the same perceptual hash as one of the other part.
    """
    for what, column in (("pixels", images.pixels_sha256), ("perceptual hash", images.phash)):
        trained = {column[index].tobytes(): index for index in train.tolist()}
        for index in held_out.tolist():
            if (other := trained.get(column[index].tobytes())) is not None:
                raise ValueError(
                    f"{images.key[index]} is held out, but {images.key[other]} has the same {what} and is trained on"
                )
