"""Create, list and control jobs: `/v1/jobs`. The modules `job_events` and `schedules` contain the routes for events and
schedules.

A job is work that takes minutes to days, such as a training. The service only stores jobs. Worker processes run them
(service/jobs/worker.py).
"""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import Response

from service.errors import Conflict, InvalidRequest, JobNotFound, StorageFailed
from service.jobs.answers import JobAnswer, job_answers, schedule_answer
from service.jobs.kinds import accepted_params
from service.jobs.opened import OpenedJobs
from service.jobs.records import STATES, NewJob, Schedule
from service.options import parse_options
from service.routes.add_items import KEY_HEADER, idempotency_key
from service.routes.answers import JsonAnswer, json_response
from service.routes.bodies import query_fields, read_json, read_optional_json
from service.routes.describe import BODY, Operation, describe
from service.routes.direct import DirectRoute
from service.routes.job_schemas import (
    JobActionIn,
    JobIn,
    JobListQuery,
    JobOrSchedule,
    JobQuery,
    JobsAnswer,
    LogQuery,
    RemovedJob,
    ScheduleIn,
)

MAX_PARAMS_BYTES: Final = 64 * 1024
"""The size limit of a body that creates a job. A list of datasets and overrides takes a few kilobytes."""
MAX_DEPTH: Final = 32
"""The highest number of nested levels in a body that creates a job. Deeper JSON could be stored, but not always be sent
in an answer."""

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=DirectRoute)


@router.post("", summary="Create a job or a schedule")
@describe(
    Operation(
        errors=(*BODY, Conflict, StorageFailed),
        body=JobIn,
        headers=(KEY_HEADER,),
        statuses=(201, 202),
        answer_headers=("Location",),
    )
)
async def create_job(request: Request) -> JsonAnswer[JobOrSchedule]:
    """Create a job, which a worker starts as soon as it is free. The fields of the body are `kind` and the parameters
    of this kind. The status is 202.

    With `every`, create a schedule instead, which creates jobs at the given times. The status is then 201. If there is
    a schedule with the same name and the same content, nothing changes. With other content, the status is 409.

    If two requests have the same `Idempotency-Key` header and the same content, only the first one creates a job. The
    second one is answered with the same job, as long as this job exists.
    """
    key = idempotency_key(request)
    body = parse_options(JobIn, await read_fields(request))
    jobs, by = jobs_of(request), requested_by(request)
    if body.every is not None:
        if body.not_before is not None:
            raise InvalidRequest("not_before cannot be used together with every", param="not_before")
        schedule = await asyncio.to_thread(_create_schedule, jobs, body, by)
        headers = {"Location": f"{request.app.state.root_path}/v1/schedules/{schedule.name}"}
        return json_response(schedule_answer(schedule), status=201, headers=headers)
    for name in ("zone", "schedule"):
        if getattr(body, name) is not None:
            raise InvalidRequest(f"{name} can only be used together with every", param=name)
    new = NewJob(body.kind, body.params, requested_by=by, key=key, not_before=body.not_before)
    job = await asyncio.to_thread(_create, jobs, new)
    headers = {"Location": f"{request.app.state.root_path}/v1/jobs/{job['id']}"}
    return json_response(job, status=202, headers=headers)


def _create(jobs: OpenedJobs, new: NewJob) -> JobAnswer:
    accepted_params(new.kind, new.params, jobs.settings, jobs.kinds)
    return jobs.answer(jobs.announce(jobs.store().create(new)))


def _create_schedule(jobs: OpenedJobs, body: JobIn, by: str | None) -> Schedule:
    """Create a schedule, unless it exists."""
    assert body.every is not None
    name = body.schedule or body.kind
    store, zone = jobs.existing(), body.zone or jobs.settings.schedule_zone
    same_name = [] if store is None else [schedule for schedule in store.schedules.all() if schedule.name == name]
    for old in same_name:
        if (old.kind, old.params, old.every, old.zone) == (body.kind, body.params, body.every, zone):
            return old
        raise Conflict(f"schedule {name!r} exists with other content: replace it with PUT /v1/schedules/{name}")
    return put_schedule(jobs, name, ScheduleIn(kind=body.kind, every=body.every, zone=zone, **body.params), by)


def put_schedule(jobs: OpenedJobs, name: str, body: ScheduleIn, by: str | None) -> Schedule:
    """Create or replace a schedule. This blocks.

    Raises:
        InvalidRequest: the kind, a parameter, the name, `every` or the time zone is not allowed.
        StorageFailed: the store cannot be used.
    """
    accepted_params(body.kind, body.params, jobs.settings, jobs.kinds)
    zone = body.zone or jobs.settings.schedule_zone
    schedules = jobs.store().schedules
    return schedules.put(name, body.kind, body.params, every=body.every, zone=zone, requested_by=by)


@router.get("", summary="List jobs")
@describe(Operation(errors=(JobNotFound, InvalidRequest, StorageFailed), query=JobListQuery))
async def list_jobs(request: Request) -> JsonAnswer[JobsAnswer]:
    """List jobs, newest first. If there are more than `limit`, the answer's `next` is the value of `before` for the
    next request. The status is 404 if the job `before` no longer exists."""
    query = parse_options(JobListQuery, query_fields(request))
    return json_response(await asyncio.to_thread(_page, jobs_of(request), query))


def _page(jobs: OpenedJobs, query: JobListQuery) -> JobsAnswer:
    store = jobs.existing() if query.before is None else jobs.with_job(query.before)
    if store is None:
        return {"object": "list", "data": [], "next": None, "last_event": 0}
    last_event = store.last_event()  # before reading the jobs, so that a stream that begins after it misses nothing
    found = store.jobs(
        states=query.state or STATES, kinds=query.kind or None, before=query.before, limit=query.limit + 1
    )
    page = found[: query.limit]
    return {
        "object": "list",
        "data": job_answers(store, page),
        "next": page[-1].id if len(found) > query.limit else None,
        "last_event": last_event,
    }


@router.get("/{job_id}", summary="Get a job")
@describe(Operation(errors=(JobNotFound, InvalidRequest, StorageFailed), query=JobQuery))
async def get_job(request: Request, job_id: str) -> JsonAnswer[JobAnswer]:
    """Return a job with its state, its progress and the results of its finished steps. With `log`, the answer contains
    the end of the job's log."""
    query = parse_options(JobQuery, query_fields(request))

    def read() -> JobAnswer:
        jobs = jobs_of(request)
        store = jobs.with_job(job_id)
        answer = jobs.answer(store.get(job_id))
        if query.log:
            text, position = store.read_log(job_id, limit=query.log)
            answer["log"] = {"text": _from_first_character(text).decode(errors="replace"), "position": position}
        return answer

    return json_response(await asyncio.to_thread(read))


@router.get("/{job_id}/log", summary="Get the log of a job")
@describe(
    Operation(
        errors=(JobNotFound, InvalidRequest, StorageFailed),
        query=LogQuery,
        media_types=("text/plain",),
        answer_headers=("X-Log-Position", "X-Log-Bytes"),
    )
)
async def get_log(request: Request, job_id: str) -> Response:
    """Return a part of a job's log as plain text. The part begins at the position `after`. Without `after`, it is the
    end of the log. The header `X-Log-Position` is the position after the part, and so the value of `after` for the next
    request. The beginning of a very long log is not kept."""
    query = parse_options(LogQuery, query_fields(request))

    def read() -> tuple[bytes, int, int]:
        store = jobs_of(request).with_job(job_id)
        total = store.get(job_id).log_bytes
        text, position = store.read_log(job_id, query.after, query.limit)
        whole = _whole_characters(text)
        return whole, position - (len(text) - len(whole)), max(total, position)

    text, position, total = await asyncio.to_thread(read)
    headers = {
        "X-Log-Position": str(position),
        "X-Log-Bytes": str(total),
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    return Response(text, headers=headers, media_type="text/plain")


def _from_first_character(text: bytes) -> bytes:
    """Return UTF-8 text without the rest of a character at its beginning."""
    for start in range(min(4, len(text))):
        if text[start] & 0xC0 != 0x80:
            return text[start:]
    return text


def _whole_characters(text: bytes) -> bytes:
    """Return UTF-8 text without an incomplete character at its end, unless nothing else is left."""
    for length in range(1, min(4, len(text))):
        last = text[-length]
        if last & 0xC0 == 0xC0:  # the first byte of a character of several bytes
            size = 2 if last < 0xE0 else 3 if last < 0xF0 else 4
            return text[:-length] if size > length and len(text) > length else text
        if last < 0x80:
            return text
    return text


_ACTION: Final = Operation(errors=(*BODY, JobNotFound, Conflict, StorageFailed), body=JobActionIn, body_required=False)


@router.post("/{job_id}/cancel", summary="Cancel a job")
@describe(_ACTION)
async def cancel_job(request: Request, job_id: str) -> JsonAnswer[JobAnswer]:
    """Cancel a job. A job that is queued or waits for approval is cancelled at once. The worker of a running job stops
    it within seconds, so its state may still be `running` in the answer. The status is 409 if the job has ended."""
    await _check_action(request)
    jobs, by = jobs_of(request), requested_by(request)
    return json_response(await asyncio.to_thread(lambda: jobs.answer(jobs.with_job(job_id).request_cancel(job_id, by))))


@router.post("/{job_id}/approve", summary="Approve the next step of a job")
@describe(_ACTION)
async def approve_job(request: Request, job_id: str) -> JsonAnswer[JobAnswer]:
    """Approve the step for which a job waits. A worker then goes on with the job. The status is 409 if the job does not
    wait for approval."""
    await _check_action(request)
    jobs, by = jobs_of(request), requested_by(request)
    return json_response(
        await asyncio.to_thread(lambda: jobs.answer(jobs.announce(jobs.with_job(job_id).approve(job_id, by))))
    )


@router.post("/{job_id}/retry", summary="Retry a job")
@describe(_ACTION)
async def retry_job(request: Request, job_id: str) -> JsonAnswer[JobAnswer]:
    """Queue a failed or cancelled job again. Its finished steps are not repeated. The status is 409 if the job is in
    another state."""
    await _check_action(request)
    jobs = jobs_of(request)
    return json_response(
        await asyncio.to_thread(lambda: jobs.answer(jobs.announce(jobs.with_job(job_id).retry(job_id))))
    )


@router.delete("/{job_id}", summary="Remove a job")
@describe(Operation(errors=(JobNotFound, Conflict, StorageFailed)))
async def remove_job(request: Request, job_id: str) -> JsonAnswer[RemovedJob]:
    """Remove a job that has ended, with its log and its folder. A trained network in the folder is deleted too, unless
    it was exported. The status is 409 if the job has not ended."""
    jobs = jobs_of(request)
    request.state.deadline.reschedule(None)  # the folder may contain many gigabytes
    await asyncio.to_thread(lambda: jobs.with_job(job_id).remove(job_id))
    return json_response({"id": job_id, "deleted": True})


def jobs_of(request: Request) -> OpenedJobs:
    """Return the jobs of the service that received a request."""
    jobs = request.app.state.jobs
    assert isinstance(jobs, OpenedJobs)
    return jobs


def requested_by(request: Request) -> str | None:
    """Return the id of the API key that a request has, or None."""
    return getattr(request.scope["state"].get("principal"), "key_id", None)


async def read_fields(request: Request) -> dict[str, Any]:
    """Return the JSON object in the body of a request that creates a job or a schedule.

    Raises:
        InvalidRequest: the body is larger than `MAX_PARAMS_BYTES`, is nested more than `MAX_DEPTH` levels deep, or is
            not an object.
    """
    size = len(await request.body())
    if size > MAX_PARAMS_BYTES:
        raise InvalidRequest(f"the body has {size:,} bytes; at most {MAX_PARAMS_BYTES:,} are accepted for a job")
    fields = await read_json(request)
    level: list[Any] = [fields]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in _inner(value)]
    if level:
        raise InvalidRequest(f"the body is nested more than {MAX_DEPTH} levels deep")
    return fields


def _inner(value: Any) -> Iterable[Any]:
    """Return the elements of a JSON object or list. Other values have none."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


async def _check_action(request: Request) -> None:
    """Raise InvalidRequest if the body of a request that changes a job has fields."""
    parse_options(JobActionIn, await read_optional_json(request))
