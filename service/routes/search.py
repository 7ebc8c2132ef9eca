"""`/v1/collections/{name}/search`: similar photos come out. Scores are cosine similarities.

The straight line: read the queries (`queries`), find where each starts (`origins`), ask the store, cut its answer to
size. The commonest request, one vector, skips the second step: the store compares the tags itself, so nothing about the
collection need be known before. Queries of a batch that ask for the same share one call of the store.

What a query names by id is left out of its answer: "like this one" does not mean this one. So that many more are
searched for.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from service.errors import InvalidItems, ModelMismatch
from service.outcomes import Outcome, indexed, split_items
from service.retrieval.grouping import Group, grouped
from service.retrieval.origins import Origin, Target, find_origins
from service.retrieval.rerank import Ranked, rerank_depth, reranked
from service.routes.answers import json_response, ms_since, server_timing
from service.routes.direct import DirectRoute
from service.routes.queries import Asked, Query, read_search
from service.routes.uploads import service_of
from service.schemas import QueryIn, SearchIn, SearchOptions, json_schema
from service.search.store import MAX_DEPTH, Hit, check_name
from service.state import Service

router = APIRouter(prefix="/v1/collections", tags=["search"], route_class=DirectRoute)

_SCHEMA = json_schema(SearchIn)
_SCHEMA["properties"]["queries"]["items"] = json_schema(QueryIn)
_FORM = {"type": "object", "required": ["file"]}
_FILE = {"file": {"type": "string", "format": "binary"}}
_BODIES = {
    "application/json": {"schema": _SCHEMA},
    "multipart/form-data": {"schema": {**_FORM, "properties": _FILE | json_schema(SearchOptions)["properties"]}},
    "image/*": {"schema": {"type": "string", "format": "binary"}},
}


@dataclass
class Found:
    """What one query found: hits, or groups of them."""

    data: list[Ranked] = field(default_factory=list)
    groups: list[Group] | None = None
    truncated: bool = False

    def ids(self) -> list[str]:
        return [one.hit.id for one in self.data] + [hit.id for group in self.groups or () for hit in group.hits]


@router.post("/{name}/search", summary="Find similar photos", openapi_extra={"requestBody": {"content": _BODIES}})
async def search(request: Request, name: str) -> Response:
    """The items nearest to a photo, a part of one, a vector, an item, or a combination; or of up to 64 such queries."""
    started = time.perf_counter()
    service = service_of(request)
    check_name(name)
    asked = await read_search(request, service.settings)
    service.check_model(asked.model)
    timings: dict[str, float] = {}
    body: dict[str, Any] = {"object": "list", "collection": name}
    quick = await _by_one_vector(service, name, asked, timings)
    if quick is not None:
        tag, hits = quick
        body["data"] = [_row(hit) for hit in hits]
    else:
        target = await Target.of(service, name)
        tag = target.info.tag
        found = await _find(service, target, asked, timings)
        vectors = await _vectors(service, target, asked, found)
        if asked.batch:
            body |= _batch(asked, found, vectors)
        else:
            [only] = found
            body |= _answer(only.result(), vectors)
    timings["total"] = ms_since(started)
    return json_response(body | service.identity(tag) | {"timings": timings}, headers=server_timing(timings))


async def _by_one_vector(
    service: Service, name: str, asked: Asked, timings: dict[str, float]
) -> tuple[str, Sequence[Hit]] | None:
    """The collection's tag and the hits of a request that is one vector and nothing unusual; None when it takes the
    longer way. That looks the tag up; here it is taken for granted that the pooling is the usual one."""
    if asked.batch:
        return None
    query = asked.queries[0].result()
    if query.form != "vector" or query.path or query.asked.include:
        return None
    part, started = query.parts[0], time.perf_counter()
    assert part.vector is not None
    tag, depth = service.tag(part.fingerprint), query.asked.k + query.asked.offset
    try:
        [hits] = await service.vectors.search(
            name, part.vector[None], depth, tag=tag, where=query.where, params=query.params
        )
    except ModelMismatch:
        return None
    timings["search"] = ms_since(started)
    return tag, _cut(query, hits)


async def _find(service: Service, target: Target, asked: Asked, timings: dict[str, float]) -> list[Outcome[Found]]:
    """What each query finds, or why it finds nothing, in order."""
    origins = await find_origins(service, target, asked.queries)
    started = time.perf_counter()
    found: dict[int, Found] = {}
    alike: dict[bytes, dict[int, tuple[Query, Origin]]] = {}
    for number, origin in indexed(origins):
        query = asked.queries[number].result()
        for stage, ms in origin.timings.items():
            timings[stage] = max(timings.get(stage, 0.0), ms)
        if query.path is not None:
            found[number] = await _grouped(service, target, query, origin)
        else:
            alike.setdefault(query.like, {})[number] = (query, origin)
    for pairs in alike.values():
        found |= zip(pairs, await _together(service, target, list(pairs.values())), strict=True)
    timings["search"] = ms_since(started)
    return [Outcome(origin.index, found.get(origin.index), origin.error) for origin in origins]


async def _together(service: Service, target: Target, pairs: Sequence[tuple[Query, Origin]]) -> list[Found]:
    """Queries that ask for the same of different places: one call of the store."""
    query = pairs[0][0]
    depth = query.asked.k + query.asked.offset
    if query.asked.rerank is not None:
        depth = max(depth, rerank_depth(query))
    depth = min(MAX_DEPTH, depth + max(len(origin.exclude) for _, origin in pairs))
    info = target.info
    vectors = np.stack([origin.vector for _, origin in pairs])
    answers = await service.vectors.search(
        info.name, vectors, depth, tag=info.tag, where=query.where, params=query.params
    )
    found = []
    for (query, origin), hits in zip(pairs, answers, strict=True):
        kept = [hit for hit in hits if hit.id not in origin.exclude]
        if query.asked.rerank is None:
            found.append(Found([Ranked(hit) for hit in _cut(query, kept)]))
        else:
            ranked = await reranked(service, target, query, origin, _above(query, kept))
            found.append(Found(ranked[query.asked.offset :][: query.asked.k]))
    return found


async def _grouped(service: Service, target: Target, query: Query, origin: Origin) -> Found:
    assert query.path is not None

    async def best(depth: int) -> list[Hit]:
        info, vectors = target.info, origin.vector[None]
        [hits] = await service.vectors.search(
            info.name, vectors, depth, tag=info.tag, where=query.where, params=query.params
        )
        return hits

    groups = await grouped(
        best,
        query.path,
        k=query.asked.k,
        size=query.asked.group_size or 1,
        offset=query.asked.offset,
        keep=lambda hit: hit.id not in origin.exclude,
        threshold=query.asked.score_threshold,
    )
    return Found(groups=groups.groups, truncated=groups.truncated)


def _above(query: Query, hits: Sequence[Hit]) -> Sequence[Hit]:
    """The hits, best first, down to the threshold."""
    least = query.asked.score_threshold
    return hits if least is None else [hit for hit in hits if hit.score >= least]


def _cut(query: Query, hits: Sequence[Hit]) -> Sequence[Hit]:
    return _above(query, hits)[query.asked.offset :][: query.asked.k]


async def _vectors(service: Service, target: Target, asked: Asked, found: Sequence[Outcome[Found]]) -> dict[str, Any]:
    """By id, of those results whose query asks for them."""
    ids: dict[str, None] = {}
    for number, results in indexed(found):
        if asked.queries[number].result().asked.include:
            ids |= dict.fromkeys(results.ids())
    items = await service.vectors.get(target.info.name, list(ids)) if ids else []
    return {item.id: np.ascontiguousarray(item.vector) for item in items if item is not None}


def _batch(asked: Asked, found: Sequence[Outcome[Found]], vectors: Mapping[str, Any]) -> dict[str, Any]:
    good, bad = split_items([_plain(outcome) for outcome in found], asked.on_error, "queries")
    results = []
    for index, one in good:
        include = asked.queries[index].result().asked.include
        results.append({"index": index, **_answer(one, vectors if include else {})})
    body: dict[str, Any] = {"results": results}
    if bad:
        body["errors"] = [item.body() for item in bad]
    return body


def _plain(outcome: Outcome[Found]) -> Outcome[Found]:
    """With the error of a query's only image as it is, without the form that it has in a request of one query."""
    if isinstance(outcome.error, InvalidItems) and len(outcome.error.items) == 1:
        return replace(outcome, error=outcome.error.items[0].error)
    return outcome


def _answer(found: Found, vectors: Mapping[str, Any]) -> dict[str, Any]:
    if found.groups is None:
        return {"data": [_ranked_row(one, vectors) for one in found.data]}
    groups = [
        {"value": group.value, "data": [_ranked_row(Ranked(hit), vectors) for hit in group.hits]}
        for group in found.groups
    ]
    return {"groups": groups, "truncated": found.truncated}


def _ranked_row(ranked: Ranked, vectors: Mapping[str, Any]) -> dict[str, Any]:
    row = _row(ranked.hit)
    if ranked.score is not None:
        row["rerank_score"] = ranked.score
    if ranked.matches is not None:
        row["matches"] = ranked.matches
    if ranked.hit.id in vectors:
        row["vector"] = vectors[ranked.hit.id]
    return row


def _row(hit: Hit) -> dict[str, Any]:
    row = {"id": hit.id, "score": hit.score, "metadata": hit.metadata}
    if hit.source is not None:
        row["source"] = hit.source
    return row
