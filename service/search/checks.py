"""Input checks and normalisation, which all vector stores share.

A check raises `InvalidRequest` if a value is not allowed. The error message contains the value and says what is
allowed.
"""

import json
import math
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
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
from service.search.text import ALLOWED, is_allowed
from service.tags import tag_parts

MAX_NESTING: Final = 256
NAME_PATTERN: Final = "[a-z0-9][a-z0-9_-]{0,63}"
_NAME: Final = re.compile(NAME_PATTERN)
_MANY_DIGITS: Final = re.compile(r"[0-9]{19}")  # fewer digits are always within the range of an integer
_ZERO: Final = re.compile(r"(?<!\\)(\\\\)*\\u0000")  # U+0000 as JSON; not a literal backslash and "u0000"


def check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"collection name {name[:80]!r} is not allowed: 1 to 64 characters of a-z, 0-9, _ and -, "
            "and a letter or digit first",
            param="collection",
        )
    return name


def check_reference(name: str) -> str:
    """Return the name of a collection, or a reference to a version of it (`CollectionInfo.ref`), if it is allowed.

    Raises:
        InvalidRequest: the name is not allowed.
    """
    bare, at, key = name.partition("@")
    if not at or not key.isdigit():
        check_name(name if at else bare)
    return name


def check_id(item_id: str, where: str = "id") -> str:
    """Return the id of an item if it is allowed, or raise InvalidRequest. `where` is the name of the request field, for
    the error message."""
    if not 1 <= len(item_id) <= MAX_ID_CHARACTERS or not is_allowed(item_id):
        raise InvalidRequest(
            f"{where} {item_id[:80]!r} is not allowed: 1 to {MAX_ID_CHARACTERS} characters, {ALLOWED}", param=where
        )
    return item_id


def check_k(k: int) -> int:
    if not 1 <= k <= MAX_DEPTH:
        raise InvalidRequest(f"k={k} is not allowed: 1 to {MAX_DEPTH}", param="k")
    return k


def check_match(info: CollectionInfo, *, tag: str, dimension: int) -> None:
    """Check that vectors with this tag and dimension fit the collection. The tag identifies the model that made the
    vectors.

    The tag is checked first: if the tag and the dimension both differ, the vectors come from another model, and
    ModelMismatch explains this better than Conflict.

    Raises:
        ModelMismatch: the tags differ.
        Conflict: the dimensions differ.
    """
    if info.tag != tag:
        raise ModelMismatch(
            f"collection {info.name!r} holds vectors of {info.tag!r}, which cannot be compared with vectors of {tag!r}"
        )
    if info.dimension != dimension:
        raise Conflict(f"collection {info.name!r} holds vectors of dimension {info.dimension}, not {dimension}")


def check_named(info: CollectionInfo) -> None:
    """Check that a vector without the fingerprint of its model can be compared with a collection's vectors.

    Raises:
        ModelMismatch: another model once made vectors of the same dimension for the collection. So the vector could be
            one of that model.
    """
    for fingerprint, dimension in info.earlier:
        if dimension == info.dimension and fingerprint != tag_parts(info.tag).fingerprint:
            raise ModelMismatch(
                f"collection {info.name!r} was re-embedded: its vectors are of {info.tag!r}, and those of "
                f"{fingerprint!r} have the same dimension. Send `fingerprint` with a vector to say which model made it",
                param="fingerprint",
            )


def normalised(vector: npt.ArrayLike) -> Floats:
    """Return a vector [D] scaled to length 1, as float32.

    Raises:
        InvalidRequest: the vector is empty or not one-dimensional, contains a number that is not finite, or contains
            only zeros.
    """
    values = np.asarray(vector, np.float64)
    if values.ndim != 1 or not values.size:
        raise InvalidRequest(f"a vector must be a non-empty list of numbers, not of shape {list(values.shape)}")
    largest = float(np.abs(values).max())
    if not math.isfinite(largest):
        raise InvalidRequest("a vector must hold finite numbers only")
    if largest == 0:
        raise InvalidRequest("a vector of zeros has no direction, so nothing is similar to it")
    values = values / largest  # prevents overflow or underflow when very large or small numbers are squared
    return (values / np.linalg.norm(values)).astype(np.float32)


def metadata_text(metadata: Metadata) -> str:
    """Convert metadata to the JSON text that a store keeps.

    Raises:
        InvalidRequest: the metadata is not a JSON object, is too long, contains the character U+0000 or an integer
            below -2^63 or from 2^63 on, or is nested so deeply that a response with it could not be encoded. U+0000 is
            not allowed because SQLite before version 3.45 ends a string at that character, so filters would give wrong
            results.
    """
    try:
        text = json.dumps(dict(metadata), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        # In a response, metadata is nested as deeply as here (results, groups, hits). If orjson refuses it here, it
        # would also refuse every response with this item.
        orjson.dumps([[[[[[[dict(metadata)]]]]]]])
    except (TypeError, ValueError, RecursionError) as error:
        _check_integers(metadata)
        raise InvalidRequest(f"metadata must be a JSON object: {error}", param="metadata") from error
    if _MANY_DIGITS.search(text):
        _check_integers(metadata)
    if _ZERO.search(text):
        raise InvalidRequest("metadata must not hold the character U+0000", param="metadata")
    size = len(text.encode())
    if size > MAX_METADATA_BYTES:
        raise InvalidRequest(
            f"metadata has {size:,} bytes as JSON; at most {MAX_METADATA_BYTES:,} are accepted", param="metadata"
        )
    return text


def _check_integers(metadata: Metadata) -> None:
    large = _large_integer(metadata, MAX_NESTING)
    if large is not None:
        raise InvalidRequest(f"metadata: {large}", param="metadata")


def may_have_lost_digits(value: Any) -> bool:
    """Return whether a JSON value that orjson parsed may contain an integer beyond 64 bits. orjson silently converts
    such an integer to a float. The result is also true for other large floats and for some strings."""
    try:
        return "e+" in json.dumps(value)
    except (ValueError, RecursionError):
        return False  # `metadata_text` refuses the value


def loads_exactly(text: str | bytes) -> Any:
    """Parse JSON. Integers of any size stay integers, so `metadata_text` can refuse those that are too large. An
    integer with more than 300 digits is cut to 300 digits, because Python takes quadratic time to parse it.

    Raises:
        ValueError: the text is not JSON.
    """
    return json.loads(text, parse_int=lambda digits: int(digits[:300]))


def _large_integer(value: Any, levels: int, where: str = "") -> str | None:
    """Return a text that describes the first integer in a JSON value that is not allowed, or None if there is none.
    Filters and facets would lose digits of an integer below -2^63 or from 2^63 on. `levels` limits the depth of the
    search, and `where` is the path of the value."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        number = reprlib.repr(value)
        return f"{where[:80]} is {number}, but an integer must be from -2^63 to 2^63 - 1; send it as a string"
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, list | tuple):
        inside = enumerate(value)
    if not levels:
        return None
    texts = (_large_integer(part, levels - 1, f"{where}.{key}" if where else str(key)) for key, part in inside)
    return next((text for text in texts if text is not None), None)


def rows_of(vectors: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return vectors as an array [n, D] of float32 or float64.

    Raises:
        InvalidRequest: the array is empty or not two-dimensional.
    """
    is_float = isinstance(vectors, np.ndarray) and vectors.dtype.char in "fd"
    rows: npt.NDArray[Any] = vectors if is_float else np.asarray(vectors, np.float64)  # type: ignore[assignment]
    if rows.ndim != 2 or not rows.size:
        raise InvalidRequest(f"vectors must be a non-empty list of vectors, not of shape {list(rows.shape)}")
    return rows


def normalised_rows(vectors: npt.ArrayLike) -> Floats:
    """Return vectors [n, D] with each row scaled to length 1, as float32.

    Raises:
        InvalidRequest: the array is empty or not two-dimensional, or `normalised` would reject one of its rows.
    """
    values = rows_of(vectors).astype(np.float64, copy=False)
    squares = np.einsum("nd,nd->n", values, values)
    if not all(1e-200 < square < 1e200 for square in squares.tolist()):  # not finite, zero, or near float64's limits
        return np.stack([normalised(row) for row in values])
    units: Floats = (values / np.sqrt(squares)[:, None]).astype(np.float32)
    return units


def merged(metadata: Metadata, patch: Metadata) -> dict[str, Any]:
    """Return the metadata after a JSON merge patch (RFC 7396). In the patch, None removes a key, an object is merged
    into the existing object, and any other value replaces the existing value."""
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


def check_source_text(source: str | None) -> None:
    """Raise `InvalidRequest` if an item's source (the location of its image) is not allowed. None is allowed."""
    if source is not None and not (1 <= len(source) <= MAX_SOURCE_CHARACTERS and is_allowed(source)):
        raise InvalidRequest(
            f"source {source[:80]!r} is not allowed: 1 to {MAX_SOURCE_CHARACTERS} characters, {ALLOWED}",
            param="source",
        )


def check_source(item: Item) -> Item:
    """Return the item if its source (the location of the image) and its digest (the image's sha256) are allowed.
    Otherwise, raise `InvalidRequest`."""
    check_source_text(item.source)
    if item.digest is not None and not re.fullmatch("[0-9a-f]{64}", item.digest):
        raise InvalidRequest(f"digest {item.digest[:80]!r} is not allowed: the sha256 in 64 hex digits", param="digest")
    return item


def checked_items(items: Sequence[Item]) -> tuple[list[tuple[Item, Floats, str]], int]:
    """Check the items of a write, and prepare them for storage.

    Returns:
        The prepared items and the dimension of their vectors. Each prepared item is a tuple of the item, its vector
        scaled to length 1, and its metadata as JSON text. If several items have the same id, only the last of them is
        returned.

    Raises:
        InvalidRequest: there are no items, an item is not allowed, or the vectors have different dimensions.
    """
    if not items:
        raise InvalidRequest("no items to write")
    checked = {check_id(check_source(i).id): (i, normalised(i.vector), metadata_text(i.metadata)) for i in items}
    dimensions = {len(vector) for _, vector, _ in checked.values()}
    if len(dimensions) > 1:
        raise InvalidRequest("the vectors of one call must have the same dimension")
    return list(checked.values()), dimensions.pop()
