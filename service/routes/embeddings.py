"""Embed images: `POST /v1/embeddings`. The answer has OpenAI's format."""

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from model.pooling import width
from service.errors import UnsupportedDimensions
from service.options import parse_options
from service.outcomes import split_items
from service.routes.answers import encode_vector, json_response, server_timing
from service.routes.bodies import read_upload
from service.routes.direct import DirectRoute, service_of
from service.schemas import EmbeddingOptions
from service.state import Service
from service.timings import slowest

router = APIRouter(tags=["embeddings"], route_class=DirectRoute)

_IMAGE = {"type": "string", "format": "binary"}
_OPTIONS = EmbeddingOptions.model_json_schema()["properties"]
_IMAGES = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
_FILES = {"type": "array", "items": _IMAGE}
_BODIES = {
    "application/json": {
        "schema": {"type": "object", "required": ["input"], "properties": {"input": _IMAGES} | _OPTIONS}
    },
    "multipart/form-data": {
        "schema": {"type": "object", "required": ["file"], "properties": {"file": _FILES} | _OPTIONS}
    },
    "image/*": {"schema": _IMAGE},
}


@router.post("/v1/embeddings", summary="Embed images", openapi_extra={"requestBody": {"content": _BODIES}})
async def create_embeddings(request: Request) -> Response:
    """Return the embeddings of one or more images, in the order in which the images were sent. Send JSON with data URLs
    or base64 texts in `input`, a form with files, or one image as the raw body. With `on_error=partial`, images that
    cannot be read are listed in `errors`, and the others are embedded."""
    service = service_of(request)
    upload = await read_upload(request, service.settings, key="input")
    options = parse_options(EmbeddingOptions, upload.fields)
    service.check_model(options.model)
    _check_dimensions(options, service)
    started = time.perf_counter()
    good, bad = split_items(await service.pipeline.embed(upload.images), options.on_error, "input")
    post_started = time.perf_counter()
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": encode_vector(result.vector(options.pooling, options.normalize), options.encoding_format),
        }
        for index, result in good
    ]
    tokens = sum(result.tokens for _, result in good)
    now = time.perf_counter()
    service.metrics.stage_seconds.labels("post").observe(now - post_started)
    timings = {
        **slowest(result for _, result in good),
        "post": round((now - post_started) * 1e3, 3),
        "total": round((now - started) * 1e3, 3),
    }
    body: dict[str, Any] = {
        "object": "list",
        "data": data,
        **service.identity(),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "timings": timings,
    }
    if bad:
        body["errors"] = [item.body() for item in bad]
    return json_response(body, headers=server_timing(timings))


def _check_dimensions(options: EmbeddingOptions, service: Service) -> None:
    dims = width(options.pooling, service.pipeline.dims)
    if options.dimensions not in (None, dims):
        raise UnsupportedDimensions(
            f"dimensions={options.dimensions}: this model gives {dims} with pooling {options.pooling}, "
            "and vectors are never truncated",
            param="dimensions",
        )
