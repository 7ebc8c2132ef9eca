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

from service.errors import CollectionNotFound, InvalidRequest, ModelMismatch
from service.features.pipeline import Embedded
from service.originals import source_of
from service.outcomes import Outcome, attempt, indexed, split_items, successes
from service.routes.answers import json_response, ms_since, slowest
from service.routes.direct import DirectRoute
from service.routes.uploads import (
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
from service.search.store import (
    CollectionInfo,
    CollectionSpec,
    Item,
    check_id,
    check_match,
    check_name,
    check_source,
    metadata_text,
    normalised,
)
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
class NewItem:
    """An item as it was sent. Until its image has been through the network its vector is the empty one."""

    item: Item
    image: bytes | None = None
    fingerprint: str | None = None  # that the vector is said to be of
    embedded: Embedded | None = None


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
    sent, options = await _read(request, service)
    service.check_model(options.model)
    collection = await _target(service, name)
    good, bad = split_items(await _ready(service, collection, sent), options.on_error, "items")
    items = [new.item for _, new in good]
    info = await service.vectors.upsert(collection.name, items, tag=collection.tag, request_key=request_key)
    timings = slowest(new.embedded for _, new in good if new.embedded is not None)
    return json_response(
        {
            "collection": name,
            "count": info.count,
            "items": [{"index": index, "id": new.item.id} for index, new in good],
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


async def _read(request: Request, service: Service) -> tuple[list[Outcome[NewItem]], ItemsIn | UploadOptions]:
    """The items in order, each checked as far as that goes without a store or a network."""
    if media_type(request) == "application/json":
        body = parse_options(ItemsIn, await read_json(request))
        _check_counts(body.items, service.settings)
        limit = service.settings.max_image_bytes
        size = len(await request.body())
        return await off_loop(
            size, lambda: [attempt(i, _from_json, i, raw, limit) for i, raw in enumerate(body.items)]
        ), body
    upload = await read_upload(request, key="items")
    options = parse_options(UploadOptions, upload.fields)
    files = list(zip(upload.images, upload.names or [""] * len(upload.images), strict=True))
    size = sum(map(len, successes(upload.images)))
    return await off_loop(size, lambda: [image.then(_from_file, name) for image, name in files]), options


def _check_counts(items: list[Any], settings: Settings) -> None:
    vectors = sum(isinstance(raw, dict) and raw.get("vector") is not None for raw in items)
    if vectors > MAX_VECTORS:
        raise InvalidRequest(f"{vectors} vectors in items: a request takes at most {MAX_VECTORS}", param="items")
    if vectors < len(items):
        check_count(len(items) - vectors, settings, "items")


def _from_json(index: int, raw: Any, max_image_bytes: int) -> NewItem:
    if not isinstance(raw, dict):
        raise InvalidRequest(f"items.{index}: an item is an object, not {type(raw).__name__}")
    check_fields(raw, f"items.{index}")
    sent = parse_options(ItemIn, raw)
    if (sent.image is None) == (sent.vector is None):
        raise InvalidRequest("an item has either an image or a vector")
    if sent.image is not None:
        if sent.fingerprint is not None:
            raise InvalidRequest("fingerprint goes with a vector: photos go through the model that is served")
        return _image_item(image_from_text(sent.image, max_image_bytes), sent.id, sent.metadata, sent.source)
    if sent.id is None:
        raise InvalidRequest("an item with a vector needs an id")
    item = Item(sent.id, normalised(sent.vector or []), sent.metadata, sent.source)
    return NewItem(_checked(item), fingerprint=sent.fingerprint)


def _from_file(image: bytes, filename: str) -> NewItem:
    return _image_item(image, None, {"filename": filename} if filename else {}, None)


def _image_item(image: bytes, item_id: str | None, metadata: dict[str, Any], source: str | None) -> NewItem:
    digest = hashlib.sha256(image).hexdigest()
    return NewItem(_checked(Item(item_id or digest, _NO_VECTOR, metadata, source, digest)), image)


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


async def _ready(
    service: Service, collection: CollectionInfo, sent: Sequence[Outcome[NewItem]]
) -> list[Outcome[NewItem]]:
    """The items as they can be written: images through the network, and stored if the collection keeps them.

    Raises:
        ModelMismatch: there are images only, and the collection holds vectors of another model.
        QueueFull, ShuttingDown, ModelUnavailable: nothing was begun.
    """
    readable = successes(sent)
    if readable and all(new.image is not None for new in readable):
        _check_images_fit(service, collection)
    fitting = [outcome.then(_fitting, service, collection) for outcome in sent]
    images = [Outcome(index, new.image) for index, new in indexed(fitting) if new.image is not None]
    embedded = {outcome.index: outcome for outcome in (await service.live.embed(images) if images else [])}
    ready = [outcome.then(_with_vector, collection, embedded.get(outcome.index)) for outcome in fitting]
    if not collection.spec.originals:
        return ready
    return await asyncio.gather(*(outcome.then_await(_stored, service) for outcome in ready))


def _check_images_fit(service: Service, collection: CollectionInfo) -> None:
    """Refuse images whose vectors may not stand in this collection.

    Raises:
        ModelMismatch: it holds vectors of another model, or of none.
    """
    pooling = tag_parts(collection.tag).pooling
    if pooling is None:
        raise ModelMismatch(
            f"collection {collection.name!r} holds vectors of {collection.tag!r}, which no photo gives here"
        )
    dimension = service.live.dims * (2 if pooling == "cls+mean" else 1)
    check_match(collection, tag=service.tag(pooling=pooling), dimension=dimension)


def _fitting(new: NewItem, service: Service, collection: CollectionInfo) -> NewItem:
    """The item, if its vector may stand beside those of the collection."""
    if new.image is not None:
        _check_images_fit(service, collection)
        return new
    if new.fingerprint not in (None, tag_parts(collection.tag).fingerprint):
        raise ModelMismatch(
            f"collection {collection.name!r} holds vectors of {collection.tag!r}; this one is of {new.fingerprint!r}: "
            "they cannot be compared (PUT makes a collection for vectors of another model)"
        )
    check_match(collection, tag=collection.tag, dimension=len(new.item.vector))
    return new


def _with_vector(new: NewItem, collection: CollectionInfo, outcome: Outcome[Embedded] | None) -> NewItem:
    """With the vector that the collection holds of an image; an item that came with a vector is as it was."""
    if outcome is None:
        return new
    pooling = tag_parts(collection.tag).pooling
    assert pooling is not None, "images were refused"
    embedded = outcome.result()
    vector = normalised(embedded.vector(pooling, True))
    return replace(new, item=replace(new.item, vector=vector), embedded=embedded)


async def _stored(new: NewItem, service: Service) -> NewItem:
    """With its image stored, before its vector is written: no item ever leads to an image that is not there."""
    if new.image is None:
        return new
    digest = await service.photos.put(new.image)
    return replace(new, item=replace(new.item, source=new.item.source or source_of(digest)))
