"""Find a marked region in the images of a collection: `POST /v1/collections/{name}/find-region`."""

import time

from fastapi import APIRouter, Request

from service.errors import ItemNotFound, ModelMismatch, ModelNotFound
from service.off_loop import off_loop
from service.rankings import request_hash
from service.retrieval.find_region import find_region as find_in_collection
from service.retrieval.region_answers import answer_fields, read_request
from service.retrieval.region_schemas import FindRegionAnswer, FindRegionIn
from service.routes.answers import JsonAnswer, json_response, server_timing
from service.routes.bodies import read_json
from service.routes.describe import COLLECTION, IMAGES, Operation, describe
from service.routes.direct import DirectRoute, service_of
from service.search.checks import check_name
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
    options, where = read_request(fields)
    asked = await off_loop(len(await request.body()), lambda: request_hash(fields))
    until = time.monotonic() + service.settings.request_deadline_s / 2
    found = await find_in_collection(service, name, options, where, asked, until)
    timings = {"total": ms_since(started)}
    return json_response(answer_fields(service, name, found, timings), headers=server_timing(timings))
