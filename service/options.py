"""Check the fields of a request against a schema from `service/schemas.py`, and report invalid fields."""

import reprlib
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from service.errors import InvalidRequest

Model = TypeVar("Model", bound=BaseModel)

MAX_FIELDS: Final = 32
"""The highest number of fields in an object that is checked against a schema. Without a limit, a client could send
millions of unknown fields, and pydantic would create an error object for each of them."""
MAX_PROBLEMS: Final = 10


def parse_options(model: type[Model], fields: dict[str, Any]) -> Model:
    """Check the fields of a request against the schema `model`, and return the parsed object.

    Raises:
        InvalidRequest: there are too many fields, or a field is missing, unknown or invalid. The message describes the
            first MAX_PROBLEMS problems and what is allowed.
    """
    check_fields(fields, "the request")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        texts = [_problem(model, problem) for problem in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            texts.append(f"and {len(problems) - MAX_PROBLEMS} more")
        param = str(problems[0]["loc"][0])[:80] if problems[0]["loc"] else None
        raise InvalidRequest("; ".join(texts), param=param) from error


def check_fields(fields: dict[str, Any], where: str) -> None:
    """Raise InvalidRequest if an object has more than MAX_FIELDS fields. `where` is the name of the object in the
    message."""
    if len(fields) > MAX_FIELDS:
        raise InvalidRequest(f"{where} has {len(fields):,} fields; at most {MAX_FIELDS} are accepted")


def _problem(model: type[BaseModel], problem: ErrorDetails) -> str:
    """Return a text that describes one of pydantic's errors: the name of the field, the problem and, where it helps,
    the wrong value."""
    where = ".".join(str(part)[:80] for part in problem["loc"]) or "body"
    if problem["type"] == "extra_forbidden":
        allowed = f"; known fields are {', '.join(model.model_fields)}" if len(problem["loc"]) == 1 else ""
        return f"{where}: unknown field{allowed}"
    text = problem["msg"]
    if problem["type"] in ("model_type", "dict_type"):
        text = "Input should be an object"  # pydantic's message names an internal class
    elif problem["type"].startswith(("int_", "float_")) and len(problem["loc"]) == 1:
        text = text.partition(", ")[0] + _limits(model.model_fields[str(problem["loc"][0])])
    complete = problem["type"] in ("missing", "too_long", "too_short")  # the value would add nothing to these messages
    return f"{where}: {text}" + ("" if complete else f", not {reprlib.repr(problem['input'])}")


def _limits(field: FieldInfo) -> str:
    """Return the range that a numeric field accepts, as text such as " from 1 to 1000". Return an empty string if the
    field does not have both a lower and an upper limit."""
    low, high = ([getattr(bound, name) for bound in field.metadata if hasattr(bound, name)] for name in ("ge", "le"))
    return f" from {low[0]} to {high[0]}" if low and high else ""
