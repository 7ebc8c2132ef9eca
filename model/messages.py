"""Describes pydantic's errors in this project's words.

pydantic's own messages contain type names, internal wording ("Input should be ...") and links to its website. A user
who mistypes a setting needs to know its name, the given value and what is allowed.
"""

from collections.abc import Collection
from typing import Any, Final

from pydantic import ValidationError

_WORDS: Final = {
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "finite_number": "must be a finite number",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "path_type": "must be a path",
    "extra_forbidden": "is unknown here",
    "tuple_type": "must be a list",
    "too_short": "must have {min_length} or more entries",
    "too_long": "must have {max_length} or fewer entries",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "json_invalid": "is not JSON: {error}",
}
_KINDS: Final = {"int": "must be an integer", "float": "must be a number", "bool": "must be true or false"}


def in_words(error: ValidationError, secret: Collection[str] = ()) -> str:
    """Return one line that describes all problems in `error`, such as "port=70000: must be at most 65535".

    `secret` contains the names of fields whose values must not be shown.
    """
    return "; ".join(problem_in_words(problem, secret) for problem in error.errors(include_url=False))


def problem_in_words(problem: Any, secret: Collection[str] = ()) -> str:
    """Describe one entry of `ValidationError.errors()`, in the same way as `in_words`."""
    name = ".".join(map(str, problem["loc"]))
    text = _message(problem)
    if not name:
        return text
    if problem["type"] == "missing":
        return f"{name} is missing"
    shown = "" if str(problem["loc"][0]) in secret else f"={_short(problem['input'])}"
    return f"{name}{shown}: {text}"


def _message(problem: Any) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in _WORDS:
        return _WORDS[kind].format(**{name: _whole(value) for name, value in context.items()})
    if kind.partition("_")[0] in _KINDS:
        return _KINDS[kind.partition("_")[0]]
    return str(problem["msg"]).removeprefix("Value error, ").replace("Input should", "must")


def _whole(value: object) -> object:
    """Return a float without a fraction as an integer, so that a message says 1 and not 1.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
