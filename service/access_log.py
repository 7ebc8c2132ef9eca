"""What is reported about a finished request: the fields of its line in the access log, and the attributes of its span.

Both say why a request failed: the code and the message of the error, the collection, the client and the id of its key.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any, Final

from service.errors import ServiceError
from service.telemetry import shortened, trace_id
from service.tracing import RequestTrace

UNMATCHED: Final = "unmatched"
"""The value of the label `route` for a request that no route matches."""
_COLLECTION_ROUTES: Final = "/v1/collections/{name}"
_MAX_AGENT_CHARS: Final = 200

Scope = MutableMapping[str, Any]


def request_fields(
    scope: Scope, route: str, error: ServiceError | None, received_bytes: int, client: str, trace: RequestTrace | None
) -> dict[str, str | int]:
    """Return the fields of the access log that are not parameters of `log_request`.

    A route may store more about its request in `scope["state"]`: `collection` if the body names it, and `failed`, the
    errors of single items (`ItemError`) in an answer that contains the results of the others.

    Args:
        error: the error that was the answer to the request, or None.
        received_bytes: the size of the body, as it was sent.
        client: the address of the client, or an empty text if it is unknown.
        trace: the trace of the request, if it has one.
    """
    state, headers = scope["state"], dict(scope["headers"])
    sent_id = trace_id(headers[b"traceparent"]) if b"traceparent" in headers else None
    collection = scope["path_params"]["name"] if route.startswith(_COLLECTION_ROUTES) else state.get("collection")
    fields: dict[str, str | int | None] = {
        "path": shortened(scope["path"]),
        "bytes": received_bytes,
        "client": client or None,
        "key": getattr(state.get("principal"), "key_id", None),
        "trace_id": sent_id if trace is None else trace.trace_id,
        "collection": None if collection is None else shortened(collection),
    }
    failed = state.get("failed")
    if error is None and failed:
        fields["failed_items"] = len(failed)
        error = failed[0].error
    if error is not None:
        fields |= {"code": error.code, "detail": shortened(error.detail)}
    return {name: value for name, value in fields.items() if value is not None}


def span_attributes(
    scope: Scope, method: str, route: str, status: int, request_id: str, fields: Mapping[str, str | int]
) -> dict[str, str | int]:
    """Return the attributes of a request's span. Their names are those of OpenTelemetry's semantic conventions for
    HTTP, and `dinov2.*` for everything else.

    Args:
        method: the method, or "other" if it is not a usual one.
        fields: what `request_fields` returned.
    """
    headers = dict(scope["headers"])
    attributes: dict[str, str | int] = {
        "http.request.method": method if method != "other" else "_OTHER",
        "http.response.status_code": status,
        "http.request.body.size": fields["bytes"],
        "url.path": fields["path"],
        "url.scheme": scope.get("scheme", "http"),
        "network.protocol.version": scope.get("http_version", "1.1"),
        "dinov2.request_id": request_id,
    }
    if route != UNMATCHED:
        attributes["http.route"] = route
    if b"user-agent" in headers:
        attributes["user_agent.original"] = headers[b"user-agent"].decode("latin-1")[:_MAX_AGENT_CHARS]
    if "client" in fields:
        attributes["client.address"] = fields["client"]
    if route == "/v1/embeddings":
        attributes["gen_ai.operation.name"] = "embeddings"
    if status >= 500:
        attributes["error.type"] = fields.get("code", str(status))
    for name in ("collection", "key", "code", "failed_items"):
        if name in fields:
            attributes[f"dinov2.{name}"] = fields[name]
    return attributes
