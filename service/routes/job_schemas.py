"""The requests of the routes for jobs and schedules, and the lists in their answers."""

from datetime import datetime
from functools import reduce
from operator import or_
from typing import Annotated, Any, Final, Literal

from pydantic import AwareDatetime, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, TypeAdapter, create_model
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from typing_extensions import TypeAliasType, TypedDict

from model.files import NAME_PATTERN
from service.answer_schemas import ListObject
from service.jobs.answers import JobAnswer, ScheduleAnswer
from service.jobs.kinds import KINDS
from service.jobs.records import State
from service.schema_base import LISTED, DocumentedAs, Schema, Whole
from service.times import LAST_SECOND

MAX_LOG_BYTES: Final = 2**20
MAX_TAIL_BYTES: Final = 2**16


def _seconds(value: Any) -> Any:
    """Return an ISO 8601 time in seconds since 1970. Return any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        time = datetime.fromisoformat(value)
    except ValueError as error:
        raise PydanticCustomError("time", "Input should be a time such as 2030-12-24T03:00:00Z") from error
    if time.tzinfo is None:
        raise PydanticCustomError("time", "Input should have a time zone, as in 2030-12-24T03:00:00Z")
    return time.timestamp()


Moment = Annotated[
    float,
    BeforeValidator(_seconds),
    Field(ge=0, le=LAST_SECOND, allow_inf_nan=False),
    DocumentedAs(float | AwareDatetime),
]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
KindName = Annotated[str, Field(max_length=64)]
_EVERY: Final = "when the schedule creates a job, for example sunday 03:00, daily 02:30 or 6 h"
_ZONE: Final = "time zone of the time of day, such as Europe/Berlin; default: the setting schedule_zone"


class _AnyParams(Schema):
    """The base class of bodies whose other fields are the parameters of a job."""

    model_config = ConfigDict(extra="allow")

    kind: KindName = Field(description="kind of the job, which determines its parameters")

    @property
    def params(self) -> dict[str, Any]:
        """The parameters, as the client has sent them. A parameter that is null counts as not sent."""
        return {name: value for name, value in (self.model_extra or {}).items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the JSON schema, which lists the parameters of each kind of job."""
        own = {name: (field.annotation, field) for name, field in cls.model_fields.items() if name != "kind"}
        bodies = [
            create_model(  # type: ignore[call-overload]  # the fields are not known to mypy
                f"{''.join(part.capitalize() for part in name.split('-'))}{cls.__name__}",
                __base__=kind.params,
                __doc__=f"{kind.summary[0].upper()}{kind.summary[1:]}.",
                kind=(Literal[name], ...),
                **own,
            )
            for name, kind in KINDS.items()
        ]
        return handler(TypeAdapter(reduce(or_, bodies)).core_schema)


class JobIn(_AnyParams):
    """The body of `POST /v1/jobs`."""

    not_before: Moment | None = Field(
        None, description="earliest start, as an ISO 8601 time with a time zone or in seconds since 1970"
    )
    every: str | None = Field(None, max_length=64, description=f"create a schedule instead of a job: {_EVERY}")
    zone: str | None = Field(None, max_length=64, description=f"only with every: {_ZONE}")
    schedule: Name | None = Field(None, description="only with every: name of the schedule; default: the kind")


class ScheduleIn(_AnyParams):
    """The body of `PUT /v1/schedules/{schedule}`."""

    every: str = Field(max_length=64, description=_EVERY)
    zone: str | None = Field(None, max_length=64, description=_ZONE)


class JobActionIn(Schema):
    """The body of a request that cancels, approves or retries a job. It has no fields."""


class JobListQuery(Schema):
    """The query parameters of `GET /v1/jobs`."""

    state: Annotated[list[State] | None, LISTED] = Field(
        None, max_length=6, description="only jobs in these states, separated by commas"
    )
    kind: Annotated[list[KindName] | None, LISTED] = Field(
        None, max_length=20, description="only jobs of these kinds, separated by commas"
    )
    before: str | None = Field(None, max_length=128, description="id of a job; only jobs that were created before it")
    limit: Whole = Field(50, ge=1, le=1000, description="highest number of jobs")


class JobQuery(Schema):
    """The query parameters of `GET /v1/jobs/{job_id}`."""

    log: Whole = Field(
        0, ge=0, le=MAX_TAIL_BYTES, description="include the end of the log: the highest number of bytes"
    )


class LogQuery(Schema):
    """The query parameters of `GET /v1/jobs/{job_id}/log`."""

    after: Annotated[Whole | None, Field(ge=0, le=2**53)] = Field(
        None, description="position in bytes at which the text begins; default: the end of the log"
    )
    limit: Whole = Field(MAX_TAIL_BYTES, ge=1, le=MAX_LOG_BYTES, description="highest number of bytes")


class _EventQuery(Schema):
    last_event_id: Annotated[Whole | None, Field(ge=0, le=2**53)] = Field(
        None, description="number of an event; only events after it; the header Last-Event-ID takes precedence"
    )
    named: bool = Field(
        True,
        description="whether each event has the field event, which is its kind; false: for browser code with onmessage",
    )


class JobEventQuery(_EventQuery):
    """The query parameters of `GET /v1/jobs/{job_id}/events`."""

    follow: Literal["end", "all", "none"] = Field(
        "end",
        description="end: until the job has ended; all: also afterwards, because it may be retried; none: only the "
        "events that are already stored",
    )


class AllEventQuery(_EventQuery):
    """The query parameters of `GET /v1/jobs/events`."""

    follow: Literal["all", "none"] = Field(
        "all", description="all: wait for further events; none: only the events that are already stored"
    )


class JobsAnswer(TypedDict):
    """A list of jobs, newest first."""

    object: ListObject
    data: list[JobAnswer]
    next: Annotated[str | None, Field(description="value of `before` for the next page; null: this is the last page")]
    last_event: Annotated[
        int, Field(description="number of the newest event; event streams that begin after it miss nothing")
    ]


class RemovedJob(TypedDict):
    """A job that was removed."""

    id: str
    deleted: bool


class SchedulesAnswer(TypedDict):
    """All schedules in the order of their names."""

    object: ListObject
    data: list[ScheduleAnswer]


class RemovedSchedule(TypedDict):
    """A schedule that was removed."""

    name: str
    deleted: bool


JobOrSchedule = TypeAliasType("JobOrSchedule", JobAnswer | ScheduleAnswer)  # its name appears in the OpenAPI document
