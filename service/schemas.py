"""Schemas of requests. Answers have no schemas: routes serialise them directly, because making a pydantic object with
thousands of floats takes longer than a forward pass of a small model."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from model.pooling import DEFAULT_POOLING, POOLING_DESCRIPTION, Pooling
from service.search.kinds import Kind, kinds_with
from service.search.specs import EF_CONSTRUCTION, MAX_DIMENSION, MAX_INDEXED, N_LISTS, TARGET_RECALL, M
from service.search.store import MAX_ID_CHARACTERS, MAX_SOURCE_CHARACTERS, DType

Encoding = Literal["float", "base64"]
ItemId = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARACTERS)]
Vector = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]] | None,
    FailFast(),
    Field(min_length=1, max_length=MAX_DIMENSION),
]
Fingerprint = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:@+-]{1,64}$")]
Include = Annotated[list[Literal["vector"]], FailFast(), Field(max_length=1)]
Where = Annotated[dict[str, Any], Field(description="condition on the metadata")]


class Options(BaseModel):
    """Fields that every request with images may have. An unknown field is an error, so that a typo is not silently
    ignored."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field("auto", max_length=256, description="empty or auto: the served model; else one of its names")


class EmbeddingOptions(Options):
    """Options of an embedding request: JSON fields, form fields or query parameters, depending on the kind of body."""

    encoding_format: Literal["float", "base64"] = Field("float", description="base64: little-endian float32")
    dimensions: int | None = Field(None, description="only the model's own dimension: vectors are never truncated")
    user: str | None = Field(None, max_length=256, description="accepted for OpenAI clients, ignored")
    pooling: Pooling = Field(DEFAULT_POOLING, description=POOLING_DESCRIPTION)
    normalize: bool = Field(True, description="scale every vector to length 1")
    on_error: Literal["fail", "partial"] = Field("fail", description="partial: answer good items and list bad ones")


class SegmentOptions(Options):
    """Options of `/v1/segment`."""

    format: Literal["png", "rle", "overlay"] = Field(
        "png", description="mask, COCO RLE in JSON, or mask drawn over the image"
    )
    include: Annotated[list[Literal["embedding"]], FailFast()] = Field(
        default_factory=list, max_length=1, description="from the same forward pass; the answer is JSON"
    )
    pooling: Pooling = Field(DEFAULT_POOLING, description="pooling of the embedding")
    normalize: bool = Field(True, description="scale the embedding to length 1")


class Body(BaseModel):
    """A request body that is always JSON. Its values must have the right JSON type: the string "1" is not accepted as a
    number, nor "yes" as a boolean."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ItemIn(Body):
    """One item to add to a collection. It has an image or a vector."""

    id: ItemId | None = Field(None, description="your id; default: the sha256 of the image's bytes")
    image: str | None = Field(None, description="data URL or base64; either this or `vector`")
    vector: Vector = Field(None, description="vector computed elsewhere; any length except zero")
    fingerprint: Fingerprint | None = Field(None, description="fingerprint of the model that made `vector`; checked")
    source: str | None = Field(
        None, max_length=MAX_SOURCE_CHARACTERS, description="where the image is; stored unchanged"
    )
    metadata: dict[str, Any] = Field(default_factory=dict, description="returned by searches")


class ItemsIn(Options):
    """Body of `POST /v1/collections/{name}/items`. Each item is checked when it is read."""

    items: Annotated[
        list[Any], WithJsonSchema({"type": "array", "minItems": 1, "items": ItemIn.model_json_schema()})
    ] = Field(min_length=1)
    on_error: Literal["fail", "partial"] = "fail"


class UploadOptions(Options):
    """Form fields of a file upload to a collection."""

    on_error: Literal["fail", "partial"] = "fail"


class ItemQuery(BaseModel):
    """Query parameters of `GET /v1/collections/{name}/items/{id}`."""

    model_config = ConfigDict(extra="forbid")

    include: Include = Field(default_factory=list)
    encoding_format: Encoding = Field("float", description="encoding of the vector; base64: little-endian float32")


class PatchIn(Body):
    """Body of `PATCH /v1/collections/{name}/items/{id}`."""

    metadata: dict[str, Any] = Field(description="merged into the item's metadata (RFC 7396): null removes a key")


class ScrollIn(Body):
    """Body of `POST /v1/collections/{name}/items/scroll`."""

    filter: Where | None = None
    cursor: str | None = Field(None, max_length=2048, description="cursor of the previous page")
    limit: int = Field(100, ge=1, le=1000)
    include: Include = Field(default_factory=list)
    encoding_format: Encoding = "float"


class CountIn(Body):
    """Body of `POST /v1/collections/{name}/items/count`."""

    filter: Where | None = None


class DeleteIn(Body):
    """Body of `POST /v1/collections/{name}/items/delete`. It has either `ids` or `filter`."""

    ids: Annotated[list[ItemId] | None, FailFast()] = Field(None, min_length=1, max_length=10_000)
    filter: Where | None = None


class IndexIn(Body):
    """Index settings of a collection. Settings that do not apply to the chosen kind are ignored."""

    kind: Kind = Field("auto", description="auto: by size")
    m: int | None = Field(None, ge=M[0], le=M[1], description=f"{kinds_with('m')}: neighbours of a node")
    ef_construction: int | None = Field(
        None,
        ge=EF_CONSTRUCTION[0],
        le=EF_CONSTRUCTION[1],
        description=f"{kinds_with('ef_construction')}: effort of the build",
    )
    n_lists: int | None = Field(
        None, ge=N_LISTS[0], le=N_LISTS[1], description=f"{kinds_with('n_lists')}: number of cells"
    )
    target_recall: float = Field(
        0.98, ge=TARGET_RECALL[0], le=TARGET_RECALL[1], description="share of the ten nearest that a search should find"
    )


class CollectionIn(Options):
    """Body of `PUT /v1/collections/{name}`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    pooling: Pooling = Field(DEFAULT_POOLING, description=POOLING_DESCRIPTION)
    dtype: DType = Field("float32", description="data type of stored vectors")
    index: IndexIn = Field(default_factory=lambda: IndexIn.model_validate({}))
    indexed: Annotated[list[str], FailFast()] = Field(
        default_factory=list, max_length=MAX_INDEXED, description="metadata keys that are indexed for filters"
    )
    originals: bool = Field(False, description="store the original images")
    fingerprint: Fingerprint | None = Field(
        None, description="fingerprint of another model; the collection then accepts only vectors"
    )
    dimension: int | None = Field(None, ge=1, le=MAX_DIMENSION, description="dimension of that model's vectors")


class AliasIn(Body):
    """Body of `PUT /v1/aliases/{alias}`."""

    collection: str = Field(description="collection that the alias shall point to")


class SnapshotIn(Body):
    """Body of `POST /v1/collections/{name}/snapshots`. It has no fields."""


class RestoreIn(Body):
    """Body of `POST /v1/collections/{name}/restore`."""

    snapshot: str = Field(max_length=128)
    source: str | None = Field(
        None, alias="from", description="collection of the snapshot; default: the name in the path"
    )


# Searching


MAX_PARTS = 16
MAX_RUNS = 1_000_000
QueryVector = Annotated[
    Any, WithJsonSchema({"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": MAX_DIMENSION})
]
"""A vector in a search. pydantic does not check it, because it would first make a list of floats. `read_vector` checks
it."""
ModelPrint = Annotated[str, Field(max_length=64)]
Side = Annotated[float, Field(allow_inf_nan=False)]
Run = Annotated[int, Field(ge=0, le=2**31)]
Score = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]


class PartIn(Body):
    """One part of `combine`. It has exactly one of image, vector and id."""

    image: str | None = Field(None, description="data URL or base64")
    vector: QueryVector = None
    fingerprint: ModelPrint | None = Field(None, description="fingerprint of the model that made `vector`")
    id: ItemId | None = Field(None, description="id of an item of the collection")
    weight: float = Field(1.0, ge=-1000, le=1000, allow_inf_nan=False, description="negative: unlike this")


def _run_lengths(counts: Any) -> Any:
    """Return run lengths if their type and length are allowed. The schema is not a union, because pydantic would then
    report an error for each alternative."""
    if not isinstance(counts, str | list) or len(counts) > MAX_RUNS:
        raise PydanticCustomError(
            "run_lengths", f"must be a COCO run-length string or a list of integers, at most {MAX_RUNS:,} long"
        )
    return counts


class MaskIn(Body):
    """A mask as COCO run lengths. They are compressed, as `/v1/segment` and pycocotools write them, or uncompressed."""

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
    """A region of an image. It has exactly one of box and mask."""

    image: str = Field(description="data URL or base64")
    box: Annotated[list[Side] | None, FailFast()] = Field(
        None, min_length=4, max_length=4, description="[x, y, width, height] in pixels of the upright image"
    )
    mask: MaskIn | None = None


class ParamsIn(Body):
    """How thoroughly a search uses the index. Parameters that do not apply to the collection's index kind are
    ignored."""

    exact: bool = False
    ef_search: int | None = Field(None, ge=1, le=10_000, description=kinds_with("ef_search"))
    nprobe: int | None = Field(None, ge=1, le=65_536, description=kinds_with("nprobe"))


class Ranking(BaseModel):
    """Options for the results of a search, the same for every form of query."""

    model_config = ConfigDict(extra="forbid")

    k: int = Field(10, ge=1, le=1000, description="number of results; with group_by, number of groups")
    offset: int = Field(0, ge=0, le=10_000, description="number of best results to skip; k + offset is at most 10,000")
    filter: Any = Field(None, description="condition on the metadata")
    score_threshold: Score | None = Field(None, description="lowest cosine")
    group_by: str | None = Field(None, min_length=1, max_length=256, description="metadata key")
    group_size: int | None = Field(None, ge=1, le=100, description="items in each group; default: 1")
    params: ParamsIn | None = None
    rerank: Literal["patches"] | None = Field(None, description="re-order by patch features")
    rerank_depth: int | None = Field(
        None, ge=1, le=100, description="number of results that are re-ordered; default: 20"
    )
    matches: bool = Field(False, description="with rerank: return where the images match")
    include: Annotated[list[Literal["vector"]], FailFast()] = Field(default_factory=list, max_length=1)


class QueryIn(Ranking):
    """One query. It has exactly one of image, vector, id, combine and region."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image: str | None = Field(None, description="data URL or base64")
    vector: QueryVector = None
    fingerprint: ModelPrint | None = Field(None, description="fingerprint of the model that made `vector`")
    id: ItemId | None = Field(None, description="id of an item of the collection, which is left out of the answer")
    combine: list[PartIn] | None = Field(None, min_length=1, max_length=MAX_PARTS)
    region: RegionIn | None = None


class SearchIn(QueryIn):
    """Body of `POST /v1/collections/{name}/search`. It is one query, or it has the list `queries`. Other fields next to
    `queries` are defaults for each query in the list."""

    model: str = Field("auto", max_length=256, description="empty or auto: the served model; else one of its names")
    queries: Annotated[
        list[Any] | None, WithJsonSchema({"type": "array", "items": {"type": "object"}, "maxItems": 64})
    ] = Field(None, min_length=1, max_length=64, description="several queries")
    on_error: Literal["fail", "partial"] = Field("fail", description="partial: answer good queries and list bad ones")


class SearchOptions(Ranking):
    """Options of a search by an image file, as query parameters or form fields. `filter` and `params` are JSON
    texts."""

    model: str = Field("auto", max_length=256)


class DuplicatesIn(Options):
    """Body of `POST /v1/collections/{name}/duplicates`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    by: Literal["content", "similarity"] = Field("content", description="equal bytes or similar vectors")
    threshold: float | None = Field(None, ge=0.5, le=1, allow_inf_nan=False, description="lowest cosine; default: 0.95")
    filter: Any = Field(None, description="condition on the metadata")
    params: ParamsIn | None = None
    limit: int = Field(100, ge=1, le=1000, description="limit of groups in the answer, largest first")


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a body, to be put into the OpenAPI document. References are replaced by what they refer
    to, because their targets are not part of that document."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def whole(part: Any) -> Any:
        if isinstance(part, list):
            return [whole(value) for value in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            rest = {name: value for name, value in part.items() if name != "$ref"}
            return whole(definitions[part["$ref"].rpartition("/")[2]] | rest)
        return {name: whole(value) for name, value in part.items()}

    answer = whole(schema)
    assert isinstance(answer, dict)
    return answer


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI fields of a route whose request body is JSON with this schema."""
    return {"requestBody": {"content": {"application/json": {"schema": json_schema(model)}}}}
