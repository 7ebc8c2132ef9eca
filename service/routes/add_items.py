"""Add images and vectors to a collection: `POST /v1/collections/{name}/items`."""

import re
import time
from typing import Any, Final

from fastapi import APIRouter, Request

from service.answer_schemas import AddedItems
from service.data_urls import check_count
from service.errors import Conflict, InvalidRequest, ModelMismatch, ModelNotFound, StorageFailed
from service.ingest.items import NewItem, item_from_file, item_from_json
from service.ingest.items import add_items as add_to_collection
from service.off_loop import off_loop
from service.options import parse_options
from service.outcomes import Outcome, attempt, successes
from service.routes.answers import JsonAnswer, json_response
from service.routes.bodies import media_type, read_json, read_upload
from service.routes.describe import IMAGES, Operation, Upload, describe
from service.routes.direct import DirectRoute, service_of
from service.schemas import ItemsIn, UploadOptions
from service.search.checks import check_name
from service.settings import Settings
from service.state import Service
from service.timings import ms_since

router = APIRouter(prefix="/v1/collections", tags=["items"], route_class=DirectRoute)

MAX_VECTORS: Final = 1000
"""The highest number of items with vectors in one request. The number of items with images is limited by the settings
`max_batch_items` and `queue_max_images`."""
KEY_HEADER: Final = "Idempotency-Key"
_KEY: Final = re.compile(r"[\x20-\x7e]{1,128}")


@router.post("/{name}/items", summary="Add or replace items")
@describe(
    Operation(
        errors=(*IMAGES, ModelNotFound, ModelMismatch, Conflict, StorageFailed),
        upload=Upload(ItemsIn, UploadOptions, many=True),
        headers=(KEY_HEADER,),
    )
)
async def add_items(request: Request, name: str) -> JsonAnswer[AddedItems]:
    """Add images or vectors to a collection. An item replaces an existing item with the same id. If the collection does
    not exist, it is created.

    Send JSON with a list `items`, a form with image files, or one image as the raw body. In JSON, each item has an
    image or a vector, and may have an id, a source (for instance the URL of the image) and metadata. For a file, the id
    is the sha256 of the file. If a form gives the name of a file, the name is stored in the metadata as `filename`.

    If two requests within a day have the same `Idempotency-Key` header and the same items, the second request changes
    nothing.
    """
    started = time.perf_counter()
    service = service_of(request)
    check_name(name)
    request_key = _request_key(request, service)
    items, options = await _read(request, service.settings)
    service.check_model(options.model)
    added = await add_to_collection(service, name, items, options.on_error, request_key)
    return json_response(
        {
            "collection": name,
            "count": added.collection.count,
            "items": [{"index": index, "id": item_id} for index, item_id in added.ids.items()],
            "errors": [error.body() for error in added.errors],
            **service.identity(added.collection.tag),
            "timings": added.timings | {"total": ms_since(started)},
        }
    )


def _request_key(request: Request, service: Service) -> str | None:
    """Return the value of the header `Idempotency-Key`, or None if the request has no such header.

    Raises:
        InvalidRequest: the value is empty, too long or not printable ASCII, or the store does not support this header.
    """
    key: str | None = request.headers.get(KEY_HEADER)
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        raise InvalidRequest(f"{KEY_HEADER} must have 1 to 128 printable ASCII characters", param=KEY_HEADER)
    if "idempotency" not in service.store.capabilities:
        raise InvalidRequest(f"{KEY_HEADER} is not supported by this vector store", param=KEY_HEADER)
    return key


async def _read(request: Request, settings: Settings) -> tuple[list[Outcome[NewItem]], ItemsIn | UploadOptions]:
    """Parse a request. Return two things: one outcome for each item, in order (the parsed item or an error), and the
    options of the request. Checks that need the store or the neural network are made later."""
    if media_type(request) == "application/json":
        body = parse_options(ItemsIn, await read_json(request))
        _check_counts(body.items, settings)
        limit = settings.max_image_bytes

        def from_json() -> list[Outcome[NewItem]]:
            return [attempt(i, item_from_json, i, raw, limit) for i, raw in enumerate(body.items)]

        return await off_loop(len(await request.body()), from_json), body
    upload = await read_upload(request, settings, key="items")
    options = parse_options(UploadOptions, upload.fields)
    files = list(zip(upload.images, upload.names or [""] * len(upload.images), strict=True))
    size = sum(map(len, successes(upload.images)))
    return await off_loop(size, lambda: [image.then(item_from_file, name) for image, name in files]), options


def _check_counts(items: list[Any], settings: Settings) -> None:
    vectors = sum(isinstance(raw, dict) and raw.get("vector") is not None for raw in items)
    if vectors > MAX_VECTORS:
        raise InvalidRequest(f"{vectors} vectors in items: a request can have at most {MAX_VECTORS}", param="items")
    if vectors < len(items):
        check_count(len(items) - vectors, settings, "items")
