"""All errors of the service, with their HTTP status and code.

    ServiceError                        500 internal_error
    ├── BadRequest                      400 bad_request
    │   └── UnsupportedDimensions       400 unsupported_dimensions
    ├── Unauthenticated                 401 unauthenticated (WWW-Authenticate)
    ├── MissingScope                    403 missing_scope (WWW-Authenticate)
    ├── CrossOrigin                     403 cross_origin
    ├── QuotaExceeded                   403 quota_exceeded
    ├── NotFound                        404 not_found
    │   ├── ModelNotFound               404 model_not_found
    │   ├── CollectionNotFound          404 collection_not_found
    │   ├── ItemNotFound                404 item_not_found
    │   └── JobNotFound                 404 job_not_found
    ├── MethodNotAllowed                405 method_not_allowed
    ├── BodyTooSlow                     408 body_too_slow
    ├── Conflict                        409 conflict
    │   └── ModelMismatch               409 model_mismatch
    ├── PayloadTooLarge                 413 payload_too_large
    │   ├── ImageTooLarge               413 image_too_large
    │   └── RequestTooCostly            413 request_too_costly
    ├── UnsupportedMediaType            415 unsupported_media_type
    │   └── UnsupportedImage            415 unsupported_image
    ├── RangeNotSatisfiable             416 range_not_satisfiable
    ├── HostNotAllowed                  421 host_not_allowed
    ├── InvalidRequest                  422 invalid_request
    │   ├── AnswerTooLarge              422 answer_too_large
    │   ├── BrokenImage                 422 broken_image
    │   ├── ImageUrlFailed              422 image_url_failed
    │   └── InvalidItems                422 invalid_items (or the status and code of an item)
    ├── RateLimited                     429 rate_limit_exceeded (Retry-After)
    │   └── ShareUsed                   429 share_used (Retry-After)
    ├── HeadTooLarge                    431 head_too_large
    ├── ClientGone                      499 client_closed_request (only logged)
    ├── EngineFailed                    500 engine_failed
    ├── StorageFailed                   500 storage_failed
    │   ├── StorageDamaged              500 storage_damaged
    │   ├── StorageBusy                 503 storage_busy (Retry-After)
    │   ├── StorageReplaced             503 storage_replaced
    │   └── InsufficientStorage         507 insufficient_storage
    ├── Unavailable                     503 unavailable
    │   ├── QueueFull                   503 queue_full (Retry-After)
    │   ├── ShuttingDown                503 shutting_down (Retry-After)
    │   └── ModelUnavailable            503 model_unavailable
    └── DeadlineExceeded                504 deadline_exceeded

Code that detects a problem raises one of these errors. `ERRORS` maps each class to its status, code and title.
`service/middleware.py` turns the error into an answer. The body of the answer has the format of RFC 9457
(`application/problem+json`), except on `/v1/embeddings`. There it has OpenAI's format, so that OpenAI clients can parse
it. This module does not import the web framework, because code that is independent of the framework also raises these
errors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, NotRequired

from typing_extensions import TypedDict

OPENAI_PATHS: Final = frozenset({"/v1/embeddings"})
"""The paths on which errors have OpenAI's format."""


class ErrorKind(NamedTuple):
    """The HTTP status, the code and the title of an error class."""

    status: int
    code: str
    title: str


class ServiceError(Exception):
    """An error with an HTTP status and body.

    `detail` is the message for the user. It says which value is wrong and what is allowed. `param` is the name of the
    wrong field in the request, if there is one. `extra` contains additional members of the body, and `headers` contains
    additional headers of the response.
    """

    def __init__(
        self,
        detail: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.param = param
        self.headers: dict[str, str] = dict(headers or {})
        self.extra: dict[str, Any] = dict(extra or {})

    @property
    def status(self) -> int:
        return ERRORS[type(self)].status

    @property
    def code(self) -> str:
        return ERRORS[type(self)].code

    @property
    def title(self) -> str:
        return ERRORS[type(self)].title


class BadRequest(ServiceError): ...


class UnsupportedDimensions(BadRequest): ...


class Unauthenticated(ServiceError):
    """The error for a request without a valid API key. Only the audit log shows `reason` and `key_id`, because a client
    must not learn whether a key exists. `challenge` is the value of the header WWW-Authenticate."""

    def __init__(self, detail: str, *, challenge: str, reason: str, key_id: str | None = None) -> None:
        super().__init__(detail, headers={"WWW-Authenticate": challenge})
        self.reason = reason
        self.key_id = key_id


class MissingScope(ServiceError): ...


class CrossOrigin(ServiceError): ...


class QuotaExceeded(ServiceError): ...


class NotFound(ServiceError): ...


class ModelNotFound(NotFound): ...


class CollectionNotFound(NotFound): ...


class ItemNotFound(NotFound): ...


class JobNotFound(NotFound): ...


class MethodNotAllowed(ServiceError): ...


class BodyTooSlow(ServiceError): ...


class Conflict(ServiceError): ...


class ModelMismatch(Conflict): ...


class PayloadTooLarge(ServiceError): ...


class ImageTooLarge(PayloadTooLarge): ...


class RequestTooCostly(PayloadTooLarge): ...


class UnsupportedMediaType(ServiceError): ...


class UnsupportedImage(UnsupportedMediaType): ...


class RangeNotSatisfiable(ServiceError): ...


class HostNotAllowed(ServiceError): ...


class InvalidRequest(ServiceError): ...


class AnswerTooLarge(InvalidRequest): ...


class BrokenImage(InvalidRequest): ...


class ImageUrlFailed(InvalidRequest): ...


class ItemErrorBody(TypedDict):
    """The error of one item, as an answer lists it. `index` is the position of the item in the request."""

    index: int
    code: str
    detail: str
    status: int


@dataclass(frozen=True)
class ItemError:
    """The error for one item in a request. `index` is the position of the item in the request, counted from 0."""

    index: int
    error: ServiceError

    def body(self) -> ItemErrorBody:
        return {"index": self.index, "code": self.error.code, "detail": self.error.detail, "status": self.error.status}


class InvalidItems(InvalidRequest):
    """The error for a request with unusable items. The body lists each unusable item with its error.

    The status and code of the answer depend on the errors of the items:

    - If all errors are of the same kind, their status and code.
    - If the kinds differ and at least one error is a server error (5xx), the status and code of the error with the
      highest status.
    - Otherwise, 422 and invalid_items.
    """

    def __init__(self, items: list[ItemError], *, total: int, param: str = "input") -> None:
        assert items
        super().__init__(invalid_items_detail(items, total), param=param, extra={"errors": [i.body() for i in items]})
        self.items = items
        for item in items:  # the Retry-After of an item applies to the request
            self.headers.update(item.error.headers)

    @property
    def _kind(self) -> ErrorKind:
        kinds = {ERRORS[type(item.error)] for item in self.items}
        worst = max(kinds)
        return worst if len(kinds) == 1 or worst.status >= 500 else ERRORS[InvalidItems]

    @property
    def status(self) -> int:
        return self._kind.status

    @property
    def code(self) -> str:
        return self._kind.code

    @property
    def title(self) -> str:
        return self._kind.title


def invalid_items_detail(items: list[ItemError], total: int) -> str:
    """Return a one-line message with the index and the reason of every item that failed, for example "1 of 5 items
    cannot be used: [4] not base64"."""
    reasons = "; ".join(f"[{item.index}] {item.error.detail}" for item in items)
    return f"{len(items)} of {total} items cannot be used: {reasons}"


class RateLimited(ServiceError): ...


class ShareUsed(RateLimited):
    """The error for a client that occupies so much of a queue or of the memory that it must wait until some of it is
    free. Other clients are not affected."""

    def __init__(self, detail: str, *, retry_after_s: int = 1) -> None:
        super().__init__(detail, headers={"Retry-After": str(max(1, retry_after_s))})


class HeadTooLarge(ServiceError): ...


class ClientGone(ServiceError): ...


class EngineFailed(ServiceError): ...


class StorageFailed(ServiceError): ...


class StorageDamaged(StorageFailed): ...


class StorageBusy(StorageFailed):
    """The error for a database that another process keeps locked. The client should try again."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"Retry-After": "5"})


class StorageReplaced(StorageFailed): ...


class InsufficientStorage(StorageFailed): ...


class Unavailable(ServiceError):
    """An error that is raised while the service cannot answer requests. If `retry_after_s` is set, the client should
    try again after this number of seconds."""

    def __init__(self, detail: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(detail, headers={} if retry_after_s is None else {"Retry-After": str(max(1, retry_after_s))})
        self.retry_after_s = retry_after_s


class QueueFull(Unavailable): ...


class ShuttingDown(Unavailable): ...


class ModelUnavailable(Unavailable): ...


class DeadlineExceeded(ServiceError): ...


ERRORS: dict[type[ServiceError], ErrorKind] = {
    ServiceError: ErrorKind(500, "internal_error", "Internal error"),
    BadRequest: ErrorKind(400, "bad_request", "Bad request"),
    UnsupportedDimensions: ErrorKind(400, "unsupported_dimensions", "Dimensions not supported"),
    Unauthenticated: ErrorKind(401, "unauthenticated", "No valid API key"),
    MissingScope: ErrorKind(403, "missing_scope", "Scope missing"),
    CrossOrigin: ErrorKind(403, "cross_origin", "Page of another origin"),
    QuotaExceeded: ErrorKind(403, "quota_exceeded", "Quota exceeded"),
    NotFound: ErrorKind(404, "not_found", "Not found"),
    ModelNotFound: ErrorKind(404, "model_not_found", "Model not found"),
    CollectionNotFound: ErrorKind(404, "collection_not_found", "Collection not found"),
    ItemNotFound: ErrorKind(404, "item_not_found", "Item not found"),
    JobNotFound: ErrorKind(404, "job_not_found", "Job not found"),
    MethodNotAllowed: ErrorKind(405, "method_not_allowed", "Method not allowed"),
    BodyTooSlow: ErrorKind(408, "body_too_slow", "Request body too slow"),
    Conflict: ErrorKind(409, "conflict", "Conflict"),
    ModelMismatch: ErrorKind(409, "model_mismatch", "Vectors of another model"),
    PayloadTooLarge: ErrorKind(413, "payload_too_large", "Payload too large"),
    ImageTooLarge: ErrorKind(413, "image_too_large", "Image too large"),
    RequestTooCostly: ErrorKind(413, "request_too_costly", "Request too costly"),
    UnsupportedMediaType: ErrorKind(415, "unsupported_media_type", "Unsupported media type"),
    UnsupportedImage: ErrorKind(415, "unsupported_image", "Unsupported image format"),
    RangeNotSatisfiable: ErrorKind(416, "range_not_satisfiable", "Range not satisfiable"),
    HostNotAllowed: ErrorKind(421, "host_not_allowed", "Host not allowed"),
    InvalidRequest: ErrorKind(422, "invalid_request", "Invalid request"),
    AnswerTooLarge: ErrorKind(422, "answer_too_large", "Answer too large"),
    BrokenImage: ErrorKind(422, "broken_image", "Broken image"),
    ImageUrlFailed: ErrorKind(422, "image_url_failed", "Image URL failed"),
    InvalidItems: ErrorKind(422, "invalid_items", "Invalid items"),
    RateLimited: ErrorKind(429, "rate_limit_exceeded", "Rate limit exceeded"),
    ShareUsed: ErrorKind(429, "share_used", "Share of the client used"),
    HeadTooLarge: ErrorKind(431, "head_too_large", "Head too large"),
    ClientGone: ErrorKind(499, "client_closed_request", "Client closed request"),
    EngineFailed: ErrorKind(500, "engine_failed", "Engine failed"),
    StorageFailed: ErrorKind(500, "storage_failed", "Storage failed"),
    StorageDamaged: ErrorKind(500, "storage_damaged", "Stored data damaged"),
    StorageBusy: ErrorKind(503, "storage_busy", "Storage busy"),
    StorageReplaced: ErrorKind(503, "storage_replaced", "Data folder replaced"),
    InsufficientStorage: ErrorKind(507, "insufficient_storage", "Disk full"),
    Unavailable: ErrorKind(503, "unavailable", "Unavailable"),
    QueueFull: ErrorKind(503, "queue_full", "Queue full"),
    ShuttingDown: ErrorKind(503, "shutting_down", "Shutting down"),
    ModelUnavailable: ErrorKind(503, "model_unavailable", "Model unavailable"),
    DeadlineExceeded: ErrorKind(504, "deadline_exceeded", "Deadline exceeded"),
}


class Problem(TypedDict):
    """An error in the format of RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    param: NotRequired[str]
    errors: NotRequired[list[ItemErrorBody]]


class OpenAIErrorFields(TypedDict):
    """The fields of an error in OpenAI's format."""

    message: str
    type: str
    param: str | None
    code: str
    request_id: str
    errors: NotRequired[list[ItemErrorBody]]


class OpenAIError(TypedDict):
    """An error in OpenAI's format."""

    error: OpenAIErrorFields


def problem_body(error: ServiceError, *, instance: str, request_id: str) -> dict[str, Any]:
    """Return the body of the response for an error, in the format of RFC 9457. In addition to the members that the RFC
    defines, the body has `code`, `request_id` and the members in `error.extra`. If a field of the request is wrong,
    `param` is the name of this field."""
    body: dict[str, Any] = {
        "type": f"urn:dinov2:error:{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "instance": instance,
        "code": error.code,
        "request_id": request_id,
    }
    if error.param is not None:
        body["param"] = error.param
    return {**body, **error.extra}


def openai_body(error: ServiceError, *, request_id: str) -> dict[str, Any]:
    """Return the body of the response for an error, in OpenAI's format. The field `type` is rate_limit_error if the
    status is 429, invalid_request_error for other statuses below 500, and server_error otherwise."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    if isinstance(error, RateLimited):
        kind = "rate_limit_error"
    inner = {"message": error.detail, "type": kind, "param": error.param, "code": error.code, "request_id": request_id}
    return {"error": {**inner, **error.extra}}
