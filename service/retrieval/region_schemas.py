"""The schemas of `POST /v1/collections/{name}/find-region`: its JSON body and its answer."""

from typing import Annotated, Any, Final, NotRequired

from pydantic import ConfigDict, FailFast, Field
from typing_extensions import TypedDict

from service.answer_schemas import Box, Identity, ListObject, RunLengths, Timings
from service.documented_schemas import FilterIn, Image
from service.schema_base import DocumentedAs, Whole
from service.schemas import Body, ItemId, MaskIn, Options, Side
from service.search.store import MAX_DEPTH

MAX_REFERENCES: Final = 8
MAX_PAGE: Final = 100


class ReferenceIn(Body):
    """A reference: an image or an item, and the region in it. It has exactly one of `image` and `id`, and exactly one
    of `box`, `mask` and `point`."""

    image: Image = Field(
        None, description="image as a data URL, base64 or https URL, or as an object that contains one of them"
    )
    id: ItemId | None = Field(
        None, description="id of an item whose image is stored; the answer does not contain this item"
    )
    box: Annotated[list[Side] | None, FailFast()] = Field(
        None, min_length=4, max_length=4, description="[x, y, width, height] in pixels of the upright image"
    )
    mask: MaskIn | None = None
    point: Annotated[list[Side] | None, FailFast()] = Field(
        None, min_length=2, max_length=2, description="[x, y] in pixels of the upright image; marks the patch there"
    )


class FindRegionIn(Options):
    """The body of `POST /v1/collections/{name}/find-region`."""

    model_config = ConfigDict(strict=True)

    references: Annotated[list[ReferenceIn], FailFast()] = Field(
        min_length=1, max_length=MAX_REFERENCES, description="images in which the region is marked"
    )
    filter: Annotated[Any, DocumentedAs(FilterIn)] = Field(None, description="condition on the items' metadata or ids")
    candidates: Whole = Field(
        1000,
        ge=1,
        le=MAX_DEPTH,
        description="number of items to examine; if more items match the filter, the index proposes those that are "
        "most similar to the references",
    )
    min_score: float = Field(0.5, ge=0, le=1, allow_inf_nan=False, description="lowest score of a result")
    debias: bool = Field(True, description="remove the part of the features that depends only on a patch's position")
    limit: Whole = Field(20, ge=1, le=MAX_PAGE, description="highest number of results in the answer")
    cursor: str | None = Field(
        None, max_length=1000, description="cursor from the answer with the previous page; unset: first page"
    )


class RegionFields(TypedDict):
    """An item whose image contains the region."""

    id: str
    score: Annotated[float, Field(description="mean similarity of the marked patches to the best patches found")]
    box: Annotated[Box, Field(description="[x, y, width, height] of the mask in pixels of the upright image")]
    area: Annotated[int, Field(description="number of pixels of the mask")]
    segmentation: RunLengths
    metadata: dict[str, Any]
    source: NotRequired[str]


class FindRegionAnswer(Identity):
    """The answer to `POST /v1/collections/{name}/find-region`."""

    object: ListObject
    collection: str
    data: list[RegionFields]
    cursor: Annotated[str | None, Field(description="send it to get the next page; null on the last page")]
    total: Annotated[int, Field(description="number of items that reach min_score, on all pages")]
    examined: Annotated[int, Field(description="number of items whose image was compared")]
    pending: Annotated[
        int, Field(description="number of candidates that were not compared in time; send the request again")
    ]
    unreadable: Annotated[int, Field(description="number of candidates without an image, or with an unreadable one")]
    timings: Timings
