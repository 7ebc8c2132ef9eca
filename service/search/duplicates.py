"""Finds duplicate and near-duplicate images in a collection.

`by_content` groups items whose images have the same sha256. `by_similarity` connects two items if the cosine of their
vectors is at least a threshold, and groups items that are connected directly or through other items. For example, if
each image of a series is similar to the next, the first and the last image are in one group although they may differ.

Both functions read the collection page by page. `by_similarity` searches with each item's vector, and requests more and
more neighbours until one of them scores below the threshold. Items with identical vectors share a search. The searches
take a long time, so the number of items is limited, and the request's deadline can end the work between two calls of
the store. A search with an approximate index may miss neighbours. In the embedded store, `SearchParams(exact=True)`
prevents this.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from service.errors import InvalidRequest
from service.search.filters import Filter
from service.search.store import MAX_DEPTH, CollectionInfo, Floats, Item, SearchParams, VectorStore

MAX_ITEMS: Final = 100_000
ROUNDING: Final = 1e-6
"""The threshold is lowered by this amount, because in float32 the cosine of two equal vectors may be 0.9999999."""

_PAGE: Final = 1000
_FIRST_K: Final = 4  # small, because most items have no neighbour above the threshold, and hits are costly
_HITS_PER_CALL: Final = 10_000
_QUERIES_PER_CALL: Final = 250
"""The two limits above apply to one call of the store. They limit the size of its result, the time for which the
processing of the result blocks the event loop, and the time for which the store continues to work after the
deadline."""


@dataclass(frozen=True)
class Group:
    """The ids of the items in one group, in the order in which the store lists them. If the items were grouped by
    content, `digest` is the sha256 that their images share."""

    ids: list[str]
    digest: str | None = None


@dataclass(frozen=True)
class Duplicates:
    """The groups of duplicates that were found, largest first. Each group has at least two items.

    compared: the number of items that were read.
    skipped: the number of items that could not be grouped by content because they have no digest (the image's sha256).
    truncated: whether an item may have more similar items than one search can return. If so, some groups may belong
        together.
    """

    groups: list[Group]
    compared: int
    skipped: int = 0
    truncated: bool = False


async def by_content(store: VectorStore, info: CollectionInfo, where: Filter | None = None) -> Duplicates:
    """Group the items whose images are identical byte for byte. If the filter `where` is given, only items that pass it
    are compared.

    Raises:
        InvalidRequest: more than `MAX_ITEMS` items would be compared.
    """
    await _check_count(store, info, where)
    ids: dict[str, list[str]] = {}
    compared = skipped = 0
    async for page in _pages(store, info, where):
        compared += len(page)
        for item in page:
            if item.digest is None:
                skipped += 1
            else:
                ids.setdefault(item.digest, []).append(item.id)
    groups = [Group(same, digest) for digest, same in ids.items() if len(same) > 1]
    return Duplicates(_largest_first(groups), compared, skipped)


async def by_similarity(
    store: VectorStore,
    info: CollectionInfo,
    threshold: float,
    where: Filter | None = None,
    params: SearchParams | None = None,
) -> Duplicates:
    """Group items with similar vectors. Two items are connected if the cosine of their vectors is at least `threshold`,
    and a group contains all items that are connected directly or through other items. If the filter `where` is given,
    only items that pass it are compared.

    Raises:
        InvalidRequest: more than `MAX_ITEMS` items would be compared.
    """
    await _check_count(store, info, where)
    families, order = Families(), list[str]()
    first_with: dict[bytes, str] = {}  # a vector's hash -> the id of the first item that has it
    truncated = False
    async for page in _pages(store, info, where):
        order += [item.id for item in page]
        pending, k = [], _FIRST_K
        for item in page:
            first = first_with.setdefault(hashlib.sha256(item.vector.tobytes()).digest(), item.id)
            if first == item.id:
                pending.append(item)
            else:
                families.join(first, [item.id])
        while pending:
            pending = await _join(store, info, pending, k, threshold - ROUNDING, where, params, families)
            truncated |= bool(pending) and k == MAX_DEPTH
            pending, k = ([], k) if k == MAX_DEPTH else (pending, min(4 * k, MAX_DEPTH))
    groups = [Group(ids) for ids in await asyncio.to_thread(families.groups, order) if len(ids) > 1]
    return Duplicates(_largest_first(groups), len(order), truncated=truncated)


async def _join(
    store: VectorStore,
    info: CollectionInfo,
    items: Sequence[Item],
    k: int,
    floor: float,
    where: Filter | None,
    params: SearchParams | None,
    families: "Families",
) -> list[Item]:
    """Search for the k nearest items of each item. Those with a cosine of at least `floor` are its neighbours. Merge
    each item's family (the set of ids that are connected to it) with the families of its neighbours.

    Returns:
        The items whose k nearest items are all neighbours. A search with a higher k may find more neighbours of these
        items.
    """
    deeper = []
    step = min(_QUERIES_PER_CALL, max(1, _HITS_PER_CALL // k))
    for start in range(0, len(items), step):
        batch = items[start : start + step]
        vectors = np.stack([item.vector for item in batch])
        answers = await store.search(info.ref, vectors, k, tag=info.tag, where=where, params=params)
        for item, hits in zip(batch, answers, strict=True):
            near = [hit.id for hit in hits if hit.score >= floor]
            families.join(item.id, near)
            if len(near) == k:
                deeper.append(item)
    return deeper


async def scores_to_first(store: VectorStore, info: CollectionInfo, ids: Sequence[str]) -> list[tuple[str, float]]:
    """Return the (id, score) pairs of the items that still exist, in the order of `ids`. The score is the cosine
    similarity between the vector of the item and the vector of the first item in the result."""
    first: Floats | None = None
    scored = []
    for start in range(0, len(ids), _PAGE):
        for item in await store.get(info.ref, ids[start : start + _PAGE]):
            if item is not None:
                first = item.vector if first is None else first
                scored.append((item.id, float(np.clip(first @ item.vector, -1, 1))))
    return scored


class Families:
    """Sets of connected ids (families). They are stored in a union-find structure (Tarjan 1975) with union by size and
    path halving."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}
        self._size: dict[str, int] = {}

    def join(self, item_id: str, others: Iterable[str]) -> None:
        """Merge the families of `item_id` and of all `others` into one family."""
        root = self._root(item_id)
        for other in others:
            other_root = self._root(other)
            if other_root != root:
                if self._size[other_root] > self._size[root]:
                    root, other_root = other_root, root
                self._parent[other_root] = root
                self._size[root] += self._size.pop(other_root)

    def groups(self, ids: Iterable[str]) -> list[list[str]]:
        """Group the ids by family and return the groups. The ids in each group are in the same order as in `ids`, and
        the groups are in the order of their first ids."""
        families: dict[str, list[str]] = {}
        for item_id in ids:
            families.setdefault(self._root(item_id), []).append(item_id)
        return list(families.values())

    def _root(self, item_id: str) -> str:
        parent = self._parent
        if item_id not in parent:
            parent[item_id], self._size[item_id] = item_id, 1
        while parent[item_id] != item_id:
            parent[item_id] = parent[parent[item_id]]
            item_id = parent[item_id]
        return item_id


async def _check_count(store: VectorStore, info: CollectionInfo, where: Filter | None) -> None:
    count = info.count if where is None else await store.count(info.ref, where)
    if count > MAX_ITEMS:
        raise InvalidRequest(
            f"{count:,} items would be compared; one request allows at most {MAX_ITEMS:,}; use a filter",
            param="filter",
        )


async def _pages(store: VectorStore, info: CollectionInfo, where: Filter | None) -> AsyncIterator[list[Item]]:
    cursor: str | None = None
    while True:
        page = await store.scroll(info.ref, where=where, cursor=cursor, limit=_PAGE)
        yield page.items
        cursor = page.cursor
        if cursor is None:
            return


def _largest_first(groups: list[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: -len(group.ids))  # stable: equal sizes stay in the store's order
