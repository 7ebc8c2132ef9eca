"""What the service asks of a vector store, whatever stands behind it.

Vectors compare only if the same model made them in the same way, so every collection has a `tag` (the model's
fingerprint with pooling, normalisation, input size and precision) and a dimension, both set by its first write. A write
or search with another tag is a 409 that names both.

Scores are cosine similarities, -1 to 1: vectors are normalised when they are written and when they are searched for.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import orjson

from service.errors import Conflict, InvalidRequest, ModelMismatch
from service.search.filters import Filter

Floats = npt.NDArray[np.float32]
Metadata = Mapping[str, Any]
Kind = Literal["auto", "flat", "hnsw", "ivf_pq", "rabitq"]
DType = Literal["float32", "float16"]

MAX_K: Final = 1000
MAX_DEPTH: Final = 10_000
"""How far down one search may look: k with offset, or what a grouping goes through."""
MAX_ID_CHARACTERS: Final = 256
MAX_METADATA_BYTES: Final = 64 * 2**10
MAX_SOURCE_CHARACTERS: Final = 2048

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_ZERO: Final = re.compile(r"(?<!\\)(\\\\)*\\u0000")  # in JSON: not behind a backslash that is itself escaped


@dataclass(frozen=True)
class Item:
    """One vector of a collection. Read back, the vector [D] has length 1."""

    id: str
    vector: Floats
    metadata: Metadata = field(default_factory=dict)
    source: str | None = None  # where the photo is: an address, or a stored original
    digest: str | None = None  # sha256 of the photo's bytes, in hex: exact duplicates have the same


class Hit(NamedTuple):
    """One result of a search; `score` is the cosine similarity."""

    id: str
    score: float
    metadata: Metadata
    source: str | None = None


@dataclass(frozen=True)
class IndexSpec:
    """How a collection is indexed; a store that has no choice ignores what does not concern it.

    `auto` goes by size. The parameters are those of the kinds that have them; None takes what suits the size.
    """

    kind: Kind = "auto"
    m: int | None = None  # hnsw: neighbours of a node
    ef_construction: int | None = None  # hnsw: how carefully the graph is built
    n_lists: int | None = None  # ivf_pq, rabitq: cells
    target_recall: float = 0.98  # of the ten nearest; search parameters are tuned for it


@dataclass(frozen=True)
class CollectionSpec:
    """What a collection is, fixed when it is made; what is allowed says `service/search/specs.py`."""

    tag: str  # what made its vectors: two vectors compare only if their tags are equal
    dimension: int
    dtype: DType = "float32"  # as stored
    index: IndexSpec = field(default_factory=IndexSpec)
    indexed: tuple[str, ...] = ()  # metadata keys that filters find without looking at every item
    originals: bool = False  # whether photos are kept beside their vectors


@dataclass(frozen=True)
class CollectionInfo:
    name: str
    spec: CollectionSpec
    count: int

    @property
    def tag(self) -> str:
        return self.spec.tag

    @property
    def dimension(self) -> int:
        return self.spec.dimension


@dataclass(frozen=True)
class SearchParams:
    """How hard one search tries; None takes what the store was tuned to. What does not concern a kind is ignored."""

    exact: bool = False
    ef_search: int | None = None  # hnsw
    nprobe: int | None = None  # ivf_pq, rabitq


@dataclass(frozen=True)
class Page:
    """Some items in the store's own order; `cursor` continues after them, None at the end."""

    items: list[Item]
    cursor: str | None


@dataclass(frozen=True)
class SnapshotInfo:
    """A collection kept as it was; `created` is ISO 8601, UTC, and the count None when the snapshot is damaged."""

    name: str
    collection: str
    created: str
    bytes: int
    count: int | None


class VectorStore(Protocol):
    """Collections of items with string ids, and aliases of collections. Calls may overlap; a write that has returned is
    durable, and every later call sees it.

    Wherever a collection is named, an alias may be.

    Raises, everywhere: CollectionNotFound; InvalidRequest for names, settings, ids, vectors, metadata or numbers that
    are not allowed; ModelMismatch or Conflict for another tag or dimension; StorageFailed when the storage behind it
    fails.
    """

    capabilities: frozenset[str]
    """What this store can do beyond the protocol: `atomic_upsert` (all or none of a call), `idempotency`, `snapshots`,
    `index_kinds` (follows `IndexSpec`), `stats`."""

    async def create(self, collection: str, spec: CollectionSpec) -> CollectionInfo:
        """Makes a collection; one that exists with the same spec is left as it is.

        Raises:
            Conflict: the name is taken by an alias, or by a collection with another spec.
        """

    async def collections(self) -> list[CollectionInfo]:
        """All of them, by name."""

    async def info(self, collection: str) -> CollectionInfo: ...

    async def drop(self, collection: str) -> None:
        """A collection by its own name, with all its items.

        Raises:
            Conflict: an alias leads to it, or the name is an alias.
        """

    async def aliases(self) -> dict[str, str]:
        """Alias -> collection."""

    async def set_alias(self, alias: str, collection: str) -> str | None:
        """Points the alias to the collection, from one moment to the next; where it pointed before.

        Raises:
            Conflict: a collection has this name.
        """

    async def drop_alias(self, alias: str) -> None:
        """Raises CollectionNotFound when there is none."""

    async def upsert(
        self, collection: str, items: Sequence[Item], *, tag: str, request_key: str | None = None
    ) -> CollectionInfo:
        """Adds the items, replaces those whose id exists. Of equal ids in one call the last wins. The first write to a
        name makes the collection, with the defaults.

        `request_key`: a second call with the same key within a day changes nothing (`idempotency`).

        Raises:
            Conflict: the key was used with other items.
        """

    async def get(self, collection: str, ids: Sequence[str]) -> list[Item | None]:
        """In the order of the ids; None for those that do not exist."""

    async def patch(self, collection: str, item_id: str, metadata: Metadata) -> Item:
        """Merges into the item's metadata (RFC 7396: null removes a key); the item as it is then.

        Raises:
            ItemNotFound: there is no such item.
        """

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        """How many there were."""

    async def delete_where(self, collection: str, where: Filter) -> int:
        """How many there were."""

    async def count(self, collection: str, where: Filter | None = None) -> int: ...

    async def scroll(
        self, collection: str, *, where: Filter | None = None, cursor: str | None = None, limit: int = 100
    ) -> Page:
        """Items page by page. What is there from the first page to the last is seen exactly once; what is written or
        deleted meanwhile may or may not be seen.

        Raises:
            InvalidRequest: the cursor is none of this store's.
        """

    async def search(
        self,
        collection: str,
        vectors: npt.ArrayLike,
        k: int,
        *,
        tag: str,
        where: Filter | None = None,
        params: SearchParams | None = None,
    ) -> list[list[Hit]]:
        """For each of the vectors [n, D] of any scale its k nearest (to MAX_DEPTH), best first, equal scores by id;
        fewer if there are fewer."""

    async def close(self) -> None: ...


class SnapshotStore(VectorStore, Protocol):
    """A store that can keep a collection as it is now and bring it back (`snapshots`).

    Raises, wherever a snapshot is named: InvalidRequest for what is no name of one; NotFound when there is none;
    StorageFailed when it is damaged.
    """

    async def snapshot(self, collection: str) -> SnapshotInfo:
        """Keeps the collection as it is at one moment, while others write."""

    async def snapshots(self, collection: str) -> list[SnapshotInfo]:
        """Of one collection, oldest first. They outlive it."""

    async def snapshot_path(self, collection: str, name: str) -> Path:
        """The file that holds it."""

    async def drop_snapshot(self, collection: str, name: str) -> None: ...

    async def restore(self, collection: str, source: str, name: str) -> CollectionInfo:
        """Makes `collection` of the snapshot `name` of the collection `source`.

        Raises:
            Conflict: the name is taken.
        """


class StatsStore(VectorStore, Protocol):
    """A store that tells how a collection is indexed (`stats`)."""

    async def stats(self, collection: str) -> dict[str, Any]:
        """Whatever helps who looks after it, as JSON."""


def check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"collection name {name[:80]!r} is not allowed: 1 to 64 of a-z, 0-9, _ and -; no _ or - first",
            param="collection",
        )
    return name


def check_id(item_id: str, where: str = "id") -> str:
    """`where` names the field that holds it, for the message."""
    if not 1 <= len(item_id) <= MAX_ID_CHARACTERS or not item_id.isprintable():
        raise InvalidRequest(
            f"{where} {item_id[:80]!r} is not allowed: 1 to {MAX_ID_CHARACTERS} printable characters", param=where
        )
    return item_id


def check_k(k: int) -> int:
    if not 1 <= k <= MAX_DEPTH:
        raise InvalidRequest(f"k={k} is not allowed: 1 to {MAX_DEPTH}", param="k")
    return k


def check_match(info: CollectionInfo, *, tag: str, dimension: int) -> None:
    """The tag first: another model usually has another dimension too, and the tag says more."""
    if info.tag != tag:
        raise ModelMismatch(
            f"collection {info.name!r} holds vectors of {info.tag!r}; this one is of {tag!r}: they cannot be compared"
        )
    if info.dimension != dimension:
        raise Conflict(
            f"collection {info.name!r} holds vectors of dimension {info.dimension}; this one has {dimension}"
        )


def normalised(vector: npt.ArrayLike) -> Floats:
    """Vector [D] of any scale to float32 of length 1.

    Raises:
        InvalidRequest: not one-dimensional, empty, not finite, or all zero (it has no direction).
    """
    values = np.asarray(vector, np.float64)
    if values.ndim != 1 or not values.size:
        raise InvalidRequest(f"a vector must be a non-empty list of numbers, not of shape {list(values.shape)}")
    largest = float(np.abs(values).max())
    if not math.isfinite(largest):
        raise InvalidRequest("a vector must hold finite numbers only")
    if largest == 0:
        raise InvalidRequest("a vector of zeros has no direction, so nothing is similar to it")
    values = values / largest  # the squares of very large or small numbers would leave float64
    return (values / np.linalg.norm(values)).astype(np.float32)


def metadata_text(metadata: Metadata) -> str:
    """Metadata as the JSON that is stored.

    Raises:
        InvalidRequest: not a JSON object, nested too deeply to be answered with, too long, or with the character
            U+0000, at which SQLite before 3.45 ends a string, so that filters would go wrong.
    """
    try:
        text = json.dumps(dict(metadata), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        # As deep as in an answer (results, groups, hits): what orjson refuses would fail every search that finds it.
        orjson.dumps([[[[[[[dict(metadata)]]]]]]])
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"metadata must be a JSON object: {error}", param="metadata") from error
    if _ZERO.search(text):
        raise InvalidRequest("metadata must not hold the character U+0000", param="metadata")
    size = len(text.encode())
    if size > MAX_METADATA_BYTES:
        raise InvalidRequest(
            f"metadata has {size:,} bytes as JSON; at most {MAX_METADATA_BYTES:,} are accepted", param="metadata"
        )
    return text


def normalised_rows(vectors: npt.ArrayLike) -> Floats:
    """Vectors [n, D] of any scale to float32 of length 1, each row as `normalised` does.

    Raises:
        InvalidRequest: not two-dimensional, or one of them is not a direction.
    """
    values = np.asarray(vectors, np.float64)
    if values.ndim != 2 or not values.size:
        raise InvalidRequest(f"vectors must be a non-empty list of vectors, not of shape {list(values.shape)}")
    if len(values) == 1:  # the usual case; every function of numpy that a search goes through is felt
        with np.errstate(over="ignore"):
            square = float(values[0].dot(values[0]))
        if 1e-200 < square < 1e200:
            return (values / math.sqrt(square)).astype(np.float32)
    squares = np.einsum("nd,nd->n", values, values)
    if not (squares.min() > 1e-200 and squares.max() < 1e200):  # rare: not finite, zero, or out of float64 when squared
        return np.stack([normalised(row) for row in values])
    units: Floats = (values / np.sqrt(squares)[:, None]).astype(np.float32)
    return units


def merged(metadata: Metadata, patch: Metadata) -> dict[str, Any]:
    """Metadata with a merge patch (RFC 7396) applied: null removes, objects merge, anything else replaces."""
    result = dict(metadata)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            below = result.get(key)
            result[key] = merged(below if isinstance(below, Mapping) else {}, value)
        else:
            result[key] = value
    return result


def check_source(item: Item) -> Item:
    """Refuse an item whose source or digest could not be stored."""
    if item.source is not None and not (1 <= len(item.source) <= MAX_SOURCE_CHARACTERS and item.source.isprintable()):
        raise InvalidRequest(
            f"source {item.source[:80]!r} is not allowed: 1 to {MAX_SOURCE_CHARACTERS} printable characters",
            param="source",
        )
    if item.digest is not None and not re.fullmatch("[0-9a-f]{64}", item.digest):
        raise InvalidRequest(f"digest {item.digest[:80]!r} is not allowed: the sha256 in 64 hex digits", param="digest")
    return item


def checked_items(items: Sequence[Item]) -> tuple[list[tuple[Item, Floats, str]], int]:
    """What a call writes: each item with its vector of length 1 and the text of its metadata, of equal ids the last;
    and the vectors' dimension.

    Raises:
        InvalidRequest: there is none, or one of them is not allowed, or their dimensions differ.
    """
    if not items:
        raise InvalidRequest("no items to write")
    checked = {check_id(check_source(i).id): (i, normalised(i.vector), metadata_text(i.metadata)) for i in items}
    dimensions = {len(vector) for _, vector, _ in checked.values()}
    if len(dimensions) > 1:
        raise InvalidRequest("the vectors of one call must have the same dimension")
    return list(checked.values()), dimensions.pop()
