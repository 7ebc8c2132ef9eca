"""Find a marked region in the images of a collection: `POST /v1/collections/{name}/find-region`."""

import time

from fastapi import APIRouter, Request

from service.errors import ItemNotFound, ModelMismatch, ModelNotFound
from service.off_loop import off_loop
from service.options import check_fields, parse_options
from service.rankings import request_hash
from service.retrieval.find_region import FoundRegion
from service.retrieval.find_region import find_region as find_in_collection
from service.retrieval.region_schemas import MAX_REFERENCES, FindRegionAnswer, FindRegionIn, RegionFields
from service.routes.answers import JsonAnswer, json_response, server_timing
from service.routes.bodies import read_json
from service.routes.describe import COLLECTION, IMAGES, Operation, describe
from service.routes.direct import DirectRoute, service_of
from service.search.checks import check_name
from service.search.filters import parse_filter
from service.timings import ms_since

router = APIRouter(prefix="/v1/collections", tags=["search"], route_class=DirectRoute)


@router.post("/{name}/find-region", summary="Find a marked region")
@describe(
    Operation(
        errors=(*IMAGES, *COLLECTION, ItemNotFound, ModelNotFound, ModelMismatch),
        body=FindRegionIn,
        answer_headers=("Server-Timing",),
    )
)
async def find_region(request: Request, name: str) -> JsonAnswer[FindRegionAnswer]:
    """Find a region in the images of a collection that stores its images. The region is marked in one to eight
    reference images by a mask, a box or a point. The answer lists the items whose images contain the region, best
    first, with a mask of the region. Up to `candidates` items are examined.

    The patch features of images are cached. `pending` is the number of candidates whose features could not be computed
    in time. Send the request again to examine more of them. To get the next page, send the same request with the
    `cursor` from the answer."""
    started = time.perf_counter()
    service = service_of(request)
    check_name(name)
    fields = await read_json(request)
    references = fields.get("references")
    for reference in references[: MAX_REFERENCES + 1] if isinstance(references, list) else []:
        if isinstance(reference, dict):
            check_fields(reference, "a reference")
            if isinstance(reference.get("mask"), dict):
                check_fields(reference["mask"], "a mask")
    options = parse_options(FindRegionIn, fields)
    where = None if options.filter is None else parse_filter(options.filter)
    asked = await off_loop(len(await request.body()), lambda: request_hash(fields))
    found = await find_in_collection(service, name, options, where, asked)
    timings = {"total": ms_since(started)}
    ranking = found.ranking
    body: FindRegionAnswer = {
        "object": "list",
        "collection": name,
        "data": [_fields(each) for each in found.page],
        "cursor": found.cursor,
        "total": len(ranking.items),
        "examined": ranking.examined,
        "pending": ranking.pending,
        "unreadable": ranking.unreadable,
        **service.identity(found.tag),
        "timings": timings,
    }
    return json_response(body, headers=server_timing(timings))


def _fields(found: FoundRegion) -> RegionFields:
    fields: RegionFields = {
        "id": found.item.id,
        "score": found.score,
        "box": found.box,
        "area": found.area,
        "segmentation": {"size": found.segmentation["size"], "counts": found.segmentation["counts"]},
        "metadata": dict(found.item.metadata),
    }
    if found.item.source is not None:
        fields["source"] = found.item.source
    return fields
