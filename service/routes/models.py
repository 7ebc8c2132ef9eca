"""`GET /v1/models`: the served model and how it was checked."""

import re
from typing import Any

from fastapi import APIRouter, Request, Response

from service.routes.answers import json_response
from service.routes.direct import DirectRoute, service_of
from service.state import Service

router = APIRouter(tags=["models"], route_class=DirectRoute)


@router.get("/v1/models", summary="List models")
async def list_models(request: Request) -> Response:
    """List the served model, in OpenAI's format."""
    return json_response({"object": "list", "data": [describe(service_of(request))]})


@router.get("/v1/models/{name:path}", summary="Get a model")
async def get_model(request: Request, name: str) -> Response:
    """Return the served model, by any of its names."""
    service = service_of(request)
    service.check_model(name)
    return json_response(describe(service))


def describe(service: Service) -> dict[str, Any]:
    """Return everything that determines a vector, with the parity figures and the origin of the weights."""
    manifest = service.artifact.manifest
    return {
        "id": service.artifact.name,
        "object": "model",
        "owned_by": "dinov2-service",
        "fingerprint": manifest.fingerprint,
        "aliases": service.model_names,
        "dimensions": manifest.config.embed_dim,
        "patch_size": manifest.config.patch_size,
        "input_size": list(manifest.input_size),
        "preprocess": manifest.preprocess.model_dump(mode="json"),
        "engine": service.engine.name,
        "precision": service.engine.precision,
        "engines_tried": [t._asdict() | {"reason": _without_folders(t.reason, service)} for t in service.tried],
        "parity": [record.model_dump(mode="json") for record in manifest.parity],
        "provenance": manifest.provenance,
        "licence": manifest.licence,
        "created_at": manifest.created,
    }


_FOLDERS = re.compile(r"(?<![\w.:/~-])/(?:[^\s/:'\"]+/)+")
"""The folders of an absolute path. Paths in URLs do not match."""


def _without_folders(text: str, service: Service) -> str:
    """Strip folders from file names in a reason. Only the log shows the host's paths."""
    for folder in (service.artifact.path, service.artifact.derived, service.settings.data_dir.absolute()):
        if folder.is_absolute():
            text = text.replace(f"{folder}/", "/")  # the path may contain spaces
    return _FOLDERS.sub("", text)
