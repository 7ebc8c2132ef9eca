"""Separate the foreground of an image from its background: `POST /v1/segment`. The image is decoded once, and a single
forward pass provides both the mask and the embedding."""

import base64
import time
from functools import partial
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response

from service.answer_schemas import SegmentAnswer
from service.data_urls import check_count
from service.errors import EngineFailed, InvalidItems, ItemError, ModelNotFound, ServiceError
from service.features.pipeline import Analysed, Embedded
from service.options import parse_options
from service.routes.answers import JsonAnswer, json_response, server_timing
from service.routes.bodies import read_upload
from service.routes.describe import IMAGES, Operation, Upload, describe
from service.routes.direct import DirectRoute, service_of
from service.schemas import SegmentIn, SegmentOptions
from service.state import Service
from service.timings import ms_since, slowest
from service.vision.mask import coco_rle_encode, overlay_png, png_mask
from service.vision.segment import Box, Mask, segment_foreground

router = APIRouter(tags=["segment"], route_class=DirectRoute)


class _Answer(NamedTuple):
    """The data for the answer to a request. It does not include the decoded image or the mask array, so that their
    memory can be freed."""

    content: bytes | dict[str, Any]
    contrast: float
    crop_box: Box
    embedded: Embedded
    segment_ms: float


@router.post("/v1/segment", summary="Segment the foreground")
@describe(
    Operation(
        errors=(*IMAGES, ModelNotFound),
        upload=Upload(SegmentIn, SegmentOptions, many=False),
        media_types=("image/png",),
        answer_headers=("Server-Timing", "X-Model", "X-Model-Fingerprint"),
    )
)
async def segment(request: Request) -> JsonAnswer[SegmentAnswer] | Response:
    """Separate the foreground of one image from its background. Send the image in the JSON field `image`, as a file in
    a form, or as the raw body.

    `format=png` returns the mask as a PNG, `format=overlay` returns the image as a PNG with the foreground tinted, and
    `format=rle` returns JSON with the mask as COCO run lengths. With `include=embedding`, the answer is JSON for every
    format. It also contains the embedding of the image, and a PNG is encoded as a base64 string.
    """
    started = time.perf_counter()
    service = service_of(request)
    upload = await read_upload(request, service.settings, key="image")
    check_count(len(upload.images), service.settings.model_copy(update={"max_batch_items": 1}), "image")
    options = parse_options(SegmentOptions, _listed(upload.fields))
    service.check_model(options.model)
    try:
        answer = await service.pipeline.analyse(upload.images[0].result(), partial(_answer, service, options))
    except ServiceError as error:
        if error.status >= 500:
            raise
        raise InvalidItems([ItemError(0, error)], total=1, param="image") from error
    timings = slowest([answer.embedded])
    timings |= {"segment": answer.segment_ms, "total": ms_since(started)}
    headers = server_timing(timings) | {
        "X-Model": service.artifact.name,
        "X-Model-Fingerprint": service.artifact.fingerprint,
    }
    content = answer.content
    if isinstance(content, bytes):
        return Response(content, media_type="image/png", headers=headers)
    if "embedding" in options.include:
        content["embedding"] = answer.embedded.vector(options.pooling, options.normalize)
    content |= {"contrast": answer.contrast, "crop_box": answer.crop_box, **service.identity(), "timings": timings}
    return json_response(content, headers=headers)


def _answer(service: Service, options: SegmentOptions, analysed: Analysed) -> _Answer:
    """Compute the mask of an image and return the data for the answer, which includes the mask in the requested format.
    This function runs in a worker thread.

    Raises:
        EngineFailed: a feature is not finite, or the number of patches does not match the size of the image.
    """
    started = time.perf_counter()
    height, width = analysed.image.shape[:2]
    try:
        foreground = segment_foreground(analysed.patches, height, width, service.artifact.manifest.preprocess)
    except ValueError as error:  # the features are wrong: a fault of the engine, not of the image
        raise EngineFailed(f"the engine's features cannot be used: {error}") from error
    content = _content(analysed, foreground.mask, options)
    return _Answer(content, foreground.contrast, foreground.crop_box, analysed.embedded, ms_since(started))


def _content(analysed: Analysed, mask: Mask, options: SegmentOptions) -> bytes | dict[str, Any]:
    """Encode the mask in the requested format. Return a JSON object for `format=rle`, and the bytes of a PNG otherwise.
    If `options.include` is not empty, return a JSON object for every format, with the PNG as a base64 string."""
    if options.format == "rle":
        return {"segmentation": coco_rle_encode(mask)}
    png = png_mask(mask) if options.format == "png" else overlay_png(analysed.image, mask)
    return {options.format: base64.b64encode(png).decode("ascii")} if options.include else png


def _listed(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a request. If `include` is a single string, as in a form or query string, replace it with a
    list."""
    include = fields.get("include")
    return {**fields, "include": [include]} if isinstance(include, str) else fields
