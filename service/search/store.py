"""The interface `VectorStore` and the types of its arguments and results. All vector stores implement it.

Vectors can be compared only if the same model made them in the same way. So every collection has a `tag` (the model's
fingerprint with pooling, normalisation, input size and precision) and a dimension, both set by its first write. A write
or search with another tag raises ModelMismatch (status 409); the message names both tags.

Scores are cosine similarities from -1 to 1, because stored vectors and queries are scaled to length 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from service.search.filters import Filter
from service.search.kinds import Kind

Floats = npt.NDArray[np.float32]
Metadata = Mapping[str, Any]
DType = Literal["float32", "float16"]

MAX_DEPTH: Final = 10_000
"""The highest k of one search of a store. It bounds the sum of k and offset of a request, and the number of hits that
grouping reads."""
MAX_ID_CHARACTERS: Final = 256
MAX_METADATA_BYTES: Final = 64 * 2**10
MAX_SOURCE_CHARACTERS: Final = 2048


@dataclass(frozen=True)
class Item:
    """One vector of a collection, with its id and metadata. `vector` is [D]; a store returns it scaled to length 1."""

    id: str
    vector: Floats
    metadata: Metadata = field(default_factory=dict)
    source: str | None = None  # location of the image: an address or a stored original
    digest: str | None = None  # sha256 of the image's bytes, in hex; equal for exact duplicates


class Hit(NamedTuple):
    """One result of a search. `score` is the cosine similarity to the query."""

    id: str
    score: float
    metadata: Metadata
    source: str | None = None


@dataclass(frozen=True)
class IndexSpec:
    """Index settings of a collection. A store ignores settings that it does not support.

    With the kind `auto`, the number of vectors determines the kind. A setting that is None gets a suitable default.
    `service/search/kinds.py` defines which settings apply to which kind.
    """

    kind: Kind = "auto"
    m: int | None = None  # neighbours of a node in a graph
    ef_construction: int | None = None  # how carefully a graph is built
    n_lists: int | None = None  # inverted lists
    target_recall: float = 0.98  # of the ten nearest; search parameters are tuned for it


@dataclass(frozen=True)
class CollectionSpec:
    """Settings of a collection. They are fixed when it is created. `service/search/specs.py` defines what is
    allowed."""

    tag: str  # identifies what made the vectors; only vectors with equal tags can be compared
    dimension: int
    dtype: DType = "float32"  # as stored
    index: IndexSpec = field(default_factory=IndexSpec)
    indexed: tuple[str, ...] = ()  # metadata keys with an index, so filters on them need not read every item
    originals: bool = False  # whether images are stored with their vectors


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
    """How thoroughly one search uses the index. None means the value that tuning chose. Settings that do not apply to
    the index kind are ignored."""

    exact: bool = False
    ef_search: int | None = None  # graphs
    nprobe: int | None = None  # inverted lists


@dataclass(frozen=True)
class Page:
    """A page of items in the store's order. `cursor` is the argument with which `scroll` returns the next page, or None
    on the last page."""

    items: list[Item]
    cursor: str | None


@dataclass(frozen=True)
class SnapshotInfo:
    """The description of a snapshot. `created` is ISO 8601 in UTC. `count` is the number of items, or None if the
    snapshot is damaged."""

    name: str
    collection: str
    created: str
    bytes: int
    count: int | None


class VectorStore(Protocol):
    """Collections of items with string ids, and aliases of collections.

    Several calls may run at the same time. When a write has returned, it is durable and every later call sees it.
    Wherever a method takes the name of a collection, an alias may be given instead.

    Every method may raise CollectionNotFound, StorageFailed if the storage fails, and InvalidRequest for a name,
    setting, id, vector, metadata or number that is not allowed. Methods that take vectors raise ModelMismatch if the
    tag, or Conflict if the dimension, differs from the collection's.
    """

    capabilities: frozenset[str]
    """Optional features of this store: `atomic_upsert` (a call writes all items or none), `idempotency`, `snapshots`,
    `index_kinds` (follows `IndexSpec`), `stats`."""

    async def create(self, collection: str, spec: CollectionSpec) -> CollectionInfo:
        """Create a collection. If it exists with the same spec, do nothing. Return its description.

        Raises:
            Conflict: an alias, or a collection with another spec, has this name.
        """

    async def collections(self) -> list[CollectionInfo]:
        """Return all collections in order of name."""

    async def info(self, collection: str) -> CollectionInfo: ...

    async def drop(self, collection: str) -> None:
        """Drop a collection with all its items.

        Raises:
            Conflict: the collection has an alias, or the name is an alias.
        """

    async def aliases(self) -> dict[str, str]:
        """Return a mapping from aliases to collections."""

    async def set_alias(self, alias: str, collection: str) -> str | None:
        """Point the alias to the collection, in one atomic step. Return the collection that it pointed to before, or
        None if the alias is new.

        Raises:
            Conflict: a collection has this name.
        """

    async def drop_alias(self, alias: str) -> None:
        """Remove an alias. Raises CollectionNotFound if it does not exist."""

    async def upsert(
        self, collection: str, items: Sequence[Item], *, tag: str, request_key: str | None = None
    ) -> CollectionInfo:
        """Write items. An item replaces the existing item with the same id. If several of the items have the same id,
        only the last of them is written.

        The first write to a name creates the collection with default settings. If the store has the capability
        `idempotency`, a second call with the same `request_key` and items within a day changes nothing.

        Raises:
            Conflict: the key was used with other items.
        """

    async def get(self, collection: str, ids: Sequence[str]) -> list[Item | None]:
        """Return the items in the order of the ids, with None for an id that does not exist."""

    async def patch(self, collection: str, item_id: str, metadata: Metadata) -> Item:
        """Apply a JSON merge patch (RFC 7396) to the metadata of an item: None removes a key. Return the updated item.

        Raises:
            ItemNotFound: there is no such item.
        """

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        """Delete the items with these ids. Return how many of them existed."""

    async def delete_where(self, collection: str, where: Filter) -> int:
        """Delete the items that match a filter. Return how many were deleted."""

    async def count(self, collection: str, where: Filter | None = None) -> int: ...

    async def scroll(
        self, collection: str, *, where: Filter | None = None, cursor: str | None = None, limit: int = 100
    ) -> Page:
        """Return one page of items.

        An item that exists while all pages are read is on exactly one of them. An item that is written or deleted
        meanwhile may be missing.

        Raises:
            InvalidRequest: the cursor is not from this store.
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
        """Return the k nearest items of each of the vectors [n, D], best first. Items with equal scores are in order of
        id. k is at most MAX_DEPTH.

        The vectors may have any length except 0. If fewer than k items match, fewer hits are returned.
        """

    async def close(self) -> None: ...


class SnapshotStore(VectorStore, Protocol):
    """A store that can take and restore snapshots of a collection (capability `snapshots`).

    Methods that take a snapshot's name raise InvalidRequest if it is not a snapshot name, NotFound if there is no such
    snapshot, and StorageFailed if it is damaged.
    """

    async def snapshot(self, collection: str) -> SnapshotInfo:
        """Take a snapshot of the collection as it is at one moment. Writes may continue meanwhile."""

    async def snapshots(self, collection: str) -> list[SnapshotInfo]:
        """Return the snapshots of a collection, oldest first. Snapshots remain after the collection is dropped."""

    async def snapshot_path(self, collection: str, name: str) -> Path:
        """Return the path of the snapshot's file."""

    async def drop_snapshot(self, collection: str, name: str) -> None: ...

    async def restore(self, collection: str, source: str, name: str) -> CollectionInfo:
        """Create `collection` from the snapshot `name` of the collection `source`.

        Raises:
            Conflict: a collection or alias has the name `collection`.
        """


class StatsStore(VectorStore, Protocol):
    """A store that reports how a collection is indexed (capability `stats`)."""

    async def stats(self, collection: str) -> dict[str, Any]:
        """Return figures about the index of a collection, for operators. They can be serialised as JSON."""
