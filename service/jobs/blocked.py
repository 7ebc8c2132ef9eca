"""Tells why a job that is due does not start: no worker that is alive runs its kind."""

from collections.abc import Sequence
from typing import Final

from service.jobs.kinds import KINDS
from service.jobs.records import Job, WorkerRow

GRACE_S: Final = 10.0
"""The time in seconds after which a job without any worker counts as blocked. The service starts its own worker with
the first job, which takes a few seconds."""


def why_blocked(job: Job, workers: Sequence[WorkerRow], now: float) -> str | None:
    """Return why none of the workers can start a job, or None if one can, or if the job is not due.

    Args:
        job: the job.
        workers: the workers that are alive.
        now: the time in seconds since 1970.
    """
    if job.state != "queued" or job.not_before > now or any(job.kind in worker.kinds for worker in workers):
        return None
    if not workers:
        return "no worker is running: start one with `dinov2 worker`" if now - job.not_before > GRACE_S else None
    needs = KINDS[job.kind].needs if job.kind in KINDS else ()
    needed = f", which needs {' and '.join(needs)}" if needs else ""
    return f"no running worker runs jobs of the kind {job.kind}{needed}: start one with `dinov2 worker`"
