"""The schemas of requests. `service/answer_schemas.py` describes the answers."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, FailFast, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from model.pooling import DEFAULT_POOLING, POOLING_DESCRIPTION, Pooling
from service.documented_schemas import FilterIn, Image, ImageObject, Where
from service.schema_base import FROM_FLOAT, LISTED, ONE_OR_MORE, DocumentedAs, OptionalWhole, Schema, Whole
from service.search.checks import NAME_PATTERN
from service.search.kinds import Kind, kinds_with
from service.search.specs import EF_CONSTRUCTION, MAX_DIMENSION, MAX_INDEXED, N_LISTS, TARGET_RECALL, M
from service.search.store import MAX_ID_CHARACTERS, MAX_SOURCE_CHARACTERS, DType

CollectionName = Annotated[str, Field(json_schema_extra={"pattern": f"^{NAME_PATTERN}$"})]
Encoding = Literal["float", "base64"]
ItemId = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARACTERS)]
Vector = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]] | None,
    FailFast(),
    Field(min_length=1, max_length=MAX_DIMENSION),
]
Fingerprint = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:@+-]{1,64}$")]
Include = Annotated[list[Literal["vector"]], FailFast(), Field(max_length=1)]


class Options(Schema):
    """The base class of requests with the field `model`."""

    model: str = Field(
        "auto", max_length=256, description="name of the served model; auto and an empty value also mean this model"
    )


class EmbeddingOptions(Options):
    """The options of an embedding request. They are JSON fields, form fields or query parameters, depending on the kind
    of body."""

    encoding_format: Literal["float", "base64"] = Field(
        "float", description="list of numbers, or base64 text of little-endian float32"
    )
    dimensions: OptionalWhole = Field(
        None, description="must be the dimension of the model, because vectors are never truncated"
    )
    user: str | None = Field(None, max_length=256, description="ignored; OpenAI clients may send it")
    pooling: Pooling = Field(DEFAULT_POOLING, description=POOLING_DESCRIPTION)
    normalize: bool = Field(True, description="scale every vector to length 1")
    on_error: Literal["fail", "partial"] = Field(
        "fail", description="partial: answer the valid images and list the errors of the others"
    )


class EmbeddingsIn(EmbeddingOptions):
    """The JSON body of `POST /v1/embeddings`."""

    input: Annotated[Any, DocumentedAs(str | ImageObject | Annotated[list[str | ImageObject], Field(min_length=1)])] = (
        Field(description="one image, or a list of images")
    )


class VisionOptions(Options):
    """The options that all vision tasks have."""

    size: OptionalWhole = Field(
        None,
        ge=14,
        le=4096,
        description="short side of the network's input in pixels, rounded to a multiple of the patch size; the whole "
        "image is then used; default: the preprocessing of the model",
    )


class EmbeddingToo(VisionOptions):
    """The options of vision tasks that can also return the embedding of the image."""

    include: Annotated[list[Literal["embedding"]], FailFast(), Field(max_length=1), LISTED] = Field(
        default_factory=list,
        description="embedding: also return the embedding; the answer is then always JSON",
    )
    pooling: Pooling = Field(DEFAULT_POOLING, description="pooling of the embedding")
    normalize: bool = Field(True, description="scale the embedding to length 1")


class Body(Schema):
    """The base class of request bodies that are always JSON. Every value must have the right JSON type. For instance,
    the string "1" is not accepted as a number."""

    model_config = ConfigDict(strict=True)


class ItemIn(Body):
    """One item to add to a collection. It has either an image or a vector."""

    id: ItemId | None = Field(
        None, description="id of the item; default: the sha256 of the image's bytes; required with a vector"
    )
    image: Image = Field(
        None,
        description="image as a data URL, base64 or https URL, or as an object that contains one of them; required if "
        "there is no vector",
    )
    vector: Vector = Field(None, description="vector that was computed elsewhere; the service scales it to length 1")
    fingerprint: Fingerprint | None = Field(
        None, description="fingerprint of the model that made `vector`; must be that of the collection"
    )
    source: str | None = Field(
        None,
        max_length=MAX_SOURCE_CHARACTERS,
        description="path or URL of the image, or any other text; stored unchanged; default: the URL if `image` is one",
    )
    metadata: dict[str, Any] = Field(default_factory=dict, description="JSON object that searches return and filter by")


class ItemsIn(Options):
    """The body of `POST /v1/collections/{name}/items`. This schema does not check the items. They are checked one by
    one later, so that each invalid item gets its own error."""

    items: Annotated[list[Any], DocumentedAs(Annotated[list[ItemIn], Field(min_length=1)])] = Field(min_length=1)
    on_error: Literal["fail", "partial"] = "fail"


PerImage = Annotated[list[str], ONE_OR_MORE]
"""A form field or query parameter that has one value for each image, in the order of the images. The parser of forms
returns a string if the field occurs once."""


class UploadOptions(Options):
    """The options for uploading image files to a collection. They are form fields, or query parameters if the body is
    an image. `id`, `metadata` and `source` may occur once for each image, in the order of the images."""

    on_error: Literal["fail", "partial"] = "fail"
    id: PerImage = Field(
        default_factory=list, description="id of each image; default, also for an empty id: the sha256 of its bytes"
    )
    metadata: PerImage = Field(default_factory=list, description="metadata of each image, as the text of a JSON object")
    source: PerImage = Field(default_factory=list, description="source of each image")


class ItemPutIn(ItemIn):
    """The JSON body of `PUT /v1/collections/{name}/items/{id}`. If it has an `id`, this must be the id in the path."""

    id: ItemId | None = Field(None, description="may be omitted; otherwise it must be the id in the path")
    model: str = Field(
        "auto", max_length=256, description="name of the served model; auto and an empty value also mean this model"
    )


class ItemPutOptions(Options):
    """The options of `PUT /v1/collections/{name}/items/{id}` with an image. They are query parameters, or form fields
    if the body is a form."""

    metadata: str | None = Field(None, description="metadata of the item, as the text of a JSON object")
    source: str | None = Field(None, description="source of the item")


class ItemQuery(Schema):
    """The query parameters of `GET /v1/collections/{name}/items/{id}`."""

    include: Include = Field(default_factory=list)
    encoding_format: Encoding = Field("float", description="encoding of the vector; base64: little-endian float32")


class PatchIn(Body):
    """The body of `PATCH /v1/collections/{name}/items/{id}`. It has `metadata`, `source` or both."""

    metadata: dict[str, Any] | None = Field(
        None, description="JSON merge patch (RFC 7396) for the metadata: null removes a key"
    )
    source: str | None = Field(
        None, max_length=MAX_SOURCE_CHARACTERS, description="new source of the item; an empty string removes it"
    )


class OrderIn(Body):
    """The order of listed items: by the value of a metadata key."""

    key: str = Field(description="metadata key, as in a filter")
    direction: Literal["asc", "desc"] = Field("asc", description="asc: smallest value first; desc: largest value first")


class ScrollIn(Body):
    """The body of `POST /v1/collections/{name}/items/scroll`."""

    filter: Where | None = Field(None, description="condition on the items' metadata or ids")
    order_by: OrderIn | None = Field(None, description="order of the items; unset: the store's own order")
    cursor: str | None = Field(
        None, max_length=100_000, description="cursor from the answer with the previous page; unset: first page"
    )
    limit: Whole = Field(100, ge=1, le=1000)
    include: Include = Field(default_factory=list)
    encoding_format: Encoding = "float"


class CountIn(Body):
    """The body of `POST /v1/collections/{name}/items/count`."""

    filter: Where | None = Field(None, description="condition on the items' metadata or ids")


class FacetsIn(Body):
    """The body of `POST /v1/collections/{name}/items/facets`."""

    key: str = Field(description="metadata key whose values are counted")
    filter: Where | None = Field(None, description="condition on the items' metadata or ids")
    limit: Whole = Field(
        100, ge=1, le=1000, description="highest number of values in the answer; the most frequent first"
    )


class DeleteIn(Body):
    """The body of `POST /v1/collections/{name}/items/delete`. It has either `ids` or `filter`."""

    ids: Annotated[list[ItemId] | None, FailFast()] = Field(None, min_length=1, max_length=10_000)
    filter: Where | None = Field(None, description="condition on the items' metadata or ids")


class IndexIn(Body):
    """The index settings of a collection. Settings that do not apply to the chosen kind of index are ignored."""

    kind: Kind = Field("auto", description="kind of index; auto: the service chooses it by the number of items")
    m: OptionalWhole = Field(None, ge=M[0], le=M[1], description=f"{kinds_with('m')}: number of neighbours of a node")
    ef_construction: OptionalWhole = Field(
        None,
        ge=EF_CONSTRUCTION[0],
        le=EF_CONSTRUCTION[1],
        description=f"{kinds_with('ef_construction')}: number of candidates for the neighbours of a node",
    )
    n_lists: OptionalWhole = Field(
        None, ge=N_LISTS[0], le=N_LISTS[1], description=f"{kinds_with('n_lists')}: number of inverted lists"
    )
    target_recall: float = Field(
        0.98,
        ge=TARGET_RECALL[0],
        le=TARGET_RECALL[1],
        description="share of the ten nearest items that searches should find",
    )


class CollectionIn(Options):
    """The body of `PUT /v1/collections/{name}`."""

    model_config = ConfigDict(strict=True)

    pooling: Pooling = Field(DEFAULT_POOLING, description=POOLING_DESCRIPTION)
    dtype: DType = Field("float32", description="data type of stored vectors")
    index: IndexIn = Field(default_factory=lambda: IndexIn.model_validate({}))
    indexed: Annotated[list[str], FailFast()] = Field(
        default_factory=list,
        max_length=MAX_INDEXED,
        description="metadata keys with an index, which makes filters faster",
    )
    originals: bool = Field(False, description="whether to store the original images")
    fingerprint: Fingerprint | None = Field(
        None, description="fingerprint of a model other than the served one; the collection then accepts no images"
    )
    dimension: OptionalWhole = Field(
        None,
        ge=1,
        le=MAX_DIMENSION,
        description="dimension of the vectors; required with the fingerprint of another model",
    )


class CollectionPatchIn(Body):
    """The body of `PATCH /v1/collections/{name}`."""

    indexed: Annotated[list[str], FailFast()] = Field(
        max_length=MAX_INDEXED, description="metadata keys that have an index; replaces the current list"
    )


class AliasIn(Body):
    """The body of `PUT /v1/aliases/{alias}`."""

    collection: CollectionName = Field(description="collection that the alias will point to")


class RollbackIn(Body):
    """The body of `POST /v1/models/rollback`."""

    force: bool = Field(False, description="go back even if items were written without an image since the switch")
    keep_hours: float = Field(
        24.0, ge=0, le=8760, description="time in hours for which going forward again is possible", allow_inf_nan=False
    )


class LoadModelIn(Body):
    """The body of `POST /v1/models/load` and `POST /v1/models/unload`."""

    model: str = Field(min_length=1, max_length=200, description="name or fingerprint of a model")


class RemoveModelIn(Body):
    """The body of `DELETE /v1/models/{name}`."""

    force: bool = Field(False, description="remove the model even if collections have vectors of it")


class SnapshotIn(Body):
    """The body of `POST /v1/collections/{name}/snapshots`. It has no fields."""


class RestoreIn(Body):
    """The body of `POST /v1/collections/{name}/restore`."""

    snapshot: str = Field(max_length=128, description="name of a snapshot, such as 20260131T235959.123Z")
    source: CollectionName | None = Field(
        None, alias="from", description="collection from which the snapshot was taken; default: the name in the path"
    )


# Stored images


class EraseImageQuery(Schema):
    """The query parameters of `DELETE /v1/originals/{digest}`."""

    items: Literal["refuse", "keep", "delete"] = Field(
        "refuse",
        description="if items refer to the image: refuse to erase it, keep the items without it, or delete them too",
    )


class EraseImagesIn(Body):
    """The body of `POST /v1/originals/erase-unreferenced`."""

    dry_run: bool = Field(False, description="erase nothing, and only count the images")


# Searching


MAX_PARTS = 16
MAX_RUNS = 1_000_000
QueryVector = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": MAX_DIMENSION},
                {"type": "string", "contentEncoding": "base64", "minLength": 8},
            ]
        }
    ),
]
"""A vector in a search request. `read_vector` checks it. pydantic does not, because pydantic would first create a list
of floats."""
ModelPrint = Annotated[str, Field(max_length=64)]
Side = Annotated[float, Field(allow_inf_nan=False)]
Run = Annotated[int, Field(ge=0, le=2**31), FROM_FLOAT]
Score = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]


class PartIn(Body):
    """One part of a combined query. It has exactly one of `image`, `vector` and `id`."""

    image: Image = Field(
        None, description="image as a data URL, base64 or https URL, or as an object that contains one of them"
    )
    vector: QueryVector = None
    fingerprint: ModelPrint | None = Field(None, description="fingerprint of the model that made `vector`")
    id: ItemId | None = Field(None, description="id of an item of the collection")
    weight: float = Field(
        1.0,
        ge=-1000,
        le=1000,
        allow_inf_nan=False,
        description="weight of this part; negative: find items that differ from it",
    )


def _run_lengths(counts: Any) -> Any:
    """Return `counts` if it is a string of at most MAX_RUNS characters or a list of at most MAX_RUNS elements, and
    raise PydanticCustomError otherwise. The schema does not use a union type, because pydantic would then report a
    separate error for each type in the union."""
    if not isinstance(counts, str | list) or len(counts) > MAX_RUNS:
        raise PydanticCustomError(
            "run_lengths", f"must be a COCO run-length string or a list of integers, at most {MAX_RUNS:,} long"
        )
    return counts


class MaskIn(Body):
    """A mask as COCO run lengths: either a compressed string, as `/v1/segment` and pycocotools return it, or a list of
    numbers."""

    size: Annotated[list[Run], FailFast()] = Field(
        min_length=2, max_length=2, description="height and width of the upright image"
    )
    counts: Annotated[
        Any,
        AfterValidator(_run_lengths),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string", "maxLength": MAX_RUNS},
                    {"type": "array", "items": {"type": "integer"}, "maxItems": MAX_RUNS},
                ]
            }
        ),
    ]


class RegionIn(Body):
    """A region of an image. It has either `box` or `mask`."""

    image: Image = Field(
        description="image as a data URL, base64 or https URL, or as an object that contains one of them"
    )
    box: Annotated[list[Side] | None, FailFast()] = Field(
        None, min_length=4, max_length=4, description="[x, y, width, height] in pixels of the upright image"
    )
    mask: MaskIn | None = None


class ParamsIn(Body):
    """The parameters that determine how thoroughly a search uses the index. Parameters that do not apply to the
    collection's kind of index are ignored."""

    exact: bool = False
    ef_search: OptionalWhole = Field(
        None, ge=1, le=10_000, description=f"{kinds_with('ef_search')}: number of candidates to examine"
    )
    nprobe: OptionalWhole = Field(
        None, ge=1, le=65_536, description=f"{kinds_with('nprobe')}: number of inverted lists to search"
    )


class Ranking(Schema):
    """The options for filtering, ordering and returning search results. All kinds of queries have these options."""

    k: Whole = Field(10, ge=1, le=1000, description="number of results; with group_by, number of groups")
    offset: Whole = Field(
        0, ge=0, le=10_000, description="number of best results to skip; k + offset is at most 10,000"
    )
    filter: Annotated[Any, DocumentedAs(FilterIn)] = Field(None, description="condition on the items' metadata or ids")
    score_threshold: Score | None = Field(None, description="lowest score (cosine similarity) of a result")
    group_by: str | None = Field(None, min_length=1, max_length=256, description="metadata key to group results by")
    group_size: OptionalWhole = Field(None, ge=1, le=100, description="highest number of items in a group; default: 1")
    params: ParamsIn | None = None
    rerank: Literal["patches"] | None = Field(None, description="patches: re-order the best results by patch features")
    rerank_depth: OptionalWhole = Field(
        None, ge=1, le=100, description="number of results that are re-ordered; default: 20"
    )
    matches: bool = Field(False, description="return matching parts of the images; requires rerank")
    include: Annotated[list[Literal["vector"]], FailFast()] = Field(default_factory=list, max_length=1)


class QueryIn(Ranking):
    """One query. It has exactly one of `image`, `vector`, `id`, `combine` and `region`."""

    model_config = ConfigDict(strict=True)

    image: Image = Field(
        None, description="image as a data URL, base64 or https URL, or as an object that contains one of them"
    )
    vector: QueryVector = None
    fingerprint: ModelPrint | None = Field(None, description="fingerprint of the model that made `vector`")
    id: ItemId | None = Field(
        None, description="id of an item of the collection; the answer does not contain this item"
    )
    combine: list[PartIn] | None = Field(None, min_length=1, max_length=MAX_PARTS)
    region: RegionIn | None = None


class SearchIn(QueryIn):
    """The body of `POST /v1/collections/{name}/search`. It is either a single query or a list of queries in the field
    `queries`. If it is a list, options next to `queries`, such as `k` and `filter`, are defaults for all queries in the
    list."""

    model: str = Field(
        "auto", max_length=256, description="name of the served model; auto and an empty value also mean this model"
    )
    queries: Annotated[
        list[Any] | None, DocumentedAs(Annotated[list[QueryIn], Field(min_length=1, max_length=64)] | None)
    ] = Field(None, min_length=1, max_length=64, description="list of queries")
    on_error: Literal["fail", "partial"] = Field(
        "fail", description="partial: answer the valid queries and list the errors of the others"
    )


class SearchOptions(Ranking):
    """The options of a search with an image file. They are form fields or query parameters. `filter` and `params` are
    strings that contain JSON."""

    model: str = Field("auto", max_length=256)


class DuplicatesIn(Options):
    """The body of `POST /v1/collections/{name}/duplicates`."""

    model_config = ConfigDict(strict=True)

    by: Literal["content", "similarity"] = Field("content", description="compare the bytes of images, or their vectors")
    threshold: float | None = Field(
        None, ge=0.5, le=1, allow_inf_nan=False, description="lowest cosine similarity of duplicates; default: 0.95"
    )
    filter: Annotated[Any, DocumentedAs(FilterIn)] = Field(None, description="condition on the items' metadata or ids")
    params: ParamsIn | None = None
    limit: Whole = Field(
        100, ge=1, le=1000, description="highest number of groups in the answer; the largest come first"
    )
