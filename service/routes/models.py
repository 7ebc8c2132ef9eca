"""GET /v1/models: what is served, and how it was checked."""

import re
from typing import Any

from fastapi import APIRouter, Request, Response

from service.routes.answers import json_response
from service.routes.direct import DirectRoute, service_of
from service.state import Service

router = APIRouter(tags=["models"], route_class=DirectRoute)


@router.get("/v1/models", summary="List models")
async def list_models(request: Request) -> Response:
    """The model in use, in OpenAI's list shape."""
    return json_response({"object": "list", "data": [describe(service_of(request))]})


@router.get("/v1/models/{name:path}", summary="Get a model")
async def get_model(request: Request, name: str) -> Response:
    """The model in use, by any of its names."""
    service = service_of(request)
    service.check_model(name)
    return json_response(describe(service))


def describe(service: Service) -> dict[str, Any]:
    """Everything that decides a vector, with the parity figures and where the weights come from."""
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
"""The folders of an absolute path, not those of an address."""


def _without_folders(text: str, service: Service) -> str:
    """A reason with its files' names alone: where they lie on the host is for the log."""
    for folder in (service.artifact.path, service.artifact.derived, service.settings.data_dir.absolute()):
        if folder.is_absolute():
            text = text.replace(f"{folder}/", "/")  # it may hold spaces
    return _FOLDERS.sub("", text)
