"""The interface of a vector store, the same for every implementation.

Vectors can be compared only if the same model made them in the same way. So every collection has a `tag` (the model's
fingerprint with pooling, normalisation, input size and precision) and a dimension, both set by its first write. A write
or search with another tag is a 409 error that names both tags.

Scores are cosine similarities from -1 to 1; stored vectors and queries are normalised.
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
"""The most hits that one search may read: k with offset, or the hits that a grouping reads."""
MAX_ID_CHARACTERS: Final = 256
MAX_METADATA_BYTES: Final = 64 * 2**10
MAX_SOURCE_CHARACTERS: Final = 2048


@dataclass(frozen=True)
class Item:
    """One vector of a collection. A vector [D] that is read back has length 1."""

    id: str
    vector: Floats
    metadata: Metadata = field(default_factory=dict)
    source: str | None = None  # location of the image: an address or a stored original
    digest: str | None = None  # sha256 of the image's bytes, in hex; equal for exact duplicates


class Hit(NamedTuple):
    """One result of a search; `score` is the cosine similarity."""

    id: str
    score: float
    metadata: Metadata
    source: str | None = None


@dataclass(frozen=True)
class IndexSpec:
    """Index settings of a collection. A store ignores settings that it does not support.

    `auto` chooses by size, and None uses a value that suits the size. `service/search/kinds.py` defines which settings
    apply to each kind.
    """

    kind: Kind = "auto"
    m: int | None = None  # neighbours of a node in a graph
    ef_construction: int | None = None  # how carefully a graph is built
    n_lists: int | None = None  # inverted lists
    target_recall: float = 0.98  # of the ten nearest; search parameters are tuned for it


@dataclass(frozen=True)
class CollectionSpec:
    """Settings of a collection, fixed when it is created; `service/search/specs.py` defines what is allowed."""

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
    """The effort of one search. None uses the tuned value; settings that do not apply to a kind are ignored."""

    exact: bool = False
    ef_search: int | None = None  # graphs
    nprobe: int | None = None  # inverted lists


@dataclass(frozen=True)
class Page:
    """A page of items in the store's order. `cursor` continues after them; it is None at the end."""

    items: list[Item]
    cursor: str | None


@dataclass(frozen=True)
class SnapshotInfo:
    """A snapshot of a collection. `created` is ISO 8601 in UTC; `count` is None if the snapshot is damaged."""

    name: str
    collection: str
    created: str
    bytes: int
    count: int | None


class VectorStore(Protocol):
    """Collections of items with string ids, and aliases of collections.

    Calls may overlap. A write that has returned is durable, and every later call sees it. An alias may be given
    instead of a collection's name.

    Every method may raise CollectionNotFound; InvalidRequest for names, settings, ids, vectors, metadata or numbers
    that are not allowed; ModelMismatch or Conflict for another tag or dimension; StorageFailed if the storage fails.
    """

    capabilities: frozenset[str]
    """Optional features of this store: `atomic_upsert` (a call writes all items or none), `idempotency`, `snapshots`,
    `index_kinds` (follows `IndexSpec`), `stats`."""

    async def create(self, collection: str, spec: CollectionSpec) -> CollectionInfo:
        """Create a collection; do nothing if it exists with the same spec.

        Raises:
            Conflict: the name is taken by an alias, or by a collection with another spec.
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
        """Point the alias to the collection, atomically; return its previous collection or None.

        Raises:
            Conflict: a collection has this name.
        """

    async def drop_alias(self, alias: str) -> None:
        """Remove an alias; raise CollectionNotFound if it does not exist."""

    async def upsert(
        self, collection: str, items: Sequence[Item], *, tag: str, request_key: str | None = None
    ) -> CollectionInfo:
        """Add the items; an item with an existing id replaces the old one. If an id occurs twice, the last item wins.

        The first write to a name creates the collection with default settings. A second call with the same
        `request_key` within a day changes nothing (`idempotency`).

        Raises:
            Conflict: the key was used with other items.
        """

    async def get(self, collection: str, ids: Sequence[str]) -> list[Item | None]:
        """Return the items in the order of the ids, with None for ids that do not exist."""

    async def patch(self, collection: str, item_id: str, metadata: Metadata) -> Item:
        """Merge a patch into the item's metadata (RFC 7396: null removes a key); return the updated item.

        Raises:
            ItemNotFound: there is no such item.
        """

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        """Delete items by id; return how many existed."""

    async def delete_where(self, collection: str, where: Filter) -> int:
        """Delete the items that match a filter; return how many."""

    async def count(self, collection: str, where: Filter | None = None) -> int: ...

    async def scroll(
        self, collection: str, *, where: Filter | None = None, cursor: str | None = None, limit: int = 100
    ) -> Page:
        """Return one page of items.

        Items that exist from the first page to the last appear exactly once; items written or deleted meanwhile may or
        may not appear.

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
        """Return the k nearest items (up to MAX_DEPTH) of each vector [n, D], best first, equal scores by id.

        Vectors may have any scale. There are fewer than k hits if fewer items match.
        """

    async def close(self) -> None: ...


class SnapshotStore(VectorStore, Protocol):
    """A store that can take snapshots of a collection and restore them (`snapshots`).

    Methods that take a snapshot's name raise InvalidRequest if it is not a snapshot name, NotFound if there is no such
    snapshot, and StorageFailed if it is damaged.
    """

    async def snapshot(self, collection: str) -> SnapshotInfo:
        """Take a snapshot of the collection at one moment; other writes may continue."""

    async def snapshots(self, collection: str) -> list[SnapshotInfo]:
        """List a collection's snapshots, oldest first. They remain after the collection is dropped."""

    async def snapshot_path(self, collection: str, name: str) -> Path:
        """Return the path of the snapshot's file."""

    async def drop_snapshot(self, collection: str, name: str) -> None: ...

    async def restore(self, collection: str, source: str, name: str) -> CollectionInfo:
        """Create `collection` from the snapshot `name` of the collection `source`.

        Raises:
            Conflict: the name is taken.
        """


class StatsStore(VectorStore, Protocol):
    """A store that reports how a collection is indexed (`stats`)."""

    async def stats(self, collection: str) -> dict[str, Any]:
        """Return figures for operators, as JSON values."""
