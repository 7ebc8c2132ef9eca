"""What requests may say. Bodies of answers are written straight to JSON by the routes: building and checking a pydantic
object for every one of thousands of floats costs more than a small model's forward pass.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from model.pooling import DEFAULT_POOLING, Pooling
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
Where = Annotated[dict[str, Any], Field(description="conditions on the metadata")]


class Options(BaseModel):
    """Fields of every request with images; an unknown field is an error, so that a typo is not silently ignored."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field("auto", max_length=256, description="empty or auto: the model served; else one of its names")


class EmbeddingOptions(Options):
    """What may stand beside the images: JSON fields, form fields or query parameters, by the kind of body."""

    encoding_format: Literal["float", "base64"] = Field("float", description="base64: little-endian float32")
    dimensions: int | None = Field(None, description="only the model's own: vectors are never cut short")
    user: str | None = Field(None, max_length=256, description="accepted for OpenAI's clients, not used")
    pooling: Pooling = Field(DEFAULT_POOLING, description="class token, mean of the patch tokens, or both joined")
    normalize: bool = Field(True, description="scale every vector to length 1")
    on_error: Literal["fail", "partial"] = Field("fail", description="partial: answer the good items, list the bad")


class SegmentOptions(Options):
    """Options of `/v1/segment`."""

    format: Literal["png", "rle", "overlay"] = Field("png", description="mask, COCO RLE in JSON, or mask over image")
    include: Annotated[list[Literal["embedding"]], FailFast()] = Field(
        default_factory=list, max_length=1, description="from the same pass; the answer is JSON"
    )
    pooling: Pooling = Field(DEFAULT_POOLING, description="of the embedding")
    normalize: bool = Field(True, description="of the embedding")


class Body(BaseModel):
    """A body that comes as JSON only, so its values have JSON's types: "1" is no number and "yes" no boolean."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ItemIn(Body):
    """One image or vector for a collection."""

    id: ItemId | None = Field(None, description="yours; left out: the sha256 of the image's bytes")
    image: str | None = Field(None, description="data URL or base64; this or `vector`")
    vector: Vector = Field(None, description="made elsewhere; of any length but zero")
    fingerprint: Fingerprint | None = Field(None, description="of the model that made `vector`; checked")
    source: str | None = Field(None, max_length=MAX_SOURCE_CHARACTERS, description="where the image is; kept as given")
    metadata: dict[str, Any] = Field(default_factory=dict, description="given back by searches")


class ItemsIn(Options):
    """Body of `POST /v1/collections/{name}/items`. What is wrong with one item is found when that item is read."""

    items: Annotated[
        list[Any], WithJsonSchema({"type": "array", "minItems": 1, "items": ItemIn.model_json_schema()})
    ] = Field(min_length=1)
    on_error: Literal["fail", "partial"] = "fail"


class UploadOptions(Options):
    """Form fields of an upload of files into a collection."""

    on_error: Literal["fail", "partial"] = "fail"


class ItemQuery(BaseModel):
    """Query parameters of `GET /v1/collections/{name}/items/{id}`."""

    model_config = ConfigDict(extra="forbid")

    include: Include = Field(default_factory=list)
    encoding_format: Encoding = Field("float", description="of the vector; base64: little-endian float32")


class PatchIn(Body):
    """Body of `PATCH /v1/collections/{name}/items/{id}`."""

    metadata: dict[str, Any] = Field(description="merged into the item's (RFC 7396): null removes a key")


class ScrollIn(Body):
    """Body of `POST /v1/collections/{name}/items/scroll`."""

    filter: Where | None = None
    cursor: str | None = Field(None, max_length=2048, description="of the page before")
    limit: int = Field(100, ge=1, le=1000)
    include: Include = Field(default_factory=list)
    encoding_format: Encoding = "float"


class CountIn(Body):
    """Body of `POST /v1/collections/{name}/items/count`."""

    filter: Where | None = None


class DeleteIn(Body):
    """Body of `POST /v1/collections/{name}/items/delete`: one of both."""

    ids: Annotated[list[ItemId] | None, FailFast()] = Field(None, min_length=1, max_length=10_000)
    filter: Where | None = None


class IndexIn(Body):
    """How a collection is indexed; what does not concern the kind is ignored. Limits as `check_spec` has them, here for
    the documentation and so that all that is wrong is told at once."""

    kind: Kind = Field("auto", description="auto: by size")
    m: int | None = Field(None, ge=M[0], le=M[1], description=f"{kinds_with('m')}: neighbours of a node")
    ef_construction: int | None = Field(
        None,
        ge=EF_CONSTRUCTION[0],
        le=EF_CONSTRUCTION[1],
        description=f"{kinds_with('ef_construction')}: how carefully it is built",
    )
    n_lists: int | None = Field(None, ge=N_LISTS[0], le=N_LISTS[1], description=f"{kinds_with('n_lists')}: cells")
    target_recall: float = Field(0.98, ge=TARGET_RECALL[0], le=TARGET_RECALL[1], description="of the ten nearest")


class CollectionIn(Options):
    """Body of `PUT /v1/collections/{name}`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    pooling: Pooling = Field(DEFAULT_POOLING, description="class token, mean of the patch tokens, or both joined")
    dtype: DType = Field("float32", description="as stored")
    index: IndexIn = Field(default_factory=lambda: IndexIn.model_validate({}))
    indexed: Annotated[list[str], FailFast()] = Field(
        default_factory=list, max_length=MAX_INDEXED, description="metadata keys that filters find fast"
    )
    originals: bool = Field(False, description="keep the images")
    fingerprint: Fingerprint | None = Field(None, description="of a model that is not served: vectors only")
    dimension: int | None = Field(None, ge=1, le=MAX_DIMENSION, description="of that model's vectors")


class AliasIn(Body):
    """Body of `PUT /v1/aliases/{alias}`."""

    collection: str = Field(description="what the alias leads to from now on")


class SnapshotIn(Body):
    """Body of `POST /v1/collections/{name}/snapshots`: nothing to say."""


class RestoreIn(Body):
    """Body of `POST /v1/collections/{name}/restore`."""

    snapshot: str = Field(max_length=128)
    source: str | None = Field(None, alias="from", description="the collection it was made of; left out: this name")


# Searching


MAX_PARTS = 16
MAX_RUNS = 1_000_000
QueryVector = Annotated[
    Any, WithJsonSchema({"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": MAX_DIMENSION})
]
"""Checked as one array by the route: pydantic would build a list of floats first."""
ModelPrint = Annotated[str, Field(max_length=64)]
Side = Annotated[float, Field(allow_inf_nan=False)]
Run = Annotated[int, Field(ge=0, le=2**31)]
Score = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]


class PartIn(Body):
    """One of what is combined: exactly one of image, vector, id."""

    image: str | None = Field(None, description="data URL or base64")
    vector: QueryVector = None
    fingerprint: ModelPrint | None = Field(None, description="of the model that made `vector`")
    id: ItemId | None = Field(None, description="an item of the collection")
    weight: float = Field(1.0, ge=-1000, le=1000, allow_inf_nan=False, description="negative: not like this")


def _run_lengths(counts: Any) -> Any:
    """One fault in one sentence: of a union, pydantic would tell what is wrong with each of its kinds."""
    if not isinstance(counts, str | list) or len(counts) > MAX_RUNS:
        raise PydanticCustomError(
            "run_lengths", f"a COCO run-length string, or a list of whole numbers, at most {MAX_RUNS:,} long, is needed"
        )
    return counts


class MaskIn(Body):
    """COCO run lengths, as `/v1/segment` and pycocotools write them, or uncompressed."""

    size: Annotated[list[Run], FailFast()] = Field(
        min_length=2, max_length=2, description="height and width of the image, upright"
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
    """A part of an image: exactly one of box and mask."""

    image: str = Field(description="data URL or base64")
    box: Annotated[list[Side] | None, FailFast()] = Field(
        None, min_length=4, max_length=4, description="[x, y, width, height], pixels, upright"
    )
    mask: MaskIn | None = None


class ParamsIn(Body):
    """How hard the index tries; what does not concern its kind is ignored."""

    exact: bool = False
    ef_search: int | None = Field(None, ge=1, le=10_000, description=kinds_with("ef_search"))
    nprobe: int | None = Field(None, ge=1, le=65_536, description=kinds_with("nprobe"))


class Ranking(BaseModel):
    """What is done with what a search finds: the same for every form of query."""

    model_config = ConfigDict(extra="forbid")

    k: int = Field(10, ge=1, le=1000, description="how many; with group_by, how many groups")
    offset: int = Field(0, ge=0, le=10_000, description="how many of the best to leave out; with k at most 10,000")
    filter: Any = Field(None, description="a condition on metadata")
    score_threshold: Score | None = Field(None, description="the least cosine")
    group_by: str | None = Field(None, min_length=1, max_length=256, description="metadata key")
    group_size: int | None = Field(None, ge=1, le=100, description="items of each group; unset: 1")
    params: ParamsIn | None = None
    rerank: Literal["patches"] | None = Field(None, description="re-order by patch features")
    rerank_depth: int | None = Field(None, ge=1, le=100, description="how many are re-ordered; unset: 20")
    matches: bool = Field(False, description="with rerank: where the images match")
    include: Annotated[list[Literal["vector"]], FailFast()] = Field(default_factory=list, max_length=1)


class QueryIn(Ranking):
    """One query: exactly one of image, vector, id, combine, region."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image: str | None = Field(None, description="data URL or base64")
    vector: QueryVector = None
    fingerprint: ModelPrint | None = Field(None, description="of the model that made `vector`")
    id: ItemId | None = Field(None, description="an item of the collection; it is left out of the answer")
    combine: list[PartIn] | None = Field(None, min_length=1, max_length=MAX_PARTS)
    region: RegionIn | None = None


class SearchIn(QueryIn):
    """Body of `POST /v1/collections/{name}/search`: one query, or `queries`; what stands beside these holds for each
    that does not say otherwise."""

    model: str = Field("auto", max_length=256, description="empty or auto: the model served; else one of its names")
    queries: Annotated[
        list[Any] | None, WithJsonSchema({"type": "array", "items": {"type": "object"}, "maxItems": 64})
    ] = Field(None, min_length=1, max_length=64, description="queries of their own")
    on_error: Literal["fail", "partial"] = Field("fail", description="partial: answer the good queries, list the bad")


class SearchOptions(Ranking):
    """Query parameters or form fields of a search by file; `filter` and `params` as JSON text."""

    model: str = Field("auto", max_length=256)


class DuplicatesIn(Options):
    """Body of `POST /v1/collections/{name}/duplicates`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    by: Literal["content", "similarity"] = Field("content", description="equal bytes, or vectors near each other")
    threshold: float | None = Field(None, ge=0.5, le=1, allow_inf_nan=False, description="cosine; unset: 0.95")
    filter: Any = Field(None, description="a condition on metadata")
    params: ParamsIn | None = None
    limit: int = Field(100, ge=1, le=1000, description="groups in the answer, largest first")


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """A body's schema as it stands within OpenAPI's: whole, since references would point into nothing there."""
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
    """OpenAPI's `requestBody` of a route that takes this and nothing else."""
    return {"requestBody": {"content": {"application/json": {"schema": json_schema(model)}}}}
