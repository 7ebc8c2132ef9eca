"""Functions that build answers: they encode vectors, make the Server-Timing header, and serialise JSON."""

import base64
from collections.abc import Sequence
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import Request, Response

from service.errors import AnswerTooLarge, ItemError, ItemErrorBody

Content = TypeVar("Content")


class JsonAnswer(Response, Generic[Content]):
    """A response with JSON of the type `Content`, one of the types in `service/answer_schemas.py`. mypy compares this
    type with the body that a route passes to `json_response`. The OpenAPI document is made from the same type."""

    media_type = "application/json"


def encode_vector(vector: npt.NDArray[np.float32], encoding: Literal["float", "base64"]) -> Any:
    """Return a vector [D] in a form that can be serialised to JSON: a numpy array for `float`, or the base64 text of
    the little-endian float32 bytes for `base64`."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode("ascii")
    return np.ascontiguousarray(vector)


def item_errors(request: Request, bad: Sequence[ItemError]) -> list[ItemErrorBody]:
    """Return the member `errors` of an answer that also has the results of other items. The access log says how many
    items failed, and why the first one did."""
    request.state.failed = bad
    return [item.body() for item in bad]


def server_timing(timings: dict[str, float]) -> dict[str, str]:
    """Return the Server-Timing header, which browsers and load-testing tools can display. `timings` maps the name of
    each stage to its duration in milliseconds."""
    return {"Server-Timing": ", ".join(f"{stage};dur={ms:g}" for stage, ms in timings.items())}


def json_response(
    body: Content, *, status: int = 200, headers: dict[str, str] | None = None, most: int | None = None
) -> JsonAnswer[Content]:
    """Serialise `body` to JSON and return a response with it. The body may contain numpy arrays.

    Raises:
        AnswerTooLarge: the JSON has more than `most` bytes.
    """
    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    if most is not None and len(content) > most:
        raise AnswerTooLarge(
            f"the answer has {len(content):,} bytes, and {most:,} are allowed: ask for fewer results (k or limit) or "
            "queries at a time, or leave out include=vector"
        )
    return JsonAnswer(content, status_code=status, headers=headers)
