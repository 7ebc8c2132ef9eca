"""The connections and threads with which the embedded store reads and writes its database.

Reads run in several threads, and all writes in one. Both notice if the folder was replaced, and whether the rows of a
collection are damaged.
"""

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeVar

from service import sqlite
from service.clients import current_sender
from service.disk import InPlace, Reserve
from service.errors import CollectionNotFound, StorageDamaged, StorageFailed
from service.fair import FairThreads
from service.search import database
from service.search.damage import Damage, explained
from service.search.filter_sql import add_functions
from service.search.store import StoreHealth
from service.search.threads import Change, Workers
from service.search.writing import Writer
from service.sqlite import snapshot, translated
from service.stamp import Stamp

T = TypeVar("T")


class _Reading:
    """The connection that a read uses at the moment. A filter can make one query run for hours."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._is_unwanted = False

    @contextmanager
    def uses(self, db: sqlite3.Connection) -> Iterator[None]:
        with self._lock:
            if self._is_unwanted:
                raise StorageFailed("nobody waits for this read any more")
            self._db = db
        try:
            yield
        finally:
            with self._lock:
                self._db = None

    def interrupt(self) -> None:
        """Let the running query fail, and no other query of the same connection."""
        with self._lock:
            self._is_unwanted = True
            if self._db is not None:
                self._db.interrupt()


class Access:
    """The access to the database at `path`, which must exist. `start` must be called before the first read or write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = InPlace(path)
        self.reserve = Reserve(path.parent)
        self.damage = Damage()
        self.connections: list[sqlite3.Connection] = []
        self.is_open = True
        self._local = threading.local()

    def start(self, stamp: Stamp, readers: int) -> None:
        """Make the reserve if the disk is nearly full. Start the threads: one for writes, and up to `readers` for
        reads. Each commit changes the stamp."""
        with translated("the vector store"):
            self.reserve.keep()
        writer = Writer(self.connect, stamp, self.place, self.reserve)
        self.writer: Workers[Change] = Workers("store-write", 1, writer.make)
        self._readers = FairThreads(readers, "store-read")

    def connect(self) -> sqlite3.Connection:
        """Open another connection to the file that the store has opened.

        Raises:
            StorageReplaced: another file, or none, is at its path now.
        """
        self.place.check()
        db = sqlite.connect(self.path)
        self.connections.append(db)
        add_functions(db)
        self.place.check()  # the file may have been replaced just before it was opened
        return db

    async def write(self, work: Callable[[sqlite3.Connection], T], *, of: str | None = None, frees: bool = False) -> T:
        """Run the function `work` in the writer thread, within a transaction. Return its result. `of` is the collection
        that it changes, if it changes items. `frees` says that it only deletes."""

        def watched(db: sqlite3.Connection) -> T:
            with self.damage.watching(db, of, is_write=True):
                return work(db)

        try:
            done: T = await self.writer.do(Change(work if of is None else watched, frees))
        except StorageDamaged as error:
            raise (error if of is None else explained(of, error)) from error.__cause__
        return done

    async def read(self, work: Callable[[sqlite3.Connection], T], *, of: str | None = None, as_one: bool = True) -> T:
        """Run the function `work` in a reader thread, with the database connection of that thread. Return its result.
        `of` is the collection whose items it reads. If `as_one` is true, all queries of `work` run in one
        transaction. If the caller is cancelled, the query that runs is interrupted."""
        if not self.is_open:
            raise StorageFailed("the vector store is closed")
        reading = _Reading()

        def run() -> T:
            with translated("the vector store"):
                db = getattr(self._local, "db", None)
                if db is None:
                    db = self._local.db = self.connect()
                with reading.uses(db), snapshot(db) if as_one else nullcontext(), self.damage.watching(db, of):
                    return work(db)

        try:
            return await asyncio.wrap_future(self._readers.submit(current_sender.get(), run))
        except asyncio.CancelledError:
            reading.interrupt()
            raise
        except StorageDamaged as error:
            raise (error if of is None else explained(of, error)) from error.__cause__

    async def mark(self, collection: str, error: StorageDamaged) -> None:
        """Mark a collection in which another thread has found damage."""

        def work(db: sqlite3.Connection) -> None:
            with suppress(CollectionNotFound):
                self.damage.mark(database.find(db, collection), error)

        await self.read(work)

    async def health(self) -> StoreHealth:
        if not self.place.holds():
            return StoreHealth(is_replaced=True)
        names: list[str] = []
        if self.damage:
            names = await self.read(lambda db: self.damage.names(database.every(db)))
        return StoreHealth(is_full=self.reserve.is_short(), damaged=tuple(names))

    def may_work(self) -> bool:
        """Return whether maintenance may change files. If the disk is nearly full, also make the reserve."""
        if not self.place.holds():
            return False
        self.reserve.keep()
        return True

    def close_writer(self) -> None:
        """Finish the queued writes, and end the writer thread."""
        self.writer.close()

    def close(self) -> None:
        """Wait for running reads, and close all connections."""
        self._readers.shutdown(wait=True)
        for db in self.connections:
            db.close()
