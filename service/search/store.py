"""What the service asks of a vector store, whatever stands behind it.

Vectors compare only if the same model made them in the same way, so every collection has a `tag` (the model's
fingerprint with pooling, normalisation, input size and precision) and a dimension, both set by its first write. A write
or search with another tag is a 409 that names both.

Scores are cosine similarities, -1 to 1: vectors are normalised when they are written and when they are searched for.
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
"""How far down one search may look: k with offset, or what a grouping goes through."""
MAX_ID_CHARACTERS: Final = 256
MAX_METADATA_BYTES: Final = 64 * 2**10
MAX_SOURCE_CHARACTERS: Final = 2048


@dataclass(frozen=True)
class Item:
    """One vector of a collection. Read back, the vector [D] has length 1."""

    id: str
    vector: Floats
    metadata: Metadata = field(default_factory=dict)
    source: str | None = None  # where the image is: an address, or a stored original
    digest: str | None = None  # sha256 of the image's bytes, in hex: exact duplicates have the same


class Hit(NamedTuple):
    """One result of a search; `score` is the cosine similarity."""

    id: str
    score: float
    metadata: Metadata
    source: str | None = None


@dataclass(frozen=True)
class IndexSpec:
    """How a collection is indexed; a store that has no choice ignores what does not concern it.

    `auto` goes by size. `service/search/kinds.py` defines which settings apply to a kind; None takes what suits the
    size.
    """

    kind: Kind = "auto"
    m: int | None = None  # neighbours of a node in a graph
    ef_construction: int | None = None  # how carefully a graph is built
    n_lists: int | None = None  # inverted lists
    target_recall: float = 0.98  # of the ten nearest; search parameters are tuned for it


@dataclass(frozen=True)
class CollectionSpec:
    """What a collection is, fixed when it is made; `service/search/specs.py` defines what is allowed."""

    tag: str  # what made its vectors: two vectors compare only if their tags are equal
    dimension: int
    dtype: DType = "float32"  # as stored
    index: IndexSpec = field(default_factory=IndexSpec)
    indexed: tuple[str, ...] = ()  # metadata keys that filters find without looking at every item
    originals: bool = False  # whether images are kept beside their vectors


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
    ef_search: int | None = None  # graphs
    nprobe: int | None = None  # inverted lists


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
