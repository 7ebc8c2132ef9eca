"""Fields of a request checked against a schema of `service/schemas.py`; what is wrong is told field by field."""

import reprlib
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from service.errors import InvalidRequest

Model = TypeVar("Model", bound=BaseModel)

MAX_FIELDS: Final = 32
"""Beside each other in one object that is checked against a schema: every wrong one is an object of its own."""
MAX_PROBLEMS: Final = 10


def parse_options(model: type[Model], fields: dict[str, Any]) -> Model:
    """Check fields against a schema.

    Raises:
        InvalidRequest: the message names each field at fault, its value's problem and what is allowed.
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
    """Refuse an object of very many fields before a schema makes an error of each."""
    if len(fields) > MAX_FIELDS:
        raise InvalidRequest(f"{where} has {len(fields):,} fields; at most {MAX_FIELDS} are accepted")


def _problem(model: type[BaseModel], problem: ErrorDetails) -> str:
    """One fault: where, what is allowed, what was given."""
    where = ".".join(str(part)[:80] for part in problem["loc"]) or "body"
    if problem["type"] == "extra_forbidden":
        known = f"; known are {', '.join(model.model_fields)}" if len(problem["loc"]) == 1 else ""
        return f"{where}: unknown field{known}"
    text = problem["msg"]
    if problem["type"] in ("model_type", "dict_type"):
        text = "Input should be an object"  # pydantic's own words name a class of ours
    elif problem["type"].startswith(("int_", "float_")) and len(problem["loc"]) == 1:
        text = text.partition(", ")[0] + _limits(model.model_fields[str(problem["loc"][0])])
    told = problem["type"] in ("missing", "too_long", "too_short")  # how many there are is in pydantic's words
    return f"{where}: {text}" + ("" if told else f", not {reprlib.repr(problem['input'])}")


def _limits(field: FieldInfo) -> str:
    """What numbers a field takes, as far as it says."""
    low, high = ([getattr(one, name) for one in field.metadata if hasattr(one, name)] for name in ("ge", "le"))
    return f" from {low[0]} to {high[0]}" if low and high else ""
