"""Parses a request to classify images, and computes the verdicts."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import orjson

from model.pooling import DEFAULT_POOLING, Pooling
from service.data_urls import decode_texts
from service.errors import InvalidRequest, ServiceError
from service.features.pipeline import Embedded, View
from service.options import check_fields, parse_options
from service.outcomes import Outcome, successes
from service.retrieval.calibration import Reference, calibration_of
from service.retrieval.class_schemas import DEFAULT_K, MAX_NAME_CHARACTERS, ClassifyOptions
from service.retrieval.classify import Classified, Verdict, classify_by_collection, classify_by_examples
from service.retrieval.origins import Target
from service.retrieval.reading import search_params
from service.search.checks import check_match, check_name, normalised
from service.search.filters import parse_filter, parse_path
from service.search.store import Floats
from service.search.text import ALLOWED, is_allowed
from service.settings import Settings
from service.state import Service
from service.timings import ms_since, slowest
from service.vision.head_classes import head_scores, open_classification_head
from service.web_images import WebImages

_ONLY_WITH: Final = {
    **dict.fromkeys(("label", "k", "filter", "calibration_filter", "params"), ("collection",)),
    "pooling": ("classes",),
    "error_rate": ("collection", "classes"),
}
"""The ways to classify that allow each option."""


@dataclass(frozen=True)
class Example:
    """An example image of a class. `position` is its position among the images of the class."""

    name: str
    position: int
    image: bytes


@dataclass(frozen=True)
class ClassifyRequest:
    """A parsed request. Exactly one of `reference`, `examples` and `options.head` is set. `reference` describes the
    items of the collection `options.collection` that vote."""

    images: list[Outcome[bytes]]
    options: ClassifyOptions
    reference: Reference | None = None
    examples: Sequence[Example] = ()


class Seen(NamedTuple):
    """The features of an image that the caller has already computed: the embedding's parts, and the inner outputs that
    `class_outputs` names."""

    embedded: Embedded
    outputs: Mapping[str, Floats]


@dataclass(frozen=True)
class ClassifyResults:
    """The verdict or the error of each image.

    classified: the calibration on which the verdicts are based. It is None if a head made the verdicts, or if no image
        could be classified.
    tag: describes how the compared vectors were computed (see `Service.tag`).
    head: the name of the head that made the verdicts, if any.
    """

    images: list[Outcome[Verdict]]
    tag: str
    timings: dict[str, float]
    classified: Classified | None = None
    head: str | None = None


async def read_classify(
    images: list[Outcome[bytes]], fields: dict[str, Any], settings: Settings, web: WebImages, *, is_json: bool
) -> ClassifyRequest:
    """Parse the fields of a request. `fields` does not contain the images to classify. If `is_json` is false, the
    fields are strings from a form or a query string. `web` fetches example images that are links.

    Raises:
        InvalidRequest: a field is invalid, or the request does not have exactly one of `collection`, `classes` and
            `head`.
        ServiceError: an example image is unusable.
    """
    classes = fields.pop("classes", None) if is_json else None
    if isinstance(fields.get("params"), dict):
        check_fields(fields["params"], "params")
    options = parse_options(ClassifyOptions, fields if is_json else _from_text(fields))
    ways = {"collection": options.collection, "classes": classes, "head": options.head}
    chosen = [name for name, value in ways.items() if value is not None]
    if len(chosen) != 1:
        raise InvalidRequest(
            f"exactly one of {', '.join(ways)} is needed, not {' and '.join(chosen) or 'none'}"
            + ("" if is_json else "; classes can only be sent in JSON"),
            param="collection",
        )
    [way] = chosen
    if unused := [name for name, ways in _ONLY_WITH.items() if way not in ways and name in options.model_fields_set]:
        raise InvalidRequest(
            f"{' and '.join(unused)}: not possible with {way}, only with {' or '.join(_ONLY_WITH[unused[0]])}",
            param=unused[0],
        )
    if way == "collection":
        return ClassifyRequest(images, options, _reference(options))
    if way == "head":
        return ClassifyRequest(images, options)
    return ClassifyRequest(images, options, examples=await _examples(classes, settings, web, len(images)))


async def classify(
    service: Service, request: ClassifyRequest, seen: Sequence[Outcome[Seen]] | None = None
) -> ClassifyResults:
    """Classify the images of a request. `seen` are their features. If it is None, they are computed.

    Raises:
        ServiceError: the whole request fails, for instance because an example image is broken.
    """
    service = service.named(request.options.model)
    if request.options.head is not None:
        return await _by_head(service, request, request.options.head, seen)
    if request.reference is not None:
        return await _by_collection(service, request, request.reference, seen)
    return await _by_examples(service, request, seen)


async def class_outputs(service: Service, request: ClassifyRequest) -> tuple[str, ...]:
    """Check as much of a request as is possible without its images, and return the names of the inner outputs that it
    needs.

    Raises:
        ServiceError: there is no such head or collection, or the collection is not suitable.
    """
    if request.options.head is not None:
        return (await asyncio.to_thread(open_classification_head, service.model, request.options.head)).outputs
    if request.reference is not None:
        await _calibrated_target(service, request, request.reference)
    return ()


async def _embedded(
    service: Service, images: list[Outcome[bytes]], seen: Sequence[Outcome[Seen]] | None
) -> list[Outcome[Embedded]]:
    """Return the features of the images: those in `seen`, or newly computed ones if `seen` is None."""
    if seen is None:
        return await service.pipeline.embed(images)
    return [outcome.then(lambda known: known.embedded) for outcome in seen]


async def _by_head(
    service: Service, request: ClassifyRequest, name: str, seen: Sequence[Outcome[Seen]] | None
) -> ClassifyResults:
    head = await asyncio.to_thread(open_classification_head, service.model, name)

    def verdict(embedded: Embedded, outputs: Mapping[str, Floats]) -> tuple[Embedded, Verdict]:
        scores = head_scores(head, embedded, outputs)
        return embedded, Verdict(scores[0].label, False, None, scores)

    if seen is not None:
        results = [outcome.then(lambda known: verdict(*known)) for outcome in seen]
    elif head.outputs:
        results = await service.pipeline.analyse_all(
            request.images, lambda analysed: verdict(analysed.embedded, analysed.outputs), View(head.outputs)
        )
    else:
        results = [outcome.then(verdict, {}) for outcome in await service.pipeline.embed(request.images)]
    timings = slowest(embedded for embedded, _ in successes(results))
    verdicts = [outcome.then(lambda pair: pair[1]) for outcome in results]
    return ClassifyResults(verdicts, service.tag(), timings, head=head.record.name)


async def service_for(service: Service, options: ClassifyOptions) -> Service:
    """Return the service with the model that a request needs: that of its collection, if it has one."""
    if options.collection is None:
        return service.named(options.model)
    return (await Target.of(service, options.collection, options.model)).service


async def _calibrated_target(service: Service, request: ClassifyRequest, reference: Reference) -> Target:
    """Check and calibrate the collection of a request, and return it. An unsuitable collection raises an error here,
    before any image is embedded."""
    assert request.options.collection is not None
    target = await Target.of(service, request.options.collection, request.options.model)
    check_match(target.info, tag=target.service.tag(pooling=target.pooling), dimension=target.info.dimension)
    await calibration_of(service.store, service.shared, target.info, reference)
    return target


async def _by_collection(
    service: Service, request: ClassifyRequest, reference: Reference, seen: Sequence[Outcome[Seen]] | None
) -> ClassifyResults:
    target = await _calibrated_target(service, request, reference)
    info = target.info
    if seen is not None:  # computed with the model of `service`
        check_match(info, tag=service.tag(pooling=target.pooling), dimension=info.dimension)
    embedded = await _embedded(target.service, request.images, seen)
    vectors = [outcome.then(_unit_vector, target.pooling) for outcome in embedded]
    started = time.perf_counter()
    classified = None
    if good := successes(vectors):
        classified = await classify_by_collection(
            service.store, service.shared, info, np.stack(good), reference, request.options.error_rate
        )
    return _results(vectors, classified, info.tag, slowest(successes(embedded)) | {"classify": ms_since(started)})


async def _by_examples(
    service: Service, request: ClassifyRequest, seen: Sequence[Outcome[Seen]] | None
) -> ClassifyResults:
    """Classify images by examples. If `seen` is None, the images and the examples are embedded together."""
    pooling = request.options.pooling or DEFAULT_POOLING
    count = len(request.images)
    examples = [Outcome(count + i, example.image) for i, example in enumerate(request.examples)]
    if seen is None:
        embedded = await service.pipeline.embed([*request.images, *examples])
    else:
        embedded = [*await _embedded(service, request.images, seen), *await service.pipeline.embed(examples)]
    vectors = [outcome.then(_unit_vector, pooling) for outcome in embedded]
    for example, outcome in zip(request.examples, vectors[count:], strict=True):
        if outcome.error is not None:
            raise _of_example(example.name, example.position, outcome.error)
    started = time.perf_counter()
    classified = None
    if good := successes(vectors[:count]):
        labels = [example.name for example in request.examples]
        known: list[Floats] = successes(vectors[count:])
        classified = classify_by_examples(np.stack(known), labels, np.stack(good), request.options.error_rate)
    timings = slowest(successes(embedded)) | {"classify": ms_since(started)}
    return _results(vectors[:count], classified, service.tag(pooling=pooling), timings)


def _unit_vector(embedded: Embedded, pooling: Pooling) -> Floats:
    return normalised(embedded.vector(pooling, True))


def _results(
    vectors: Sequence[Outcome[Floats]], classified: Classified | None, tag: str, timings: dict[str, float]
) -> ClassifyResults:
    """Replace the vector of each image with its verdict. `classified` has a verdict for each image that has a
    vector."""
    verdicts = iter(classified.verdicts if classified is not None else ())
    images = [outcome.then(lambda _: next(verdicts)) for outcome in vectors]
    return ClassifyResults(images, tag, timings, classified)


def _of_example(name: str, position: int, error: ServiceError) -> ServiceError:
    """Return the error of an example image, with a message that names its class. An error of the service (5xx) is
    returned unchanged."""
    if error.status >= 500:
        return error
    return type(error)(f"classes: image {position} of {name!r} cannot be used: {error.detail}", param="classes")


def _reference(options: ClassifyOptions) -> Reference:
    assert options.collection is not None
    check_name(options.collection)
    if options.label is None:
        raise InvalidRequest("label is missing: the metadata key that contains the class of an item", param="label")
    held_out = options.calibration_filter
    return Reference(
        parse_path(options.label, "label"),
        DEFAULT_K if options.k is None else options.k,
        None if options.filter is None else parse_filter(options.filter),
        None if held_out is None else parse_filter(held_out),
        search_params(options.params),
    )


async def _examples(classes: Any, settings: Settings, web: WebImages, images: int) -> list[Example]:
    """Parse the example images of each class. `images` is the number of images to classify."""
    if not isinstance(classes, dict) or not classes:
        raise InvalidRequest(
            "classes must be an object with at least one class: its name, and one example image or a list of them",
            param="classes",
        )
    of_names = {name: value if isinstance(value, list) else [value] for name, value in classes.items()}
    limit = settings.items_per_request
    total = images + sum(map(len, of_names.values()))
    if total > limit:
        raise InvalidRequest(
            f"{total} images in images and classes: a request can have at most {limit} in total", param="classes"
        )
    for name, texts in of_names.items():
        if not 1 <= len(name) <= MAX_NAME_CHARACTERS or not is_allowed(name):
            raise InvalidRequest(
                f"classes: the name {name[:80]!r} is not allowed: 1 to {MAX_NAME_CHARACTERS} characters, {ALLOWED}",
                param="classes",
            )
        if not texts:
            raise InvalidRequest(f"classes: {name!r} has no image: at least one is needed", param="classes")
    decoded = iter(await decode_texts([text for texts in of_names.values() for text in texts], settings, web))
    examples = []
    for name, texts in of_names.items():
        for position in range(len(texts)):
            outcome = next(decoded)
            if outcome.error is not None:
                raise _of_example(name, position, outcome.error)
            examples.append(Example(name, position, outcome.result()))
    return examples


def _from_text(fields: dict[str, Any]) -> dict[str, Any]:
    """Parse the options that are JSON texts in a form or query string."""
    read = dict(fields)
    for name in ("filter", "calibration_filter", "params"):
        if isinstance(read.get(name), str):
            try:
                read[name] = orjson.loads(read[name])
            except orjson.JSONDecodeError as error:
                raise InvalidRequest(f"{name} is not JSON: {error}", param=name) from error
    return read
