"""What a vector store accepts, and the form in which it keeps it: the same for every store.

What is not allowed raises `InvalidRequest`; the message names the value and what is allowed.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from service.errors import Conflict, InvalidRequest, ModelMismatch
from service.search.store import (
    MAX_DEPTH,
    MAX_ID_CHARACTERS,
    MAX_METADATA_BYTES,
    MAX_SOURCE_CHARACTERS,
    CollectionInfo,
    Floats,
    Item,
    Metadata,
)

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_ZERO: Final = re.compile(r"(?<!\\)(\\\\)*\\u0000")  # in JSON: not behind a backslash that is itself escaped


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
