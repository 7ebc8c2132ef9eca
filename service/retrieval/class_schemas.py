"""The schemas of `POST /v1/classify`: its options, its JSON body and its answer."""

from typing import Annotated, Any, Final, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from model.pooling import POOLING_DESCRIPTION, Pooling
from service.answer_schemas import Identity, ListObject, Timings
from service.documented_schemas import FilterIn, ImageObject
from service.errors import ItemErrorBody
from service.schema_base import DocumentedAs, OptionalWhole, Whole
from service.schemas import CollectionName, Options, ParamsIn
from service.search.store import MAX_ID_CHARACTERS

MAX_K: Final = 100
DEFAULT_K: Final = 10
ERROR_RATES: Final = (0.001, 0.5)
DEFAULT_ERROR_RATE: Final = 0.05
MAX_NAME_CHARACTERS: Final = MAX_ID_CHARACTERS
FilterOption = Annotated[Any, DocumentedAs(FilterIn)]


class ClassifyOptions(Options):
    """The options of a request to `/v1/classify`. They are JSON fields, form fields or query parameters, depending on
    the kind of body. In a form or query string, `filter`, `calibration_filter` and `params` are strings that contain
    JSON."""

    collection: CollectionName | None = Field(
        None,
        description="name or alias of a collection with labelled items; exactly one of collection, classes and head",
    )
    head: str | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="name of a classification head of the model, or auto if there is only one",
    )
    label: str | None = Field(
        None, description="metadata key that contains the class of an item; required with collection"
    )
    k: OptionalWhole = Field(
        None, ge=1, le=MAX_K, description=f"number of neighbours that vote; default: {DEFAULT_K}; needs collection"
    )
    filter: FilterOption = Field(None, description="condition on the items that may be neighbours; needs collection")
    calibration_filter: FilterOption = Field(
        None,
        description="condition on the items that are held out for the calibration: they are compared with the other "
        "items and never vote; unset: every item is compared with all others; needs collection",
    )
    params: ParamsIn | None = None
    error_rate: float = Field(
        DEFAULT_ERROR_RATE,
        ge=ERROR_RATES[0],
        le=ERROR_RATES[1],
        allow_inf_nan=False,
        description="share of images of known classes that may be called unknown; needs collection or classes",
    )
    top: Whole = Field(5, ge=1, le=MAX_K, description="highest number of classes in `scores`")
    pooling: Pooling | None = Field(
        None, description=f"with classes: {POOLING_DESCRIPTION}; with collection, the collection's pooling is used"
    )
    on_error: Literal["fail", "partial"] = Field(
        "fail", description="partial: classify the valid images and list the errors of the others"
    )


_Images = str | ImageObject | Annotated[list[str | ImageObject], Field(min_length=1)]


class ClassifyIn(ClassifyOptions):
    """The JSON body of `POST /v1/classify`."""

    images: Annotated[Any, DocumentedAs(_Images)] = Field(description="one image, or a list of images")
    classes: Annotated[dict[str, Any] | None, DocumentedAs(dict[str, _Images] | None)] = Field(
        None, description="example images of each class, by the name of the class: one image, or a list of images"
    )


Label = str | int | float | bool


class ClassScoreFields(TypedDict):
    """A class and its score. With a collection, the score is the class's share of the votes. With examples, it is the
    cosine similarity to the mean of the examples. With a head, it is the probability."""

    label: Label
    score: float


class NeighbourFields(TypedDict):
    """An item that is near the image. `score` is the cosine similarity."""

    id: str
    label: Label | None
    score: float


class VerdictFields(TypedDict):
    """The classification of one image. `index` is the position of the image in the request."""

    index: int
    label: Annotated[Label | None, Field(description="the class; null if the image is unknown")]
    unknown: Annotated[bool, Field(description="whether the image belongs to none of the classes")]
    p_value: Annotated[
        float | None,
        Field(description="the image is unknown if this is at most the error rate; null: nothing to compare with"),
    ]
    scores: Annotated[list[ClassScoreFields], Field(description="best classes first, even if the image is unknown")]
    neighbours: NotRequired[list[NeighbourFields]]


class CalibrationFields(TypedDict):
    """The known images that the images of the request were compared with."""

    method: Literal["leave-one-out", "held-out", "examples"]
    items: Annotated[int, Field(description="number of known images")]
    drawn_from: Annotated[int, Field(description="number of images from which the known images were drawn at random")]
    k: NotRequired[Annotated[int, Field(description="number of neighbours; lower than requested if items are few")]]
    error_rate: float
    least_error_rate: Annotated[float, Field(description="lowest error rate that this number of images allows")]
    promised: Annotated[
        bool, Field(description="whether the error rate holds for images from the same source as the known images")
    ]
    note: NotRequired[Annotated[str, Field(description="reason why the error rate is not promised, or may not hold")]]


class BasisFields(TypedDict):
    """What the verdicts on images are based on."""

    calibration: NotRequired[Annotated[CalibrationFields, Field(description="absent with a head")]]
    collection: NotRequired[str]
    head: NotRequired[str]


class ClassifyAnswer(BasisFields, Identity):
    """The answer to `POST /v1/classify`."""

    object: ListObject
    data: list[VerdictFields]
    errors: NotRequired[list[ItemErrorBody]]
    timings: Timings
