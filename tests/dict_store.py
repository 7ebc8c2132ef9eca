"""A simple, slow vector store that uses dictionaries and scans all vectors with numpy.

Tests compare the real stores with it, and tests of the HTTP routes use it as their store.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from service.errors import CollectionNotFound, Conflict, InvalidRequest, ItemNotFound, StorageFailed
from service.search.checks import (
    check_id,
    check_k,
    check_match,
    check_name,
    check_source,
    merged,
    metadata_text,
    normalised,
    normalised_rows,
)
from service.search.facets import ValueCounts
from service.search.filters import Filter, Path, matches, plain_number, value_at
from service.search.specs import check_spec
from service.search.store import (
    CollectionInfo,
    CollectionSpec,
    Facets,
    Hit,
    Hits,
    Item,
    Metadata,
    Order,
    Page,
    SearchParams,
)


@dataclass
class _Collection:
    spec: CollectionSpec
    items: dict[str, Item] = field(default_factory=dict)
    requests: dict[str, str] = field(default_factory=dict)  # items as text, by idempotency key


class DictStore:
    """A `VectorStore` that stores items in dictionaries and searches by scanning all of them."""

    capabilities = frozenset({"atomic_upsert", "idempotency", "indexed", "order"})

    def __init__(self) -> None:
        self._content: dict[str, _Collection] = {}
        self._aliases: dict[str, str] = {}
        self._is_open = True

    @property
    def _collections(self) -> dict[str, _Collection]:
        self._check_open()
        return self._content

    def _check_open(self) -> None:
        if not self._is_open:
            raise StorageFailed("the vector store is closed")

    async def create(self, collection: str, spec: CollectionSpec) -> CollectionInfo:
        check_name(collection), check_spec(spec)
        self._check_open()
        if collection in self._aliases:
            raise Conflict(f"{collection!r} is an alias of {self._aliases[collection]!r}")
        if self._collections.setdefault(collection, _Collection(spec)).spec != spec:
            raise Conflict(f"collection {collection!r} exists with other settings")
        return await self.info(collection)

    async def collections(self) -> list[CollectionInfo]:
        return [await self.info(name) for name in sorted(self._collections)]

    async def info(self, collection: str) -> CollectionInfo:
        name, stored = self._resolve(collection)
        return CollectionInfo(name, stored.spec, len(stored.items))

    async def set_indexed(self, collection: str, indexed: Sequence[str]) -> CollectionInfo:
        name, stored = self._resolve(collection)
        stored.spec = check_spec(replace(stored.spec, indexed=tuple(indexed)))
        return await self.info(name)

    async def drop(self, collection: str) -> None:
        self._resolve(collection)
        if collection in self._aliases or collection in self._aliases.values():
            raise Conflict(f"{collection!r} is or has an alias")
        del self._collections[collection]

    async def aliases(self) -> dict[str, str]:
        self._check_open()
        return dict(self._aliases)

    async def set_alias(self, alias: str, collection: str) -> str | None:
        if check_name(alias) in self._collections:
            raise Conflict(f"{alias!r} is a collection")
        before = self._aliases.get(alias)
        self._aliases[alias], _ = self._resolve(collection)
        return before

    async def drop_alias(self, alias: str) -> None:
        self._check_open()
        if self._aliases.pop(check_name(alias), None) is None:
            raise CollectionNotFound(f"there is no alias {alias!r}")

    async def upsert(
        self,
        collection: str,
        items: Sequence[Item],
        *,
        tag: str,
        request_key: str | None = None,
        client: str = "",
        other: tuple[str, Sequence[Item]] | None = None,
    ) -> CollectionInfo:
        check_name(collection)
        if not items:
            raise InvalidRequest("no items to write")
        rows = {}
        for item in items:
            metadata_text(check_source(item).metadata)
            rows[check_id(item.id)] = replace(item, vector=normalised(item.vector))
        if len({len(item.vector) for item in rows.values()}) != 1:
            raise InvalidRequest("the vectors of one call must have the same dimension")
        dimension = len(next(iter(rows.values())).vector)
        try:
            info = await self.info(collection)
        except CollectionNotFound:
            info = CollectionInfo(collection, check_spec(CollectionSpec(tag, dimension)), 0)
        check_match(info, tag=tag, dimension=dimension)
        stored = self._collections.setdefault(info.name, _Collection(info.spec))
        if request_key is not None:
            is_repeat = request_key in stored.requests
            text = repr([replace(item, vector=item.vector.tolist()) for item in rows.values()])
            if stored.requests.setdefault(request_key, text) != text:
                raise Conflict(f"the idempotency key {request_key!r} was used with other items")
            if is_repeat:
                return await self.info(collection)
        stored.items.update(rows)
        return await self.info(collection)

    async def get(self, collection: str, ids: Sequence[str]) -> list[Item | None]:
        stored = self._resolve(collection)[1]
        return [stored.items.get(check_id(item_id)) for item_id in ids]

    async def patch(
        self, collection: str, item_id: str, metadata: Metadata, *, source: str | None = None, keep_source: bool = True
    ) -> Item:
        stored = self._resolve(collection)[1]
        metadata_text(metadata)
        if check_id(item_id) not in stored.items:
            raise ItemNotFound(f"collection {collection!r} holds no item {item_id!r}")
        old = stored.items[item_id]
        new = replace(old, metadata=merged(old.metadata, metadata), source=old.source if keep_source else source)
        metadata_text(check_source(new).metadata)
        stored.items[item_id] = new
        return new

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        stored = self._resolve(collection)[1]
        wanted = [check_id(item_id) for item_id in ids]
        return sum(stored.items.pop(item_id, None) is not None for item_id in wanted)

    async def delete_where(self, collection: str, where: Filter) -> int:
        stored = self._resolve(collection)[1]
        return await self.delete(
            collection, [item.id for item in stored.items.values() if matches(where, item.metadata, item.id)]
        )

    async def count(self, collection: str, where: Filter | None = None) -> int:
        return len(self._passing(self._resolve(collection)[1], where))

    async def facets(self, collection: str, path: Path, *, where: Filter | None = None, limit: int = 100) -> Facets:
        counts = ValueCounts(path)
        for item in self._passing(self._resolve(collection)[1], where):
            counts.add(item.metadata)
        return counts.most_frequent(limit)

    async def scroll(
        self,
        collection: str,
        *,
        where: Filter | None = None,
        cursor: str | None = None,
        limit: int = 100,
        order: Order | None = None,
        max_bytes: int | None = None,
    ) -> Page:
        items = sorted(self._passing(self._resolve(collection)[1], where), key=lambda item: item.id)
        if order is not None:
            return _ordered_page(items, order, cursor, limit)
        if cursor is not None and not cursor.startswith("after:"):
            raise InvalidRequest(f"cursor {cursor[:80]!r} is not from this store", param="cursor")
        rest = [item for item in items if cursor is None or item.id > cursor.removeprefix("after:")]
        return Page(rest[:limit], f"after:{rest[limit - 1].id}" if len(rest) > limit else None)

    async def search(
        self,
        collection: str,
        vectors: npt.ArrayLike,
        k: int,
        *,
        tag: str,
        where: Filter | None = None,
        params: SearchParams | None = None,
        assumed: bool = False,
        max_bytes: int | None = None,
    ) -> list[Hits]:
        check_k(k)
        queries = normalised_rows(vectors)
        name, stored = self._resolve(collection)
        check_match(CollectionInfo(name, stored.spec, 0), tag=tag, dimension=queries.shape[1])
        items = self._passing(stored, where)
        answers = []
        for query in queries:
            hits = [
                Hit(item.id, round(float(np.clip(item.vector @ query, -1, 1)), 6), item.metadata, item.source)
                for item in items
            ]
            answers.append(Hits.of(sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k]))
        return answers

    async def close(self) -> None:
        self._is_open = False

    def _resolve(self, name: str) -> tuple[str, _Collection]:
        own_name = self._aliases.get(check_name(name), name)
        if own_name not in self._collections:
            raise CollectionNotFound(f"there is no collection {name!r}")
        return own_name, self._collections[own_name]

    def _passing(self, stored: _Collection, where: Filter | None) -> list[Item]:
        return [item for item in stored.items.values() if where is None or matches(where, item.metadata, item.id)]


def _ordered_page(items: list[Item], order: Order, cursor: str | None, limit: int) -> Page:
    """Return a page of the items, which are sorted by id. The cursor is the id of the last item of its page, so this
    item must still exist and be unchanged."""

    def value(item: Item) -> Any:
        return plain_number(value_at(item.metadata, order.path))

    having = [item for item in items if isinstance(value(item), str | int | float)]
    having.sort(key=lambda item: (isinstance(value(item), str), value(item)), reverse=order.descending)
    if order.descending:  # a reversed sort keeps the order of equal values, so they are still sorted by id
        assert all(a.id < b.id for a, b in itertools.pairwise(having) if value(a) == value(b))
    ids_having = {item.id for item in having}
    ordered = having + [item for item in items if item.id not in ids_having]
    ids = [item.id for item in ordered]
    if cursor is not None and cursor.removeprefix("o:") not in ids:
        raise InvalidRequest(f"cursor {cursor[:80]!r} is not from a page with this order_by", param="cursor")
    start = 0 if cursor is None else ids.index(cursor.removeprefix("o:")) + 1
    page = ordered[start : start + limit]
    return Page(page, f"o:{page[-1].id}" if len(ordered) > start + limit else None)
