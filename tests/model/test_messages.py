"""Tests of the description of pydantic's errors."""

from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.messages import in_words


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = Field(default=1, ge=1, le=9, multiple_of=2)


class Outer(BaseModel):
    name: str
    inner: Inner = Inner()
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    pair: tuple[int, int] = (1, 2)
    many: tuple[int, ...] = Field(default=(1,), min_length=1)
    url: str = Field(default="u", pattern="^u")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "name is missing"),
        ({"name": "x", "inner": {"size": 0}}, "inner.size=0: must be at least 1"),
        ({"name": "x", "inner": {"size": 3}}, "inner.size=3: must be a multiple of 2"),
        ({"name": "x", "inner": {"sise": 2}}, "inner.sise=2: is unknown here"),
        ({"name": "x", "inner": 5}, "inner=5: must be an object"),
        ({"name": "x", "kind": "c"}, "kind='c': must be 'a' or 'b'"),
        ({"name": 5}, "name=5: must be text"),
        ({"name": "x", "flag": "maybe"}, "flag='maybe': must be true or false"),
        ({"name": "x", "pair": 5}, "pair=5: must be a list"),
        ({"name": "x", "pair": [1, 2, 3]}, "pair=[1, 2, 3]: must have 2 or fewer entries"),
        ({"name": "x", "many": []}, "many=[]: must have 1 or more entries"),
        ({"name": "x", "url": "secret"}, "url: must match the pattern ^u"),
        ({"name": "x", "kind": "y" * 200}, "kind='" + "y" * 96 + "...: must be 'a' or 'b'"),
        ({"name": 1, "flag": 7}, "name=1: must be text; flag=7: must be true or false"),
    ],
)
def test_problems_are_described(given: dict[str, object], expected: str) -> None:
    with pytest.raises(ValidationError) as error:
        Outer.model_validate(given)
    assert in_words(error.value, secret=("url",)) == expected


def test_text_that_is_not_json_is_described() -> None:
    with pytest.raises(ValidationError) as error:
        Outer.model_validate_json("{")
    assert in_words(error.value).startswith("is not JSON: EOF")
