"""What the service stores about jobs: jobs with their states and steps, events, workers and schedules.

A job is work that takes minutes to days, such as a training. A worker process *claims* a queued job and gets a *lease*,
which it renews while it works. If the worker dies, the lease expires, and another worker may claim the job. Each claim
has a larger *token*, so the store refuses writes from a worker that has lost its lease.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, TypeAlias, get_args

State: TypeAlias = Literal["queued", "running", "waiting", "succeeded", "failed", "cancelled"]
STATES: Final[tuple[State, ...]] = get_args(State)

TRANSITIONS: Final[Mapping[State, frozenset[State]]] = MappingProxyType(
    {
        "queued": frozenset({"running", "cancelled"}),
        # From running to running: another worker claims the job because its lease has expired.
        "running": frozenset({"running", "queued", "waiting", "succeeded", "failed", "cancelled"}),
        "waiting": frozenset({"queued", "cancelled"}),
        "succeeded": frozenset(),
        "failed": frozenset({"queued"}),
        "cancelled": frozenset({"queued"}),
    }
)
"""The states that may follow each state. A job waits (`waiting`) until a person approves its next step."""

FINISHED: Final[frozenset[State]] = frozenset({"succeeded", "failed", "cancelled"})
"""The states in which a job has ended. A failed or cancelled job can be queued again with a retry."""

EventKind: TypeAlias = Literal["state", "progress", "step", "log", "cancel", "removed"]
LATEST_ONLY: Final[frozenset[EventKind]] = frozenset({"progress", "log"})
"""Kinds of events of which only the newest of each job is stored, because it contains everything that earlier ones
said."""


class LeaseLost(Exception):
    """An error that ends a worker's work on a job: the job was claimed by another worker, or no longer runs."""


class Lease(NamedTuple):
    """The right of a worker to change a job: the job's id, and the token of the claim."""

    job: str
    token: int


@dataclass(frozen=True)
class Step:
    """A finished step of a job, with its result as JSON types. Another attempt skips the step and uses the result."""

    name: str
    result: Any
    ended: float


@dataclass(frozen=True)
class Job:
    """A job as it is stored. Times are seconds since 1970.

    token: the number of the last claim. It never falls.
    attempt: the number of times that a worker has started the job.
    losses: how many consecutive attempts ended because the worker or its child process was killed, without progress.
    progress: the share of the work that is done, from 0 to 1. `text` describes it in words.
    not_before: the job is not started earlier than this time.
    waiting_for: the step that waits for approval, if the state is `waiting`.
    parent: the id of the job that created this job. `schedule`: the name of the schedule that created it.
    log_bytes: the number of bytes written to the log so far.
    """

    id: str
    kind: str
    params: Mapping[str, Any]
    state: State
    created: float
    not_before: float
    steps: tuple[Step, ...] = ()
    token: int = 0
    attempt: int = 0
    losses: int = 0
    progress: float = 0.0
    text: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    started: float | None = None
    ended: float | None = None
    worker: str | None = None
    lease_until: float | None = None
    requested_by: str | None = None
    cancel_requested: bool = False
    waiting_for: str | None = None
    parent: str | None = None
    schedule: str | None = None
    log_bytes: int = 0

    @property
    def lease(self) -> Lease:
        return Lease(self.id, self.token)

    @property
    def results(self) -> dict[str, Any]:
        """The results of the finished steps, by the names of the steps."""
        return {step.name: step.result for step in self.steps}


@dataclass(frozen=True)
class NewJob:
    """What a client asks for. `key` is an idempotency key: a second request with the same key and the same
    `requested_by` returns the job of the first request."""

    kind: str
    params: Mapping[str, Any] = field(default_factory=dict)
    requested_by: str | None = None
    key: str | None = None
    not_before: float | None = None
    parent: str | None = None
    schedule: str | None = None


@dataclass(frozen=True)
class Event:
    """A change of a job. `number` grows with each event of all jobs, and is never used twice.

    data: depends on the kind. state: `state`, `attempt`, and `error` if there is one. progress: `progress`, `text` and
        `metrics`. step: `name` and `result`. log: `log_bytes`. cancel: `by`. removed: nothing.
    """

    number: int
    job: str
    time: float
    kind: EventKind
    data: Mapping[str, Any]


@dataclass(frozen=True)
class WorkerRow:
    """A worker process, with the kinds of jobs that it runs, the time of its last heartbeat, and its job if it has
    one."""

    id: str
    host: str
    pid: int
    kinds: tuple[str, ...]
    started: float
    heartbeat: float
    job: str | None = None


@dataclass(frozen=True)
class Schedule:
    """A rule that creates a job at certain times.

    every: when, for example `sunday 03:00`, `daily 02:30` or `6 h`. `zone`: the time zone of the times of day.
    next_at: the next time at which a job is due, in seconds since 1970.
    last_job: the id of the job that the schedule created last.
    """

    name: str
    kind: str
    params: Mapping[str, Any]
    every: str
    zone: str
    created: float
    next_at: float
    requested_by: str | None = None
    last_job: str | None = None
