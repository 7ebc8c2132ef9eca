"""Which model is live: the record in the data folder that all processes share.

A *generation* is a model that was live or is prepared to be: its fingerprint, its artifact, and the engine and
precision that compute its vectors. At most one generation is live. `--model auto` means the live generation, so a new
artifact in the folder never goes live by itself. Every process that serves (a *replica*) notes each second which
generations it has loaded. A switch waits for all of them.

    candidate   replicas load it, so that they can embed with it
    live        answers requests
    former      was live before; replicas keep it loaded until its window ends, so that a rollback takes no time
    retired     no longer loaded
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from service import sqlite
from service.errors import Conflict
from service.sqlite import Schema
from service.stamp import Stamp

State = Literal["candidate", "live", "former", "retired"]
LOADED: Final[tuple[State, ...]] = ("candidate", "live", "former")
"""The states of the generations that replicas load."""
REPLICA_LOST_S: Final = 10.0
"""The time in seconds after which a replica that has not been heard of no longer counts."""
_ALL: Final = """SELECT number, fingerprint, name, path, engine, precision, state, created, live_since, keep_until,
    reason, metrics FROM generations"""
_SCHEMA: Final = Schema(
    what="a record of models",
    application_id=0x6476326D,  # "dv2m"
    scripts=(
        """
CREATE TABLE generations (
    number INTEGER PRIMARY KEY AUTOINCREMENT, fingerprint TEXT NOT NULL, name TEXT NOT NULL, path TEXT NOT NULL,
    engine TEXT NOT NULL, precision TEXT NOT NULL, state TEXT NOT NULL, created REAL NOT NULL, live_since REAL,
    keep_until REAL,  -- end of the window of a former generation
    reason TEXT NOT NULL, metrics TEXT NOT NULL, UNIQUE (fingerprint, precision)
);
CREATE UNIQUE INDEX one_live ON generations (state) WHERE state = 'live';
CREATE TABLE replicas (id TEXT PRIMARY KEY, started REAL NOT NULL, seen REAL NOT NULL, loaded TEXT NOT NULL);
CREATE TABLE requested (only_row INTEGER PRIMARY KEY CHECK (only_row = 1), model TEXT NOT NULL);
""",
        """
CREATE TABLE applied (
    setting TEXT NOT NULL, value TEXT NOT NULL, generation INTEGER NOT NULL, time REAL NOT NULL,
    PRIMARY KEY (setting, value)
);
INSERT INTO applied SELECT 'model', model, COALESCE(
    (SELECT max(number) FROM generations WHERE reason = 'model=' || model || ' at a start'),
    (SELECT number FROM generations WHERE state = 'live'), 0
), COALESCE((SELECT live_since FROM generations WHERE state = 'live'), 0) FROM requested WHERE model != 'auto';
DROP TABLE requested;
""",
    ),
)


@dataclass(frozen=True)
class Generation:
    """A model that is or was live, or is prepared to be. Times are in seconds since 1970."""

    number: int
    fingerprint: str
    name: str
    path: Path
    engine: str
    precision: str
    state: State
    created: float
    live_since: float | None
    keep_until: float | None
    reason: str
    metrics: dict[str, Any]

    @property
    def model(self) -> tuple[str, str]:
        """The fingerprint and the precision, which together determine the vectors."""
        return self.fingerprint, self.precision


@dataclass(frozen=True)
class Replica:
    """A process that serves requests, and the numbers of the generations that it has loaded."""

    id: str
    started: float
    seen: float
    loaded: frozenset[int]


@dataclass(frozen=True)
class Applied:
    """A value of a setting that has been applied: the number of the generation that it made live, and the time in
    seconds since 1970."""

    generation: int
    time: float


class Generations:
    """The record of generations in `data_dir`. Several processes and threads may use it at the same time."""

    def __init__(self, data_dir: Path, now: Callable[[], float] = time.time) -> None:
        self._path = data_dir / "models.sqlite3"
        sqlite.prepare(self._path, _SCHEMA)
        self._anchor = sqlite.anchor(self._path)  # so that the record can be read on a full disk
        self._stamp = Stamp(data_dir / "models.stamp")
        self._now = now

    @staticmethod
    def exists(data_dir: Path) -> bool:
        """Return whether a data folder has such a record."""
        return (data_dir / "models.sqlite3").is_file()

    def stamp(self) -> int:
        """Return a number that changes with every change of a generation."""
        return self._stamp.read()

    def all(self) -> list[Generation]:
        """Return all generations, oldest first."""
        with self._reading() as db:
            return _all(db)

    def live(self) -> Generation | None:
        return next((each for each in self.all() if each.state == "live"), None)

    def window(self) -> Generation | None:
        """Return the former generation if its window is open, so that it can become live again at once."""
        formers = (each for each in self.all() if each.state == "former")
        return next((each for each in formers if each.keep_until is None or each.keep_until > self._now()), None)

    def add(self, fingerprint: str, name: str, path: Path, engine: str, precision: str, *, reason: str) -> Generation:
        """Add a candidate, or return the generation with this fingerprint and precision. If that is retired, it becomes
        a candidate again."""
        with self._writing() as db:
            db.execute(
                """INSERT INTO generations (fingerprint, name, path, engine, precision, state, created, reason, metrics)
                   VALUES (?, ?, ?, ?, ?, 'candidate', ?, ?, '{}') ON CONFLICT (fingerprint, precision) DO UPDATE SET
                   path = excluded.path, engine = excluded.engine,
                   state = CASE state WHEN 'retired' THEN 'candidate' ELSE state END""",
                (fingerprint, name, str(path), engine, precision, self._now(), reason),
            )
            return next(each for each in _all(db) if each.model == (fingerprint, precision))

    def promote(
        self,
        number: int,
        *,
        expected: int | None,
        keep_s: float,
        reason: str = "",
        settings: Mapping[str, str] = MappingProxyType({}),
    ) -> Generation:
        """Make a generation live. The one that was live becomes the former, which stays loaded for `keep_s` seconds,
        and an older former is retired. If the generation is live already, no generation changes. `settings` are the
        values of settings that decide for this generation. They are recorded as applied.

        Raises:
            Conflict: the live generation is no longer number `expected`, there is no such generation, or another
                process has applied one of `settings`.
        """
        with self._writing() as db:
            for setting, value in settings.items():
                if _applied(db, setting, value) is not None:
                    raise Conflict(f"another process has applied {setting}={value}")
                db.execute("INSERT INTO applied VALUES (?, ?, ?, ?)", (setting, value, number, self._now()))
            live = next((each for each in _all(db) if each.state == "live"), None)
            if live is not None and live.number == number:
                return live
            if (live and live.number) != expected:
                raise Conflict(f"generation {live and live.number} is live, not {expected}: another switch was faster")
            db.execute("UPDATE generations SET state = 'retired', keep_until = NULL WHERE state = 'former'")
            until = self._now() + keep_s
            db.execute("UPDATE generations SET state = 'former', keep_until = ? WHERE state = 'live'", (until,))
            changed = db.execute(
                """UPDATE generations SET state = 'live', live_since = ?, keep_until = NULL,
                   reason = CASE ? WHEN '' THEN reason ELSE ? END WHERE number = ?""",
                (self._now(), reason, reason, number),
            ).rowcount
            if not changed:
                raise Conflict(f"there is no generation {number}")
            return next(each for each in _all(db) if each.number == number)

    def retire(self, number: int) -> None:
        """Mark a candidate or a former as retired. The live generation stays as it is."""
        with self._writing() as db:
            db.execute(
                "UPDATE generations SET state = 'retired', keep_until = NULL WHERE number = ? AND state != 'live'",
                (number,),
            )

    def keep(self, number: int) -> None:
        """Let replicas load a former or retired generation as a candidate, because collections have its vectors."""
        with self._writing() as db:
            db.execute(
                "UPDATE generations SET state = 'candidate', keep_until = NULL WHERE number = ? AND state != 'live'",
                (number,),
            )

    def forget(self, number: int) -> None:
        """Delete a retired generation from the record."""
        with self._writing() as db:
            db.execute("DELETE FROM generations WHERE number = ? AND state = 'retired'", (number,))

    def set_metrics(self, number: int, metrics: dict[str, Any]) -> None:
        """Record what was measured when a generation was compared with the live one."""
        with self._writing() as db:
            db.execute("UPDATE generations SET metrics = ? WHERE number = ?", (json.dumps(metrics), number))

    def applied(self, setting: str, value: str) -> Applied | None:
        """Return what a value of a setting has made live, or None if it has not been applied. Only a value that has not
        been applied is a decision: otherwise two processes with different settings would take turns."""
        with self._reading() as db:
            return _applied(db, setting, value)

    def applied_models(self) -> set[str]:
        """Return the fingerprints of the models that values of the setting `model` have made live."""
        query = "SELECT fingerprint FROM generations JOIN applied ON generation = number WHERE setting = 'model'"
        with self._reading() as db:
            return {fingerprint for (fingerprint,) in db.execute(query)}

    def beat(self, replica: str, loaded: Sequence[int]) -> None:
        """Note that a replica is running and which generations it has loaded. Forget replicas that are lost."""
        now = self._now()
        with self._writing(is_change=False) as db:
            db.execute("DELETE FROM replicas WHERE seen < ?", (now - REPLICA_LOST_S,))
            db.execute(
                """INSERT INTO replicas VALUES (?, ?, ?, ?)
                   ON CONFLICT (id) DO UPDATE SET seen = excluded.seen, loaded = excluded.loaded""",
                (replica, now, now, json.dumps(sorted(loaded))),
            )

    def leave(self, replica: str) -> None:
        """Note that a replica has ended."""
        with self._writing(is_change=False) as db:
            db.execute("DELETE FROM replicas WHERE id = ?", (replica,))

    def replicas(self) -> list[Replica]:
        """Return the replicas that were heard of within the last `REPLICA_LOST_S` seconds."""
        with self._reading() as db:
            rows = db.execute("SELECT id, started, seen, loaded FROM replicas ORDER BY id").fetchall()
        recent = self._now() - REPLICA_LOST_S
        return [
            Replica(replica, started, seen, frozenset(json.loads(loaded)))
            for replica, started, seen, loaded in rows
            if seen >= recent
        ]

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with sqlite.translated("the record of models"), closing(sqlite.connect(self._path)) as db:
            yield db

    @contextmanager
    def _writing(self, *, is_change: bool = True) -> Iterator[sqlite3.Connection]:
        with self._reading() as db:
            if not is_change:
                db.execute("PRAGMA synchronous = NORMAL")  # after a power failure, no replica is running
            with sqlite.transaction(db):
                yield db
            if is_change:
                self._stamp.bump()


def utc(seconds: float) -> str:
    """Return a time in seconds since 1970 as text for a message."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _applied(db: sqlite3.Connection, setting: str, value: str) -> Applied | None:
    query = "SELECT generation, time FROM applied WHERE setting = ? AND value = ?"
    row = db.execute(query, (setting, value)).fetchone()
    return None if row is None else Applied(*row)


def _all(db: sqlite3.Connection) -> list[Generation]:
    return [_generation(row) for row in db.execute(f"{_ALL} ORDER BY number")]


def _generation(row: tuple[Any, ...]) -> Generation:
    number, fingerprint, name, path, engine, precision, state, created, live_since, keep_until, reason, metrics = row
    times = (created, live_since, keep_until)
    return Generation(
        number, fingerprint, name, Path(path), engine, precision, state, *times, reason, json.loads(metrics)
    )
