"""Manage aliases, which are names that point to collections: `/v1/aliases`. Searches and writes accept an alias instead
of the name of a collection.

To change the model without interrupting searches, fill a new collection, and then move the alias from the old
collection to the new one. A request that arrives during the move uses either the old or the new collection, never parts
of both.
"""

from fastapi import APIRouter, Request

from service.answer_schemas import Alias, AliasesAnswer, DroppedAlias, MovedAlias
from service.errors import CollectionNotFound, Conflict, StorageFailed
from service.options import parse_options
from service.routes.answers import JsonAnswer, json_response
from service.routes.bodies import read_json
from service.routes.describe import BODY, COLLECTION, Operation, describe
from service.routes.direct import DirectRoute, service_of
from service.schemas import AliasIn
from service.search.checks import check_name

router = APIRouter(prefix="/v1/aliases", tags=["aliases"], route_class=DirectRoute)


@router.get("", summary="List aliases")
@describe(Operation(errors=(StorageFailed,)))
async def list_aliases(request: Request) -> JsonAnswer[AliasesAnswer]:
    """List all aliases in alphabetical order, each with the collection that it points to."""
    service = service_of(request)
    aliases = await service.store.aliases()
    data: list[Alias] = [{"alias": alias, "collection": collection} for alias, collection in sorted(aliases.items())]
    return json_response({"object": "list", "data": data, **service.identity()})


@router.put("/{alias}", summary="Create or move an alias")
@describe(Operation(errors=(*BODY, CollectionNotFound, Conflict, StorageFailed), body=AliasIn, statuses=(200, 201)))
async def put_alias(request: Request, alias: str) -> JsonAnswer[MovedAlias]:
    """Make an alias point to the collection in the field `collection`. The alias is created if it does not exist. The
    change is atomic. In the answer, `before` is the collection that the alias previously pointed to. If the alias is
    new, `before` is null and the status is 201."""
    service = service_of(request)
    check_name(alias)
    body = parse_options(AliasIn, await read_json(request))
    info = await service.store.info(check_name(body.collection))  # resolves an alias
    before = await service.store.set_alias(alias, info.name)
    answer: MovedAlias = {"alias": alias, "collection": info.name, "before": before, **service.identity(info.tag)}
    return json_response(answer, status=201 if before is None else 200)


@router.delete("/{alias}", summary="Delete an alias")
@describe(Operation(errors=COLLECTION))
async def delete_alias(request: Request, alias: str) -> JsonAnswer[DroppedAlias]:
    """Delete an alias. The collection that the alias points to is not deleted."""
    service = service_of(request)
    await service.store.drop_alias(check_name(alias))
    return json_response({"alias": alias, "deleted": True, **service.identity()})
