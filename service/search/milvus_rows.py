"""Converts items to Milvus rows, and Milvus rows to items and hits. The module also parses stored settings, and creates
and parses cursors."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import orjson

from service.errors import InvalidRequest, StorageFailed
from service.search.checks import check_id
from service.search.filter_milvus import FIELD, filterable, quoted
from service.search.filters import Filter, matches
from service.search.store import CollectionSpec, Floats, Hit, IndexSpec, Item

Row = Mapping[str, Any]

DIGITS: Final = 6
"""Scores are rounded to this many decimal places, as in the embedded store."""
_WRITE_BYTES: Final = 16 * 2**20
"""The highest size in bytes of one message to the server."""


def spec_of(name: str, text: str) -> CollectionSpec:
    try:
        values = orjson.loads(text)
        return CollectionSpec(**{**values, "index": IndexSpec(**values["index"]), "indexed": tuple(values["indexed"])})
    except (ValueError, TypeError, KeyError) as error:
        raise StorageFailed(f"the settings of collection {name!r} in Milvus cannot be read: {error}") from error


def id_in(ids: Sequence[str]) -> str:
    return f"id in [{', '.join(map(quoted, ids))}]"


def row_of(item: Item, vector: Floats, text: str) -> dict[str, Any]:
    """Convert an item to a Milvus row.

    The metadata text is stored without the outer braces of the JSON object. With the braces, metadata of 64 KiB would
    be one byte longer than Milvus allows.
    """
    return {
        "id": item.id,
        "vector": vector.tolist(),
        FIELD: filterable(orjson.loads(text)),
        "text": text[1:-1],
        "source": item.source or "",
        "digest": item.digest or "",
    }


def batches(rows: list[dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
    """Yield the rows in batches. Each batch fits in one message to the server."""
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        weight = 4 * len(row["vector"]) + 2 * len(row["text"].encode()) + 10_000
        if batch and size + weight > _WRITE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += weight
    yield batch


def metadata_of(row: Row) -> dict[str, Any]:
    try:
        metadata: dict[str, Any] = orjson.loads(f"{{{row['text']}}}")
    except ValueError as error:
        raise StorageFailed(f"the metadata of item {row['id']!r} in Milvus is broken") from error
    return metadata


def item_of(row: Row) -> Item:
    vector = np.asarray(row["vector"], np.float32)
    return Item(row["id"], vector, metadata_of(row), row["source"] or None, row["digest"] or None)


def row_of_hit(hit: Mapping[str, Any]) -> Row:
    """Convert a Milvus search hit to a row that also contains the score."""
    entity = hit["entity"]
    score = rounded(hit["distance"])
    return {"id": hit["id"], "score": score, "text": entity["text"], "source": entity["source"]}


def hit_of(row: Row, score: float) -> Hit:
    return Hit(row["id"], score, metadata_of(row), row["source"] or None)


def rounded(score: float) -> float:
    return min(1.0, max(-1.0, round(float(score), DIGITS)))


def best_hits(rows: list[Row], k: int, where: Filter | None, *, is_all: bool, is_last: bool) -> list[Hit] | None:
    """Return the k best hits that pass a filter, from `rows`, the rows nearest to a query. Hits with equal scores are
    sorted by id. Return None if more rows are needed to determine the k best hits.

    `is_all` is true if `rows` contains every row that the search can find. `is_last` is true if Milvus returns no more
    rows for one search.
    """
    hits = sorted((hit_of(row, row["score"]) for row in rows), key=lambda hit: (-hit.score, hit.id))
    hits = [hit for hit in hits if where is None or matches(where, hit.metadata, hit.id)]
    is_known = is_all or (len(hits) >= k and min(row["score"] for row in rows) < hits[k - 1].score)
    if is_known or (is_last and len(hits) >= k):
        return hits[:k]
    return None


def cursor_at(item_id: str) -> str:
    return "i" + base64.urlsafe_b64encode(item_id.encode()).decode().rstrip("=")


def id_after(cursor: str | None) -> str:
    """Return the id that a cursor contains. The page for this cursor begins after this id. If the cursor is None,
    return an empty string. Raises InvalidRequest if the cursor is not from this store."""
    if cursor is None:
        return ""
    text = cursor.removeprefix("i")
    try:
        item_id = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode()
        if not item_id or cursor_at(item_id) != cursor:
            raise ValueError("the cursor is not one that this store issued")
        return check_id(item_id)
    except (ValueError, InvalidRequest) as error:
        raise InvalidRequest(f"cursor {cursor[:80]!r} is not from this store", param="cursor") from error
