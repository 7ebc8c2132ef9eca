"""The interface `VectorStore`, which all vector stores implement, and the types of its arguments and results.

Vectors can be compared only if the same model made them in the same way. Therefore, every collection has a `tag` (the
model's fingerprint with pooling, normalisation, input size and precision) and a dimension. The first write to a
collection sets both. A later write or a search with another tag raises ModelMismatch (status 409). The error message
names both tags.

Scores are cosine similarities from -1 to 1, because stored vectors and queries are scaled to length 1.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol, overload

import numpy as np
import numpy.typing as npt

from service.search.filters import Filter, Scalar
from service.search.filters import Path as MetadataPath
from service.search.kinds import Kind

Floats = npt.NDArray[np.float32]
Metadata = Mapping[str, Any]
DType = Literal["float32", "float16"]

MAX_DEPTH: Final = 10_000
"""The highest number of hits (k) that one search of a store may request. It also limits the sum of k and offset in a
request, and the number of hits that are read for grouping."""
MAX_ID_CHARACTERS: Final = 256
MAX_METADATA_BYTES: Final = 64 * 2**10
MAX_SOURCE_CHARACTERS: Final = 2048


@dataclass(frozen=True)
class Item:
    """One vector of a collection, with its id and metadata. `vector` has the shape [D], where D is the dimension of the
    collection. Stores return vectors scaled to length 1."""

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


class Hits(Sequence[Hit]):
    """The results of one query, best first, as columns: entry n of each column belongs to result n. A `Hit` is made
    only when a caller asks for one, because an answer in JSON is written from the columns."""

    __slots__ = ("ids", "metadata", "scores", "sources")

    def __init__(
        self, ids: Sequence[str], scores: Sequence[float], metadata: Sequence[Metadata], sources: Sequence[str | None]
    ) -> None:
        self.ids, self.scores, self.metadata, self.sources = ids, scores, metadata, sources

    @staticmethod
    def of(hits: Iterable[Hit]) -> "Hits":
        ids, scores, metadata, sources = zip(*hits, strict=True) if (hits := list(hits)) else ((), (), (), ())
        return Hits(ids, scores, metadata, sources)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, at: int) -> Hit: ...
    @overload
    def __getitem__(self, at: slice) -> "Hits": ...
    def __getitem__(self, at: int | slice) -> "Hit | Hits":
        if isinstance(at, slice):
            return Hits(self.ids[at], self.scores[at], self.metadata[at], self.sources[at])
        return Hit(self.ids[at], self.scores[at], self.metadata[at], self.sources[at])

    def __iter__(self) -> Iterator[Hit]:
        return map(Hit, self.ids, self.scores, self.metadata, self.sources)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    def __repr__(self) -> str:
        return f"Hits.of({list(self)!r})"


@dataclass(frozen=True)
class IndexSpec:
    """The index settings of a collection. A store ignores settings that it does not support.

    If the kind is `auto`, the number of vectors determines the kind. A setting that is None gets a default value.
    `service/search/kinds.py` defines which settings apply to which kind.
    """

    kind: Kind = "auto"
    m: int | None = None  # number of neighbours of each node in a graph
    ef_construction: int | None = None  # how carefully a graph is built
    n_lists: int | None = None  # number of inverted lists
    target_recall: float = 0.98  # share of the ten nearest vectors that a search should find


@dataclass(frozen=True)
class CollectionSpec:
    """The settings of a collection. Only `indexed` can be changed after the collection is created.
    `service/search/specs.py` defines the allowed values."""

    tag: str  # identifies what made the vectors; only vectors with equal tags can be compared
    dimension: int
    dtype: DType = "float32"  # of the stored vectors
    index: IndexSpec = field(default_factory=IndexSpec)
    indexed: tuple[str, ...] = ()  # metadata keys with a database index, so that filters on these keys are fast
    originals: bool = False  # whether images are stored with their vectors


@dataclass(frozen=True)
class CollectionInfo:
    """The description of a collection.

    version: a text that changes whenever an item in the collection changes, or None if the store cannot tell when items
        change.
    key: the number of the collection in a store in which another collection can take its name, because it was
        re-embedded with another model. None in other stores.
    earlier: the models that made the collection's vectors before it was re-embedded: their fingerprints and the
        dimensions of their vectors.
    partner: the tag of the second set of vectors that the collection has while it is re-embedded and until the window
        for a rollback ends. Writers that can embed with that model too pass both vectors to `upsert`.
    is_damaged: whether its items can neither be read nor written, because their rows are damaged.
    """

    name: str
    spec: CollectionSpec
    count: int
    version: str | None = field(default=None, compare=False)
    key: int | None = field(default=None, compare=False)
    earlier: tuple[tuple[str, int], ...] = field(default=(), compare=False)
    partner: str | None = field(default=None, compare=False)
    is_damaged: bool = field(default=False, compare=False)

    @property
    def ref(self) -> str:
        """A name for this collection that still means the same vectors if another collection takes its name. Methods of
        the store accept it in place of the name. Clients cannot use it."""
        return self.name if self.key is None else f"{self.name}@{self.key}"

    @property
    def tag(self) -> str:
        return self.spec.tag

    @property
    def dimension(self) -> int:
        return self.spec.dimension


@dataclass(frozen=True)
class SearchParams:
    """The parameters that determine how thoroughly a search uses the index. If a parameter is None, the search uses the
    value that tuning chose. Parameters that do not apply to the kind of index are ignored."""

    exact: bool = False
    ef_search: int | None = None  # for graphs
    nprobe: int | None = None  # for inverted lists


@dataclass(frozen=True)
class Order:
    """The order of a list of items: by the value at `path` in their metadata.

    Numbers come before strings, and strings are compared by code point. Booleans are ordered as the numbers 0 and 1.
    `descending` reverses this order. Items with equal values are sorted by id. Items without a number, string or
    boolean at `path` come last and are sorted by id. `descending` does not change these two rules.
    """

    path: MetadataPath
    descending: bool = False


@dataclass(frozen=True)
class Facet:
    """A value of a metadata key, and the number of items that have it."""

    value: Scalar
    count: int


@dataclass(frozen=True)
class Facets:
    """The most frequent values of a metadata key, most frequent first. `distinct` is the number of all its values."""

    values: list[Facet]
    distinct: int


@dataclass(frozen=True)
class Page:
    """A page of items in the store's order. To get the next page, pass `cursor` to `scroll`. On the last page, `cursor`
    is None. `tag` is the tag of the items' vectors. If it is None, the items have the tag of the collection."""

    items: list[Item]
    cursor: str | None
    tag: str | None = None


@dataclass(frozen=True)
class SnapshotInfo:
    """The description of a snapshot. `created` is the time in ISO 8601 format, in UTC, and `bytes` is the size of the
    file. `count` is the number of items, and `tag` is the collection's tag. Both are None if the snapshot is
    damaged."""

    name: str
    collection: str
    created: str
    bytes: int
    count: int | None
    tag: str | None = None


class CollectionUsage(NamedTuple):
    """The number of items in a collection, and the disk space that its vectors and segments use."""

    name: str
    items: int
    disk_bytes: int


class Usage(NamedTuple):
    """The disk use of each collection, and that of the parts of the store that the collections share, in bytes."""

    collections: list[CollectionUsage]
    parts: dict[str, int]


class StoreHealth(NamedTuple):
    """What is wrong with a store. If its folder was removed or replaced, nothing can be written. If the disk is full,
    only deletions are sure to work. The items of a damaged collection can neither be read nor written."""

    is_replaced: bool = False
    is_full: bool = False
    damaged: tuple[str, ...] = ()  # names of collections


class VectorStore(Protocol):
    """A store of named collections. A collection contains items with string ids, and it may have aliases.

    Several calls may run at the same time. When a write returns, it is durable and visible to every later call. Methods
    also accept an alias as the name of a collection, except `create`, `drop` and `restore`.

    Every method may raise CollectionNotFound if the collection does not exist, StorageFailed if the storage fails,
    Unavailable if the store's server cannot be reached, and InvalidRequest if an argument is not allowed. The methods
    `upsert` and `search` raise ModelMismatch if the tag differs from the collection's tag, and Conflict if the
    dimension of the vectors differs from the collection's dimension.
    """

    capabilities: frozenset[str]
    """The optional features of this store: `atomic_upsert` (a call of `upsert` writes all items or none), `health` (see
    `HealthStore`), `idempotency` (see `upsert`), `snapshots` (see `SnapshotStore`), `index_kinds` (the settings in
    `IndexSpec` take effect), `indexed` (see `set_indexed`), `migrations` (see `service/search/partners.py`), `order`
    (see `scroll`), `sample` (see `SampleStore`), `stats` (see `StatsStore`) and `usage` (see `UsageStore`)."""

    async def create(self, collection: str, spec: CollectionSpec) -> CollectionInfo:
        """Create a collection and return its description. If the collection already exists with the same settings,
        change nothing.

        Raises:
            Conflict: an alias, or a collection with other settings, has this name.
        """

    async def collections(self) -> list[CollectionInfo]:
        """Return the descriptions of all collections, sorted by name."""

    async def info(self, collection: str) -> CollectionInfo: ...

    async def set_indexed(self, collection: str, indexed: Sequence[str]) -> CollectionInfo:
        """Replace the setting `indexed` of a collection (the metadata keys with a database index), build the indexes
        that are missing, and return the description of the collection. While an index is built, other writes wait.

        Raises:
            InvalidRequest: the store does not have the capability `indexed`.
        """

    async def drop(self, collection: str) -> None:
        """Delete a collection and all its items.

        Raises:
            Conflict: the collection has an alias, or the name is an alias.
        """

    async def aliases(self) -> dict[str, str]:
        """Return a dictionary that maps each alias to the name of its collection."""

    async def set_alias(self, alias: str, collection: str) -> str | None:
        """Make an alias point to a collection, in one atomic step. Return the name of the collection to which the alias
        pointed before, or None if the alias is new.

        Raises:
            Conflict: a collection has the name `alias`.
        """

    async def drop_alias(self, alias: str) -> None:
        """Remove an alias. Raises CollectionNotFound if the alias does not exist."""

    async def upsert(
        self,
        collection: str,
        items: Sequence[Item],
        *,
        tag: str,
        request_key: str | None = None,
        client: str = "",
        other: tuple[str, Sequence[Item]] | None = None,
    ) -> CollectionInfo:
        """Write items and return the description of the collection. An item replaces the existing item with the same
        id. If several of the items have the same id, only the last of them is written.

        If the collection does not exist, it is created with default settings. If the store has the capability
        `idempotency`, a second call with the same `request_key` and the same items within a day changes nothing. The
        store keeps a limited number of keys of each `client`, which identifies the sender.

        `other` contains a second tag, and some of the same items with vectors that have this tag. A store with the
        capability `migrations` writes them to the partner of the collection. Other stores ignore them.

        Raises:
            Conflict: the `request_key` was used with other items within the last day.
        """

    async def get(self, collection: str, ids: Sequence[str]) -> list[Item | None]:
        """Return the items with these ids, in the same order. The entry for an id that does not exist is None."""

    async def patch(
        self, collection: str, item_id: str, metadata: Metadata, *, source: str | None = None, keep_source: bool = True
    ) -> Item:
        """Apply a JSON merge patch (RFC 7396) to the metadata of an item, and return the updated item. A key that is
        None in the patch is removed from the metadata. If `keep_source` is false, `source` replaces the item's source.

        Raises:
            ItemNotFound: no item has this id.
        """

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        """Delete the items with these ids. Return the number of items that were deleted."""

    async def delete_where(self, collection: str, where: Filter) -> int:
        """Delete the items that match a filter. Return the number of items that were deleted."""

    async def count(self, collection: str, where: Filter | None = None) -> int: ...

    async def facets(
        self, collection: str, path: MetadataPath, *, where: Filter | None = None, limit: int = 100
    ) -> Facets:
        """Count the distinct values at `path` in the metadata of all items, or of the items that match a filter. Return
        the `limit` most frequent values. `service/search/facets.py` defines what counts as a value."""

    async def scroll(
        self,
        collection: str,
        *,
        where: Filter | None = None,
        cursor: str | None = None,
        limit: int = 100,
        order: Order | None = None,
        max_bytes: int | None = None,
    ) -> Page:
        """Return one page of items. If `order` is None, the store defines the order. Only stores with the capability
        `order` support other orders. A cursor is valid only for the order of the page that it came with.

        A store may end the page earlier, so that its metadata has at most `max_bytes` bytes. It then has at least one
        item.

        If all pages are read, each item that does not change in the meantime is on exactly one page. An item that is
        written or deleted while the pages are read may be on no page or on two pages.

        Raises:
            InvalidRequest: the cursor is not from this store or from a page in another order, or the store does not
                support orders.
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
        assumed: bool = False,
        max_bytes: int | None = None,
    ) -> list[Hits]:
        """Return the k nearest items for each of the query vectors [n, D], best first. The result has the hits of each
        vector. Hits with equal scores are sorted by id. k is at most MAX_DEPTH.

        The query vectors may have any norm except 0. If fewer than k items match the filter, fewer hits are returned.

        `assumed` says that the client did not name the model of the vectors, so `tag` is only assumed. Such a search of
        a collection whose vectors were once made by another model raises ModelMismatch, because a client that still has
        vectors of that model would get wrong results.

        A store may raise AnswerTooLarge, a kind of InvalidRequest, if the metadata of all hits has more than
        `max_bytes` bytes.
        """

    async def close(self) -> None: ...


class SnapshotStore(VectorStore, Protocol):
    """A store that can take and restore snapshots of a collection (capability `snapshots`).

    Methods that take the name of a snapshot raise InvalidRequest if the name is not a valid snapshot name, and NotFound
    if the snapshot does not exist. `restore` raises InvalidRequest if the snapshot is damaged.
    """

    @property
    def folder(self) -> Path:
        """The folder in which the store keeps its data."""

    async def snapshot(self, collection: str) -> SnapshotInfo:
        """Take a snapshot of a collection and return its description. The snapshot contains the collection as it was at
        one moment. Writes may continue while the snapshot is taken."""

    async def snapshots(self, collection: str) -> list[SnapshotInfo]:
        """Return the snapshots of a collection, oldest first. Snapshots are not deleted when their collection is
        dropped."""

    async def snapshot_path(self, collection: str, name: str) -> Path:
        """Return the path of a snapshot's file."""

    async def drop_snapshot(self, collection: str, name: str) -> None: ...

    async def snapshot_to(self, collection: str, root: Path) -> Path:
        """Take a snapshot in the folder `root` instead of the store's own folder, and return the path of its file. The
        file is in a subfolder that has the collection's name."""

    def upload_path(self) -> Path:
        """Return a path for a file that may become a snapshot with `add_snapshot`. If the file is abandoned, it is
        removed later."""

    async def add_snapshot(self, collection: str, file: Path) -> SnapshotInfo:
        """Add a snapshot file from another store to the snapshots of `collection`, and return its description. The
        collection need not exist. The file is moved.

        Raises:
            InvalidRequest: the file is damaged or not a snapshot.
        """

    async def restore_files(
        self, files: Mapping[str, Path], aliases: Mapping[str, str], *, replace: bool = False
    ) -> list[CollectionInfo]:
        """Create a collection from each snapshot file in `files`, and set the aliases, all at once or not at all.
        Return the descriptions of the new collections. `files` maps the names of the new collections to the files, and
        `aliases` maps each alias to the name of its collection. If `replace` is true, collections and aliases that have
        these names are replaced.

        Raises:
            Conflict: a collection or alias with one of the names exists, and `replace` is false. A collection never
                replaces an alias, nor an alias a collection.
            CollectionNotFound: the collection for an alias does not exist.
        """

    async def restore(self, collection: str, source: str, name: str) -> CollectionInfo:
        """Create the collection `collection` from the snapshot `name` of the collection `source`, and return the
        description of the new collection.

        Raises:
            Conflict: a collection or alias with the name `collection` already exists.
        """


class SampleStore(VectorStore, Protocol):
    """A store that can draw items at random (capability `sample`)."""

    async def sample(self, collection: str, size: int, *, where: Filter | None = None) -> list[Item]:
        """Return `size` different items from a collection, or from its items that match a filter. If there are fewer,
        return all of them. All sets of `size` items are equally likely. A second call returns the same items unless the
        collection has changed."""


class StatsStore(VectorStore, Protocol):
    """A store that reports how a collection is indexed (capability `stats`)."""

    async def stats(self, collection: str) -> dict[str, Any]:
        """Return statistics about the index of a collection, for operators. The dictionary can be serialised as
        JSON."""


class UsageStore(VectorStore, Protocol):
    """A store that reports its disk use (capability `usage`)."""

    async def usage(self) -> Usage:
        """Return the disk use of the store and of its collections. This takes a few milliseconds."""


class HealthStore(VectorStore, Protocol):
    """A store that knows what is wrong with its data (capability `health`)."""

    async def health(self) -> StoreHealth: ...
