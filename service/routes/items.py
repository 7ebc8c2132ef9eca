"""Read, edit, list, count and delete items, and count the values of their metadata: `/v1/collections/{name}/items`. The
module `add_items` has the routes that add and replace items.

An id may contain slashes, so everything after `items/` is the id: `items/a/b` is the item `a/b`. There is one
exception: `items/a/image` is the image of item `a`. If an id itself ends in `/image`, its last slash must be sent as
`%2F`.
"""

import asyncio
from typing import Any, Final, TypeVar

from fastapi import APIRouter, Request, Response

from model.decode import FORMATS, sniff
from service.answer_schemas import (
    CountAnswer,
    DeletedItem,
    DeletedItems,
    FacetsAnswer,
    FacetValue,
    ItemAnswer,
    ItemFields,
    ItemsAnswer,
    PatchedItem,
)
from service.clients import current_sender
from service.errors import InvalidRequest, ItemNotFound, NotFound
from service.off_loop import off_loop
from service.options import check_fields, parse_options
from service.originals import photo_digest
from service.retrieval.search import VECTOR_VALUE_BYTES
from service.routes.answers import JsonAnswer, encode_vector, json_response
from service.routes.bodies import query_fields, read_exact_json, read_json
from service.routes.describe import BODY, COLLECTION, Operation, describe
from service.routes.direct import DirectRoute, service_of
from service.schemas import CountIn, DeleteIn, Encoding, FacetsIn, ItemQuery, PatchIn, ScrollIn
from service.search.checks import check_id, check_name, metadata_text
from service.search.filters import Filter, parse_filter, parse_path
from service.search.store import CollectionInfo, Item, Order
from service.state import FEW_RESULTS, Service

router = APIRouter(prefix="/v1/collections", tags=["items"], route_class=DirectRoute)

_MEDIA_TYPES: Final = {name: f"image/{name.lower()}" for name in FORMATS}
IMAGE_MEDIA_TYPES: Final = (*_MEDIA_TYPES.values(), "application/octet-stream")
Body = TypeVar("Body", CountIn, DeleteIn, FacetsIn, ScrollIn)


@router.get("/{name}/items/{item_id:path}/image", summary="Get the image of an item", response_class=Response)
@describe(Operation(errors=(*COLLECTION, ItemNotFound, NotFound), media_types=IMAGE_MEDIA_TYPES))
async def get_image(request: Request, name: str, item_id: str) -> Response:
    """Return the image of an item, exactly as the client sent it. This requires that the collection was created with
    `originals: true`. The status is 404 if the item does not exist or its image is not stored."""
    if not request.scope.get("raw_path", b"/image").removesuffix(b"/").endswith(b"/image"):
        # The slash was sent as %2F, so it is part of the id.
        return await get_item(request, name, request.scope["path"].partition("/items/")[2])
    service = service_of(request)
    info = await service.store.info(check_name(name))
    item = await _item(service, info.ref, item_id)
    digest = photo_digest(item) if info.spec.originals else None
    if digest is None:
        raise NotFound(f"collection {info.name!r} stores no image of item {item_id[:80]!r}")
    image = await service.originals.get(digest)
    kind = _MEDIA_TYPES.get(sniff(image) or "", "application/octet-stream")
    return Response(image, media_type=kind, headers={"X-Content-Type-Options": "nosniff"})


@router.get("/{name}/items/{item_id:path}", summary="Get an item")
@describe(Operation(errors=(*COLLECTION, ItemNotFound), query=ItemQuery))
async def get_item(request: Request, name: str, item_id: str) -> JsonAnswer[ItemAnswer]:
    """Return an item's metadata, source and digest (the sha256 of its image). With `include=vector`, also return its
    vector, which is scaled to length 1."""
    service = service_of(request)
    fields = query_fields(request)
    if isinstance(fields.get("include"), str):
        fields["include"] = [fields["include"]]
    options = parse_options(ItemQuery, fields)
    info = await service.store.info(check_name(name))
    item = await _item(service, info.ref, item_id)
    return json_response(
        {
            "collection": name,
            "tag": info.tag,
            **_shown(item, options.include, options.encoding_format),
            **service.identity(info.tag),
        }
    )


@router.patch("/{name}/items/{item_id:path}", summary="Edit an item's metadata or source")
@describe(Operation(errors=(*BODY, *COLLECTION, ItemNotFound), body=PatchIn))
async def patch_item(request: Request, name: str, item_id: str) -> JsonAnswer[PatchedItem]:
    """Apply a JSON merge patch (RFC 7396) to the metadata of an item. In the patch, null removes a key, an object is
    merged into the existing object, and any other value replaces the existing value. The field `source` replaces the
    source of the item, and an empty string removes it. Return the updated item."""
    service = service_of(request)
    check_name(name), check_id(item_id)
    body = parse_options(PatchIn, await read_exact_json(request, lambda fields: fields.get("metadata")))
    keep_source = body.source is None  # null means "not set": some clients send every field
    if body.metadata is None and keep_source:
        raise InvalidRequest("metadata or source is required", param="metadata")
    metadata = body.metadata or {}
    metadata_text(metadata)  # raises an error if the metadata is nested too deeply
    info = await service.store.info(name)
    item = await service.store.patch(info.name, item_id, metadata, source=body.source or None, keep_source=keep_source)
    return json_response({"collection": name, **_shown(item, [], "float"), **service.identity(info.tag)})


@router.delete("/{name}/items/{item_id:path}", summary="Delete an item")
@describe(Operation(errors=(*COLLECTION, ItemNotFound)))
async def delete_item(request: Request, name: str, item_id: str) -> JsonAnswer[DeletedItem]:
    """Delete an item. Its stored image is not deleted. The status is 404 if the item does not exist."""
    service = service_of(request)
    check_name(name), check_id(item_id)
    info = await service.store.info(name)
    if not await service.store.delete(info.name, [item_id]):
        raise _no_item(name, item_id)
    return json_response({"collection": name, "id": item_id, "deleted": True, **service.identity(info.tag)})


@router.post("/{name}/items/delete", summary="Delete items")
@describe(Operation(errors=(*BODY, *COLLECTION), body=DeleteIn))
async def delete_items(request: Request, name: str) -> JsonAnswer[DeletedItems]:
    """Delete the items with the given `ids`, or all items that match the given `filter`. Return how many items were
    deleted. The status is 422 if the filter is empty, so that no one empties a collection by accident.

    The method is POST, because some proxies and clients drop the body of a DELETE request.
    """
    service = service_of(request)
    check_name(name)
    body, where = await _read_query(request, DeleteIn)
    if (body.ids is None) == (where is None):
        raise InvalidRequest("exactly one of ids and filter is required")
    info = await service.store.info(name)
    if where is not None:
        deleted = await service.store.delete_where(info.name, where)
    else:
        deleted = await service.store.delete(info.name, body.ids or [])
    return json_response({"collection": name, "deleted": deleted, **service.identity(info.tag)})


@router.post("/{name}/items/scroll", summary="List items")
@describe(Operation(errors=(*BODY, *COLLECTION), body=ScrollIn))
async def scroll_items(request: Request, name: str) -> JsonAnswer[ItemsAnswer]:
    """Return one page of items, in the order of a metadata key (`order_by`) or in an order that the vector store
    defines. With a `filter`, return only the matching items. To get the next page, send the same request again with the
    `cursor` from this answer. On the last page, `cursor` is null."""
    service = service_of(request)
    check_name(name)
    body, where = await _read_query(request, ScrollIn)
    order = None
    if body.order_by is not None:
        order = Order(parse_path(body.order_by.key, "order_by"), body.order_by.direction == "desc")
    info = await service.store.info(name)
    if body.limit <= FEW_RESULTS:
        return await _page(service, name, info, body, where, order)
    async with service.large_answers.turn(current_sender.get()):
        return await _page(service, name, info, body, where, order)


async def _page(
    service: Service, name: str, info: CollectionInfo, body: ScrollIn, where: Filter | None, order: Order | None
) -> JsonAnswer[ItemsAnswer]:
    """Read a page of items, and return the answer. If it would exceed the limit of an answer, the page ends earlier."""
    most, limit = service.settings.max_answer_bytes, body.limit
    if "vector" in body.include:
        vector_bytes = info.dimension * VECTOR_VALUE_BYTES
        limit = max(1, min(limit, most // (2 * vector_bytes)))
        most -= limit * vector_bytes
    page = await service.store.scroll(
        info.name, where=where, cursor=body.cursor, limit=limit, order=order, max_bytes=max(most // 2, 1)
    )

    def answer() -> JsonAnswer[ItemsAnswer]:
        data = [_shown(item, body.include, body.encoding_format) for item in page.items]
        return json_response(
            {
                "object": "list",
                "collection": name,
                "tag": page.tag or info.tag,
                "data": data,
                "cursor": page.cursor,
                **service.identity(page.tag or info.tag),
            },
            most=service.settings.max_answer_bytes,
        )

    return await asyncio.to_thread(answer)


@router.post("/{name}/items/count", summary="Count items")
@describe(Operation(errors=(*BODY, *COLLECTION), body=CountIn))
async def count_items(request: Request, name: str) -> JsonAnswer[CountAnswer]:
    """Return the number of items that match the `filter`, or the number of all items if there is no filter."""
    service = service_of(request)
    check_name(name)
    _, where = await _read_query(request, CountIn)
    info = await service.store.info(name)
    count = info.count if where is None else await service.store.count(info.name, where)
    return json_response({"collection": name, "count": count, **service.identity(info.tag)})


@router.post("/{name}/items/facets", summary="Count the values of a key")
@describe(Operation(errors=(*BODY, *COLLECTION), body=FacetsIn))
async def count_values(request: Request, name: str) -> JsonAnswer[FacetsAnswer]:
    """Return the distinct values of a metadata key, each with the number of items that have it, most frequent first.
    With a `filter`, count only the matching items. If the value is a list, each of its elements counts. `distinct` is
    the number of all distinct values, including those beyond `limit`."""
    service = service_of(request)
    check_name(name)
    body, where = await _read_query(request, FacetsIn)
    path = parse_path(body.key, "key")
    info = await service.store.info(name)
    facets = await service.store.facets(info.name, path, where=where, limit=body.limit)
    data: list[FacetValue] = [{"value": facet.value, "count": facet.count} for facet in facets.values]
    return json_response(
        {
            "object": "list",
            "collection": name,
            "tag": info.tag,
            "key": body.key,
            "data": data,
            "distinct": facets.distinct,
            **service.identity(info.tag),
        }
    )


async def _read_query(request: Request, model: type[Body]) -> tuple[Body, Filter | None]:
    """Parse the JSON body of a request. Return the body and its parsed `filter`. If the body has no filter, the second
    value is None."""
    fields = await read_json(request)
    if isinstance(fields.get("order_by"), dict):
        check_fields(fields["order_by"], "order_by")
    body = parse_options(model, fields)
    where = body.filter
    if where is None:
        return body, None
    check_fields(where, "filter")
    return body, await off_loop(len(await request.body()), lambda: parse_filter(where))


async def _item(service: Service, name: str, item_id: str) -> Item:
    """Return an item of a collection, or raise ItemNotFound if the item does not exist."""
    item = (await service.store.get(name, [check_id(item_id)]))[0]
    if item is None:
        raise _no_item(name, item_id)
    return item


def _no_item(name: str, item_id: str) -> ItemNotFound:
    return ItemNotFound(f"collection {name!r} has no item {item_id[:80]!r}", param="id")


def _shown(item: Item, include: list[Any], encoding: Encoding) -> ItemFields:
    """Return an item as a dictionary for an answer. The dictionary has the vector only if `include` contains
    "vector"."""
    body: ItemFields = {"id": item.id, "metadata": item.metadata, "source": item.source, "digest": item.digest}
    if "vector" in include:
        body["vector"] = encode_vector(item.vector, encoding)
    return body
