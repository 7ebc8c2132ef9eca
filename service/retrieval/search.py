"""Run a search: compute the vector of each query (`origins.py`), query the store, and cut each result to the requested
page.

The most common request consists of a single vector and skips the first step. It does not read the collection's tag
first either, because the store compares this tag with the tag of the query. (A tag names the model and the pooling of
vectors.) In a batch, queries with the same options share one call to the store.

An item that a query names by id is left out of the answer, because it would usually be the best hit. One extra hit is
therefore read for each such item.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import orjson

from service.errors import AnswerTooLarge, ModelMismatch
from service.outcomes import Outcome, indexed, successes
from service.retrieval.grouping import Group, grouped
from service.retrieval.origins import Origin, Target, find_origins
from service.retrieval.query import Query, SearchRequest
from service.retrieval.rerank import Comparison, reranked
from service.search.store import MAX_DEPTH, Floats, Hit
from service.state import Service
from service.timings import ms_since
from service.tracing import record_stage

VECTOR_VALUE_BYTES: Final = 12
"""The size of one number of a vector in JSON."""


@dataclass
class QueryResults:
    """The results of one query: either hits, best first, or groups of hits.

    comparisons: the results of comparing hits with the query patch by patch, as a dict by item id. It is empty unless
        the query requests re-ranking.
    vectors: the vectors of the items, as a dict by item id. It is empty unless the query requests vectors.
    """

    hits: Sequence[Hit] = ()
    groups: list[Group] | None = None
    truncated: bool = False
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    vectors: Mapping[str, Floats] = field(default_factory=dict)

    def ids(self) -> list[str]:
        return [hit.id for hit in self.hits] + [hit.id for group in self.groups or () for hit in group.hits]


@dataclass(frozen=True)
class SearchResults:
    """The results of a search request. `queries` contains the results or the error of each query, in order. `tag` is
    the collection's tag. `timings` contains the duration of each stage in milliseconds."""

    queries: list[Outcome[QueryResults]]
    tag: str
    timings: dict[str, float]


async def search(service: Service, name: str, request: SearchRequest) -> SearchResults:
    """Find the items of a collection that are nearest to each query, and return the results. `name` is the collection's
    name or an alias.

    Raises:
        ServiceError: the whole request fails, for instance because the queue is full or the collection does not exist.
    """
    quick = await _by_one_vector(service.named(request.model), name, request)
    if quick is not None:
        return quick
    target = await Target.of(service, name, request.model, _fingerprints(request))
    room = _room(service, target, request)
    origins = await find_origins(service, target, request.queries)
    timings: dict[str, float] = {}
    for _, origin in indexed(origins):
        for stage, ms in origin.timings.items():
            timings[stage] = max(timings.get(stage, 0.0), ms)
    started = time.perf_counter()
    results = await _find(service, target, request, origins, room)
    timings["search"] = ms_since(started)
    record_stage("search", started, time.perf_counter())
    await _add_vectors(service, target, request, results)
    return SearchResults(results, target.info.tag, timings)


def _room(service: Service, target: Target, request: SearchRequest) -> int:
    """Return the number of bytes that the metadata of all hits may have, before anything is computed.

    Raises:
        AnswerTooLarge: the vectors in the answer alone would exceed the limit.
    """
    most, dimension = service.settings.max_answer_bytes, target.info.dimension
    vectors = sum(
        min(query.results, target.info.count) for query in successes(request.queries) if query.ranking.include
    )
    size = vectors * dimension * VECTOR_VALUE_BYTES
    if size > most:
        raise AnswerTooLarge(
            f"an answer with {vectors:,} vectors of {dimension:,} numbers would have about {size:,} bytes, and at most "
            f"{most:,} are allowed: ask for fewer results (k, group_size) or queries, or leave out include=vector",
            param="include",
        )
    return most - size


def _fingerprints(request: SearchRequest) -> set[str]:
    """Return the fingerprints that the vectors of a request have, or an empty set if a query has no fingerprint."""
    parts = [part for query in successes(request.queries) for part in query.parts]
    named = {part.fingerprint for part in parts if part.fingerprint is not None}
    return named if all(part.fingerprint is not None for part in parts) else set()


async def _by_one_vector(service: Service, name: str, request: SearchRequest) -> SearchResults | None:
    """Answer a request that consists of one vector, without grouping and without `include`, on the assumption that the
    collection has the default pooling. Return None if the request is of another kind, or if the tags of the query and
    the collection differ. `search` then answers the request in the general way."""
    if request.batch:
        return None
    query = request.queries[0].result()
    if query.form != "vector" or query.path or query.ranking.include:
        return None
    part, started = query.parts[0], time.perf_counter()
    assert part.vector is not None
    tag, assumed = service.tag(part.fingerprint), part.fingerprint is None
    try:
        [hits] = await service.store.search(
            name,
            part.vector[None],
            query.depth,
            tag=tag,
            where=query.where,
            params=query.params,
            assumed=assumed,
            max_bytes=service.settings.max_answer_bytes,
        )
    except ModelMismatch:
        return None
    timings = {"search": ms_since(started)}
    record_stage("search", started, time.perf_counter())
    return SearchResults([Outcome(0, QueryResults(_cut(query, hits)))], tag, timings)


async def _find(
    service: Service, target: Target, request: SearchRequest, origins: Sequence[Outcome[Origin]], room: int
) -> list[Outcome[QueryResults]]:
    """Run the search for each query, and return the results or the error of each query, in order. The metadata of all
    hits may have `room` bytes."""
    results: dict[int, QueryResults] = {}
    batches: dict[bytes, dict[int, tuple[Query, Origin]]] = {}
    for number, origin in indexed(origins):
        query = request.queries[number].result()
        if query.path is not None:
            results[number] = await _groups(service, target, query, query.path, origin, room)
            room -= _metadata_bytes([results[number]], request)
        else:
            batches.setdefault(query.batch_key, {})[number] = (query, origin)
    for batch in batches.values():
        hits = await _hits(service, target, list(batch.values()), room)
        room -= _metadata_bytes(hits, request)
        results |= zip(batch, hits, strict=True)
    return [Outcome(origin.index, results.get(origin.index), origin.error) for origin in origins]


def _metadata_bytes(found: Sequence[QueryResults], request: SearchRequest) -> int:
    """Return the size of the metadata of all hits, or 0 if the request has a single query."""
    if not request.batch:
        return 0
    lists = [results.hits for results in found]
    lists += [group.hits for results in found for group in results.groups or ()]
    return sum(len(orjson.dumps(hit.metadata)) for hits in lists for hit in hits)


async def _hits(
    service: Service, target: Target, batch: Sequence[tuple[Query, Origin]], room: int
) -> list[QueryResults]:
    """Answer queries that have the same options but different vectors, with a single call to the store. Return the
    results in the order of the queries."""
    first = batch[0][0]
    depth = first.depth if first.ranking.rerank is None else max(first.depth, first.rerank_depth)
    depth = min(MAX_DEPTH, depth + max(len(origin.exclude) for _, origin in batch))
    vectors = np.stack([origin.vector for _, origin in batch])
    rankings = await service.store.search(
        target.info.ref,
        vectors,
        depth,
        tag=target.info.tag,
        where=first.where,
        params=first.params,
        max_bytes=max(room, 0),
    )
    results = []
    for (query, origin), hits in zip(batch, rankings, strict=True):
        kept = [hit for hit in hits if hit.id not in origin.exclude]
        if query.ranking.rerank is None:
            results.append(QueryResults(_cut(query, kept)))
        else:
            ranked = await reranked(target.service, target, query, origin, _above(query, kept))
            results.append(QueryResults(_page(query, ranked.hits), comparisons=ranked.comparisons))
    return results


async def _groups(
    service: Service, target: Target, query: Query, path: tuple[str, ...], origin: Origin, room: int
) -> QueryResults:
    """Return the results of a query that requests groups."""

    async def best(depth: int) -> Sequence[Hit]:
        info, vectors = target.info, origin.vector[None]
        [hits] = await service.store.search(
            info.ref, vectors, depth, tag=info.tag, where=query.where, params=query.params, max_bytes=max(room, 0)
        )
        return hits

    groups = await grouped(
        best,
        path,
        k=query.ranking.k,
        size=query.ranking.group_size or 1,
        offset=query.ranking.offset,
        keep=lambda hit: hit.id not in origin.exclude,
        threshold=query.ranking.score_threshold,
    )
    return QueryResults(groups=groups.groups, truncated=groups.truncated)


def _above(query: Query, hits: Sequence[Hit]) -> Sequence[Hit]:
    """Return the hits that reach the query's score threshold, in the same order."""
    least = query.ranking.score_threshold
    return hits if least is None else [hit for hit in hits if hit.score >= least]


def _page(query: Query, hits: Sequence[Hit]) -> Sequence[Hit]:
    return hits[query.ranking.offset : query.depth]


def _cut(query: Query, hits: Sequence[Hit]) -> Sequence[Hit]:
    return _page(query, _above(query, hits))


async def _add_vectors(
    service: Service, target: Target, request: SearchRequest, outcomes: Sequence[Outcome[QueryResults]]
) -> None:
    """For each query that requests vectors, add the vectors of the items in its results to these results."""
    asking = [results for number, results in indexed(outcomes) if request.queries[number].result().ranking.include]
    ids = list(dict.fromkeys(item_id for results in asking for item_id in results.ids()))
    items = await service.store.get(target.info.ref, ids) if ids else []
    vectors = {item.id: np.ascontiguousarray(item.vector) for item in items if item is not None}
    for results in asking:
        results.vectors = vectors
