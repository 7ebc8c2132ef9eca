"""Describe jobs, schedules, events and workers, in the form in which the REST API and `dinov2 jobs` show them.

Times are in ISO 8601 format, in UTC. Their names end in `_at`, except `not_before` and the `time` of an event.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from service.jobs.blocked import why_blocked
from service.jobs.records import Event, EventKind, Job, Schedule, State, WorkerRow
from service.jobs.store import JobStore
from service.times import iso_time


class StepAnswer(TypedDict):
    """A finished step of a job."""

    name: str
    result: Any
    ended_at: str


class LogTail(TypedDict):
    """The end of a job's log. `position` is the position after it."""

    text: str
    position: int


class JobAnswer(TypedDict):
    """A job. Times are in ISO 8601 format, in UTC."""

    object: Literal["job"]
    id: str
    kind: str
    params: dict[str, Any]
    state: State
    progress: Annotated[float, Field(description="share of the work that is done, from 0 to 1")]
    text: Annotated[str, Field(description="what the job does at the moment")]
    metrics: dict[str, Any]
    steps: Annotated[list[StepAnswer], Field(description="finished steps, which a retry does not repeat")]
    error: Annotated[str | None, Field(description="why the job failed")]
    attempt: Annotated[int, Field(description="number of times that a worker has started the job")]
    worker: str | None
    waiting_for: Annotated[str | None, Field(description="the step that waits for approval")]
    blocked: Annotated[
        str | None, Field(description="why no worker can start the job, although it is due; null: nothing prevents it")
    ]
    cancel_requested: bool
    created_at: str
    not_before: str
    started_at: str | None
    ended_at: str | None
    requested_by: Annotated[str | None, Field(description="id of the API key that created the job")]
    parent: Annotated[str | None, Field(description="id of the job that created the job")]
    schedule: Annotated[str | None, Field(description="name of the schedule that created the job")]
    log_bytes: Annotated[int, Field(description="number of bytes written to the log so far")]
    log: NotRequired[LogTail]


class ScheduleAnswer(TypedDict):
    """A schedule. Times are in ISO 8601 format, in UTC."""

    object: Literal["schedule"]
    name: str
    kind: str
    params: dict[str, Any]
    every: str
    zone: str
    created_at: str
    next_at: Annotated[str, Field(description="time at which the next job is due")]
    requested_by: str | None
    last_job: Annotated[str | None, Field(description="id of the job that the schedule created last")]


class EventAnswer(TypedDict):
    """The JSON text in the field `data` of a server-sent event."""

    number: int
    job: str
    kind: EventKind
    time: str
    data: dict[str, Any]


class WorkerAnswer(TypedDict):
    """A worker process that is alive, and its job if it has one."""

    id: str
    host: str
    pid: int
    kinds: list[str]
    job: str | None
    started_at: str
    heartbeat_at: str


def job_answers(store: JobStore, jobs: Sequence[Job]) -> list[JobAnswer]:
    """Return the answers that describe jobs of a store, including why they do not start. This blocks."""
    workers, now = store.workers.alive(), store.now()
    return [job_answer(job, why_blocked(job, workers, now)) for job in jobs]


def job_answer(job: Job, blocked: str | None = None) -> JobAnswer:
    """Return the answer that describes a job. `blocked` says why it does not start (see `why_blocked`)."""
    return {
        "object": "job",
        "id": job.id,
        "kind": job.kind,
        "params": dict(job.params),
        "state": job.state,
        "progress": job.progress,
        "text": job.text,
        "metrics": dict(job.metrics),
        "steps": [{"name": step.name, "result": step.result, "ended_at": iso_time(step.ended)} for step in job.steps],
        "error": job.error,
        "attempt": job.attempt,
        "worker": job.worker,
        "waiting_for": job.waiting_for,
        "blocked": blocked,
        "cancel_requested": job.cancel_requested,
        "created_at": iso_time(job.created),
        "not_before": iso_time(job.not_before),
        "started_at": None if job.started is None else iso_time(job.started),
        "ended_at": None if job.ended is None else iso_time(job.ended),
        "requested_by": job.requested_by,
        "parent": job.parent,
        "schedule": job.schedule,
        "log_bytes": job.log_bytes,
    }


def schedule_answer(schedule: Schedule) -> ScheduleAnswer:
    """Return the answer that describes a schedule."""
    return {
        "object": "schedule",
        "name": schedule.name,
        "kind": schedule.kind,
        "params": dict(schedule.params),
        "every": schedule.every,
        "zone": schedule.zone,
        "created_at": iso_time(schedule.created),
        "next_at": iso_time(schedule.next_at),
        "requested_by": schedule.requested_by,
        "last_job": schedule.last_job,
    }


def event_answer(event: Event) -> EventAnswer:
    """Return the JSON object that describes an event."""
    return {
        "number": event.number,
        "job": event.job,
        "kind": event.kind,
        "time": iso_time(event.time),
        "data": dict(event.data),
    }


def worker_answer(worker: WorkerRow) -> WorkerAnswer:
    """Return the JSON object that describes a worker."""
    return {
        "id": worker.id,
        "host": worker.host,
        "pid": worker.pid,
        "kinds": list(worker.kinds),
        "job": worker.job,
        "started_at": iso_time(worker.started),
        "heartbeat_at": iso_time(worker.heartbeat),
    }
