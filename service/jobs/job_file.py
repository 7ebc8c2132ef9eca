"""The SQLite file of jobs: its tables, the conversion of rows, transactions, and events.

Every change of a job stores an event in the same transaction. After the commit, the stamp changes (service/stamp.py),
so that waiting workers and event streams notice the change at once.
"""

import json
import secrets
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from service.errors import JobNotFound
from service.jobs.records import (
    LATEST_ONLY,
    TRANSITIONS,
    Event,
    EventKind,
    Job,
    LeaseLost,
    NewJob,
    Schedule,
    State,
    Step,
    WorkerRow,
)
from service.sqlite import Schema, connect, prepare, transaction, translated
from service.stamp import Stamp

FOLDER: Final = "jobs"
FILE: Final = "jobs.sqlite3"
WHAT: Final = "the job store"
REMOVED_EVENTS_KEPT: Final = 1000
"""Event streams that were interrupted can learn about this many removed jobs."""

_TABLES: Final = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, params TEXT NOT NULL, state TEXT NOT NULL,
    steps TEXT NOT NULL DEFAULT '[]', token INTEGER NOT NULL DEFAULT 0, attempt INTEGER NOT NULL DEFAULT 0,
    losses INTEGER NOT NULL DEFAULT 0, progress REAL NOT NULL DEFAULT 0, best_progress REAL NOT NULL DEFAULT 0,
    text TEXT NOT NULL DEFAULT '', metrics TEXT NOT NULL DEFAULT '{}', error TEXT,
    created REAL NOT NULL, not_before REAL NOT NULL, started REAL, ended REAL,
    worker TEXT, lease_until REAL, requested_by TEXT, cancel_requested INTEGER NOT NULL DEFAULT 0,
    waiting_for TEXT, parent TEXT, schedule TEXT, key TEXT, log_bytes INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX jobs_by_state ON jobs (state, number);
CREATE UNIQUE INDEX jobs_by_key ON jobs (coalesce(requested_by, ''), key) WHERE key IS NOT NULL;
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, time REAL NOT NULL, kind TEXT NOT NULL,
    data TEXT NOT NULL
) STRICT;
CREATE INDEX events_by_job ON events (job, kind, number);
CREATE TABLE workers (
    id TEXT PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, kinds TEXT NOT NULL, started REAL NOT NULL,
    heartbeat REAL NOT NULL, job TEXT
) STRICT;
CREATE TABLE schedules (
    name TEXT PRIMARY KEY, kind TEXT NOT NULL, params TEXT NOT NULL, every TEXT NOT NULL, zone TEXT NOT NULL,
    created REAL NOT NULL, next_at REAL NOT NULL, requested_by TEXT, last_job TEXT
) STRICT;
"""
SCHEMA: Final = Schema("a job store", 0x64326A62, (_TABLES,))


class JobFile:
    """An open connection to the file. Several threads may use it; they take turns."""

    def __init__(self, folder: Path, now: Callable[[], float]) -> None:
        """Open the file in `folder`. Create it if it does not exist. `now` returns the time in seconds since 1970.

        Raises:
            StorageFailed: the file cannot be used.
        """
        path = folder / FILE
        prepare(path, SCHEMA, what=WHAT)
        with translated(WHAT):
            self._db = connect(path)
            self._db.row_factory = sqlite3.Row
        self._lock = threading.RLock()
        self.stamp = Stamp(folder / "jobs.stamp")
        self.now = now

    @contextmanager
    def write(self, *, quietly: bool = False) -> Iterator[sqlite3.Connection]:
        """Run the `with` block in one write transaction, and change the stamp when it is committed. The stamp does not
        change if `quietly` is True, because nobody waits for the change."""
        with self._lock, translated(WHAT):
            with transaction(self._db):
                yield self._db
            if not quietly:
                self.stamp.bump()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Run the `with` block with the connection. Each statement sees the last commit."""
        with self._lock, translated(WHAT):
            yield self._db

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def add_event(self, db: sqlite3.Connection, job: str, kind: EventKind, data: Mapping[str, Any]) -> None:
        """Store an event. It replaces the previous one if only the newest event of its kind counts."""
        if kind in LATEST_ONLY:
            db.execute("DELETE FROM events WHERE job = ? AND kind = ?", (job, kind))
        db.execute(
            "INSERT INTO events (job, time, kind, data) VALUES (?, ?, ?, ?)",
            (job, self.now(), kind, json.dumps(dict(data))),
        )

    def forget_events(self, db: sqlite3.Connection, job: str) -> None:
        """Delete the events of a removed job, and store that it was removed."""
        db.execute("DELETE FROM events WHERE job = ?", (job,))
        self.add_event(db, job, "removed", {})
        db.execute(
            "DELETE FROM events WHERE kind = 'removed' AND number <= (SELECT number FROM events WHERE kind = 'removed' "
            "ORDER BY number DESC LIMIT 1 OFFSET ?)",
            (REMOVED_EVENTS_KEPT,),
        )

    def insert(self, db: sqlite3.Connection, new: NewJob) -> Job:
        """Store a new job, and return it."""
        now = self.now()
        job_id = f"{new.kind}-{secrets.token_hex(5)}"
        db.execute(
            "INSERT INTO jobs (id, kind, params, state, created, not_before, requested_by, parent, schedule, key) "
            "VALUES (?, ?, ?, 'queued', ?, ?, ?, ?, ?, ?)",
            (
                *(job_id, new.kind, json.dumps(dict(new.params)), now, new.not_before or now),
                *(new.requested_by, new.parent, new.schedule, new.key),
            ),
        )
        self.add_event(db, job_id, "state", {"state": "queued", "attempt": 0})
        return find_job(db, job_id)

    def move(self, db: sqlite3.Connection, job: Job, state: State, **values: Any) -> None:
        """Change the state of a job and further columns, if its state and token are still those of `job`."""
        assert state in TRANSITIONS[job.state], f"{job.state} -> {state}"
        columns = {"state": state, **values}
        changed = db.execute(
            f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in columns)} WHERE id = ? AND state = ? AND token = ?",
            (*columns.values(), job.id, job.state, job.token),
        ).rowcount
        if changed != 1:
            raise LeaseLost(f"job {job.id} has changed meanwhile")
        data = {"state": state, "attempt": values.get("attempt", job.attempt)}
        if values.get("error") is not None:
            data["error"] = values["error"]
        self.add_event(db, job.id, "state", data)

    def add_step(self, db: sqlite3.Connection, job: Job, name: str, result: Any) -> None:
        """Store a finished step of a job. It replaces a step of the same name."""
        steps = [step for step in job.steps if step.name != name]
        steps.append(Step(name, result, self.now()))
        texts = json.dumps([asdict(step) for step in steps])
        db.execute("UPDATE jobs SET steps = ?, losses = 0 WHERE id = ?", (texts, job.id))
        self.add_event(db, job.id, "step", {"name": name, "result": result})


def find_job(db: sqlite3.Connection, job_id: str) -> Job:
    """Return a job, or raise JobNotFound."""
    row = db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise JobNotFound(f"there is no job {job_id[:80]!r}", param="id")
    return job_of(row)


def marks(values: Collection[object]) -> str:
    """Return a question mark for each value, for the parentheses of an SQL `IN`."""
    return ", ".join("?" * len(values))


def job_of(row: sqlite3.Row) -> Job:
    """Return the job in a row of the table."""
    names = [name for name in row.keys() if name not in ("number", "key", "best_progress")]  # noqa: SIM118
    return Job(
        **{
            **{name: row[name] for name in names},
            "params": json.loads(row["params"]),
            "metrics": json.loads(row["metrics"]),
            "steps": tuple(Step(**step) for step in json.loads(row["steps"])),
            "cancel_requested": bool(row["cancel_requested"]),
        }
    )


def event_of(row: sqlite3.Row) -> Event:
    """Return the event in a row of the table."""
    return Event(row["number"], row["job"], row["time"], row["kind"], json.loads(row["data"]))


def worker_of(row: sqlite3.Row) -> WorkerRow:
    """Return the worker in a row of the table."""
    values = dict(zip(row.keys(), row, strict=True))
    return WorkerRow(**{**values, "kinds": tuple(json.loads(row["kinds"]))})


def schedule_of(row: sqlite3.Row) -> Schedule:
    """Return the schedule in a row of the table."""
    values = dict(zip(row.keys(), row, strict=True))
    return Schedule(**{**values, "params": json.loads(row["params"])})
