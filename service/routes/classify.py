"""Classify images by the labelled items of a collection, or by example images: `POST /v1/classify`."""

import time

from fastapi import APIRouter, Request

from service.errors import Conflict, ModelMismatch, ModelNotFound
from service.outcomes import split_items
from service.retrieval.class_answers import basis_fields, verdict_fields
from service.retrieval.class_request import classify as classify_images
from service.retrieval.class_request import read_classify
from service.retrieval.class_schemas import ClassifyAnswer, ClassifyIn, ClassifyOptions
from service.routes.answers import JsonAnswer, item_errors, json_response, server_timing
from service.routes.bodies import media_type, read_upload, refuse_query_options
from service.routes.describe import COLLECTION, IMAGES, Operation, Upload, describe
from service.routes.direct import DirectRoute, service_of
from service.timings import ms_since

router = APIRouter(tags=["classify"], route_class=DirectRoute)


@router.post("/v1/classify", summary="Classify images")
@describe(
    Operation(
        errors=(*IMAGES, *COLLECTION, ModelNotFound, ModelMismatch, Conflict),
        upload=Upload(ClassifyIn, ClassifyOptions, many=True),
        answer_headers=("Server-Timing",),
    )
)
async def classify(request: Request) -> JsonAnswer[ClassifyAnswer]:
    """Classify one or more images. With `collection` and `label`, the nearest items of the collection vote for their
    classes. With `classes`, which can only be sent in JSON, an image belongs to the class whose examples are most
    similar on average. With `head`, a classification head of the model computes the probability of each class.

    An image that resembles no class is `unknown`, except with a head. `error_rate` is the share of images of known
    classes that may be called unknown. This holds for images from the same source as the known images, which are the
    items of the collection, those that pass `calibration_filter`, or the examples. If there are too few of them,
    `promised` is false and no image is called unknown."""
    started = time.perf_counter()
    service = service_of(request)
    upload = await read_upload(request, service.settings, key="images")
    refuse_query_options(request, ClassifyOptions)
    is_json = media_type(request) == "application/json"
    asked = await read_classify(upload.images, upload.fields, service.settings, service.web_images, is_json=is_json)
    options = asked.options
    request.state.collection = options.collection
    results = await classify_images(service, asked)
    good, bad = split_items(results.images, options.on_error, "images")
    timings = results.timings | {"total": ms_since(started)}
    identity = service.identity(results.tag)
    body: ClassifyAnswer = {
        "object": "list",
        "data": [verdict_fields(index, verdict, options.top) for index, verdict in good],
        "model": identity["model"],
        "fingerprint": identity["fingerprint"],
        "timings": timings,
    }
    body.update(basis_fields(results, options))  # type: ignore[typeddict-item]  # mypy wants all keys of the answer
    if bad:
        body["errors"] = item_errors(request, bad)
    return json_response(body, headers=server_timing(timings))
