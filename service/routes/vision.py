"""The endpoints of all vision tasks (`service/vision/tasks.py`). Each image is decoded once, and a single forward pass
provides everything that the task and the embedding need."""

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import Field, create_model

from service.data_urls import check_count
from service.documented_schemas import Image
from service.errors import InvalidItems, InvalidRequest, ModelNotFound
from service.features.pipeline import Analysed, Embedded, View
from service.options import parse_options
from service.outcomes import Outcome, failures, successes
from service.routes.answers import JsonAnswer, json_response, server_timing
from service.routes.bodies import read_upload, refuse_query_options
from service.routes.describe import IMAGES, Errors, Operation, Upload, describe
from service.routes.direct import DirectRoute, service_of
from service.schemas import VisionOptions
from service.state import Service
from service.timings import ms_since, slowest
from service.vision import tasks
from service.vision.task import JSON, Answer, File, O, Task, add_embedding

router = APIRouter(tags=["vision"], route_class=DirectRoute)
T = TypeVar("T")


Answerer = Callable[[Request, Task[Any, Any], str], Awaitable[Response]]

_OWN_MODULES: Final = ("analyze",)  # tasks whose endpoints are in other modules


class Seen(NamedTuple):
    """The result of a task for one image. It does not contain the decoded image, whose memory can therefore be
    freed."""

    result: Any
    embedded: Embedded
    compute_ms: float


def add_route(router: APIRouter, task: Task[Any, Any], answer: Answerer, errors: Errors = ()) -> None:
    """Add the endpoint of a task to a router.

    Args:
        answer: the function that answers a request. It gets the request, the task, and the name of the field with the
            images.
        errors: the errors of the endpoint, in addition to those of all vision tasks.
    """
    key = "images" if task.many else "image"
    image: Any = Image
    about = "image as a data URL, base64 or https URL, or as an object that contains one of them"
    if task.many:
        image, about = list[Image], f"{task.images[0]} to {task.images[1]} images, each {about.removeprefix('image ')}"
    fields: dict[str, Any] = {key: (image, Field(description=about))}
    body = create_model(f"{task.options.__name__.removesuffix('Options')}In", __base__=task.options, **fields)
    body.__doc__ = f"The JSON body of `POST /v1/{task.name}`."

    async def endpoint(request: Request) -> Response:
        return await answer(request, task, key)

    endpoint.__name__ = task.name
    endpoint.__doc__ = task.description
    endpoint.__annotations__["return"] = JsonAnswer[task.answer] | Response  # type: ignore[name-defined]  # a type that is known only at run time
    files = tuple(dict.fromkeys(kind for kind in task.formats.values() if kind != JSON))
    operation = Operation(
        errors=(*IMAGES, ModelNotFound, *errors),
        upload=Upload(body, task.options, many=task.many),
        media_types=files,
        answer_headers=("Server-Timing", "X-Model", "X-Model-Fingerprint", *task.headers),
    )
    router.post(f"/v1/{task.name}", summary=task.summary)(describe(operation)(endpoint))


async def _answer(request: Request, task: Task[Any, Any], key: str) -> Response:
    """Answer a request for a task."""
    started = time.perf_counter()
    service = service_of(request)
    images, options = await read_request(request, task, service, key)
    service = service.named(options.model)
    view = task.view(options, service.model)
    seen = await results_of(images, partial(_see, task, options, service), service, view, key)
    encode_started = time.perf_counter()
    answer = await service.pipeline.encode(partial(task.encode, [each.result for each in seen], options))
    stages = {
        **slowest([each.embedded for each in seen]),
        task.name: max(each.compute_ms for each in seen),
        "encode": ms_since(encode_started),
        "total": ms_since(started),
    }
    return respond(add_embedding(answer, options, [each.embedded for each in seen]), service, stages)


def respond(answer: Answer, service: Service, stages: dict[str, float]) -> Response:
    """Return the HTTP response for a task's answer. `stages` are the durations in milliseconds."""
    headers = server_timing(stages) | {"X-Model": service.artifact.name}
    headers |= {"X-Model-Fingerprint": service.artifact.fingerprint}
    if isinstance(answer, File):
        return Response(answer.data, media_type=answer.media_type, headers=headers | dict(answer.headers))
    return json_response(answer | {**service.identity(), "timings": stages}, headers=headers)


async def read_request(
    request: Request, task: Task[O, Any], service: Service, key: str
) -> tuple[list[Outcome[bytes]], O]:
    """Read a request and return its images and its options.

    Raises:
        InvalidRequest: an option or the number of images is not allowed.
        ServiceError: the body is not accepted.
    """
    upload = await read_upload(request, service.settings, key=key)
    refuse_query_options(request, task.options)
    low, high = task.images
    count = len(upload.images)
    check_count(count, service.settings.model_copy(update={"max_batch_items": high}), key)
    if count < low:
        raise InvalidRequest(f"{key} has {count} images; {task.name} needs at least {low}", param=key)
    options = parse_options(task.options, upload.fields)
    return upload.images, options


def _see(task: Task[Any, Any], options: VisionOptions, service: Service, analysed: Analysed) -> Seen:
    started = time.perf_counter()
    result = task.compute(analysed, options, service.model)
    return Seen(result, analysed.embedded, ms_since(started))


async def results_of(
    images: list[Outcome[bytes]], see: Callable[[Analysed], T], service: Service, view: View, key: str
) -> list[T]:
    """Analyse all images of a request and return their results.

    Raises:
        InvalidItems: an image cannot be used.
        ServiceError: the options do not fit an image, or the service failed.
    """
    outcomes = await service.pipeline.analyse_all(images, see, view)
    if bad := failures(outcomes):
        for failure in bad:
            if failure.error.status >= 500 or failure.error.param is not None:  # not an error of the image
                raise failure.error
        raise InvalidItems(bad, total=len(images), param=key)
    return successes(outcomes)


for name in tasks.SUMMARIES:
    if name not in _OWN_MODULES:
        add_route(router, tasks.task(name), _answer)
