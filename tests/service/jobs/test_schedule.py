"""Tests of schedules: when they are due, and that a due schedule creates one job."""

import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from service.errors import InvalidRequest, NotFound
from service.jobs.records import Job
from service.jobs.schedule import next_time, parse_every, parse_zone
from service.jobs.store import JobStore

BERLIN = "Europe/Berlin"


def due(every: str, zone: str, after: str, anchor: str | None = None) -> str:
    """Return the next local time of a schedule, with its offset from UTC."""
    where = parse_zone(zone)
    moment = datetime.fromisoformat(after).timestamp()
    start = None if anchor is None else datetime.fromisoformat(anchor).timestamp()
    return datetime.fromtimestamp(next_time(parse_every(every), where, moment, start), where).isoformat()


@pytest.mark.parametrize(
    ("every", "zone", "after", "expected"),
    [
        ("daily 02:30", "UTC", "2026-11-30T02:29:59+00:00", "2026-11-30T02:30:00+00:00"),
        ("daily 02:30", "UTC", "2026-11-30T02:30:00+00:00", "2026-12-01T02:30:00+00:00"),
        ("Sunday 03:00", "UTC", "2026-11-30T00:00:00+00:00", "2026-12-06T03:00:00+00:00"),
        ("sunday 03:00", "UTC", "2026-12-06T03:00:00+00:00", "2026-12-13T03:00:00+00:00"),
        ("daily 00:10", BERLIN, "2026-11-29T23:30:00+00:00", "2026-12-01T00:10:00+01:00"),
        # On 2026-03-29, 02:00 to 03:00 does not exist in Berlin.
        ("daily 02:30", BERLIN, "2026-03-28T12:00:00+01:00", "2026-03-29T03:30:00+02:00"),
        ("daily 02:30", BERLIN, "2026-03-29T03:30:00+02:00", "2026-03-30T02:30:00+02:00"),
        ("sunday 04:00", BERLIN, "2026-03-28T12:00:00+01:00", "2026-03-29T04:00:00+02:00"),
        # On 2026-10-25, 02:00 to 03:00 comes twice. The first time counts, and only it.
        ("daily 02:30", BERLIN, "2026-10-24T12:00:00+02:00", "2026-10-25T02:30:00+02:00"),
        ("daily 02:30", BERLIN, "2026-10-25T02:30:00+02:00", "2026-10-26T02:30:00+01:00"),
        ("daily 02:30", BERLIN, "2026-10-25T02:30:00+01:00", "2026-10-26T02:30:00+01:00"),
        ("6 h", "UTC", "2026-11-30T02:00:00+00:00", "2026-11-30T08:00:00+00:00"),
        ("90min", "UTC", "2026-11-30T02:00:00+00:00", "2026-11-30T03:30:00+00:00"),
    ],
)
def test_the_next_time(every: str, zone: str, after: str, expected: str) -> None:
    assert due(every, zone, after) == expected


def test_an_interval_does_not_drift() -> None:
    anchor = "2026-11-30T00:00:00+00:00"
    assert due("6 h", "UTC", "2026-11-30T06:00:03+00:00", anchor) == "2026-11-30T12:00:00+00:00"
    assert due("6 h", "UTC", "2026-12-01T07:00:00+00:00", anchor) == "2026-12-01T12:00:00+00:00"


@pytest.mark.parametrize(
    "every", ["", "3", "sunday", "sunday 24:00", "someday 03:00", "0 h", "400 d", "daily 2:30", "*/5"]
)
def test_an_error_says_what_is_allowed(every: str) -> None:
    with pytest.raises(ValueError, match=r"is not a schedule: write .*sunday 03:00.*daily 02:30.*6 h.*1 min to 366 d"):
        parse_every(every)


def test_an_unknown_time_zone_is_an_error() -> None:
    for name in ("Berlin", "../etc", ""):
        with pytest.raises(ValueError, match="unknown: use UTC or a name of the IANA database"):
            parse_zone(name)


class Clock:
    time = 1_000_000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> JobStore:
    return JobStore(tmp_path, now=clock)


def end(store: JobStore, job: Job) -> None:
    claimed = store.claim("a", [job.kind], 8)
    assert claimed is not None
    assert claimed.id == job.id
    store.succeed(claimed.lease)


def test_a_due_schedule_creates_a_job(store: JobStore, clock: Clock) -> None:
    store.schedules.put("weekly", "train", {"recipe": "smoke"}, every="6 h", requested_by="Ada")
    assert store.schedules.create_due() == []
    clock.time += 6 * 3600
    (job,) = store.schedules.create_due()
    assert (job.kind, job.params, job.schedule, job.requested_by) == ("train", {"recipe": "smoke"}, "weekly", "Ada")
    assert store.schedules.create_due() == []
    assert store.schedules.get("weekly").last_job == job.id
    end(store, job)
    clock.time += 6 * 3600
    assert len(store.schedules.create_due()) == 1


def test_missed_times_create_one_job(store: JobStore, clock: Clock) -> None:
    store.schedules.put("often", "train", {}, every="6 h")
    clock.time += 100 * 3600
    (job,) = store.schedules.create_due()
    end(store, job)
    assert store.schedules.create_due() == []
    assert store.schedules.get("often").next_at == 1_000_000.0 + 102 * 3600


def test_no_second_job_while_the_first_has_not_ended(store: JobStore, clock: Clock) -> None:
    store.schedules.put("often", "train", {}, every="1 h")
    clock.time += 3600
    (job,) = store.schedules.create_due()
    clock.time += 3600
    assert store.schedules.create_due() == []
    end(store, job)
    clock.time += 3600
    assert len(store.schedules.create_due()) == 1


def test_many_workers_create_one_job(tmp_path: Path, store: JobStore, clock: Clock) -> None:
    store.schedules.put("often", "train", {}, every="1 h")
    clock.time += 3600
    stores = [JobStore(tmp_path, now=clock) for _ in range(4)]
    together = threading.Barrier(4)
    made: list[Job] = []

    def work(one: JobStore) -> Callable[[], None]:
        def run() -> None:
            together.wait()
            made.extend(one.schedules.create_due())

        return run

    threads = [threading.Thread(target=work(one)) for one in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == len(store.jobs()) == 1


def test_schedules_are_replaced_listed_and_removed(store: JobStore) -> None:
    store.schedules.put("b", "train", {}, every="1 h")
    store.schedules.put("a", "train", {}, every="1 h")
    store.schedules.put("b", "export", {}, every="daily 02:30", zone=BERLIN)
    assert [(one.name, one.kind, one.every, one.zone) for one in store.schedules.all()] == [
        ("a", "train", "1 h", "UTC"),
        ("b", "export", "daily 02:30", BERLIN),
    ]
    store.schedules.remove("a")
    for call in (store.schedules.get, store.schedules.remove):
        with pytest.raises(NotFound, match="there is no schedule 'a'"):
            call("a")
    for name, every, zone in (("../x", "1 h", "UTC"), ("x", "never", "UTC"), ("x", "1 h", "Mars/Base")):
        with pytest.raises(InvalidRequest):
            store.schedules.put(name, "train", {}, every=every, zone=zone)
