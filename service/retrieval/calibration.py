"""Measures how similar the labelled items of a collection are to each other, so that `service/vision/conformal.py` can
decide which images are unknown.

The score of an image is the cosine similarity to its k-th nearest reference item. There are two ways to choose the
items whose scores an image is compared with:

- leave-one-out: each labelled item is compared with all others.
- held out: the items that pass a filter are compared with the rest, and are not neighbours of any image. The p-values
  then hold for images that resemble the held-out items, even if the rest of the collection is from another source.

To limit the work, the scores of at most `MAX_ITEMS` items, drawn at random, are measured. They are reused until the
collection changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from service.errors import InvalidRequest
from service.search.filters import And, Exists, Filter, Not, Path, scalar_at
from service.search.sampling import draw
from service.search.store import CollectionInfo, Item, SearchParams, VectorStore
from service.shared_results import SharedResults
from service.vision.conformal import Scores

MAX_ITEMS: Final = 2000
MAX_AGE_S: Final = 60.0
"""If the store cannot tell when items change, a calibration is reused for this time, or until the number of items
changes."""
_HITS_PER_CALL: Final = 10_000
_QUERIES_PER_CALL: Final = 250

Method = Literal["leave-one-out", "held-out", "examples"]


@dataclass(frozen=True)
class Reference:
    """The labelled items with which images are compared.

    path: the metadata key that contains the class of an item.
    k: the number of neighbours.
    where: the condition that these items pass, or None.
    held_out: the condition for the items that are used only for the calibration, or None.
    """

    path: Path
    k: int
    where: Filter | None = None
    held_out: Filter | None = None
    params: SearchParams | None = None

    @property
    def labelled(self) -> Filter:
        """The condition that an item has a label and passes `where`."""
        return _all_of(Exists(self.path), self.where)

    @property
    def neighbours(self) -> Filter:
        """The condition for the items that may be neighbours."""
        return _all_of(self.labelled, None if self.held_out is None else Not(self.held_out))


@dataclass(frozen=True)
class Calibration:
    """The scores of known items, and how they were measured.

    scores: the scores [m] in ascending order.
    k: the number of neighbours. It is lower than requested if the collection has few labelled items.
    where: the filter for searches for neighbours. None means that all items of the collection may be neighbours.
    drawn_from: the number of items from which the m items were drawn.
    is_random: whether the m items are a random sample of these items.
    """

    scores: Scores
    method: Method
    drawn_from: int
    k: int = 1
    where: Filter | None = None
    is_random: bool = True


async def calibration_of(
    store: VectorStore, shared: SharedResults, info: CollectionInfo, reference: Reference
) -> Calibration:
    """Return the calibration of a collection. It is computed again if the collection has changed.

    Raises:
        InvalidRequest: no item has a label, or no labelled item is held out.
    """
    # repr distinguishes a filter with 1 from one with True, which are equal in Python
    key = ("calibration", info.ref, info.version, info.count, info.tag, repr(reference))
    max_age_s = MAX_AGE_S if info.version is None else None
    return await shared.get(key, lambda: calibrate(store, info, reference), max_age_s=max_age_s)


async def calibrate(store: VectorStore, info: CollectionInfo, reference: Reference) -> Calibration:
    """Measure the scores of the labelled items of a collection, or of a random sample of them.

    Raises:
        InvalidRequest: no item has a label, or no labelled item is held out.
    """
    items = await store.count(info.ref, reference.neighbours)
    if not items:
        raise _no_label(info, reference)
    where = None if items == info.count else reference.neighbours
    is_loo = reference.held_out is None
    calibrating = reference.neighbours if is_loo else _all_of(reference.labelled, reference.held_out)
    drawn_from = items if is_loo else await store.count(info.ref, calibrating)
    if not drawn_from:
        raise InvalidRequest(
            f"calibration_filter: no item of collection {info.name!r} with the key {key_text(reference.path)!r} "
            "passes it",
            param="calibration_filter",
        )
    sample = await draw(store, info, MAX_ITEMS, where if is_loo else calibrating)
    if all(scalar_at(item.metadata, reference.path) is None for item in sample.items):
        raise _no_label(info, reference)
    k = max(1, min(reference.k, items - 1 if is_loo else items))
    measured = sample.items if items > 1 or not is_loo else []  # a single item has no neighbour
    scores: list[float] = []
    step = max(1, min(_QUERIES_PER_CALL, _HITS_PER_CALL // (k + 1)))
    for start in range(0, len(measured), step):
        batch = measured[start : start + step]
        scores += await _scores(store, info, batch, k, where, reference.params)
    ascending = np.sort(np.array(scores, np.float64))
    method: Method = "leave-one-out" if is_loo else "held-out"
    return Calibration(ascending, method, drawn_from, k, where, sample.is_random)


def key_text(path: Path) -> str:
    """Return a metadata key as requests write it."""
    return ".".join(part.replace(".", "\\.") for part in path)


async def _scores(
    store: VectorStore,
    info: CollectionInfo,
    items: Sequence[Item],
    k: int,
    where: Filter | None,
    params: SearchParams | None,
) -> list[float]:
    """Return the similarity of each item to its k-th nearest neighbour other than itself."""
    vectors = np.stack([item.vector for item in items])
    rankings = await store.search(info.ref, vectors, k + 1, tag=info.tag, where=where, params=params)
    scores = []
    for item, hits in zip(items, rankings, strict=True):
        others = [hit.score for hit in hits if hit.id != item.id][:k]
        scores.append(others[-1] if others else -1.0)
    return scores


def _no_label(info: CollectionInfo, reference: Reference) -> InvalidRequest:
    among = "" if reference.where is None and reference.held_out is None else " among those that may be neighbours"
    return InvalidRequest(
        f"no item of collection {info.name!r}{among} has a string, number or boolean at the metadata key "
        f"{key_text(reference.path)!r}, which should contain the class",
        param="label",
    )


def _all_of(condition: Filter, further: Filter | None) -> Filter:
    return condition if further is None else And((condition, further))
