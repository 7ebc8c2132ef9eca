"""The commands `dinov2 jobs ...`, which start, watch and cancel jobs in the data folder, and manage schedules.

They open the job store themselves, so they need no running server. A worker runs the jobs (`dinov2 worker`, or the
worker that the service starts).
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli.shared import DATA, DataDirOption, JsonOption, fail, settings_for

if TYPE_CHECKING:
    from pathlib import Path

    from service.jobs.queue import JobQueue
    from service.jobs.records import Event, Job, State
    from service.jobs.store import JobStore
    from service.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Start, watch and cancel jobs such as trainings, and schedule them.",
)

JobArgument = Annotated[str, typer.Argument(help="Id of the job.", metavar="JOB")]
KindArgument = Annotated[
    str, typer.Argument(help="Kind of the job: train, export, build-engine, evaluate, reindex or retrain.")
]
ParamsArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Parameters of the job. Repeat a name to give several values.", metavar="NAME=VALUE"),
]
POLL_S: Final = 0.5
END_STATUSES: Final = {"succeeded": 0, "failed": 1, "cancelled": 3}
"""The exit status of `dinov2 jobs watch` for each state in which a job has ended. Errors have the status 2."""


@contextmanager
def _opened(data_dir: "Path") -> Iterator[tuple["JobStore", "JobQueue", "Settings"]]:
    """Yield the job store, the queue and the settings. Print expected errors, and exit with status 2."""
    from service.errors import ServiceError
    from service.jobs.queue import open_jobs, open_queue

    try:
        settings = settings_for(None, data_dir)
        yield open_jobs(settings), open_queue(settings), settings
    except (ServiceError, ValueError, OSError, ImportError) as error:
        raise fail(error) from error


@app.command()
def start(
    kind: KindArgument,
    params: ParamsArgument = None,
    not_before: Annotated[
        str | None, typer.Option(help="Earliest start, as an ISO 8601 time; without a time zone: local time.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show the log until the job has ended.")] = False,
    as_json: JsonOption = False,
    data_dir: DataDirOption = DATA,
) -> None:
    """Start a job. It is queued until a worker is free."""
    from service.jobs.blocked import why_blocked
    from service.jobs.kinds import accepted_params
    from service.jobs.records import NewJob

    with _opened(data_dir) as (store, queue, settings):
        given = values_of(params or [])
        accepted_params(kind, given, settings)
        job = store.create(NewJob(kind, given, requested_by="command line", not_before=_moment(not_before)))
        queue.announce(job)
        typer.echo(_json(store, job) if as_json else job.id)
        if (blocked := why_blocked(job, store.workers.alive(), store.now())) is not None:
            typer.echo(f"warning: {blocked}", err=True)
        if wait:
            _follow(store, job.id)


@app.command("list")
def list_jobs(
    state: Annotated[str | None, typer.Option(help="Only jobs in these states, e.g. queued,running.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only jobs of these kinds, e.g. train,export.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Highest number of jobs.")] = 20,
    as_json: JsonOption = False,
    data_dir: DataDirOption = DATA,
) -> None:
    """List jobs, newest first, and the running workers."""
    from rich.console import Console
    from rich.table import Table

    from service.jobs.answers import job_answers, worker_answer

    with _opened(data_dir) as (store, _, _):
        kinds = None if kind is None else _listed(kind)
        jobs, workers = store.jobs(states=_states(state), kinds=kinds, limit=limit), store.workers.alive()
        answers = job_answers(store, jobs)
    if as_json:
        typer.echo(json.dumps({"jobs": answers, "workers": [worker_answer(row) for row in workers]}))
        return
    table = Table("job", "state", "done", "started", "what it does")
    for job, answer in zip(jobs, answers, strict=True):
        text = job.error or answer["blocked"] or job.text
        table.add_row(job.id, job.state, f"{job.progress:.0%}", _time(job.started), text)
    Console().print(table)
    for row in workers:
        typer.echo(f"worker {row.id}: {row.job or 'no job'}; runs {', '.join(row.kinds)}")
    if not workers:
        typer.echo("no worker is running: start one with `dinov2 worker`")


@app.command()
def show(job: JobArgument, data_dir: DataDirOption = DATA) -> None:
    """Print a job as JSON: parameters, state, progress, figures, finished steps, error, and why it does not start."""
    with _opened(data_dir) as (store, _, _):
        typer.echo(_json(store, store.get(job), indent=1))


@app.command()
def log(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    data_dir: DataDirOption = DATA,
) -> None:
    """Print the log of a job."""
    with _opened(data_dir) as (store, _, _):
        if follow:
            _follow(store, job)
        else:
            _print_log(store, job, 0)


@app.command()
def watch(job: JobArgument, as_json: JsonOption = False, data_dir: DataDirOption = DATA) -> None:
    """Print the events of a job, such as its progress, until it has ended. The exit status is 0 if the job has
    succeeded, 1 if it has failed, and 3 if it was cancelled."""
    with _opened(data_dir) as (store, _, _):
        raise typer.Exit(_watch(store, job, as_json))


@app.command()
def cancel(job: JobArgument, as_json: JsonOption = False, data_dir: DataDirOption = DATA) -> None:
    """Cancel a job. A running job is stopped by its worker within a few seconds."""
    with _opened(data_dir) as (store, _, _):
        _show_state(store, store.request_cancel(job, "command line"), as_json)


@app.command()
def retry(job: JobArgument, as_json: JsonOption = False, data_dir: DataDirOption = DATA) -> None:
    """Queue a failed or cancelled job again. Its finished steps are not repeated."""
    with _opened(data_dir) as (store, queue, _):
        again = store.retry(job)
        queue.announce(again)
        _show_state(store, again, as_json)


@app.command()
def approve(job: JobArgument, as_json: JsonOption = False, data_dir: DataDirOption = DATA) -> None:
    """Approve the step for which a job waits."""
    with _opened(data_dir) as (store, queue, _):
        approved = store.approve(job, "command line")
        queue.announce(approved)
        _show_state(store, approved, as_json)


@app.command()
def remove(job: JobArgument, data_dir: DataDirOption = DATA) -> None:
    """Remove a finished job with its folder, which contains the run of a training."""
    with _opened(data_dir) as (store, _, _):
        store.remove(job)
        typer.echo(f"removed {job}")


@app.command()
def schedule(
    name: Annotated[str, typer.Argument(help="Name of the schedule. An existing one is replaced.")],
    kind: KindArgument,
    params: ParamsArgument = None,
    every: Annotated[str, typer.Option(help="When: 'sunday 03:00', 'daily 02:30' or '6 h'.")] = "",
    zone: Annotated[
        str | None, typer.Option(help="Time zone, e.g. Europe/Berlin. Default: DINOV2_SCHEDULE_ZONE.")
    ] = None,
    data_dir: DataDirOption = DATA,
) -> None:
    """Create a job at certain times."""
    from service.jobs.kinds import accepted_params

    with _opened(data_dir) as (store, _, settings):
        given = values_of(params or [])
        accepted_params(kind, given, settings)
        stored = store.schedules.put(
            name, kind, given, every=every, zone=zone or settings.schedule_zone, requested_by="command line"
        )
        typer.echo(f"{name}: the next job is created at {_time(stored.next_at)} UTC")


@app.command()
def schedules(as_json: JsonOption = False, data_dir: DataDirOption = DATA) -> None:
    """List the schedules."""
    from service.jobs.answers import schedule_answer

    with _opened(data_dir) as (store, _, _):
        found = store.schedules.all()
    if as_json:
        typer.echo(json.dumps([schedule_answer(one) for one in found]))
        return
    for one in found:
        typer.echo(f"{one.name}: {one.kind}, {one.every} ({one.zone}), next at {_time(one.next_at)} UTC")


@app.command()
def unschedule(
    name: Annotated[str, typer.Argument(help="Name of the schedule.")], data_dir: DataDirOption = DATA
) -> None:
    """Remove a schedule. Jobs that it has created are not changed."""
    with _opened(data_dir) as (store, _, _):
        store.schedules.remove(name)
        typer.echo(f"removed {name}")


def values_of(arguments: list[str]) -> dict[str, Any]:
    """Return the parameters in NAME=VALUE arguments. A value is JSON, or else text. A repeated name makes a list.

    Raises:
        ValueError: an argument has no `=`.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        name, separator, text = argument.partition("=")
        if not separator:
            raise ValueError(f"{argument!r} must look like name=value")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if name in values:
            earlier = values[name] if isinstance(values[name], list) else [values[name]]
            value = [*earlier, value]
        values[name] = value
    return values


def _follow(store: "JobStore", job_id: str) -> None:
    """Print the log of a job until it has ended or waits. Exit with status 1 if it did not succeed."""
    position = 0
    while True:
        job = store.get(job_id)
        position = _print_log(store, job_id, position)
        if job.state in ("succeeded", "failed", "cancelled", "waiting"):
            break
        time.sleep(POLL_S)
    typer.echo(_line(job), err=True)
    if job.state in ("failed", "cancelled"):
        raise typer.Exit(code=1)


def _watch(store: "JobStore", job_id: str, as_json: bool) -> int:
    """Print the events of a job until it has ended, and return the exit status."""
    after, seen = 0, None
    while True:
        stamp, job = store.stamp.read(), store.get(job_id)  # before the events, so that none is missing at the end
        if stamp != seen:
            seen = stamp
            while events := store.events(after, job_id):
                for event in events:
                    _show_event(event, as_json)
                after = events[-1].number
        if job.state in END_STATUSES:
            return END_STATUSES[job.state]
        time.sleep(POLL_S)


def _show_event(event: "Event", as_json: bool) -> None:
    """Print an event as a line of JSON, or as a line of text with the local time."""
    from service.jobs.answers import event_answer

    data = event.data
    if as_json:
        typer.echo(json.dumps(event_answer(event)))
    elif event.kind != "log":
        text = {
            "state": f"{data.get('state')}{': ' if data.get('error') else ''}{data.get('error') or ''}",
            "progress": f"{data.get('progress') or 0:.0%} {data.get('text')}",
            "step": f"finished the step {data.get('name')}",
            "cancel": "the cancellation was requested",
        }.get(event.kind, event.kind)
        typer.echo(f"{datetime.fromtimestamp(event.time):%H:%M:%S}  {' '.join(text.split())}")


def _print_log(store: "JobStore", job_id: str, position: int) -> int:
    """Print a log from a position on, and return the position of its end."""
    while True:
        text, end = store.read_log(job_id, position)
        if not text:
            return position
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()
        position = end


def _show_state(store: "JobStore", job: "Job", as_json: bool) -> None:
    """Print a job as JSON, or its state in one line."""
    typer.echo(_json(store, job) if as_json else _line(job))


def _json(store: "JobStore", job: "Job", indent: int | None = None) -> str:
    """Return a job as JSON, with the names that the REST API has."""
    from service.jobs.answers import job_answers

    [answer] = job_answers(store, [job])
    return json.dumps(answer, indent=indent)


def _line(job: "Job") -> str:
    """Return the state of a job in one line."""
    asked = "; its worker will stop it" if job.state == "running" and job.cancel_requested else ""
    why = job.error or (f"{job.text} (dinov2 jobs approve {job.id})" if job.state == "waiting" else "")
    return f"{job.id}: {job.state}{asked}{': ' if why else ''}{why}"


def _time(moment: float | None) -> str:
    return "" if moment is None else datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _states(text: str | None) -> "list[State]":
    """Return the states in a comma-separated text, or all states if it is None.

    Raises:
        ValueError: there is no such state.
    """
    from service.jobs.records import STATES

    names = STATES if text is None else _listed(text)
    for name in names:
        if name not in STATES:
            raise ValueError(f"--state: unknown state {name!r}; use some of {', '.join(STATES)}")
    return [state for state in STATES if state in names]


def _moment(text: str | None) -> float | None:
    """Return an ISO 8601 time in seconds since 1970.

    Raises:
        ValueError: the text is not a time.
    """
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as error:
        raise ValueError(f"--not-before {text!r} is not an ISO 8601 time, such as 2030-12-24T03:00") from error
