"""`/v1/collections`: what a collection is. Its items are in `items`, how it is searched in `search`.

A collection keeps the tag of the vectors it holds: fingerprint, pooling, normalisation, input size and precision. After
a change of the model its vectors and new ones cannot be compared, and every write and search says so (409, naming both
tags).
"""

from typing import Any

from fastapi import APIRouter, Request, Response

from service.routes.answers import json_response
from service.routes.direct import DirectRoute
from service.routes.uploads import service_of
from service.search.store import CollectionInfo, check_name

router = APIRouter(prefix="/v1/collections", tags=["collections"], route_class=DirectRoute)


@router.get("", summary="List collections")
async def list_collections(request: Request) -> Response:
    """All collections with what they hold."""
    service = service_of(request)
    found = await service.vectors.collections()
    return json_response({"object": "list", "data": [_info(info) for info in found], **service.identity()})


@router.get("/{name}", summary="Describe a collection")
async def get_collection(request: Request, name: str) -> Response:
    """Its tag, dimension and number of items."""
    service = service_of(request)
    return json_response(_info(await service.vectors.info(check_name(name))) | service.identity())


@router.delete("/{name}", summary="Delete a collection")
async def delete_collection(request: Request, name: str) -> Response:
    """The collection with all its items."""
    service = service_of(request)
    await service.vectors.drop(check_name(name))
    return json_response({"name": name, "deleted": True, **service.identity()})


def _info(info: CollectionInfo) -> dict[str, Any]:
    return {"name": info.name, "tag": info.tag, "dimension": info.dimension, "count": info.count}
