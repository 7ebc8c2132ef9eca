"""`/v1/collections/{name}/items`: photos go in."""

import hashlib
import time

from fastapi import APIRouter, Request, Response

from service.errors import ServiceError
from service.routes.answers import json_response, ms_since, slowest, split_items
from service.routes.direct import DirectRoute
from service.routes.uploads import (
    Image,
    check_count,
    check_fields,
    decode_texts,
    media_type,
    parse_options,
    read_json,
    read_upload,
    service_of,
)
from service.schemas import ItemIn, ItemsIn, UploadOptions
from service.search.store import Item, check_id, check_name, metadata_text
from service.state import POOLING, Service

router = APIRouter(prefix="/v1/collections", tags=["items"], route_class=DirectRoute)


@router.post(
    "/{name}/items",
    summary="Add or replace photos",
    openapi_extra={
        "requestBody": {
            "content": {
                "application/json": {"schema": ItemsIn.model_json_schema()},
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                    }
                },
            }
        }
    },
)
async def add_items(request: Request, name: str) -> Response:
    """Photos as JSON (`items`, with id and metadata), or as files of a form: the id is the content's sha256, and
    the file's name goes into the metadata as `filename`."""
    started = time.perf_counter()
    service = service_of(request)
    check_name(name)
    given, images, options = await _items(request, service)
    service.check_model(options.model)
    checked = [_checked(item, image) for item, image in zip(given, images, strict=True)]
    good, bad = split_items(await service.live.embed(checked), options.on_error, "items")
    items = [
        Item(given[index].id or _sha256(images[index]), found.vector(POOLING, True), given[index].metadata)
        for index, found in good
    ]
    info = await service.vectors.upsert(name, items, tag=service.tag())
    return json_response(
        {
            "collection": name,
            "count": info.count,
            "items": [{"index": index, "id": item.id} for (index, _), item in zip(good, items, strict=True)],
            "errors": [error.body() for error in bad],
            **service.identity(),
            "timings": slowest(found for _, found in good) | {"total": ms_since(started)},
        }
    )


async def _items(request: Request, service: Service) -> tuple[list[ItemIn], list[Image], ItemsIn | UploadOptions]:
    """The items as described and their images, in order."""
    if media_type(request) == "application/json":
        fields = await read_json(request)
        if isinstance(fields.get("items"), list):
            check_count(len(fields["items"]), service.settings, "items")
            for index, item in enumerate(fields["items"]):
                if isinstance(item, dict):
                    check_fields(item, f"items.{index}")
        body = parse_options(ItemsIn, fields)
        return body.items, await decode_texts([item.image for item in body.items], service.settings), body
    upload = await read_upload(request, key="items")
    options = parse_options(UploadOptions, upload.fields)
    metadata = [{"filename": name} if name else {} for name in upload.names or [""] * len(upload.images)]
    return [ItemIn(id=None, image="", metadata=known) for known in metadata], upload.images, options


def _checked(item: ItemIn, image: Image) -> Image:
    """The image, unless the store would refuse what stands beside it: known before any work is done."""
    try:
        if item.id is not None:
            check_id(item.id)
        metadata_text(item.metadata)
    except ServiceError as error:
        return error
    return image


def _sha256(image: Image) -> str:
    assert isinstance(image, bytes)
    return hashlib.sha256(image).hexdigest()
