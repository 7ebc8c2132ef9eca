"""Parse a request to classify images, and compute the answer."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from model.pooling import DEFAULT_POOLING
from service.data_urls import decode_texts
from service.errors import InvalidRequest, ServiceError
from service.features.pipeline import Embedded
from service.options import check_fields, parse_options
from service.outcomes import Outcome
from service.retrieval.calibration import Reference, calibration_of
from service.retrieval.class_schemas import DEFAULT_K, MAX_NAME_CHARACTERS, ClassifyOptions
from service.retrieval.classify import Classified, classify_by_collection, classify_by_examples
from service.retrieval.origins import Target
from service.retrieval.reading import search_params
from service.search.checks import check_match, check_name, normalised
from service.search.filters import parse_filter, parse_path
from service.search.store import Floats
from service.search.text import ALLOWED, is_allowed
from service.settings import Settings
from service.state import Service
from service.timings import ms_since, slowest

_OF_COLLECTIONS = ("label", "k", "filter", "calibration_filter", "params")


@dataclass(frozen=True)
class Example:
    """An example image of a class. `position` is its position among the images of the class."""

    name: str
    position: int
    image: bytes


@dataclass(frozen=True)
class ClassifyRequest:
    """A parsed request. It has either a `reference` in the collection `options.collection`, or `examples`."""

    images: list[Outcome[bytes]]
    options: ClassifyOptions
    reference: Reference | None
    examples: list[Example]


@dataclass(frozen=True)
class ClassifyResults:
    """The verdicts on the images that could be embedded, by position in the request, and the errors of the others.

    images: one outcome for each image. Its value is the position of the image's verdict in `classified`.
    classified: None if no image could be embedded.
    tag: the tag of the vectors that were compared.
    """

    images: list[Outcome[int]]
    classified: Classified | None
    tag: str
    timings: dict[str, float]


async def read_classify(
    images: list[Outcome[bytes]], fields: dict[str, Any], settings: Settings, *, is_json: bool
) -> ClassifyRequest:
    """Parse the fields of a request. `fields` does not contain the images to classify. If `is_json` is false, the
    fields are strings from a form or a query string.

    Raises:
        InvalidRequest: a field is invalid, or the request does not have exactly one of `collection` and `classes`.
        ServiceError: an example image is unusable.
    """
    classes = fields.pop("classes", None) if is_json else None
    if isinstance(fields.get("params"), dict):
        check_fields(fields["params"], "params")
    options = parse_options(ClassifyOptions, fields if is_json else _from_text(fields))
    if (options.collection is None) == (classes is None):
        raise InvalidRequest(
            f"exactly one of collection and classes is needed, not {'none' if classes is None else 'both'}"
            + ("" if is_json else "; classes can only be sent in JSON"),
            param="collection",
        )
    if classes is None:
        return ClassifyRequest(images, options, _reference(options), [])
    unused = [name for name in _OF_COLLECTIONS if getattr(options, name) is not None]
    if unused:
        raise InvalidRequest(
            f"{' and '.join(unused)}: only possible with collection, not with classes", param=unused[0]
        )
    return ClassifyRequest(images, options, None, await _examples(classes, settings, len(images)))


async def classify(service: Service, request: ClassifyRequest) -> ClassifyResults:
    """Classify the images of a request. All images, including the examples, are embedded together.

    Raises:
        ServiceError: the whole request fails, for instance because an example image is broken.
    """
    options = request.options
    service.check_model(options.model)
    target = None
    if options.collection is not None:
        if options.pooling is not None:
            raise InvalidRequest("pooling: only possible with classes; a collection has its own", param="pooling")
        target = await Target.of(service, options.collection)
        check_match(target.info, tag=service.tag(pooling=target.pooling), dimension=target.info.dimension)
        assert request.reference is not None
        await calibration_of(service.store, service.shared, target.info, request.reference)  # fails before the images
    pooling = target.pooling if target is not None else options.pooling or DEFAULT_POOLING
    numbered = [Outcome(len(request.images) + i, example.image) for i, example in enumerate(request.examples)]
    embedded = await service.pipeline.embed([*request.images, *numbered])

    def vector(one: Embedded) -> Floats:
        return normalised(one.vector(pooling, True))

    vectors = [outcome.then(vector) for outcome in embedded]
    queries = vectors[: len(request.images)]
    examples = [
        _example_vector(example, outcome)
        for example, outcome in zip(request.examples, vectors[len(request.images) :], strict=True)
    ]
    good = [outcome.result() for outcome in queries if outcome.error is None]
    started = time.perf_counter()
    classified = None
    if good and target is not None:
        assert request.reference is not None
        classified = await classify_by_collection(
            service.store, service.shared, target.info, np.stack(good), request.reference, options.error_rate
        )
    elif good:
        labels = [example.name for example in request.examples]
        classified = classify_by_examples(np.stack(examples), labels, np.stack(good), options.error_rate)
    timings = slowest(outcome.result() for outcome in embedded if outcome.error is None)
    timings["classify"] = ms_since(started)
    tag = target.info.tag if target is not None else service.tag(pooling=pooling)
    return ClassifyResults(_positions(queries), classified, tag, timings)


def _positions(queries: Sequence[Outcome[Floats]]) -> list[Outcome[int]]:
    """Replace the vector of each image by its position among the images that have one."""
    positions: list[Outcome[int]] = []
    count = 0
    for query in queries:
        positions.append(Outcome(query.index, count, query.error))
        count += query.error is None
    return positions


def _example_vector(example: Example, outcome: Outcome[Floats]) -> Floats:
    if outcome.error is not None:
        raise _of_example(example.name, example.position, outcome.error)
    return outcome.result()


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


async def _examples(classes: Any, settings: Settings, images: int) -> list[Example]:
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
    decoded = iter(await decode_texts([text for texts in of_names.values() for text in texts], settings))
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
