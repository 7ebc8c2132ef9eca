"""The commands `dinov2 jobs ...`, which create, show and control jobs.

They use the data folder directly, like a running service. `dinov2 worker` runs the jobs.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli.shared import DATA, DataDirOption, JsonOption, fail, settings_for

if TYPE_CHECKING:
    from service.jobs.opened import OpenedJobs
    from service.jobs.records import Event, Job, Schedule
    from service.jobs.store import JobStore

app = typer.Typer(no_args_is_help=True, help="Create, show and control jobs such as trainings.")

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Id of the job; `dinov2 jobs list` shows it.")]
PARAMS_HELP: Final = (
    "Parameters of the job as name=value. A value that is JSON is used as JSON, and any other value as text. To send a "
    "list, repeat the name, as in data=a data=b."
)
EveryOption = Annotated[
    str | None, typer.Option(help="When: `sunday 03:00`, `daily 02:30`, or an interval such as 6 h.")
]
ZoneOption = Annotated[
    str | None, typer.Option(help="Time zone of the time of day, e.g. Europe/Berlin [DINOV2_SCHEDULE_ZONE].")
]
POLL_S: Final = 0.25
STATUSES: Final = {"succeeded": 0, "failed": 1, "cancelled": 3}
"""The exit status of `dinov2 jobs watch` for each end state of a job. The status of errors is 2."""


@app.command("list")
def list_(
    state: Annotated[str | None, typer.Option(help="Only jobs in these states, e.g. queued,running.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only jobs of these kinds, e.g. train,export.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Highest number of jobs.")] = 50,
    data_dir: DataDirOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    from service.jobs.records import STATES
    from service.routes.job_schemas import job_answer

    with _opened(data_dir) as (_, store):
        states, kinds = _split(state), _split(kind)
        for wrong in set(states or ()) - set(STATES):
            raise ValueError(f"--state: unknown state {wrong!r}; use some of {', '.join(STATES)}")
        found = store.jobs(states=[each for each in STATES if each in (states or STATES)], kinds=kinds, limit=limit)
        idle = any(job.state == "queued" for job in found) and not store.workers.alive()
    if as_json:
        _print_json([job_answer(job) for job in found])
        return
    width = max([2, *(len(job.id) for job in found)])
    typer.echo(f"{'id':<{width}}  {'state':<9}  {'done':>5}  {'created (UTC)':<16}  details")
    for job in found:
        details = job.error or (f"waits for approval of {job.waiting_for}" if job.state == "waiting" else job.text)
        typer.echo(
            f"{job.id:<{width}}  {job.state:<9}  {job.progress:>5.0%}  {_minute(job.created)}  {_one_line(details)}"
        )
    if idle:
        typer.echo("no worker is running: `dinov2 worker` starts one", err=True)


@app.command()
def show(
    job_id: IdArgument,
    log: Annotated[int, typer.Option(min=0, help="Also print this many bytes of the end of the log.")] = 0,
    data_dir: DataDirOption = DATA,
) -> None:
    """Print a job as JSON."""
    from service.routes.job_schemas import job_answer

    with _opened(data_dir) as (_, store):
        answer: dict[str, Any] = {**job_answer(store.get(job_id))}
        if log:
            text, position = store.read_log(job_id, limit=log)
            answer["log"] = {"text": text.decode(errors="replace"), "position": position}
    _print_json(answer)


@app.command()
def create(
    kind: Annotated[str, typer.Argument(help="Kind of the job, e.g. train.")],
    params: Annotated[list[str] | None, typer.Argument(metavar="NAME=VALUE", help=PARAMS_HELP)] = None,
    not_before: Annotated[
        str | None, typer.Option(help="Earliest start, as an ISO 8601 time. Default: now. Without a zone: local time.")
    ] = None,
    watch_it: Annotated[bool, typer.Option("--watch", help="Wait until the job has ended, like `watch`.")] = False,
    data_dir: DataDirOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """Create a job and print its id. A worker starts the job as soon as it is free."""
    from service.jobs.kinds import checked_params
    from service.jobs.records import NewJob
    from service.routes.job_schemas import job_answer

    with _opened(data_dir, makes=True) as (jobs, store):
        given = _parsed(params or [])
        checked_params(kind, given, jobs.settings)
        job = jobs.announce(store.create(NewJob(kind, given, not_before=_moment(not_before))))
        if as_json:
            _print_json(job_answer(job))
        else:
            typer.echo(job.id)
        if watch_it:
            raise typer.Exit(_watch(store, job.id, as_json))


@app.command()
def log(
    job_id: IdArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines until the job has ended.")] = False,
    size: Annotated[
        int | None, typer.Option("--bytes", min=0, help="Print only this many bytes of the end. Default: everything.")
    ] = None,
    data_dir: DataDirOption = DATA,
) -> None:
    """Print the log of a job. The beginning of a very long log is not kept."""
    with _opened(data_dir) as (_, store):
        total = store.get(job_id).log_bytes
        position = 0 if size is None else max(total - size, 0)
        seen = None
        while True:
            stamp, ended = store.stamp.read(), _has_ended(store.get(job_id))
            if stamp != seen:
                seen = stamp
                position = _print_log(store, job_id, position)
            if not follow or ended:
                return
            time.sleep(POLL_S)


@app.command()
def watch(job_id: IdArgument, data_dir: DataDirOption = DATA, as_json: JsonOption = False) -> None:
    """Print the progress of a job until it has ended. The exit status is 0 if the job has succeeded, 1 if it has failed
    and 3 if it was cancelled."""
    with _opened(data_dir) as (_, store):
        store.get(job_id)
        raise typer.Exit(_watch(store, job_id, as_json))


@app.command()
def cancel(job_id: IdArgument, data_dir: DataDirOption = DATA, as_json: JsonOption = False) -> None:
    """Cancel a job. The worker of a running job stops it within seconds."""
    _change(data_dir, as_json, lambda jobs, store: store.request_cancel(job_id))


@app.command()
def approve(job_id: IdArgument, data_dir: DataDirOption = DATA, as_json: JsonOption = False) -> None:
    """Approve the step for which a job waits. A worker then goes on with the job."""
    _change(data_dir, as_json, lambda jobs, store: jobs.announce(store.approve(job_id)))


@app.command()
def retry(job_id: IdArgument, data_dir: DataDirOption = DATA, as_json: JsonOption = False) -> None:
    """Queue a failed or cancelled job again. Its finished steps are not repeated."""
    _change(data_dir, as_json, lambda jobs, store: jobs.announce(store.retry(job_id)))


@app.command()
def remove(
    job_id: IdArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    data_dir: DataDirOption = DATA,
) -> None:
    """Remove a job that has ended, with its log and its folder, which may contain a trained network."""
    with _opened(data_dir) as (_, store):
        store.get(job_id)
        if not yes:
            typer.confirm(f"Remove {job_id} and everything in {store.folder(job_id)}?", abort=True)
        store.remove(job_id)
    typer.echo(f"removed {job_id}")


@app.command()
def schedule(
    name: Annotated[str | None, typer.Argument(help="Name of the schedule. Default: list all schedules.")] = None,
    kind: Annotated[str | None, typer.Argument(help="Kind of the jobs.")] = None,
    params: Annotated[list[str] | None, typer.Argument(metavar="NAME=VALUE", help=PARAMS_HELP)] = None,
    every: EveryOption = None,
    zone: ZoneOption = None,
    drop: Annotated[bool, typer.Option("--remove", help="Remove the schedule. Its jobs stay.")] = False,
    data_dir: DataDirOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """List the schedules, create or replace one, or remove one. A schedule creates jobs at certain times."""
    if name is None:
        with _opened(data_dir) as (_, store):
            _show_schedules(store.schedules.all(), as_json)
        return
    if drop:
        if kind is not None or every is not None:
            raise fail("--remove needs only the name of the schedule")
        with _opened(data_dir) as (_, store):
            store.schedules.remove(name)
        typer.echo(f"removed {name}")
        return
    if kind is None or every is None:
        raise fail("give the kind of the jobs and --every, or --remove")
    from service.jobs.kinds import checked_params

    with _opened(data_dir, makes=True) as (jobs, store):
        given = _parsed(params or [])
        checked_params(kind, given, jobs.settings)
        zone = zone or jobs.settings.schedule_zone
        _show_schedules([store.schedules.put(name, kind, given, every=every, zone=zone)], as_json)


@contextmanager
def _opened(data_dir: Path, *, makes: bool = False) -> "Iterator[tuple[OpenedJobs, JobStore]]":
    """Open the jobs of a data folder for the `with` block. Print an expected error and end the command with status 2.
    If `makes` is False, a missing store is an error, so that a mistyped folder does not become an empty store."""
    from service.errors import ServiceError
    from service.jobs.opened import OpenedJobs

    try:
        jobs = OpenedJobs(settings_for(None, data_dir))
        store = jobs.store() if makes else jobs.existing()
        if store is None:
            raise ValueError(f"no jobs in {data_dir.absolute()}: set the folder with --data-dir or DINOV2_DATA_DIR")
        try:
            yield jobs, store
        finally:
            jobs.close()
    except (ServiceError, ValueError, OSError, ImportError) as error:
        raise fail(error) from error


def _change(data_dir: Path, as_json: bool, change: "Callable[[OpenedJobs, JobStore], Job]") -> None:
    """Change a job, and print its new state."""
    from service.routes.job_schemas import job_answer

    with _opened(data_dir) as (jobs, store):
        job = change(jobs, store)
    if as_json:
        _print_json(job_answer(job))
    else:
        typer.echo(f"{job.id}: {job.state}{', cancelling' if job.cancel_requested and job.state == 'running' else ''}")


def _watch(store: "JobStore", job_id: str, as_json: bool) -> int:
    """Print the events of a job until it has ended, and return the exit status."""
    after, seen = 0, None
    while True:
        stamp = store.stamp.read()
        if stamp != seen:
            seen = stamp
            job = store.get(job_id)  # before the events, so that no event is missing if the job has ended
            while events := store.events(after, job_id):
                for event in events:
                    _show_event(event, as_json)
                after = events[-1].number
            if _has_ended(job):
                return STATUSES[job.state]
        time.sleep(POLL_S)


def _show_event(event: "Event", as_json: bool) -> None:
    """Print an event as a line of text or JSON."""
    from service.routes.job_schemas import event_answer

    if as_json:
        typer.echo(json.dumps(event_answer(event)))
        return
    data = event.data
    texts: dict[str, Callable[[], str]] = {
        "state": lambda: f"{data['state']}{': ' + data['error'] if data.get('error') else ''}",
        "progress": lambda: f"{data['progress']:.0%} {data['text']}",
        "step": lambda: f"finished step {data['name']}",
        "cancel": lambda: "cancellation was requested",
        "removed": lambda: "removed",
    }
    if event.kind in texts:
        clock = datetime.fromtimestamp(event.time).strftime("%H:%M:%S")
        typer.echo(f"{clock}  {_one_line(texts[event.kind]())}")


def _print_log(store: "JobStore", job_id: str, position: int) -> int:
    """Print a log from a position on, and return the position at its end."""
    while True:
        text, position = store.read_log(job_id, position)
        if not text:
            sys.stdout.flush()
            return position
        sys.stdout.buffer.write(text)


def _show_schedules(schedules: "list[Schedule]", as_json: bool) -> None:
    """Print schedules as a table or as JSON."""
    from service.routes.job_schemas import schedule_answer

    if as_json:
        _print_json([schedule_answer(schedule) for schedule in schedules])
        return
    width = max([4, *(len(schedule.name) for schedule in schedules)])
    typer.echo(f"{'name':<{width}}  {'kind':<12}  {'every':<16}  {'zone':<16}  next (UTC)")
    for each in schedules:
        typer.echo(f"{each.name:<{width}}  {each.kind:<12}  {each.every:<16}  {each.zone:<16}  {_minute(each.next_at)}")


def _parsed(words: list[str]) -> dict[str, Any]:
    """Return parameters that were given as `name=value`.

    Raises:
        ValueError: a word has no `=`.
    """
    params: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name and equals):
            raise ValueError(f"{word!r} is not a parameter: write name=value")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if name not in params:
            params[name] = value
        elif isinstance(params[name], list):
            params[name].append(value)
        else:
            params[name] = [params[name], value]
    return params


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
        raise ValueError(f"--not-before {text!r} is not an ISO 8601 time such as 2026-12-24T03:00") from error


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _has_ended(job: "Job") -> bool:
    return job.state in STATUSES


def _minute(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _one_line(text: str) -> str:
    """Return a text without line breaks and control characters, which could change the terminal."""
    return "".join(char if char.isprintable() else " " for char in " ".join(text.split()))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
