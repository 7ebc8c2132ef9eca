"""The vector store that keeps its collections in a Milvus server. Use it if the vectors do not fit on one machine, or
if several machines run the service.

Each collection of the service is one collection in Milvus. Metadata is stored twice: as text, which is returned exactly
as it was written, and as JSON, which filters use. Milvus cannot evaluate some filters as `filters.matches` defines them
(see `service/search/filter_milvus.py`). For these filters, this module fetches the items and applies the filter itself,
which is slower.

Operations that check and then write (patch, delete, create, aliases) run one after another within this process. If two
processes write the same item or name, the last write takes effect. A call with many items makes several writes. Other
clients may see only some of these writes for a short time. If the call fails, some of its writes may already have taken
effect.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson
from pymilvus import DataType, MilvusClient

from service.errors import (
    CollectionNotFound,
    Conflict,
    InvalidRequest,
    ItemNotFound,
    StorageFailed,
)
from service.search.checks import (
    check_id,
    check_k,
    check_match,
    check_name,
    check_source_text,
    checked_items,
    merged,
    metadata_text,
    normalised_rows,
)
from service.search.facets import ValueCounts
from service.search.filter_milvus import FIELD, Expression, quoted, translate
from service.search.filters import Filter, Path, matches
from service.search.milvus_client import Server, decoded, encoded, index
from service.search.milvus_rows import (
    Row,
    batches,
    best_hits,
    cursor_at,
    hit_of,
    id_after,
    id_in,
    item_of,
    metadata_of,
    rounded,
    row_of,
    row_of_hit,
    spec_of,
)
from service.search.specs import check_spec
from service.search.store import (
    CollectionInfo,
    CollectionSpec,
    Facets,
    Floats,
    Hit,
    Hits,
    Item,
    Metadata,
    Order,
    Page,
    SearchParams,
    VectorStore,
)

TIMEOUT_S: Final = 15.0
"""The time limit in seconds for one call to the server, including the client's retries."""
_SPEC: Final = "dinov2.spec"
_SPEC_STARTS: Final = '{"tag":'
_MAX_LIMIT: Final = 16_384
"""The highest number of rows that Milvus returns in one answer."""
_MAX_HITS: Final = 50_000
"""The highest number of hits that one call requests, over all its queries. Hits contain metadata, and the answer to a
call is one message of limited size."""
_PAGE: Final = 500
_ITEM: Final = ["id", "vector", "text", "source", "digest"]


async def open_milvus(url: str, *, timeout_s: float = TIMEOUT_S) -> VectorStore:
    """Connect to the Milvus server at `url` and return the store. `url` has the same form as the setting
    `vector_store`. Error messages omit the password in `url`.

    Raises:
        Unavailable: the server cannot be reached.
        StorageFailed: the server refuses the connection.
    """
    # pymilvus logs every error with a traceback, even a missing collection; this module handles or raises each of them.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    server = Server(url, timeout_s)
    await server.connect()
    return MilvusStore(server)


class MilvusStore:
    """A `VectorStore` that stores its collections in a Milvus server."""

    capabilities: frozenset[str] = frozenset()

    def __init__(self, server: Server) -> None:
        self._server = server
        self._writes: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # key: our name for a collection
        self._names = asyncio.Lock()  # held while a name is created, dropped or changed
        self._is_open = True

    # ---- collections

    async def create(self, collection: str, spec: CollectionSpec) -> CollectionInfo:
        check_name(collection), check_spec(spec)
        async with self._names:
            try:
                name, existing = await self._resolve(collection)
            except CollectionNotFound:
                name, existing = await self._create(collection, spec)
        if name != collection:
            raise Conflict(f"{collection!r} is an alias of {name!r}")
        if existing != spec:
            raise Conflict(f"collection {collection!r} exists with other settings: {existing}")
        return await self._info(name, existing)

    async def collections(self) -> list[CollectionInfo]:
        infos = []
        for name in await self._own_names():
            try:
                infos.append(await self.info(name))
            except CollectionNotFound:  # just dropped, or created by another application
                continue
        return infos

    async def info(self, collection: str) -> CollectionInfo:
        return await self._info(*await self._resolve(collection))

    async def set_indexed(self, collection: str, indexed: Sequence[str]) -> CollectionInfo:
        raise InvalidRequest(
            "Milvus has no indexes on metadata keys, so indexed cannot be changed; filters do not need it",
            param="indexed",
        )

    async def drop(self, collection: str) -> None:
        async with self._names:
            name, _ = await self._resolve(collection)
            if name != collection:
                raise Conflict(f"{collection!r} is an alias of {name!r}: delete the alias, or the collection")
            aliases = await self._server.call("list_aliases", collection_name=encoded(name))
            if aliases["aliases"]:
                shown = [decoded(alias) or alias for alias in aliases["aliases"]]
                raise Conflict(f"collection {collection!r} has the aliases {', '.join(map(repr, sorted(shown)))}")
            async with self._writes[name]:
                await self._server.call("drop_collection", collection_name=encoded(name))

    async def aliases(self) -> dict[str, str]:
        targets = {}
        for name in await self._own_names():
            answer = await self._server.call("list_aliases", collection_name=encoded(name))
            targets.update({alias: name for alias in map(decoded, answer["aliases"]) if alias is not None})
        return dict(sorted(targets.items()))

    async def set_alias(self, alias: str, collection: str) -> str | None:
        check_name(alias)
        async with self._names:
            name, _ = await self._resolve(collection)
            before = None
            with suppress(CollectionNotFound):
                before, _ = await self._resolve(alias)
            if before == alias:
                raise Conflict(f"{alias!r} is a collection, so it cannot be an alias")
            method = "create_alias" if before is None else "alter_alias"
            await self._server.call(method, collection_name=encoded(name), alias=encoded(alias))
            return before

    async def drop_alias(self, alias: str) -> None:
        check_name(alias)
        async with self._names:
            if alias not in await self.aliases():
                raise CollectionNotFound(f"there is no alias {alias!r}")
            await self._server.call("drop_alias", alias=encoded(alias))

    # ---- items

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
        checked, dimension = checked_items(items)
        try:
            name, spec = await self._resolve(collection)
        except CollectionNotFound:
            async with self._names:
                try:
                    name, spec = await self._resolve(collection)
                except CollectionNotFound:
                    name, spec = await self._create(collection, check_spec(CollectionSpec(tag, dimension)))
        check_match(CollectionInfo(name, spec, 0), tag=tag, dimension=dimension)
        rows = [row_of(item, vector.astype(spec.dtype).astype(np.float32), text) for item, vector, text in checked]
        async with self._writes[name]:
            for batch in batches(rows):
                await self._server.call("upsert", collection_name=encoded(name), data=batch)
        return await self._info(name, spec)

    async def get(self, collection: str, ids: Sequence[str]) -> list[Item | None]:
        wanted = [check_id(item_id) for item_id in ids]
        name, _ = await self._resolve(collection)
        rows = {row["id"]: row for row in await self._by_id(name, wanted, _ITEM)}
        return [item_of(rows[item_id]) if item_id in rows else None for item_id in wanted]

    async def patch(
        self, collection: str, item_id: str, metadata: Metadata, *, source: str | None = None, keep_source: bool = True
    ) -> Item:
        check_id(item_id), metadata_text(metadata)
        check_source_text(source)
        name, _ = await self._resolve(collection)
        async with self._writes[name]:
            rows = await self._by_id(name, [item_id], _ITEM)
            if not rows:
                raise ItemNotFound(f"collection {collection!r} holds no item {item_id[:80]!r}", param="id")
            old = item_of(rows[0])
            new = merged(old.metadata, metadata)
            text = metadata_text(new)
            item = Item(old.id, old.vector, new, old.source if keep_source else source, old.digest)
            await self._server.call("upsert", collection_name=encoded(name), data=[row_of(item, old.vector, text)])
        return item

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        wanted = [check_id(item_id) for item_id in ids]
        name, _ = await self._resolve(collection)
        async with self._writes[name]:
            return await self._delete(name, [row["id"] for row in await self._by_id(name, wanted, ["id"])])

    async def delete_where(self, collection: str, where: Filter) -> int:
        """Delete the items that match a filter, page by page, and return the number of deleted items. Items that
        another process writes at the same time may or may not be deleted."""
        name, _ = await self._resolve(collection)
        async with self._writes[name]:
            gone = 0
            async for rows in self._pages(name, where, fields=["id", "text"]):
                gone += await self._delete(name, [row["id"] for row in rows])
            return gone

    async def count(self, collection: str, where: Filter | None = None) -> int:
        """Count the items that match a filter, or all items if `where` is None.

        If the filter has no exact translation to a Milvus expression, ids and metadata are fetched, and the matching
        items are counted in this process.
        """
        name, spec = await self._resolve(collection)
        if where is None:
            return (await self._info(name, spec)).count
        expression = translate(where)
        if expression.is_exact and isinstance(expression.text, str):
            return await self._count(name, expression.text)
        return sum([len(rows) async for rows in self._pages(name, where, fields=["id", "text"])])

    async def facets(self, collection: str, path: Path, *, where: Filter | None = None, limit: int = 100) -> Facets:
        """Count the distinct values of a metadata key. The metadata of all matching items is fetched."""
        name, _ = await self._resolve(collection)
        counts = ValueCounts(path)
        async for rows in self._pages(name, where, fields=["id", "text"]):
            for row in rows:
                counts.add(metadata_of(row))
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
        """Return a page of items in order of id. `max_bytes` has no effect."""
        if order is not None:
            raise InvalidRequest("order_by is not supported by Milvus, which lists items by id", param="order_by")
        after = id_after(cursor)
        name, _ = await self._resolve(collection)
        page: list[Row] = []
        async for rows in self._pages(name, where, fields=_ITEM, after=after, size=min(limit + 1, _PAGE)):
            page += rows
            if len(page) > limit:
                return Page([item_of(row) for row in page[:limit]], cursor_at(page[limit - 1]["id"]))
        return Page([item_of(row) for row in page], None)

    # ---- search

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
        """Return the k nearest items for each query vector, using Milvus' HNSW index. This index does not support exact
        search. If `params.exact` is true, the search uses a high value of the search parameter `ef` instead.
        `max_bytes` has no effect."""
        check_k(k)
        queries = normalised_rows(vectors)
        name, spec = await self._resolve(collection)
        check_match(CollectionInfo(name, spec, 0), tag=tag, dimension=queries.shape[1])
        expression = Expression(True, True) if where is None else translate(where)
        if expression.text is False:
            return [Hits.of([]) for _ in queries]
        answers: list[list[Hit] | None] = [None] * len(queries)
        depth = k + 1
        while (open_queries := [query for query, answer in enumerate(answers) if answer is None]) and depth:
            nearest = await self._nearest(name, queries[open_queries], depth, expression, params or SearchParams())
            for query, rows in zip(open_queries, nearest, strict=True):
                answers[query] = best_hits(rows, k, where, is_all=len(rows) < depth, is_last=depth == _MAX_LIMIT)
            depth = min(4 * depth, _MAX_LIMIT) if depth < _MAX_LIMIT else 0
        if open_queries:
            assert where is not None
            scanned = await self._scan(name, queries[open_queries], k, where)
            for query, hits in zip(open_queries, scanned, strict=True):
                answers[query] = hits
        return [Hits.of(answer) for answer in answers if answer is not None]

    async def _nearest(
        self, name: str, queries: Floats, depth: int, expression: Expression, params: SearchParams
    ) -> list[list[Row]]:
        usual = 128 if expression.text is True else 512  # a filter leaves fewer paths in the graph
        ef = max(depth, _MAX_LIMIT if params.exact else params.ef_search or usual)
        together = max(1, _MAX_HITS // depth)
        answers: list[Any] = []
        for start in range(0, len(queries), together):
            answers += await self._server.call(
                "search",
                collection_name=encoded(name),
                data=[query.tolist() for query in queries[start : start + together]],
                filter=expression.text if isinstance(expression.text, str) else "",
                limit=depth,
                output_fields=["text", "source"],
                search_params={"metric_type": "IP", "params": {"ef": ef}},
                anns_field="vector",
            )
        return [[row_of_hit(hit) for hit in answer] for answer in answers]

    async def _scan(self, name: str, queries: Floats, k: int, where: Filter) -> list[list[Hit]]:
        """Return the k best hits for each query [q, D]. Each query is compared with every item that passes the
        filter."""
        best: list[list[Hit]] = [[] for _ in queries]
        async for rows in self._pages(name, where, fields=["id", "vector", "text", "source"]):
            if rows:
                scores = queries @ np.array([row["vector"] for row in rows], np.float32).T
                for query, line in enumerate(scores.tolist()):
                    hits = best[query] + [hit_of(row, rounded(score)) for row, score in zip(rows, line, strict=True)]
                    best[query] = sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k]
        return best

    async def close(self) -> None:
        """Wait for running calls and close the connection. A second call has no effect."""
        if self._is_open:
            self._is_open = False
            await self._server.close()

    # ---- helpers

    async def _resolve(self, collection: str) -> tuple[str, CollectionSpec]:
        """Return the name and settings of the collection with this name or alias. Raises CollectionNotFound if there is
        no such collection."""
        missing = CollectionNotFound(f"there is no collection {check_name(collection)!r}")
        try:
            described = await self._server.call("describe_collection", collection_name=encoded(collection))
        except CollectionNotFound:
            raise missing from None
        name = decoded(described["collection_name"])
        text = described.get("properties", {}).get(_SPEC) or described.get("description", "")
        if name is None or not text.startswith(_SPEC_STARTS):  # another application has a collection with such a name
            raise missing
        return name, spec_of(name, text)

    async def _create(self, name: str, spec: CollectionSpec) -> tuple[str, CollectionSpec]:
        """Create a collection and return its name and settings. If another process created a collection with this name
        at the same time, return the name and settings of that collection."""
        try:
            await self._make(name, spec)
        except StorageFailed as error:
            try:
                return await self._resolve(name)
            except CollectionNotFound:
                raise error from None
        return name, spec

    async def _make(self, name: str, spec: CollectionSpec) -> None:
        text = orjson.dumps(asdict(spec)).decode()
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=text)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=1024)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=spec.dimension)
        schema.add_field(FIELD, DataType.JSON)
        schema.add_field("text", DataType.VARCHAR, max_length=65535)
        schema.add_field("source", DataType.VARCHAR, max_length=8192)
        schema.add_field("digest", DataType.VARCHAR, max_length=64)
        await self._server.call(
            "create_collection",
            collection_name=encoded(name),
            schema=schema,
            index_params=index(),
            consistency_level="Strong",
            properties={_SPEC: text},
        )

    async def _own_names(self) -> list[str]:
        names = map(decoded, await self._server.call("list_collections"))
        return sorted(name for name in names if name is not None)

    async def _info(self, name: str, spec: CollectionSpec) -> CollectionInfo:
        return CollectionInfo(name, spec, await self._count(name, ""))

    async def _count(self, name: str, expression: str) -> int:
        rows = await self._server.call(
            "query", collection_name=encoded(name), filter=expression, output_fields=["count(*)"]
        )
        return int(rows[0]["count(*)"])

    async def _by_id(self, name: str, ids: Iterable[str], fields: list[str]) -> list[Row]:
        wanted = list(dict.fromkeys(ids))
        rows: list[Row] = []
        for start in range(0, len(wanted), _PAGE):
            batch = wanted[start : start + _PAGE]
            rows += await self._server.call(
                "query", collection_name=encoded(name), filter=id_in(batch), output_fields=fields, limit=len(batch)
            )
        return rows

    async def _delete(self, name: str, ids: list[str]) -> int:
        for start in range(0, len(ids), _PAGE):
            expression = id_in(ids[start : start + _PAGE])
            await self._server.call("delete", collection_name=encoded(name), filter=expression)
        return len(ids)

    async def _pages(
        self, name: str, where: Filter | None, *, fields: list[str], after: str = "", size: int = _PAGE
    ) -> AsyncIterator[list[Row]]:
        """Yield pages of the rows that pass a filter, in order of id. If `where` is None, all rows are included.

        `fields` must include "id" and "text". The first page begins with the id that follows `after`. A page may be
        empty even if more pages follow.
        """
        expression = True if where is None else translate(where).text
        while expression is not False:
            condition = f"id > {quoted(after)}" + (f" and ({expression})" if isinstance(expression, str) else "")
            # With these two flags, a limited answer contains the rows with the lowest ids. The client's iterator also
            # sets them.
            rows = await self._server.call(
                "query",
                collection_name=encoded(name),
                filter=condition,
                output_fields=fields,
                limit=size,
                iterator="True",
                reduce_stop_for_best="True",
            )
            yield [row for row in rows if where is None or matches(where, metadata_of(row), row["id"])]
            if len(rows) < size:
                return
            after = rows[-1]["id"]
