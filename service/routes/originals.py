"""Erase stored images: `/v1/originals`. Deleting an item does not erase its image, because other items may share it
(`service/erasure.py`)."""

from fastapi import APIRouter, Request

from service.answer_schemas import ErasedImage, ErasedImages, ImageReference
from service.erasure import MAX_LISTED, erase_image, erase_unreferenced
from service.errors import Conflict, InvalidRequest, NotFound, StorageFailed
from service.options import parse_options
from service.routes.answers import JsonAnswer, json_response
from service.routes.bodies import query_fields, read_optional_json
from service.routes.describe import BODY, Operation, describe
from service.routes.direct import DirectRoute, service_of
from service.schemas import EraseImageQuery, EraseImagesIn

router = APIRouter(prefix="/v1/originals", tags=["items"], route_class=DirectRoute)


@router.delete("/{digest}", summary="Erase a stored image")
@describe(Operation(errors=(InvalidRequest, NotFound, Conflict, StorageFailed), query=EraseImageQuery))
async def erase_original(request: Request, digest: str) -> JsonAnswer[ErasedImage]:
    """Erase the stored image with this sha256. All items are searched for references to it, so this takes long if there
    are millions of them. `items` decides what happens if items refer to the image. With `refuse`, the image is not
    erased and the status is 409. With `keep`, the items stay but have no image. With `delete`, they are deleted. The
    answer lists the first 100 items. The patch features
    of the image are erased too, but snapshots, backups and cached vectors are not."""
    service = service_of(request)
    options = parse_options(EraseImageQuery, query_fields(request))
    request.state.deadline.reschedule(None)
    patches = service.pipeline.patch_cache.store
    erased = await erase_image(service.store, service.originals, patches, digest, options.items)
    items: list[ImageReference] = [{"collection": one.collection, "id": one.id} for one in erased.items[:MAX_LISTED]]
    answer: ErasedImage = {
        "digest": digest,
        "erased": True,
        "bytes": erased.bytes,
        "references": len(erased.items),
        "items": items,
        "items_deleted": options.items == "delete" and bool(items),
    }
    return json_response(answer)


@router.post("/erase-unreferenced", summary="Erase the images that no item needs")
@describe(Operation(errors=(*BODY, StorageFailed), body=EraseImagesIn, body_required=False))
async def erase_unreferenced_originals(request: Request) -> JsonAnswer[ErasedImages]:
    """Erase all stored images to which no item of any collection refers, with their patch features. Images that were
    stored within the last 24 hours are kept, because their items may not be written yet. With `dry_run`, nothing is
    erased and the answer says what would be erased. All items are read, so this takes long if there are millions of
    them."""
    service = service_of(request)
    body = parse_options(EraseImagesIn, await read_optional_json(request))
    request.state.deadline.reschedule(None)
    patches = service.pipeline.patch_cache.store
    found = await erase_unreferenced(service.store, service.originals, patches, only_count=body.dry_run)
    answer: ErasedImages = {"images": found.images, "bytes": found.bytes, "erased": not body.dry_run}
    return json_response(answer)
