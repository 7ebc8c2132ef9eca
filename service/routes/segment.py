"""`POST /v1/segment`: which part of a photo is the object. One decode and one forward pass give mask and embedding."""

import asyncio
import base64
import time
from typing import Any

from fastapi import APIRouter, Request, Response

from service.errors import EngineFailed, InvalidItems, ItemError, ServiceError
from service.pipeline import Analysed
from service.routes.answers import json_response, server_timing, slowest
from service.routes.uploads import check_count, parse_options, read_upload, service_of
from service.schemas import SegmentOptions
from service.state import Service
from service.vision.mask import coco_rle_encode, overlay_png, png_mask
from service.vision.segment import Foreground, segment_foreground

router = APIRouter(tags=["segment"])


@router.post(
    "/v1/segment",
    summary="Foreground mask",
    openapi_extra={
        "requestBody": {
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": ["image"],
                        "properties": {"image": {"type": "string"}, **SegmentOptions.model_json_schema()["properties"]},
                    }
                },
                "image/*": {"schema": {"type": "string", "format": "binary"}},
            }
        }
    },
)
async def segment(request: Request) -> Response:
    """One photo (JSON `image`, a form's file, or the raw body); PNG bytes, or JSON with format=rle."""
    started = time.perf_counter()
    service = service_of(request)
    upload = await read_upload(request, key="image")
    check_count(len(upload.images), service.settings.model_copy(update={"max_batch_items": 1}), "image")
    options = parse_options(SegmentOptions, _listed(upload.fields))
    service.check_model(options.model)
    try:
        image = upload.images[0]
        if isinstance(image, ServiceError):
            raise image
        analysed = await service.live.analyse(image)
    except ServiceError as error:
        if error.status >= 500:
            raise
        raise InvalidItems([ItemError(0, error)], total=1, param="image") from error
    segmenting = time.perf_counter()
    content, found = await asyncio.to_thread(_answer, service, analysed, options)
    timings = slowest([analysed.embedded])
    timings |= {"segment": _ms_since(segmenting), "total": _ms_since(started)}
    headers = server_timing(timings) | {
        "X-Model": service.artifact.name,
        "X-Model-Fingerprint": service.artifact.fingerprint,
    }
    if isinstance(content, bytes):
        return Response(content, media_type="image/png", headers=headers)
    if "embedding" in options.include:
        content["embedding"] = analysed.embedded.vector(options.pooling, options.normalize)
    content |= {"contrast": found.contrast, "crop_box": found.crop_box, **service.identity(), "timings": timings}
    return json_response(content, headers=headers)


def _answer(service: Service, analysed: Analysed, options: SegmentOptions) -> tuple[bytes | dict[str, Any], Foreground]:
    """The mask in the form asked for; computed off the event loop. With `include` a picture goes into JSON too."""
    height, width = analysed.image.shape[:2]
    try:
        found = segment_foreground(analysed.patches, height, width, service.artifact.manifest.preprocess)
    except ValueError as error:  # not finite, or not the grid: the engine's fault, never the photo's
        raise EngineFailed(f"the engine's features cannot be used: {error}") from error
    if options.format == "rle":
        return {"segmentation": coco_rle_encode(found.mask)}, found
    picture = png_mask(found.mask) if options.format == "png" else overlay_png(analysed.image, found.mask)
    if options.include:
        return {options.format: base64.b64encode(picture).decode("ascii")}, found
    return picture, found


def _listed(fields: dict[str, Any]) -> dict[str, Any]:
    """Forms and queries give one `include` as a string."""
    include = fields.get("include")
    return {**fields, "include": [include]} if isinstance(include, str) else fields


def _ms_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 3)
