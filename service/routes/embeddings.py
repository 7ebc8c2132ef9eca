"""POST /v1/embeddings: photos to vectors, in OpenAI's shape."""

import base64
import time
from typing import Any, Annotated

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from service.errors import InvalidItems, ItemError, ServiceError, UnsupportedDimensions
from service.pipeline import Embedded
from service.routes.inputs import (
    ImageBytes,
    check_count,
    decode_images,
    media_type,
    read_json,
    read_uploads,
    service_of,
    validated,
)
from service.schemas import EmbeddingOptions
from service.state import Service

router = APIRouter()


class EmbeddingsIn(EmbeddingOptions):
    """The JSON body; OpenAI's fields, and this service's options."""

    input: Annotated[str | list[str], Field(description="data URL or base64, one or a list")]


@router.post(
    "/v1/embeddings",
    summary="Embed images",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": EmbeddingsIn.model_json_schema()},
                "multipart/form-data": {
                    "schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}
                },
                "image/*": {"schema": {"type": "string", "format": "binary"}},
            },
        }
    },
)
async def create_embeddings(request: Request) -> Response:
    """Vectors of one or many images: JSON with data URLs or base64, a form with files, or one raw image."""
    service = service_of(request)
    images, options = await _read(request, service)
    service.check_model(options.model)
    _check_dimensions(options, service)
    started = time.perf_counter()
    results = await service.live.embed(images)
    bad = [ItemError(i, result) for i, result in enumerate(results) if isinstance(result, ServiceError)]
    if bad and (options.on_error == "fail" or len(bad) == len(results)):
        raise InvalidItems(bad, total=len(results))
    good = [(i, result) for i, result in enumerate(results) if isinstance(result, Embedded)]
    return answer(service, options, good, bad, started)


async def _read(request: Request, service: Service) -> tuple[list[ImageBytes], EmbeddingOptions]:
    if media_type(request) == "application/json":
        body = validated(EmbeddingsIn, await read_json(request))
        texts = [body.input] if isinstance(body.input, str) else body.input
        check_count(len(texts), service, "input")
        return await decode_images(texts), body
    uploads, fields = await read_uploads(request)
    check_count(len(uploads), service, "file")
    return [upload.data for upload in uploads], validated(EmbeddingOptions, fields)


def _check_dimensions(options: EmbeddingOptions, service: Service) -> None:
    dims = service.live.dims * (2 if options.pooling == "cls+mean" else 1)
    if options.dimensions not in (None, dims):
        raise UnsupportedDimensions(
            f"dimensions={options.dimensions}: this model gives {dims} with pooling {options.pooling}, "
            "and vectors are never cut short",
            param="dimensions",
        )


def answer(
    service: Service,
    options: EmbeddingOptions,
    good: list[tuple[int, Embedded]],
    bad: list[ItemError],
    started: float,
) -> Response:
    """OpenAI's body with the model's identity and the timings; floats go from numpy to JSON without Python objects."""
    now = time.perf_counter()
    vectors = [(i, result.vector(options.pooling, options.normalize)) for i, result in good]
    encode = _base64 if options.encoding_format == "base64" else np.ascontiguousarray
    tokens = sum(result.tokens for _, result in good)
    timings = stage_timings([result for _, result in good], now - started)
    body: dict[str, Any] = {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": encode(vector)} for i, vector in vectors],
        **service.identity(),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "timings": timings,
    }
    if bad:
        body["errors"] = [item.body() for item in bad]
    payload = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    service.metrics.stage_seconds.labels("post").observe(time.perf_counter() - now)
    return Response(payload, media_type="application/json", headers={"Server-Timing": server_timing(timings)})


def stage_timings(results: list[Embedded], total_s: float) -> dict[str, float]:
    """Milliseconds by stage: the slowest image of the request for each, and `total`."""
    stages: dict[str, float] = {}
    for result in results:
        for stage, seconds in result.timings.items():
            stages[stage] = max(stages.get(stage, 0.0), round(seconds * 1e3, 3))
    return {**stages, "total": round(total_s * 1e3, 3)}


def server_timing(timings: dict[str, float]) -> str:
    """The Server-Timing header of these milliseconds."""
    return ", ".join(f"{stage};dur={milliseconds}" for stage, milliseconds in timings.items())


def _base64(vector: npt.NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
