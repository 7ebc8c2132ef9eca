"""Find similar images: `/v1/collections/{name}/search`. Scores are cosine similarities."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from service.data_urls import check_count
from service.errors import InvalidItems
from service.outcomes import Outcome, split_items
from service.retrieval.query import SearchRequest
from service.retrieval.reading import read_image_search, read_search
from service.retrieval.search import QueryResults, SearchResults
from service.retrieval.search import search as search_collection
from service.routes.answers import json_response, server_timing
from service.routes.bodies import json_of, media_type, read_upload
from service.routes.direct import DirectRoute, service_of
from service.schemas import QueryIn, SearchIn, SearchOptions, json_schema
from service.search.checks import check_name
from service.search.store import Hit
from service.settings import Settings
from service.timings import ms_since

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


@router.post("/{name}/search", summary="Find similar images", openapi_extra={"requestBody": {"content": _BODIES}})
async def search(request: Request, name: str) -> Response:
    """Find the items that are most similar to a query, best first. A query is an image, a region of an image, a vector,
    an item of the collection, or a combination of images, vectors and items. Send one query, or up to 64 queries in
    `queries`. Scores are cosine similarities from -1 to 1."""
    started = time.perf_counter()
    service = service_of(request)
    check_name(name)
    search_request = await _read(request, service.settings)
    results = await search_collection(service, name, search_request)
    body: dict[str, Any] = {"object": "list", "collection": name}
    body |= _batch(search_request, results) if search_request.batch else _answer(results.queries[0].result())
    timings = results.timings | {"total": ms_since(started)}
    return json_response(body | service.identity(results.tag) | {"timings": timings}, headers=server_timing(timings))


async def _read(request: Request, settings: Settings) -> SearchRequest:
    """Parse a search request. The body is JSON with one query or a list of queries, a form with one image file, or one
    image as the raw body."""
    if media_type(request) == "application/json":
        return await read_search(await json_of(request), settings)
    upload = await read_upload(request, settings, key="image")
    check_count(len(upload.images), settings.model_copy(update={"max_batch_items": 1}), "file")
    return read_image_search(upload.images[0], upload.fields, settings)


def _batch(request: SearchRequest, results: SearchResults) -> dict[str, Any]:
    good, bad = split_items([_plain(outcome) for outcome in results.queries], request.on_error, "queries")
    body: dict[str, Any] = {"results": [{"index": index, **_answer(query_results)} for index, query_results in good]}
    if bad:
        body["errors"] = [item.body() for item in bad]
    return body


def _plain(outcome: Outcome[QueryResults]) -> Outcome[QueryResults]:
    """Return the outcome of one query in a batch. If the error is an `InvalidItems` with exactly one item, the error of
    this item replaces it. Otherwise the answer would contain two indexes: that of the query, and that of the item,
    which is always 0 and means nothing to the client."""
    if isinstance(outcome.error, InvalidItems) and len(outcome.error.items) == 1:
        return replace(outcome, error=outcome.error.items[0].error)
    return outcome


def _answer(results: QueryResults) -> dict[str, Any]:
    if results.groups is None:
        return {"data": _rows(results.hits, results)}
    groups = [{"value": group.value, "data": _rows(group.hits, results)} for group in results.groups]
    return {"groups": groups, "truncated": results.truncated}


def _rows(hits: Sequence[Hit], results: QueryResults) -> list[dict[str, Any]]:
    rows = [_row(hit) for hit in hits]
    if not results.comparisons and not results.vectors:
        return rows
    for row in rows:
        if row["id"] in results.comparisons:
            comparison = results.comparisons[row["id"]]
            row["rerank_score"] = comparison.score
            if comparison.matches is not None:
                row["matches"] = comparison.matches
        if row["id"] in results.vectors:
            row["vector"] = results.vectors[row["id"]]
    return rows


def _row(hit: Hit) -> dict[str, Any]:
    row = {"id": hit.id, "score": hit.score, "metadata": hit.metadata}
    if hit.source is not None:
        row["source"] = hit.source
    return row
