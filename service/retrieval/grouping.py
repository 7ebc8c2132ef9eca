"""Group the results of a search by a metadata key, for instance to find the best products, each with its best images.

A search returns a ranking of items, best first. Each group contains its best `size` items, and the groups are in the
order of their best items. The number of items to read is not known in advance, because the best thousand items may all
belong to one product. The search is therefore repeated, each time for twice as many items, until enough groups are
full, no items are left, or `MAX_DEPTH` items are read. In the last case, `Groups.truncated` is true.

`split` groups a complete ranking and thereby defines the correct result. `grouped` returns the same groups but reads
only the beginning of the ranking.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from service.search.filters import Path, Scalar, scalar_at
from service.search.store import MAX_DEPTH, Hit

Search = Callable[[int], Awaitable[Sequence[Hit]]]
"""A function that returns the best hits of a query, best first. Its argument is the number of hits. It returns fewer
hits if the collection has fewer items."""


@dataclass
class Group:
    """Items with the same value of the grouping key, best first."""

    value: Scalar
    hits: list[Hit]


@dataclass(frozen=True)
class Groups:
    """The groups of an answer, best first. If `truncated` is true, the search ended after `MAX_DEPTH` items, and items
    that were not read may belong to these groups or to other groups."""

    groups: list[Group]
    truncated: bool


async def grouped(
    search: Search,
    path: Path,
    *,
    k: int,
    size: int,
    offset: int = 0,
    keep: Callable[[Hit], bool] = lambda hit: True,
    threshold: float | None = None,
) -> Groups:
    """Skip the best `offset` groups, and return the next `k` groups, with up to `size` items each.

    Args:
        search: a function that returns the best hits of the query. Its argument is the number of hits.
        path: the path of the metadata key by which the items are grouped. Items without this key, or with a value that
            is not a string, number or boolean, belong to no group.
        keep: a function that returns whether a hit may be in the result.
        threshold: the minimum score of a hit in the result. None means that there is no minimum.
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


def split(hits: Iterable[Hit], path: Path, size: int) -> list[Group]:
    """Group ranked hits by their value at `path` in the metadata. The groups are in the order in which their values
    first occur, and each group has its first `size` hits. Hits without a string, number or boolean at `path` are left
    out."""
    groups: dict[tuple[bool, Scalar], Group] = {}
    for hit in hits:
        value = scalar_at(hit.metadata, path)
        if value is None:
            continue
        group = groups.setdefault((isinstance(value, bool), value), Group(value, []))  # 1 == True, but not as groups
        if len(group.hits) < size:
            group.hits.append(hit)
    return list(groups.values())
