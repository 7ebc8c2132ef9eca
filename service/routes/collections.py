"""`/v1/collections`: photos go in, similar photos come out. Scores are cosine similarities.

A collection keeps the tag of the vectors it holds: fingerprint, pooling, normalisation, input size and precision. After
a change of the model its vectors and new ones cannot be compared, and every write and search says so (409, naming both
tags).
"""

import hashlib
import time
from typing import Any, Final

import numpy.typing as npt
from fastapi import APIRouter, Request, Response

from service.errors import InvalidRequest, ItemNotFound, ServiceError
from service.pipeline import Embedded
from service.routes.answers import json_response, server_timing, slowest, split_items
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
from service.schemas import ItemIn, ItemsIn, SearchIn, SearchOptions, UploadOptions
from service.search.store import CollectionInfo, Floats, Item, VectorStore, check_id, check_name, metadata_text
from service.state import Service

router = APIRouter(prefix="/v1/collections", tags=["collections"])

POOLING: Final = "cls"
"""What a collection holds: the class token is DINOv2's feature for retrieval."""


def tag_of(service: Service, fingerprint: str | None = None) -> str:
    """What two vectors must share to be compared; `fingerprint` of another model, if not the served one's."""
    height, width = service.artifact.manifest.input_size
    return f"{fingerprint or service.artifact.fingerprint}/{POOLING}/l2/{height}x{width}/{service.engine.precision}"


@router.get("", summary="List collections")
async def list_collections(request: Request) -> Response:
    """All collections with what they hold."""
    service = service_of(request)
    found = await _store(service).collections()
    return json_response({"object": "list", "data": [_info(info) for info in found], **service.identity()})


@router.get("/{name}", summary="Describe a collection")
async def get_collection(request: Request, name: str) -> Response:
    """Its tag, dimension and number of items."""
    service = service_of(request)
    return json_response(_info(await _store(service).info(check_name(name))) | service.identity())


@router.delete("/{name}", summary="Delete a collection")
async def delete_collection(request: Request, name: str) -> Response:
    """The collection with all its items."""
    service = service_of(request)
    await _store(service).drop(check_name(name))
    return json_response({"name": name, "deleted": True, **service.identity()})


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
    info = await _store(service).upsert(name, items, tag=tag_of(service))
    return json_response(
        {
            "collection": name,
            "count": info.count,
            "items": [{"index": index, "id": item.id} for (index, _), item in zip(good, items, strict=True)],
            "errors": [error.body() for error in bad],
            **service.identity(),
            "timings": slowest(found for _, found in good) | {"total": _ms_since(started)},
        }
    )


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
    tag = tag_of(service)
    vector: npt.ArrayLike
    if media_type(request) == "application/json":
        body = parse_options(SearchIn, await read_json(request))
        service.check_model(body.model)
        k = body.k
        given = [field for field in ("image", "vector", "id") if getattr(body, field) is not None]
        if len(given) != 1:
            raise InvalidRequest(f"exactly one of image, vector and id is needed, not {given or 'none'}")
        if body.vector is not None:
            vector, tag = body.vector, tag_of(service, body.fingerprint)
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
    hits = await _store(service).search(name, vector, k, tag=tag)
    timings |= {"search": _ms_since(searching), "total": _ms_since(started)}
    data = [{"id": hit.id, "score": hit.score, "metadata": hit.metadata} for hit in hits]
    answer = {"object": "list", "collection": name, "data": data, **service.identity(), "timings": timings}
    return json_response(answer, headers=server_timing(timings))


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


async def _stored(service: Service, name: str, item_id: str) -> Floats:
    found = (await _store(service).get(name, [check_id(item_id)]))[0]
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


def _store(service: Service) -> VectorStore:
    assert service.store is not None, "the service has not been started"
    return service.store


def _sha256(image: Image) -> str:
    assert isinstance(image, bytes)
    return hashlib.sha256(image).hexdigest()


def _info(info: CollectionInfo) -> dict[str, Any]:
    return {"name": info.name, "tag": info.tag, "dimension": info.dimension, "count": info.count}


def _ms_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 3)
