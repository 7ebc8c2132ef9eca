"""Describe the models and how their engines were checked, load and unload a model on trial, roll back to the former
model, and remove models: `/v1/models`."""

import asyncio
import re
from dataclasses import replace
from datetime import UTC, datetime

from fastapi import APIRouter, Request

from model.artifact import Artifact
from model.dinotxt.store import TEXT_ENCODER, Record, list_dinotxt
from model.heads.record import HeadRecord
from model.heads.store import list_heads
from model.zoo import ENTRIES
from service.answer_schemas import HeadAnswer, ModelAnswer, ModelsAnswer, RemovedModel, RolledBackAnswer
from service.errors import Conflict, ModelNotFound, StorageFailed
from service.migration.rollback import roll_back
from service.migration.trial import end_trial, load_on_trial
from service.migration.work import Places
from service.model_list import KnownModel, known_models, model_named, remove_model
from service.options import parse_options
from service.routes.answers import JsonAnswer, json_response
from service.routes.bodies import read_json, read_optional_json
from service.routes.describe import BODY, Operation, describe
from service.routes.direct import DirectRoute, service_of
from service.schemas import LoadModelIn, RemoveModelIn, RollbackIn
from service.sqlite import translated as storage_errors
from service.state import Service
from service.times import iso_time

router = APIRouter(tags=["models"], route_class=DirectRoute)


@router.get("/v1/models", summary="List models")
async def list_models(request: Request) -> JsonAnswer[ModelsAnswer]:
    """Return a list in OpenAI's format. The live model comes first. The others were live before, are prepared to be, or
    lie in the data folder."""
    service = service_of(request)
    data = await asyncio.to_thread(_all_models, service)  # reads the records of the heads
    return json_response({"object": "list", "data": data})


@router.post("/v1/models/rollback", summary="Roll back to the former model")
@describe(Operation(errors=(*BODY, Conflict, StorageFailed), body=RollbackIn, body_required=False))
async def rollback(request: Request) -> JsonAnswer[RolledBackAnswer]:
    """Make the model that was live before live again, with all collections as they are now. This takes less than a
    second. It is possible until the window after the switch ends (`keep_until` of the former model). The status is 409
    if there is no such model, or if items were written without an image since the switch. With `force`, these items are
    missing afterwards."""
    service = service_of(request)
    body = parse_options(RollbackIn, await read_optional_json(request))
    result = await roll_back(_places(service), keep_s=body.keep_hours * 3600, force=body.force)
    return json_response(
        {
            "model": result.generation.name,
            "fingerprint": result.generation.fingerprint,
            "generation": result.generation.number,
            "collections": result.collections,
            "lacking": dict(result.lacking),
            "created_since": result.created_since,
        }
    )


@router.post("/v1/models/load", summary="Load a model on trial")
@describe(Operation(errors=(*BODY, ModelNotFound, Conflict, StorageFailed), body=LoadModelIn, statuses=(202,)))
async def load_model(request: Request) -> JsonAnswer[ModelAnswer]:
    """Load a model of the data folder beside the live one, so that requests may choose it with the field `model`. The
    live model and the collections stay as they are. The model becomes a candidate, and every process loads it while it
    goes on answering. Ask for the model until `loaded` is true or `load_error` says why it cannot be loaded. One model
    at a time is on trial: the one before is unloaded. The status is 409 while a migration is running."""
    service = service_of(request)
    body = parse_options(LoadModelIn, await read_json(request))
    known = await _known(service, body.model)
    if known.manifest.fingerprint != service.artifact.fingerprint or known.generation is not None:
        engine = service.engine
        generation = await load_on_trial(_places(service), known, engine=engine.name, precision=engine.precision)
        known = replace(known, generation=generation)
    return json_response(await _described(service, known), status=202)


@router.post("/v1/models/unload", summary="Unload a model on trial")
@describe(Operation(errors=(*BODY, ModelNotFound, Conflict, StorageFailed), body=LoadModelIn))
async def unload_model(request: Request) -> JsonAnswer[ModelAnswer]:
    """Unload a model that was loaded on trial. Processes close it when no request can use it any more. The status is
    409 if the model is live or former, if collections have vectors of it, or while a migration is running."""
    service = service_of(request)
    body = parse_options(LoadModelIn, await read_json(request))
    known = await _known(service, body.model)
    await end_trial(_places(service), known)
    return json_response(await _described(service, known))


@router.get("/v1/models/{name:path}", summary="Get a model")
@describe(Operation(errors=(ModelNotFound,)))
async def get_model(request: Request, name: str) -> JsonAnswer[ModelAnswer]:
    """Return the description of a model. The path may contain any of its names. With `auto`, this is the live model.
    The status is 404 for any other name."""
    service = service_of(request)
    models = await asyncio.to_thread(_all_models, service)
    for model in models:
        if name == "auto" or name in (model["id"], *model["aliases"]):
            return json_response(model)
    service.named(name)  # raises ModelNotFound with the names of the served model
    raise ModelNotFound(f"there is no model {name[:80]!r}", param="model")


@router.delete("/v1/models/{name:path}", summary="Remove a model")
@describe(Operation(errors=(*BODY, ModelNotFound, Conflict, StorageFailed), body=RemoveModelIn, body_required=False))
async def delete_model(request: Request, name: str) -> JsonAnswer[RemovedModel]:
    """Delete a model that is not loaded from the data folder. The status is 409 if it is loaded, or if collections have
    vectors of it and `force` is not set."""
    service = service_of(request)
    body = parse_options(RemoveModelIn, await read_optional_json(request))
    known = await _known(service, name)
    with storage_errors("the model"):
        await remove_model(known, service.settings.data_dir, service.generations, service.store, force=body.force)
    return json_response({"id": known.name, "object": "model", "deleted": True})


def _places(service: Service) -> Places:
    """Return what a change of the models needs.

    Raises:
        Conflict: the service has no record of models.
    """
    if service.generations is None:
        raise Conflict("this service has no record of models")
    return Places(service.store, service.generations, service.originals, service.settings.data_dir)


async def _known(service: Service, name: str) -> KnownModel:
    """Return the model with this name, fingerprint or number.

    Raises:
        ModelNotFound: there is no such model.
    """
    models = await asyncio.to_thread(known_models, service.settings.data_dir, service.generations)
    return model_named(models, name)


async def _described(service: Service, known: KnownModel) -> ModelAnswer:
    """Return the description of a model after a change.

    Raises:
        ModelNotFound: the model was removed meanwhile.
    """
    answers = await asyncio.to_thread(_all_models, service)
    same = [answer for answer in answers if answer["fingerprint"] == known.manifest.fingerprint]
    number = known.generation.number if known.generation else None
    same.sort(key=lambda answer: answer["generation"] != number)
    if not same:
        raise ModelNotFound(f"the model {known.name} was removed", param="model")
    return same[0]


def _all_models(service: Service) -> list[ModelAnswer]:
    """Describe the live model, the other loaded models, and the models that are not loaded."""
    loaded = {(each.artifact.fingerprint, each.engine.precision): each for each in service.loaded.services.values()}
    loaded[service.artifact.fingerprint, service.engine.precision] = service
    answers: list[ModelAnswer] = []
    described = set()
    for known in known_models(service.settings.data_dir, service.generations):
        model = known.generation.model if known.generation else (known.manifest.fingerprint, "")
        each = loaded.get(model)
        if each is None and known.manifest.fingerprint == service.artifact.fingerprint and known.generation is None:
            each = service
        described.add(model)
        answers.append(_answer(service, known, each))
    if (service.artifact.fingerprint, service.engine.precision) not in described and not any(
        answer["fingerprint"] == service.artifact.fingerprint for answer in answers
    ):
        artifact = service.artifact
        answers.insert(0, _answer(service, KnownModel(artifact.path, artifact.manifest, None), service))
    return answers


def _answer(live: Service, known: KnownModel, loaded: Service | None) -> ModelAnswer:
    """Return the description of a model for an answer. It includes everything that determines the vectors: fingerprint,
    preprocessing, engine and precision. It also includes the measured differences between the features of each engine
    and those of the reference (`parity`), the origin of the weights (`provenance`), and the model's current heads.
    `loaded` is the service of the model, or None if it is not loaded."""
    manifest, generation = known.manifest, known.generation
    artifact = loaded.artifact if loaded else Artifact(known.path, manifest, {})
    # The record is followed a fraction of a second later. Until then, the next live model does not answer requests yet.
    state = "live" if loaded is live else "candidate" if known.state == "live" else known.state
    entry = ENTRIES.get(manifest.name)
    return {
        "id": known.name,
        "object": "model",
        "created": _unix_time(manifest.created),
        "owned_by": "dinov2-service",
        "fingerprint": manifest.fingerprint,
        "aliases": [known.name, manifest.name, manifest.fingerprint, *(entry.aliases if entry else ())],
        "dimensions": manifest.config.embed_dim,
        "patch_size": manifest.config.patch_size,
        "input_size": list(manifest.input_size),
        "preprocess": manifest.preprocess.model_dump(mode="json") | {"fit": manifest.preprocess.fit},
        "engine": loaded.engine.name if loaded else generation.engine if generation else None,
        "precision": loaded.engine.precision if loaded else generation.precision if generation else None,
        "engines_tried": [
            {"engine": tried.engine, "outcome": tried.outcome, "reason": _without_folders(tried.reason, loaded)}
            for tried in (loaded.tried if loaded else ())
            if loaded is not None
        ],
        "parity": [record.model_dump(mode="json") for record in manifest.parity],
        "provenance": manifest.provenance,
        "licence": manifest.licence,
        "created_at": manifest.created,
        "heads": [
            *(_head(record) for record in list_heads(artifact)),
            *(_dinotxt(record, manifest.config.depth - 1) for record in list_dinotxt(artifact)),
        ],
        "state": state,
        "loaded": loaded is not None,
        "load_error": _load_error(live, known) if loaded is None else None,
        "generation": generation.number if generation else None,
        "live_since": _iso_time(generation.live_since if generation else None),
        "keep_until": _iso_time(generation.keep_until if generation else None),
        "metrics": generation.metrics if generation else {},
    }


def _load_error(live: Service, known: KnownModel) -> str | None:
    """Return why this process could not load a model, or None."""
    reason = live.loaded.failures.get(known.generation.model) if known.generation else None
    return None if reason is None else _without_folders(reason, live)


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


def _iso_time(seconds: float | None) -> str | None:
    return None if seconds is None else iso_time(seconds)


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
