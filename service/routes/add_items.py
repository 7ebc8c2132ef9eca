"""`POST /v1/collections/{name}/items`: photos and vectors go in.

Each item is checked as far as that goes without a network, photos go through it together, those of collections that
keep them are stored, and what is good is written in one call. An item's fault stays its own (`on_error`).
"""

import asyncio
import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from fastapi import APIRouter, Request, Response

from model.pooling import width
from service.errors import CollectionNotFound, InvalidRequest, ModelMismatch, ServiceError
from service.features.pipeline import Embedded
from service.originals import source_of
from service.routes.answers import json_response, ms_since, slowest, split_items
from service.routes.direct import DirectRoute
from service.routes.uploads import (
    Image,
    check_count,
    check_fields,
    image_from_text,
    media_type,
    off_loop,
    parse_options,
    read_json,
    read_upload,
    service_of,
)
from service.schemas import ItemIn, ItemsIn, UploadOptions, json_schema
from service.search.checks import check_id, check_match, check_name, check_source, metadata_text, normalised
from service.search.store import CollectionInfo, CollectionSpec, Item
from service.settings import Settings
from service.state import Service
from service.tags import tag_parts

router = APIRouter(prefix="/v1/collections", tags=["items"], route_class=DirectRoute)

MAX_VECTORS: Final = 1000
"""Items with vectors in one request. Those with photos are bounded by the queue, as everywhere."""
KEY_HEADER: Final = "Idempotency-Key"
_KEY: Final = re.compile(r"[\x20-\x7e]{1,128}")
_NO_VECTOR: Final = np.empty(0, np.float32)


@dataclass(frozen=True)
class Given:
    """An item as it was sent. Until its photo has been through the network its vector is the empty one."""

    item: Item
    image: bytes | None = None
    fingerprint: str | None = None  # that the vector is said to be of
    embedded: Embedded | None = None


Outcome = Given | ServiceError


@router.post(
    "/{name}/items",
    summary="Add or replace items",
    openapi_extra={
        "requestBody": {
            "content": {
                "application/json": {"schema": json_schema(ItemsIn)},
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
    """Photos or vectors as JSON (`items`, with id, source and metadata), or photos as files of a form: the id is the
    content's sha256, and the file's name goes into the metadata as `filename`. With the header `Idempotency-Key` a
    second request of the same items within a day changes nothing."""
    started = time.perf_counter()
    service = service_of(request)
    check_name(name)
    request_key = _request_key(request, service)
    given, options = await _read(request, service)
    service.check_model(options.model)
    collection = await _target(service, name)
    good, bad = split_items(await _ready(service, collection, given), options.on_error, "items")
    items = [one.item for _, one in good]
    info = await service.vectors.upsert(collection.name, items, tag=collection.tag, request_key=request_key)
    timings = slowest(one.embedded for _, one in good if one.embedded is not None)
    return json_response(
        {
            "collection": name,
            "count": info.count,
            "items": [{"index": index, "id": one.item.id} for index, one in good],
            "errors": [error.body() for error in bad],
            **service.identity(info.tag),
            "timings": timings | {"total": ms_since(started)},
        }
    )


def _request_key(request: Request, service: Service) -> str | None:
    """The `Idempotency-Key`.

    Raises:
        InvalidRequest: too long, not ASCII, or the store would not remember it.
    """
    key: str | None = request.headers.get(KEY_HEADER)
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        raise InvalidRequest(f"{KEY_HEADER} is not allowed: 1 to 128 printable ASCII characters", param=KEY_HEADER)
    if "idempotency" not in service.vectors.capabilities:
        raise InvalidRequest(f"{KEY_HEADER}: this vector store does not remember requests", param=KEY_HEADER)
    return key


# ---- what was sent


async def _read(request: Request, service: Service) -> tuple[Sequence[Outcome], ItemsIn | UploadOptions]:
    """The items in order, each checked as far as that goes without a store or a network."""
    if media_type(request) == "application/json":
        body = parse_options(ItemsIn, await read_json(request))
        _check_counts(body.items, service.settings)
        limit = service.settings.max_image_bytes
        size = len(await request.body())
        return await off_loop(size, lambda: [_from_json(i, raw, limit) for i, raw in enumerate(body.items)]), body
    upload = await read_upload(request, key="items")
    options = parse_options(UploadOptions, upload.fields)
    files = list(zip(upload.images, upload.names or [""] * len(upload.images), strict=True))
    size = sum(len(image) for image in upload.images if isinstance(image, bytes))
    return await off_loop(size, lambda: [_from_file(image, name) for image, name in files]), options


def _check_counts(items: list[Any], settings: Settings) -> None:
    vectors = sum(isinstance(raw, dict) and raw.get("vector") is not None for raw in items)
    if vectors > MAX_VECTORS:
        raise InvalidRequest(f"{vectors} vectors in items: a request takes at most {MAX_VECTORS}", param="items")
    if vectors < len(items):
        check_count(len(items) - vectors, settings, "items")


def _from_json(index: int, raw: Any, max_image_bytes: int) -> Outcome:
    try:
        if not isinstance(raw, dict):
            raise InvalidRequest(f"items.{index}: an item is an object, not {type(raw).__name__}")
        check_fields(raw, f"items.{index}")
        sent = parse_options(ItemIn, raw)
        if (sent.image is None) == (sent.vector is None):
            raise InvalidRequest("an item has either an image or a vector")
        if sent.image is not None:
            if sent.fingerprint is not None:
                raise InvalidRequest("fingerprint goes with a vector: photos go through the model that is served")
            image = image_from_text(sent.image, max_image_bytes)
            return _photo(image, sent.id, sent.metadata, sent.source)
        if sent.id is None:
            raise InvalidRequest("an item with a vector needs an id")
        item = Item(sent.id, normalised(sent.vector or []), sent.metadata, sent.source)
        return Given(_checked(item), fingerprint=sent.fingerprint)
    except ServiceError as error:
        return error


def _from_file(image: Image, filename: str) -> Outcome:
    try:
        return _photo(image, None, {"filename": filename} if filename else {}, None)
    except ServiceError as error:
        return error


def _photo(image: Image, item_id: str | None, metadata: dict[str, Any], source: str | None) -> Outcome:
    if isinstance(image, ServiceError):
        return image
    digest = hashlib.sha256(image).hexdigest()
    return Given(_checked(Item(item_id or digest, _NO_VECTOR, metadata, source, digest)), image)


def _checked(item: Item) -> Item:
    """The item, unless the store would refuse what stands beside the vector: known before any work is done."""
    check_id(item.id)
    metadata_text(item.metadata)
    return check_source(item)


# ---- what becomes of it


async def _target(service: Service, name: str) -> CollectionInfo:
    """The collection that is written to; one that does not exist, as the first write will make it."""
    try:
        return await service.vectors.info(name)
    except CollectionNotFound:
        return CollectionInfo(name, CollectionSpec(service.tag(), service.live.dims), 0)


async def _ready(service: Service, collection: CollectionInfo, given: Sequence[Outcome]) -> Sequence[Outcome]:
    """The items as they can be written: photos through the network, and stored if the collection keeps them.

    Raises:
        ModelMismatch: there are photos only, and the collection holds vectors of another model.
        QueueFull, ShuttingDown, ModelUnavailable: nothing was begun.
    """
    misfit = _photos_misfit(service, collection)
    sent = [one for one in given if isinstance(one, Given)]
    if misfit is not None and sent and all(one.image is not None for one in sent):
        raise misfit
    fitting = [one if isinstance(one, ServiceError) else _fitting(collection, one, misfit) for one in given]
    photos = [one.image for one in fitting if isinstance(one, Given) and one.image is not None]
    found = iter(await service.live.embed(photos) if photos else [])
    done = [
        _embedded(collection, one, next(found)) if isinstance(one, Given) and one.image is not None else one
        for one in fitting
    ]
    return await asyncio.gather(*(_stored(service, one) for one in done)) if collection.spec.originals else done


def _photos_misfit(service: Service, collection: CollectionInfo) -> ServiceError | None:
    """Why the vectors of photos may not stand in this collection, if so."""
    pooling = tag_parts(collection.tag).pooling
    if pooling is None:
        return ModelMismatch(
            f"collection {collection.name!r} holds vectors of {collection.tag!r}, which no photo gives here"
        )
    dimension = width(pooling, service.live.dims)
    try:
        check_match(collection, tag=service.tag(pooling=pooling), dimension=dimension)
    except ServiceError as error:
        return error
    return None


def _fitting(collection: CollectionInfo, one: Given, misfit: ServiceError | None) -> Outcome:
    """The item, if its vector may stand beside those of the collection."""
    if one.image is not None:
        return misfit or one
    if one.fingerprint not in (None, tag_parts(collection.tag).fingerprint):
        return ModelMismatch(
            f"collection {collection.name!r} holds vectors of {collection.tag!r}; this one is of {one.fingerprint!r}: "
            "they cannot be compared (PUT makes a collection for vectors of another model)"
        )
    try:
        check_match(collection, tag=collection.tag, dimension=len(one.item.vector))
    except ServiceError as error:
        return error
    return one


def _embedded(collection: CollectionInfo, one: Given, found: Embedded | ServiceError) -> Outcome:
    """With the vector that the collection holds of a photo."""
    pooling = tag_parts(collection.tag).pooling
    assert pooling is not None, "photos were refused"
    try:
        if isinstance(found, ServiceError):
            raise found
        vector = normalised(found.vector(pooling, True))
    except ServiceError as error:
        return error
    return replace(one, item=replace(one.item, vector=vector), embedded=found)


async def _stored(service: Service, one: Outcome) -> Outcome:
    """With its photo stored, before its vector is written: no item ever leads to a photo that is not there."""
    if isinstance(one, ServiceError) or one.image is None:
        return one
    try:
        digest = await service.photos.put(one.image)
    except ServiceError as error:
        return error
    return replace(one, item=replace(one.item, source=one.item.source or source_of(digest)))
