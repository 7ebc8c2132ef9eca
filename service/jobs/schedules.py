"""Stored schedules, and the jobs that they create.

A due schedule creates one job, however many workers look at it: the job is stored in the transaction that sets the
schedule's next time. The next time is always in the future, so a schedule that was due several times while nothing ran
creates one job. If the last job of a schedule has not ended, no second one is created.
"""

import json
import sqlite3
from collections.abc import Mapping
from typing import Any

from model.files import name_problem
from service.errors import InvalidRequest, NotFound
from service.jobs.job_file import JobFile, schedule_of
from service.jobs.records import FINISHED, Job, NewJob, Schedule
from service.jobs.schedule import next_time, parse_every, parse_zone


class Schedules:
    """The schedules in a job store."""

    def __init__(self, file: JobFile) -> None:
        self._file = file

    def put(
        self,
        name: str,
        kind: str,
        params: Mapping[str, Any],
        *,
        every: str,
        zone: str = "UTC",
        requested_by: str | None = None,
    ) -> Schedule:
        """Store a schedule. It replaces the one with the same name.

        Args:
            name: its name, which also begins with a letter or digit and has no separators.
            kind, params: the jobs to create. The caller has checked them.
            every: when, see `service/jobs/schedule.py`.
            zone: the time zone.
            requested_by: who asked for it.

        Raises:
            InvalidRequest: the name, `every` or the time zone is not allowed.
        """
        try:
            rule, where = parse_every(every), parse_zone(zone)
        except ValueError as error:
            raise InvalidRequest(str(error), param="every") from error
        if problem := name_problem(name):
            raise InvalidRequest(f"schedule: {problem}", param="name")
        now = self._file.now()
        with self._file.write() as db:
            db.execute(
                "INSERT OR REPLACE INTO schedules (name, kind, params, every, zone, created, next_at, requested_by) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(name, kind, json.dumps(dict(params)), every, zone),
                    *(now, next_time(rule, where, now), requested_by),
                ),
            )
            return _find(db, name)

    def get(self, name: str) -> Schedule:
        """Return a schedule.

        Raises:
            NotFound: there is no such schedule.
        """
        with self._file.read() as db:
            return _find(db, name)

    def all(self) -> list[Schedule]:
        """Return all schedules in the order of their names."""
        with self._file.read() as db:
            return [schedule_of(row) for row in db.execute("SELECT * FROM schedules ORDER BY name")]

    def remove(self, name: str) -> None:
        """Remove a schedule. Its jobs stay.

        Raises:
            NotFound: there is no such schedule.
        """
        with self._file.write() as db:
            _find(db, name)
            db.execute("DELETE FROM schedules WHERE name = ?", (name,))

    def create_due(self) -> list[Job]:
        """Create the jobs of all schedules that are due, and return them. Workers call this about once per second."""
        now = self._file.now()
        with self._file.read() as db:  # first without a write lock, because usually nothing is due
            if db.execute("SELECT 1 FROM schedules WHERE next_at <= ? LIMIT 1", (now,)).fetchone() is None:
                return []
        with self._file.write() as db:
            rows = db.execute("SELECT * FROM schedules WHERE next_at <= ? ORDER BY next_at", (now,)).fetchall()
            return [job for row in rows if (job := self._create(db, schedule_of(row), now)) is not None]

    def _create(self, db: sqlite3.Connection, schedule: Schedule, now: float) -> Job | None:
        """Set the next time of a due schedule, and create its job unless its last job has not ended."""
        following = next_time(parse_every(schedule.every), parse_zone(schedule.zone), now, anchor=schedule.next_at)
        db.execute("UPDATE schedules SET next_at = ? WHERE name = ?", (following, schedule.name))
        last = db.execute("SELECT state FROM jobs WHERE id = ?", (schedule.last_job,)).fetchone()
        if last is not None and last["state"] not in FINISHED:
            return None
        job = self._file.insert(
            db,
            NewJob(schedule.kind, schedule.params, requested_by=schedule.requested_by, schedule=schedule.name),
        )
        db.execute("UPDATE schedules SET last_job = ? WHERE name = ?", (job.id, schedule.name))
        return job


def _find(db: sqlite3.Connection, name: str) -> Schedule:
    row = db.execute("SELECT * FROM schedules WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise NotFound(f"there is no schedule {name[:80]!r}", param="name")
    return schedule_of(row)
