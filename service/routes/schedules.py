"""Manage schedules, which create jobs at certain times: `/v1/schedules`."""

import asyncio

from fastapi import APIRouter, Request

from service.errors import InvalidRequest, NotFound, StorageFailed
from service.jobs.answers import ScheduleAnswer, schedule_answer
from service.jobs.opened import OpenedJobs
from service.jobs.records import Schedule
from service.jobs.schedules import Schedules
from service.options import parse_options
from service.routes.answers import JsonAnswer, json_response
from service.routes.describe import BODY, Operation, describe
from service.routes.direct import DirectRoute
from service.routes.job_schemas import (
    RemovedSchedule,
    ScheduleIn,
    SchedulesAnswer,
)
from service.routes.jobs import jobs_of, put_schedule, read_fields, requested_by

router = APIRouter(prefix="/v1/schedules", tags=["jobs"], route_class=DirectRoute)


@router.get("", summary="List schedules")
@describe(Operation(errors=(StorageFailed,)))
async def list_schedules(request: Request) -> JsonAnswer[SchedulesAnswer]:
    """List all schedules in the order of their names."""

    def read() -> list[Schedule]:
        store = jobs_of(request).existing()
        return [] if store is None else store.schedules.all()

    data = [schedule_answer(schedule) for schedule in await asyncio.to_thread(read)]
    return json_response({"object": "list", "data": data})


@router.get("/{schedule}", summary="Get a schedule")
@describe(Operation(errors=(NotFound, StorageFailed)))
async def get_schedule(request: Request, schedule: str) -> JsonAnswer[ScheduleAnswer]:
    """Return what a schedule creates, and when the next job is due."""
    found = await asyncio.to_thread(lambda: _schedules(jobs_of(request), schedule).get(schedule))
    return json_response(schedule_answer(found))


@router.put("/{schedule}", summary="Create or replace a schedule")
@describe(Operation(errors=(*BODY, StorageFailed), body=ScheduleIn, statuses=(200, 201)))
async def replace_schedule(request: Request, schedule: str) -> JsonAnswer[ScheduleAnswer]:
    """Create a schedule, or replace the one with the same name. The fields of the body are `kind`, the parameters of
    this kind, and `every`. A schedule creates no job while its last job has not ended, and it makes up for at most one
    job that was due while no worker ran. The status is 201 if the schedule is new."""
    body = parse_options(ScheduleIn, await read_fields(request))
    jobs, by = jobs_of(request), requested_by(request)

    def put() -> tuple[Schedule, bool]:
        store = jobs.existing()
        is_new = store is None or schedule not in {old.name for old in store.schedules.all()}
        return put_schedule(jobs, schedule, body, by), is_new

    stored, is_new = await asyncio.to_thread(put)
    return json_response(schedule_answer(stored), status=201 if is_new else 200)


@router.delete("/{schedule}", summary="Remove a schedule")
@describe(Operation(errors=(NotFound, InvalidRequest, StorageFailed)))
async def remove_schedule(request: Request, schedule: str) -> JsonAnswer[RemovedSchedule]:
    """Remove a schedule. The jobs that it has created stay."""
    await asyncio.to_thread(lambda: _schedules(jobs_of(request), schedule).remove(schedule))
    return json_response({"name": schedule, "deleted": True})


def _schedules(jobs: OpenedJobs, name: str) -> Schedules:
    """Return the schedules of the store.

    Raises:
        NotFound: there is no store, so there is no schedule `name`.
    """
    store = jobs.existing()
    if store is None:
        raise NotFound(f"there is no schedule {name[:80]!r}", param="name")
    return store.schedules
