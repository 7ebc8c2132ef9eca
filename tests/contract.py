"""Compare the answers of the service with its OpenAPI document."""

import copy
import json
import re
from typing import Any

import httpx
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

_URI = "urn:document"
_JSON = "application/json"


class Contract:
    """The OpenAPI document of a service, which `check` compares with an exchange.

    Documented objects are compared strictly: an answer with a field that the document does not have is an error.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.seen: set[tuple[str, int]] = set()  # operation ids and statuses
        closed = copy.deepcopy(document)
        _close(closed["components"]["schemas"])
        self._registry = Registry().with_resource(_URI, Resource(closed, DRAFT202012))
        paths = sorted(document["paths"], key=lambda path: -len(re.sub(r"\{\w+\}", "", path)))  # most specific first
        self._patterns = [(_pattern(path), path) for path in paths]

    def operation(self, method: str, path: str) -> tuple[str, dict[str, Any]] | None:
        """Return the documented path and the operation that a request calls, or None if there is none."""
        for pattern, documented in self._patterns:
            operations = self.document["paths"][documented]
            if pattern.fullmatch(path) and method.lower() in operations:
                return documented, operations[method.lower()]
        return None

    def check(self, response: httpx.Response) -> None:
        """Fail if the document does not allow this answer, or does not allow a request that succeeded."""
        request = response.request
        found = self.operation(request.method, request.url.raw_path.decode().partition("?")[0])
        if found is None:
            assert response.status_code in (404, 405, 200), response
            return
        path, operation = found
        what = f"{request.method} {request.url} -> {response.status_code} {response.text[:300]!r}"
        assert str(response.status_code) in operation["responses"], f"undeclared status: {what}"
        self.seen.add((operation["operationId"], response.status_code))
        declared = operation["responses"][str(response.status_code)]
        where = ("paths", path, request.method.lower(), "responses", str(response.status_code), "content")
        if response.status_code == 204:
            assert not response.content
        else:
            self._check_content(response, declared["content"], where, what)
        assert {"X-Request-ID"} <= set(declared["headers"])
        assert "x-request-id" in response.headers
        if response.is_success and not (
            response.headers.get("content-type") == _JSON and response.json().get("errors")
        ):
            self._check_request(request, path, operation, what)

    def _check_content(self, message: Any, content: dict[str, Any], where: tuple[str, ...], what: str) -> None:
        kind = message.headers.get("content-type", "").partition(";")[0]
        declared = next((key for key in (kind, kind.partition("/")[0] + "/*") if key in content), None)
        assert declared is not None, f"undeclared content type {kind!r}: {what}"
        if kind.endswith("json"):
            value = json.loads(message.content)
            errors = [
                f"{error.json_path}: {error.message[:200]}"
                for error in self._validator((*where, declared, "schema")).iter_errors(value)
            ]
            assert not errors, f"{what}: {errors}"

    def _check_request(self, request: httpx.Request, path: str, operation: dict[str, Any], what: str) -> None:
        names = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "query"}
        assert set(request.url.params) <= names, f"undeclared query parameter: {what}"
        if "content-type" in request.headers and "requestBody" in operation:
            where = ("paths", path, request.method.lower(), "requestBody", "content")
            self._check_content(request, operation["requestBody"]["content"], where, what)

    def _validator(self, where: tuple[str, ...]) -> Draft202012Validator:
        pointer = "/".join(part.replace("~", "~0").replace("/", "~1") for part in where)
        return Draft202012Validator({"$ref": f"{_URI}#/{pointer}"}, registry=self._registry)


def _pattern(path: str) -> re.Pattern[str]:
    """Return the pattern of the paths that a documented path stands for. Ids and names of models may have slashes."""
    path = path.replace("{item_id}", "{any}").replace("/models/{name}", "/models/{any}")
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda name: ".*" if name[1] == "any" else "[^/]+", re.escape(path)))


def _close(value: Any) -> None:
    """Forbid fields that are not documented in all objects that have documented fields."""
    if isinstance(value, dict):
        if "properties" in value and isinstance(value["properties"], dict):
            value.setdefault("additionalProperties", False)
        for inner in value.values():
            _close(inner)
    elif isinstance(value, list):
        for inner in value:
            _close(inner)
