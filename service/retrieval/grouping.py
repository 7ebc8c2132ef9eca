"""Group the results of a search by a metadata key, for instance to find the best products, each with its best images.

A store ranks items. Groups are formed from this ranking: they are in the order of their best items, and each has its
best `size` items. It is unknown beforehand how many ranks are needed, because one product may fill the first thousand.
So the search is repeated, each time for twice as many items, until enough groups are full, no items are left, or
`MAX_DEPTH` items are read. In the last case `Groups.truncated` is true.

`split` on the whole ranking is the definition. `grouped` gives the same result but reads only the first part of the
ranking.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.search.filters import Scalar
from service.search.store import MAX_DEPTH, Hit

Search = Callable[[int], Awaitable[Sequence[Hit]]]
"""A function that takes a number of hits and returns the best ones, best first. It returns fewer if the store has
fewer."""


@dataclass
class Group:
    """Items with the same value of the grouping key, best first."""

    value: Scalar
    hits: list[Hit]


@dataclass(frozen=True)
class Groups:
    """The groups of an answer, best first. If `truncated`, the ranking continues after `MAX_DEPTH` items, and the rest
    may contain more groups or more items of these groups."""

    groups: list[Group]
    truncated: bool


async def grouped(
    search: Search,
    path: tuple[str, ...],
    *,
    k: int,
    size: int,
    offset: int = 0,
    keep: Callable[[Hit], bool] = lambda hit: True,
    threshold: float | None = None,
) -> Groups:
    """Return the best `k` groups after the first `offset`, with up to `size` items each.

    Args:
        search: returns the best hits of a store for the query, as many as its argument says.
        path: path of the metadata key. Items without it, or with a value that is not a string, number or boolean,
            belong to no group.
        keep: returns whether a hit is used. Other hits are left out.
        threshold: the lowest score of a hit that is used. None means no limit.
    """
    wanted = offset + k
    depth = min(MAX_DEPTH, 2 * wanted * size)
    while True:
        hits = await search(depth)
        end = next((i for i, hit in enumerate(hits) if threshold is not None and hit.score < threshold), len(hits))
        ranked = split((hit for hit in hits[:end] if keep(hit)), path, size)
        full = len(ranked) >= wanted and all(len(group.hits) == size for group in ranked[:wanted])
        exhausted = end < len(hits) or len(hits) < depth
        if full or exhausted or depth == MAX_DEPTH:
            return Groups(ranked[offset:wanted], truncated=not (full or exhausted))
        depth = min(MAX_DEPTH, 2 * depth)


def split(hits: Iterable[Hit], path: tuple[str, ...], size: int) -> list[Group]:
    """Group ranked hits by their value at `path` in the metadata. The groups are in the order in which their values
    first occur, and each has its first `size` hits. Hits without such a value are left out."""
    groups: dict[tuple[bool, Scalar], Group] = {}
    for hit in hits:
        value = _value(hit.metadata, path)
        if value is None:
            continue
        group = groups.setdefault((isinstance(value, bool), value), Group(value, []))  # 1 == True, but not here
        if len(group.hits) < size:
            group.hits.append(hit)
    return list(groups.values())


def _value(metadata: Mapping[str, Any], path: tuple[str, ...]) -> Scalar | None:
    value: Any = metadata
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value if isinstance(value, str | int | float) else None
