"""Options that choose some of a model's blocks or heads by their numbers."""

import re
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from service.errors import InvalidRequest

ALL: Final = "all"
MOST: Final = 64

_INTEGER: Final = re.compile(r"\s*[+-]?[0-9]{1,9}\s*")


def _read(value: Any) -> Any:
    """Return `ALL`, or a list of integers. Forms and the command line send lists as text, such as `0,-1`.

    Raises:
        PydanticCustomError: the value is neither of these.
    """
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    if len(parts) == 1 and parts[0] == ALL:
        return ALL
    if not 1 <= len(parts) <= MOST:
        raise PydanticCustomError("indices", f"must be a list of 1 to {MOST} integers, or {ALL}")
    return [_integer(part) for part in parts]


def _integer(part: Any) -> int:
    if isinstance(part, str) and _INTEGER.fullmatch(part):
        return int(part)
    if isinstance(part, int | float) and not isinstance(part, bool) and abs(part) < 1e9 and part == int(part):
        return int(part)
    raise PydanticCustomError("indices", f"must be {ALL}, or integers such as 0,5,-1")


Indices = Annotated[
    Any,
    BeforeValidator(_read),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": ALL},
                {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": MOST},
                {"type": "integer"},
            ]
        }
    ),
]
"""`all`, or a list of numbers. A negative number counts back from the last one, -1."""


def chosen(indices: Any, count: int, param: str) -> list[int]:
    """Return the numbers that an option of type `Indices` chooses, from 0 to `count` - 1. `param` is the name of the
    option, for example `blocks`.

    Raises:
        InvalidRequest: a number is out of range or occurs twice.
    """
    if indices == ALL:
        return list(range(count))
    numbers: list[int] = []
    for index in indices:
        if not -count <= index < count:
            raise InvalidRequest(
                f"{param}: {index} is out of range; the model has {count} {param}, 0 to {count - 1}, "
                f"and -1 is the last one",
                param=param,
            )
        if index % count in numbers:
            raise InvalidRequest(f"{param}: {index} is chosen twice", param=param)
        numbers.append(index % count)
    return numbers
