"""Add images and vectors to a collection: `POST /v1/collections/{name}/items`, and `PUT` for a single item."""

import re
import time
from typing import Any, Final

from fastapi import APIRouter, Request

from service.answer_schemas import AddedItems, PutItem
from service.data_urls import check_count, fetch_links
from service.errors import (
    CollectionNotFound,
    Conflict,
    InvalidItems,
    InvalidRequest,
    ModelMismatch,
    ModelNotFound,
    QuotaExceeded,
    StorageFailed,
)
from service.ingest.items import NewItem, item_from_fields, item_from_file, item_from_json
from service.ingest.items import add_items as add_to_collection
from service.off_loop import off_loop
from service.options import parse_options
from service.outcomes import Outcome, attempt, successes
from service.routes.answers import JsonAnswer, item_errors, json_response
from service.routes.bodies import media_type, read_exact_json, read_upload
from service.routes.describe import IMAGES, Operation, Upload, describe
from service.routes.direct import DirectRoute, service_of
from service.schemas import ItemPutIn, ItemPutOptions, ItemsIn, UploadOptions
from service.search.checks import check_id, check_name
from service.settings import Settings
from service.state import Service
from service.telemetry import client_address
from service.timings import ms_since

router = APIRouter(prefix="/v1/collections", tags=["items"], route_class=DirectRoute)

MAX_VECTORS: Final = 1000
"""The highest number of items with vectors in one request. The number of items with images is limited by the settings
`max_batch_items` and `queue_max_images`."""
_PER_IMAGE: Final = ("id", "metadata", "source")
KEY_HEADER: Final = "Idempotency-Key"
_KEY: Final = re.compile(r"[\x20-\x7e]{1,128}")


@router.post("/{name}/items", summary="Add or replace items")
@describe(
    Operation(
        errors=(*IMAGES, ModelNotFound, ModelMismatch, Conflict, QuotaExceeded, StorageFailed),
        upload=Upload(ItemsIn, UploadOptions, many=True),
        headers=(KEY_HEADER,),
    )
)
async def add_items(request: Request, name: str) -> JsonAnswer[AddedItems]:
    """Add images or vectors to a collection. An item replaces an existing item with the same id. If the collection does
    not exist, it is created.

    Send JSON with a list `items`, a form with image files, or one image as the raw body. In JSON, each item has an
    image or a vector, and may have an id, a source (for instance the URL of the image) and metadata. In a form, the
    fields `id`, `source` and `metadata` (JSON text) may occur once for each file, in the order of the files. With a raw
    image, they are query parameters. Without an id, the id is the sha256 of the file. If a form gives the name of a
    file, the name is stored in the metadata as `filename`.

    If two requests within a day have the same `Idempotency-Key` header and the same items, the second request changes
    nothing. The newest 100,000 keys of a client are kept.
    """
    started = time.perf_counter()
    service = service_of(request)
    check_name(name)
    request_key = _request_key(request, service)
    items, options = await _read(request, service.settings)
    client = _client(request, service.settings)
    added = await add_to_collection(
        service, name, items, options.on_error, request_key, client=client, model=options.model
    )
    return json_response(
        {
            "collection": name,
            "count": added.collection.count,
            "items": [{"index": index, "id": item_id} for index, item_id in added.ids.items()],
            "errors": item_errors(request, added.errors),
            **service.identity(added.collection.tag),
            "timings": added.timings | {"total": ms_since(started)},
        }
    )


@router.put("/{name}/items/{item_id:path}", summary="Create or replace an item")
@describe(
    Operation(
        errors=(*IMAGES, ModelNotFound, ModelMismatch, Conflict, QuotaExceeded, StorageFailed),
        upload=Upload(ItemPutIn, ItemPutOptions, many=False),
        statuses=(200, 201),
    )
)
async def put_item(request: Request, name: str, item_id: str) -> JsonAnswer[PutItem]:
    """Create the item with the id in the path, or replace the existing item as a whole. Send one image as the raw body
    or as a file in a form, or JSON with an image or a vector. In a form, `metadata` (JSON text) and `source` are
    fields. With a raw image, they are query parameters. The status is 201 if the item is new, and 200 if it was
    replaced. If the collection does not exist, it is created."""
    started = time.perf_counter()
    service = service_of(request)
    check_name(name), check_id(item_id)
    if request.scope.get("raw_path", b"").endswith(b"/image"):
        raise InvalidRequest(
            "the path ends in /image, which is the image of an item: to replace it, PUT the item; if the id ends in "
            "/image, send its last slash as %2F",
            param="id",
        )
    item, model = await _read_one(request, item_id, service.settings)
    service.named(model)  # raises an error before anything is read
    is_new = not await _exists(service, name, item_id)
    try:
        added = await add_to_collection(service, name, [attempt(0, lambda: item)], "fail", model=model)
    except InvalidItems as error:
        raise error.items[0].error from error  # there is only one item, so its index means nothing
    answer: PutItem = {
        "collection": name,
        "id": item_id,
        "created": is_new,
        "count": added.collection.count,
        **service.identity(added.collection.tag),
        "timings": added.timings | {"total": ms_since(started)},
    }
    return json_response(answer, status=201 if is_new else 200)


async def _exists(service: Service, name: str, item_id: str) -> bool:
    try:
        return (await service.store.get(name, [item_id]))[0] is not None
    except CollectionNotFound:
        return False


async def _read_one(request: Request, item_id: str, settings: Settings) -> tuple[NewItem, str]:
    """Parse a request that creates or replaces one item. Return the item and the name of the model in the request."""
    if media_type(request) == "application/json":
        fields = await read_exact_json(request, lambda fields: fields.get("metadata"))
        body = parse_options(ItemPutIn, {"id": item_id, **fields})
        if body.id is not None and body.id != item_id:
            raise InvalidRequest(
                f"id {str(body.id)[:80]!r} differs from the id in the path, {item_id[:80]!r}", param="id"
            )
        sent = body.model_copy(update={"id": item_id})
        fetched = await fetch_links([sent.image], service_of(request).web_images)
        size = len(await request.body())
        return await off_loop(size, lambda: item_from_fields(sent, settings.max_image_bytes, fetched)), body.model
    upload = await read_upload(request, settings, key="image")
    check_count(len(upload.images), settings.model_copy(update={"max_batch_items": 1}), "file")
    options = parse_options(ItemPutOptions, upload.fields)
    image, filename = upload.images[0].result(), (upload.names or [""])[0]
    metadata, source = options.metadata or "", options.source or ""
    return await off_loop(len(image), lambda: item_from_file(image, filename, item_id, metadata, source)), options.model


def _request_key(request: Request, service: Service) -> str | None:
    """Return the value of the header `Idempotency-Key`, or None if the request has no such header.

    Raises:
        InvalidRequest: the value is empty, too long or not printable ASCII, or the store does not support this header.
    """
    key = idempotency_key(request)
    if key is not None and "idempotency" not in service.store.capabilities:
        raise InvalidRequest(f"{KEY_HEADER} is not supported by this vector store", param=KEY_HEADER)
    return key


def _client(request: Request, settings: Settings) -> str:
    """Return what identifies the sender of a request: the id of the API key, or the address if there is no key."""
    key_id = getattr(request.scope["state"].get("principal"), "key_id", None)
    if key_id is not None:
        return f"key:{key_id}"
    forwarded = ", ".join(request.headers.getlist("x-forwarded-for")).encode("latin-1")
    address = client_address(request.client.host if request.client else "", forwarded, settings.trusted_proxies)
    return f"address:{address}"


def idempotency_key(request: Request) -> str | None:
    """Return the value of the header `Idempotency-Key`, or None if the request has no such header.

    Raises:
        InvalidRequest: the value is empty, too long or not printable ASCII.
    """
    key: str | None = request.headers.get(KEY_HEADER)
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidRequest(f"{KEY_HEADER} must have 1 to 128 printable ASCII characters", param=KEY_HEADER)
    return key


async def _read(request: Request, settings: Settings) -> tuple[list[Outcome[NewItem]], ItemsIn | UploadOptions]:
    """Parse a request. Return two things: one outcome for each item, in order (the parsed item or an error), and the
    options of the request. Checks that need the store or the neural network are made later."""
    if media_type(request) == "application/json":
        body = parse_options(ItemsIn, await read_exact_json(request, _metadata))
        _check_counts(body.items, settings)
        images = [raw.get("image") for raw in body.items if isinstance(raw, dict)]
        fetched = await fetch_links(images, service_of(request).web_images)
        limit = settings.max_image_bytes

        def from_json() -> list[Outcome[NewItem]]:
            return [attempt(i, item_from_json, i, raw, limit, fetched) for i, raw in enumerate(body.items)]

        return await off_loop(len(await request.body()), from_json), body
    upload = await read_upload(request, settings, key="items", fields_per_image=len(_PER_IMAGE))
    options = parse_options(UploadOptions, upload.fields)
    columns = [upload.names or [""] * len(upload.images), *_per_image(options, len(upload.images))]
    files = list(zip(upload.images, zip(*columns, strict=True), strict=True))
    size = sum(map(len, successes(upload.images)))
    return await off_loop(size, lambda: [image.then(item_from_file, *fields) for image, fields in files]), options


def _per_image(options: UploadOptions, count: int) -> list[list[str]]:
    """Return a list for each field in `_PER_IMAGE`. The list contains the value of this field for each of the `count`
    images, or empty strings if the request does not have the field.

    Raises:
        InvalidRequest: the number of values differs from the number of images.
    """
    columns = []
    for name in _PER_IMAGE:
        values: list[str] = getattr(options, name)
        if values and len(values) != count:
            raise InvalidRequest(
                f"{len(values)} {name} fields for {count} images: send one {name} for each image, in the order of the "
                "images, or none",
                param=name,
            )
        columns.append(values or [""] * count)
    return columns


def _metadata(fields: dict[str, Any]) -> list[Any]:
    """Return the metadata of each item in the body of a request. The body has not been checked."""
    items = fields.get("items")
    return [raw.get("metadata") for raw in items if isinstance(raw, dict)] if isinstance(items, list) else []


def _check_counts(items: list[Any], settings: Settings) -> None:
    vectors = sum(isinstance(raw, dict) and raw.get("vector") is not None for raw in items)
    if vectors > MAX_VECTORS:
        raise InvalidRequest(f"{vectors} vectors in items: a request can have at most {MAX_VECTORS}", param="items")
    if vectors < len(items):
        check_count(len(items) - vectors, settings, "items")
