"""Describe the served model and how its engine was checked: `GET /v1/models`."""

import asyncio
import re
from datetime import UTC, datetime

from fastapi import APIRouter, Request

from model.dinotxt.store import TEXT_ENCODER, Record, list_dinotxt
from model.heads.record import HeadRecord
from model.heads.store import list_heads
from service.answer_schemas import HeadAnswer, ModelAnswer, ModelsAnswer
from service.errors import ModelNotFound
from service.routes.answers import JsonAnswer, json_response
from service.routes.describe import Operation, describe
from service.routes.direct import DirectRoute, service_of
from service.state import Service

router = APIRouter(tags=["models"], route_class=DirectRoute)


@router.get("/v1/models", summary="List models")
async def list_models(request: Request) -> JsonAnswer[ModelsAnswer]:
    """Return a list in OpenAI's format. Its only entry describes the served model."""
    answer = await asyncio.to_thread(model_answer, service_of(request))  # reads the records of the heads
    return json_response({"object": "list", "data": [answer]})


@router.get("/v1/models/{name:path}", summary="Get a model")
@describe(Operation(errors=(ModelNotFound,)))
async def get_model(request: Request, name: str) -> JsonAnswer[ModelAnswer]:
    """Return the description of the served model. The path may contain any of the model's names. The status is 404 for
    any other name."""
    service = service_of(request)
    service = service.named(name)
    return json_response(await asyncio.to_thread(model_answer, service))


def model_answer(service: Service) -> ModelAnswer:
    """Return the description of the served model for an answer. It includes everything that determines the vectors:
    fingerprint, preprocessing, engine and precision. It also includes the measured differences between the features of
    each engine and those of the reference (`parity`), the origin of the weights (`provenance`), and the model's current
    heads."""
    manifest = service.artifact.manifest
    return {
        "id": service.artifact.name,
        "object": "model",
        "created": _unix_time(manifest.created),
        "owned_by": "dinov2-service",
        "fingerprint": manifest.fingerprint,
        "aliases": service.model_names,
        "dimensions": manifest.config.embed_dim,
        "patch_size": manifest.config.patch_size,
        "input_size": list(manifest.input_size),
        "preprocess": manifest.preprocess.model_dump(mode="json") | {"fit": manifest.preprocess.fit},
        "engine": service.engine.name,
        "precision": service.engine.precision,
        "engines_tried": [
            {"engine": tried.engine, "outcome": tried.outcome, "reason": _without_folders(tried.reason, service)}
            for tried in service.tried
        ],
        "parity": [record.model_dump(mode="json") for record in manifest.parity],
        "provenance": manifest.provenance,
        "licence": manifest.licence,
        "created_at": manifest.created,
        "heads": [
            *(_head(record) for record in list_heads(service.artifact)),
            *(_dinotxt(record, manifest.config.depth - 1) for record in list_dinotxt(service.artifact)),
        ],
    }


def _head(record: HeadRecord) -> HeadAnswer:
    return {
        "name": record.name,
        "kind": record.kind,
        "architecture": record.architecture,
        "fingerprint": record.sha256,
        "blocks": list(record.layers),
        "classes": list(record.classes),
        "depth_range": None if record.depth_range is None else list(record.depth_range),
        "metrics": record.metrics,
        "source": record.source,
        "created_at": record.created,
    }


def _dinotxt(record: Record, last_block: int) -> HeadAnswer:
    return {
        "name": record.name,
        "kind": "words",
        "architecture": "dinotxt",
        "fingerprint": record.files[TEXT_ENCODER].sha256,
        "blocks": [last_block],
        "classes": [],
        "depth_range": None,
        "metrics": {},
        "source": ", ".join(record.sources),
        "created_at": record.created,
    }


def _unix_time(created: str) -> int:
    """Return a time in ISO 8601 format as the number of seconds since 1970, or 0 if `created` has another format."""
    try:
        time = datetime.fromisoformat(created)
    except ValueError:
        return 0
    return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())


_FOLDERS = re.compile(r"(?<![\w.:/~-])/(?:[^\s/:'\"]+/)+")
"""A pattern that matches the folders of an absolute path, but not the path of a URL."""


def _without_folders(text: str, service: Service) -> str:
    """Return `text` without the folders in its absolute paths. Clients must not see where files are on the host, but
    the log shows the full paths."""
    for folder in (service.artifact.path, service.artifact.derived, service.settings.data_dir.absolute()):
        if folder.is_absolute():
            text = text.replace(f"{folder}/", "/")  # the path may contain spaces
    return _FOLDERS.sub("", text)
