"""The part of the job store that workers use: they claim jobs, renew their leases, and report.

A worker passes its lease (the job's id and the token of its claim) with every call. The store changes a job only if its
state and token are still those of the lease, so a worker that was silent for too long cannot overwrite the work of its
successor.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from service.jobs.job_file import FOLDER, JobFile, find_job, job_of, marks
from service.jobs.job_log import JobLog
from service.jobs.records import Job, Lease, LeaseLost, State

MAX_LOSSES: Final = 10
"""A job whose worker or child process is killed this many times in a row, without progress in between, fails. Otherwise
a job that needs more memory than the machine has would be started forever."""


class Leases:
    """The jobs of one data folder, as workers see them."""

    def __init__(self, data_dir: Path, *, now: Callable[[], float] = time.time) -> None:
        """Open the store, and create it if it does not exist. `now` is the clock, in seconds since 1970.

        Raises:
            StorageFailed: the file cannot be used.
        """
        self._folder = data_dir.absolute() / FOLDER
        self._file = JobFile(self._folder, now)
        self.now = now

    def folder(self, job_id: str) -> Path:
        """The folder of a job, as an absolute path. It exists once a worker has started the job."""
        return self._folder / job_id

    def claim(self, worker: str, kinds: Sequence[str], lease_s: float, job_id: str | None = None) -> Job | None:
        """Start the oldest job that may be started, and return it with its new lease. Return None if there is none.

        A job may be started if it is queued and its time has come, or if it is running and its lease has expired.

        Args:
            worker: the name of the worker.
            kinds: the kinds of jobs that the worker runs.
            lease_s: the time in seconds after which the lease expires if it is not renewed.
            job_id: consider only this job.
        """
        with self._file.write() as db:
            while (job := self._first_due(db, kinds, job_id)) is not None:
                losses = job.losses + (job.state == "running")
                if losses > MAX_LOSSES:
                    error = f"its worker was killed {losses} times in a row without progress"
                    self._file.move(db, job, "failed", error=error, ended=self.now(), lease_until=None, losses=losses)
                    continue
                now = self.now()
                self._file.move(
                    db, job, "running",
                    token=job.token + 1, attempt=job.attempt + 1, losses=losses, worker=worker,
                    started=job.started or now, lease_until=now + lease_s,
                )  # fmt: skip
                return find_job(db, job.id)
        return None

    def due(self, kinds: Sequence[str], since_s: float = 0.0, limit: int = 100) -> list[Job]:
        """Return jobs that a worker of these kinds may claim, oldest first. Leave out jobs that have been queued for
        less than `since_s` seconds."""
        now = self.now()
        with self._file.read() as db:
            rows = db.execute(
                f"SELECT * FROM jobs WHERE kind IN ({marks(kinds)}) AND (state = 'queued' AND not_before <= ? OR "
                "state = 'running' AND lease_until <= ?) ORDER BY number LIMIT ?",
                (*kinds, now - since_s, now, limit),
            )
            return [job_of(row) for row in rows]

    def renew(self, lease: Lease, lease_s: float) -> Job:
        """Extend a lease to `lease_s` seconds from now, and return the job, which says whether to cancel it.

        Raises:
            LeaseLost: the lease is no longer valid.
        """
        with self._file.write(quietly=True) as db:
            job = _leased(db, lease)
            db.execute("UPDATE jobs SET lease_until = ? WHERE id = ?", (self.now() + lease_s, job.id))
            return find_job(db, job.id)

    def report(self, lease: Lease, progress: float, text: str = "", metrics: Mapping[str, Any] | None = None) -> None:
        """Store how far the job is: the share of its work that is done, a text, and figures (None: as before).

        Raises:
            LeaseLost: the lease is no longer valid.
        """
        progress = min(max(progress, 0.0), 1.0)
        with self._file.write() as db:
            job = _leased(db, lease)
            figures = dict(job.metrics if metrics is None else metrics)
            db.execute(
                "UPDATE jobs SET progress = ?, text = ?, metrics = ?, best_progress = max(best_progress, ?), "
                "losses = CASE WHEN ? > best_progress THEN 0 ELSE losses END WHERE id = ?",
                (progress, text, json.dumps(figures), progress, progress, job.id),
            )
            if (progress, text, figures) != (job.progress, job.text, dict(job.metrics)):
                data = {"progress": progress, "text": text, "metrics": figures}
                self._file.add_event(db, job.id, "progress", data)

    def finish_step(self, lease: Lease, name: str, result: Any) -> None:
        """Store that a step has finished, with its result as JSON types. A later attempt skips the step.

        Raises:
            LeaseLost: the lease is no longer valid.
        """
        with self._file.write() as db:
            self._file.add_step(db, _leased(db, lease), name, result)

    def log(self, lease: Lease, text: bytes) -> None:
        """Append text to the job's log.

        Raises:
            LeaseLost: the lease is no longer valid.
        """
        with self._file.write() as db:
            job = _leased(db, lease)
            JobLog(self.folder(job.id)).append(text, job.log_bytes)
            total = job.log_bytes + len(text)
            db.execute("UPDATE jobs SET log_bytes = ? WHERE id = ?", (total, job.id))
            self._file.add_event(db, job.id, "log", {"log_bytes": total})

    def succeed(self, lease: Lease) -> None:
        """End the job successfully.

        Raises:
            LeaseLost: the lease is no longer valid.
        """
        self._end(lease, "succeeded", progress=1.0)

    def fail(self, lease: Lease, error: str) -> None:
        """End the job with an error message.

        Raises:
            LeaseLost: the lease is no longer valid.
        """
        self._end(lease, "failed", error=error)

    def cancel(self, lease: Lease) -> None:
        """End the job because its cancellation was requested and its work has stopped.

        Raises:
            LeaseLost: the lease is no longer valid.
        """
        self._end(lease, "cancelled")

    def requeue(self, lease: Lease, *, delay_s: float = 0.0, lost: bool = False) -> None:
        """Give the job back to the queue, for example because the worker stops.

        Args:
            lease: the lease.
            delay_s: the time in seconds in which it is not started again.
            lost: whether the attempt counts as lost, because its child process was killed. After `MAX_LOSSES` such
                attempts without progress, the job fails.

        Raises:
            LeaseLost: the lease is no longer valid.
        """
        with self._file.write() as db:
            job = _leased(db, lease)
            losses = job.losses + lost
            if losses > MAX_LOSSES:
                error = f"its process was killed {losses} times in a row without progress"
                self._file.move(db, job, "failed", error=error, ended=self.now(), lease_until=None, losses=losses)
                return
            self._file.move(db, job, "queued", not_before=self.now() + delay_s, lease_until=None, losses=losses)

    def wait_for_approval(self, lease: Lease, step: str, text: str = "") -> None:
        """Let the job wait until a client approves the step. No worker works on it meanwhile.

        Args:
            lease: the lease.
            step: the name of the step that `approve` finishes.
            text: what is to be decided, for people.

        Raises:
            LeaseLost: the lease is no longer valid.
        """
        with self._file.write() as db:
            job = _leased(db, lease)
            self._file.move(db, job, "waiting", waiting_for=step, text=text, lease_until=None)

    def _first_due(self, db: sqlite3.Connection, kinds: Sequence[str], job_id: str | None) -> Job | None:
        now = self.now()
        row = db.execute(
            f"SELECT * FROM jobs WHERE (? IS NULL OR id = ?) AND kind IN ({marks(kinds)}) AND (state = 'queued' AND "
            "not_before <= ? OR state = 'running' AND lease_until <= ?) ORDER BY number LIMIT 1",
            (job_id, job_id, *kinds, now, now),
        ).fetchone()
        return None if row is None else job_of(row)

    def _end(self, lease: Lease, state: State, **values: Any) -> None:
        with self._file.write() as db:
            self._file.move(db, _leased(db, lease), state, ended=self.now(), lease_until=None, **values)


def _leased(db: sqlite3.Connection, lease: Lease) -> Job:
    """Return the job of a lease. Raise LeaseLost if the lease is no longer valid."""
    row = db.execute(
        "SELECT * FROM jobs WHERE id = ? AND token = ? AND state = 'running'", (lease.job, lease.token)
    ).fetchone()
    if row is None:
        raise LeaseLost(f"the lease {lease.token} of job {lease.job} is no longer valid")
    return job_of(row)
