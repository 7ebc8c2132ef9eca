"""Create, describe and delete collections, and manage their snapshots: `/v1/collections`. The modules `items`,
`add_items`, `search` and `duplicates` contain the routes for the items in a collection.

A collection stores a tag that describes how its vectors were computed: model fingerprint, pooling, normalisation, input
size and precision. Vectors from different models cannot be compared. So if the service is later started with another
model, a write or search that needs the new model fails with status 409, and the message contains both tags.
"""

import asyncio
from dataclasses import asdict
from typing import Any, cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from model.pooling import width
from service.answer_schemas import (
    Collection,
    CollectionAnswer,
    CollectionsAnswer,
    DroppedCollection,
    DroppedSnapshot,
    Snapshot,
    SnapshotAnswer,
    SnapshotIdentity,
    SnapshotsAnswer,
    StatsAnswer,
)
from service.errors import (
    BadRequest,
    CollectionNotFound,
    Conflict,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    QuotaExceeded,
    RangeNotSatisfiable,
    StorageFailed,
)
from service.options import check_fields, parse_options
from service.routes.answers import JsonAnswer, json_response
from service.routes.bodies import media_type, read_json, read_optional_json
from service.routes.describe import BODY, COLLECTION, Operation, describe
from service.routes.direct import DirectRoute, service_of
from service.routes.files import RangedFile
from service.schemas import CollectionIn, CollectionPatchIn, RestoreIn, SnapshotIn
from service.search.checks import check_name
from service.search.specs import check_spec
from service.search.store import CollectionInfo, CollectionSpec, IndexSpec, SnapshotInfo, SnapshotStore, StatsStore
from service.sqlite import translated as storage_errors
from service.state import Service
from service.tags import tag_parts

_FILES = frozenset({"application/octet-stream", "application/vnd.sqlite3"})
_UPLOAD_S = 3600.0
"""The time limit for the upload of a snapshot, in seconds."""
router = APIRouter(prefix="/v1/collections", tags=["collections"], route_class=DirectRoute)


@router.get("", summary="List collections")
@describe(Operation(errors=(StorageFailed,)))
async def list_collections(request: Request) -> JsonAnswer[CollectionsAnswer]:
    """List all collections, each with its settings, the number of its items, and its aliases."""
    service = service_of(request)
    collections, aliases = await service.store.collections(), await service.store.aliases()
    data = [_described(info, aliases) for info in collections]
    return json_response({"object": "list", "data": data, **service.identity()})


@router.put("/{name}", summary="Create a collection")
@describe(
    Operation(
        errors=(*BODY, ModelNotFound, Conflict, QuotaExceeded, StorageFailed),
        body=CollectionIn,
        body_required=False,
        statuses=(200, 201),
    )
)
async def put_collection(request: Request, name: str) -> JsonAnswer[CollectionAnswer]:
    """Create an empty collection. Only its setting `indexed` can be changed later. The status is 201 if the collection
    was created, and 200 if it already exists with the same settings. The status is 409 if the collection exists with
    other settings, or if the name is already used for an alias."""
    service = service_of(request)
    check_name(name)
    fields = await read_optional_json(request)
    if isinstance(fields.get("index"), dict):
        check_fields(fields["index"], "index")
    body = parse_options(CollectionIn, fields)
    service = service.named(body.model)
    spec = _spec(service, body)
    before = await _existing(service, name)
    try:
        info = await service.store.create(name, spec)
    except Conflict as error:
        if before is None or before.name != name or before.spec == spec:
            raise
        raise Conflict(f"collection {name!r} exists with {_differences(before.spec, spec)}") from error
    answer: CollectionAnswer = {**_described(info, await service.store.aliases()), **service.identity(info.tag)}
    return json_response(answer, status=201 if before is None else 200)


@router.get("/{name}", summary="Describe a collection")
@describe(Operation(errors=COLLECTION))
async def get_collection(request: Request, name: str) -> JsonAnswer[CollectionAnswer]:
    """Return the settings of a collection, the number of its items, and the aliases that point to it."""
    service = service_of(request)
    info = await service.store.info(check_name(name))
    return json_response({**_described(info, await service.store.aliases()), **service.identity(info.tag)})


@router.patch("/{name}", summary="Change a collection's settings")
@describe(Operation(errors=(*BODY, *COLLECTION), body=CollectionPatchIn))
async def patch_collection(request: Request, name: str) -> JsonAnswer[CollectionAnswer]:
    """Replace the list of the metadata keys that have an index (`indexed`). The other settings cannot be changed. The
    answer is sent after the indexes have been built. Until then, searches run as before, and other writes wait. The
    status is 422 if the vector store has no such indexes."""
    service = service_of(request)
    check_name(name)
    body = parse_options(CollectionPatchIn, await read_json(request))
    _check_capability(service, "indexed")
    request.state.deadline.reschedule(None)  # building an index reads the metadata of every item
    info = await service.store.set_indexed(name, sorted(set(body.indexed)))
    return json_response({**_described(info, await service.store.aliases()), **service.identity(info.tag)})


@router.delete("/{name}", summary="Delete a collection")
@describe(Operation(errors=(*COLLECTION, Conflict)))
async def delete_collection(request: Request, name: str) -> JsonAnswer[DroppedCollection]:
    """Delete a collection with all its items. Its snapshots and stored images are not deleted. The status is 409 if an
    alias points to the collection."""
    service = service_of(request)
    info = await service.store.info(check_name(name))
    await service.store.drop(name)
    return json_response({"name": name, "deleted": True, **service.identity(info.tag)})


@router.get("/{name}/stats", summary="Get index statistics")
@describe(Operation(errors=COLLECTION))
async def get_stats(request: Request, name: str) -> JsonAnswer[StatsAnswer]:
    """Return statistics about the index of a collection. Which statistics there are depends on the vector store. The
    status is 422 if the store provides none."""
    service = service_of(request)
    check_name(name)
    _check_capability(service, "stats")
    info = await service.store.info(name)
    stats = await cast(StatsStore, service.store).stats(info.name)
    return json_response({"collection": name, "stats": stats, **service.identity(info.tag)})


@router.post("/{name}/snapshots", summary="Take a snapshot")
@describe(
    Operation(
        errors=(*BODY, *COLLECTION, QuotaExceeded),
        body=SnapshotIn,
        file="application/octet-stream",
        body_required=False,
        statuses=(201,),
    )
)
async def take_snapshot(request: Request, name: str) -> JsonAnswer[SnapshotAnswer]:
    """Save the current state of a collection in a snapshot, which is one file on the server. The snapshot is not
    deleted when the collection is deleted. The status is 422 if the vector store does not support snapshots.

    With the content type `application/octet-stream`, the body is the file of a snapshot from another server. It becomes
    a snapshot of the collection in the path and can then be restored. The collection need not exist."""
    service = service_of(request)
    store = _snapshots(service, name)
    if media_type(request) in _FILES:
        taken = await _uploaded(request, store, name)
    else:
        parse_options(SnapshotIn, await read_optional_json(request))
        request.state.deadline.reschedule(None)  # a large collection takes longer than the request deadline
        taken = await store.snapshot(name)
    answer: SnapshotAnswer = {**_snapshot(taken), **_identity(service, taken.tag)}
    return json_response(answer, status=201)


async def _uploaded(request: Request, store: SnapshotStore, name: str) -> SnapshotInfo:
    """Write the body of a request to disk as it arrives, and make it a snapshot. Raise InvalidRequest if the body is
    empty or damaged."""
    request.state.deadline.reschedule(asyncio.get_running_loop().time() + _UPLOAD_S)
    path = store.upload_path()
    try:
        with storage_errors("the uploaded snapshot"):
            with path.open("wb") as file:
                async for chunk in request.stream():
                    await asyncio.to_thread(file.write, chunk)
            size = path.stat().st_size
        if not size:
            raise InvalidRequest(
                "the uploaded snapshot is empty: send the file of a snapshot, or leave out the content type to take one"
            )
        return await store.add_snapshot(name, path)
    finally:
        path.unlink(missing_ok=True)


@router.get("/{name}/snapshots", summary="List snapshots")
@describe(Operation(errors=(InvalidRequest, StorageFailed)))
async def list_snapshots(request: Request, name: str) -> JsonAnswer[SnapshotsAnswer]:
    """List the snapshots of a collection, oldest first. Snapshots of a deleted collection are listed, too. The `tag` of
    a snapshot describes how its vectors were computed."""
    service = service_of(request)
    snapshots = await _snapshots(service, name).snapshots(name)
    collection = await _existing(service, name)
    tag = collection.tag if collection is not None else snapshots[-1].tag if snapshots else None
    return json_response({"object": "list", "data": [_snapshot(info) for info in snapshots], **_identity(service, tag)})


@router.get("/{name}/snapshots/{snapshot}", summary="Download a snapshot", response_class=FileResponse)
@describe(
    Operation(
        errors=(BadRequest, InvalidRequest, NotFound, RangeNotSatisfiable, StorageFailed),
        headers=("Range",),
        statuses=(200, 206),
        media_types=("application/octet-stream",),
    )
)
async def download_snapshot(request: Request, name: str, snapshot: str) -> Response:
    """Download the file of a snapshot. The `Range` header is supported, so an interrupted download can be resumed."""
    path = await _snapshots(service_of(request), name).snapshot_path(name, snapshot)
    return RangedFile(path, media_type="application/octet-stream", filename=path.name)


@router.delete("/{name}/snapshots/{snapshot}", summary="Delete a snapshot")
@describe(Operation(errors=(InvalidRequest, NotFound, StorageFailed)))
async def delete_snapshot(request: Request, name: str, snapshot: str) -> JsonAnswer[DroppedSnapshot]:
    """Delete a snapshot of a collection. The collection itself is not deleted."""
    service = service_of(request)
    store = _snapshots(service, name)
    tag = next((info.tag for info in await store.snapshots(name) if info.name == snapshot), None)
    await store.drop_snapshot(name, snapshot)
    return json_response({"collection": name, "snapshot": snapshot, "deleted": True, **_identity(service, tag)})


@router.post("/{name}/restore", summary="Restore a snapshot")
@describe(Operation(errors=(*BODY, NotFound, Conflict, QuotaExceeded, StorageFailed), body=RestoreIn, statuses=(201,)))
async def restore_snapshot(request: Request, name: str) -> JsonAnswer[CollectionAnswer]:
    """Create a collection from a snapshot. The new collection gets the name in the path. The field `from` is the name
    of the collection from which the snapshot was taken. By default, this is the name in the path. The status is 409 if
    a collection or alias with the name in the path already exists."""
    service = service_of(request)
    store = _snapshots(service, name)
    body = parse_options(RestoreIn, await read_json(request))
    source = name if body.source is None else check_name(body.source)
    request.state.deadline.reschedule(None)
    info = await store.restore(name, source, body.snapshot)
    answer: CollectionAnswer = {**_described(info, await service.store.aliases()), **service.identity(info.tag)}
    return json_response(answer, status=201)


def _spec(service: Service, body: CollectionIn) -> CollectionSpec:
    """Return the specification of the collection that a request describes.

    Raises:
        InvalidRequest: a setting is not allowed, `dimension` is not the served model's, or `fingerprint`
            identifies another model but `dimension` is missing.
    """
    dimension = width(body.pooling, service.pipeline.dims)
    if body.fingerprint not in (None, service.artifact.fingerprint):
        if body.dimension is None:
            raise InvalidRequest("the fingerprint of another model requires a dimension", param="dimension")
        dimension = body.dimension
    elif body.dimension not in (None, dimension):
        raise InvalidRequest(
            f"dimension={body.dimension}: the served model gives {dimension} with pooling {body.pooling}; for vectors "
            "of another model, set its fingerprint",
            param="dimension",
        )
    return check_spec(
        CollectionSpec(
            service.tag(body.fingerprint, body.pooling),
            dimension,
            body.dtype,
            IndexSpec(**body.index.model_dump()),
            tuple(sorted(set(body.indexed))),
            body.originals,
        )
    )


async def _existing(service: Service, name: str) -> CollectionInfo | None:
    try:
        return await service.store.info(name)
    except CollectionNotFound:
        return None


def _snapshot(info: SnapshotInfo) -> Snapshot:
    return {
        "name": info.name,
        "collection": info.collection,
        "created": info.created,
        "bytes": info.bytes,
        "count": info.count,
        "tag": info.tag,
    }


def _identity(service: Service, tag: str | None) -> SnapshotIdentity:
    """Return the fields `model` and `fingerprint` for an answer about a snapshot with this tag. If the tag is unknown,
    for example because the snapshot is damaged, both fields are None."""
    if tag is None:
        return {"model": None, "fingerprint": None}
    identity = service.identity(tag)
    return {"model": identity["model"], "fingerprint": identity["fingerprint"]}


def _described(info: CollectionInfo, aliases: dict[str, str]) -> Collection:
    """Return the fields of an answer that describe a collection."""
    spec = info.spec
    described: Collection = {
        "name": info.name,
        "tag": spec.tag,
        "pooling": tag_parts(spec.tag).pooling,
        "dimension": spec.dimension,
        "dtype": spec.dtype,
        "index": asdict(spec.index),
        "indexed": list(spec.indexed),
        "originals": spec.originals,
        "count": info.count,
        "aliases": sorted(alias for alias, collection in aliases.items() if collection == info.name),
    }
    if info.is_damaged:
        described["damaged"] = True
    return described


def _differences(there: CollectionSpec, wanted: CollectionSpec) -> str:
    """Return a text that lists the settings in which two specifications differ, with both values of each setting."""
    old, new = (_settings(spec) for spec in (there, wanted))
    names = [name for name in old if old[name] != new[name]]
    return "; ".join(f"{name} {_shown(old[name])}, not {_shown(new[name])}" for name in names)


def _settings(spec: CollectionSpec) -> dict[str, Any]:
    flat = {"pooling": tag_parts(spec.tag).pooling, **asdict(spec)}
    index = flat.pop("index")
    return flat | {f"index.{name}": value for name, value in index.items()}


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def _snapshots(service: Service, name: str) -> SnapshotStore:
    check_name(name)
    _check_capability(service, "snapshots")
    return cast(SnapshotStore, service.store)


def _check_capability(service: Service, wanted: str) -> None:
    has = service.store.capabilities
    if wanted not in has:
        raise InvalidRequest(
            f"the vector store does not support {wanted}; it supports {', '.join(sorted(has)) or 'no extra capability'}"
        )
