"""Describe what a route accepts and how it can fail, for the OpenAPI document (`service/routes/openapi.py`).

The type of a route's answer is not described here, because it is the return annotation of the route function.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from service.errors import (
    BadRequest,
    BrokenImage,
    CollectionNotFound,
    DeadlineExceeded,
    EngineFailed,
    ImageTooLarge,
    ImageUrlFailed,
    InsufficientStorage,
    InvalidItems,
    InvalidRequest,
    ModelUnavailable,
    PayloadTooLarge,
    QueueFull,
    RateLimited,
    RequestTooCostly,
    ServiceError,
    ShareUsed,
    ShuttingDown,
    StorageBusy,
    StorageDamaged,
    StorageFailed,
    StorageReplaced,
    Unavailable,
    UnsupportedImage,
    UnsupportedMediaType,
)
from service.schema_base import Schema

Errors = tuple[type[ServiceError], ...]
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

ALWAYS: Final[Errors] = (PayloadTooLarge, ServiceError, Unavailable, ShuttingDown, DeadlineExceeded)
"""The errors that `service/middleware.py` may raise on every route, apart from those for malformed requests."""
LIMITED: Final[Errors] = (RateLimited, ShareUsed)
"""The errors that `service/middleware.py` may also raise on routes below /v1/."""
BODY: Final[Errors] = (BadRequest, UnsupportedMediaType, InvalidRequest)
IMAGES: Final[Errors] = (
    *BODY,
    InvalidItems,
    BrokenImage,
    ImageUrlFailed,
    ImageTooLarge,
    RequestTooCostly,
    UnsupportedImage,
    EngineFailed,
    QueueFull,
    ModelUnavailable,
)
STORAGE: Final[Errors] = (StorageFailed, StorageDamaged, StorageBusy, StorageReplaced, InsufficientStorage)
"""The kinds of StorageFailed. A route that lists StorageFailed may raise all of them."""
COLLECTION: Final[Errors] = (CollectionNotFound, InvalidRequest, StorageFailed)


@dataclass(frozen=True)
class Upload:
    """The three forms of a body with images: JSON, a form with files, and one image as the raw body."""

    body: type[Schema]  # the JSON body
    options: type[Schema]  # the form fields, and the query parameters of a raw body
    many: bool  # whether a form may have several files


@dataclass(frozen=True)
class Operation:
    """The description of a route."""

    errors: Errors = ()  # in addition to ALWAYS
    body: type[Schema] | None = None  # the JSON body
    file: str | None = None  # the media type of a file that may be sent instead of JSON
    body_required: bool = True
    upload: Upload | None = None
    query: type[Schema] | None = None
    headers: tuple[str, ...] = ()  # request headers, in addition to X-Request-ID
    statuses: tuple[int, ...] = (200,)  # statuses of answers with the type in the return annotation
    media_types: tuple[str, ...] = ()  # media types of answers that are not JSON
    answer_headers: tuple[str, ...] = ()


def describe(operation: Operation) -> Callable[[Endpoint], Endpoint]:
    """Return a decorator that attaches a description to a route function."""

    def attach(endpoint: Endpoint) -> Endpoint:
        endpoint.operation = operation  # type: ignore[attr-defined]  # functions accept any attribute
        return endpoint

    return attach


def operation_of(endpoint: Callable[..., Any]) -> Operation:
    """Return the description of a route function. If it has none, return an `Operation` with the default values."""
    operation = getattr(endpoint, "operation", Operation())
    assert isinstance(operation, Operation)
    return operation
