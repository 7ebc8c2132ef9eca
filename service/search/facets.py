"""Counts the distinct values of a metadata key. A value counts once for each item that has it.

If the value of a key is a list, each of its elements counts, but equal elements of one list count once. Only strings,
numbers and booleans count. The most frequent value comes first. Values with equal counts are sorted: numbers, then
strings, then booleans.

The embedded store counts the values in SQL (`reading.value_counts`). The Milvus store uses the class `ValueCounts`.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from service.errors import InvalidRequest
from service.search.filters import Path, Scalar, elements_of, plain_number, value_at
from service.search.store import Facet, Facets

MAX_DISTINCT: Final = 1_000_000
"""The highest number of distinct values that `ValueCounts` can count, which limits its memory."""


class ValueCounts:
    """Counts of the values at `path` in the metadata of items."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts: Counter[tuple[bool, bool, Scalar]] = Counter()  # `_key` distinguishes 1 from True

    def add(self, metadata: Mapping[str, Any]) -> None:
        """Count the values of one more item. Raises InvalidRequest if there are more than `MAX_DISTINCT` values."""
        values = map(plain_number, elements_of(value_at(metadata, self._path)))
        self._counts.update({_key(value) for value in values if isinstance(value, str | int | float)})
        if len(self._counts) > MAX_DISTINCT:
            raise InvalidRequest(
                f"the key has more than {MAX_DISTINCT:,} distinct values: use a filter to count fewer items",
                param="key",
            )

    def most_frequent(self, limit: int) -> Facets:
        """Return up to `limit` values, most frequent first, and the number of all distinct values."""
        ranked = sorted(self._counts.items(), key=lambda entry: (-entry[1], entry[0]))
        return Facets([Facet(key[2], count) for key, count in ranked[:limit]], len(ranked))


def _key(value: Scalar) -> tuple[bool, bool, Scalar]:
    return isinstance(value, bool), isinstance(value, str), value
