"""Divides rankings into pages: the cursor that leads to the next page, and the rankings that are kept for it.

A cursor contains the score and the id of the last result on its page, and a hash of the request. The next page begins
after this result. A ranking is kept for a few minutes, so the pages of a request usually come from the same ranking. If
the ranking is no longer kept, or another process answers, it is computed again.
"""

import base64
import hashlib
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import orjson

from service.errors import InvalidRequest

MAX_KEPT: Final = 16
MAX_AGE_S: Final = 300.0
_PAGING: Final = ("cursor", "limit")


class Ranked(NamedTuple):
    """An item whose image contains the wanted region. Sorting these tuples puts the best score first, and orders equal
    scores by id."""

    minus_score: float
    id: str
    digest: str

    @property
    def score(self) -> float:
        return -self.minus_score


@dataclass(frozen=True)
class Ranking:
    """All items that reach the minimum score, in order, and the numbers of items that were and were not compared."""

    items: list[Ranked]
    examined: int
    pending: int
    unreadable: int

    def page(self, after: tuple[float, str] | None, limit: int) -> tuple[list[Ranked], bool]:
        """Return up to `limit` items after the position `after` (a score and an id), and whether more items follow."""
        start = 0 if after is None else bisect_right(self.items, (*after, "g"))  # digests are hexadecimal
        return self.items[start : start + limit], len(self.items) > start + limit


@dataclass
class Rankings:
    """The most recent rankings, keyed by request. Only the event loop's thread uses them."""

    now: Callable[[], float] = time.monotonic
    _kept: "OrderedDict[tuple[str, str], tuple[float, Ranking]]" = field(default_factory=OrderedDict)

    def keep(self, key: tuple[str, str], ranking: Ranking) -> None:
        self._kept[key] = self.now(), ranking
        self._kept.move_to_end(key)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def get(self, key: tuple[str, str]) -> Ranking | None:
        """Return the ranking of a request, or None if it is not kept or older than `MAX_AGE_S` seconds."""
        kept = self._kept.get(key)
        if kept is None or self.now() - kept[0] > MAX_AGE_S:
            return None
        return kept[1]


def request_hash(fields: Mapping[str, Any]) -> str:
    """Return a hash of the request fields that are the same for all pages."""
    asked = {name: value for name, value in fields.items() if name not in _PAGING and value is not None}
    return hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def cursor_after(item: Ranked, request: str) -> str:
    """Return the cursor for the page after `item`."""
    return base64.urlsafe_b64encode(orjson.dumps([item.minus_score, item.id, request])).decode()


def position_of(cursor: str | None, request: str) -> tuple[float, str] | None:
    """Return the score and the id that a cursor contains, or None if the cursor is None.

    Raises:
        InvalidRequest: the cursor is not from an answer to this request.
    """
    if cursor is None:
        return None
    why: Exception | None = None
    try:
        minus_score, item_id, of_request = orjson.loads(base64.b64decode(cursor, altchars=b"-_", validate=True))
        if isinstance(minus_score, float) and isinstance(item_id, str) and of_request == request:
            return minus_score, item_id
    except (ValueError, TypeError) as error:
        why = error
    raise InvalidRequest(
        f"cursor {cursor[:80]!r} is not from an answer to this request: send the same references and options again",
        param="cursor",
    ) from why
