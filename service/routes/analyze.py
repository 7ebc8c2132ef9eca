"""Compute several results for one image: `POST /v1/analyze`. The image is decoded once, and a single forward pass
provides everything that all parts of the answer need.

The task (`service/vision/analyze.py`) computes all parts except the class, which may need a collection.
"""

import time
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response

from service.errors import Conflict, InvalidRequest, ModelMismatch, NotFound
from service.features.pipeline import Analysed, Embedded, View
from service.outcomes import numbered
from service.retrieval.class_answers import basis_fields, verdict_fields
from service.retrieval.class_request import (
    ClassifyRequest,
    Seen,
    class_outputs,
    classify,
    read_classify,
    service_for,
)
from service.routes.describe import COLLECTION
from service.routes.direct import DirectRoute, service_of
from service.routes.vision import add_route, read_request, respond, results_of
from service.state import Service
from service.timings import ms_since, slowest
from service.vision import tasks
from service.vision.analyze import AnalyzeOptions
from service.vision.task import Task

router = APIRouter(tags=["vision"], route_class=DirectRoute)


class _Analysis(NamedTuple):
    """The parts of the answer that are ready, and what the classification needs."""

    parts: dict[str, Any]
    embedded: Embedded
    outputs: dict[str, Any]
    compute_ms: float


async def _answer(request: Request, task: Task[AnalyzeOptions, Any], key: str) -> Response:
    """Answer a request."""
    started = time.perf_counter()
    service = service_of(request)
    images, options = await read_request(request, task, service, key)
    service = service.named(options.model)
    asked = await _read_class(options, service)
    if asked is not None:
        service = await service_for(service, asked.options)
    request.state.collection = None if asked is None else asked.options.collection
    others = options.model_copy(update={"outputs": [name for name in options.outputs if name != "class"]})
    view = task.view(others, service.model)
    class_names = () if asked is None else await class_outputs(service, asked)
    view = View(tuple(dict.fromkeys((*view.outputs, *class_names))), view.spec)

    def see(analysed: Analysed) -> _Analysis:
        began = time.perf_counter()
        parts = task.compute(analysed, others, service.model)
        outputs = {name: analysed.outputs[name] for name in class_names}
        return _Analysis(parts, analysed.embedded, outputs, ms_since(began))

    [analysis] = await results_of(images, see, service, view, key)
    parts, stages = analysis.parts, slowest([analysis.embedded]) | {"analyze": analysis.compute_ms}
    if asked is not None:
        class_started = time.perf_counter()
        parts["class"] = await _class(asked, analysis, service)
        stages["classify"] = ms_since(class_started)
    return respond(parts, service, stages | {"total": ms_since(started)})


async def _read_class(options: AnalyzeOptions, service: Service) -> ClassifyRequest | None:
    """Return the request to classify the image, or None if the class is not among the outputs.

    Raises:
        InvalidRequest: an option is not allowed.
        ServiceError: an example image is unusable.
    """
    if "class" not in options.outputs:
        if options.classify is not None:
            raise InvalidRequest("classify: has options, but outputs does not contain class", param="classify")
        return None
    fields = dict(options.classify or {})
    if options.size is not None and "head" not in fields:
        raise InvalidRequest(
            "size: the class is compared with vectors of the model's own input size, so leave out size, or use a head",
            param="size",
        )
    try:
        return await read_classify(numbered([b""]), fields, service.settings, service.web_images, is_json=True)
    except InvalidRequest as error:
        raise InvalidRequest(f"classify: {error.detail}", param="classify") from error


async def _class(asked: ClassifyRequest, analysis: _Analysis, service: Service) -> dict[str, Any]:
    """Return the class of the image, which is the answer of `/v1/classify` for one image."""
    results = await classify(service, asked, numbered([Seen(analysis.embedded, analysis.outputs)]))
    [outcome] = results.images
    verdict: dict[str, Any] = {**verdict_fields(0, outcome.result(), asked.options.top)}
    del verdict["index"]
    return verdict | {**basis_fields(results, asked.options)}


add_route(router, tasks.task("analyze"), _answer, (*COLLECTION, NotFound, ModelMismatch, Conflict))
