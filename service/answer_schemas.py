"""The types of all JSON answers. Routes build their answers as these types, which mypy checks, and the OpenAPI document
is made from them. Nothing checks an answer while the service runs, because validating thousands of floats takes longer
than a forward pass of a small model.
"""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from model.artifact import ParityRecord
from model.heads.record import Architecture
from model.heads.record import Kind as HeadKind
from model.pooling import Pooling
from model.preprocess import PreprocessSpec
from service.errors import ItemErrorBody
from service.schema_base import DocumentedAs
from service.search.kinds import Kind
from service.search.store import DType, Metadata

Vector = Annotated[Any, DocumentedAs(list[float] | str)]
"""A list of numbers, or the base64 text of little-endian float32 numbers if the request asks for it. Routes use numpy
arrays, which are serialised directly."""
FloatVector = Annotated[Any, DocumentedAs(list[float])]
Box = Annotated[Any, DocumentedAs(Annotated[list[float], Field(min_length=4, max_length=4)])]
"""[x, y, width, height] in pixels of the upright image."""
Timings = dict[str, float]
"""The duration of each stage in milliseconds."""
ListObject = Literal["list"]


class Identity(TypedDict):
    """The model whose vectors an answer is about."""

    model: Annotated[str | None, Field(description="name of the model; null if it is not loaded")]
    fingerprint: Annotated[str, Field(description="hash of the model's weights, architecture and preprocessing")]


class SnapshotIdentity(TypedDict):
    """The model whose vectors a snapshot contains. Both fields are null if it is unknown, for example because the
    snapshot is damaged."""

    model: str | None
    fingerprint: str | None


# Models and embeddings


class Usage(TypedDict):
    """The number of tokens that the network processed."""

    prompt_tokens: int
    total_tokens: int


class Embedding(TypedDict):
    """The embedding of one image."""

    object: Literal["embedding"]
    index: int
    embedding: Vector


class EmbeddingsAnswer(Identity):
    """The answer to `POST /v1/embeddings`."""

    object: ListObject
    data: list[Embedding]
    usage: Usage
    timings: Timings
    errors: NotRequired[list[ItemErrorBody]]


class TriedEngine(TypedDict):
    """An engine that was tried at startup."""

    engine: str
    outcome: Literal["serves", "passed over"]
    reason: str


class HeadAnswer(TypedDict):
    """A head of a model. It predicts classes, a class per pixel, or depth, or compares images with words."""

    name: str
    kind: HeadKind | Literal["words"]
    architecture: Architecture | Literal["dinotxt"]
    fingerprint: Annotated[str, Field(description="sha256 of the head's weights; for words, of the text encoder's")]
    blocks: Annotated[list[int], Field(description="blocks of the model whose tokens the head reads, from 0")]
    classes: Annotated[list[str], Field(description="names of the classes; empty for depth and words")]
    depth_range: Annotated[list[float] | None, Field(description="smallest and largest depth in metres")]
    metrics: Annotated[dict[str, Any], Field(description="measured on held-out images when the head was trained")]
    source: str
    created_at: str


class ModelAnswer(TypedDict):
    """The description of a model."""

    id: str
    object: Literal["model"]
    created: Annotated[int, Field(description="time of the export in seconds since 1970; 0 if unknown")]
    owned_by: str
    fingerprint: str
    aliases: list[str]
    dimensions: int
    patch_size: int
    input_size: list[int]
    preprocess: Annotated[dict[str, Any], DocumentedAs(PreprocessSpec)]
    engine: Annotated[str | None, Field(description="runtime that computes its vectors; null: it was never loaded")]
    precision: Annotated[str | None, Field(description="precision of its vectors; null: it was never loaded")]
    engines_tried: list[TriedEngine]
    parity: list[Annotated[dict[str, Any], DocumentedAs(ParityRecord)]]
    provenance: dict[str, Any]
    licence: str
    created_at: str
    heads: list[HeadAnswer]
    state: Annotated[
        Literal["live", "candidate", "former", "available", "retired"],
        Field(description="live answers requests; former can be rolled back to; available was never live"),
    ]
    loaded: Annotated[
        bool, Field(description="whether the process that answers has loaded it, so that requests may choose it")
    ]
    load_error: Annotated[str | None, Field(description="why the process that answers could not load it")]
    generation: Annotated[int | None, Field(description="number in the record of models; null: it was never live")]
    live_since: Annotated[str | None, Field(description="time at which it became live, in ISO 8601 format")]
    keep_until: Annotated[
        str | None, Field(description="end of the window for a rollback to a former model, in ISO 8601 format")
    ]
    metrics: Annotated[dict[str, Any], Field(description="what was measured when it was compared with the live model")]


class RolledBackAnswer(Identity):
    """The answer to `POST /v1/models/rollback`."""

    generation: int
    collections: Annotated[list[str], Field(description="collections that have vectors of this model again")]
    lacking: Annotated[
        dict[str, int], Field(description="number of items in each collection that were written without an image")
    ]
    created_since: Annotated[
        list[str], Field(description="collections that keep vectors of the other model, because they are newer")
    ]


class RemovedModel(TypedDict):
    """The answer to `DELETE /v1/models/{name}`."""

    id: str
    object: Literal["model"]
    deleted: Literal[True]


class ModelsAnswer(TypedDict):
    """The answer to `GET /v1/models`."""

    object: ListObject
    data: list[ModelAnswer]


class RunLengths(TypedDict):
    """A mask as COCO run lengths."""

    size: list[int]
    counts: str


class VisionAnswer(Identity):
    """The fields that the JSON answers of all vision tasks contain."""

    timings: Timings


# Collections and aliases


class IndexSettings(TypedDict):
    """The index settings of a collection. A setting that is null is chosen by the service."""

    kind: Kind
    m: int | None
    ef_construction: int | None
    n_lists: int | None
    target_recall: float


class Collection(TypedDict):
    """The settings of a collection, the number of its items, and the aliases that point to it."""

    name: str
    tag: str
    pooling: Pooling | None
    dimension: int
    dtype: DType
    index: Annotated[dict[str, Any], DocumentedAs(IndexSettings)]
    indexed: list[str]
    originals: bool
    count: int
    aliases: list[str]
    damaged: NotRequired[
        Annotated[
            bool, Field(description="true if the items can neither be read nor written, because rows are damaged")
        ]
    ]


class CollectionAnswer(Collection, Identity):
    """The description of one collection."""


class CollectionsAnswer(Identity):
    """The answer to `GET /v1/collections`."""

    object: ListObject
    data: list[Collection]


class DroppedCollection(Identity):
    """The answer to the deletion of a collection."""

    name: str
    deleted: Literal[True]


class StatsAnswer(Identity):
    """The answer to `GET /v1/collections/{name}/stats`."""

    collection: str
    stats: Annotated[dict[str, Any], Field(description="statistics about the index; the fields depend on the store")]


class Snapshot(TypedDict):
    """The description of a snapshot."""

    name: str
    collection: str
    created: str
    bytes: int
    count: Annotated[int | None, Field(description="number of items; null if the snapshot is damaged")]
    tag: Annotated[str | None, Field(description="tag of the vectors; null if the snapshot is damaged")]


class SnapshotAnswer(Snapshot, SnapshotIdentity):
    """The description of a new snapshot."""


class SnapshotsAnswer(SnapshotIdentity):
    """The answer to `GET /v1/collections/{name}/snapshots`."""

    object: ListObject
    data: list[Snapshot]


class DroppedSnapshot(SnapshotIdentity):
    """The answer to the deletion of a snapshot."""

    collection: str
    snapshot: str
    deleted: Literal[True]


class Alias(TypedDict):
    """An alias and the collection that it points to."""

    alias: str
    collection: str


class AliasesAnswer(Identity):
    """The answer to `GET /v1/aliases`."""

    object: ListObject
    data: list[Alias]


class MovedAlias(Alias, Identity):
    """The answer to `PUT /v1/aliases/{alias}`."""

    before: Annotated[
        str | None, Field(description="collection that the alias pointed to before; null for a new alias")
    ]


class DroppedAlias(Identity):
    """The answer to the deletion of an alias."""

    alias: str
    deleted: Literal[True]


# Items and searches


class ItemFields(TypedDict):
    """One item of a collection."""

    id: str
    metadata: Metadata
    source: str | None
    digest: Annotated[str | None, Field(description="sha256 of the image's bytes; null if a vector was sent instead")]
    vector: NotRequired[Vector]


class ItemAnswer(ItemFields, Identity):
    """One item, and the collection that contains it."""

    collection: str
    tag: str


class PatchedItem(ItemFields, Identity):
    """One item after a change to its metadata or source, and the collection that contains it."""

    collection: str


class WrittenItem(TypedDict):
    """The id of an item that was written. `index` is the position of the item in the request."""

    index: int
    id: str


class AddedItems(Identity):
    """The answer to `POST /v1/collections/{name}/items`."""

    collection: str
    count: int
    items: list[WrittenItem]
    errors: list[ItemErrorBody]
    timings: Timings


class PutItem(Identity):
    """The answer to `PUT /v1/collections/{name}/items/{id}`."""

    collection: str
    id: str
    created: Annotated[bool, Field(description="whether the item is new")]
    count: int
    timings: Timings


class FacetValue(TypedDict):
    """A value of a metadata key, and the number of items that have it."""

    value: str | int | float | bool
    count: int


class FacetsAnswer(Identity):
    """The answer to `POST /v1/collections/{name}/items/facets`."""

    object: ListObject
    collection: str
    tag: str
    key: str
    data: list[FacetValue]
    distinct: Annotated[int, Field(description="number of all distinct values, including those beyond the limit")]


class ItemsAnswer(Identity):
    """One page of items."""

    object: ListObject
    collection: str
    tag: str
    data: list[ItemFields]
    cursor: Annotated[str | None, Field(description="cursor of the next page; null: this page is the last")]


class CountAnswer(Identity):
    """The answer to `POST /v1/collections/{name}/items/count`."""

    collection: str
    count: int


class DeletedItem(Identity):
    """The answer to the deletion of one item."""

    collection: str
    id: str
    deleted: Literal[True]


class DeletedItems(Identity):
    """The answer to `POST /v1/collections/{name}/items/delete`."""

    collection: str
    deleted: int


class ImageReference(TypedDict):
    """An item that refers to a stored image."""

    collection: str
    id: str


class ErasedImage(TypedDict):
    """The answer to `DELETE /v1/originals/{digest}`. `references` is the number of items that referred to the image,
    and `items` lists the first of them."""

    digest: str
    erased: Literal[True]
    bytes: int
    references: int
    items: list[ImageReference]
    items_deleted: bool


class ErasedImages(TypedDict):
    """The answer to `POST /v1/originals/erase-unreferenced`. `erased` is false after a dry run."""

    images: int
    bytes: int
    erased: bool


class PatchMatch(TypedDict):
    """A part of the query's image (`query_box`) and the part of the result's image (`box`) that matches it."""

    query_box: Box
    box: Box
    score: float


class HitFields(TypedDict):
    """One result of a search."""

    id: str
    score: float
    metadata: Metadata
    source: NotRequired[str]
    rerank_score: NotRequired[float]
    matches: NotRequired[Annotated[list[dict[str, Any]], DocumentedAs(list[PatchMatch])]]
    vector: NotRequired[FloatVector]


class HitGroup(TypedDict):
    """Results with the same value of the key in `group_by`."""

    value: str | int | float | bool
    data: list[HitFields]


class QueryAnswer(TypedDict):
    """The results of one query: `data`, or with `group_by`, `groups` and `truncated`."""

    data: NotRequired[list[HitFields]]
    groups: NotRequired[list[HitGroup]]
    truncated: NotRequired[bool]


class IndexedQueryAnswer(QueryAnswer):
    """The results of one query in a list. `index` is its position in the request."""

    index: int


class BatchAnswer(TypedDict):
    """The results of a list of queries. With `on_error=partial`, `errors` lists the queries that failed."""

    results: list[IndexedQueryAnswer]
    errors: NotRequired[list[ItemErrorBody]]


class SearchAnswer(QueryAnswer, Identity):
    """The answer to `POST /v1/collections/{name}/search`. For a list of queries, it has `results` and, with
    `on_error=partial`, the `errors` of the queries that failed."""

    object: ListObject
    collection: str
    results: NotRequired[list[IndexedQueryAnswer]]
    errors: NotRequired[list[ItemErrorBody]]
    timings: Timings


class DuplicateItem(TypedDict):
    """An item in a group of duplicates. `score` is its cosine similarity to the group's first item."""

    id: str
    score: float


class DuplicateGroup(TypedDict):
    """A group of duplicates. `digest` is the sha256 that its images share."""

    digest: NotRequired[str]
    items: list[DuplicateItem]


class DuplicatesAnswer(Identity):
    """The answer to `POST /v1/collections/{name}/duplicates`."""

    object: ListObject
    collection: str
    groups: list[DuplicateGroup]
    total_groups: int
    compared: int
    without_digest: int
    truncated: bool
    timings: Timings


# Health


class LivezAnswer(TypedDict):
    """The answer to `GET /livez`."""

    status: Literal["alive", "dead"]
    reason: NotRequired[str]


class CacheStatus(TypedDict):
    """The state of the vector cache."""

    name: str
    status: str


class ReadyzAnswer(Identity):
    """The answer to `GET /readyz`."""

    status: Literal["ready", "degraded", "unready"]
    reasons: NotRequired[
        Annotated[dict[str, str], Field(description="what is wrong, by part, if the service is unready or degraded")]
    ]
    cache: CacheStatus
    unsearchable_collections: Annotated[
        int, Field(description="number of collections whose model is not loaded, so they cannot be searched by image")
    ]
