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
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import orjson

from service.errors import Conflict, InvalidRequest, ModelMismatch

Floats = npt.NDArray[np.float32]
Metadata = Mapping[str, Any]

MAX_K: Final = 1000
MAX_ID_CHARACTERS: Final = 256
MAX_METADATA_BYTES: Final = 64 * 2**10

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Item:
    """One vector of a collection. Read back, the vector [D] has length 1."""

    id: str
    vector: Floats
    metadata: Metadata = field(default_factory=dict)


@dataclass(frozen=True)
class Hit:
    """One result of a search; `score` is the cosine similarity."""

    id: str
    score: float
    metadata: Metadata


@dataclass(frozen=True)
class CollectionInfo:
    name: str
    tag: str
    dimension: int
    count: int


class VectorStore(Protocol):
    """Collections of items with string ids. Calls may overlap, each is atomic; a write that has returned is durable.

    Raises, everywhere: CollectionNotFound (but `upsert` makes the collection); InvalidRequest for names, ids, vectors,
    metadata or numbers that are not allowed; ModelMismatch or Conflict for another tag or dimension; StorageFailed when
    the storage behind it fails.
    """

    async def collections(self) -> list[CollectionInfo]:
        """All of them, by name."""

    async def info(self, collection: str) -> CollectionInfo: ...

    async def drop(self, collection: str) -> None: ...

    async def upsert(self, collection: str, items: Sequence[Item], *, tag: str) -> CollectionInfo:
        """Adds the items, replaces those whose id exists; all or none. Of equal ids in one call the last wins."""

    async def get(self, collection: str, ids: Sequence[str]) -> list[Item | None]:
        """In the order of the ids; None for those that do not exist."""

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        """How many there were."""

    async def count(self, collection: str) -> int: ...

    async def search(self, collection: str, vector: npt.ArrayLike, k: int, *, tag: str) -> list[Hit]:
        """The k nearest to a vector [D] of any scale, best first, equal scores by id; fewer if there are fewer."""

    async def close(self) -> None: ...


def check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"collection name {name[:80]!r} is not allowed: 1 to 64 of a-z, 0-9, _ and -; no _ or - first",
            param="collection",
        )
    return name


def check_id(item_id: str) -> str:
    if not 1 <= len(item_id) <= MAX_ID_CHARACTERS or not item_id.isprintable():
        raise InvalidRequest(
            f"id {item_id[:80]!r} is not allowed: 1 to {MAX_ID_CHARACTERS} printable characters", param="id"
        )
    return item_id


def check_k(k: int) -> int:
    if not 1 <= k <= MAX_K:
        raise InvalidRequest(f"k={k} is not allowed: 1 to {MAX_K}", param="k")
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
        InvalidRequest: not a JSON object, nested too deeply to be answered with, or too long.
    """
    try:
        text = json.dumps(dict(metadata), allow_nan=False, separators=(",", ":"))
        # As deep as in an answer: what orjson refuses would fail every search that finds it.
        orjson.dumps([[[[dict(metadata)]]]])
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"metadata must be a JSON object: {error}", param="metadata") from error
    if len(text) > MAX_METADATA_BYTES:
        raise InvalidRequest(
            f"metadata has {len(text):,} bytes as JSON; at most {MAX_METADATA_BYTES:,} are accepted", param="metadata"
        )
    return text
