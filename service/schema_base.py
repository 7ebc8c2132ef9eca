"""What all schemas of requests have in common: null means "not set", a whole number may be written as `10.0`, and an
unknown field is an error.

Clients in many languages send every field of an object, with null for the ones that were never set. A field that must
be an integer arrives as `10.0` from languages with only one type of number.
"""

from typing import Annotated, Any

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler, TypeAdapter, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

NULL: dict[str, Any] = {"type": "null"}


class Schema(BaseModel):
    """The base class of all schemas of requests. A field that has a default value also accepts null, which has the same
    effect as leaving out the field. An unknown field is an error, so that a typo is not silently ignored."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and None in fields.values():
            optional = {field.alias or name for name, field in cls.model_fields.items() if not field.is_required()}
            return {name: value for name, value in fields.items() if value is not None or name not in optional}
        return fields

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the JSON schema. The schema of each optional field allows null."""
        reference = handler(schema)
        whole = handler.resolve_ref_schema(reference)
        required = whole.get("required", [])
        for name, field in whole.get("properties", {}).items():
            if name not in required:
                whole["properties"][name] = _nullable(field)
        return reference


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a field, extended to allow null."""
    about = {key: value for key, value in schema.items() if key in ("title", "description", "default", "examples")}
    rest = {key: value for key, value in schema.items() if key not in about}
    if not rest or NULL in rest.get("anyOf", []):
        return schema
    return {"anyOf": [*rest["anyOf"], NULL] if set(rest) == {"anyOf"} else [rest, NULL], **about}


def _whole(value: Any) -> Any:
    """Return a float without a fractional part as an int, and any other value unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


FROM_FLOAT = BeforeValidator(_whole)
Whole = Annotated[int, FROM_FLOAT]
"""An integer, which may also be sent as a number such as `10.0`."""
OptionalWhole = Annotated[int | None, FROM_FLOAT]
ONE_OR_MORE = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
"""Also accepts a single text in place of a list of texts, because the form parser returns a field that occurs once as a
text."""


def _listed(value: Any) -> Any:
    """Return the parts of a comma-separated text as a list, and a single number as a list. Return any other value
    unchanged."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


LISTED = BeforeValidator(_listed)
"""Also accepts `1,2` in place of a list, because forms, query strings and the command line have no lists."""


def _from_json_text(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value  # the schema then reports the wrong type
    return value


JSON_TEXT = BeforeValidator(_from_json_text)
"""Also accepts an object or a list as a JSON text, because forms, query strings and the command line send texts."""


class DocumentedAs:
    """An annotation that gives a field the JSON schema of another type, `documented`. It does not change what pydantic
    checks. It is meant for fields that other code parses."""

    def __init__(self, documented: Any) -> None:
        self.documented = documented

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(TypeAdapter(self.documented).core_schema)
