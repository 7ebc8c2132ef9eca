"""Results by group, for instance the best products, each with its best few images.

A store ranks items, so groups are formed from the ranking, in the order of their best items, each with its best `size`
items. The required depth is unknown beforehand, because one product may fill the first thousand ranks. So the search is
repeated, twice as deep each time, until enough groups are full, no items are left, or `MAX_DEPTH` is reached. In the
last case the answer says that it is truncated.

`split` on the whole ranking is the definition. `grouped` gives the same result from as little of the ranking as
possible.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.search.filters import Scalar
from service.search.store import MAX_DEPTH, Hit

Search = Callable[[int], Awaitable[Sequence[Hit]]]
"""Returns that many hits, best first, or fewer if there are fewer."""


@dataclass
class Group:
    """Items with the same value of the grouping key, best first."""

    value: Scalar
    hits: list[Hit]


@dataclass(frozen=True)
class Groups:
    """The groups of an answer. `truncated`: below `MAX_DEPTH` there may be more groups, or more items of these
    groups."""

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
        search: returns a store's best hits for one vector, down to a depth.
        path: path of the metadata key. Items without it, or with a value that is not a string, number or boolean,
            belong to no group.
        keep: decides which hits count.
        threshold: the lowest score that counts.
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
    """Group ranked hits by their value, in the order in which the values first occur. Each group has its first `size`
    hits."""
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
