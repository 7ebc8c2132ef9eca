"""Results by group: the best products, say, each with its best few images.

A store ranks items, so groups are cut from the ranking: in the order in which their best items come, each with its best
`size`. How deep the ranking must go is not known before, since one product may fill the first thousand places. So it is
searched again, twice as deep each time, until enough groups are full, nothing is left, or `MAX_DEPTH` is reached; then
the answer says that it was cut short.

`split` on the whole ranking is the definition; `grouped` gives the same from as little of it as it can.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.search.filters import Scalar
from service.search.store import MAX_DEPTH, Hit

Search = Callable[[int], Awaitable[Sequence[Hit]]]
"""The best so many hits, best first; fewer if there are fewer."""


@dataclass
class Group:
    """Items with the same value under the key that was grouped by, best first."""

    value: Scalar
    hits: list[Hit]


@dataclass(frozen=True)
class Groups:
    """`truncated`: deeper than `MAX_DEPTH` there may be more groups, or more items of these."""

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
    """The best `k` groups after the first `offset`, with up to `size` items each.

    Args:
        search: any store's, for one vector.
        path: of the metadata key; items without it, or with another value than a string, a number or a boolean, are
            in no group.
        keep: which hits count at all.
        threshold: the least score that does.
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
    """Ranked hits by their value, in the order in which the values come first; the first `size` of each."""
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
