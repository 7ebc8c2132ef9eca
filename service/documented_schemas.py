"""The schemas of filters and images, which are only for the OpenAPI document. `service/search/filters.py` and
`service/data_urls.py` parse filters and images, because their error messages are better than pydantic's."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from service.schema_base import DocumentedAs, Schema


class FilterIn(Schema):
    """A condition on the metadata or the ids of items: `key` or `field` with one operator, or one of `and`, `or` and
    `not`. If a value is a list, a condition is true if it is true for one of the list's elements."""

    key: str | None = Field(
        None, description="metadata key; dots separate nested keys; each operator requires `key` or `field`"
    )
    field: Literal["id"] | None = Field(None, description="id: the condition is about the item's id")
    eq: str | float | bool | None = Field(None, description="the value equals this string, number or boolean")
    ne: str | float | bool | None = Field(
        None, description="the value is present, and neither it nor an element of it equals this value"
    )
    in_: list[str | float | bool] | None = Field(None, alias="in", description="the value equals one of these")
    gt: str | float | None = Field(None, description="the value is greater than this number or string")
    gte: str | float | None = Field(None, description="the value is greater than or equal to this number or string")
    lt: str | float | None = Field(None, description="the value is less than this number or string")
    lte: str | float | None = Field(None, description="the value is less than or equal to this number or string")
    contains: str | None = Field(None, description="the value is a string that contains this text")
    prefix: str | None = Field(None, description="the value is a string that begins with this text")
    exists: bool | None = Field(None, description="true: the value is present and not null; false: the opposite")
    and_: list["FilterIn"] | None = Field(None, alias="and", description="all of these conditions are true")
    or_: list["FilterIn"] | None = Field(None, alias="or", description="at least one of these conditions is true")
    not_: "FilterIn | None" = Field(None, alias="not", description="this condition is false")


Where = Annotated[dict[str, Any], DocumentedAs(FilterIn)]


class ImageUrl(Schema):
    """The object in the field `image_url` of an image object."""

    model_config = ConfigDict(extra="allow")

    url: str = Field(description="data URL or https URL")


class ImageObject(Schema):
    """An image as an object, in one of the forms that clients of other services send. Exactly one of the fields other
    than `type` must be set. An https URL is an error unless the service fetches images from its host."""

    model_config = ConfigDict(extra="allow")

    type: str | None = Field(None, description="ignored")
    image: str | None = Field(None, description="data URL, base64 or https URL")
    image_url: str | ImageUrl | None = Field(None, description="data URL or https URL")
    image_base64: str | None = Field(None, description="data URL, base64 or https URL")
    base64: str | None = Field(None, description="data URL, base64 or https URL")
    data: str | None = Field(None, description="data URL, base64 or https URL")
    bytes: str | None = Field(None, description="data URL, base64 or https URL")
    url: str | None = Field(None, description="data URL or https URL")
    source: dict[str, Any] | None = Field(None, description="object with the base64 text in `data`")
    content: list[dict[str, Any]] | None = Field(None, description="list with one image object")


Image = Annotated[Any, DocumentedAs(str | ImageObject)]
