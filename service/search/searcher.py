"""Searches the embedded store: chooses the view and the thread for a search, and turns positions into hits.

Every commit changes the stamp (`service/stamp.py`). A search reads the stamp. If it has changed, the search
updates its view, which contains the state of the collection at one moment. Therefore, the search sees every
acknowledged write by any process that uses the same data folder, and never a partial write. Searches that wait in the
queue and have the same parameters share one call of faiss. A quick search is answered in the caller's thread if no
other search is running.

Hits with equal scores are sorted by id. Scores are rounded to six decimal places, because the seventh decimal place
depends on the order of summation.
"""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt
import orjson

from service.errors import AnswerTooLarge, InvalidRequest, ServiceError, StorageDamaged
from service.search.checks import check_k, check_match, check_named, check_reference, normalised_rows, rows_of
from service.search.filters import Filter, matches
from service.search.maintenance import Maintenance
from service.search.partners import version_with
from service.search.segments import Allowed, Neighbours
from service.search.selection import Selections
from service.search.store import MAX_DEPTH, MAX_METADATA_BYTES, Floats, Hits, SearchParams
from service.search.threads import Workers
from service.search.view import View, Views
from service.sqlite import translated
from service.stamp import Stamp

AT_ONCE_S: Final = 0.001
"""The duration in seconds up to which a search may block the event loop."""
DIGITS: Final = 6
"""Scores are rounded to this many decimal places."""
_SCALE: Final = 10**DIGITS  # `round(score, DIGITS)` is several times slower than rounding to an integer
AT_ONCE_K: Final = 100
"""A search with a larger k does not run in the caller's thread, because its duration is not known."""
TIED: Final = 1024
"""The highest number of items that an approximate search fetches if more than k items may have the k-th score. Among
the items with this score, the items with the smallest ids are chosen. The limit is the same for every smaller k, so
that pages of a result do not overlap."""
IN_TURN: Final = 4
"""The number of consecutive searches of one task that are answered before the task yields to other tasks."""
ATTEMPTS: Final = 100
"""The highest number of attempts for a filtered search. The search is repeated if items change while it runs. The limit
ensures that a thread never loops forever."""


ROUNDED: Final = 5e-7
"""The squared length of a vector of length 1 in float32 differs from 1 by less than this."""
AT_A_TIME: Final = 128
"""The number of hits whose metadata is read and parsed at a time."""

_USUAL: Final = SearchParams()
_MAX_HIT_BYTES: Final = 2 * MAX_METADATA_BYTES  # of the JSON text of a hit: metadata, id and source


class _Query(NamedTuple):
    """The arguments of one call of `search`."""

    collection: str
    vectors: npt.NDArray[Any]  # [q, D], of any length except 0
    k: int
    tag: str
    where: Filter | None
    params: SearchParams
    assumed: bool
    max_bytes: int | None  # limit of the metadata of all hits; None if they cannot reach the limit


class Searcher:
    """The part of the embedded store that answers searches. It caches the views of recently searched collections."""

    def __init__(
        self,
        views: Views,
        stamp: Stamp,
        maintenance: Maintenance,
        connect: Callable[[], sqlite3.Connection],
        read: Callable[..., Awaitable[Any]],
        threads: int,
    ) -> None:
        self._views = views
        self._stamp = stamp
        self._maintenance = maintenance
        self._connect, self._read = connect, read
        self._selections = Selections()
        self._local = threading.local()
        self._searching = 0  # searches in the search threads
        self._first: asyncio.Task[Any] | None = None  # the first task to search in this turn of the event loop
        self._in_turn = 0  # searches of that task
        self._seconds: dict[str, float] = {}  # collection -> usual duration of a search
        self._at_stamp: tuple[int, dict[tuple[str, str], View]] = (
            0,
            {},
        )  # a stamp, and the views for it by name and tag
        self._workers: Workers[_Query] = Workers("store-search", threads, self._make_worker)

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
        queries = rows_of(vectors)
        if max_bytes is not None and check_k(k) * len(queries) * _MAX_HIT_BYTES <= max_bytes:
            max_bytes = None
        if (collection, tag) not in self._at_stamp[1]:  # otherwise the name was checked before
            check_reference(collection)
        query = _Query(collection, queries, check_k(k), tag, where, params or _USUAL, assumed, max_bytes)
        answers: list[Hits]
        if where is not None:  # it may read all metadata, and other searches must not wait for that
            answers = await self._read(partial(self._filtered, query), as_one=False)
            return answers
        if self._is_first():
            if self._in_turn > IN_TURN:
                await asyncio.sleep(0)
            if not self._searching and (hits := self._at_once(query)) is not None:
                return hits
        self._searching += 1
        try:
            shared = (collection, k, tag, query.params, query.vectors.shape[1], assumed)
            answers = await self._workers.do(query, shared if max_bytes is None else object())
            return answers
        finally:
            self._searching -= 1

    def _is_first(self) -> bool:
        """Return whether no other task is searching, either in a search thread or in this iteration of the event loop.
        Count the searches of this task in this iteration."""
        if self._searching:
            return False
        task = asyncio.current_task()
        if self._first is None:
            self._first, self._in_turn = task, 0
            asyncio.get_running_loop().call_soon(self._next_turn)
        if self._first is not task:
            return False
        self._in_turn += 1
        return True

    def _next_turn(self) -> None:
        self._first = None

    def _at_once(self, query: _Query) -> list[Hits] | None:
        """Answer a quick search in the caller's thread, because waking another thread would take about as long as the
        search. Return a list of hits for each query vector.

        Return None without an answer if the search may be slow. This is the case if the collection was not searched
        recently or has changed, k is large, the parameters are not the default, or scores are tied.
        """
        stamp, views = self._at_stamp
        view = views.get((query.collection, query.tag))
        usual = self._seconds.get(query.collection, 1.0) * len(query.vectors)
        if usual > AT_ONCE_S or view is None or stamp != self._stamp.read():
            return None
        if query.k > AT_ONCE_K or (query.params is not _USUAL and query.params != _USUAL):
            return None
        if not getattr(self._local, "alone", False):
            faiss.omp_set_num_threads(1)
            self._local.alone = True
        with suppress(_Tied):
            return self._in_view(view, query, _units(query.vectors), None, at_once=True)
        return None

    def _make_worker(self) -> Callable[[Sequence[_Query]], Sequence[Any]]:
        faiss.omp_set_num_threads(1)  # for this thread only; other search threads and the model also need CPUs
        db = self._connect()

        def work(together: Sequence[_Query]) -> Sequence[Any]:
            if len(together) == 1:
                vectors = _units(together[0].vectors)
            else:
                try:
                    vectors = normalised_rows(np.concatenate([query.vectors for query in together]))
                except InvalidRequest:  # a vector that cannot be normalised must not fail the other searches
                    return [_result(work, query) for query in together]
            with translated("the vector store"):
                answers = self._answer(db, together[0], vectors)
            if len(answers) == len(together):
                return [[hits] for hits in answers]
            each = iter(answers)
            return [[next(each) for _ in query.vectors] for query in together]

        return work

    def _filtered(self, query: _Query, db: sqlite3.Connection) -> list[Hits]:
        faiss.omp_set_num_threads(1)  # for this thread only
        return self._answer(db, query, _units(query.vectors))

    def _answer(self, db: sqlite3.Connection, query: _Query, vectors: Floats) -> list[Hits]:
        """Return the hits of each of the vectors [q, D]. `query` contains all other arguments of the search."""
        attempts = 0
        while True:
            attempts += 1
            view = self.view(db, query.collection, query.tag)
            allowed = None if query.where is None else self._selections.allowed(db, view, query.where)
            started = time.perf_counter()
            answers = self._in_view(view, query, vectors, allowed)
            if query.where is None and not query.params.exact:
                seconds = (time.perf_counter() - started) / len(vectors)
                self._seconds[query.collection] = 0.8 * self._seconds.get(query.collection, seconds) + 0.2 * seconds
            elif query.where and not all(
                matches(query.where, hit.metadata, hit.id) for hits in answers for hit in hits
            ):
                if attempts < ATTEMPTS:
                    continue  # an item changed after the filter was evaluated
                answers = [
                    Hits.of(hit for hit in hits if matches(query.where, hit.metadata, hit.id)) for hits in answers
                ]
            return answers

    def _in_view(
        self, view: View, query: _Query, vectors: Floats, allowed: Allowed | None, *, at_once: bool = False
    ) -> list[Hits]:
        row = view.row
        info = row.info
        check_match(info, tag=query.tag, dimension=vectors.shape[1])
        if query.assumed:
            check_named(info)
        if not row.count:
            return [Hits.of([]) for _ in vectors]
        widen = self._maintenance.boost(row)
        find = partial(view.search, params=query.params, allowed=allowed, widen=widen)
        deepest = MAX_DEPTH if query.params.exact or query.k >= TIED else TIED
        rankings = _nearest(find, vectors, query.k, 0 if at_once else min(deepest, row.count))
        if query.where is None:
            self._maintenance.observe(view, vectors, [ranking.positions for ranking in rankings], query.params)
        room = None if query.max_bytes is None else _Room(query.max_bytes, query.k * len(rankings))
        return [_hits(view, ranking, query.k, room) for ranking in rankings]

    def view(self, db: sqlite3.Connection, name: str, tag: str) -> View:
        """Return a view of the collection with this name or alias. If only its former has vectors with this tag, return
        a view of the former. The view includes every write that was acknowledged before the call."""
        stamp = self._stamp.read()
        if self._at_stamp[0] != stamp:
            self._at_stamp = (stamp, {})  # also releases dropped collections
        views_at, views = self._at_stamp
        view = views.get((name, tag)) if views_at == stamp else None
        if view is None:
            view = self._views.newest(db, version_with(db, name, tag))
            if views_at == stamp:  # the stamp was read first, so the view includes every write up to this stamp
                views[name, tag] = view
        return view

    def close(self) -> None:
        """Answer the queued searches without filters, then stop their threads."""
        self._workers.close()


class _Tied(Exception):
    """The exception for tied scores. It means that more items must be fetched to choose the k nearest."""


def _units(rows: npt.NDArray[Any]) -> Floats:
    """Return query vectors [q, D] with each row scaled to length 1. A single vector that has this length is returned as
    it is: numpy's functions would take a fifth of the time of a search, because their code is not in the CPU's caches.

    Raises:
        InvalidRequest: a vector cannot be scaled.
    """
    if len(rows) == 1 and rows.dtype == np.float32 and rows.flags.c_contiguous:
        square = faiss.fvec_norm_L2sqr(faiss.swig_ptr(rows), rows.shape[1])
        if abs(square - 1) < ROUNDED:
            return rows
    return normalised_rows(rows)


def _result(work: Callable[[Sequence[_Query]], Sequence[Any]], query: _Query) -> Any:
    """Return the result or the error of a single search."""
    try:
        [result] = work([query])
    except ServiceError as error:
        return error
    return result


class _Ranking(NamedTuple):
    """The items that were found for one query, best first."""

    scores: list[float]
    positions: list[int]


def _nearest(find: Callable[..., Neighbours], vectors: Floats, k: int, deepest: int) -> list[_Ranking]:
    """Return a ranking for each of the vectors [q, D]. It contains the k nearest items, followed by further items with
    the same score as the k-th item.

    At most `deepest` items are fetched to find these further items. `find(vectors, k=...)` runs the search.

    Raises:
        _Tied: `deepest` is 0, and further items may have the same score as the k-th item.
    """
    rankings = _rankings(find, vectors, k + 1)
    depth, tied = k + 1, [which for which, ranking in enumerate(rankings) if _is_tied(ranking, k, k + 1)]
    if tied and not deepest:
        raise _Tied
    while tied and depth < deepest:
        depth = min(4 * depth, deepest)
        for which, ranking in zip(tied, _rankings(find, vectors[tied], depth), strict=True):
            rankings[which] = ranking
        tied = [which for which in tied if _is_tied(rankings[which], k, depth)]
    return [_cut(ranking, k) for ranking in rankings]


def _rankings(find: Callable[..., Neighbours], vectors: Floats, depth: int) -> list[_Ranking]:
    neighbours = find(vectors, k=depth)
    rankings = []
    for exact_scores, positions in zip(neighbours.scores.tolist(), neighbours.positions.tolist(), strict=True):
        if positions[-1] < 0:  # fewer items were found
            positions = positions[: positions.index(-1)]
        scores = [round(score * _SCALE) / _SCALE for score in exact_scores[: len(positions)]]
        if scores and (scores[0] > 1 or scores[-1] < -1):  # vectors in half precision do not have exactly length 1
            scores = [min(1.0, max(-1.0, score)) for score in scores]
        rankings.append(_Ranking(scores, positions))
    return rankings


def _is_tied(ranking: _Ranking, k: int, depth: int) -> bool:
    return len(ranking.scores) == depth and ranking.scores[-1] == ranking.scores[k - 1]


def _cut(ranking: _Ranking, k: int) -> _Ranking:
    """Return a ranking without the items that have a lower score than the k-th item."""
    scores, positions = ranking
    end = min(k, len(scores))
    while end < len(scores) and scores[end] == scores[k - 1]:
        end += 1
    return _Ranking(scores[:end], positions[:end])


class _Room:
    """Counts the bytes of the metadata of all hits of a search, before they are parsed. `most` is the limit, and
    `wanted` the number of hits that the search may have."""

    def __init__(self, most: int, wanted: int) -> None:
        self._most, self._wanted = most, wanted
        self._bytes = self._hits = 0

    def add(self, payloads: Sequence[bytes]) -> None:
        """Count some hits.

        Raises:
            AnswerTooLarge: the limit is exceeded.
        """
        self._bytes += sum(map(len, payloads))
        self._hits += len(payloads)
        if self._bytes > self._most:
            raise AnswerTooLarge(
                f"the {self._wanted:,} results would have about {self._bytes * self._wanted // self._hits:,} bytes of "
                f"metadata, and at most {self._most:,} are allowed: ask for fewer results (k, group_size, offset) or "
                "queries at a time",
                param="k",
            )


def _hits(view: View, ranking: _Ranking, k: int, room: _Room | None) -> Hits:
    """Return the hits for the k best items of a ranking. Hits with equal scores are sorted by id. If there is a `room`,
    their metadata must fit into it."""
    scores, positions = ranking
    columns = _columns(view.payloads(positions[:AT_A_TIME]), room)
    for begin in range(AT_A_TIME, len(positions), AT_A_TIME):
        more = _columns(view.payloads(positions[begin : begin + AT_A_TIME]), room)
        columns = tuple(column + rest for column, rest in zip(columns, more, strict=True))
    if len(set(scores)) < len(scores):
        ids = columns[0]
        order = sorted(range(len(ids)), key=lambda at: (-scores[at], ids[at]))[:k]
        scores, columns = [scores[at] for at in order], tuple([column[at] for at in order] for column in columns)
    ids, metadata, sources = columns
    return Hits(ids, scores, metadata, sources)


def _columns(payloads: Sequence[bytes], room: _Room | None) -> tuple[Any, ...]:
    """Return the ids, the metadata and the sources of items, from their payloads. They must fit into the `room`.

    Raises:
        AnswerTooLarge: they do not fit.
        StorageDamaged: a payload is not a JSON array of three values.
    """
    if room is not None:
        room.add(payloads)
    if not payloads:
        return (), (), ()
    with suppress(ValueError, TypeError):
        rows = orjson.loads(b"[%b]" % b",".join(payloads))  # one call instead of one for each hit
        ids, metadata, sources = zip(*rows, strict=True)
        if len(ids) == len(payloads):
            return ids, metadata, sources
    raise StorageDamaged("the vector store is damaged: the metadata of an item is broken")
