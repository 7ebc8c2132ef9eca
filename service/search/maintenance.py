"""Background work of the embedded store: builds segments (immutable files of vectors) from the tail (the items that are
in no segment yet), merges segments, and measures recall.

If several processes use the same data folder, only the process that holds the lock on `maintenance.lock` builds and
merges segments. The other processes find the new segments in the database. The files of a new segment are written and
synced first. Then one transaction adds the segment to the database and removes the segments that it replaces.
Therefore, a crash at any moment leaves either the old or the new state. A crash may also leave an unused folder, which
is deleted later.

The maintenance thread runs at low priority, so it mostly uses CPU time that the service does not need. If an error
occurs, for example because the disk is full, the error is logged and the work is retried later. Searches continue with
the existing segments.
"""

import contextlib
import logging
import os
import random
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import faiss
import numpy as np

from model.cpus import available_cpus
from model.files import lock_file
from service.errors import CollectionNotFound, ServiceError, StorageDamaged
from service.search import database, snapshots
from service.search.building import (
    Stopped,
    build,
    kind_for,
    new_folder,
    recall,
    remove_folders,
    write,
)
from service.search.damage import Damage
from service.search.database import Chunk, Point, Row, SegmentRow
from service.search.indexes import INDEX_FILE, structure_of
from service.search.kinds import EXACT, kind_named
from service.search.segments import LivePart, Positions
from service.search.store import Floats, SearchParams
from service.search.view import View, Views
from service.sqlite import is_damage, snapshot, transaction
from service.stamp import Stamp

log = logging.getLogger(__name__)

SEAL_ROWS: Final = 8192
"""The number of items in the tail at which these items become a segment. Searching a tail of this length takes about a
millisecond."""
MERGE_SHARE: Final = 0.1
"""The small segments are merged into the large segment when their total size exceeds this share of the large segment's
size. This way, each vector is copied only a few times."""
REBUILD_SHARE: Final = 0.25
"""The share that is used instead of MERGE_SHARE if vectors cannot be added to the index of the large segment. A merge
then rebuilds the index."""
DEAD_SHARE: Final = 0.2
"""A segment is rebuilt if more than this share of its vectors is deleted."""
MANY: Final = 4
IDLE_S: Final = 3.0
RETRY_S: Final = 60.0
ORPHAN_S: Final = 120.0
"""The time in seconds for which an unused folder is kept after its segment was replaced. A reader may still be opening
the segment."""
NICE: Final = 10
RECALL_EVERY_S: Final = 1.0
RECALL_WINDOW: Final = 128
RECALL_ENOUGH: Final = 16
MAX_BOOST: Final = 8.0


def _alive(part: LivePart) -> int:
    return len(part.segment.numbers) - len(part.dead)


class Plan(NamedTuple):
    """A plan for the next new segment. It lists what the segment is built from."""

    parts: tuple[LivePart, ...]  # adjacent segments
    with_tail: bool = False
    grow: bool = False  # extend the graph of the first part instead of building a new one


def plan(view: View, *, seal_rows: int, idle: bool = False, settle: bool = False) -> Plan | None:
    """Return a plan for the most urgent change to the segments of a collection, or None if no change is needed. If
    `idle` is true, segments are merged earlier than usual. If `settle` is true, all items are merged into one segment.

    The first segment is large, and its index takes a long time to build. The other segments are small and quick to
    build, and they have no index. They are merged with each other when there are many of them, and into the large
    segment when their total size is large enough. When at least `seal_rows` items are in no segment, these items become
    a small segment or are merged into the large segment.
    """
    spec, parts, tail = view.row.spec.index, view.parts, len(view.tail.numbers)
    for part in parts:
        if not part.segment.whole or len(part.dead) > DEAD_SHARE * len(part.segment.numbers):
            return Plan((part,))
    sizes = [_alive(part) for part in parts]
    if settle or tail >= seal_rows:
        kind = kind_for(spec, sum(sizes) + tail)
        grow = _can_grow(parts, kind)
        if settle:
            settled = len(parts) == 1 and not tail and parts[0].segment.row.kind == kind
            return None if settled or not (parts or tail) else Plan(parts, tail > 0, grow)
        # After a bulk upload, the tail has a large share of all items and is merged into the large segment at once.
        return Plan(parts, True, grow) if tail >= (MERGE_SHARE if grow else 1) * sum(sizes) else Plan((), True)
    if not parts:
        return None
    kind, rest = kind_for(spec, sum(sizes)), sum(sizes[1:])
    grow = _can_grow(parts, kind)
    share = MERGE_SHARE if grow or kind == EXACT.name else REBUILD_SHARE
    if parts[0].segment.row.kind != kind or rest > share * sizes[0] or (idle and grow and rest >= seal_rows):
        return Plan(parts, grow=grow)
    return Plan(parts[1:]) if len(parts) - 1 > MANY else None


def _can_grow(parts: Sequence[LivePart], kind: str) -> bool:
    """Return whether vectors can be added to the index of the first segment in `parts`. This requires the index file,
    which another process may have deleted."""
    if not parts or parts[0].segment.row.kind != kind or not structure_of(kind_named(kind)).can_grow:
        return False
    return (parts[0].segment.folder / INDEX_FILE).exists()


class Maintenance:
    """The maintenance thread of a store. It also determines the search effort from the measured recall."""

    def __init__(
        self,
        data_dir: Path,
        views: Views,
        stamp: Stamp,
        connect: Callable[[], sqlite3.Connection],
        *,
        interval_s: float = 1.0,
        seal_rows: int = SEAL_ROWS,
        build_threads: int | None = None,
        on_recall: Callable[[str, float], None] = lambda collection, ratio: None,
        may_work: Callable[[], bool] = lambda: True,
        damage: Damage | None = None,
    ) -> None:
        """Prepare the thread without starting it.

        Args:
            build_threads: the number of threads that build a segment. The default is half the number of CPUs. OpenMP
                threads spin while they wait for each other, so a build with one thread per CPU would be slow while the
                service is busy.
            on_recall: a function that is called after each measurement, with the name of the collection and its mean
                recall.
            may_work: a function that is called before each round of work. If it returns False, nothing is changed.
            damage: the damaged collections of the store, which are left alone.
        """
        self._root = data_dir / "segments"
        self._snapshots = data_dir / "snapshots"
        self._lock_path = data_dir / "maintenance.lock"
        self._views = views
        self._stamp = stamp
        self._connect = connect
        self._interval_s = interval_s
        self._seal_rows = seal_rows
        self._build_threads = build_threads or max(1, available_cpus() // 2)
        self._on_recall = on_recall
        self._may_work = may_work
        self._damage = damage or Damage()
        self._recalls: dict[int, Recall] = {}
        self._samples: deque[tuple[View, Floats, Positions]] = deque(maxlen=4)
        self._sampled_at = 0.0
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._working = threading.Lock()  # held while segments are changed, by this thread or by `settle`
        self._retry_at: dict[int, float] = {}
        self._unused: dict[str, float] = {}  # folder -> when it was first found unused
        self._thread = threading.Thread(target=self._run, name="store-maintenance", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Wake the maintenance thread after a write."""
        self._wake.set()

    def close(self) -> None:
        """Stop the thread and wait up to 30 seconds for it to end. A running build ends at its next step and is
        discarded."""
        self._stop.set()
        self._wake.set()
        self._thread.join(30)

    # ---- recall

    def boost(self, row: Row) -> float:
        """Return the factor by which searches multiply the tuned search effort. The factor rises above 1 if the
        measured recall is below the target."""
        recalled = self._recalls.get(row.key)
        return 1.0 if recalled is None else recalled.boost

    def stats(self, row: Row) -> dict[str, Any]:
        """Return a dictionary with two entries. `recall` is the mean recall of recent live queries, or None if it has
        not been measured yet. `boost` is the factor by which searches multiply the tuned search effort."""
        recalled = self._recalls.get(row.key)
        return {"recall": recalled.mean if recalled else None, "boost": self.boost(row)}

    def observe(self, view: View, vectors: Floats, answers: Sequence[Sequence[int]], params: SearchParams) -> None:
        """Sample a live query to measure recall. At most once per RECALL_EVERY_S seconds, one of the queries `vectors`
        [q, D] is chosen at random and stored with its answer. The maintenance thread later compares this answer with
        the exact one. `answers` contains the positions of the items that were found for each query, best first."""
        now = time.monotonic()
        if now - self._sampled_at < RECALL_EVERY_S or params != SearchParams():
            return
        if all(part.segment.index is None for part in view.parts):
            return
        self._sampled_at = now
        which = random.randrange(len(vectors))  # noqa: S311 - a sample, not a secret
        positions = np.array(answers[which][:10], np.int64)
        self._samples.append((view, vectors[which : which + 1], positions))
        self._wake.set()

    def _measure(self) -> None:
        while self._samples and not self._stop.is_set():
            view, vector, answer = self._samples.popleft()
            truth = view.search(vector, max(1, len(answer)), SearchParams(exact=True)).positions
            recalled = self._recalls.setdefault(view.row.key, Recall(view.row.spec.index.target_recall))
            self._on_recall(view.row.name, recalled.add(recall(answer[None], truth)))

    # ---- segments

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # only Linux sets the priority of a single thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        faiss.omp_set_num_threads(1)
        db = self._connect()
        lock: BinaryIO | None = None
        changed_at = time.monotonic()
        while not self._stop.is_set():
            if self._wake.wait(self._interval_s):
                changed_at = time.monotonic()
            self._wake.clear()
            if self._stop.wait(min(0.05, self._interval_s)):  # collects writes that arrive together
                break
            try:
                self._measure()
                if not self._may_work():
                    continue
                lock = lock or lock_file(self._lock_path)
                if lock is not None:
                    with self._working:
                        self._tidy(db, idle=time.monotonic() - changed_at > IDLE_S)
            except Stopped:
                break
            except Exception:
                log.exception("maintenance of the vector store failed; it will be retried")
                self._stop.wait(self._interval_s)
        if lock is not None:
            lock.close()

    def settle(self, collection: str) -> None:
        """Merge all items of a collection into one segment. This work is done in the calling thread."""
        db = self._connect()
        with self._working:
            while self._step(db, collection, settle=True):
                pass
        db.close()

    def _tidy(self, db: sqlite3.Connection, *, idle: bool) -> None:
        with snapshot(db):
            rows = database.with_partners(db)
            used = database.folders(db)
        self._views.forget(self._views.keys() - {row.key for row in rows})
        self._remove_orphans(used)
        self._remove_unfinished(db)
        for row in rows:
            if self._damage.holds(row) or self._retry_at.get(row.key, 0) > time.monotonic():
                continue
            try:
                while self._step(db, row.key, idle=idle) and not self._stop.is_set():
                    pass
            except CollectionNotFound:
                continue
            except StorageDamaged as error:
                self._damage.mark(row, error)
            except (OSError, RuntimeError, ValueError, ServiceError, sqlite3.Error, MemoryError) as error:
                if isinstance(error, sqlite3.Error) and is_damage(error):
                    self._damage.mark(row, error)
                    continue
                self._retry_at[row.key] = time.monotonic() + RETRY_S
                log.error("collection %r: cannot build a segment (%s); retrying in %g s", row.name, error, RETRY_S)

    def _remove_orphans(self, used: set[str]) -> None:
        now = time.monotonic()
        there = {folder.name for folder in self._root.iterdir()} if self._root.is_dir() else set()
        self._unused = {name: self._unused.get(name, now) for name in there - used}
        remove_folders(self._root, [name for name, since in self._unused.items() if now - since >= ORPHAN_S])

    def _remove_unfinished(self, db: sqlite3.Connection) -> None:
        """Remove unfinished snapshots and restores that a crash left behind."""
        snapshots.tidy(self._snapshots)
        if database.hidden(db):
            with transaction(db):  # no restore can finish and get its name during this transaction
                for key, name in database.hidden(db):
                    if not snapshots.is_restoring(self._snapshots, name):
                        database.drop(db, key)

    def _current(self, db: sqlite3.Connection, collection: str | int) -> View:
        row = database.find(db, collection) if isinstance(collection, str) else database.by_key(db, collection)
        return self._views.newest(db, row)

    def _step(self, db: sqlite3.Connection, collection: str | int, *, idle: bool = False, settle: bool = False) -> bool:
        """Carry out the most urgent change to the segments of a collection. Return whether a change was needed."""
        view = self._current(db, collection)
        wanted = plan(view, seal_rows=self._seal_rows, idle=idle, settle=settle)
        if wanted is not None:
            self._replace(db, view, wanted)
        return wanted is not None

    def _replace(self, db: sqlite3.Connection, view: View, wanted: Plan) -> None:
        """Build a segment according to a plan, and replace the old segments in the plan with the new segment.

        If a graph is extended, its deleted vectors remain in the graph and stay marked as deleted.
        """
        started = time.perf_counter()
        row, parts, tail = view.row, wanted.parts, view.tail
        base = parts[0].segment if wanted.grow else None
        old = [part.segment.row for part in parts]
        after = base.row.last if base else (old[0].first if old else int(tail.numbers[0])) - 1
        sealed = view.last if wanted.with_tail else old[-1].last
        count = sum(map(_alive, parts)) + (len(tail.numbers) - len(tail.dead) if wanted.with_tail else 0)
        kind = kind_for(row.spec.index, count)
        chunks = self._chunks(db, row, after, sealed)
        faiss.omp_set_num_threads(self._build_threads)
        try:
            built = build(kind, row.spec, chunks, grown_from=base, check=self._check)
        finally:
            faiss.omp_set_num_threads(1)
        new = None
        if len(built.numbers):
            folder, numbers = new_folder(), built.numbers
            files = write(self._root / folder, built)
            new = SegmentRow(0, folder, kind, int(numbers[0]), int(numbers[-1]), len(numbers), built.effort, files)
        with transaction(db):
            point = Point() if base else view.point
            if not database.swap_segments(db, row, old, new, sealed=sealed, point=point):
                return  # another process was faster; the new folder is unused and is deleted later
        self._stamp.bump()
        self._current(db, row.key)  # open it now, so that no search waits for its checksums
        seconds = round(time.perf_counter() - started, 3)
        fields = {"collection": row.name, "kind": kind, "vectors": len(built.numbers), "replaced": len(old)}
        log.info("segment built", extra={"fields": {**fields, "seconds": seconds}})

    def _chunks(self, db: sqlite3.Connection, row: Row, after: int, to: int) -> Iterator[Chunk]:
        """Yield the items with numbers above `after` and up to `to`. Each chunk is read in its own transaction.

        One long transaction would prevent SQLite from truncating its write-ahead log. Items that are deleted between
        two chunks are recorded in the table `removed`.
        """
        while True:
            with snapshot(db):
                database.check_exists(db, row)
                chunk = next(database.read_items(db, row, after=after, to=to), None)
            if chunk is None:
                return
            yield chunk
            after = int(chunk.numbers[-1])

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped


class Recall:
    """The recall of a collection's recent live queries. `boost` is the factor by which searches multiply the tuned
    search effort."""

    def __init__(self, target: float) -> None:
        self._target = target
        self._ratios: deque[float] = deque(maxlen=RECALL_WINDOW)
        self.mean = 1.0
        self.boost = 1.0

    def add(self, ratio: float) -> float:
        """Add the recall of one query and return the new mean. If enough queries were measured and the mean is below
        the target, raise the boost."""
        self._ratios.append(ratio)
        self.mean = sum(self._ratios) / len(self._ratios)
        if len(self._ratios) >= RECALL_ENOUGH and self.mean < self._target and self.boost < MAX_BOOST:
            self.boost *= 1.5
            self._ratios.clear()  # later measurements use the new effort
        return self.mean
