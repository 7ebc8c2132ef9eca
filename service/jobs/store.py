"""The store of jobs: the only truth about which jobs exist, who works on them, and how far they are.

Clients create, cancel, approve, retry and remove jobs. Workers claim them and report (`service/jobs/leases.py`). The
store changes a job only if its state is still the one that the call expects (compare-and-set). Any number of processes
of one machine may use the store at the same time. All calls are synchronous, and those that change something sync the
disk.

Each job has a folder, `jobs/<id>` in the data folder, for its log and its files.
"""

import shutil
import sqlite3
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from model.files import lock_file
from service.errors import Conflict, JobNotFound
from service.jobs.job_file import FILE, FOLDER, WHAT, event_of, find_job, job_of, marks
from service.jobs.job_log import JobLog
from service.jobs.leases import Leases
from service.jobs.process import LOCK
from service.jobs.records import FINISHED, STATES, TRANSITIONS, Event, Job, NewJob, State
from service.jobs.schedules import Schedules
from service.jobs.workers import Workers
from service.sqlite import translated
from service.times import iso_time

DEFAULT_KEPT: Final = 1000


class JobStore(Leases):
    """The jobs of one data folder."""

    def __init__(self, data_dir: Path, *, kept: int = DEFAULT_KEPT, now: Callable[[], float] = time.time) -> None:
        """Open the store, and create it if it does not exist.

        Args:
            data_dir: the data folder.
            kept: the number of finished jobs to keep. When a job is created, the oldest finished jobs beyond it are
                removed.
            now: the clock, in seconds since 1970. Processes on several machines need clocks that agree within a second.

        Raises:
            StorageFailed: the file cannot be used.
        """
        super().__init__(data_dir, now=now)
        self._kept = kept
        self.stamp = self._file.stamp
        self.workers = Workers(self._file)
        self.schedules = Schedules(self._file)

    @staticmethod
    def exists(data_dir: Path) -> bool:
        """Return whether a job was ever created in a data folder."""
        return (data_dir / FOLDER / FILE).is_file()

    def close(self) -> None:
        self._file.close()

    def create(self, new: NewJob) -> Job:
        """Store a new job. If a job with the same idempotency key exists, return it instead.

        Raises:
            Conflict: the key was used for a job of another kind or with other parameters.
        """
        with self._file.write() as db:
            if new.key is not None:
                row = db.execute(
                    "SELECT * FROM jobs WHERE key = ? AND coalesce(requested_by, '') = ?",
                    (new.key, new.requested_by or ""),
                ).fetchone()
                if row is not None:
                    return _same(job_of(row), new)
            removed = self._drop_old(db)
            job = self._file.insert(db, new)
        for job_id in removed:
            _remove_log(self.folder(job_id))
        return job

    def get(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            JobNotFound: there is no such job.
        """
        with self._file.read() as db:
            return find_job(db, job_id)

    def jobs(
        self,
        *,
        states: Collection[State] = STATES,
        kinds: Collection[str] | None = None,
        before: str | None = None,
        limit: int = 100,
    ) -> list[Job]:
        """Return jobs, newest first.

        Args:
            states, kinds: only jobs in these states and of these kinds.
            before: the id of a job; only jobs that were created before it.
            limit: the highest number of jobs.

        Raises:
            JobNotFound: the job `before` does not exist.
        """
        with self._file.read() as db:
            below = 2**62 if before is None else _number(db, before)
            query = f"SELECT * FROM jobs WHERE number < ? AND state IN ({marks(states)})"
            if kinds is not None:
                query += f" AND kind IN ({marks(kinds)})"
            values = (below, *states, *(kinds or ()), limit)
            return [job_of(row) for row in db.execute(f"{query} ORDER BY number DESC LIMIT ?", values)]

    def counts(self) -> dict[State, int]:
        """Return the number of jobs in each state."""
        with self._file.read() as db:
            found = {row[0]: int(row[1]) for row in db.execute("SELECT state, count(*) FROM jobs GROUP BY state")}
        return {state: found.get(state, 0) for state in STATES}

    def events(self, after: int = 0, job: str | None = None, limit: int = 100) -> list[Event]:
        """Return the oldest events whose number is greater than `after`, of one job or of all jobs."""
        with self._file.read() as db:
            rows = db.execute(
                "SELECT * FROM events WHERE number > ? AND (? IS NULL OR job = ?) ORDER BY number LIMIT ?",
                (after, job, job, limit),
            )
            return [event_of(row) for row in rows]

    def last_event(self) -> int:
        """Return the number of the newest event, or 0 if there is none."""
        with self._file.read() as db:
            return int(db.execute("SELECT coalesce(max(number), 0) FROM events").fetchone()[0])

    def read_log(self, job_id: str, after: int | None = None, limit: int = 65_536) -> tuple[bytes, int]:
        """Return a part of a job's log, and the position at its end.

        Args:
            job_id: the job.
            after: the position at which the part begins, in bytes. If it is None, return the end of the log. The
                beginning of a long log is not kept, so the part may begin later.
            limit: the highest number of bytes.

        Raises:
            JobNotFound: there is no such job.
        """
        total = self.get(job_id).log_bytes
        with translated(WHAT):
            return JobLog(self.folder(job_id)).read(total, after, limit)

    def request_cancel(self, job_id: str, by: str | None = None) -> Job:
        """Cancel a job. A queued or waiting job is cancelled at once. The worker of a running job is asked to stop.

        Raises:
            JobNotFound: there is no such job.
            Conflict: the job has ended.
        """
        with self._file.write() as db:
            job = find_job(db, job_id)
            if job.state in FINISHED:
                raise Conflict(f"job {job_id} has {_ended(job)} and cannot be cancelled")
            if not job.cancel_requested:
                db.execute("UPDATE jobs SET cancel_requested = 1 WHERE id = ?", (job_id,))
                self._file.add_event(db, job_id, "cancel", {"by": by})
            if job.state != "running":
                self._file.move(db, job, "cancelled", ended=self.now(), waiting_for=None)
            return find_job(db, job_id)

    def approve(self, job_id: str, by: str | None = None) -> Job:
        """Approve the step for which a job waits. The job is queued, and the step counts as finished. The result of the
        step says who approved it and when.

        Raises:
            JobNotFound: there is no such job.
            Conflict: the job does not wait for approval.
        """
        with self._file.write() as db:
            job = find_job(db, job_id)
            if job.state != "waiting" or job.waiting_for is None:
                raise Conflict(f"job {job_id} is {job.state} and does not wait for approval")
            self._file.add_step(db, job, job.waiting_for, {"approved_by": by, "approved_at": iso_time(self.now())})
            self._file.move(db, job, "queued", waiting_for=None, not_before=self.now())
            return find_job(db, job_id)

    def retry(self, job_id: str) -> Job:
        """Queue a failed or cancelled job again. Its finished steps are not repeated.

        Raises:
            JobNotFound: there is no such job.
            Conflict: the job is in another state.
        """
        with self._file.write() as db:
            job = find_job(db, job_id)
            if "queued" not in TRANSITIONS[job.state] or job.state not in FINISHED:
                raise Conflict(f"job {job_id} is {job.state}: only a failed or cancelled job can be retried")
            self._file.move(
                db, job, "queued", not_before=self.now(), ended=None, error=None, losses=0, cancel_requested=0, text=""
            )
            return find_job(db, job_id)

    def remove(self, job_id: str) -> None:
        """Remove a finished job with its log and its folder.

        Raises:
            JobNotFound: there is no such job.
            Conflict: the job has not ended, or one of its processes still runs.
        """
        folder = self.folder(job_id)
        with self._file.write() as db:
            job = find_job(db, job_id)
            if job.state not in FINISHED:
                raise Conflict(f"job {job_id} is {job.state}: cancel it before you remove it")
            if (folder / LOCK).exists():
                lock = lock_file(folder / LOCK)
                if lock is None:
                    raise Conflict(f"a process of job {job_id} still runs: try again later")
                lock.close()
            db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            self._file.forget_events(db, job_id)
        shutil.rmtree(folder, ignore_errors=True)

    def _drop_old(self, db: sqlite3.Connection) -> list[str]:
        """Remove the records of the oldest finished jobs beyond the limit, and return their ids."""
        rows = db.execute(
            f"SELECT id FROM jobs WHERE state IN ({marks(FINISHED)}) ORDER BY number DESC LIMIT -1 OFFSET ?",
            (*FINISHED, self._kept),
        ).fetchall()
        for row in rows:
            db.execute("DELETE FROM jobs WHERE id = ?", (row["id"],))
            self._file.forget_events(db, row["id"])
        return [row["id"] for row in rows]


def _number(db: sqlite3.Connection, job_id: str) -> int:
    row = db.execute("SELECT number FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise JobNotFound(f"there is no job {job_id[:80]!r}", param="before")
    return int(row["number"])


def _same(job: Job, new: NewJob) -> Job:
    """Return the job with the idempotency key of `new`, or raise Conflict if it is a different one."""
    if job.kind == new.kind and job.params == dict(new.params):
        return job
    raise Conflict(
        f"idempotency key {(new.key or '')[:80]!r} belongs to job {job.id}, which has another kind or other parameters"
    )


def _ended(job: Job) -> str:
    return {"succeeded": "succeeded", "failed": "failed", "cancelled": "been cancelled"}[job.state]


def _remove_log(folder: Path) -> None:
    """Remove the log of a job that is no longer stored, and its folder if it is then empty. Results in the folder are
    kept, because they may be a trained network."""
    if folder.is_dir():
        JobLog(folder).remove()
        (folder / LOCK).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
