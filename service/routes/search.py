"""`/v1/collections/{name}/search`: similar photos come out. Scores are cosine similarities."""

import time

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request, Response

from service.errors import InvalidRequest, ItemNotFound
from service.pipeline import Embedded
from service.routes.answers import json_response, ms_since, server_timing, slowest, split_items
from service.routes.direct import DirectRoute
from service.routes.uploads import (
    Image,
    check_count,
    decode_texts,
    media_type,
    parse_options,
    read_json,
    read_upload,
    service_of,
)
from service.schemas import SearchIn, SearchOptions
from service.search.store import Floats, check_id, check_name
from service.state import POOLING, Service

router = APIRouter(prefix="/v1/collections", tags=["search"], route_class=DirectRoute)


@router.post(
    "/{name}/search",
    summary="Find similar photos",
    openapi_extra={
        "requestBody": {
            "content": {
                "application/json": {"schema": SearchIn.model_json_schema()},
                "image/*": {"schema": {"type": "string", "format": "binary"}},
            }
        }
    },
)
async def search(request: Request, name: str) -> Response:
    """The `k` nearest items to an image, a vector or an item of the collection."""
    started = time.perf_counter()
    service = service_of(request)
    check_name(name)
    timings: dict[str, float] = {}
    tag = service.tag()
    vector: npt.ArrayLike
    if media_type(request) == "application/json":
        body = parse_options(SearchIn, await read_json(request))
        service.check_model(body.model)
        k = body.k
        given = [field for field in ("image", "vector", "id") if getattr(body, field) is not None]
        if len(given) != 1:
            raise InvalidRequest(f"exactly one of image, vector and id is needed, not {given or 'none'}")
        if body.vector is not None:
            vector, tag = body.vector, service.tag(body.fingerprint)
        elif body.id is not None:
            vector = await _stored(service, name, body.id)
        else:
            vector = await _embed_one(service, (await decode_texts([body.image], service.settings))[0], timings)
    else:
        upload = await read_upload(request, key="image")
        check_count(len(upload.images), service.settings.model_copy(update={"max_batch_items": 1}), "file")
        options = parse_options(SearchOptions, upload.fields)
        service.check_model(options.model)
        k = options.k
        vector = await _embed_one(service, upload.images[0], timings)
    searching = time.perf_counter()
    [hits] = await service.vectors.search(name, np.asarray([vector]), k, tag=tag)
    timings |= {"search": ms_since(searching), "total": ms_since(started)}
    data = [{"id": hit.id, "score": hit.score, "metadata": hit.metadata} for hit in hits]
    answer = {"object": "list", "collection": name, "data": data, **service.identity(), "timings": timings}
    return json_response(answer, headers=server_timing(timings))


async def _stored(service: Service, name: str, item_id: str) -> Floats:
    found = (await service.vectors.get(name, [check_id(item_id)]))[0]
    if found is None:
        raise ItemNotFound(f"collection {name!r} holds no item {item_id[:80]!r}", param="id")
    return found.vector


async def _embed_one(service: Service, image: Image, timings: dict[str, float]) -> Floats:
    outcome = (await service.live.embed([image]))[0]
    if not isinstance(outcome, Embedded):
        split_items([outcome], "fail", "image")
    assert isinstance(outcome, Embedded)
    timings |= slowest([outcome])
    return outcome.vector(POOLING, True)
