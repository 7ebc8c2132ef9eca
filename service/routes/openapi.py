"""Make the OpenAPI document from the routes: their descriptions (`describe.py`), the schemas of requests
(`service/schemas.py`) and the types of answers (`service/answer_schemas.py`).

FastAPI's own generator expects that FastAPI parses the requests. It would declare errors that this service never
returns, and could not declare bodies that are either JSON, a form or an image.
"""

import inspect
import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Final, get_args, get_origin

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode
from starlette.routing import BaseRoute

from model.files import NAME_PATTERN as SCHEDULE_PATTERN
from service.cors import SAFE_METHODS
from service.errors import (
    ERRORS,
    OPENAI_PATHS,
    BodyTooSlow,
    CrossOrigin,
    HostNotAllowed,
    MissingScope,
    OpenAIError,
    Problem,
    ServiceError,
    StorageFailed,
    Unauthenticated,
)
from service.routes.answers import JsonAnswer
from service.routes.describe import ALWAYS, LIMITED, STORAGE, Operation, Upload, operation_of
from service.routes.direct import DirectRoute, route_need
from service.schema_base import NULL, Schema
from service.search.checks import NAME_PATTERN
from service.search.store import MAX_ID_CHARACTERS
from service.security import PROBES

Json = dict[str, Any]

BINARY: Final[Json] = {"type": "string", "format": "binary"}
_REF: Final = "#/components/schemas/"
_NAME: Final[Json] = {"type": "string", "pattern": f"^{NAME_PATTERN}$"}
_PATH_PARAMETERS: Final[dict[str, Json]] = {
    "name": _NAME | {"description": "name of a collection or alias"},
    "alias": _NAME | {"description": "name of an alias"},
    "item_id": {"type": "string", "minLength": 1, "maxLength": MAX_ID_CHARACTERS, "description": "id of an item"},
    "digest": {"type": "string", "pattern": "^[0-9a-f]{64}$", "description": "sha256 of an image, in hex"},
    "snapshot": {"type": "string", "description": "name of a snapshot, such as 20260131T235959.123Z"},
    "model": {"type": "string", "description": "one of the model's names"},
    "job_id": {"type": "string", "description": "id of a job, such as train-0a1b2c3d4e"},
    "schedule": {"type": "string", "pattern": SCHEDULE_PATTERN, "description": "name of a schedule"},
}
_REQUEST_HEADERS: Final[dict[str, str]] = {
    "X-Request-ID": "id of the request, which the answer and the log repeat; default: a new id",
    "Idempotency-Key": "key of 1 to 128 printable ASCII characters; a repeated request with the same key and the same "
    "content changes nothing",
    "Last-Event-ID": "number of the last event that the client has received; the stream begins after this event",
    "Range": "part of the file to download, for example bytes=1000-",
}
_ANSWER_HEADERS: Final[dict[str, str]] = {
    "X-Request-ID": "id of the request",
    "Server-Timing": "duration of each stage in milliseconds",
    "Retry-After": "number of seconds after which the client should try again",
    "WWW-Authenticate": "how to authenticate, and which scope is needed",
    "RateLimit": "what the client may still use, in pixels (draft-ietf-httpapi-ratelimit-headers)",
    "RateLimit-Policy": "the client's limit (draft-ietf-httpapi-ratelimit-headers)",
    "X-Model": "name of the model",
    "X-Model-Fingerprint": "fingerprint of the model",
    "Content-Range": "position of the part in the file",
    "Location": "path of the job or the schedule",
    "X-Log-Position": "position after the text, which is the value of `after` for the next part",
    "X-Log-Bytes": "number of bytes written to the log so far",
    "X-Depth-Min": "smallest depth in the picture, in metres",
    "X-Depth-Max": "largest depth in the picture, in metres",
    "X-Depth-Units-Per-Metre": "value in a 16-bit PNG that stands for one metre: 1000 or 256",
}
_STATUSES: Final[dict[int, str]] = {
    200: "OK",
    201: "Created",
    202: "Accepted",
    204: "No content",
    206: "Part of the file",
    503: "Not available",
}


_ERROR_HEADERS: Final = {
    401: ("WWW-Authenticate",),
    403: ("WWW-Authenticate",),
    429: ("Retry-After", "RateLimit", "RateLimit-Policy"),
    503: ("Retry-After",),
}
_KEY_SCHEME: Final = "apiKey"
_SECURITY_SCHEMES: Final[dict[str, Json]] = {
    _KEY_SCHEME: {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "dv2_ID_SECRET_CHECKSUM",
        "description": "An API key, which `dinov2 keys create` makes. Keys are needed as soon as one exists.",
    }
}


class _Generator(GenerateJsonSchema):
    """A generator of JSON schemas without the titles that repeat the names of fields."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def document(routes: Iterable[BaseRoute], *, title: str, version: str, description: str, server: str) -> Json:
    """Return the OpenAPI document for the routes that are instances of `DirectRoute`. `server` is the address to which
    the paths are relative."""
    direct = [route for route in routes if isinstance(route, DirectRoute) and route.include_in_schema]
    schemas = _Schemas(direct)
    paths: dict[str, Json] = {}
    for route in direct:
        for method in sorted(set(route.methods or ()) - {"HEAD", "OPTIONS"}):
            paths.setdefault(route.path_format, {})[method.lower()] = _operation(route, schemas)
    schemas.drop_unused(paths)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "version": version,
            "description": description,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": server}],
        "paths": paths,
        "components": {"schemas": schemas.components, "securitySchemes": _SECURITY_SCHEMES},
    }


class _Schemas:
    """The JSON schemas of all requests and answers. They refer to each other by name."""

    def __init__(self, routes: list[DirectRoute]) -> None:
        requests, answers = set[Any](), {Problem, OpenAIError}
        for route in routes:
            operation = operation_of(route.endpoint)
            upload = operation.upload
            requests |= {operation.body, operation.query, *((upload.body, upload.options) if upload else ())} - {None}
            answers |= {answer_type(route.endpoint)} - {None}
        types: list[tuple[Any, JsonSchemaMode]] = [(type_, "validation") for type_ in requests]
        types += [(type_, "serialization") for type_ in answers]
        types.sort(key=lambda pair: pair[0].__name__)
        found, definitions = TypeAdapter.json_schemas(
            [(type_, mode, TypeAdapter(type_)) for type_, mode in types],
            ref_template=_REF + "{model}",
            schema_generator=_Generator,
        )
        self.components: dict[str, Json] = definitions["$defs"]
        for component in self.components.values():
            for field in component.get("properties", {}).values():
                _describe_default(field)
        self._of = {type_: schema for (type_, _), schema in found.items()}

    def of(self, type_: Any) -> Json:
        """Return a reference to the schema of a request or answer."""
        return self._of[type_]

    def drop_unused(self, paths: Json) -> None:
        """Delete the schemas to which nothing refers. Options that are only form fields or query parameters are not
        sent as objects, so nothing refers to their schemas."""
        for name in set(self.components) - _referenced(paths, self.components):
            del self.components[name]

    def texts(self, model: type[Schema]) -> dict[str, Json]:
        """Return the schema of each field of a request for use in a form or a query string. There, an object is sent as
        JSON text, and null does not exist."""
        whole = self.components[self._of[model]["$ref"].removeprefix(_REF)]
        return {name: self._text(field) for name, field in whole["properties"].items()}

    def _text(self, field: Json) -> Json:
        choices = [choice for choice in field.get("anyOf", []) if choice != NULL]
        rest = {key: value for key, value in field.items() if key != "anyOf"}
        if len(choices) == 1:
            rest = choices[0] | rest
        elif choices:
            rest["anyOf"] = choices
        if "$ref" not in rest:
            return rest
        about = f"{rest.get('description', 'options')}, as JSON"
        return {"type": "string", "contentMediaType": "application/json", "description": about}


def _describe_default(field: Json) -> None:
    """Move the default value of a field into its description. With the keyword `default`, openapi-typescript makes the
    field mandatory, and openapi-python-client sends the value in every request."""
    default = field.pop("default", None)
    about = field.get("description", "")
    if default not in (None, [], {}) and "default" not in about:
        field["description"] = f"{about}{'; ' if about else ''}default: {json.dumps(default)}"


def _referenced(value: Any, components: dict[str, Json]) -> set[str]:
    """Return the names of the schemas to which `value` refers, directly or through other schemas."""
    names: set[str] = set()
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            name = part["$ref"].removeprefix(_REF) if isinstance(part.get("$ref"), str) else None
            if name is not None and name not in names:
                names.add(name)
                todo.append(components[name])
        todo += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return names


def answer_type(endpoint: Any) -> Any:
    """Return the type of the JSON that a route function answers, or None if its answers are never JSON."""
    annotation = inspect.get_annotations(endpoint)["return"]
    for choice in (annotation, *get_args(annotation)):
        if get_origin(choice) is JsonAnswer:
            return get_args(choice)[0]
    return None


def _operation(route: DirectRoute, schemas: _Schemas) -> Json:
    operation = operation_of(route.endpoint)
    answer: Json = {
        "tags": list(route.tags),
        "summary": route.summary,
        "description": route.description,
        "operationId": route.endpoint.__name__,
        "parameters": _parameters(route, operation, schemas),
        "security": _security(route),
    }
    if operation.body is not None:
        content: Json = {"application/json": {"schema": schemas.of(operation.body)}}
        if operation.file is not None:
            content[operation.file] = {"schema": BINARY}
        answer["requestBody"] = {"required": operation.body_required, "content": content}
    elif operation.upload is not None:
        answer["requestBody"] = {"required": True, "content": _upload(operation.upload, schemas)}
    answer["responses"] = _successes(route, operation, schemas)
    for status, response in _failures((*operation.errors, *_denials(route)), route.path, schemas).items():
        there = answer["responses"].setdefault(status, response)
        there["content"] = response["content"] | there["content"]
    return answer


def _security(route: DirectRoute) -> list[Json]:
    """Return what a route needs: nothing, or a key with a scope. A service without keys does not ask for one, so the
    first choice is always to send none."""
    need = route_need(route)
    scope = "read" if need == "metrics" else need
    return [{}] if need == "open" else [{}, {_KEY_SCHEME: [scope]}]


def _denials(route: DirectRoute) -> list[type[ServiceError]]:
    """Return the errors for senders who may not call a route. A key always has the scope `read`."""
    need = route_need(route)
    errors: list[type[ServiceError]] = [] if need == "open" else [Unauthenticated]
    if need in ("write", "admin"):
        errors.append(MissingScope)
    if not set(route.methods or ()) <= SAFE_METHODS:
        errors += [CrossOrigin, BodyTooSlow]
    if route.path not in PROBES:
        errors.append(HostNotAllowed)
    return errors


def _parameters(route: DirectRoute, operation: Operation, schemas: _Schemas) -> list[Json]:
    parameters: list[Json] = []
    for name in route.param_convertors:
        schema = dict(_PATH_PARAMETERS["model" if route.path.startswith("/v1/models") else name])
        parameters.append({"name": name, "in": "path", "required": True, "description": schema.pop("description")})
        parameters[-1]["schema"] = schema
    query = operation.upload.options if operation.upload else operation.query
    for name, schema in ({} if query is None else schemas.texts(query)).items():
        about = schema.pop("description", name)
        if operation.upload:
            about += " (if the body is an image)"
        parameters.append({"name": name, "in": "query", "required": False, "description": about, "schema": schema})
    for name in ("X-Request-ID", *operation.headers):
        parameters.append({"name": name, "in": "header", "required": False, "description": _REQUEST_HEADERS[name]})
        parameters[-1]["schema"] = {"type": "string"}
    return parameters


def _upload(upload: Upload, schemas: _Schemas) -> Json:
    files: Json = {"type": "array", "items": BINARY, "minItems": 1} if upload.many else BINARY
    fields = {"file": files, **schemas.texts(upload.options)}
    return {
        "application/json": {"schema": schemas.of(upload.body)},
        "multipart/form-data": {"schema": {"type": "object", "required": ["file"], "properties": fields}},
        "application/octet-stream": {"schema": BINARY},
        "image/*": {"schema": BINARY},
    }


def _successes(route: DirectRoute, operation: Operation, schemas: _Schemas) -> dict[str, Json]:
    type_ = answer_type(route.endpoint)
    content: dict[str, Json] = {} if type_ is None else {"application/json": {"schema": schemas.of(type_)}}
    for media_type in operation.media_types:
        content[media_type] = {"schema": {"type": "string"} if media_type.startswith("text/") else BINARY}
    headers = _headers("X-Request-ID", *operation.answer_headers)
    return {
        str(status): {
            "description": _STATUSES[status],
            "headers": headers,
            "content": {} if status == 204 else dict(content),
        }
        for status in operation.statuses
    }


def _failures(errors: Iterable[type[ServiceError]], path: str, schemas: _Schemas) -> dict[str, Json]:
    codes = defaultdict[int, list[str]](list)
    limited = LIMITED if path.startswith("/v1/") else ()
    listed = {*errors, *ALWAYS, *limited}
    for kind in sorted({ERRORS[error] for error in (*listed, *(STORAGE if StorageFailed in listed else ()))}):
        codes[kind.status].append(kind.code)
    openai = path in OPENAI_PATHS
    media_type, schema = ("application/json", OpenAIError) if openai else ("application/problem+json", Problem)
    return {
        str(status): {
            "description": f"Error: {', '.join(names)}",
            "headers": _headers("X-Request-ID", *_ERROR_HEADERS.get(status, ())),
            "content": {media_type: {"schema": schemas.of(schema)}},
        }
        for status, names in sorted(codes.items())
    }


def _headers(*names: str) -> Json:
    return {name: {"description": _ANSWER_HEADERS[name], "schema": {"type": "string"}} for name in names}
