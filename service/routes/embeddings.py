"""Embed images: `POST /v1/embeddings`. The answer has OpenAI's format."""

import time

from fastapi import APIRouter, Request

from model.pooling import width
from service.answer_schemas import Embedding, EmbeddingsAnswer
from service.errors import ModelNotFound, UnsupportedDimensions
from service.options import parse_options
from service.outcomes import split_items
from service.routes.answers import JsonAnswer, encode_vector, item_errors, json_response, server_timing
from service.routes.bodies import read_upload, refuse_query_options
from service.routes.describe import IMAGES, Operation, Upload, describe
from service.routes.direct import DirectRoute, service_of
from service.schemas import EmbeddingOptions, EmbeddingsIn
from service.state import Service
from service.timings import slowest
from service.tracing import record_stage

router = APIRouter(tags=["embeddings"], route_class=DirectRoute)


@router.post("/v1/embeddings", summary="Embed images")
@describe(
    Operation(
        errors=(*IMAGES, ModelNotFound, UnsupportedDimensions),
        upload=Upload(EmbeddingsIn, EmbeddingOptions, many=True),
        answer_headers=("Server-Timing",),
    )
)
async def create_embeddings(request: Request) -> JsonAnswer[EmbeddingsAnswer]:
    """Return the embeddings of one or more images, in the order in which the images were sent. Send JSON with data URLs
    or base64 texts in `input`, a form with files, or one image as the raw body. With `on_error=partial`, images that
    cannot be read are listed in `errors`, and the others are embedded."""
    service = service_of(request)
    upload = await read_upload(request, service.settings, key="input")
    refuse_query_options(request, EmbeddingOptions)
    options = parse_options(EmbeddingOptions, upload.fields)
    service = service.named(options.model)
    _check_dimensions(options, service)
    started = time.perf_counter()
    good, bad = split_items(await service.pipeline.embed(upload.images), options.on_error, "input")
    post_started = time.perf_counter()
    data: list[Embedding] = [
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
    record_stage("post", post_started, now)
    timings = {
        **slowest(result for _, result in good),
        "post": round((now - post_started) * 1e3, 3),
        "total": round((now - started) * 1e3, 3),
    }
    body: EmbeddingsAnswer = {
        "object": "list",
        "data": data,
        "model": service.artifact.name,
        "fingerprint": service.artifact.fingerprint,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "timings": timings,
    }
    if bad:
        body["errors"] = item_errors(request, bad)
    return json_response(body, headers=server_timing(timings))


def _check_dimensions(options: EmbeddingOptions, service: Service) -> None:
    dims = width(options.pooling, service.pipeline.dims)
    if options.dimensions not in (None, dims):
        raise UnsupportedDimensions(
            f"dimensions={options.dimensions}: this model gives {dims} with pooling {options.pooling}, "
            "and vectors are never truncated",
            param="dimensions",
        )
