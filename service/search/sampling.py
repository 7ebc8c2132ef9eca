"""Draws random items from a collection."""

from typing import Final, NamedTuple, cast

import numpy as np

from service.search.filters import Filter
from service.search.store import CollectionInfo, Item, SampleStore, VectorStore

MAX_READ: Final = 20_000
"""The highest number of items that are read from a store without the capability `sample`."""
_PAGE: Final = 1000


class Sample(NamedTuple):
    """Items drawn from a collection. `is_random` is False if they were drawn only from the collection's first items, in
    the store's order, because the collection is too large to be read completely."""

    items: list[Item]
    is_random: bool


async def draw(store: VectorStore, info: CollectionInfo, size: int, where: Filter | None = None) -> Sample:
    """Draw up to `size` items at random from a collection, or from the items that match a filter.

    A store with the capability `sample` draws the items itself. From another store, about the first `MAX_READ` items
    are read page by page, and each of them is equally likely to be drawn (reservoir sampling: Vitter, 1985).
    """
    if "sample" in store.capabilities:
        return Sample(await cast(SampleStore, store).sample(info.name, size, where=where), True)
    rng = np.random.default_rng(0)
    drawn: list[Item] = []
    read, cursor = 0, None
    while True:
        page = await store.scroll(info.name, where=where, cursor=cursor, limit=_PAGE)
        for item in page.items:
            read += 1
            if len(drawn) < size:
                drawn.append(item)
            elif (position := int(rng.integers(read))) < size:
                drawn[position] = item
        cursor = page.cursor
        if cursor is None or read >= MAX_READ:
            return Sample(drawn, cursor is None)
