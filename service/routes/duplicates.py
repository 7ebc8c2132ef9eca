"""Find items in a collection that have identical or nearly identical images: `/v1/collections/{name}/duplicates`. This
search does not use the model."""

import time

from fastapi import APIRouter, Request

from service.answer_schemas import DuplicateGroup, DuplicateItem, DuplicatesAnswer
from service.errors import InvalidRequest, ModelNotFound
from service.options import parse_options
from service.retrieval.reading import search_params
from service.routes.answers import JsonAnswer, json_response, server_timing
from service.routes.bodies import read_json
from service.routes.describe import BODY, COLLECTION, Operation, describe
from service.routes.direct import DirectRoute, service_of
from service.schemas import DuplicatesIn
from service.search.checks import check_name
from service.search.duplicates import Group, by_content, by_similarity, scores_to_first
from service.search.filters import parse_filter
from service.search.store import CollectionInfo
from service.state import Service
from service.timings import ms_since

router = APIRouter(prefix="/v1/collections", tags=["search"], route_class=DirectRoute)

DEFAULT_THRESHOLD = 0.95


@router.post("/{name}/duplicates", summary="Find duplicates")
@describe(Operation(errors=(*BODY, *COLLECTION, ModelNotFound), body=DuplicatesIn, answer_headers=("Server-Timing",)))
async def duplicates(request: Request, name: str) -> JsonAnswer[DuplicatesAnswer]:
    """Find groups of duplicates in a collection, largest group first. With `by=content`, all images in a group have the
    same bytes. With `by=similarity`, two items are linked if their cosine similarity is at least `threshold`, and a
    group contains all items that are linked directly or through other items. The score of an item is its cosine
    similarity to the first item in the group. If `truncated` is true, the answer may be incomplete."""
    started = time.perf_counter()
    service = service_of(request)
    check_name(name)
    options = parse_options(DuplicatesIn, await read_json(request))
    service.named(options.model)  # raises an error before anything is read
    if options.by == "content" and (options.threshold is not None or options.params is not None):
        raise InvalidRequest("threshold and params require by=similarity", param="by")
    where = None if options.filter is None else parse_filter(options.filter)
    info = await service.store.info(name)
    if options.by == "content":
        result = await by_content(service.store, info, where)
    else:
        threshold = DEFAULT_THRESHOLD if options.threshold is None else options.threshold
        result = await by_similarity(service.store, info, threshold, where, search_params(options.params))
    shown = [await _group(service, info, group) for group in result.groups[: options.limit]]
    timings = {"total": ms_since(started)}
    body: DuplicatesAnswer = {
        "object": "list",
        "collection": name,
        "groups": [group for group in shown if len(group["items"]) > 1],  # items may have been deleted meanwhile
        "total_groups": len(result.groups),
        "compared": result.compared,
        "without_digest": result.skipped,
        "truncated": result.truncated,
        **service.identity(info.tag),
        "timings": timings,
    }
    return json_response(body, headers=server_timing(timings))


async def _group(service: Service, info: CollectionInfo, group: Group) -> DuplicateGroup:
    items: list[DuplicateItem] = [
        {"id": item_id, "score": score} for item_id, score in await scores_to_first(service.store, info, group.ids)
    ]
    return {"items": items} if group.digest is None else {"digest": group.digest, "items": items}
