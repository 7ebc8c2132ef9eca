"""Find similar images: `/v1/collections/{name}/search`. Scores are cosine similarities."""

import time
from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter, Request

from service.answer_schemas import BatchAnswer, HitFields, HitGroup, IndexedQueryAnswer, QueryAnswer, SearchAnswer
from service.clients import current_sender
from service.data_urls import check_count
from service.errors import Conflict, InvalidItems, ItemNotFound, ModelMismatch, ModelNotFound
from service.outcomes import Outcome, split_items, successes
from service.retrieval.query import SearchRequest
from service.retrieval.reading import read_image_search, read_search
from service.retrieval.search import QueryResults, SearchResults
from service.retrieval.search import search as search_collection
from service.routes.answers import JsonAnswer, item_errors, json_response, server_timing
from service.routes.bodies import json_of, media_type, read_upload
from service.routes.describe import COLLECTION, IMAGES, Operation, Upload, describe
from service.routes.direct import DirectRoute, service_of
from service.schemas import SearchIn, SearchOptions
from service.search.checks import check_name
from service.search.store import Hit, Hits
from service.state import FEW_RESULTS, Service
from service.timings import ms_since

router = APIRouter(prefix="/v1/collections", tags=["search"], route_class=DirectRoute)


@router.post("/{name}/search", summary="Find similar images")
@describe(
    Operation(
        errors=(*IMAGES, *COLLECTION, ItemNotFound, ModelNotFound, ModelMismatch, Conflict),
        upload=Upload(SearchIn, SearchOptions, many=False),
        answer_headers=("Server-Timing",),
    )
)
async def search(request: Request, name: str) -> JsonAnswer[SearchAnswer]:
    """Find the items that are most similar to a query, best first. A query is an image, a region of an image, a vector,
    an item of the collection, or a combination of images, vectors and items. Send one query, or up to 64 queries in
    `queries`. Scores are cosine similarities from -1 to 1."""
    started = time.perf_counter()
    service = service_of(request)
    check_name(name)
    search_request = await _read(request, service)
    queries = successes(search_request.queries)
    if sum(query.results + query.ranking.offset for query in queries) <= FEW_RESULTS:
        return await _search(request, service, name, search_request, started)
    async with service.large_answers.turn(current_sender.get()):
        return await _search(request, service, name, search_request, started)


async def _search(
    request: Request, service: Service, name: str, asked: SearchRequest, started: float
) -> JsonAnswer[SearchAnswer]:
    """Run a search that began at `started`, and return the answer."""
    results = await search_collection(service, name, asked)
    answer = _batch(request, asked, results) if asked.batch else _answer(results.queries[0].result())
    timings = results.timings | {"total": ms_since(started)}
    body: SearchAnswer = {
        "object": "list",
        "collection": name,
        **answer,
        **service.identity(results.tag),
        "timings": timings,
    }
    return json_response(body, headers=server_timing(timings), most=service.settings.max_answer_bytes)


async def _read(request: Request, service: Service) -> SearchRequest:
    """Parse a search request. The body is JSON with one query or a list of queries, a form with one image file, or one
    image as the raw body."""
    settings = service.settings
    if media_type(request) == "application/json":
        return await read_search(await json_of(request), settings, service.web_images)
    upload = await read_upload(request, settings, key="image")
    check_count(len(upload.images), settings.model_copy(update={"max_batch_items": 1}), "file")
    return read_image_search(upload.images[0], upload.fields, settings)


def _batch(request: Request, asked: SearchRequest, results: SearchResults) -> BatchAnswer:
    good, bad = split_items([_plain(outcome) for outcome in results.queries], asked.on_error, "queries")
    rows: list[IndexedQueryAnswer] = [{"index": index, **_answer(query_results)} for index, query_results in good]
    body: BatchAnswer = {"results": rows}
    if bad:
        body["errors"] = item_errors(request, bad)
    return body


def _plain(outcome: Outcome[QueryResults]) -> Outcome[QueryResults]:
    """Return the outcome of one query in a batch. If the error is an `InvalidItems` with exactly one item, the error of
    this item replaces it. Otherwise the answer would contain two indexes: that of the query, and that of the item,
    which is always 0 and means nothing to the client."""
    if isinstance(outcome.error, InvalidItems) and len(outcome.error.items) == 1:
        return replace(outcome, error=outcome.error.items[0].error)
    return outcome


def _answer(results: QueryResults) -> QueryAnswer:
    if results.groups is None:
        return {"data": _rows(results.hits, results)}
    groups: list[HitGroup] = [{"value": group.value, "data": _rows(group.hits, results)} for group in results.groups]
    return {"groups": groups, "truncated": results.truncated}


def _rows(hits: Sequence[Hit], results: QueryResults) -> list[HitFields]:
    hits = hits if isinstance(hits, Hits) else Hits.of(hits)
    rows: list[HitFields] = [
        {"id": item_id, "score": score, "metadata": metadata}
        for item_id, score, metadata in zip(hits.ids, hits.scores, hits.metadata, strict=True)
    ]
    for row, source in zip(rows, hits.sources, strict=True):
        if source is not None:
            row["source"] = source
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
